"""Checkpoints: atomic writes, strict loads, and one line for any damage."""

from __future__ import annotations

import errno
import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelgrow import checkpoint
from pixelgrow.checkpoint import CheckpointConfig
from pixelgrow.diffusion.denoiser import Denoiser
from pixelgrow.errors import UserError
from pixelgrow.models.cond import Cond
from pixelgrow.models.config import CoreConfig
from pixelgrow.models.sizes import shallow_uvit
from pixelgrow.models.uvit import UViT


def model(seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    core = CoreConfig(width=32, depth=1, heads=2, text_dim=8, pooled_dim=8)
    return Denoiser(UViT(shallow_uvit("tiny", 16, core=core)))


def config_of(d: Denoiser) -> CheckpointConfig:
    return CheckpointConfig(network=d.net.config, diffusion=d.config, text={"encoder": "minilm", "max_tokens": 8})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder)[0].net.state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    d = model()
    checkpoint.save(tmp_path / "c", d, config_of(d))
    return tmp_path / "c"


def test_round_trip_is_exact(saved: Path) -> None:
    back, config = checkpoint.load(saved)
    want = model().net.state_dict()
    assert all(torch.equal(t, want[n]) for n, t in back.net.state_dict().items())
    assert config.sha256 == checkpoint.file_hash(saved / checkpoint.WEIGHTS)
    card = (saved / checkpoint.CARD).read_text()
    assert "pipeline_tag: text-to-image" in card and "license" not in card
    assert sorted(p.name for p in saved.parent.iterdir()) == ["c"]


def test_all_files_of_a_checkpoint_may_be_read_by_those_who_may_read_one(saved: Path) -> None:
    assert len({p.stat().st_mode for p in saved.iterdir()}) == 1


def damage_truncate(folder: Path) -> str:
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    return "model.safetensors is cut off"


def damage_flip(folder: Path) -> str:
    path = folder / checkpoint.WEIGHTS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return r"model.safetensors \(float32\) is damaged"


def damage_missing(folder: Path) -> str:
    (folder / checkpoint.WEIGHTS).unlink()
    return "model.safetensors is missing"


def damage_json(folder: Path) -> str:
    (folder / checkpoint.CONFIG).write_text('{"format": 1, "netw')
    return "config.json is damaged"


def damage_bytes(folder: Path) -> str:
    (folder / checkpoint.CONFIG).write_bytes(b"\xff\xfe\x00garbage")
    return "config.json is damaged"


def damage_shape(folder: Path) -> str:
    raw = json.loads((folder / checkpoint.CONFIG).read_text())
    raw["network"]["core"]["depth"] = 2
    (folder / checkpoint.CONFIG).write_text(json.dumps(raw))
    return "does not fit its config.json"


def damage_width(folder: Path) -> str:
    raw = json.loads((folder / checkpoint.CONFIG).read_text())
    raw["network"]["core"]["text_dim"] = 16
    (folder / checkpoint.CONFIG).write_text(json.dumps(raw))
    return r"0 tensors missing, 0 unknown; the first to differ is core\..*8.*expected .*16"


def damaged(where: str, value: object, message: str):  # type: ignore[no-untyped-def]
    """A damage that sets one field of config.json."""

    def damage(folder: Path) -> str:
        raw = json.loads((folder / checkpoint.CONFIG).read_text())
        *path, last = where.split(".")
        here = raw
        for key in path:
            here = here[int(key) if key.isdigit() else key]
        here[last] = value
        (folder / checkpoint.CONFIG).write_text(json.dumps(raw))
        return rf"config.json is damaged or of another version \({message}"

    return damage


def damage_dtype(folder: Path) -> str:
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, folder / checkpoint.WEIGHTS)
    unhashed(folder)
    return "are stored as float8_e4m3fn, expected one of float32, float16, bfloat16; convert or copy"


def unhashed(folder: Path) -> None:
    """Remove the hash of a checkpoint's weights, as for a conversion by other tools."""
    raw = json.loads((folder / checkpoint.CONFIG).read_text())
    (folder / checkpoint.CONFIG).write_text(json.dumps(raw | {"sha256": ""}))


