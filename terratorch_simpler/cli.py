"""The command ``terratorch-simpler``: parse, call, and say in one sentence what went wrong.

Nothing heavy is imported before it is needed: ``--help``, ``--version`` and ``show`` answer without TerraTorch and PyTorch.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace, _SubParsersAction
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from terratorch_simpler.errors import (
    CheckpointError,
    ConfigurationError,
    DepthError,
    LabelsError,
    PlanError,
    SettingsError,
    SimplerError,
    TilesError,
    TooFewTilesError,
    UnsupportedEncoderError,
    causes,
    did_you_mean,
)

FAILED, BAD_CONFIG = 1, 2
WRONG_SETTINGS = (
    ConfigurationError,
    CheckpointError,
    DepthError,
    LabelsError,
    PlanError,
    TilesError,
    UnsupportedEncoderError,
)
"""Errors of what was asked for; the others are of a run that failed."""
TAKE_SETTINGS = ("plan", "sweep", "export")
"""Commands that take settings of ``terratorch fit`` besides their own."""
NEGATIVE = re.compile(r"-(\.?\d|inf)")
"""What starts a number and no option."""
LONGEST = 500
"""Characters of an error that is not ours: the parser's repeat the whole config."""
PLAN_FILES = ("plan.json", "simpler/plan.json")
"""Where ``show`` looks in a folder: that of a plan, or the log folder of a fit."""


class _Formatter(HelpFormatter):
    """Fills descriptions, and leaves an example as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Parser(ArgumentParser):
    """Says what is wrong without printing the usage of every option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, add_help=False, **kwargs)
        self.add_argument("-h", "--help", action="help", help="show this help and exit")

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_CONFIG, f"{self.prog}: error: {message}; {self.prog} --help shows what it takes.\n")


