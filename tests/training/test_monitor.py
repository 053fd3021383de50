"""Log, progress display, grids, seams, speeds and memory."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from pixelgrow.errors import UserError
from pixelgrow.training import cpu, monitor
from pixelgrow.training.log import Averages, Display, Log, duration, numbers
from pixelgrow.training.monitor import Hook, Meter, Row
from pixelgrow.training.objective import Terms


def test_the_log_keeps_the_lines_before_the_state(tmp_path: Path) -> None:
    log = Log(tmp_path)
    for i in range(5):
        log.write(i, {"loss": i / 3, "bad": float("nan")})
    log.close()
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"images": 5, "lo')
    log = Log(tmp_path, keep=3, images=2)
    assert log.lines == 3
    log.write(3, {"loss": 7})
    log.flush()
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["images"] for r in records] == [0, 1, 2, 3]
    assert records[1]["loss"] == pytest.approx(1 / 3, rel=1e-5)
    assert records[0]["bad"] is None
    log = Log(tmp_path, tensorboard=False)
    assert log.lines == 0
    assert log.board is None
    log.close()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"log\.jsonl: No space left"):
        patch.setattr(os, "fsync", full)
        log.flush()
    log.close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_bytes(b"")
    with pytest.raises(UserError, match="tensorboard is a file, not a folder"):
        Log(tmp_path / "other")


def test_averages() -> None:
    means = Averages()
    means.add({"a": 1.0, "b": 2.0})
    means.add({"a": 2.0})
    again = Averages(json.loads(json.dumps(means.stored())))
    assert means.read() == {"a": 1.5, "b": 2.0}
    assert means.read() == {}
    again.add({"b": 4.0})
    assert again.read() == {"a": 1.5, "b": 3.0}


def test_numbers_move_at_once_and_a_tensor_of_several_counts_as_its_mean() -> None:
    logs = [{"a": torch.tensor([1.0, 3.0]), "b": 4.0}, {"b": torch.tensor(5.0)}]
    assert numbers(logs, torch.tensor(6.0)) == ([{"a": 2.0, "b": 4.0}, {"b": 5.0}], [6.0])


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(caplog: pytest.LogCaptureFixture) -> None:
    text = io.StringIO()
    with Display("core", 100, 20, Console(file=text, force_terminal=True, width=120)) as display:
        display.update(60, "loss 0.5")
    assert "core" in text.getvalue()
    assert "60/100 images" in text.getvalue()
    assert not caplog.records
    text = io.StringIO()
    with caplog.at_level(logging.INFO), Display("core", 100, 20, Console(file=text), pause=60) as display:
        for images in range(30, 101, 10):
            display.update(images, "loss 0.5")
    assert text.getvalue() == ""
    assert [r.getMessage().split(" images")[0] for r in caplog.records] == ["core: 30 of 100", "core: 100 of 100"]
    assert "loss 0.5" in caplog.text


def test_durations() -> None:
    assert [duration(x) for x in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 5 s", "2 h 10 min"]


def test_when_a_hook_is_due() -> None:
    hook = Hook("x", 100, lambda _: {})
    assert not hook.due(0, 0, 1000)
    assert Hook("x", 100, lambda _: {}, at_start=True).due(0, 0, 1000)
    assert [t for t in range(64, 1001, 64) if hook.due(t - 64, t, 960)] == [128, 256, 320, 448, 512, 640, 704, 832, 960]
    assert not Hook("x", 0, lambda _: {}, at_start=True).due(0, 1000, 1000)


def brute_seams(images: np.ndarray, patch: int) -> float:
    across, inside = [], []
    _, _, h, w = images.shape
    for y in range(h - 1):
        (across if (y + 1) % patch == 0 else inside).append(((images[:, :, y + 1] - images[:, :, y]) ** 2).mean())
    for x in range(w - 1):
        (across if (x + 1) % patch == 0 else inside).append(((images[..., x + 1] - images[..., x]) ** 2).mean())
    return float(np.mean(across) / np.mean(inside))


def test_seam_ratios_by_brute_force_and_on_plain_cases() -> None:
    noise = torch.randn(3, 3, 24, 16)
    assert monitor.seams(noise, [8])["seams_8"] == pytest.approx(brute_seams(noise.double().numpy(), 8))
    assert monitor.seams(torch.randn(8, 3, 64, 64), [8])["seams_8"] == pytest.approx(1, abs=0.05)
    tiles = torch.randn(4, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert monitor.seams(tiles + 0.01 * torch.randn_like(tiles), [8])["seams_8"] > 100
    assert monitor.seams(tiles, [8])["seams_8"] > 1e6  # nothing at all inside the patches is the worst seam, not none
    assert monitor.seams(torch.zeros(1, 3, 8, 8), [4]) == {"seams_4": 1}
    assert monitor.seams(noise, [64]) == {"seams_64": 1}
    batches = monitor.Seams([4, 8])
    for some in noise.split(1):
        batches.add(some)
    assert batches.ratios() == pytest.approx(monitor.seams(noise, [4, 8]))


def test_a_grid_is_written_and_its_seams_logged(tmp_path: Path) -> None:
    images = torch.linspace(-1.2, 1.2, 5)[:, None, None, None].expand(5, 3, 4, 6)
    rows = [Row(images[:3], "prompts", ["a", "b\n c", "d"]), Row(images[3:], "more", ["e", "f"])]
    assert monitor.grid_hook(lambda: rows, tmp_path, 10, (2, 8)).run(640) == {"seams_2": 1.0, "seams_8": 1.0}
    flat, noise = Row(torch.zeros(1, 3, 16, 16), "flat", ["x"]), torch.rand(2, 3, 16, 16)
    others = [flat, Row(noise, "real", ["x", "y"], made=False)]
    assert monitor.grid_hook(lambda: others, tmp_path / "some", 10).run(0) == {"seams_8": 1.0}
    made = [flat, Row(noise, "made", ["x", "y"])]
    assert monitor.grid_hook(lambda: made, tmp_path / "some", 10).run(0) != {"seams_8": 1.0}
    sheet = np.asarray(Image.open(tmp_path / "samples" / "000000640.png"))
    assert sheet.shape == (10, 22, 3)
    assert sheet[0, 0, 0] == 0
    assert sheet[6, 8, 0] == 255
    assert sheet[0, 16, 0] == 128
    assert (sheet[4:6] == 255).all()
    assert (sheet[6:, 16:] == 255).all()  # the last row has two images
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["000000640.png", "prompts.txt"]


def test_a_grid_says_what_its_rows_are(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 2, 2)
    rows = [
        Row(image, "captions", ["a\n  cat"]),
        Row(image, "images", ["a\n  cat"], made=False),
        Row(image, "c", ["d"]),
    ]
    monitor.save_rows(rows, tmp_path / "1.png")
    text = "row 1: captions\n  a cat\nrow 2: images\nrow 3: c\n  d\n"
    assert (tmp_path / "prompts.txt").read_text(encoding="utf-8") == text
    with Image.open(tmp_path / "1.png") as sheet:
        assert json.loads(sheet.info["pixelgrow"]) == {"rows": text}


def test_a_grid_that_cannot_be_sampled_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> list[Row]:
        raise UserError("sampling gave non-finite pixels")

    assert monitor.grid_hook(fails, tmp_path, 10).run(640) == {}
    assert "no sample grid at 640 images: sampling gave non-finite pixels" in caplog.text


@dataclass(frozen=True)
class Rows:
    index: torch.Tensor


class Products:
    modules = {"net": nn.Linear(32, 64, bias=False)}  # noqa: RUF012
    rates = {"net": 1.0}  # noqa: RUF012

    def loss(self, batch: Rows, part: str) -> Terms:
        x = torch.ones(len(batch.index), 32, requires_grad=True)
        return Terms(self.modules["net"](x).sum())


def test_flops_are_those_of_the_products_forward_and_backward() -> None:
    objective = Products()
    assert monitor.flops_per_image(objective, Rows(torch.arange(6))) == 3 * 2 * 32 * 64
    assert monitor.flops_per_image(objective, Rows(torch.arange(1))) == 3 * 2 * 32 * 64
    assert objective.modules["net"].weight.grad is None


class Attention:
    modules = {"net": nn.Linear(8, 8, bias=False)}  # noqa: RUF012
    rates = {"net": 1.0}  # noqa: RUF012

    def loss(self, batch: Rows, part: str) -> Terms:
        q = self.modules["net"](torch.ones(len(batch.index), 1, 16, 8))
        return Terms(nn.functional.scaled_dot_product_attention(q, q, q).sum())


def test_flops_of_attention_are_counted() -> None:
    products = 2 * 16 * 8 * 8 * 2  # forward, and the weight's gradient
    forward, backward = 2 * 2 * 16 * 16 * 8, 5 * 2 * 16 * 16 * 8  # backward computes the scores once more
    assert monitor.flops_per_image(Attention(), Rows(torch.arange(4))) == products + forward + backward


def test_meter() -> None:
    meter = Meter(flops=1e6, rate=1e9)
    assert meter.speed == 0
    meter.add(100, 0.5, 0.5)
    meter.read(0.25)
    assert meter.values == {"images_per_second": 100.0, "waited": 0.5, "matmul_share": 0.2}
    assert meter.note == "loss 0.25, 100 images/s"
    meter.add(300, 1.0, 0.0)
    assert meter.speed == 200
    assert meter.share == 0.2
    assert Meter(None, 1e9).share is None


def test_rates_and_memory_are_plausible() -> None:
    assert 1e8 < monitor.matmul_rate(torch.device("cpu"), torch.float32, 0.01) < 1e14
    assert 2**26 < monitor.peak_memory(torch.device("cpu")) < 2**40


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system counts from the start only")
def test_peak_memory_is_counted_from_a_reset_on() -> None:
    device, size = torch.device("cpu"), 256 * 2**20
    cpu.tune_allocator()  # as `pixelgrow run` does: it keeps what is freed
    before = monitor.peak_memory(device)
    big = np.ones(size, np.uint8)
    high = monitor.peak_memory(device)
    assert high >= before
    del big
    monitor.reset_peak(device)
    assert monitor.peak_memory(device) < high - size // 2
