"""Settings of a run as ``terratorch fit`` reads them: by TerraTorch's own parser, with nothing run."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from terratorch import cli_tools

from terratorch_simpler.errors import SettingsError
from terratorch_simpler.terratorch.factories import check_factory

LONGEST = 400
"""Characters of an error of TerraTorch's parser, which repeats the whole config."""


class _Built(cli_tools.MyLightningCLI):  # type: ignore[misc]
    """TerraTorch's command line with task, datamodule and trainer built, and no config saved.

    ``ckpt_path`` is an argument of the run itself. Lightning would take the task's settings from that checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_config_callback": None})

    @property
    def settings(self) -> Any:
        """Those of the subcommand."""
        return self.config[self.config.subcommand]

    def _parse_ckpt_path(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        check_factory(self.settings)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class _Parsed(_Built):
    """The same with nothing built but the datamodule, which opens no files before its setup."""

    def instantiate_classes(self) -> None:
        # MyLightningCLI does this on the way, for tasks and backbones of the user.
        path = self.settings.get("custom_modules_path") or os.getenv("TERRATORCH_CUSTOM_MODULE_PATH")
        cli_tools.import_custom_modules(path)
        self.datamodule = None
        if (data := self.settings.get("data")) is not None:
            with contextlib.suppress(Exception):  # export does without
                self.datamodule = self._parser("fit").instantiate_classes(Namespace(data=data)).data  # type: ignore[no-untyped-call]


def build_run(arguments: Sequence[str], *, debug: bool = False) -> Any:
    """Build what ``terratorch fit`` would train.

    Args:
        arguments: What follows ``terratorch fit``: any number of ``--config``, and settings.
        debug: Let the parser print its usage as well.

    Returns:
        TerraTorch's command line, with ``model``, ``datamodule`` and ``trainer``.

    Raises:
        SettingsError: If the parser refuses the arguments, or the model factory takes no ``simpler_`` names.
    """
    with _host_class(_Built), _sentence(arguments, debug):
        return cli_tools.build_lightning_cli(["fit", *arguments])


def read_settings(arguments: Sequence[str], *, debug: bool = False) -> tuple[dict[str, Any], LightningDataModule | None]:
    """Settings that ``terratorch fit`` would run with, defaults included; no data is opened and no weights are fetched.

    Args:
        arguments: What follows ``terratorch fit``.
        debug: Let the parser print its usage as well.

    Returns:
        The settings, and the datamodule before its setup; None where there is none, or it cannot be built.

    Raises:
        SettingsError: If the parser refuses the arguments, or the model factory takes no ``simpler_`` names.
    """
    with _host_class(_Parsed), _sentence(arguments, debug):
        cli: Any = cli_tools.build_lightning_cli(["fit", *arguments])
        return dump(cli._parser("fit"), cli.settings), cli.datamodule


def dump(parser: Any, settings: Any) -> dict[str, Any]:
    """Settings as plain values.

    Args:
        parser: The parser they were read by.
        settings: What it has read.
    """
    return yaml.safe_load(parser.dump(settings, skip_none=False))  # type: ignore[no-any-return]


@contextlib.contextmanager
def _host_class(used: type[cli_tools.MyLightningCLI]) -> Iterator[None]:
    """Have ``build_lightning_cli``, which knows TerraTorch's defaults, make another class of command line."""
    with mock.patch.object(cli_tools, "MyLightningCLI", used), mock.patch.object(sys, "argv", ["terratorch"]):
        yield


@contextlib.contextmanager
def _sentence(arguments: Sequence[str], debug: bool) -> Iterator[None]:
    """Turn what the parser prints before it exits into an error."""
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if debug else contextlib.redirect_stderr(said):
            yield
    except SystemExit as err:
        if not err.code:  # --print_config and the like
            raise
        reason = " ".join(said.getvalue().rpartition("error:")[2].split())
        msg = f"TerraTorch cannot read {' '.join(arguments)}: {reason[:LONGEST]}"
        raise SettingsError(msg) from err
