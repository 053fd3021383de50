"""What the mutation tool changes and what it leaves out, on a file made for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mutmut")
CODE = '''"""Documentation."""
import logging
from typing import Literal

logger = logging.getLogger("name")
Kind = Literal["one", "two"]


class Model:
    """Documentation."""

    @property
    def size(self) -> dict[str, Literal["a"]]:
        return {"b": 1}


def work(x: int, y: int | None = None) -> int:
    assert x > 2, "message"
    got = ", ".join("cd")
    if x == 3:
        raise ValueError("message" + got)
    logger.info("message %s", 5)
    return x - 7
'''


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("mutations")


def test_behaviour_is_changed_and_words_are_left_out(tool: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "toy.py"
    file.write_text(CODE, encoding="utf-8")
    source = tool.Source("toy", file)
    diffs = {tuple(source.diff(mutant.key)) for mutant in source.mutants}
    changed = {old[2:].strip() for old, _ in diffs}
    assert changed == {'return {"b": 1}', 'assert x > 2, "message"', "if x == 3:", "return x - 7"}
    assert {("-     return x - 7", "+     return x + 7"), ("-     return x - 7", "+     return x - 8")} <= diffs
    assert len({mutant.key for mutant in source.mutants}) == len(source.mutants) == len(diffs)
    where = {mutant.where: mutant.lines for mutant in source.mutants}
    assert where == {"Model.size": (14, 14), "work": (23, 23)}


def test_a_sample_stays_when_the_file_around_it_changes(tool: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "toy.py"
    file.write_text(CODE, encoding="utf-8")
    before = tool.sample(tool.Source("toy", file).mutants, 5, seed=0)
    file.write_text(CODE.replace("class Model", "X = 5\n\n\nclass Model"), encoding="utf-8")
    after = tool.Source("toy", file).mutants
    kept = [mutant.key for mutant in tool.sample(after, 5, seed=0) if mutant.where]
    assert kept == [mutant.key for mutant in before][: len(kept)] and len(kept) >= 3
    assert kept != [mutant.key for mutant in tool.sample(after, 5, seed=1)][: len(kept)]
