"""Plants one-line faults in a copy of the package, one at a time, and tells which of them no test of ``make test`` sees.

    python -m pip install coverage
    python -m tests.mutants cover           # which tests run which lines; as long as make test on one core
    python -m tests.mutants plant --count 50 --seed 0

Every line that a test runs may be changed. A mutant is met by the tests that run its line, the quickest of them first; it is
seen if one of them fails that passes without it, or does not end. Lines that run only in processes which tests start are not
chosen.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "terratorch_simpler"
COVERAGE = ROOT / ".coverage_of_tests.json"
MOST_SECONDS = 300
MOST_TESTS = 150
COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
ARITHMETIC = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "//", ast.MatMult: "*"}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
SILENT = (ast.Raise, ast.JoinedStr, ast.Assert, ast.AnnAssign, ast.arguments)  # no texts, no types, no signatures


@dataclass(frozen=True)
class Mutant:
    """A line that is changed: of a file, from one text to another."""

    path: str
    line: int
    before: str
    after: str


def changes(node: ast.AST, text: str) -> Iterator[str]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = ast.unparse(node.left), ast.unparse(node.comparators[0])
        yield f"{left} {COMPARISONS[type(node.ops[0])]} {right}"
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield f"({ast.unparse(node.left)} {ARITHMETIC[type(node.op)]} {ast.unparse(node.right)})"
    elif isinstance(node, ast.BoolOp):
        word = "or" if isinstance(node.op, ast.And) else "and"
        yield "(" + f" {word} ".join(f"({ast.unparse(value)})" for value in node.values) + ")"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield f"bool({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield repr(node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "return None"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
        yield f"{NAMES[node.func.id]}{text[len(node.func.id) :]}"
    elif isinstance(node, ast.IfExp):
        yield f"({ast.unparse(node.orelse)} if {ast.unparse(node.test)} else {ast.unparse(node.body)})"


def mutants(path: Path) -> Iterator[Mutant]:
    """Every change of one line of a file, inside of functions."""
    source = path.read_text()
    lines = source.splitlines()

    def visit(node: ast.AST, inside: bool) -> Iterator[Mutant]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, SILENT) or (isinstance(child, ast.keyword) and child.arg == "strict"):
                continue
            if inside and getattr(child, "lineno", 0) and child.lineno == child.end_lineno:
                line = lines[child.lineno - 1]
                start, end = (len(line.encode()[:offset].decode()) for offset in (child.col_offset, child.end_col_offset))
                for after in changes(child, line[start:end]):
                    changed = line[:start] + after + line[end:]
                    if changed != line:
                        yield Mutant(str(path.relative_to(ROOT)), child.lineno, line, changed)
            yield from visit(child, inside or isinstance(child, ast.FunctionDef))

    yield from visit(ast.parse(source), False)


def cover(arguments: list[str]) -> None:
    """Run the tests under coverage, and keep which ones run which lines and how long each takes."""
    import coverage

    class Watcher:
        def __init__(self) -> None:
            self.seconds: dict[str, float] = {}

        def pytest_runtest_logstart(self, nodeid: str) -> None:
            watch.switch_context(nodeid.partition("[")[0])

        def pytest_runtest_logreport(self, report) -> None:
            name = report.nodeid.partition("[")[0]
            self.seconds[name] = self.seconds.get(name, 0.0) + report.duration

    import pytest

    # Kept in memory: processes that tests fork would remove a temporary folder as they end.
    watch = coverage.Coverage(data_file=None, source_pkgs=[PACKAGE], config_file=False)
    watcher = Watcher()
    watch.start()
    pytest.main(["-q", *arguments], plugins=[watcher])
    watch.stop()
    data = watch.get_data()
    lines = {str(Path(name).relative_to(ROOT)): data.contexts_by_lineno(name) for name in data.measured_files()}
    found = json.loads(COVERAGE.read_text()) if COVERAGE.exists() else {"lines": {}, "seconds": {}}
    found["seconds"] |= watcher.seconds
    for name, of in lines.items():
        kept = found["lines"].setdefault(name, {})
        for line, contexts in of.items():
            kept[str(line)] = sorted({*kept.get(str(line), []), *contexts} - {""})
    COVERAGE.write_text(json.dumps(found))


def plant(count: int, seed: int, jobs: int) -> int:
    """Plant mutants that a script chooses, evenly over the lines that tests run; tell which survive."""
    covered = json.loads(COVERAGE.read_text())
    chance = random.Random(seed)
    found = []
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        lines = covered["lines"].get(str(path.relative_to(ROOT)), {})
        found += [mutant for mutant in mutants(path) if lines.get(str(mutant.line))]
    chosen = chance.sample(found, count)
    print(f"{count} of {len(found)} mutants", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / str(number) / "copy" for number in range(jobs)]
        for copy in copies:
            tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
            for name in tracked.stdout.splitlines():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
            if (ROOT.parent / "shared").exists():
                (copy.parent / "shared").symlink_to(ROOT.parent / "shared")
        import lightning.pytorch  # noqa: F401
        import pytest
        import terratorch.datamodules
        import terratorch.tasks  # noqa: F401  ten seconds that every mutant would take anew

        tests = {mutant: tests_of(mutant, covered) for mutant in chosen}
        all_tests = sorted({name for names in tests.values() for name in names})
        _, status = os.waitpid(start(None, copies[0], all_tests), 0)
        failing = failed(copies[0])
        if os.waitstatus_to_exitcode(status) not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit(f"Tests could not be run without a mutant:\n{(copies[0].parent / 'log').read_text()[-3000:]}")
        print(f"{len(all_tests)} tests; failing without a mutant, and left out: {', '.join(failing) or 'none'}", flush=True)

        running: dict[int, tuple[Mutant, Path, float]] = {}
        survived, waiting = [], list(chosen)
        while waiting or running:
            while waiting and copies:
                mutant, copy = waiting.pop(), copies.pop()
                names = [name for name in tests[mutant] if name not in failing] or ["--version"]  # none: nothing sees it
                running[start(mutant, copy, names)] = (mutant, copy, time.monotonic())
            pid, status = os.waitpid(-1, os.WNOHANG)
            for other, (_, _, since) in running.items():
                if time.monotonic() > since + MOST_SECONDS:
                    with suppress(ProcessLookupError):  # has ended meanwhile
                        os.killpg(other, signal.SIGKILL)
            if pid not in running:
                time.sleep(0.2)
                continue
            mutant, copy, since = running.pop(pid)
            copies.append(copy)
            shutil.copy(ROOT / mutant.path, copy / mutant.path)
            seen = os.waitstatus_to_exitcode(status) not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
            survived += [] if seen else [mutant]
            word = "seen" if seen else "SURVIVED"
            print(
                f"{word} in {time.monotonic() - since:.0f} s: {mutant.path}:{mutant.line}\n"
                f"    - {mutant.before.strip()}\n    + {mutant.after.strip()}",
                flush=True,
            )
    print(f"{count - len(survived)} of {count} seen")
    return 1 if survived else 0


def tests_of(mutant: Mutant, covered: dict) -> list[str]:
    """The tests that run the line of a mutant, the quickest first."""
    names = covered["lines"][mutant.path][str(mutant.line)]
    return sorted(names, key=lambda name: covered["seconds"].get(name, 1e9))[:MOST_TESTS]


class Failures:
    """Writes the tests that fail, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            with self.path.open("a") as file:
                print(report.nodeid.partition("[")[0], file=file)


