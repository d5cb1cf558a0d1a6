"""Fine-tune and test every row of the paper's tables, and write what comes out beside what the paper reports.

    python -m benchmarks.reproduction mados --data_root DATA --output_dir results

Each run is ``terratorch fit`` and ``terratorch test`` on a config that is composed from configs/. Runs that are done are
skipped, one that was killed goes on from its last epoch: give the same command again. Settings of TerraTorch, such as
``--data.init_args.batch_size 4``, come last and hold for every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.reproduction.experiments import BEST, EXPERIMENTS, LAST, SCORES, compose, merged
from benchmarks.reproduction.table import TABLE_FILE, run_folder, write_results
from terratorch_simpler.files import atomic_write

ROOT = Path(__file__).parents[2]
VARIANTS = ("full", "simpler", "fixed")
CONFIG, OVERRIDES = "config.yaml", "overrides.yaml"
FAILED, BAD_ARGUMENTS = 1, 2

Command = Callable[[Sequence[str]], None]


def run_terratorch(args: Sequence[str]) -> None:
    """Run TerraTorch's command line.

    Args:
        args: Its arguments.

    Raises:
        CalledProcessError: If it fails.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for the callbacks and datamodules here
    subprocess.run([sys.executable, "-m", "terratorch", *args], check=True, env={**os.environ, "PYTHONPATH": path})


def run_one(folder: Path, terratorch: Command) -> None:
    """Fit, or go on with it, and test the checkpoint that did best on the validation split.

    Args:
        folder: Of the run; holds its config.
        terratorch: Runs TerraTorch's command line.
    """
    checkpoints = folder / "checkpoints"
    last = checkpoints / f"{LAST}.ckpt"
    settings = ["--config", str(folder / CONFIG)]
    terratorch(["fit", *settings, *(["--ckpt_path", str(last)] if last.exists() else [])])
    terratorch(["test", *settings, "--ckpt_path", str(checkpoints / f"{BEST}.ckpt")])
    last.unlink(missing_ok=True)  # holds the optimizer's state, three times the weights


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """Read ``--data.init_args.batch_size 4``, or with an equals sign, as the YAML it stands for.

    They are merged into the config of a run, since TerraTorch takes what is given for ``model_args`` on its command line as
    text: ``false`` would be true there.

    Args:
        args: Names and values.

    Raises:
        ValueError: If one has no value.
    """
    found: dict[str, Any] = {}
    left = list(args)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--") or not (equals or left):
            msg = f"Found {name!r} among the settings of TerraTorch, expected --name value: give it so, and settings last."
            raise ValueError(msg)
        setting: Any = yaml.safe_load(value if equals else left.pop(0))
        for key in reversed(name.removeprefix("--").split(".")):
            setting = {key: setting}
        found = merged(found, setting)
    return found


def same_overrides(folder: Path, overrides: Mapping[str, Any]) -> bool:
    """Whether earlier runs of an experiment had the same settings; remembers them if there are none.

    Args:
        folder: Of the experiment.
        overrides: Settings of TerraTorch.
    """
    path = folder / OVERRIDES
    if path.exists():
        return bool(yaml.safe_load(path.read_text(encoding="utf-8")) == overrides)
    write_yaml(overrides, path)
    return True


def write_yaml(settings: Mapping[str, Any], path: Path) -> None:
    """Write settings, whole or not at all.

    Args:
        settings: What to write.
        path: File to write; missing folders are made.
    """
    with atomic_write(path) as part:
        part.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"any of {', '.join(EXPERIMENTS)}; default all")
    parser.add_argument("--data_root", type=Path, default=Path(), help="folder that holds the data; default the current one")
    parser.add_argument("-o", "--output_dir", type=Path, required=True, help="for all runs, results.csv and table.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default all")
    return parser


def main(args: Sequence[str] | None = None, terratorch: Command = run_terratorch) -> int:
    """Run what is not done yet.

    Args:
        args: Arguments; by default those of the process.
        terratorch: Runs TerraTorch's command line.

    Returns:
        0 if all asked-for runs are done, 1 if one failed, 2 if the arguments are wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    dotted = (number for number, arg in enumerate(args) if arg.startswith("--") and "." in arg.partition("=")[0])
    start = next(dotted, len(args))
    parser = build_parser()
    options = parser.parse_args(args[:start])
    try:
        overrides = parse_overrides(args[start:])
    except ValueError as err:
        parser.error(str(err))
    names = options.experiments or list(EXPERIMENTS)
    if unknown := sorted(set(names) - EXPERIMENTS.keys()):
        parser.error(f"Found experiments {unknown}, expected some of {', '.join(EXPERIMENTS)}: change them.")
    output = options.output_dir.resolve()
    for name in names:
        if not same_overrides(output / name, overrides):
            parser.error(
                f"Found settings other than those of {output / name / OVERRIDES}, expected the same for all runs of {name}: "
                "give another --output_dir."
            )
    write_results(output)
    failed = []
    for name in names:
        for variant in (variant for variant in EXPERIMENTS[name].variants if variant in options.variants):
            for seed in options.seeds:
                folder = run_folder(output, name, variant, seed)
                if (folder / SCORES).exists():
                    continue
                config = compose(EXPERIMENTS[name], variant, seed, options.data_root.resolve(), folder, output / "plans")
                write_yaml(merged(config, overrides), folder / CONFIG)
                try:
                    run_one(folder, terratorch)
                except subprocess.CalledProcessError as err:
                    failed.append(folder)
                    print(f"{folder}: terratorch ended with {err.returncode}; what it said is above.", file=sys.stderr)
                    if err.returncode < 0:  # killed, and so would the next one be
                        return FAILED
                write_results(output)
    print(output / TABLE_FILE)
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
