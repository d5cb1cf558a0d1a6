"""The width that a config asks for, which Lightning's command line takes from the checkpoint instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from terratorch_simpler.lightning.internals import running_cli

ON_COMMAND_LINE = re.compile(r"--model(?:\.init_args)?\.model_args\.(?:backbone_|backbone_kwargs\.)width[= ](\S+)")


def width_of_config() -> Any:
    """``backbone_width`` as the config or the arguments of a running ``validate``, ``test`` or ``predict`` give it, or None.

    With ``--ckpt_path`` Lightning 2.6 replaces all arguments of the model by those of the fit, so the width to take out of a
    checkpoint of several has to be read from where it was given.
    """
    cli = running_cli()
    command = None if cli is None else cli.config.get("subcommand")
    if command not in ("validate", "test", "predict") or not cli.config[command].get("ckpt_path"):
        return None
    found = None
    for file in cli.config[command].get("config") or ():
        content = yaml.safe_load(Path(str(file)).read_text(encoding="utf-8"))
        asked = _width(content)
        found = found if asked is None else asked
    given = ON_COMMAND_LINE.findall(" ".join(sys.argv[1:]))
    return yaml.safe_load(given[-1]) if given else found


def _width(config: Any) -> Any:
    for key in ("model", "init_args", "model_args"):
        config = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping):
        return None
    inner = config.get("backbone_kwargs")
    return inner.get("width") if isinstance(inner, Mapping) and inner else config.get("backbone_width")