def failed(copy: Path) -> list[str]:
    """The tests that failed in the last run on a copy."""
    return sorted(set((copy.parent / "failed").read_text().splitlines()))


def start(mutant: Mutant | None, copy: Path, tests: list[str]) -> int:
    """Run tests on a copy in a process of its own: until the first fails that sees a mutant, or all without one."""
    if mutant is not None:
        lines = (copy / mutant.path).read_text().splitlines(keepends=True)
        lines[mutant.line - 1] = mutant.after + "\n"
        (copy / mutant.path).write_text("".join(lines))
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(copy)
    with open(copy.parent / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["PYTHONPATH"] = str(copy)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "tests")]:
        del sys.modules[name]
    import pytest

    options = ["-q", "--rootdir", str(copy), "-p", "no:cacheprovider", *([] if mutant is None else ["-x"])]
    code = pytest.main([*options, *tests], plugins=[Failures(copy.parent / "failed")])
    sys.stdout.flush()
    os._exit(int(code))


def main() -> int:
    """Cover or plant; the exit status is 1 if a mutant survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("cover").add_argument("arguments", nargs="*", help="for pytest")
    planting = commands.add_parser("plant")
    planting.add_argument("--count", type=int, default=50)
    planting.add_argument("--seed", type=int, default=0)
    planting.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    if args.command == "cover":
        cover(args.arguments)
        return 0
    return plant(args.count, args.seed, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
