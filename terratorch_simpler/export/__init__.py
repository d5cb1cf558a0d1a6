"""A pruned model without this package: a plain TerraTorch config and checkpoint, ONNX, or a PyTorch program."""

from terratorch_simpler.export.card import may_write_card, write_card
from terratorch_simpler.export.description import ModelDescription, describe, find_plan
from terratorch_simpler.export.graph import GRAPH_FORMATS, export_graph
from terratorch_simpler.export.plain import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    check_export_option,
    check_expressible,
    export_plain,
)
from terratorch_simpler.export.trained import Trained, load_trained

__all__ = [
    "CHECKPOINT_FILE",
    "CONFIG_FILE",
    "GRAPH_FORMATS",
    "ModelDescription",
    "Trained",
    "check_export_option",
    "check_expressible",
    "describe",
    "export_graph",
    "export_plain",
    "find_plan",
    "load_trained",
    "may_write_card",
    "write_card",
]
