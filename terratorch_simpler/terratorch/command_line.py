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
from terratorch_simpler.terratorch.explain import build_error, parser_error
from terratorch_simpler.terratorch.factories import check_factory


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

    def parse_arguments(self, parser: Any, args: Any) -> None:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                super().parse_arguments(parser, args)
        except SystemExit as err:
            if not err.code:  # --print_config and the like
                raise
            options = [option.lstrip("-") for option in self._parser("fit")._option_string_actions]
            raise SettingsError(parser_error(said.getvalue().rpartition("error:")[2], options)) from err

    def before_instantiate_classes(self) -> None:
        check_factory(self.settings)
        if self.settings.trainer.logger is True or self.settings.trainer.logger is None:
            self.settings.trainer.logger = False  # nothing is trained: a log folder would hold nothing

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as err:
            raise build_error(err, self.settings) from err


class _Parsed(_Built):
    """The same with nothing built but the datamodule, which opens no files before its setup."""

    def before_instantiate_classes(self) -> None:
        check_factory(self.settings)

    def instantiate_classes(self) -> None:
        # MyLightningCLI does this on the way, for tasks and backbones of the user.
        path = self.settings.get("custom_modules_path") or os.getenv("TERRATORCH_CUSTOM_MODULE_PATH")
        cli_tools.import_custom_modules(path)
        self.datamodule = None
        if (data := self.settings.get("data")) is not None:
            with contextlib.suppress(Exception):  # export does without
                self.datamodule = self._parser("fit").instantiate_classes(Namespace(data=data)).data  # type: ignore[no-untyped-call]


def build_run(arguments: Sequence[str]) -> Any:
    """Build what ``terratorch fit`` would train.

    Args:
        arguments: What follows ``terratorch fit``: any number of ``--config``, and settings.

    Returns:
        TerraTorch's command line, with ``model``, ``datamodule`` and ``trainer``.

    Raises:
        SimplerError: If the parser refuses the arguments, or what they describe cannot be built.
    """
    with _host_class(_Built):
        return cli_tools.build_lightning_cli(["fit", *arguments])


def read_settings(arguments: Sequence[str]) -> tuple[dict[str, Any], LightningDataModule | None]:
    """Settings that ``terratorch fit`` would run with, defaults included; no data is opened and no weights are fetched.

    Args:
        arguments: What follows ``terratorch fit``.

    Returns:
        The settings, and the datamodule before its setup; None where there is none, or it cannot be built.

    Raises:
        SimplerError: If the parser refuses the arguments, or what they describe cannot be built.
    """
    with _host_class(_Parsed):
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