class _Version(Action):
    """Prints the versions that a report of a problem needs, once asked for: they are read from installed packages."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        from terratorch_simpler import __version__

        versions = {"terratorch-simpler": __version__, **{name: _version(name) for name in ("TerraTorch", "torch")}}
        print(", ".join(f"{name} {number}" for name, number in versions.items()))
        parser.exit()


def _version(package: str) -> str:
    try:
        return version(package.lower())
    except PackageNotFoundError:
        return "is not installed"


def run_plan(arguments: Namespace, settings: Sequence[str]) -> None:
    """Choose a plan; see :func:`terratorch_simpler.commands.run_plan`."""
    from terratorch_simpler import commands

    with nullcontext() if arguments.debug else commands.quiet():
        commands.run_plan(arguments, settings)


def run_sweep(arguments: Namespace, settings: Sequence[str]) -> None:
    """Compare every depth and width; see :func:`terratorch_simpler.commands.run_sweep`."""
    from terratorch_simpler import commands

    with nullcontext() if arguments.debug else commands.quiet():
        commands.run_sweep(arguments, settings)


def run_export(arguments: Namespace, settings: Sequence[str]) -> None:
    """Write a pruned model; see :func:`terratorch_simpler.commands.run_export`."""
    from terratorch_simpler import commands

    with nullcontext() if arguments.debug else commands.quiet():
        commands.run_export(arguments, settings)


def run_show(arguments: Namespace, _settings: Sequence[str]) -> None:
    """Print a plan: what it keeps and why, what every depth costs, what other criteria would keep."""
    from rich.console import Console

    from terratorch_simpler.plan import SlimmingPlan
    from terratorch_simpler.report.table import full_table

    Console().print(full_table(SlimmingPlan.load(_plan_file(Path(arguments.plan)))))


def _plan_file(path: Path) -> Path:
    """The plan at a path, which may be a folder that holds one."""
    if not path.is_dir():
        return path
    for name in PLAN_FILES:
        if (path / name).is_file():
            return path / name
    msg = f"The folder {path} holds neither {' nor '.join(PLAN_FILES)}: give the folder or the plan.json of an earlier run."
    raise PlanError(msg)


def run_demo(arguments: Namespace, _settings: Sequence[str]) -> None:
    """Fine-tune an encoder on generated scenes, pruned and intact, and compare both in one table; offline, on a CPU."""
    from terratorch_simpler.demo import run

    run(Path(arguments.output_dir), official_weights=arguments.official_weights)


COMMANDS: dict[str, Callable[[Namespace, Sequence[str]], None]] = {
    "plan": run_plan,
    "show": run_show,
    "sweep": run_sweep,
    "export": run_export,
    "demo": run_demo,
}
ABOUT = {
    "plan": (
        "Choose the depth of an encoder without training, and write plan.json and a report.",
        "terratorch-simpler plan -c config.yaml -o chosen --data.init_args.batch_size 4",
    ),
    "show": ("Show a plan in the terminal.", "terratorch-simpler show lightning_logs/version_0"),
    "sweep": (
        "Compare cost and quality of every depth and width without training, and write the table and charts.",
        "terratorch-simpler sweep -c config.yaml -o compared --widths 1.0 0.5 --probe",
    ),
    "export": (
        "Write a pruned model so that it runs where this package is not installed.",
        "terratorch-simpler export -c config.yaml --ckpt_path best.ckpt -o plain --formats plain onnx",
    ),
    "demo": (
        "Fine-tune an encoder on generated scenes, pruned and intact, and compare both: offline, on a CPU, in minutes.",
        "terratorch-simpler demo -o demo",
    ),
}
"""What each command does, in one sentence, and an example."""


def build_parser() -> ArgumentParser:
    """The parser with all commands."""
    parser = _Parser(
        prog="terratorch-simpler",
        description="Choose how many blocks of an Earth-observation encoder to keep, before fine-tuning it.",
        epilog="terratorch-simpler COMMAND --help shows the options of a command.",
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=SUPPRESS,
        help="show the versions of this package, TerraTorch and torch",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    added = {}
    for name, (about, example) in ABOUT.items():
        more = " Settings of the config can be overridden as in terratorch fit." if name in TAKE_SETTINGS else ""
        added[name] = commands.add_parser(name, help=about, description=about + more, epilog=f"example:\n  {example}")
    _add_options(added)
    return parser


def build_commands() -> dict[str, ArgumentParser]:
    """The parser of every command."""
    actions = build_parser()._actions
    return next(dict(action.choices) for action in actions if isinstance(action, _SubParsersAction))


def _add_options(commands: Mapping[str, ArgumentParser]) -> None:
    plan, sweep, show, export, demo = (commands[name] for name in ("plan", "sweep", "show", "export", "demo"))
    for command in (plan, sweep, export):
        command.add_argument(
            "-c",
            "--config",
            action="append",
            required=True,
            metavar="YAML",
            help="a config that terratorch fit takes; may be repeated, later ones override",
        )
    plan.add_argument("--ckpt_path", metavar="FILE", help="checkpoint of a fit at full depth, to choose from its weights")
    for chooses in (plan, sweep):
        chooses.add_argument(
            "-o",
            "--output_dir",
            metavar="FOLDER",
            help="folder for what is written (default: that of the callback, or simpler in the log folder)",
        )
        chooses.add_argument(
            "--on_unsettled",
            choices=["apply", "half", "intact", "error"],
            help="if the verdict is unsettled: apply the choice and warn, keep half of the blocks, keep all, or fail "
            "after the report (default: as in the config)",
        )
    sweep.add_argument(
        "--widths",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="SHARE",
        help="kept shares of width, each with every depth (default: 1.0)",
    )
    sweep.add_argument("--probe", action="store_true", help="score frozen features with the labels: k-NN and a linear probe")
    sweep.add_argument("--repeats", type=int, default=20, metavar="N", help="timed passes of a single tile (default: 20)")
    show.add_argument("plan", help="a plan.json, its folder, or the log folder of a fit")
    export.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint of the fit")
    export.add_argument("-o", "--output_dir", required=True, metavar="FOLDER", help="folder for what is written")
    export.add_argument(
        "--formats",
        nargs="+",
        choices=["plain", "onnx", "pt2"],
        default=["plain"],
        help="plain: config and checkpoint for TerraTorch; onnx and pt2 (torch.export): the whole model as one graph "
        "(default: plain)",
    )
    export.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="rows and columns in a graph (default: the encoder's own)"
    )
    export.add_argument(
        "--width", type=float, metavar="SHARE", help="one of the widths of SlimmableTraining (default: the largest)"
    )
    demo.add_argument(
        "-o", "--output_dir", default="demo", metavar="FOLDER", help="folder for everything it makes (default: demo)"
    )
    demo.add_argument(
        "--official_weights", action="store_true", help="use Prithvi-EO-2.0-tiny-TL from the Hugging Face Hub instead"
    )
    for command in commands.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _split(command: ArgumentParser, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the arguments of a command from those for the parser of ``terratorch fit``; a config is for both."""
    own: list[str] = []
    settings: list[str] = []
    targets = [own]
    for arg in args:
        if arg.startswith("-") and not NEGATIVE.match(arg):
            name = arg.partition("=")[0] if arg.startswith("--") else arg[:2]
            targets = [own] if name in command._option_string_actions else [settings]
            if name in ("-c", "--config"):
                targets = [own, settings]
        for target in targets:
            target.append(arg)
    return own, settings


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: Arguments; by default those of the process.

    Returns:
        0 on success, 1 if the run failed, 2 if arguments or configuration are wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    settings: list[str] = []
    if args and args[0] in TAKE_SETTINGS:
        own, settings = _split(build_commands()[args[0]], args[1:])
        args = [args[0], *own]
        _refuse_typos(args[0], settings)
    options, unknown = build_parser().parse_known_args(args)  # exits with 2 by itself
    if unknown:
        command = build_commands()[options.command]
        command.error(
            f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0], command._option_string_actions)}"
        )
    try:
        _check_paths(options)
        COMMANDS[options.command](options, settings)
    except Exception as err:
        if options.debug:
            raise
        ours = _our_error(err) or _explained(err)
        foreign = " ".join(f"{type(err).__name__}: {err}".split())
        foreign = foreign if len(foreign) <= LONGEST else f"{foreign[: LONGEST - 4]} ..."
        text = str(ours) if ours else f"{foreign} (--debug shows where)"
        print(f"terratorch-simpler {options.command}: {' '.join(text.split())}", file=sys.stderr)
        return BAD_CONFIG if isinstance(ours, WRONG_SETTINGS) and not isinstance(ours, TooFewTilesError) else FAILED
    return 0


