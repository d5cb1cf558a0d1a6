"""What TerraTorch and its parser refuse, in one sentence: the first real cause, and what to do.

The parser repeats the whole config and every type that a value could have had; what is wrong is a few words in between.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

from terratorch.registry import BACKBONE_REGISTRY, DECODER_REGISTRY, MODEL_FACTORY_REGISTRY, NECK_REGISTRY
from torch.utils._pytree import tree_leaves

from terratorch_simpler.errors import SettingsError, SimplerError, causes, did_you_mean

LONGEST = 400
"""Characters of an error that is not known here."""
CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)': (?P<cause>.*)")
UNKNOWN_CLASS = re.compile(r"module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'")
UNKNOWN_OPTION = re.compile(r"(?:does not accept option '(?P<key>[^']+)'|unrecognized arguments: --(?P<flag>[^\s=]+))")
REQUIRED = re.compile(r"the following arguments are required: (?P<names>.*)")
REFUSED_ARGUMENT = re.compile(r"Option '(?P<name>[^']+)' is not accepted")
WRONG_VALUE = re.compile(r"Parser key \"(?P<key>[^\"]+)\": Expected an? (?P<type>.+?)\. Got value: (?P<value>.*)")
END = re.compile(r" - (?:Not a valid subclass|Expected a)| Given value(?: type)?:|$")
UNION = re.compile(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ")
TYPES = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
UNEXPECTED = re.compile(r"(?P<owner>\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(?P<name>\w+)'")
MISSING = re.compile(r"(?P<owner>\w+)(?:\.__init__)?\(\) missing \d+ required .*?arguments?: (?P<names>.*)")
UNKNOWN_MODEL = re.compile(r"[Mm]odel (?P<name>\S+) (?:not found in any|could not be instantiated|isn't in the register)")
SIZES = re.compile(r"size of tensor a \((?P<bands>\d+)\) must match the size of tensor b \((?P<other>\d+)\)")
UNUSED = re.compile(r"arguments (?P<names>\{.*\}) were passed but not used")
REGISTRIES = {
    "backbone": BACKBONE_REGISTRY,
    "decoder": DECODER_REGISTRY,
    "model_factory": MODEL_FACTORY_REGISTRY,
    "necks": NECK_REGISTRY,
}
"""Where TerraTorch looks up the name that a setting holds."""


# --- what the parser says


def parser_error(message: str, options: Iterable[str]) -> str:
    """A message of TerraTorch's parser as one sentence.

    Args:
        message: What it has printed after "error:".
        options: Options that it takes, such as ``trainer.max_epochs``.
    """
    text = " ".join(message.split())
    if (option := UNKNOWN_OPTION.search(text)) is not None:
        return _unknown_option(option["key"] or option["flag"], options)
    classes = list(CLASS.finditer(text))
    while classes and (inner := CLASS.search(classes[-1]["cause"])) is not None:  # the class of an argument of a class
        classes.append(inner)
    if classes:
        return _refused_class(classes[-1]["path"], _first(classes[-1]["cause"]))
    if (required := REQUIRED.search(text)) is not None:
        return f"The config lacks the setting {required['names'].replace('fit.', '')}: add it."
    if (value := WRONG_VALUE.search(text)) is not None:
        return f"The config sets {value['key']} to {_shown(value['value'])}, expected {_expected(value['type'])}: change it."
    return f"TerraTorch's parser refuses the settings: {_first(UNION.sub('', text))[:LONGEST]}"


def _unknown_option(option: str, options: Iterable[str]) -> str:
    known = list(options)
    groups = {name.partition(".")[0] for name in known}
    group = option.partition(".")[0]
    meant = did_you_mean(option, known) if group in groups else did_you_mean(group, groups)
    named = option if group in groups else group
    return f"Neither this command nor terratorch fit has a setting '{named}'{meant}: change or remove it."


def _refused_class(path: str, cause: str) -> str:
    """Why a class of the config cannot be built."""
    name = path.rpartition(".")[2]
    if (refused := REFUSED_ARGUMENT.search(cause)) is not None:
        argument = refused["name"].removeprefix("init_args.")
        return f"{name} takes no argument '{argument}'{did_you_mean(argument, _parameters(_class(path)))}: change it."
    if (value := WRONG_VALUE.search(cause)) is not None:
        found, expected = _shown(_first(value["value"])), _expected(value["type"])
        return f"{name} got {found} for {value['key']}, expected {expected}: change it."
    if (unknown := UNKNOWN_CLASS.search(cause)) is not None:
        module = importlib.import_module(unknown["module"])
        meant = did_you_mean(unknown["name"], {*dir(module), *getattr(module, "__all__", ())})
        return f"{unknown['module']} has no class '{unknown['name']}'{meant}: change class_path."
    return f"The class '{path}' cannot be used: {cause[:LONGEST]}"


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parameters(of: Any) -> list[str]:
    """Arguments of a class and, where it passes others on, of its bases."""
    owners = of.__mro__ if inspect.isclass(of) else [of]
    found = [inspect.signature(owner).parameters for owner in owners if owner is not object]
    return [name for parameters in found for name in parameters if name not in ("self", "args", "kwargs")]


def _first(text: str) -> str:
    """What a message says before it lists the other types that the value is none of."""
    end = END.search(text)
    return text[: end.start() if end else None].strip()


def _expected(kind: str) -> str:
    if (choices := re.match(r"typing\.Literal\[(.*)\]", kind)) is not None:
        return f"one of {choices[1]}"
    return TYPES.get(kind, kind)


def _shown(value: str) -> str:
    return f"'{value}'" if len(value) < 80 else f"'{value[:79]}…'"


# --- what fails while the model is built


def build_error(err: Exception, settings: Mapping[str, Any]) -> SimplerError:
    """The error of ours for what was raised while task, datamodule and trainer were built.

    Args:
        err: What was raised; the parser wraps it.
        settings: Those of the run, as the parser has read them.
    """
    chain = list(causes(err))
    ours = next((cause for cause in chain if isinstance(cause, SimplerError)), None)
    if ours is not None:
        return ours
    for cause in chain:
        if (said := _model_error(cause, settings)) is not None:
            return SettingsError(said)
    text = _first(UNION.sub("", " ".join(str(err).split())))
    return SettingsError(f"TerraTorch cannot build what the config describes: {text[:LONGEST]} (--debug shows where).")


def run_error(err: BaseException) -> SimplerError | None:
    """The error of ours for what was raised while tiles were read; None for what is not known here."""
    for cause in causes(err):
        if isinstance(cause, RuntimeError) and (sizes := SIZES.search(str(cause))) is not None:
            for frame in _frames(cause):
                means = getattr(frame.f_locals.get("self"), "means", None)
                if means is not None and len(means) == int(sizes["other"]):
                    return SettingsError(
                        f"The datamodule's means has {len(means)} values for tiles with {sizes['bands']} bands, expected a "
                        "mean and a standard deviation for each band: change means and stds, or output_bands."
                    )
    return None


def _model_error(err: BaseException, settings: Mapping[str, Any]) -> str | None:
    arguments = (settings.get("model") or {}).get("init_args") or {}
    model_args = arguments.get("model_args") or {}
    text = str(err)
    if isinstance(err, IndexError):
        return _index_error(err)
    if isinstance(err, KeyError) and err.args:
        return _unknown_band(err, model_args)
    if isinstance(err, TypeError) and (missing := MISSING.search(text)) is not None:
        part = next((f"{key}_" for key in ("backbone", "decoder") if missing["owner"] in str(model_args.get(key))), "")
        names = " and ".join(part + name for name in re.findall(r"'(\w+)'", missing["names"]))
        return f"{missing['owner']} needs {names}: add it to model_args."
    if isinstance(err, TypeError) and (unexpected := UNEXPECTED.search(text)) is not None:
        return _unexpected_argument(unexpected["owner"], unexpected["name"], model_args)
    if (unknown := UNKNOWN_MODEL.search(text)) is not None:
        return _unknown_name(unknown["name"].strip("'"), {**arguments, **model_args})
    if (unused := UNUSED.search(text)) is not None:
        names = ", ".join(re.findall(r"'(\w+)':", unused["names"]))
        return (
            f"No part of the model takes {names} of model_args: write it with the prefix of a part (backbone_, decoder_) or "
            "remove it."
        )
    return None


def _index_error(err: BaseException) -> str | None:
    """Indices of a neck that the encoder has no output for."""
    for frame in _frames(err):
        neck, channels = frame.f_locals.get("self"), frame.f_locals.get("channel_list")
        indices = getattr(neck, "indices", None)
        if isinstance(channels, list) and indices is not None:
            return (
                f"The neck {type(neck).__name__} takes the outputs {indices}, expected indices from 0 to "
                f"{len(channels) - 1}, since the encoder gives {len(channels)}, one for each block: change indices."
            )
    return None


def _unknown_band(err: KeyError, model_args: Mapping[str, Any]) -> str | None:
    """A name in ``backbone_bands`` that the table of an encoder does not hold."""
    band = err.args[0]
    given = [name for key, bands in model_args.items() if "bands" in key for name in tree_leaves(bands)]
    if band not in given:
        return None
    for frame in _frames(err):
        for table in (*frame.f_locals.values(), *frame.f_globals.values()):
            # The table that was looked up knows at least one of the others.
            if isinstance(table, Mapping) and band not in table and any(name in table for name in given):
                meant = did_you_mean(str(band), map(str, table))
                known = ", ".join(map(str, table))
                return f"The encoder knows no band '{band}'{meant}, expected some of {known}: change the bands."
    return None


def _unexpected_argument(owner: str, name: str, model_args: Mapping[str, Any]) -> str:
    key = next((key for key in model_args if key.endswith(f"_{name}")), name)
    part = key.removesuffix(f"_{name}")
    known = str(model_args.get(part))
    taken = _parameters(REGISTRIES[part].find_class(known)) if part in REGISTRIES and known in REGISTRIES[part] else []
    meant = did_you_mean(key, [f"{part}_{parameter}" for parameter in taken])
    return f"{owner} takes no argument '{name}'{meant}: change {key} in model_args."


def _unknown_name(name: str, arguments: Mapping[str, Any]) -> str:
    setting = next((key for key in REGISTRIES if name in str(arguments.get(key))), None)
    if setting is None:
        return f"TerraTorch knows nothing named '{name}': change it in model_args."
    registry = REGISTRIES[setting]
    names = set(registry) | {known.partition("_")[2] for known in registry}
    what = "neck" if setting == "necks" else setting
    return f"TerraTorch knows no {what} '{name}'{did_you_mean(name, names)}: change {setting}."


def _frames(err: BaseException) -> Iterator[FrameType]:
    trace = err.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next
