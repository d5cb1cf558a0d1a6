"""Writes the pages that are made from the code: the YAML reference and the base classes.

python docs/reference.py
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from docstring_parser import DocstringStyle, parse


def _words(kind: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_words, inner))
    if inner:  # lists and sequences of any kind
        return f"list[{_words(inner[0])}]"
    return {type(None): "null", Path: "path"}.get(kind, kind.__name__)


def _value(value: object) -> str:
    """A default as one would write it in YAML."""
    return "required" if value is inspect.Parameter.empty else f"`{json.dumps(value)}`"


def _markdown(text: str | None) -> str:
    """Text of a docstring in Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "")
    return text.replace("``", "`")


def _cell(text: str | None) -> str:
    return " ".join(_markdown(text).split()).replace("|", "\\|")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _described(of: Any) -> dict[str, str]:
    """What docstrings say of arguments and attributes; a class inherits what its bases say."""
    owners = reversed(of.__mro__) if isinstance(of, type) else [of]
    texts = [owner.__doc__ for owner in owners if owner.__doc__ and owner.__module__ != "builtins"]
    found = [part for text in texts for part in parse(text, DocstringStyle.GOOGLE).params]
    return {part.arg_name: part.description or "" for part in found}


def arguments(of: Any, skip: Iterable[str] = (), prefix: str = "") -> str:
    """Table of the arguments of a class or function.

    Raises:
        ValueError: If the docstring leaves one out.
    """
    kinds = typing.get_type_hints(of.__init__ if isinstance(of, type) else of)
    described = _described(of)
    rows = []
    for name, parameter in inspect.signature(of).parameters.items():
        if name in (*skip, "self") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name not in described:
            msg = f"Found argument {name} of {of.__qualname__} without a description, expected one in its docstring."
            raise ValueError(msg)
        rows.append([f"`{prefix}{name}`", _words(kinds[name]), _value(parameter.default), _cell(described[name])])
    return _table(("name", "type", "default", "meaning"), rows) if rows else "No settings.\n"


def _about(of: Any) -> str:
    """Description in a docstring, without its sections."""
    found = parse(of.__doc__ or "", DocstringStyle.GOOGLE)
    return _markdown("\n\n".join(filter(None, (found.short_description, found.long_description))))


def yaml_page() -> str:
    """Every setting that a user can write: callbacks, tiles, criteria, backbone, commands, and the keys of plan.json."""
    from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmableTraining, SlimmingPlan
    from terratorch_simpler.criteria import known_criteria
    from terratorch_simpler.terratorch.backbone_source import SimplerSource

    parts = [
        "# YAML reference",
        "Generated from the code by `python docs/reference.py`. Arguments go below `init_args` of their class; the keys "
        "of the backbone go into `model_args`.",
    ]
    for callback in (SimplerCallback, SlimmableTraining):
        name = callback.__name__
        parts += [f"## {name}", f"`class_path: terratorch_simpler.{name}`, below `callbacks`."]
        parts += [_about(callback), arguments(callback)]
    parts += [
        "## GeoTiffTiles",
        "`class_path: terratorch_simpler.GeoTiffTiles`, as `tiles` of SimplerCallback. [Tiles](tiles.md) has the details.",
        _about(GeoTiffTiles),
        arguments(GeoTiffTiles),
        "## Criteria",
        "Passed by name, or by class to change default settings. [Choosing a criterion](criteria.md) compares them.",
    ]
    for name, criterion in known_criteria().items():
        path = f"terratorch_simpler.criteria.{criterion.__name__}"
        parts += [f"### {name}", f"`criterion: {name}`, or `class_path: {path}`.", _about(criterion), arguments(criterion)]
    parts += [
        "## Backbone",
        "`backbone: simpler_<name>` is TerraTorch's encoder of that name. All other keys `backbone_*` are passed to it "
        "unchanged. On the command line, numbers and lists may be given as text.",
        arguments(SimplerSource.build, ("name",), "backbone_"),
        "## Command line",
        "`terratorch-simpler COMMAND`. `plan`, `sweep` and `export` read configs with the parser of `terratorch fit` and "
        "take the same settings, such as `--data.init_args.batch_size 4`. Exit status: 0, 1 if the run failed, 2 for bad "
        "arguments or config.",
        *_commands(),
        "## plan.json",
        "The keys `format` and `version` identify the file as well.",
        _attributes(SlimmingPlan, ("maps",)),
    ]
    return "\n\n".join(parts)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of every command."""
    from terratorch_simpler.cli import build_parser

    found = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    return dict(found.choices)


def _commands() -> list[str]:
    parts = []
    for name, parser in commands().items():
        rows = []
        for action in parser._actions:
            if action.dest == "help":
                continue
            flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.dest.upper()}`"
            kind = "flag" if action.nargs == 0 else _words(getattr(action, "_typehint", None) or action.type or str)
            if action.choices:
                kind = " or ".join(f"`{choice}`" for choice in action.choices)
            several = ", several" if action.nargs == "+" else ""
            required = action.required or action.dest in getattr(parser, "required_args", ())  # older jsonargparse
            default = "required" if required else _value(action.default)
            rows.append([flags, kind + several, default, _cell(action.help)])
        parts += [f"### {name}", parser.description or "", _table(("option", "type", "default", "meaning"), rows)]
    return parts


def _attributes(of: type, skip: Iterable[str] = ()) -> str:
    described = _described(of)
    rows = [[f"`{name}`", _cell(text)] for name, text in described.items() if name not in skip]
    return _table(("key", "meaning"), rows)


def interfaces_page() -> str:
    """Base classes and methods of criteria and encoder specs."""
    from terratorch_simpler.criteria import Criterion, Statistics
    from terratorch_simpler.encoders import EncoderSpec

    parts = [
        "# Base classes",
        "Generated from the code by `python docs/reference.py`. [Extend](extend.md) explains how to use them.",
    ]
    for base, path in ((Criterion, "criteria"), (EncoderSpec, "encoders")):
        parts += [f"## {base.__name__}", f"`terratorch_simpler.{path}.{base.__name__}`", _about(base)]
        parts += [_attributes(base), _methods(base)]
    parts += ["## Statistics", "`terratorch_simpler.criteria.Statistics`", _about(Statistics), _attributes(Statistics)]
    parts += [_methods(Statistics)]
    return "\n\n".join(parts)


def _methods(of: type) -> str:
    def rows() -> Iterable[list[str]]:
        for name, member in vars(of).items():
            held: Callable[..., Any] | None = getattr(member, "fget", None) or getattr(member, "func", None)
            call = member if inspect.isfunction(member) else None
            if name.startswith("_") or (held is None and call is None):
                continue
            needed = "yes" if getattr(member, "__isabstractmethod__", False) else ""
            taken = "" if call is None else "(" + ", ".join(list(inspect.signature(call).parameters)[1:]) + ")"
            parts = parse((held or call).__doc__ or "", DocstringStyle.GOOGLE)
            words = " ".join(filter(None, (parts.short_description, parts.long_description)))
            yield [f"`{name}{taken}`", needed, _cell(words)]

    return _table(("method or property", "required", "meaning"), rows())


MADE = {"yaml.md": yaml_page, "interfaces.md": interfaces_page}
"""Pages of docs/ that are made from docstrings, and kept in the repository for those who read them there."""

if __name__ == "__main__":
    for name, make in MADE.items():
        (Path(__file__).parent / name).write_text(make(), encoding="utf-8")
