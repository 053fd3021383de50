"""The stream: a position has one content, whatever the number of workers, the start, or the bad files met before."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelgrow.data import BadFile, BadImage, Batch, Loader, open_source, take
from pixelgrow.data.badfiles import BadFiles
from pixelgrow.data.loader import to_tensor
from pixelgrow.data.order import Order
from pixelgrow.data.scenes.source import Scenes
from pixelgrow.data.sources.base import Subset
from pixelgrow.errors import UserError
from pixelgrow.models.cond import cond_of
from pixelgrow.text.encoders import padded


class Shades:
    """A source in memory: sample i has the grey value i; those in `broken` cannot be decoded."""

    fingerprint = "shades"

    def __init__(self, count: int, broken: frozenset[int] = frozenset(), name: str = "shades", side: int = 100) -> None:
        self.count, self.broken, self.name, self.side = count, broken, name, side

    def __len__(self) -> int:
        return self.count

    def size(self, i: int) -> tuple[int, int]:
        return (self.side, self.side + i)

    def text(self, i: int) -> str:
        return f"{self.name} {i}"

    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        if i in self.broken:
            raise BadImage("broken")
        image = np.full((*size, 3), i % 256, np.uint8)
        image[0, 0] = [round(255 * c) for c in (*crop, 0)]
        return image

    def key(self, i: int) -> str:
        return f"{i}.png"


def first(loader: Loader, batches: int, start: int = 0) -> list[Batch]:
    stream = loader.batches(start)
    taken = list(itertools.islice(stream, batches))
    stream.close()
    return taken


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.image, b.image) and a.text == b.text and torch.equal(a.index, b.index)
        for a, b in zip(one, other, strict=True)
    )


def texts(batches: list[Batch]) -> list[str]:
    return [text for batch in batches for text in batch.text]


def test_a_batch() -> None:
    batch = first(Loader(Shades(10), size=(6, 8), batch=5), 1, start=20)[0]
    assert batch.image.shape == (5, 3, 6, 8)
    assert batch.image.dtype == torch.uint8
    assert batch.index.tolist() == [20, 21, 22, 23, 24]
    assert batch.index.dtype == torch.int64
    assert len(batch) == 5


def test_pixels_span_minus_one_to_one() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    image = to_tensor(ramp)
    assert image.shape == (1, 3, 16, 16)
    assert (image.min(), image.max()) == (-1.0, 1.0)
    assert torch.equal(
        ((image + 1) * 127.5).round().to(torch.uint8)[0, 0].flatten(), torch.arange(256, dtype=torch.uint8)
    )


def test_every_image_once_in_each_epoch_in_a_new_order() -> None:
    found = texts(first(Loader(Shades(30), size=(4, 4), batch=10), 9))
    epochs = [found[:30], found[30:60], found[60:]]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(first(Loader(Shades(30), size=(4, 4), batch=10, seed=1), 3)) != epochs[0]


@pytest.mark.parametrize("broken", [frozenset[int](), frozenset({3, 4, 17})])
def test_the_same_from_any_position_at_any_batch_size(broken: frozenset[int]) -> None:
    def loader(batch: int) -> Loader:
        return Loader(Shades(23, broken), size=(4, 4), batch=batch, flip=True, bad_limit=1.0)

    whole = torch.cat([batch.image for batch in first(loader(6), 12)])
    words = texts(first(loader(6), 12))
    for batch, start in ((1, 5), (4, 0), (7, 31), (6, 40)):
        later = first(loader(batch), 4, start)
        assert torch.equal(torch.cat([b.image for b in later]), whole[start : start + 4 * batch])
        assert texts(later) == words[start : start + 4 * batch]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four captioned JPEGs of noise; one is cut off, which its header does not show."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for i in range(24):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40 + i, 64, 3), dtype=np.uint8)).save(file, "JPEG")
            data = file.getvalue()
            (folder / f"{i}.jpg").write_bytes(data[: len(data) // 2] if i == 7 else data)
            metadata.write(json.dumps({"file_name": f"{i}.jpg", "text": f"noise {i}"}) + "\n")
    return folder


def test_the_same_at_any_number_of_workers(photographs: Path, tmp_path: Path) -> None:
    def loader(workers: int) -> Loader:
        return Loader(
            open_source(str(photographs)),
            size=(32, 24),
            batch=5,
            flip=True,
            workers=workers,
            bad_limit=0.1,
            bad_path=tmp_path / f"{workers}.jsonl",
        )

    before = torch.get_rng_state()
    here = first(loader(0), 10)
    assert same(here, first(loader(2), 10))
    assert same(here[4:7], first(loader(1), 3, start=20))
    assert torch.equal(before, torch.get_rng_state())
    assert "noise 7" not in texts(here)
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "2.jsonl").read_text()
    row = json.loads((tmp_path / "0.jsonl").read_text())
    assert (row["source"], row["file"]) == (str(photographs), "7.jpg")
    assert "truncated" in row["reason"]


def test_crops_are_keyed_by_position() -> None:
    random = first(Loader(Shades(50), size=(4, 4), batch=50), 1)[0].image[:, :2, 0, 0]
    assert random.float().std() > 50
    centre = first(Loader(Shades(50), size=(4, 4), batch=50, random_crop=False), 1)[0].image[:, :2, 0, 0]
    assert (centre == 128).all()


def test_about_half_are_mirrored() -> None:
    plain = first(Loader(Shades(200), size=(4, 4), batch=200), 1)[0].image
    mirrored = first(Loader(Shades(200), size=(4, 4), batch=200, flip=True), 1)[0].image
    turned = [not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
    assert 70 < sum(turned) < 130
    assert all(torch.equal(a.flip(-1) if t else a, b) for a, b, t in zip(plain, mirrored, turned, strict=True))


def test_a_source_that_says_left_and_right_is_not_mirrored() -> None:
    sided = Shades(100, name="sided")
    sided.mirror = False
    plain, other = (
        first(Loader([Shades(100), sided], size=(4, 4), batch=200, flip=flip), 1)[0] for flip in (False, True)
    )
    turned = {t.split()[0] for t, a, b in zip(plain.text, plain.image, other.image, strict=True) if not a.equal(b)}
    assert turned == {"shades"}
    for source in (Scenes(n=10, captions=10), sided, Subset(sided, np.arange(5), "few")):
        with pytest.raises(UserError, match=r"flip: true would make captions of .* untrue .* leave flip out"):
            Loader(source, size=(16, 16), flip=True)


def test_small_images_are_left_out() -> None:
    loader = Loader(Shades(10, side=40), size=(32, 45), batch=4)
    assert len(loader) == 5
    assert set(texts(first(loader, 5))) == {f"shades {i}" for i in range(5, 10)}
    assert sorted(loader.texts()) == [f"shades {i}" for i in range(5, 10)]
    assert len(Loader(Shades(10, side=40), size=(40, 40))) == 10
    with pytest.raises(UserError, match=r"none of its 10 images is at least 64x64 pixels \(.* smaller side of 40\)"):
        Loader(Shades(10, side=40), size=(64, 64))


def test_captions_of_some_samples_are_spread_evenly() -> None:
    loader = Loader([Shades(7, name="a"), Shades(4, name="b"), Shades(30, name="c")], size=(4, 4))
    whole = list(loader.texts())
    assert len(whole) == 41
    for about in (1, 3, 10, 20, 40, 41, 100):
        assert list(loader.texts(about)) == whole[:: -(-41 // about)]
    assert (
        list(Loader(Scenes(n=40, captions=10), size=(16, 16)).texts(5))
        == list(Loader(Scenes(n=10, captions=10), size=(16, 16)).texts())[::2]
    )


class Letters:
    """Encodings of captions: their letters."""

    def arrays(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        items = [(np.array([[ord(c)] for c in text], np.float16), np.float16([len(text)])) for text in texts]
        return padded(items, 1, 1)

    def room(self, count: int) -> int:
        return count * 200


@pytest.mark.parametrize("workers", [0, 2])
def test_encoded_captions_come_with_the_images(workers: int) -> None:
    loader = Loader(Shades(20), size=(4, 4), batch=5, workers=workers, text=Letters())
    for batch in first(loader, 4):
        want = cond_of({name: torch.from_numpy(array) for name, array in Letters().arrays(batch.text).items()})
        assert batch.cond is not None
        for name in ("tokens", "mask", "pooled", "null"):
            assert torch.equal(getattr(batch.cond, name), getattr(want, name))
    assert first(Loader(Shades(20), size=(4, 4), batch=5), 1)[0].cond is None


def test_weights_are_shares_of_the_stream() -> None:
    sources = [Shades(5, name="few"), Shades(500, name="many"), Shades(50, name="some")]
    found = Counter(text.split()[0] for text in texts(first(Loader(sources, [3, 1, 1], size=(2, 2), batch=100), 2)))
    assert found == {"few": 120, "many": 40, "some": 40}
    by_size = Counter(text.split()[0] for text in texts(first(Loader(sources, size=(2, 2), batch=555), 1)))
    assert all(abs(by_size[source.name] - len(source)) <= 1 for source in sources)
    for weights in ([1, 1], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]):
        with pytest.raises(UserError, match="weights"):
            Loader(sources, weights, size=(2, 2))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0.001, 1000), min_size=1, max_size=5),
    st.integers(0, 10**12),
)
def test_a_mixture_is_spread_evenly_and_each_turn_comes_once(weights: list[float], start: int) -> None:
    order = Order([7] * len(weights), weights)
    draws = [order.at(position) for position in range(start, start + 200)]
    for source, weight in enumerate(weights):
        turns = [draw.turn for draw in draws if draw.source == source]
        assert turns == list(range(turns[0], turns[0] + len(turns))) if turns else True
        assert abs(len(turns) - 200 * weight / sum(weights)) <= len(weights)


def test_one_source_has_no_gaps_far_out_in_the_stream() -> None:
    order = Order([10], seed=2)
    assert sorted(order.at(10**13 + i).item for i in range(10)) == list(range(10))
    assert order.at(10**13).turn == 10**13


def test_the_order_is_pinned() -> None:
    """If this changes, resumed runs see other samples."""
    assert [Order([10], seed=5).at(i).item for i in range(12)] == [4, 1, 6, 8, 7, 2, 9, 5, 3, 0, 0, 9]


def test_a_bad_sample_is_replaced_by_one_of_its_source(tmp_path: Path) -> None:
    broken = frozenset(range(0, 40, 4))
    sources = [Shades(40, broken, "frail"), Shades(40, name="sound")]
    loader = Loader(sources, [1, 1], size=(4, 4), batch=40, bad_limit=0.3, bad_path=tmp_path / "bad.jsonl")
    sound = Loader([Shades(40, name="frail"), sources[1]], [1, 1], size=(4, 4), batch=40)
    for got, want in zip(texts(first(loader, 4)), texts(first(sound, 4)), strict=True):
        assert got.split()[0] == want.split()[0]
        assert got == want or int(want.split()[1]) in broken
        assert int(got.split()[1]) not in broken or got.startswith("sound")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {row["file"] for row in rows} == {f"{i}.png" for i in broken}
    assert len(rows) == len(broken) == len(loader.bad)
    assert all((row["source"], row["reason"], row["fingerprint"]) == ("frail", "broken", "shades") for row in rows)
    where = tmp_path / "bad.jsonl"
    assert loader.bad.report() == f"10 bad files skipped (10 of 40 samples of frail), listed in {where}"
    assert sound.bad.report() == "no bad files"


def test_too_many_bad_files_stop_the_run_in_one_line(tmp_path: Path) -> None:
    for workers in (0, 1):
        path = tmp_path / f"{workers}.jsonl"
        loader = Loader(
            Shades(100, frozenset(range(6))), size=(4, 4), batch=20, workers=workers, bad_limit=0.05, bad_path=path
        )
        with pytest.raises(UserError) as caught:
            first(loader, 20)
        message = str(caught.value)
        assert message.startswith("shades: 6 of 100 samples are bad or lost, the limit is 0.05")
        assert str(path) in message
        assert "\n" not in message
        assert len(path.read_text().splitlines()) == 6
    exactly = Loader(Shades(100, frozenset(range(5))), size=(4, 4), batch=20, bad_limit=0.05)
    assert len(first(exactly, 20)) == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_but_bad_files_is_one_line_too(workers: int) -> None:
    loader = Loader(Shades(500, frozenset(range(500))), size=(4, 4), batch=20, workers=workers, bad_limit=1)
    with pytest.raises(UserError, match="100 images in a row cannot be decoded") as caught:
        first(loader, 1)
    assert "\n" not in str(caught.value)


def test_a_resumed_run_lists_nothing_twice(tmp_path: Path) -> None:
    source = Shades(20, frozenset({1, 2}))
    path = tmp_path / "deep/bad.jsonl"
    first(Loader(source, size=(4, 4), batch=20, bad_limit=0.2, bad_path=path), 2)
    written = path.read_text()
    assert len(written.splitlines()) == 2
    path.write_text(written + '{"source": "shades", "fi')  # killed while it wrote
    resumed = Loader(source, size=(4, 4), batch=20, bad_limit=0.2, bad_path=path)
    assert len(resumed.bad) == 2  # counted on from the list
    first(resumed, 2, start=20)
    assert path.read_text() == written
    with pytest.raises(UserError, match="2 of 20 samples are bad or lost"):
        Loader(source, size=(4, 4), bad_limit=0.05, bad_path=path)


def test_what_was_listed_of_a_source_that_changed_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    other = Shades(20, name="other")
    BadFiles([other], 1.0, path).add(0, [BadFile("kept", "x")])
    first(Loader(Shades(20, frozenset({1, 2})), size=(4, 4), batch=20, bad_limit=0.2, bad_path=path), 2)
    repaired = Shades(20, frozenset({2}))
    repaired.fingerprint = "repaired"
    loader = Loader(repaired, size=(4, 4), batch=20, bad_limit=0.05, bad_path=path)
    assert len(loader.bad) == 0
    first(loader, 2)
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == ["kept", "2.png"]


def test_two_loaders_may_share_a_list(tmp_path: Path) -> None:
    source = Shades(20)
    lists = [BadFiles([source], 0.5, tmp_path / "bad.jsonl") for _ in range(2)]
    for one in lists:
        one.add(0, [BadFile("a", "x"), BadFile("a", "x"), BadFile("b", "y")])
        assert [bad.key for bad in one.files()] == ["a", "b"]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2


def test_many_bad_files_are_listed_in_linear_time_and_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = 0
    real = json.loads

    def loads(line: str) -> object:
        nonlocal read
        read += 1
        return real(line)

    bad = BadFiles([Shades(200)], 1.0, tmp_path / "bad.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", loads)
        for i in range(100):
            bad.add(0, [BadFile(f"{i}.png", "broken")])
    assert read <= 100
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == len(bad) == 100
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 5
    assert warned[-1].endswith("those that follow are counted, and reported at the end")


def test_settings_that_make_no_sense() -> None:
    for settings_ in ({"batch": 0}, {"workers": -1}, {"size": (0, 4)}, {"bad_limit": 1.5}, {"bad_limit": -0.1}):
        with pytest.raises(UserError):
            Loader(Shades(5), **{"size": (4, 4), **settings_})  # type: ignore[arg-type]
    with pytest.raises(UserError):
        Loader([], size=(4, 4))


def test_take_skips_what_is_bad_or_small() -> None:
    batch = take(Shades(10, frozenset({1})), 3, (4, 4))
    assert batch.text == ("shades 0", "shades 2", "shades 3")
    assert batch.index.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="can be decoded"):
        take(Shades(3, frozenset(range(3))), 2, (4, 4))


def test_scenes_and_files_in_one_stream(photographs: Path) -> None:
    sources = [open_source(str(photographs)), open_source({"source": "scenes", "n": 50, "captions": 50})]
    found = texts(first(Loader(sources, [1, 1], size=(16, 16), batch=16, bad_limit=0.5), 1))
    assert sum(text.startswith("noise") for text in found) == 8


CHILD = """
import multiprocessing, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or nohup
from pixelgrow.data import Loader, open_source
loader = Loader(open_source(sys.argv[1]), size=(32, 32), batch=4, workers=2, bad_limit=0.5)
for number, batch in enumerate(loader.batches()):
    if number == 1:
        print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
