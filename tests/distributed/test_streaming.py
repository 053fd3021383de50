"""Trainings on shards from a server, whatever it does, end with the bytes of one on the same shards in a folder."""

from __future__ import annotations

import json
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest

from data.test_streamed import write_shards
from pixelgrow.data import open_source
from processes import start, with_own_cache
from servers import Files, serving

RECIPE = """
name: streamed
text: {{encoder: minilm, max_tokens: 8}}
data: {{source: "{source}", lanes: 4, window: 1}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, images: 24, batch: 8, accumulate: {accumulate}, lr: 1e-3,
            log_every: 8, save_every: 8, validate_every: 0, sample_every: 0, snapshot_every: 0, workers: 1,
            bad_limit: 0.5}}
"""
SHARDS = [f"set/{shard:02}.tar" for shard in range(24)]
NAMES = "{00..23}.tar"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Files]:
    """The folder of each finished run, and the server of the others', which has faults for some of them."""
    root = tmp_path_factory.mktemp("streamed")
    folder = write_shards(root / "web" / "set", len(SHARDS))
    open_source(str(folder))  # writes the index beside the shards
    with serving(root / "web") as server:
        local, streamed = f"{folder}/{NAMES}", f"{server.address}/set/{NAMES}"
        asked = {"local": (local, 1), "one": (streamed, 1), "two": (streamed, 2)}
        asked |= {"local of four": (local, 4), "four": (streamed, 4)}
        server.faults = {shard: ["cut", 503] for shard in SHARDS}
        running = {}
        for name, (source, size) in asked.items():
            # As many micro-batches as processes; of one process two. Sums of two have one order.
            (root / f"{name}.yaml").write_text(RECIPE.format(source=source, accumulate=max(2, size)))
            words = ("run", root / f"{name}.yaml", "--runs", root / name)
            running[name] = start(
                root / f"said-{name}", *words, size=size, prepare=partial(with_own_cache, root / name)
            )
        for processes in running.values():
            assert [r.code for r in processes.end()] == [0] * len(processes.processes), processes.end()
    return {name: root / name / "streamed" for name in asked}, server


def test_weights_and_what_is_logged_are_equal_to_the_bit(runs: tuple[dict[str, Path], Files]) -> None:
    folders, server = runs
    made = {name: (f / "core" / "checkpoint" / "model.safetensors").read_bytes() for name, f in folders.items()}
    logs = {name: (f / "core" / "log.jsonl").read_text().splitlines() for name, f in folders.items()}
    losses = {name: [json.loads(line).get("loss") for line in log] for name, log in logs.items()}
    for local, streamed in (("local", "one"), ("local", "two"), ("local of four", "four")):
        assert made[streamed] == made[local]
        assert losses[streamed] == losses[local] and any(losses[local])
    assert sum(2 - len(left) for left in server.faults.values()) > 10


@pytest.mark.parametrize(("name", "processes"), [("two", 2), ("four", 4)])
def test_a_process_fetches_the_shards_of_its_lanes_alone(
    runs: tuple[dict[str, Path], Files], name: str, processes: int
) -> None:
    _, server = runs
    fetched = [set(server.whole(f"{name}{rank}")) - {"set/.pixelgrow/shards.index"} for rank in range(processes)]
    assert all(len(a & b) <= 1 for a, b in combinations(fetched, 2))  # one where the lanes meet
    assert set().union(*fetched) <= set(SHARDS)
    assert min(map(len, fetched)) > 6 // processes
    assert {who for _, part, who in server.asked if part} == {"one0", "two0", "four0"}  # what is held out


def test_a_run_goes_on_with_the_folder_in_the_place_of_the_server(runs: tuple[dict[str, Path], Files]) -> None:
    folders, _ = runs
    kept = [json.loads((folder / "core" / "stage.json").read_text())["settings"]["data"] for folder in folders.values()]
    assert [one.pop("source") for (one,) in kept] and all(of == kept[0] for of in kept)
    assert {"lanes": 4, "window": 1}.items() <= kept[0][0].items()
