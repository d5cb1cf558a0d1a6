"""The command ``terratorch-simpler``: parse, call, and say in one line what went wrong."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console

from terratorch_simpler.errors import ConfigurationError, PlanError, SettingsError, SimplerError
from terratorch_simpler.files import below, written_to
from terratorch_simpler.lightning.internals import TunerExitException
from terratorch_simpler.plan import PLAN_FILE, SlimmingPlan
from terratorch_simpler.report import full_table

if TYPE_CHECKING:
    from terratorch_simpler.sweep import Sweep

FAILED, BAD_CONFIG = 1, 2
TAKE_SETTINGS = ("plan", "sweep", "export")
"""Commands that take settings of ``terratorch fit`` besides their own."""
NEGATIVE = re.compile(r"-(\.?\d|inf)")
"""What starts a number and no option."""
LONGEST = 500
"""Characters of an error that is not ours: the parser's repeat the whole config."""


class _Planned(TunerExitException):
    """Ends a fit once the plan is made; Lightning takes this kind for a success and tells the loggers so."""


class _InSetup(Callback):
    """Does something in setup, where SimplerCallback works as well."""

    def __init__(self, work: Callable[[Trainer, LightningModule], None]) -> None:
        self._work = work

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        self._work(trainer, pl_module)


def run_plan(arguments: Namespace, settings: Sequence[str]) -> None:
    """Choose a plan with the setup that ``terratorch fit`` would use, and stop before training.

    Args:
        arguments: ``output_dir``, ``ckpt_path``, ``on_unsettled`` and ``debug``.
        settings: What follows ``terratorch fit``, such as ``--config c.yaml --data.init_args.batch_size 4``.
    """
    from terratorch_simpler.models.backbone import find_backbone
    from terratorch_simpler.models.checkpoint import load_at_full_depth
    from terratorch_simpler.terratorch.command_line import build_run

    cli = build_run(settings, debug=arguments.debug)
    if arguments.ckpt_path:
        load_at_full_depth(cli.model, arguments.ckpt_path)
        find_backbone(cli.model).pretrained = None  # whatever it was built with
    print(below(_choose(cli, arguments), PLAN_FILE))


def run_sweep(arguments: Namespace, settings: Sequence[str]) -> None:
    """Choose a plan as ``plan`` does, and compare cost and quality of every other depth and width.

    Args:
        arguments: ``output_dir``, ``widths``, ``probe``, ``repeats``, ``on_unsettled`` and ``debug``.
        settings: As for ``plan``.
    """
    from terratorch_simpler.sweep import Sweep, SweepSettings
    from terratorch_simpler.terratorch.command_line import build_run

    try:
        wanted = SweepSettings(tuple(arguments.widths), arguments.probe, arguments.repeats)
    except ConfigurationError as err:
        raise SettingsError(str(err)) from err
    cli = build_run(settings, debug=arguments.debug)
    _choose(cli, arguments, Sweep(cli.model, wanted))


def _choose(cli: Any, arguments: Namespace, sweep: Sweep | None = None) -> str | Path:
    """Fit up to the point where the plan is chosen; returns its folder."""
    from terratorch_simpler.lightning.callback import SimplerCallback

    callbacks: list[Callback] = cli.trainer.callbacks
    ours = next((callback for callback in callbacks if isinstance(callback, SimplerCallback)), None)
    if ours is None:
        ours = SimplerCallback()
        callbacks.insert(0, ours)
    ours.output_dir = arguments.output_dir or ours.output_dir
    ours.on_unsettled = arguments.on_unsettled or ours.on_unsettled

    def stop(trainer: Trainer, task: LightningModule) -> None:
        if sweep is not None and ours.written is not None and trainer.is_global_zero:
            with written_to(ours.written) as folder:
                sweep.run(trainer, task, folder)
        raise _Planned

    callbacks.insert(callbacks.index(ours) + 1, _InSetup(stop))
    if sweep is not None:
        ours.compare(sweep.record)
        callbacks.insert(callbacks.index(ours), _InSetup(sweep.check))
    if not is_overridden("training_step", cli.model):  # tasks that only predict can be pruned as well
        cli.model.training_step = lambda *_args: None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if ours.written is None:
        msg = (
            "The encoder is pruned already, expected an intact one: remove backbone_keep, backbone_plan and backbone_width."
        )
        raise ConfigurationError(msg)
    return ours.written


def run_show(arguments: Namespace, _settings: Sequence[str]) -> None:
    """Print a plan: what it keeps and why, what every depth costs, what other criteria would keep."""
    Console().print(full_table(SlimmingPlan.load(arguments.plan)))


def run_demo(arguments: Namespace, _settings: Sequence[str]) -> None:
    """Fine-tune an encoder on generated scenes, pruned and intact, and compare both in one table; offline, on a CPU."""
    from terratorch_simpler.demo import run

    run(Path(arguments.output_dir), official_weights=arguments.official_weights)


