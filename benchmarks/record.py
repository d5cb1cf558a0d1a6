"""Results of benchmarks: one JSON file each, with what is needed to get them again."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from terratorch_simpler.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "terratorch", "lightning", "timm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all benchmarks share."""
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder for the JSON file")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "on": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def asked(settings: argparse.Namespace) -> dict[str, Any]:
    """Settings without paths."""
    return {key: value for key, value in vars(settings).items() if not isinstance(value, Path)}


def save(
    name: str,
    settings: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
    module: str | None = None,
    **more: Any,
) -> Path:
    """Write the results of one benchmark whole.

    Args:
        name: Of the benchmark.
        settings: What was asked for, the device and the folder for results among it.
        rows: One mapping a line of the table.
        arguments: Of the command, by default those of this process.
        module: In this folder; by default it has the benchmark's name.
        more: Further tables.

    Returns:
        The file: ``<name>-<device>.json``.
    """
    path = settings.output / f"{name}-{settings.device.type}.json"
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("-o", "--output"):
        if option in words:
            del words[words.index(option) : words.index(option) + 2]
    # Where data lie on the machine concerns nobody else.
    words = [f"DATA/{Path(word).name}" if Path(word).is_absolute() else word for word in words]
    found = {
        "benchmark": name,
        "command": shlex.join(["python", "-m", f"benchmarks.{module or name}", *words]),
        "commit": commit(),
        "machine": machine(settings.device),
        "settings": asked(settings),
        "rows": [dict(row) for row in rows],
        **more,
    }
    with atomic_write(path) as part:
        part.write_text(json.dumps(found, indent=1, default=str) + "\n")
    return path


class Unfinished:
    """What a long benchmark has found so far: the same command at the same commit on the same machine goes on from it.

    Args:
        name: Of the benchmark.
        settings: As for `save`.
        more: What else results depend on.
    """

    def __init__(self, name: str, settings: argparse.Namespace, **more: Any) -> None:
        self._path = settings.output / "unfinished" / f"{name}-{settings.device.type}.json"
        made = {"settings": asked(settings), "commit": commit(), "machine": machine(settings.device), **more}
        self._made = json.loads(json.dumps(made, default=str))
        self._found: dict[str, Any] = {}
        # What was changed since a commit is not known, so then nothing is taken over.
        if re.fullmatch("[0-9a-f]+", made["commit"]) and self._path.exists():
            kept = json.loads(self._path.read_text())
            self._found = kept["found"] if kept["made"] == self._made else {}

    def __call__(self, key: str, make: Callable[[], Any]) -> Any:
        """What was found before, or what is made now and kept.

        Args:
            key: Of one part.
            make: Gives something that JSON can hold.
        """
        if key not in self._found:
            self._found[key] = make()
            with atomic_write(self._path) as part:
                part.write_text(json.dumps({"made": self._made, "found": self._found}))
        return self._found[key]

    def finish(self) -> None:
        """Forget it: the results are saved."""
        self._path.unlink(missing_ok=True)


def place(command: str, made: Iterable[Mapping[str, Any]]) -> str:
    """Where figures come from, in words.

    Args:
        command: That makes them again.
        made: A ``commit`` and a ``machine`` each; those that say the same are named once.
    """
    commits, machines = [], []
    for part in made:
        machine = part["machine"]
        name = f"{machine['device']}, {machine['cores']} cores" if machine["on"] == "cpu" else machine["device"]
        versions = f"Python {machine['python']}, PyTorch {machine['torch']}, TerraTorch {machine['terratorch']}"
        commits.append(part["commit"])
        machines.append(f"{name}, {versions}")
    return f"`{command}` at commit {', '.join(dict.fromkeys(commits))} on {'; '.join(dict.fromkeys(machines))}"


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table in the terminal."""
    if not rows:
        return
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def cell(value: Any) -> str:
    """One value of a table."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):  # with a standard error, or an interval
        figure, *spread = value
        if len(spread) == 1:
            return f"{figure:.3f} ± {spread[0]:.3f}"
        low, high = spread
        return f"{figure:+.3f} ({low:+.3f} to {high:+.3f})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def commit() -> str:
    """The commit of the working tree, with a plus sign if something was changed since; what results are kept in aside."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        tracked = ["status", "--porcelain", "--untracked-files=no", "--", "terratorch_simpler", "benchmarks/*.py"]
        changed = subprocess.run([*git, *tracked], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
