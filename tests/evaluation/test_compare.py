"""Evaluations side by side, and what is not comparable."""

from __future__ import annotations

import copy
import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pixelgrow.errors import UserError
from pixelgrow.evaluation.compare import Evaluation, compare, read_evaluations
from pixelgrow.report.evaluations import comparison_table, evaluation_table, trade_off


def row(name: str, mean: float, half: float | None, better: str = "lower", metric: str = "fd") -> dict[str, Any]:
    ends = {"low": None, "high": None} if half is None else {"low": mean - half, "high": mean + half}
    return {
        "name": name,
        "metric": metric,
        "mean": mean,
        "better": better,
        "interval": "seeds",
        "values": [mean],
    } | ends


def values(guidance: float = 2.0, fd: float = 10.0, aligned: float = 0.5, half: float | None = 1.0) -> dict[str, Any]:
    return {
        "format": 1,
        "name": "tiny",
        "data": "scenes",
        "candidate": {"kind": "model", "sha256": "a" * 64, "lineage": [1], "sampling": {"guidance": guidance}},
        "seeds": [0, 1],
        "images": 2000,
        "real": {"fingerprint": "f", "size": [64, 64], "images": 2000},
        "prompts": {"sha256": "p" * 64},
        "train": {"fingerprint": "t", "images": 2000},
        "extractors": {"lite": {"side": 224, "identity": "i"}},
        "judge": {"vqa": {"name": "blip", "sha256": "v"}, "questions": "asked"},
        "bad_files": [],
        "metrics": [row("FD-2,000 (lite)", fd, half), row("scenes-2,000", aligned, 0.01, "higher", "scenes")],
        "cost": {"nfe": 32, "parameters": {"network": 3_000_000}},
        "measured": {"seconds_per_image": 0.1, "peak_memory": 2**30, "seconds": 61},
    }


def shown(table: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_rows_settings_and_the_best() -> None:
    evaluations = [Evaluation("a", values()), Evaluation("b", values(4.0, 7.0, 0.5))]
    found = compare(evaluations)
    assert found.names == ["a", "b"] and found.settings == [("guidance", ["2", "4"])]
    assert [line.best for line in found.lines] == [1, None]  # [6, 8] lies below [9, 11]; the other two overlap
    text = shown(comparison_table(found, evaluations))
    assert "7 [6, 8]" in text and "scenes-2,000, higher is better" in text and "3M" in text and "1.0 GiB" in text
    assert compare([Evaluation("a", values(half=None)), Evaluation("b", values())]).lines[0].best is None
    one = shown(evaluation_table(evaluations[0]))
    assert "tiny: 2,000 images of each of 2 seeds (guidance 2); 2,000 real images of scenes" in one
    assert "9 to 11" in one and "1 min 1 s" in one


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("images",), 500, "images: a 2000, b 500"),
        (("real", "fingerprint"), "g", "real.fingerprint: a f, b g"),
        (("real", "size"), [32, 32], r"real.size\[0\]: a 64, b 32"),
        (("prompts", "sha256"), "q" * 64, "prompts.sha256: a pppppppppppp, b qqqqqqqqqqqq"),
        (("train", "fingerprint"), "other", "train.fingerprint: a t, b other"),
        (("judge", "vqa", "sha256"), "w", "vqa.sha256: a v, b w"),
        (("judge", "questions"), "others", "questions: a asked, b others"),
        (("extractors", "lite", "side"), 112, "extractor lite.side: a 224, b 112"),
        (("metrics",), [], "have no metric in common"),
    ],
)
def test_what_is_not_comparable(path: tuple[str, ...], value: Any, line: str) -> None:
    other = copy.deepcopy(values())
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(UserError, match=line) as error:
        compare([Evaluation("a", values()), Evaluation("b", other)])
    assert "\n" not in str(error.value)


def test_what_one_of_them_lacks_keeps_none_from_being_compared() -> None:
    other = values() | {"train": None, "judge": None}
    assert compare([Evaluation("a", values()), Evaluation("b", other)]).names == ["a", "b"]
    other = values() | {"judge": {"counter": {"name": "owl"}, "questions": "asked"}}
    assert compare([Evaluation("a", values()), Evaluation("b", other)]).names == ["a", "b"]


def test_images_without_prompts_compare_by_distance() -> None:
    silent = values() | {"prompts": None, "metrics": values()["metrics"][:1]}
    found = compare([Evaluation("a", values()), Evaluation("b", silent)])
    assert [cell is None for cell in found.lines[1].cells] == [False, True] and found.lines[1].best is None


def test_files_of_one_and_of_a_sweep(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(values()))
    assert [e.name for e in read_evaluations(file)] == ["x"]
    swept = {"sweep": {"setting": "guidance"}, "evaluations": [values(1.0), values(4.0, 12.0, 0.9)]}
    file.write_text(json.dumps(swept))
    found = read_evaluations(file, "y")
    assert [(e.name, e.label) for e in found] == [("y guidance 1", "guidance 1"), ("y guidance 4", "guidance 4")]
    for text in ("[]", '{"format": 1}', "no json", '{"evaluations": [3]}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"x.json: no evaluation in it"):
            compare(read_evaluations(file))
    file.write_text(json.dumps(values() | {"format": 9}))
    with pytest.raises(UserError, match="got format 9, expected 1"):
        read_evaluations(file)


def test_alignment_against_distance() -> None:
    curve = [Evaluation("t", values(1.0), "guidance 1"), Evaluation("t", values(4.0, 12.0, 0.9), "guidance 4")]
    drawn = trade_off({"t": curve, "other": [Evaluation("other", values(2.0, 11.0, 0.7))]})
    root = ElementTree.fromstring(drawn)
    space = "{http://www.w3.org/2000/svg}"
    texts = [e.text for e in root.iter(f"{space}text")]
    assert {"guidance 1", "guidance 4", "t", "other", "FD-2,000 (lite) (lower is better)"} <= set(texts)
    dots = [(float(e.get("cx", 0)), float(e.get("cy", 0))) for e in root.iter(f"{space}circle")]
    first, second = dots[:2]
    assert first[0] < second[0] and first[1] > second[1]  # x rises to the right, y rises upwards
    bars = [e.get("d", "") for e in root.iter(f"{space}path")]
    assert bars[0].startswith("M") and "L" in bars[0] and sum(" H" in d for d in bars) == 3
    assert trade_off({"t": [Evaluation("t", values() | {"metrics": values()["metrics"][:1]})]}) == ""
