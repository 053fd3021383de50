"""What an interrupted evaluation goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pixelgrow.errors import UserError
from pixelgrow.evaluation.differences import differences, short
from pixelgrow.evaluation.shards import Shard, Shards


def shard(start: int, stop: int) -> Shard:
    return Shard(start, stop - start, {"x": torch.arange(start, stop)}, {"said": f"{start}"})


def test_missing_parts_are_found_and_read_back_in_order(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "part", {"a": 1})
    assert list(shards.missing("seed", 7, 3)) == [(0, 3), (3, 6), (6, 7)]
    shards.put("seed", shard(3, 6))
    shards.put("other", shard(0, 7))
    again = Shards(tmp_path / "part", {"a": 1})
    assert list(again.missing("seed", 7, 2)) == [(0, 2), (2, 3), (6, 7)]  # in batches of another size
    for start, stop in again.missing("seed", 7, 2):
        again.put("seed", shard(start, stop))
    found = list(again.each("seed", 7))
    assert torch.cat([s.tensors["x"] for s in found]).tolist() == list(range(7))
    assert [s.facts["said"] for s in found] == ["0", "2", "3", "6"]
    assert list(again.missing("seed", 7, 2)) == []
    again.clear()
    assert not (tmp_path / "part").exists()


def test_a_damaged_shard_is_missing(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    for start in (0, 3):
        shards.put("s", shard(start, start + 3))
    path = tmp_path / "s" / "00000003.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert list(shards.missing("s", 6, 3)) == [(3, 6)]
    with pytest.raises(UserError, match=r"00000003.safetensors was damaged or removed meanwhile: run"):
        list(shards.each("s", 6))


def test_the_shards_of_another_plan_are_refused(tmp_path: Path) -> None:
    Shards(tmp_path / "part", {"images": 5, "sampling": {"guidance": 3.0}})  # nothing was kept by it
    shards = Shards(tmp_path / "part", {"images": 5, "sampling": {"guidance": 2.0}})
    (tmp_path / "part" / "real").mkdir()  # as after a kill in the first write
    Shards(tmp_path / "part", {"images": 5, "sampling": {"guidance": 2.0}})
    before = (tmp_path / "part" / "plan.json").stat().st_mtime_ns
    Shards(tmp_path / "part", {"images": 5, "sampling": {"guidance": 2.0}})  # as another process of the same run
    assert (tmp_path / "part" / "plan.json").stat().st_mtime_ns == before
    shards.put("guidance=2/seed-0", Shard(0, 1, {"x": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"something else \(sampling.guidance: was 2, now 4\): give"):
        Shards(tmp_path / "part", {"images": 5, "sampling": {"guidance": 4.0}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        Shards(tmp_path / "mine", {})


def test_differences_name_the_key_and_both_values() -> None:
    a = {"n": 1, "s": {"x": [1, 2], "y": "a"}, "gone": 3}
    b = {"n": 1, "s": {"x": [1, 5], "y": "a"}, "new": None}
    assert [d.line("was", "now") for d in differences(a, b)] == ["s.x[1]: was 2, now 5", "gone: was 3, now nothing"]
    assert differences([1], [1, 2])[0].key == "" and not differences(a, a)
    assert short("f" * 64) == "f" * 12 and short([1, 2]) == "1, 2" and short([1] * 9) == "9 entries"