def damage_unreadable_weights(folder: Path) -> str:
    (folder / checkpoint.WEIGHTS).unlink()
    (folder / checkpoint.WEIGHTS).mkdir()  # as unreadable as a file without permission, to root too
    return "model.safetensors cannot be read"


def damage_unreadable_config(folder: Path) -> str:
    (folder / checkpoint.CONFIG).unlink()
    (folder / checkpoint.CONFIG).mkdir()
    return "config.json cannot be read"


def damage_none(folder: Path) -> str:
    (folder / checkpoint.CONFIG).unlink()
    return "is not a checkpoint"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_flip,
        damage_missing,
        damage_json,
        damage_bytes,
        damage_shape,
        damage_width,
        damage_dtype,
        damage_unreadable_weights,
        damage_unreadable_config,
        damage_none,
        damaged("network.core.heads", 0, "network.core.heads: Input should be greater than or equal to 1"),
        damaged("network.core_stride", 0, "network.core_stride: "),
        damaged("network.rungs.0.patch", 0, "network.rungs.0.patch: "),
        damaged("network.core.heads", 7, "network.core: width .* is not a multiple of 4 and of heads 7"),
        damaged("network.core.hats", 7, "network.core.hats: Extra inputs"),
        damaged("sampling", {"stpes": 3}, "sampling: stpes: Extra inputs"),
        damaged("sampling", {"steps": "few"}, "sampling: steps: Input should be a valid integer"),
        damaged("format", 2, "format: "),
    ],
)
def test_damage_is_one_line_that_names_the_file(saved: Path, damage) -> None:  # type: ignore[no-untyped-def]
    message = damage(saved)
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.load(saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_float32(saved: Path, dtype: torch.dtype) -> None:
    """All tensors converted, or one of them."""
    path = saved / checkpoint.WEIGHTS
    before = load_file(path)
    for names in (before.keys(), ["core.null_token"]):
        save_file({n: t.to(dtype) if n in names else t for n, t in before.items()}, path)
        unhashed(saved)
        back, _ = checkpoint.load(saved)
        for name, t in back.net.state_dict().items():
            want = before[name].to(dtype).float() if name in names else before[name]
            assert t.dtype == torch.float32 and torch.equal(t, want), name
        x = torch.zeros(1, 3, 16, 16)
        cond = Cond(torch.randn(1, 4, 8), torch.ones(1, 4) > 0, torch.randn(1, 8), torch.zeros(1) > 0)
        assert back(x, torch.ones(1), cond).dtype == torch.float32


def test_saving_in_half_precision_rounds_parameters_and_says_so(saved: Path) -> None:
    """Buffers are not rounded: whitening by a rounded matrix would mix directions of large variance into small ones."""
    d, config = checkpoint.load(saved)
    torch.nn.init.normal_(d.net.core.text_scale)
    half = saved.parent / "half"
    checkpoint.save(half, d, config, dtype=torch.float16)
    stored = load_file(half / checkpoint.WEIGHTS)
    back, converted = checkpoint.load(half)
    parameters = {name for name, _ in d.net.named_parameters()}
    assert parameters < stored.keys()
    for name, t in d.net.state_dict().items():
        want = t.half() if name in parameters else t
        assert stored[name].dtype == want.dtype and torch.equal(stored[name], want), name
        assert torch.equal(back.net.state_dict()[name], want.float()), name
    assert converted.lineage == [{"verb": "cast", "dtype": "float16", "parent": config.sha256}]
    assert converted.sha256 == checkpoint.file_hash(half / checkpoint.WEIGHTS) != config.sha256
    checkpoint.save(saved, d, config, dtype=torch.float32)  # not a cast
    assert checkpoint.read_config(saved).lineage == []


def test_what_half_precision_cannot_hold_is_one_line(saved: Path) -> None:
    d, config = checkpoint.load(saved)
    with pytest.raises(UserError, match="dtype int8: expected one of float32, float16, bfloat16"):
        checkpoint.save(saved.parent / "half", d, config, dtype=torch.int8)
    with torch.no_grad():
        d.net.core.null_token[3] = 1e5
    with pytest.raises(UserError, match="null_token exceeds the range of float16; save in bfloat16 or float32"):
        checkpoint.save(saved.parent / "half", d, config, dtype=torch.float16)
    checkpoint.save(saved.parent / "half", d, config, dtype=torch.bfloat16)


def test_nothing_but_a_checkpoint_is_ever_replaced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = model(1)
    notes = saved / "notes.txt"
    notes.write_text("mine")
    file, nested, link = (saved.parent / name for name in ("file", "runs", "link"))
    file.write_text("mine")
    (nested / "demo").mkdir(parents=True)
    link.symlink_to(saved)
    monkeypatch.chdir(saved)
    for target, words in (
        (saved, "holds notes.txt"), (file, "is a file or a link"), (link, "is a file or a link"),
        (nested, "holds demo"), (Path("."), "a folder with a name"), (Path(".."), "a folder with a name"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words) as caught:
            checkpoint.save(target, other, config_of(other))
        assert "\n" not in str(caught.value)
    assert notes.read_text() == file.read_text() == "mine" and (nested / "demo").is_dir()
    notes.unlink()
    checkpoint.save(saved, other, config_of(other))
    (saved.parent / "empty").mkdir()
    checkpoint.save(saved.parent / "empty", other, config_of(other))
    assert all(
        torch.equal(*pair)
        for pair in zip(*(w.values() for w in map(weights, (saved, saved.parent / "empty"))), strict=True)
    )


def test_a_full_disk_leaves_the_previous_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    other = model(1)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(saved, other, config_of(other))
    back, _ = checkpoint.load(saved)
    assert torch.equal(back.net.core.blocks[0].up.weight, model().net.core.blocks[0].up.weight)  # type: ignore[union-attr]
    assert sorted(p.name for p in saved.parent.iterdir()) == ["c"]


def test_the_files_of_a_killed_save_are_removed(saved: Path) -> None:
    left = saved.parent / ".c.part"
    left.mkdir()
    (left / checkpoint.WEIGHTS).write_bytes(b"half")
    (left / "other").write_bytes(b"half")
    d = model()
    checkpoint.save(saved, d, config_of(d))
    assert [p.name for p in saved.parent.iterdir()] == ["c"]
    assert sorted(p.name for p in saved.iterdir()) == [checkpoint.CARD, checkpoint.CONFIG, checkpoint.WEIGHTS]


def test_a_save_leaves_those_of_others_alone(saved: Path) -> None:
    """`c` next to an unfinished `c.15`, and `c` that another process writes already."""
    d = model()
    with checkpoint.replacing(saved.parent / "c.15") as other:
        (other / checkpoint.WEIGHTS).write_bytes(b"half")
        checkpoint.save(saved, d, config_of(d))
        assert (other / checkpoint.WEIGHTS).read_bytes() == b"half"
    assert (saved.parent / "c.15").is_dir()
    with checkpoint.replacing(saved) as first:
        (first / checkpoint.WEIGHTS).write_bytes(b"first")
        with pytest.raises(UserError, match="c is being written by another process: wait, or"):
            checkpoint.save(saved, d, config_of(d))
        assert (first / checkpoint.WEIGHTS).read_bytes() == b"first"
    assert (saved / checkpoint.WEIGHTS).read_bytes() == b"first"


def test_reading_waits_for_a_save_between_its_renames(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it put the previous folder back at that moment, the save could not finish."""
    real, readers = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".c.part":
            readers.append(threading.Thread(target=checkpoint.read_config, args=(saved,)))
            readers[0].start()
            readers[0].join(0.2)
        return real(self, target)

    other = model(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        checkpoint.save(saved, other, config_of(other))
    readers[0].join(10)
    assert not readers[0].is_alive()
    assert torch.equal(weights(saved)["core.null_token"], other.net.core.null_token)
    assert [p.name for p in saved.parent.iterdir()] == ["c"]


@pytest.mark.parametrize("at", [0, 1])
def test_a_kill_between_the_renames_is_recovered(saved: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Killed before the at-th rename of replacing a checkpoint: the folder still loads, as before or as saved."""
    real, seen = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(seen) == at:
            raise KeyboardInterrupt
        seen.append(target)
        return real(self, target)

    other = model(1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(saved, other, config_of(other))
    back, _ = checkpoint.load(saved)
    weight = back.net.core.blocks[0].up.weight  # type: ignore[union-attr]
    assert torch.equal(weight, model().net.core.blocks[0].up.weight)  # type: ignore[union-attr]
