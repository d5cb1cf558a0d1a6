"""The demo: select, fit, test and predict on generated scenes with TerraTorch's own commands, offline, on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from rich.console import Console

from terratorch_simpler.demo.scenes import write_scenes
from terratorch_simpler.errors import SimplerError

HERE = Path(__file__).parent
ENCODER = HERE / "encoder.pt"
CONFIG = HERE / "demo.yaml"
SPLITS = {"train": 288, "val": 32, "test": 32}


class DemoError(SimplerError, RuntimeError):
    """A step of the demo failed."""


def run(folder: Path, official_weights: bool = False) -> None:
    """Generate scenes, then run ``terratorch fit``, ``test`` and ``predict`` on them.

    Args:
        folder: Output folder; existing scenes in it are reused.
        official_weights: Use Prithvi-EO-2.0-tiny-TL from the Hugging Face Hub instead of the encoder in this package.

    Raises:
        DemoError: If one of the commands fails.
    """
    folder = folder.resolve()
    console = Console()
    scenes = folder / "scenes"
    if not all((scenes / "splits" / f"{split}.txt").is_file() for split in SPLITS):
        console.print(f"Generating {sum(SPLITS.values())} scenes in {scenes}", soft_wrap=True)
        write_scenes(scenes, SPLITS)
    config = write_config(folder, scenes, None if official_weights else ENCODER)
    _terratorch(folder, "fit", "--config", config)
    logs = max((folder / "lightning_logs").glob("version_*"), key=os.path.getmtime)
    checkpoint = next((logs / "checkpoints").glob("*_state_dict.ckpt"))
    _terratorch(folder, "test", "--config", config, "--ckpt_path", checkpoint, "--trainer.logger", "false")
    predictions = folder / "predictions"
    # TerraTorch's deployment file sets 16-mixed, bfloat16 on a CPU, where PyTorch's convolution can be wrong (README).
    deploy = ("--config", logs / "config_deploy.yaml", "--ckpt_path", checkpoint, "--trainer.precision", "32-true")
    _terratorch(folder, "predict", *deploy, "--predict_output_dir", predictions)
    report = f"""
The config:      {config}
The plan:        {logs / "simpler" / "plan.json"}
The report:      {logs / "simpler" / "report.html"}
The checkpoint:  {checkpoint}
The predictions: {predictions}, {len(list(predictions.glob("*.tif")))} GeoTIFF files"""
    console.print(report, soft_wrap=True)  # paths stay whole, to be copied


def write_config(folder: Path, scenes: Path, encoder: Path | None) -> Path:
    """Write the demo's config with its paths filled in.

    Args:
        folder: Folder of the config and the logs.
        scenes: Folder of scenes.
        encoder: Pretrained weights, or None for those of the Hub.

    Returns:
        Path of the config for ``terratorch fit``.
    """
    config = yaml.safe_load(CONFIG.read_text())
    data, model = config["data"]["init_args"], config["model"]["init_args"]["model_args"]
    for key, value in data.items():
        if isinstance(value, str) and value.startswith("scenes/"):
            data[key] = str(scenes / value.removeprefix("scenes/"))
    config["trainer"]["default_root_dir"] = str(folder)
    model.pop("backbone_ckpt_path")
    if encoder is not None:
        model["backbone_ckpt_path"] = str(encoder)
    path = folder / "demo.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _terratorch(folder: Path, *args: str | Path) -> None:
    """Run a TerraTorch command in ``folder``, where it saves a copy of its config if it has no log folder."""
    command = [sys.executable, "-m", "terratorch", *map(str, args)]
    print("\n$ terratorch", *command[3:], flush=True)
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False)
    if done.returncode:
        msg = f"terratorch {args[0]} ended with status {done.returncode}, expected 0: read its output above."
        raise DemoError(msg)