"""


def test_a_stream_left_open_does_not_keep_the_process(photographs: Path) -> None:
    leave = CHILD.replace("print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)", "break")
    assert leave != CHILD
    leave = leave.replace("in enumerate(loader.batches())", "in enumerate(stream := loader.batches())")
    done = subprocess.run([sys.executable, "-c", leave, str(photographs)], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def running(photographs: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that reads from a loader with two workers, and those workers."""
    command = [sys.executable, "-c", CHILD, str(photographs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, [int(pid) for pid in process.stdout.readline().split()]
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_parent(running: tuple[subprocess.Popen[str], list[int]], how: signal.Signals) -> None:
    process, workers = running
    assert len(workers) == 2
    for worker in workers:  # a signal to the group reaches them too; they must ignore it
        if how != signal.SIGKILL:
            os.kill(worker, how)
    time.sleep(0.2)
    assert all(alive(worker) for worker in workers)
    os.kill(process.pid, how)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while any(alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(worker) for worker in workers)


def alive(pid: int) -> bool:
    """Whether a process runs: it exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_that_dies_is_one_line(photographs: Path) -> None:
    loader = Loader(open_source(str(photographs)), size=(32, 32), batch=4, workers=2, bad_limit=0.5)
    stream = loader.batches()
    next(stream)
    multiprocessing.active_children()[-1].kill()
    with pytest.raises(UserError, match="a worker of the loader died with exit code -9"):
        first_of = [next(stream) for _ in range(20)]
        assert first_of


class Failing(Shades):
    def image(self, i: int, size: tuple[int, int], crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
        raise ZeroDivisionError("a mistake of ours")


@pytest.mark.parametrize("workers", [0, 1])
def test_our_own_mistakes_are_not_taken_for_bad_files(workers: int) -> None:
    with pytest.raises((ZeroDivisionError, RuntimeError)) as caught:
        next(Loader(Failing(9), size=(4, 4), workers=workers).batches())
    assert "a mistake of ours" in str(caught.value)


def test_a_loader_travels_to_another_process(photographs: Path, tmp_path: Path) -> None:
    """Where processes are spawned, the loader is pickled for its workers."""
    loader = Loader(open_source(str(photographs)), size=(32, 32), batch=4, bad_path=tmp_path / "bad.jsonl")
    copy = pickle.loads(pickle.dumps(loader))  # noqa: S301
    assert same(first(loader, 1), first(copy, 1))


@pytest.mark.skipif(sys.platform == "darwin", reason="forking is not safe there")
def test_an_index_is_not_copied_to_each_worker() -> None:
    """Whatever the default start method: forkserver and spawn would pickle it."""

    class Large(Shades):
        def __reduce__(self) -> str:
            raise AssertionError("the index was pickled")

    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader = Loader(Large(9), size=(4, 4), batch=4, workers=1)
        assert len(first(loader, 1)[0]) == 4
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_closing_the_stream_ends_the_workers(photographs: Path) -> None:
    loader = Loader(Shades(500, frozenset(range(500))), size=(4, 4), batch=20, workers=1, bad_limit=1)
    with pytest.raises(UserError) as caught:
        next(loader.batches())
    assert caught.tb  # holds the frames, but not the workers
    assert not multiprocessing.active_children()
    stream = Loader(open_source(str(photographs)), size=(32, 32), batch=4, workers=2, bad_limit=0.5).batches()
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert not multiprocessing.active_children()
