"""The model card beside an export: a README.md in the form of the Hugging Face Hub."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.export.description import ModelDescription
from terratorch_simpler.export.graph import GRAPH_FORMATS
from terratorch_simpler.export.plain import CONFIG_FILE
from terratorch_simpler.files import atomic_write, below, read_text

CARD_FILE = "README.md"
MARKER = "<!-- Written by terratorch-simpler, which replaces it on every export; remove this line to keep your changes. -->"
LIBRARIES = {"plain": "terratorch", "onnx": "onnx", "pt2": "pytorch"}
PIPELINES = {
    "SemanticSegmentationTask": "image-segmentation",
    "ClassificationTask": "image-classification",
    "MultiLabelClassificationTask": "image-classification",
    "ObjectDetectionTask": "object-detection",
}
"""Names that the Hub has for what a task does."""
NORMALIZATION = """\
for name, image in images.items():
    values = [about[key][name] if isinstance(about[key], dict) else about[key] for key in ("scale", "means", "stds")]
    scale, means, stds = (np.reshape(one, np.shape(one) + (1,) * (image.ndim - 1 - np.ndim(one))) for one in values)
    images[name] = (image * scale - means) / stds
"""


def may_write_card(folder: str | Path) -> bool:
    """Whether a folder has no README.md but one that :func:`write_card` has written; warns otherwise.

    Args:
        folder: A folder, or its URL.
    """
    present = read_text(below(folder, CARD_FILE))
    if present is None or MARKER in present:
        return True
    msg = (
        f"Found a {CARD_FILE} in {folder} that terratorch-simpler has not written, expected none: it is kept and no model "
        "card is written; move it away and export again for one."
    )
    warnings.warn(msg, SimplerWarning, stacklevel=2)
    return False


def write_card(description: ModelDescription, folder: str | Path, formats: Collection[str]) -> Path:
    """Write the model card of what one export has written to a folder; one that is there is replaced.

    Args:
        description: What was exported.
        folder: Where it was written to.
        formats: In which formats: "plain", "onnx", "pt2".

    Returns:
        The file.
    """
    config = Path(folder) / CONFIG_FILE
    has_data = "plain" in formats and bool(yaml.safe_load(config.read_text(encoding="utf-8")).get("data"))
    environment = Environment(
        loader=PackageLoader("terratorch_simpler", "export"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template("card.md.j2").render(
        about=description,
        marker=MARKER,
        title=f"{description.backbone}, {len(description.kept_blocks)} of {description.full_num_blocks} blocks",
        front_matter=yaml.safe_dump(_front_matter(description, formats), sort_keys=False),
        formats=formats,
        graphs=GRAPH_FORMATS.keys() & set(formats),
        has_data=has_data,
        normalization=NORMALIZATION if description.must_normalize else "",
        count=lambda number: "unknown" if number is None else f"{number:,}",
        listed=_listed,
    )
    with atomic_write(Path(folder) / CARD_FILE) as part:
        part.write_text(text, encoding="utf-8")
    return Path(folder) / CARD_FILE


def _front_matter(description: ModelDescription, formats: Collection[str]) -> dict[str, Any]:
    pipeline = PIPELINES.get(description.task.rpartition(".")[2])
    of_base = {"base_model": description.base_model, "base_model_relation": "finetune"} if description.base_model else {}
    return {
        "library_name": next(name for format_, name in LIBRARIES.items() if format_ in formats),
        "tags": ["terratorch", "terratorch-simpler", "earth-observation", "pruned", *sorted(set(formats) - {"plain"})],
        **({"license": description.license} if description.license else {}),
        **({"pipeline_tag": pipeline} if pipeline else {}),
        **of_base,
    }


def _listed(values: Any) -> str:
    """Values in a cell of a table."""
    if isinstance(values, dict):
        return "; ".join(f"{name}: {_listed(part)}" for name, part in values.items())
    if isinstance(values, list):
        return ", ".join(map(_listed, values))
    return "unknown" if values is None else str(values).replace("|", "\\|")
