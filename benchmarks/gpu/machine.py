"""Checks of the machine: what there is, and the tests that are marked for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.check import Finding, Settings, judged, skipped

ROOT = Path(__file__).resolve().parents[2]


def machine(settings: Settings) -> Iterator[Finding]:
    """The device computes, and everything can be imported."""
    import torch

    from benchmarks import record

    device = torch.device(settings.device)
    facts = record.machine(device)
    ones = torch.ones(64, 64, device=device)
    total = float((ones @ ones).sum())
    names = ", ".join(f"{name} {facts[name]}" for name in ("python", *record.PACKAGES))
    yield judged(total == 64**3, f"{facts['device']}; {names}", **facts, commit=record.commit())


def marked_tests(settings: Settings) -> Iterator[Finding]:
    """Tests with the mark ``gpu``."""
    if not settings.cuda:
        yield skipped("they need a GPU")
        return
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "@pytest.mark.gpu" in path.read_text()]
    yield from run_tests(files, settings.scratch / "tests")


def run_tests(files: Sequence[Path], folder: Path) -> Iterator[Finding]:
    """Run the tests with the mark in some files.

    Args:
        files: Of tests.
        folder: For what they write.
    """
    if find_spec("pytest") is None:
        yield skipped("pytest is not installed")
        return
    folder.mkdir(exist_ok=True)
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--junitxml", str(report)]
    command += ["--basetemp", str(folder / "files"), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, check=False)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    for case in cases:
        name = case.get("name", "")
        trouble = [part for kind in ("failure", "error") for part in case.findall(kind)]
        left_out = case.find("skipped")
        if left_out is not None:
            yield skipped(f"{name}: {left_out.get('message', '')}")
        else:
            said = trouble[0].get("message", "") if trouble else ""
            yield judged(not trouble, f"{name}{': ' + said.splitlines()[0] if said else ''}")
    if done.returncode not in (0, 1) or not cases:
        yield judged(False, f"pytest ended with status {done.returncode} after {len(cases)} tests (expected 0 and some)")
