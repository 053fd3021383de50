"""What `mutants.py` changes: the mutants of a file, by mutmut's operators on libcst's syntax trees."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

TYPES = ("Callable", "Literal", "Mapping", "Sequence")  # a subscript of these is an alias of a type


@dataclass(frozen=True)
class Mutant:
    """`before` becomes `after` in a statement of `lines` (first, last); `where`: the function. `key` names it as long
    as function, statement and change stay what they are, wherever they move in the file."""

    key: str
    room: str
    file: str
    where: str
    lines: tuple[int, int]
    operator: str
    before: str
    after: str


class Finder(cst.CSTVisitor):
    """Collects the mutations of a module: (original node, mutated node, operator, function, statement)."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, str, str, cst.CSTNode]] = []
        self.names: list[str] = []
        self.statements: list[cst.CSTNode] = []
        self.left_out: set[int] = set()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if id(node) in self.left_out or _left_out(node):
            return False
        if isinstance(node, cst.Assert) and node.msg is not None:
            self.left_out.add(id(node.msg))
        if isinstance(node, cst.FunctionDef):
            self.left_out |= {id(p) for p in _errors_only(node)}
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.names.append(node.name.value)
        if isinstance(node, cst.BaseStatement | cst.BaseSmallStatement | cst.MatchCase | cst.ExceptHandler):
            self.statements.append(node)
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                for mutated in operator(node):
                    statement = self.statements[-1] if self.statements else node
                    self.found.append((node, mutated, operator.__name__, ".".join(self.names), statement))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef) and not _left_out(original_node):
            self.names.pop()
        if self.statements and self.statements[-1] is original_node:
            self.statements.pop()


def _left_out(node: cst.CSTNode) -> bool:
    """Whether nothing inside `node` is mutated."""
    if isinstance(node, cst.Annotation | cst.Raise | cst.Decorator):
        return True
    if isinstance(node, cst.Param):  # a default runs when the module is imported; simple ones are safe to change
        return not isinstance(node.default, cst.Name | cst.BaseNumber | cst.BaseString | None)
    return m.matches(
        node,
        m.Expr(m.SimpleString() | m.ConcatenatedString())  # docstrings
        | m.If(m.Name("TYPE_CHECKING"))
        | m.Call(m.Name("len") | m.Name("isinstance"))  # mutmut's: fail at once
        | m.Call(m.Attribute(m.Name("logger")))
        | m.Assign(targets=[m.AssignTarget(m.Name("logger"))])
        | m.Arg(keyword=m.Name("description"))
        | m.Assign(value=m.Subscript(value=m.OneOf(*map(m.Name, TYPES))))
        | m.AnnAssign(value=m.Call(m.Name("get_args"))),
    )


def _errors_only(function: cst.FunctionDef) -> Iterator[cst.CSTNode]:
    """Assignments of names that are read in `raise` statements alone: parts of their texts."""
    raised = Counter(n.value for r in m.findall(function, m.Raise()) for n in m.findall(r, m.Name()))
    everywhere = Counter(n.value for n in m.findall(function, m.Name()))
    for assign in m.findall(function, m.Assign(targets=[m.AssignTarget(m.Name())])):
        name = assign.targets[0].target.value  # type: ignore[attr-defined]
        if raised[name] and everywhere[name] == raised[name] + 1:
            yield assign


class Source:
    """A file's syntax tree and its mutants."""

    def __init__(self, room: str, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        wrapper = MetadataWrapper(cst.parse_module(self.text))
        self.module, finder = wrapper.module, Finder()
        wrapper.visit(finder)
        positions = wrapper.resolve(PositionProvider)
        self.nodes: dict[str, tuple[cst.CSTNode, cst.CSTNode]] = {}
        self.mutants: list[Mutant] = []
        seen: Counter[tuple[str, ...]] = Counter()
        for node, mutated, operator, where, statement in finder.found:
            before, after = (self.module.code_for_node(n) for n in (node, mutated))
            head = _head(statement)
            text = self.module.code_for_node(head or statement)
            same = (str(path), where, text, operator, before, after)
            seen[same] += 1
            key = hashlib.sha256("\0".join((*same, str(seen[same]))).encode()).hexdigest()[:12]
            first, last = positions[statement].start.line, positions[head or statement].end.line
            self.nodes[key] = node, mutated
            self.mutants.append(Mutant(key, room, str(path), where, (first, last), operator, before, after))

    def mutated(self, key: str) -> str:
        """The file's text with one mutant in it."""
        text = self.module.deep_replace(*self.nodes[key]).code  # type: ignore[union-attr]
        compile(text, str(self.path), "exec")
        return text

    def diff(self, key: str) -> list[str]:
        """Changed lines, first those that go (`-`), then those that come (`+`)."""
        lines = difflib.ndiff(self.text.splitlines(), self.mutated(key).splitlines())
        return [line for line in lines if line[:2] in ("- ", "+ ")]


def _head(statement: cst.CSTNode) -> cst.CSTNode | None:
    """The part of a compound statement that is executed before its body."""
    for part in ("test", "iter", "subject", "params", "pattern", "type"):
        if hasattr(statement, "body") and (found := getattr(statement, part, None)) is not None:
            return found
    if isinstance(statement, cst.With):
        return statement.items[-1]
    return None


def sample(all_mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` mutants at random. One that was chosen stays chosen when others are added or go."""
    return sorted(all_mutants, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.key}".encode()).digest())[:count]