def _refuse_typos(name: str, settings: Sequence[str]) -> None:
    """Refuse settings that are a typo of an option of the command, such as a hyphen, before TerraTorch is imported."""
    command = build_commands()[name]
    for setting in settings:
        flag = setting.partition("=")[0]
        if flag.startswith("--") and "." not in flag and flag not in command._option_string_actions:
            meant = difflib.get_close_matches(flag, command._option_string_actions, n=1, cutoff=0.85)
            if meant:
                command.error(f"unrecognized arguments: {flag} (did you mean '{meant[0]}'?)")


def _check_paths(options: Namespace) -> None:
    """Refuse files that are not there, and configs that are no YAML, before TerraTorch is imported."""
    given = vars(options)
    for path in given.get("config") or []:
        if not Path(path).is_file():
            msg = f"The config {path} does not exist: give the path of a YAML that terratorch fit takes."
            raise SettingsError(msg)
        _check_yaml(path)
    checkpoint = given.get("ckpt_path")
    if checkpoint and not Path(checkpoint).exists():
        msg = f"The checkpoint {checkpoint} does not exist: give the path of one that terratorch fit has written."
        raise SettingsError(msg)
    if options.command in ("export", "demo"):  # the others check it where the callback's own folder is known
        folder = Path(options.output_dir)
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            msg = (
                f"Could not write to --output_dir {folder} ({nearest} is none), expected a folder to write to: change "
                "--output_dir."
            )
            raise SettingsError(msg)


def _check_yaml(path: str) -> None:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as err:
        mark = getattr(err, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        msg = f"The config {path} is no valid YAML{where} ({getattr(err, 'problem', None) or err}): correct it there."
        raise SettingsError(msg) from err
    if not isinstance(content, dict):
        msg = f"The config {path} holds {str(content)[:40]!r}, expected settings of terratorch fit: check the path."
        raise SettingsError(msg)


def _our_error(err: BaseException | None) -> SimplerError | None:
    """The error of ours behind what was raised: the parser wraps what goes wrong while it builds the model."""
    return next((cause for cause in causes(err) if isinstance(cause, SimplerError)), None)


def _explained(err: Exception) -> SimplerError | None:
    if "terratorch" not in sys.modules:
        return None
    from terratorch_simpler.terratorch.explain import run_error

    return run_error(err)


if __name__ == "__main__":
    sys.exit(main())
