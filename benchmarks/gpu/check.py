"""One check in a process of its own: a check is a function that yields findings.

    python -m benchmarks.gpu.check benchmarks.gpu.selection:precisions --device cuda --scratch DIR --results DIR

Each finding is written at once, as a line of JSON, so that none is lost if the process ends. Only the standard library is
imported here.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import signal
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["PASS", "FAIL", "SKIP"]
FINDINGS = "findings.jsonl"


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        verdict: Whether it is as expected; SKIP if it could not be looked at, or has no expectation.
        what: What was found and what was expected, or why it was skipped.
        numbers: The same for programs.
    """

    verdict: Verdict
    what: str
    numbers: dict[str, Any] = field(default_factory=dict)


def judged(as_expected: bool, what: str, **numbers: Any) -> Finding:
    """A finding that passes or fails."""
    return Finding("PASS" if as_expected else "FAIL", what, numbers)


def skipped(why: str, **numbers: Any) -> Finding:
    """A finding without a verdict."""
    return Finding("SKIP", why, numbers)


@dataclass(frozen=True)
class Settings:
    """What a check is told.

    Attributes:
        device: Where to run, as PyTorch names it.
        small: Sizes for seconds on a CPU.
        scratch: Folder that the checks of a run share; it is removed afterwards.
        results: Folder for results that are kept.
    """

    device: str
    small: bool
    scratch: Path
    results: Path

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU of PyTorch's CUDA backend."""
        return self.device.startswith("cuda")


def main(arguments: list[str] | None = None) -> None:
    """Run one check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="module:function")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help=f"for {FINDINGS}; by default the scratch folder")
    parser.add_argument("--watch", action="store_true", help="end when standard input does: the caller has gone")
    args = parser.parse_args(arguments)
    faulthandler.register(signal.SIGUSR1)  # the caller asks where it hangs
    if args.watch:
        threading.Thread(target=_end_with_caller, daemon=True).start()
    module, _, function = args.target.partition(":")
    settings = Settings(args.device, args.small, args.scratch, args.results)
    with ((args.folder or args.scratch) / FINDINGS).open("w") as file:
        for finding in getattr(importlib.import_module(module), function)(settings):
            print(json.dumps(asdict(finding), default=str), file=file, flush=True)


def _end_with_caller() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
