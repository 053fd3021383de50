"""Samples of several captions, and a second caption by an image-to-text model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from data.test_sources import an_image, captioned, write_metadata, write_tar
from pixelgrow import rng
from pixelgrow.cli.recaption import Recaption, recaption
from pixelgrow.data import heldout_split, open_source
from pixelgrow.data.inspect import inspect_source
from pixelgrow.data.loader import Loader
from pixelgrow.data.sources.base import Wording, chosen, wordings_of
from pixelgrow.errors import UserError
from pixelgrow.onestep.losses import guidance_weights
from pixelgrow.onestep.pairs import Pairs
from pixelgrow.onestep.stream import PairStream
from pixelgrow.recipe.read import read_recipe
from pixelgrow.run import run
from pixelgrow.stages import train
from text_models import save_tokenizer

SEVERAL = ["first", {"text": "second", "weight": 3}]


def several(folder: Path, count: int = 4) -> Path:
    """Images with two captions each, the second of three times the weight, and one image with a single caption."""
    rows: list[object] = [
        {"file_name": f"{i}.png", "text": [f"first {i}", {"text": f"second {i}", "weight": 3}]} for i in range(count)
    ]
    write_metadata(folder, [*rows, {"file_name": "alone.png", "text": "alone"}])
    for i in range(count):
        (folder / f"{i}.png").write_bytes(an_image(40, 40, 50 * i))
    (folder / "alone.png").write_bytes(an_image())
    return folder


# --- samples of several captions --------------------------------------------------------------------------------------


def test_a_line_may_have_several_captions_with_weights(tmp_path: Path) -> None:
    source = open_source(str(several(tmp_path)))
    assert [source.text(i) for i in (1, 4)] == ["first 1", "alone"]
    assert wordings_of(source, 1) == (Wording("first 1"), Wording("second 1", 3.0))
    assert wordings_of(source, 4) == (Wording("alone"),)
    kept, held = heldout_split(source, at_least=2)
    assert kept.several and {len(wordings_of(held, i)) for i in range(len(held))} <= {1, 2}
    assert inspect_source(source).distinct == 9


def test_the_json_of_a_tar_may_have_several_captions(tmp_path: Path) -> None:
    row = json.dumps({"caption": SEVERAL}).encode()
    source = open_source(str(write_tar(tmp_path / "a.tar", [("0.png", an_image()), ("0.json", row)])))
    assert source.text(0) == "first" and wordings_of(source, 0) == (Wording("first"), Wording("second", 3.0))


def test_one_caption_in_a_list_is_one_caption(tmp_path: Path) -> None:
    fingerprints = []
    (tmp_path / "a.png").write_bytes(an_image())
    for text in ("a cat", ["a cat"]):
        source = open_source(str(write_metadata(tmp_path, [{"file_name": "a.png", "text": text}])))
        assert not getattr(source, "several", True)
        fingerprints.append(source.fingerprint)
    assert fingerprints[0] == fingerprints[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ([], "empty list of captions"),
        ([{"text": "a", "weight": 0}, "b"], "caption weight is 0, not a number above 0"),
        ([{"text": "a", "weight": "much"}], "caption weight is 'much', not a number above 0"),
        (["a", 3], "caption is int, not text"),
        ([{"weight": 1}], "no caption"),
    ],
)
def test_a_line_with_a_caption_that_is_none_is_bad(tmp_path: Path, text: Any, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(an_image())
    (tmp_path / "b.png").write_bytes(an_image())
    rows = [{"file_name": "a.png", "text": "fine"}, {"file_name": "b.png", "text": text}]
    source: Any = open_source(str(write_metadata(tmp_path, rows)))
    assert [bad.reason for bad in source.bad] == [reason]


def test_captions_are_chosen_by_their_weights() -> None:
    wordings = (Wording("a", 1), Wording("b", 2), Wording("c", 1))
    assert [chosen(wordings, u) for u in (0, 0.24, 0.25, 0.74, 0.75, 0.999, 1.0)] == [0, 0, 1, 1, 2, 2, 2]


def test_a_sample_has_one_of_its_captions_each_time_wherever_the_stream_begins(tmp_path: Path) -> None:
    source = open_source(str(several(tmp_path)))
    loader = Loader(source, size=(16, 16), batch=100, seed=3)
    assert set(loader.texts()) == {f"{n} {i}" for n in ("first", "second") for i in range(4)} | {"alone"}
    batches = loader.batches()
    texts = [text for _ in range(10) for text in next(batches).text]
    count = Counter(text.split()[0] for text in texts)
    assert count["alone"] == 200 and 0.7 < count["second"] / (count["first"] + count["second"]) < 0.8
    assert next(Loader(source, size=(16, 16), batch=50, seed=3).batches(150)).text == tuple(texts[150:200])
    raw = loader.load(0)
    assert [wordings_of(source, int(o[1]))[c].text for o, c in zip(raw.origin, raw.caption, strict=True)] == texts[:100]


def test_a_pair_keeps_the_caption_that_it_was_made_with(tmp_path: Path) -> None:
    folder = several(tmp_path / "images", 30)
    stages = [
        {"train": {"name": "core", "size": "tiny", "resolution": 16, "images": 8, "batch": 8, "sample_every": 0,
                   "validate_every": 0, "snapshot_every": 0}},
        {"pairs": {"name": "pairs", "n": 16, "batch": 8, "shard": 8, "steps": 2, "flip": True,
                   "guidance": "mixed"}},
    ]  # fmt: skip
    recipe = read_recipe({"name": "x", "data": str(folder), "stages": stages}, "x.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WATCHED", 8)
        run(recipe, tmp_path)
    pairs = Pairs(tmp_path / "x" / "pairs")
    assert pairs.origins.shape == (32, 4) and set(pairs.origins[:, 2].tolist()) == {0, 1}
    assert set(pairs.origins[:, 3].tolist()) == {0, 1}
    source, _ = heldout_split(open_source(str(folder)), 0.02, 0)
    stream = PairStream(Loader(source, size=(16, 16), batch=4, seed=1), pairs, 16)
    captions = [wordings_of(source, int(o[1]))[int(o[3])].text for o in pairs.origins]
    assert list(stream.texts()) == captions and len({text.split()[0] for text in captions}) >= 2
    u = rng.uniform(rng.seed_of(0, "stage", "pairs"), "guidance", range(16))
    both = torch.cat([u[:8], u[:8], u[8:], u[8:]])  # a shard's images, then their mirror images
    by_kind = [guidance_weights(both, distribution).float() for distribution in ("captions", "recaptions")]
    assert torch.equal(pairs.guidance, torch.where(pairs.origins[:, 3] == 0, *by_kind))  # type: ignore[arg-type]
    with contextlib.closing(stream.batches()) as batches:
        some = next(batches)
    assert [text.startswith("second") for text in some.text] == [bool(c) for c in some.caption]  # type: ignore[union-attr]


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny image encoder with a text decoder, with random weights."""
    folder = tmp_path_factory.mktemp("captioner")
    torch.manual_seed(0)
    size = save_tokenizer(folder, start=True)
    encoder = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    decoder = transformers.GPT2Config(
        vocab_size=size, n_embd=16, n_layer=1, n_head=2, n_positions=32, is_decoder=True, add_cross_attention=True
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = size - 2, 0
    model = transformers.VisionEncoderDecoderModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = size - 2, 0
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_image_gets_a_second_caption(tmp_path: Path, captioner: Path, run_cli: Any) -> None:
    folder, out = captioned(tmp_path / "images", 5), tmp_path / "new.jsonl"
    done = run_cli(
        "data", "recaption", folder, "--model", captioner, "-o", out, "--weight", "0.5", "--batch", "2", "--tokens", "4"
    )
    assert done.code == 0 and "5 of 5 images have a second caption" in done.out, done.err
    found = rows(out)
    assert [row["file_name"] for row in found] == [f"{i}.png" for i in range(5)]
    assert all(row["text"][0] == f"caption {i}" and row["text"][1]["weight"] == 0.5 for i, row in enumerate(found))
    assert all(1 <= len(row["text"][1]["text"].split()) <= 5 for row in found)  # and the start
    out.replace(folder / "metadata.jsonl")
    source = open_source(str(folder))
    assert [w.text for w in wordings_of(source, 2)] == ["caption 2", found[2]["text"][1]["text"]]


def test_an_interrupted_call_goes_on_to_the_same_bytes(
    tmp_path: Path, captioner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = captioned(tmp_path / "images", 5)
    (folder / "3.png").write_bytes(an_image()[:60])  # its header is whole
    whole = Recaption(str(folder), str(captioner), tmp_path / "whole.jsonl", batch=2, tokens=4)
    assert recaption(whole).startswith("4 of 5 images")
    assert rows(whole.out)[3] == {"file_name": "3.png", "text": "caption 3"}

    from pixelgrow.cli import recaption as verb

    real, calls = verb.Captioner.__call__, []

    def stops(self: Any, images: Any) -> list[str]:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, images)

    cut = Recaption(whole.source, whole.model, tmp_path / "cut.jsonl", batch=2, tokens=4)
    monkeypatch.setattr(verb.Captioner, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        recaption(cut)
    assert not cut.out.exists()
    with (tmp_path / ".cut.jsonl.part").open("ab") as part:
        part.write(b'"half a li')
    recaption(cut)
    assert cut.out.read_bytes() == whole.out.read_bytes() and calls == [2, 1, 1, 1]
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_fails_is_one_line_unless_memory_ran_out(captioner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelgrow.cli.recaption import Captioner

    made, images = Captioner(str(captioner)), [Image.new("RGB", (16, 16))] * 2
    for raised in (ValueError("image tokens\nand more"), TypeError("image tokens"), RuntimeError("image tokens")):
        monkeypatch.setattr(made.model, "generate", Mock(side_effect=raised))
        with pytest.raises(UserError, match=r"cannot caption 2 images \(image tokens\): try --batch 1") as error:
            made(images)
        assert "\n" not in str(error.value) and "--prompt" in str(error.value)
    monkeypatch.setattr(made.model, "generate", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        made(images)


def test_prompts_are_padded_on_the_left(captioner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixelgrow.cli.recaption import Captioner

    made, images = Captioner(str(captioner), tokens=4), [Image.new("RGB", (16, 16))] * 2
    prepare, sides = made.prepare, []

    def both(images: Any, text: list[str], padding: bool, return_tensors: str) -> Any:
        sides.append((made.tokenizer.padding_side, padding, text))
        return prepare(images=images, return_tensors=return_tensors)

    made.prompt, made.prepare = "what is this?", both
    assert len(made(images)) == 2 and sides == [("left", True, ["what is this?"] * 2)]


def test_mistakes_are_one_line(tmp_path: Path, captioner: Path, run_cli: Any) -> None:
    folder, out = captioned(tmp_path / "images"), tmp_path / "new.jsonl"
    cut_off = shutil.copytree(captioner, tmp_path / "cut off")
    tensors = load_file(cut_off / "model.safetensors")
    del tensors["decoder.transformer.h.0.attn.c_attn.weight"]
    save_file(tensors, cut_off / "model.safetensors", metadata={"format": "pt"})
    for args, words in (
        (("scenes", "--model", captioner), "scenes: got scenes, expected a folder"),
        ((folder, "--model", tmp_path / "nothing"), "is not a folder here"),
        ((folder, "--model", folder), "cannot be loaded"),
        ((folder, "--model", cut_off), "lack 'decoder.transformer.h.0.attn.c_attn.weight' and 0 more"),
        ((folder, "--model", captioner, "--prompt", "what is this?"), "which takes none; drop it"),
    ):
        done = run_cli("data", "recaption", *args, "-o", out)
        assert done.code == 2 and words in done.err and done.err.count("\n") == 1, done.err
    assert not out.exists()
    out.write_text("")
    with pytest.raises(UserError, match="the file exists already"):
        recaption(Recaption(str(folder), str(captioner), out))
