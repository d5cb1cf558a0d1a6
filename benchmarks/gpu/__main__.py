"""Everything that has to be looked at on a GPU, in one command.

    python -m benchmarks.gpu --device cuda -o benchmarks/results/gpu.json

Prints a line for every check and each of its findings: PASS, FAIL, or SKIP with the reason. A check runs in a process of its
own, which is ended when its time is up, so that one that hangs or crashes is a FAIL and the rest goes on. The JSON file is
written after every check. The exit status is 1 if anything fails. On a CPU, ``--device cpu --small`` runs the same checks
with small encoders; what needs CUDA is skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import FINDINGS, Finding, Settings

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_SAY = 1.0
"""For a check that hangs to say where, before it is ended."""
LAST_WORDS = 4000
"""Characters of a check's output that are kept if it fails."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: To ask for it by.
        title: What it looks at.
        target: ``module:function``.
        seconds: After which it is ended.
    """

    name: str
    title: str
    target: str
    seconds: float


CHECKS = (
    Check("machine", "device and packages", "benchmarks.gpu.machine:machine", 120),
    Check("tests", "tests marked gpu", "benchmarks.gpu.machine:marked_tests", 180),
    Check("waits", "host waits of a selection pass, by line", "benchmarks.gpu.selection:waits", 120),
    Check("precisions", "plans in fp32, bf16 and fp16 against the CPU's", "benchmarks.gpu.selection:precisions", 180),
    Check("batches", "the same plan whatever the batch size", "benchmarks.gpu.selection:batches", 120),
    Check("random", "random state after a selection", "benchmarks.gpu.selection:random_state", 120),
    Check("fit", "terratorch fit trains every trainable tensor", "benchmarks.gpu.training:fit", 180),
    Check("memory", "memory that runs out halves the batch", "benchmarks.gpu.selection:memory", 120),
    Check("fsdp", "FSDP on one device: fit, checkpoint, resume", "benchmarks.gpu.training:fsdp", 180),
    Check("speed", "24 against 5 blocks: speed and memory", "benchmarks.gpu.figures:speed_and_memory", 270),
    Check("overhead", "the selection pass beside the encoder alone", "benchmarks.gpu.figures:overhead", 150),
)


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """Run the checks.

    Args:
        arguments: Of the command line, by default those of this process.
        checks: What there is to choose from.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu, cuda, or one of several (cuda:1)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--only", nargs="+", choices=[check.name for check in checks], help="some of the checks")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all of them together")
    parser.add_argument("--patience", type=float, default=1.0, help="times as long for each of them, on a slow machine")
    args = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else list(arguments)
    asked = [check for check in checks if args.only is None or check.name in args.only]
    found: list[dict[str, Any]] = [
        {"number": checks.index(check), **asdict(check), "verdict": None, "findings": []} for check in asked
    ]
    started = time.monotonic()
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the check at work is ended too
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as scratch:
        settings = Settings(args.device, args.small, Path(scratch), args.output.resolve().parent)
        for check, told in zip(asked, found, strict=True):
            left = started + args.budget - time.monotonic()
            told |= run(check, settings, min(args.patience * check.seconds, left))
            tell(told)
            save(args.output, words, found, time.monotonic() - started)
    signal.signal(signal.SIGTERM, handler)
    verdicts = [check["verdict"] for check in found]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("PASS", "FAIL", "SKIP"))
    print(f"{counts} in {time.monotonic() - started:.0f} s: {args.output}")
    return int("FAIL" in verdicts)


def run(check: Check, settings: Settings, seconds: float) -> dict[str, Any]:
    """Run one check in a process group of its own, for at most so many seconds.

    Returns:
        Its ``verdict``, ``findings`` and ``seconds_taken``; if it fails, also the end of its ``output``.
    """
    if seconds <= 0:
        return {"verdict": "FAIL", "findings": [asdict(Finding("FAIL", "not run: no time was left"))], "seconds_taken": 0.0}
    folder = settings.scratch / check.name
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.gpu.check", check.target, "--watch", "--folder", str(folder)]
    command += ["--device", settings.device, "--scratch", str(settings.scratch), "--results", str(settings.results)]
    command += ["--small"] if settings.small else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    log = folder / "output.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
            ended = process.returncode
        except subprocess.TimeoutExpired:
            ended = None
            process.send_signal(signal.SIGUSR1)  # to say where it is
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_SAY)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    file = folder / FINDINGS
    findings = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    said = log.read_text(errors="replace")
    if ended is None:
        findings.append(asdict(Finding("FAIL", f"ended after {seconds:.0f} s without an answer")))
    elif ended != 0:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing was said")
        findings.append(asdict(Finding("FAIL", f"ended with status {ended}: {last.strip()}")))
    elif not findings:
        findings.append(asdict(Finding("FAIL", "found nothing to look at")))
    verdicts = {finding["verdict"] for finding in findings}
    verdict = next(verdict for verdict in ("FAIL", "PASS", "SKIP") if verdict in verdicts)
    result = {"verdict": verdict, "findings": findings, "seconds_taken": round(time.monotonic() - started, 1)}
    return result | ({"output": said[-LAST_WORDS:]} if verdict == "FAIL" else {})


def tell(check: dict[str, Any]) -> None:
    """Print what came of one check."""
    print(f"{check['verdict']} {check['number']:2d} {check['title']} ({check['seconds_taken']:.0f} s)")
    for finding in check["findings"]:
        print(f"        {finding['verdict']} {finding['what']}")
    sys.stdout.flush()


def save(path: Path, words: Sequence[str], checks: Sequence[dict[str, Any]], seconds: float) -> None:
    """Write what is known so far, whole.

    Not by the package's own means: the process that watches over the others imports nothing of what they check.
    """
    of_machine = [finding["numbers"] for check in checks if check["name"] == "machine" for finding in check["findings"]]
    known = {
        "benchmark": "gpu",
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *words]),
        "machine": of_machine[0] if of_machine else None,
        "seconds": round(seconds, 1),
        "checks": list(checks),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    part.write_text(json.dumps(known, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
