"""Mutation testing: change one detail of the code at a time and see whether a test of its room fails.

    python tools/mutants.py                    200 mutants, seed 0; the same again goes on where it was cut off
    python tools/mutants.py --list             the sample, without running anything
    python tools/mutants.py --show KEY         one mutant as a diff

The changes are mutmut's (its operators on libcst's syntax trees); only sampling and running are ours, as mutmut samples
nothing, leaves out decorated functions and starts from a `mutants/` folder whose imports take seconds each. Here a
private copy of the tree is made, everything but the package is imported once, and each mutant is a fork that runs the
tests which execute the changed statement, fastest first, until one fails. A test may take 5 times its usual CPU time
and 10 s more: an endless loop is a failure.

Left out, as no test should notice them: docstrings, annotations, type aliases, log messages, texts of errors and
assertions, descriptions of settings; and decorators, which run when a module is imported. Mutants that change no
behaviour, each with its reason, are in docs/equivalent-mutants.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mutations import Mutant, Source, sample

ROOT = Path(__file__).parents[1]
EQUIVALENT = ROOT / "docs" / "equivalent-mutants.json"
ROOMS = {  # what is mutated, and the tests of its room
    "growth": (["growth.py"], ["tests/test_growth.py", "tests/diffusion/test_generator.py"]),
    "diffusion": (["diffusion"], ["tests/diffusion"]),
    "onestep": (["onestep"], ["tests/onestep"]),
    "ema": (["training/ema.py"], ["tests/training"]),
    "order": (["data/order.py"], ["tests/data"]),
}
LOG = Path("out/last.txt")  # what pytest said last, in the private copy


def files_of(room: str) -> list[Path]:
    """The files of a room that are mutated."""
    places = [Path("src/pixelgrow") / place for place in ROOMS[room][0]]
    return [file for path in places for file in (sorted(path.glob("*.py")) if path.is_dir() else [path])]


def sources() -> dict[str, Source]:
    """All that is mutated, by path."""
    return {str(file): Source(room, file) for room in ROOMS for file in files_of(room)}


# --- tests ------------------------------------------------------------------------------------------------------------


class Trace:
    """A pytest plugin: which statements each test executes, fixtures of wider scope apart, and how long it takes."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.context = coverage, ""
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, float] = {}

    @contextlib.contextmanager
    def _in(self, context: str) -> Iterator[None]:
        before, self.context = self.context, context
        self.coverage.switch_context(context)
        yield
        self.context = before
        self.coverage.switch_context(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        definitions = [d[-1] for d in item._fixtureinfo.name2fixturedefs.values()]
        wide = [f"{d.baseid}::{d.argname}" for d in definitions if d.scope != "function"]
        self.tests[item.nodeid] = {"name": item.nodeid, "fixtures": wide, "seconds": 0.0, "passed": True}
        with self._in(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        began = time.perf_counter()
        name = f"{fixturedef.baseid}::{fixturedef.argname}"
        with self._in(name):
            result = yield
        self.fixtures[name] = max(self.fixtures.get(name, 0.0), time.perf_counter() - began)
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = self.tests[report.nodeid]
        test["seconds"] += report.duration
        test["passed"] &= not report.failed


class Chosen:
    """A pytest plugin: certain tests in a certain order, each within a limit of CPU time; notes what fails."""

    def __init__(self, limits: dict[str, float]) -> None:
        self.limits, self.killer = limits, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        order = {name: i for i, name in enumerate(self.limits)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])

    def pytest_runtest_setup(self, item: Any) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.limits[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.killer = self.killer or report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.killer = self.killer or f"{report.nodeid} (import)"


def forked(work: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """`work() -> dict` in a child of at most so many seconds of CPU time until it sets another limit; {} if it died."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setsid()
            os.close(out)
            quiet = os.open(LOG, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            for fd in (0, 1, 2):
                os.dup2(quiet, fd)
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            os.write(into, json.dumps(work()).encode())
            status = 0
        except BaseException:  # noqa: BLE001 - the parent is told by silence
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it may have left
    return json.loads(told) if told else {}


PYTEST = ["-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]


def baseline(room: str, store: Path, within: float) -> dict[str, Any]:
    """Run the tests of a room as they are, each file of tests unless `store` has it; not those that were known to take
    more than `within` seconds.

    {"tests": {name: {seconds, passed, fixtures, lines}}, "modules": what they import, "imported": lines so executed}
    """
    known = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    whole: dict[str, Any] = {"tests": {}, "modules": {}, "imported": {}}
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files_of(room)))
    for file in [f for p in map(Path, ROOMS[room][1]) for f in (sorted(p.glob("test_*.py")) if p.is_dir() else [p])]:
        version = code.copy()
        version.update(file.read_bytes())
        before = known.get(str(file), {"tests": {}, "slow": []})
        slow = [name for name, test in before["tests"].items() if cost(test) > within] + before["slow"]
        slow = slow if within < math.inf else []
        if before.get("version") != version.hexdigest() or len(slow) < len(before["slow"]):
            preload(whole["modules"])
            found = forked(lambda file=file, slow=slow: traced(str(file), slow), 3600)
            if not found:
                sys.exit(f"{file}: its tests died")
            known[str(file)] = found | {"version": version.hexdigest(), "slow": slow}
            store.write_text(json.dumps(known), encoding="utf-8")
        whole["tests"] |= known[str(file)]["tests"]
        whole["modules"] |= dict.fromkeys(known[str(file)]["modules"])
        for path, lines in known[str(file)]["imported"].items():
            whole["imported"][path] = sorted({*whole["imported"].get(path, []), *lines})
    return whole


def cost(test: dict[str, Any]) -> float:
    """Seconds of a test, with fixtures that it shares with others."""
    return test["seconds"] + sum(test["fixtures"].values())


def traced(tests: str, slow: list[str]) -> dict[str, Any]:
    """See `baseline`: of one file of tests, some left out."""
    import coverage

    sys.dont_write_bytecode = False  # compiled once, here
    os.environ.pop("PYTHONDONTWRITEBYTECODE")
    measured = coverage.Coverage(
        data_file=None, config_file=False, include=[str(Path("src/pixelgrow").resolve() / "*")]
    )
    trace = Trace(measured)
    measured.start()
    pytest.main([*PYTEST, tests, *(f"--deselect={name}" for name in slow)], plugins=[trace])
    measured.stop()
    ran: dict[str, dict[str, list[int]]] = {}
    for file in measured.get_data().measured_files():
        for line, contexts in measured.get_data().contexts_by_lineno(file).items():
            for context in contexts:
                ran.setdefault(context, {}).setdefault(os.path.relpath(file), []).append(line)
    for test in trace.tests.values():
        lines: dict[str, set[int]] = {}
        for context in (test["name"], *test["fixtures"]):
            for file, some in ran.get(context, {}).items():
                lines[file] = lines.get(file, set()) | set(some)
        test["fixtures"] = {f: trace.fixtures.get(f, 0.0) for f in test["fixtures"]}
        test["lines"] = {f: sorted(some) for f, some in lines.items() if sources_room(f)}
    here = str(Path.cwd())
    modules = [n for n, mod in sys.modules.items() if here not in str(getattr(mod, "__file__", None) or here)]
    return {"tests": trace.tests, "modules": modules, "imported": ran.get("", {})}


def sources_room(path: str) -> str:
    """The room that a file belongs to, "" if it is in none of `ROOMS`."""
    inside = Path(path).relative_to("src/pixelgrow")
    return next((room for room, (places, _) in ROOMS.items() if any(inside.is_relative_to(p) for p in places)), "")


def tests_for(mutant: Mutant, facts: dict[str, Any], within: float) -> dict[str, float]:
    """Tests that execute a mutant's statement and take at most `within` seconds, cheapest first, with their limits of
    CPU time in seconds."""
    lines = set(range(mutant.lines[0], mutant.lines[1] + 1))
    near = {name.partition("::")[0] for name, test in facts["tests"].items() if mutant.file in test["lines"]}
    whole = bool(lines & set(facts["imported"].get(mutant.file, [])))  # of a statement that an import executes
    chosen = {
        name: test
        for name, test in facts["tests"].items()
        if test["passed"]
        and (lines & set(test["lines"].get(mutant.file, [])) or (whole and name.partition("::")[0] in near))
    }

    def order(name: str) -> tuple[float, str, float]:  # what shares a slow fixture stays together
        shared = sum(s for s in chosen[name]["fixtures"].values() if s > 0.3)
        return shared, name.partition("::")[0] if shared else "", chosen[name]["seconds"]

    quick = [name for name in chosen if cost(chosen[name]) <= within]
    return {name: 10 + 5 * cost(chosen[name]) for name in sorted(quick, key=order)}


def run_one(source: Source, mutant: Mutant, facts: dict[str, Any], within: float) -> dict[str, Any]:
    """Run the tests on one mutant: {"status": killed | survived, "by": ..., "seconds": ...}."""
    tests = tests_for(mutant, facts, within)
    began = time.perf_counter()
    if not tests:
        return {"status": "survived", "by": "no test", "seconds": 0.0}

    def work() -> dict[str, Any]:
        chosen = Chosen(tests)
        code = pytest.main([*PYTEST, "-x", *sorted({t.partition("::")[0] for t in tests})], plugins=[chosen])
        passed = code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        return {"status": "survived" if passed else "killed", "by": chosen.killer or f"pytest ended with {int(code)}"}

    path = Path(mutant.file)
    times = path.stat()
    path.write_text(source.mutated(mutant.key), encoding="utf-8")
    try:
        found = forked(work, 120)
    finally:
        path.write_text(source.text, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # what was compiled of it is good again
    if found.get("status") == "survived":
        found["by"] = f"{len(tests)} tests" + (f" of at most {within:g} s" if within < math.inf else "")
    found = found or {"status": "killed", "by": "time limit, or the process died"}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


# --- the whole of it --------------------------------------------------------------------------------------------------


def private_copy(to: Path) -> None:
    """The working tree's files at `to`, and from now on this process and its children in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    shutil.rmtree(to, ignore_errors=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    os.chdir(to)
    LOG.parent.mkdir()
    os.environ |= {"PYTHONPATH": str(to / "src"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # as conftest.py, before imports
    sys.dont_write_bytecode = True
    sys.path[:] = [str(to / "src"), *(p for p in sys.path if p and not Path(p).is_relative_to(ROOT / "src"))]


def preload(modules: Iterable[str]) -> None:
    """Import what the tests will, the package and the tests themselves apart."""
    for name in modules:
        if name not in sys.modules and name.partition(".")[0] not in (
            "pixelgrow",
            "tests",
            "bench",
            "conftest",
            "__main__",
            "coverage",
        ):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def table(mutants: list[Mutant], results: dict[str, Any], equivalent: dict[str, Any]) -> str:
    """Counts by file, and the score."""
    rows: dict[str, Counter[str]] = {}
    for mutant in mutants:
        status = results.get(mutant.key, {}).get("status", "to do")
        status = "equivalent" if status == "survived" and mutant.key in equivalent else status
        for name in (mutant.file.removeprefix("src/pixelgrow/"), "all"):
            rows.setdefault(name, Counter())[status] += 1
    columns = ("killed", "equivalent", "survived", "to do")
    lines = [f"{'':<32}" + "".join(f"{c:>12}" for c in ("mutants", *columns))]
    for name, row in sorted(rows.items(), key=lambda r: (r[0] == "all", r[0])):
        lines.append(f"{name:<32}" + "".join(f"{n:>12}" for n in (row.total(), *(row[c] for c in columns))))
    done = rows["all"].total() - rows["all"]["to do"]
    good = rows["all"]["killed"] + rows["all"]["equivalent"]
    return "\n".join(lines) + f"\nkilled or equivalent: {good} of {done} ({good / max(done, 1):.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench" / "mutants.json")
    parser.add_argument("--within", type=float, default=math.inf, help="leave out tests that take more seconds")
    parser.add_argument("--again", choices=["survived", "all"], help="run these again, though their result is known")
    parser.add_argument("--only", nargs="*", metavar="KEY", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="print the sample and what is known of it; run nothing")
    parser.add_argument("--show", metavar="KEY", help="print one mutant as a diff")
    args = parser.parse_args()
    output = args.output.resolve()
    os.chdir(ROOT)
    found = sources()
    every = [mutant for source in found.values() for mutant in source.mutants]
    chosen = sample(every, args.count, args.seed)
    chosen.sort(key=lambda mutant: (mutant.file, mutant.lines))
    stored = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    results: dict[str, Any] = stored.setdefault("results", {})
    equivalent = json.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else {}
    if args.show:
        mutant = next(mutant for mutant in every if mutant.key.startswith(args.show))
        print(f"{mutant.file}:{mutant.lines[0]} {mutant.where}", *found[mutant.file].diff(mutant.key), sep="\n")
        return
    if args.list:
        for mutant in chosen:
            known = results.get(mutant.key, {})
            status = "equivalent" if mutant.key in equivalent else known.get("status", "to do")
            print(f"{mutant.key} {status:<10} {mutant.file}:{mutant.lines[0]} {mutant.where} ({known.get('by', '')})")
            print(*(f"    {line}" for line in found[mutant.file].diff(mutant.key)), sep="\n")
        print(f"{len(every)} mutants in all\n{table(chosen, results, equivalent)}")
        return
    wanted = [mutant for mutant in chosen if not args.only or mutant.key in args.only]
    known = {k for k, r in results.items() if not args.only and args.again != "all" and r["status"] != args.again}
    todo = [mutant for mutant in wanted if mutant.key not in known]
    private_copy(output.parent / "mutants-copy")
    facts: dict[str, Any] = {}
    for mutant in todo:
        if mutant.room not in facts:
            facts[mutant.room] = baseline(mutant.room, output.parent / "mutants-tests.json", args.within)
            failed = [name for name, test in facts[mutant.room]["tests"].items() if not test["passed"]]
            print(
                f"{mutant.room}: {len(facts[mutant.room]['tests'])} tests, failing and left out: {failed}", flush=True
            )
            preload(facts[mutant.room]["modules"])
        result = run_one(found[mutant.file], mutant, facts[mutant.room], args.within)
        results[mutant.key] = asdict(mutant) | {"diff": found[mutant.file].diff(mutant.key)} | result
        print(
            f"{mutant.key} {result['status']:<9} {result['seconds']:>6} s  {mutant.file}:{mutant.lines[0]}", flush=True
        )
        stored |= {"seed": args.seed, "count": args.count, "date": time.strftime("%Y-%m-%d")}
        output.write_text(json.dumps(stored, indent=1, ensure_ascii=False), encoding="utf-8")
    print(table(chosen, results, equivalent))


if __name__ == "__main__":
    main()
