"""The pruned model as a graph that needs neither TerraTorch nor this package: ONNX, or a PyTorch program (.pt2)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from terratorch_simpler.errors import ExportError, SimplerWarning
from terratorch_simpler.export.description import DESCRIPTION_FILE, ModelDescription, describe
from terratorch_simpler.export.outputs import difference, find_comparison, flipped, outputs_of
from terratorch_simpler.export.trained import Trained
from terratorch_simpler.files import atomic_write
from terratorch_simpler.functional.hsic import full_float32

GRAPH_FORMATS = {"onnx": "model.onnx", "pt2": "model.pt2"}
ALLOWED = 1e-4
"""Largest difference of an output as a share of its largest value: other kernels round otherwise."""


class _Answer(nn.Module):
    """A task as a function of images alone, or of modalities in order, with tensors as the output."""

    def __init__(self, trained: Trained, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = trained.task.model
        self._names = names

    def forward(self, *images: Tensor) -> Tensor:
        inputs: Any = dict(zip(self._names, images, strict=True)) if self._names else images[0]
        return self.model(inputs).output  # type: ignore[no-any-return, operator]


def export_graph(
    trained: Trained,
    format_: str,
    folder: str | Path,
    size: int | None = None,
    description: ModelDescription | None = None,
) -> tuple[Path, float]:
    """Write the whole model, encoder to head, as a graph.

    Args:
        trained: The trained task; it is not changed.
        format_: "onnx" or "pt2".
        folder: Where to write ``model.onnx`` or ``model.pt2``.
        size: Rows and columns of the images in pixels; by default those of the encoder. Other sizes cannot be run. Where it
            is no multiple of twice the patch TerraTorch pads, and the graph takes one image at a time.
        description: What the file says of itself: every field by name in the metadata of ONNX, ``description.json`` in the
            extra files of pt2. By default what is known from the task alone.

    Returns:
        The file, and the largest difference of an output, as a share of the largest value.

    Raises:
        ComparisonError: If the outputs of the trained model are alike for all images, so that comparing them says nothing.
        ExportError: If the model cannot be traced, or the outputs of the graph differ.
    """
    count = len(outputs_of(lambda images: trained.task(images).output, trained.example(size)))
    if count != 1:
        msg = (
            f"Found {count} tensors in the output of {trained.class_path}, expected one: a task whose output "
            "changes its shape with the image (object detection) cannot be written as a graph; export it as plain."
        )
        raise ExportError(msg)
    comparison = find_comparison(
        lambda images: trained.task(images).output, lambda scale: trained.example(size, scale=scale)
    )
    names = tuple(comparison.images) if isinstance(comparison.images, dict) else ()
    images = _ordered(comparison.images)
    model = _Answer(trained, names).eval()
    description = description or describe(trained, size=size)
    path = Path(folder) / GRAPH_FORMATS[format_]
    try:
        # Other images than those to compare on, which a graph may hold as constants.
        program, at_once = _trace(model, _ordered(flipped(comparison.images)))
        with atomic_write(path) as part:
            write = _write_onnx if format_ == "onnx" else _write_pt2
            run = write(program, description, part)
            batches = zip(*(image.split(at_once) for image in images), strict=True)
            gap = difference([torch.cat([run(batch) for batch in batches])], comparison.expected)
            allowed = comparison.tolerance(ALLOWED)
            if not gap <= allowed:
                msg = (
                    f"Found outputs of the {format_} graph that differ by {gap:.2g} of the largest value, expected at most "
                    f"{allowed:g}: it is not written; please report the config."
                )
                raise ExportError(msg)
    except ExportError:
        raise
    except Exception as err:  # tracing fails in many ways, each with a long report
        reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(err)).split())[:300]
        msg = (
            f"Found a model that PyTorch cannot trace to {format_} ({type(err).__name__}: {reason}), expected one without "
            "branches on pixel values: export it as plain, or choose another decoder."
        )
        raise ExportError(msg) from err
    return path, gap


def _ordered(images: Any) -> tuple[Tensor, ...]:
    return tuple(images.values()) if isinstance(images, dict) else (images,)


def _trace(model: nn.Module, images: tuple[Tensor, ...]) -> tuple[torch.export.ExportedProgram, int]:
    """With any number of images, or with one where TerraTorch pads each by itself; and how many to run at once."""
    batch = torch.export.Dim("batch", min=1)
    dynamic = (tuple({0: batch} for _ in images),)  # one entry for the variadic argument
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return torch.export.export(model, images, dynamic_shapes=dynamic, strict=False), len(images[0])
        except Exception:  # a fixed batch is the next best thing
            images = tuple(image[:1] for image in images)
            program = torch.export.export(model, images, strict=False)
    msg = (
        f"Found a graph that PyTorch {torch.__version__} ties to one image (TerraTorch pads each by itself, or PyTorch is "
        "old), expected any number: the graph takes one image at a time."
    )
    warnings.warn(msg, SimplerWarning, stacklevel=3)
    return program, 1


def _write_pt2(
    program: torch.export.ExportedProgram, description: ModelDescription, path: Path
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    torch.export.save(program, path, extra_files={DESCRIPTION_FILE: description.to_json()})
    module = torch.export.load(path).module()

    def run(images: tuple[Tensor, ...]) -> Tensor:
        with torch.no_grad(), full_float32():
            return module(*images)  # type: ignore[no-any-return]

    return run


def _write_onnx(
    program: torch.export.ExportedProgram, description: ModelDescription, path: Path
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as err:
        msg = f"There is no package {err.name}, expected it for ONNX: install terratorch-simpler[onnx]."
        raise ExportError(msg) from err
    inputs = list(description.inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx = torch.onnx.export(program, (), input_names=inputs, output_names=["output"], dynamo=True, verbose=False)
    assert onnx is not None
    onnx.model.metadata_props.update(description.as_properties())
    onnx.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: tuple[Tensor, ...]) -> Tensor:
        feeds = {node.name: image.numpy() for node, image in zip(session.get_inputs(), images, strict=True)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run
