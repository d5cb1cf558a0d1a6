"""What an exported model is and what it expects: one description for every format, and for the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from terratorch.models.backbones import prithvi_vit
from terratorch.models.backbones.terramind.model import terramind_register
from torch import Tensor, nn

from terratorch_simpler.data import band_names, batch_transform
from terratorch_simpler.errors import PlanError
from terratorch_simpler.export.trained import Trained, backbone_arguments
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import PLAN_FILE, SlimmingPlan, package_versions

DESCRIPTION_FILE = "description.json"
"""Name of the description inside of a .pt2 file."""
IMAGE = "image"
"""Name of the only input of a graph."""
LICENSES = {"ibm-nasa-geospatial/Prithvi-EO-2.0": "apache-2.0", "ibm-esa-geospatial/TerraMind-1.0": "apache-2.0"}
"""Licenses of pretrained weights, from their pages on the Hugging Face Hub; timm knows those of its own."""

Values = list[Any] | dict[str, list[Any]] | None
"""One value per band, or those of each input by name; None if unknown."""


@dataclass(frozen=True)
class ModelDescription:
    """What somebody needs who has only the exported file.

    Attributes:
        task: Class of the task that was trained.
        backbone: Name of the encoder in TerraTorch's registry.
        base_model: Repository of its pretrained weights on the Hugging Face Hub; None if there are none.
        full_num_blocks: Blocks of the intact encoder.
        kept_blocks: Kept blocks, 0-based, numbered as in the intact encoder.
        width: Kept share of the units of every attention head and MLP.
        parameters: Parameters of the encoder, ``before`` and ``after``; None where unknown.
        criterion: Criterion that chose the blocks; None if the plan was not found.
        verdict: Level of the plan's verdict and its reasons; None if the plan has none, or was not found.
        inputs: Shape of one image by the name of the input, without the batch: (C, H, W), or (C, T, H, W).
        image_size: Rows and columns in pixels.
        bands: Names of the bands, in order.
        scale: Factor that the datamodule multiplies pixels by first, or that of each input; None if unknown.
        means: Means that are subtracted then, one per band.
        stds: Standard deviations that are divided by last, one per band.
        normalized_by: Class of the datamodule that did it in training; the exported model does not. None if unknown.
        must_normalize: Whether images must be normalized before they are given to the model; None if unknown.
        class_names: Names of the classes, in order.
        license: Licence of the pretrained weights; None if unknown.
        versions: Versions of the packages that wrote the file.
    """

    task: str
    backbone: str
    base_model: str | None
    full_num_blocks: int
    kept_blocks: list[int]
    width: float
    parameters: dict[str, int | None]
    criterion: str | None
    verdict: dict[str, Any] | None
    inputs: dict[str, list[int]]
    image_size: list[int]
    bands: Values
    scale: float | dict[str, float] | None
    means: Values
    stds: Values
    normalized_by: str | None
    must_normalize: bool | None
    class_names: list[str] | None
    license: str | None
    versions: dict[str, str]

    def to_json(self) -> str:
        """All fields in one JSON object."""
        return json.dumps(asdict(self))

    def as_properties(self) -> dict[str, str]:
        """Every field as JSON by its name, since ONNX stores text only."""
        return {field.name: json.dumps(getattr(self, field.name)) for field in fields(self)}


def describe(
    trained: Trained,
    datamodule: LightningDataModule | None = None,
    plan: SlimmingPlan | None = None,
    size: int | None = None,
) -> ModelDescription:
    """Describe a trained task for who runs it without its config.

    Args:
        trained: The task, as a whole.
        datamodule: That of the fit; what only it knows is None without it.
        plan: The plan that the encoder was pruned by, if known.
        size: Rows and columns of the images in pixels; by default those of the encoder.

    Raises:
        ExportError: If the encoder does not know the shape of its input.
    """
    backbone, model_args = trained.backbone, trained.hparams["model_args"]
    arguments, _ = backbone_arguments(model_args)
    images = trained.example(size, batch=1)
    images = images if isinstance(images, dict) else {IMAGE: images}
    inputs = {name: list(image.shape[1:]) for name, image in images.items()}
    shape = backbone.input_shape
    modality = next(iter(shape)) if isinstance(shape, dict) and len(shape) == 1 else None

    def of_inputs(value: Any) -> Any:
        """What a datamodule has by modality, by the names of the inputs."""
        if not isinstance(value, Mapping):
            return value
        if IMAGE not in inputs:
            return {name: value[name] for name in inputs if name in value}
        # One image: of the only modality of the encoder, or of all bands together.
        names = [modality] if modality in value else getattr(datamodule, "image_modalities", [])
        parts: list[Any] = [value.get(name) for name in names]
        if parts and all(isinstance(part, list | tuple) for part in parts):
            return [one for part in parts for one in part]
        return parts[0] if parts and all(part == parts[0] for part in parts) else None

    transform = batch_transform(datamodule)
    means, stds = _statistics(datamodule, transform)
    bands = (datamodule and band_names(datamodule)) or arguments.get("bands") or arguments.get("model_bands")
    repository, license_ = _pretrained_weights(backbone, arguments)
    before = trained.intact_parameters if plan is None or plan.parameters is None else plan.parameters["before"]
    class_names = trained.hparams.get("class_names") or getattr(datamodule, "class_names", None)
    verdict = None if plan is None else plan.verdict
    scale = None if datamodule is None else of_inputs(getattr(datamodule, "constant_scale", None) or 1.0)
    if means is None:
        must_normalize = False if _leaves_unchanged(transform, images) else None
    else:
        must_normalize = None if scale is None else True
    return ModelDescription(
        task=trained.class_path,
        backbone=backbone.name,
        base_model=repository,
        full_num_blocks=backbone.full_num_blocks,
        kept_blocks=list(backbone.kept),
        width=backbone.width,
        parameters={"before": before, "after": backbone.num_parameters()},
        criterion=None if plan is None else str(plan.criterion["name"]),
        verdict=None if verdict is None else {"level": verdict.level, "reasons": list(verdict.reasons)},
        inputs=inputs,
        image_size=next(iter(inputs.values()))[-2:],
        bands=_plain(of_inputs(bands)),
        scale=scale if not isinstance(scale, Mapping) else {name: scale.get(name, 1.0) for name in inputs},
        means=_plain(of_inputs(means)),
        stds=_plain(of_inputs(stds)),
        normalized_by=None if datamodule is None or means is None else type(datamodule).__name__,
        must_normalize=must_normalize,
        class_names=None if class_names is None else [str(name) for name in class_names],
        license=license_,
        versions=package_versions(),
    )


def find_plan(trained: Trained, config: Mapping[str, Any], checkpoint: str | Path) -> SlimmingPlan | None:
    """The plan that an encoder was pruned by, where it lies in its usual places.

    These are ``backbone_plan``, the callback's ``plan`` and ``output_dir``, and the log folder of the checkpoint.

    Args:
        trained: The task.
        config: The config of the fit.
        checkpoint: Checkpoint of the fit.

    Returns:
        The first one that was made for this encoder and keeps the same blocks.
    """
    arguments, _ = backbone_arguments(trained.hparams["model_args"])
    callbacks = [entry for entry in (config.get("trainer") or {}).get("callbacks") or [] if isinstance(entry, Mapping)]
    settings = [entry.get("init_args") or {} for entry in callbacks]
    folders = [one["output_dir"] for one in settings if one.get("output_dir")]
    folders.append(Path(checkpoint).parent.parent / "simpler")  # <log_dir>/checkpoints/<name>.ckpt
    paths = [arguments.get("plan"), *(one.get("plan") for one in settings), *(Path(one) / PLAN_FILE for one in folders)]
    for path in paths:
        if isinstance(path, str | Path) and Path(path).is_file():
            try:
                plan = SlimmingPlan.load(path)
                plan.check_encoder(trained.backbone.name, trained.backbone.full_num_blocks)
            except PlanError:
                continue
            if plan.kept_blocks == trained.backbone.kept:
                return plan
    return None


def _statistics(datamodule: LightningDataModule | None, transform: Any) -> tuple[Any, Any]:
    """Means and standard deviations that batches are normalized with."""
    for owner in (transform, datamodule):
        if getattr(owner, "means", None) is not None:
            return owner.means, owner.stds  # type: ignore[union-attr]
    for part in transform.modules() if isinstance(transform, nn.Module) else ():  # that of kornia
        flags = getattr(part, "flags", {})
        if {"mean", "std"} <= flags.keys():
            return flags["mean"], flags["std"]
    return None, None


def _leaves_unchanged(transform: Any, images: Mapping[str, Tensor]) -> bool:
    image = images[IMAGE] if IMAGE in images else dict(images)
    try:
        return transform is not None and transform({"image": image})["image"] is image
    except Exception:  # it may need what else is in a batch
        return False


def _pretrained_weights(backbone: SimplerBackbone, arguments: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Repository on the Hugging Face Hub that the encoder's weights came from, and their license."""
    if not arguments.get("pretrained") or arguments.get("ckpt_path"):
        return None, None
    known = {**prithvi_vit.pretrained_weights, **terramind_register.pretrained_weights}
    if backbone.name in known:
        repository = known[backbone.name]["hf_hub_id"]
        return repository, next((name for start, name in LICENSES.items() if repository.startswith(start)), None)
    configs = (getattr(part, "pretrained_cfg", None) for part in backbone.modules())
    of_timm = next((config for config in configs if isinstance(config, Mapping)), {})
    return of_timm.get("hf_hub_id") or None, of_timm.get("license") or None


def _plain(value: Any) -> Any:
    """Lists, dictionaries, numbers and text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Tensor | np.ndarray):
        array = np.asarray(value)
        # TerraTorch has made float32 of what was given with fewer digits.
        return np.vectorize(lambda number: float(f"{number:.7g}"), otypes=[float])(array).tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, int | float) else str(getattr(value, "value", value))
