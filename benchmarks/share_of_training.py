"""What the selection costs beside the fine-tuning that follows, in real runs of ``terratorch fit``.

    python -m benchmarks.share_of_training --data hls_water --epochs 10

Runs ``configs/hls_water.yaml`` on the images of a folder, with the encoder that ships and with the shape of a larger one. On
a CPU the epochs of the larger one are a few batches, scaled up; the line says so. The selection is all that happens between
the set-up of the first callback and the start of fit: streaming, statistics, votes, the plan, the page and the picture.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks import record

CONFIG = record.ROOT / "configs" / "hls_water.yaml"
ENCODER = record.ROOT / "terratorch_simpler" / "demo" / "encoder.pt"


class Case(NamedTuple):
    """One encoder.

    Attributes:
        blocks: Of the intact encoder.
        settings: Of the backbone.
        chosen: Whether training goes on with what is chosen: random weights choose nothing that tells of time.
    """

    blocks: int
    settings: dict[str, Any]
    chosen: bool


CASES = {
    "prithvi_eo_v2_tiny_tl": Case(12, {"backbone_ckpt_path": str(ENCODER)}, chosen=True),
    "prithvi_eo_v2_300_tl": Case(24, {"backbone_pretrained": False}, chosen=False),
}


class Clock(Callback):
    """Notes when the selection and the training begin and end; to be listed before SimplerCallback.

    Args:
        path: JSON file to write.
    """

    def __init__(self, path: str) -> None:
        """Nothing is timed yet."""
        self.path = Path(path)
        self.times: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """The selection is about to begin: the callback comes next."""
        self.times.setdefault("setup", time.perf_counter())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """The encoder is cut."""
        self.times["fit"] = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Training begins, once the validation that Lightning does before is over."""
        self.times.setdefault("train", time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Training and its validations are over."""
        now = time.perf_counter()
        found = {
            "selection_s": self.times["fit"] - self.times["setup"],
            "training_s": now - self.times["train"],
            "steps": trainer.global_step,
        }
        self.path.write_text(json.dumps(found))


def fit(folder: Path, data: Path, name: str, trainer: dict[str, Any], keep: int | None) -> dict[str, Any]:
    """One ``terratorch fit``; with ``keep`` the encoder is cut from the start and nothing is selected."""
    config = yaml.safe_load(CONFIG.read_text())
    init = config["data"]["init_args"]
    for key, value in init.items():
        if isinstance(value, str) and value.startswith("hls_water"):
            init[key] = str(data / Path(value).relative_to("hls_water"))
    times = folder / "times.json"
    clock = {"class_path": "benchmarks.share_of_training.Clock", "init_args": {"path": str(times)}}
    callbacks = config["trainer"]["callbacks"] if keep is None else []
    config["trainer"] |= {
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        **trainer,
    }
    config["trainer"]["callbacks"] = [clock, *callbacks]
    arguments = config["model"]["init_args"]["model_args"]
    arguments |= {"backbone": f"simpler_{name}", **CASES[name].settings}
    if keep is not None:
        arguments["backbone_keep"] = keep
    arguments["necks"][0]["indices"] = [CASES[name].blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "terratorch", "fit", "--config", str(path)]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"terratorch fit ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(times.read_text())
    said = re.search(r"Compared the blocks over .* in ([\d.]+) s;", done.stdout + done.stderr)
    if said:
        found["pass_s"] = float(said[1])
    for plan in folder.rglob("plan.json"):
        found["kept"] = len(json.loads(plan.read_text())["kept_blocks"])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Time both encoders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record.add_arguments(parser)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, water_mask and splits")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--encoders", nargs="+", choices=sorted(CASES), default=sorted(CASES, reverse=True))
    parser.add_argument("--batches", type=int, default=4, help="timed batches of the larger encoder on a CPU")
    parser.add_argument("--keep", type=int, default=5, help="blocks of the larger encoder, whose weights are random here")
    settings = parser.parse_args(arguments)
    images = len((settings.data / "splits" / "train.txt").read_text().split())
    rows = []
    for name in settings.encoders:
        case = CASES[name]
        whole = settings.device.type == "cuda" or case.chosen
        trainer = {"accelerator": "gpu" if settings.device.type == "cuda" else "cpu", "max_epochs": settings.epochs}
        if not whole:
            few = {"limit_train_batches": settings.batches, "limit_val_batches": 0, "num_sanity_val_steps": 0}
            trainer |= {"max_epochs": 1, **few}
        keeps = {"selected": None, "intact": case.blocks} | ({} if case.chosen else {"cut": settings.keep})
        found = {}
        for what, keep in keeps.items():
            with tempfile.TemporaryDirectory() as folder:
                found[what] = fit(Path(folder), settings.data.resolve(), name, trainer, keep)
            print(name, what, found[what], flush=True)
        steps = settings.epochs * (images // 8)
        per_step = {what: one["training_s"] / one["steps"] for what, one in found.items()}
        cut = per_step["selected" if case.chosen else "cut"]
        selection = found["selected"]["selection_s"]
        rows.append({
            "encoder": name,
            "tiles": images,
            "kept": found["selected"]["kept"] if case.chosen else settings.keep,
            "selection_s": selection,
            "of_that_pass_s": found["selected"]["pass_s"],
            "training_intact_s": steps * per_step["intact"],
            "training_cut_s": steps * cut,
            "share_of_intact": selection / (steps * per_step["intact"]),
            "share_of_cut": selection / (steps * cut),
            "training": "whole" if whole else f"scaled up from {settings.batches} batches",
        })  # fmt: skip
    path = record.save("share_of_training", settings, rows, arguments)
    record.show(f"selection beside {settings.epochs} epochs", rows)
    print(path)


if __name__ == "__main__":
    main()
