"""Trainings on shards from a server, whatever it does, end with the bytes of one on the same shards in a folder."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from data.test_streamed import write_shards
from pixelgrow.data import open_source
from processes import start, with_own_cache
from servers import Files, serving

RECIPE = """
name: streamed
text: {{encoder: minilm, max_tokens: 8}}
data: {{source: "{source}", lanes: 2, window: 1}}
stages:
  - train: {{name: core, size: tiny, resolution: 16, images: 24, batch: 8, accumulate: 2, lr: 1e-3, log_every: 8,
            save_every: 8, validate_every: 0, sample_every: 0, snapshot_every: 0, workers: 1, bad_limit: 0.5}}
"""
SHARDS = [f"set/{shard:02}.tar" for shard in range(24)]
NAMES = "{00..23}.tar"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Files]:
    """The folder of each finished run, and the server of those of the other two, which has faults for the second."""
    root = tmp_path_factory.mktemp("streamed")
    folder = write_shards(root / "web" / "set", len(SHARDS))
    open_source(str(folder))  # writes the index beside the shards
    with serving(root / "web") as server:
        sources = {"local": f"{folder}/{NAMES}", "one": f"{server.address}/set/{NAMES}"}
        sources["two"] = sources["one"]
        server.faults = {shard: ["cut", 503] for shard in SHARDS}
        running = {}
        for name, source in sources.items():
            (root / f"{name}.yaml").write_text(RECIPE.format(source=source))
            words = ("run", root / f"{name}.yaml", "--runs", root / name)
            prepare = partial(with_own_cache, root / name)
            running[name] = start(root / f"said-{name}", *words, size=1 + (name == "two"), prepare=prepare)
        for processes in running.values():
            assert [r.code for r in processes.end()] == [0] * len(processes.processes), processes.end()
    return {name: root / name / "streamed" for name in sources}, server


def test_weights_and_what_is_logged_are_equal_to_the_bit(runs: tuple[dict[str, Path], Files]) -> None:
    folders, server = runs
    made = {
        name: (folder / "core" / "checkpoint" / "model.safetensors").read_bytes() for name, folder in folders.items()
    }
    assert made["one"] == made["local"] and made["two"] == made["local"]
    logs = [(folder / "core" / "log.jsonl").read_text().splitlines() for folder in folders.values()]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1] == losses[2] and any(losses[0])
    assert sum(2 - len(left) for left in server.faults.values()) > 10


def test_a_process_fetches_the_shards_of_its_lanes_alone(runs: tuple[dict[str, Path], Files]) -> None:
    _, server = runs
    first, second = (set(server.whole(who)) - {"set/.pixelgrow/shards.index"} for who in ("two0", "two1"))
    assert len(first & second) <= 1 and first | second <= set(SHARDS)  # one where the lanes meet
    assert min(len(first), len(second)) > 3
    assert {who for _, part, who in server.asked if part} == {"one0", "two0"}  # what is held out


def test_a_run_goes_on_with_the_folder_in_the_place_of_the_server(runs: tuple[dict[str, Path], Files]) -> None:
    folders, _ = runs
    kept = [json.loads((folder / "core" / "stage.json").read_text())["settings"]["data"] for folder in folders.values()]
    assert [one.pop("source") for (one,) in kept] and kept[0] == kept[1] == kept[2]
    assert {"lanes": 2, "window": 1}.items() <= kept[0][0].items()
