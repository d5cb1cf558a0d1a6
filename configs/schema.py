"""Write simpler_callback.schema.json, with which editors complete and check the callback in a config.

Generated from signature and docstring of the classes: ``python configs/schema.py`` after a change to them.
"""

import inspect
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from docstring_parser import DocstringStyle, parse
from pydantic import Field, TypeAdapter, WithJsonSchema

from terratorch_simpler import GeoTiffTiles, SimplerCallback
from terratorch_simpler.criteria import known_criteria
from terratorch_simpler.plan import RECOVERIES

SCHEMA = Path(__file__).with_name("simpler_callback.schema.json")


def arguments_of(class_: type, narrower: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of the ``init_args`` of a class.

    Args:
        class_: The class, with the arguments of its constructor in its own docstring.
        narrower: Types to use in the place of annotations, by name.
    """
    docstring = parse(inspect.getdoc(class_) or "", DocstringStyle.GOOGLE)
    described = {one.arg_name: " ".join((one.description or "").replace("``", "`").split()) for one in docstring.params}
    hints = {**typing.get_type_hints(class_.__init__), **narrower}
    properties, required = {}, []
    for name, parameter in inspect.signature(class_).parameters.items():
        properties[name] = {"description": described[name], **TypeAdapter(hints[name]).json_schema()}
        if parameter.default is parameter.empty:
            required.append(name)
        else:
            properties[name]["default"] = parameter.default
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def instance_of(class_path: dict[str, Any], init_args: dict[str, Any]) -> Any:
    """What stands for an object in a config, as a type that pydantic knows the schema of."""
    properties = {"class_path": class_path, "init_args": init_args}
    required = ["class_path", *(["init_args"] if init_args.get("required") else [])]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Annotated[Any, WithJsonSchema(schema)]


def names_of(class_: type) -> dict[str, Any]:
    """What a config may call a class of this package."""
    return {"enum": [f"terratorch_simpler.{class_.__name__}", f"{class_.__module__}.{class_.__name__}", class_.__name__]}


COUNT = Annotated[int, Field(ge=1)]
NARROWER = {
    "tiles": instance_of(names_of(GeoTiffTiles), arguments_of(GeoTiffTiles, {})) | None,
    "criterion": Literal[tuple(known_criteria())] | instance_of({"type": "string"}, {"type": "object"}),
    "width": Annotated[float, Field(gt=0, le=1)],
    "recovery": Literal[RECOVERIES],
    "recovery_target": Literal["last", "best"] | COUNT,
    "recovery_steps": COUNT,
    "min_tiles": COUNT,
    "max_tiles": COUNT,
}
"""Arguments that the callback takes less for than their annotations say."""


def build_schema() -> dict[str, Any]:
    """Schema of a TerraTorch config, which says something of SimplerCallback only."""
    condition = {"properties": {"class_path": names_of(SimplerCallback)}, "required": ["class_path"]}
    consequence = {"properties": {"init_args": {"$ref": "#/definitions/SimplerCallback"}}}
    callbacks = {"items": {"if": condition, "then": consequence}}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A TerraTorch config with SimplerCallback",
        "type": "object",
        "properties": {"trainer": {"properties": {"callbacks": callbacks}}},
        "definitions": {"SimplerCallback": arguments_of(SimplerCallback, NARROWER)},
    }


def as_text() -> str:
    """The content of the file."""
    return json.dumps(build_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(as_text(), encoding="utf-8")
