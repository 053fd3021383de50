"""Rules that every file of the source keeps and no linter knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("src", "bench", "examples") for path in (ROOT / room).rglob("*.py"))


def without_encoding(source: str) -> list[int]:
    """Lines of calls that read or write text in the locale's encoding."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        keywords = {k.arg: k.value for k in call.keywords}
        if keywords.keys() & {"encoding", "fileobj"}:
            continue
        if name == "open":
            modes = [keywords["mode"]] if "mode" in keywords else call.args[not method :][:1]
            modes = [mode for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
            by_default = len(call.args) == (0 if method else 1)
            text = any("b" not in str(mode.value) for mode in modes) or (by_default and not modes)
        elif name in ("fdopen", "NamedTemporaryFile", "TemporaryFile"):
            text = any(isinstance(a, ast.Constant) and "b" not in str(a.value) for a in call.args[-1:])
        elif name in ("run", "Popen", "check_output"):
            text = "text" in keywords or "universal_newlines" in keywords
        else:
            text = name in ("read_text", "write_text", "TextIOWrapper")
        if text:
            found.append(call.lineno)
    return found


def test_text_is_utf8_in_every_locale() -> None:
    wrong = {str(path.relative_to(ROOT)): without_encoding(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ("p.read_text()", True), ("p.read_text(encoding='utf-8')", False), ("p.write_text(x)", True),
        ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False), ("open(p, mode='a')", True),
        ("p.open()", True), ("p.open('a+')", True), ("p.open('wb')", False), ("p.open('w', encoding='utf-8')", False),
        ("Image.open(file)", False), ("os.open(p, os.O_RDONLY)", False), ("tarfile.open(p, 'w')", False),
        ("subprocess.run(c, text=True)", True), ("subprocess.run(c)", False),
    ],
)  # fmt: skip
def test_the_rule_on_text_sees_what_it_should(call: str, wrong: bool) -> None:
    assert bool(without_encoding(call)) == wrong
