"""The command ``terratorch-simpler``: parse, call, and say in one line what went wrong."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from terratorch_simpler.errors import ConfigurationError, PlanError, SimplerError
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.report import plan_table

FAILED, BAD_CONFIG = 1, 2


class _Planned(Exception):
    """Ends a fit once the plan is made."""


class _StopBeforeTraining(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        raise _Planned


def run_plan(arguments: Namespace, overrides: Sequence[str]) -> None:
    """Choose a cut with the set-up that ``terratorch fit`` would use, and stop before training.

    Args:
        arguments: ``config``, ``output_dir`` and ``debug``.
        overrides: Settings such as ``--data.init_args.batch_size 4``, as ``terratorch fit`` takes them.
    """
    from terratorch_simpler.callback import PLAN_FILE, SimplerCallback

    cli = _build_terratorch(arguments, overrides)
    callbacks: list[Callback] = cli.trainer.callbacks
    ours = next((callback for callback in callbacks if isinstance(callback, SimplerCallback)), None)
    if ours is None:
        ours = SimplerCallback()
        callbacks.insert(0, ours)
    ours.output_dir = arguments.output_dir or ours.output_dir
    callbacks.insert(callbacks.index(ours) + 1, _StopBeforeTraining())
    with contextlib.suppress(_Planned):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if ours.written is None:
        msg = "Found an encoder that is cut already, expected an intact one: remove backbone_keep and backbone_plan."
        raise ConfigurationError(msg)
    print(ours.written / PLAN_FILE)


def _build_terratorch(arguments: Namespace, overrides: Sequence[str]) -> Any:
    """TerraTorch's own command line up to the point where everything is built."""
    from terratorch.cli_tools import build_lightning_cli, import_custom_modules

    try:
        config = yaml.safe_load(Path(arguments.config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as err:
        msg = f"Found no readable YAML at {arguments.config} ({' '.join(str(err).split())}), expected a TerraTorch config."
        raise _ConfigError(msg) from err
    if not isinstance(config, dict):
        msg = f"Found no settings in {arguments.config}, expected a TerraTorch config with trainer, data and model."
        raise _ConfigError(msg)
    config.pop("ckpt_path", None)  # an argument of fit, which is not run
    import_custom_modules(config.get("custom_modules_path"))
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if arguments.debug else contextlib.redirect_stderr(said):
            return build_lightning_cli(["--config", yaml.safe_dump(config), *overrides], run=False)
    except SystemExit as err:
        reason = " ".join(said.getvalue().rpartition("error:")[2].split())
        msg = f"TerraTorch cannot read {arguments.config}: {reason[:400]}"
        raise _ConfigError(msg) from err


class _ConfigError(ConfigurationError):
    """The arguments or the configuration are wrong, before anything ran."""


def run_show(arguments: Namespace, _overrides: Sequence[str]) -> None:
    """Print a plan as a table, with the score of every depth."""
    plan = SlimmingPlan.load(arguments.plan)
    console = Console()
    console.print(plan_table(plan))
    for depth, score in (plan.scores or {}).items():
        votes = "" if plan.votes is None else f"  won {plan.votes.get(depth, 0.0):6.1%}"
        console.print(f"keep {depth:3d}: score {score:+.4f}{votes}{'  chosen' if depth == len(plan.kept_blocks) else ''}")


def run_demo(arguments: Namespace, _overrides: Sequence[str]) -> None:
    """Generate scenes, fit, test and predict, offline, on a CPU."""
    from terratorch_simpler.demo import run

    run(Path(arguments.output_dir), official_weights=arguments.official_weights)


COMMANDS: dict[str, Callable[[Namespace, Sequence[str]], None]] = {"plan": run_plan, "show": run_show, "demo": run_demo}


def build_parser() -> ArgumentParser:
    """The parser with all commands."""
    parser = ArgumentParser(prog="terratorch-simpler", description=__doc__)
    commands = parser.add_subcommands(dest="command")
    plan = ArgumentParser(description="Choose a cut without training: plan.json, report.png and a table. Settings of the "
                          "config can be overridden as in terratorch fit, e.g. --data.init_args.batch_size 4.")  # fmt: skip
    plan.add_argument("-c", "--config", required=True, help="the YAML that terratorch fit takes")
    plan.add_argument("-o", "--output_dir", help="folder for plan.json and report.png; default <log_dir>/simpler")
    show = ArgumentParser(description="Show a plan in the terminal.")
    show.add_argument("plan", help="path of a plan.json")
    demo = ArgumentParser(description=run_demo.__doc__)
    demo.add_argument("-o", "--output_dir", default="demo", help="folder for everything the demo makes")
    demo.add_argument(
        "--official_weights", action="store_true", help="use Prithvi-EO-2.0-tiny-TL from the Hugging Face Hub instead"
    )
    for name, command in (("plan", plan), ("show", show), ("demo", demo)):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        commands.add_subcommand(name, command)
    return parser


def _split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate dotted settings, which TerraTorch's parser knows, from the arguments of this command."""
    own: list[str] = []
    overrides: list[str] = []
    target = own
    for arg in args:
        if arg.startswith("-"):
            target = overrides if arg.startswith("--") and "." in arg.partition("=")[0] else own
        target.append(arg)
    return own, overrides


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: Arguments; by default those of the process.

    Returns:
        0 on success, 1 if the run failed, 2 if arguments or configuration are wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    own, overrides = _split_overrides(args) if args[:1] == ["plan"] else (args, [])
    parsed = build_parser().parse_args(own)  # exits with 2 by itself
    options = parsed[parsed.command]
    try:
        COMMANDS[parsed.command](options, overrides)
    except Exception as err:
        if options.debug:
            raise
        ours = _our_error(err)
        text = str(ours) if ours else f"{type(err).__name__}: {err} (--debug shows where)"
        print(f"terratorch-simpler {parsed.command}: {' '.join(text.split())}", file=sys.stderr)
        return BAD_CONFIG if isinstance(ours, _ConfigError | PlanError) else FAILED
    return 0


def _our_error(err: BaseException | None) -> SimplerError | None:
    """The error of ours behind what was raised: the parser wraps what goes wrong while it builds the model."""
    while err is not None and not isinstance(err, SimplerError):
        err = err.__cause__ or err.__context__
    return err


if __name__ == "__main__":
    sys.exit(main())
