"""The rows of the paper's tables, and the TerraTorch config of each run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
OURS = "terratorch_simpler.SimplerCallback"
PATHS = ("_root", "_split", "_path")
"""Ends of the names of settings that are paths below the root of the data."""

BEST, LAST, SCORES = "best", "last", "scores.json"


@dataclass(frozen=True)
class Experiment:
    """One row of the paper's tables.

    Attributes:
        dataset: Name of the data, as in the table.
        encoder: Name of the encoder, as in the table.
        configs: YAML files; each later one changes settings of those before.
        metric: Name of the metric in the table.
        key: The same metric in the logs, after ``test/`` or ``val/``.
        full: Published score at full depth, in percent; None if it is not known here.
        simpler: Published score at the depth that SIMPLER chose, in percent.
        depth: Number of blocks that SIMPLER kept in the paper.
        parameters: Published size of the model at that depth, in millions.
    """

    dataset: str
    encoder: str
    configs: tuple[Path, ...]
    metric: str
    key: str
    full: float | None = None
    simpler: float | None = None
    depth: int | None = None
    parameters: float | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Full depth, SIMPLER's depth, and the paper's where it is known."""
        return ("full", "simpler") if self.depth is None else ("full", "simpler", "fixed")


EXPERIMENTS = {
    "mados": Experiment(
        "MADOS",
        "Prithvi-EO-2.0-300M",
        (CONFIGS / "mados.yaml",),
        "mIoU",
        "mIoU",
        full=66.9,
        simpler=62.8,
        depth=5,
        parameters=64.57,
    ),
    "bigearthnet": Experiment(
        "BigEarthNet v2",
        "Prithvi-EO-2.0-300M",
        (CONFIGS / "bigearthnet.yaml", HERE / "bigearthnet_v2.yaml"),
        "mAP (macro)",
        "mAP",
        full=73.4,
        simpler=71.2,
    ),
    "sen4map": Experiment(
        "Sen4Map",
        "Prithvi-EO-2.0-300M",
        (CONFIGS / "sen4map.yaml", HERE / "sen4map.yaml"),
        "macro F1",
        "F1_Score",
        full=66.6,
        simpler=63.8,
    ),
    "cifar100": Experiment("CIFAR-100", "ViT-MAE", (CONFIGS / "vit_mae_cifar100.yaml",), "accuracy", "Accuracy_Micro"),
    "terramind_mados": Experiment(
        "MADOS",
        "TerraMind",
        (CONFIGS / "mados.yaml", HERE / "terramind_mados.yaml"),
        "mIoU",
        "mIoU",
        full=69.6,
        simpler=62.2,
    ),
}


def compose(experiment: Experiment, variant: str, seed: int, data_root: Path, folder: Path, plans: Path) -> dict[str, Any]:
    """The config of one run.

    Args:
        experiment: The row of the table.
        variant: "full", "simpler" or "fixed".
        seed: Seed of the run.
        data_root: Folder that holds the folders of configs/README.md.
        folder: For everything the run writes.
        plans: For the plans that seeds share.

    Returns:
        What ``terratorch fit --config`` and ``terratorch test --config`` take.
    """
    config: dict[str, Any] = {}
    for path in experiment.configs:
        config = merged(config, yaml.safe_load(path.read_text(encoding="utf-8")))
    config["seed_everything"] = seed
    data = config["data"]["init_args"]
    for key, value in data.items():
        if isinstance(value, str) and key.endswith(PATHS):
            data[key] = str(data_root / value)
    if variant == "fixed":
        config["model"]["init_args"]["model_args"]["backbone_keep"] = experiment.depth
    trainer = config["trainer"]
    trainer["default_root_dir"] = str(folder)
    chooses = {"output_dir": str(folder / "simpler"), "plan_cache": str(plans)}
    given = [
        merged(entry, {"init_args": chooses}) if entry["class_path"] == OURS else entry for entry in trainer["callbacks"]
    ]
    trainer["callbacks"] = [
        *(entry for entry in given if entry["class_path"] != OURS or variant == "simpler"),
        # What is tested, by the score on the validation split; and what a run that was killed goes on from.
        checkpoints(folder, filename=BEST, monitor=f"val/{experiment.key}", mode="max", save_weights_only=True),
        checkpoints(folder, filename=LAST),
        {"class_path": "benchmarks.reproduction.scores.WriteScores", "init_args": {"path": str(folder / SCORES)}},
    ]
    return config


def checkpoints(folder: Path, **settings: object) -> dict[str, Any]:
    """Entry of a callback that keeps one file, written again and again under the same name."""
    always = {"dirpath": str(folder / "checkpoints"), "enable_version_counter": False}
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {**always, **settings}}


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with some of them changed; lists are replaced as a whole."""
    result = copy.deepcopy(dict(settings))
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result
