"""Keeps the ``backbone_width`` of a config where Lightning's command line takes a model's arguments from a checkpoint."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

COMMANDS = ("validate", "test", "predict")


def keep_config_width(lightning_cli: ModuleType) -> None:
    """Let ``validate``, ``test`` and ``predict`` run at one of several widths that a checkpoint was trained at.

    Borrowed: ``LightningCLI._parse_ckpt_path``, by which Lightning 2.6 replaces all arguments of the model in the parsed
    config by those of the fit. If it is gone, so is the reason for this.

    Args:
        lightning_cli: The module ``lightning.pytorch.cli``.
    """
    cli_class = lightning_cli.LightningCLI
    replace_arguments = getattr(cli_class, "_parse_ckpt_path", None)
    if replace_arguments is None:
        return

    @functools.wraps(replace_arguments)
    def keep_width(cli: Any) -> None:
        width = _arguments(cli).get("width")
        replace_arguments(cli)
        if width is not None:
            arguments = _arguments(cli)
            arguments.set("width", width)
            arguments.drop("plan")  # has a width of its own, and is in the checkpoint

    cli_class._parse_ckpt_path = keep_width


class _Arguments:
    """Arguments of the encoder in a parsed config, in either of the forms that TerraTorch takes; none of other encoders."""

    def __init__(self, model_args: Any) -> None:
        inner = model_args.get("backbone_kwargs")
        self._holder, self._prefix = (inner, "") if inner else (model_args, "backbone_")

    def get(self, name: str) -> Any:
        return self._holder.get(f"{self._prefix}{name}")

    def set(self, name: str, value: Any) -> None:
        self._holder[f"{self._prefix}{name}"] = value

    def drop(self, name: str) -> None:
        self._holder.pop(f"{self._prefix}{name}", None)


def _arguments(cli: Any) -> _Arguments:
    command = cli.config.get("subcommand")
    found = cli.config.get(command) if command in COMMANDS else None
    for key in ("model", "init_args", "model_args"):
        found = None if found is None else found.get(key)
    is_ours = found is not None and str(found.get("backbone")).startswith("simpler_")
    return _Arguments(found if is_ours else {})
