"""docs/architecture.md names every file of the package, in its room, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "pixelgrow"


def test_every_file_is_named_and_every_name_is_a_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = text[text.index("<!-- files:") : text.index("## How data flows")]
    named: set[str] = set()
    room = ""
    for line in listed.splitlines():
        if head := re.fullmatch(r"\*\*(The root|[\w/]+/)\*\*", line):
            room = head[1].removeprefix("The root")
        elif row := re.match(r"\| `(\w+\.py)` \| .+ \|", line):
            named.add(room + row[1])
    files = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if not p.name.startswith("__")}
    assert named - files == set() and files - named == set()


def test_the_root_stays_small() -> None:
    assert len([p for p in PACKAGE.iterdir() if p.is_file()]) <= 12