def run_export(arguments: Namespace, settings: Sequence[str]) -> None:
    """Write a slimmed model so that it runs without this package.

    Args:
        arguments: ``ckpt_path``, ``output_dir``, ``formats``, ``image_size``, ``width`` and ``debug``.
        settings: As for ``plan``; those of the fit.
    """
    from terratorch_simpler import export
    from terratorch_simpler.terratorch.command_line import read_settings

    folder, formats = Path(arguments.output_dir), arguments.formats
    config, datamodule = read_settings(settings, debug=arguments.debug)
    trained = export.load_trained(config, arguments.ckpt_path, arguments.width)
    if "plain" in formats:
        export.check_expressible(trained.backbone)  # before anything is written
    plan = export.find_plan(trained, config, arguments.ckpt_path)
    graphs = [name for name in export.GRAPH_FORMATS if name in formats]
    description = export.describe(trained, datamodule, plan, arguments.image_size if graphs else None)
    for format_ in graphs:
        path, gap = export.export_graph(trained, format_, folder, arguments.image_size, description)
        print(f"{path} (answers differ by at most {gap:.1g} of the largest value)")
    if "plain" in formats:  # last, since it takes the model apart
        written, weights, gap = export.export_plain(trained, config, folder)
        print(f"{written}\n{weights} (answers differ by at most {gap:.1g} of the largest value)")
    if export.may_write_card(folder):
        print(export.write_card(description, folder, formats))


COMMANDS: dict[str, Callable[[Namespace, Sequence[str]], None]] = {
    "plan": run_plan,
    "show": run_show,
    "sweep": run_sweep,
    "export": run_export,
    "demo": run_demo,
}


def build_parser(commands: Mapping[str, ArgumentParser] | None = None) -> ArgumentParser:
    """The parser with all commands.

    Args:
        commands: Their own parsers; made anew by default.
    """
    parser = ArgumentParser(prog="terratorch-simpler", description=__doc__)
    subcommands = parser.add_subcommands(dest="command")
    for name, command in (commands or build_commands()).items():
        subcommands.add_subcommand(name, command)
    return parser


def build_commands() -> dict[str, ArgumentParser]:
    """The parser of every command."""
    plan = ArgumentParser(description="Choose a plan without training: plan.json, a report and a table. Settings of the "
                          "config can be overridden as in terratorch fit, e.g. --data.init_args.batch_size 4.")  # fmt: skip
    plan.add_argument("-c", "--config", required=True, help="a YAML that terratorch fit takes; later ones override")
    plan.add_argument("-o", "--output_dir", help="folder for plan.json and the report; default <log_dir>/simpler")
    plan.add_argument("--ckpt_path", help="checkpoint of a fit at full depth, to choose from what it has tuned")
    sweep = ArgumentParser(
        description="Compare cost and quality of every depth and width, without training: sweep.csv, sweep.png, a table, "
        "and what plan writes. Settings of the config can be overridden as for plan."
    )
    sweep.add_argument("-c", "--config", required=True, help="a YAML that terratorch fit takes; later ones override")
    sweep.add_argument("-o", "--output_dir", help="folder for what is written; default <log_dir>/simpler")
    sweep.add_argument("--widths", type=float, nargs="+", default=[1.0], help="kept shares of width, each with every depth")
    sweep.add_argument("--probe", action="store_true", help="score frozen features with the labels: k-NN and a linear probe")
    sweep.add_argument("--repeats", type=int, default=20, help="timed passes of a single tile")
    for chooses in (plan, sweep):
        chooses.add_argument(
            "--on_unsettled",
            choices=["apply", "half", "intact", "error"],
            help="where the verdict is unsettled: apply the choice and warn, keep half of the blocks, or all, or end "
            "after the report; default as in the config",
        )
    show = ArgumentParser(description="Show a plan in the terminal.")
    show.add_argument("plan", help="path of a plan.json")
    export = ArgumentParser(description="Write a slimmed model so that it runs where this package is not installed.")
    export.add_argument("-c", "--config", required=True, help="a YAML of the fit; later ones override")
    export.add_argument("--ckpt_path", required=True, help="checkpoint of the fit")
    export.add_argument("-o", "--output_dir", required=True, help="folder for what is written")
    export.add_argument(
        "--formats",
        nargs="+",
        choices=["plain", "onnx", "pt2"],
        default=["plain"],
        help="plain: config and checkpoint for TerraTorch; onnx and pt2 (torch.export): the whole model as one graph",
    )
    export.add_argument("--image_size", type=int, help="rows and columns in a graph, in pixels; default the encoder's own")
    export.add_argument("--width", type=float, help="one of the widths that SlimmableTraining trained; default the largest")
    demo = ArgumentParser(description=run_demo.__doc__)
    demo.add_argument("-o", "--output_dir", default="demo", help="folder for everything the demo makes")
    demo.add_argument(
        "--official_weights", action="store_true", help="use Prithvi-EO-2.0-tiny-TL from the Hugging Face Hub instead"
    )
    commands = {"plan": plan, "sweep": sweep, "show": show, "export": export, "demo": demo}
    for command in commands.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return commands


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
    commands = build_commands()
    settings: list[str] = []
    if args and args[0] in TAKE_SETTINGS:
        own, settings = _split(commands[args[0]], args[1:])
        args = [args[0], *own]
    parsed = build_parser(commands).parse_args(args)  # exits with 2 by itself
    options = parsed[parsed.command]
    try:
        COMMANDS[parsed.command](options, settings)
    except Exception as err:
        if options.debug:
            raise
        ours = _our_error(err)
        foreign = textwrap.shorten(f"{type(err).__name__}: {err}", LONGEST, placeholder=" ...")
        text = str(ours) if ours else f"{foreign} (--debug shows where)"
        print(f"terratorch-simpler {parsed.command}: {' '.join(text.split())}", file=sys.stderr)
        return BAD_CONFIG if isinstance(ours, SettingsError | PlanError) else FAILED
    return 0


def _our_error(err: BaseException | None) -> SimplerError | None:
    """The error of ours behind what was raised: the parser wraps what goes wrong while it builds the model."""
    while err is not None and not isinstance(err, SimplerError):
        err = err.__cause__ or err.__context__
    return err


if __name__ == "__main__":
    sys.exit(main())
