"""What the package makes of fixed inputs, as users see it: plans, pruned weights, exported configs and tables.

    python -m tests.golden    # writes golden.json anew: only where results are meant to change, and the commit says why

Only YAML, commands and the files that they write are used here, so that all code behind them may change.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from terratorch_simpler.cli import main as command_line
from terratorch_simpler.demo.scenes import write_scenes
from tests.cli_runner import Command, config

RECORD = Path(__file__).with_name("golden.json")
TIMM = {
    "backbone": "simpler_timm_vit_tiny_patch16_224", "backbone_in_chans": 6, "backbone_img_size": 64,
    "backbone_out_indices": [2, 5, 8, 11], "necks": [{"name": "LearnedInterpolateToPyramidal"}],
}  # fmt: skip
TERRAMIND = {
    "backbone": "simpler_terramind_v1_tiny", "backbone_modalities": {"image": 6},
    "backbone_embed_dim": None, "backbone_num_heads": None,
}  # fmt: skip
DOFA = {
    "backbone": "simpler_dofa_small_patch16_224", "backbone_embed_dim": None, "backbone_num_heads": None,
    "backbone_model_bands": ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"], "backbone_img_size": 64,
    "backbone_out_indices": [2, 5, 8, 11],
    "necks": [{"name": "ReshapeTokensToImage"}, {"name": "LearnedInterpolateToPyramidal"}],
}  # fmt: skip
TILES = {"class_path": "terratorch_simpler.GeoTiffTiles", "init_args": {"tile_size": 32, "stride": 16, "nodata": 0}}
FITS: dict[str, dict[str, Any]] = {  # by name: arguments of SimplerCallback and of the model, and how many processes
    "simpler": {},
    "simpler, bounds and all tokens": {"callback": {"min_depth": 3, "max_depth": 9, "tokens": "all", "seed": 3}},
    "knee": {"callback": {"criterion": "knee", "tokens": "mean"}},
    "angular": {"callback": {"criterion": "angular", "drop_blocks": 4}},
    "block_influence, recovery": {"callback": {"criterion": "block_influence", "drop_blocks": 5, "recovery": "linear"}},
    "cka_intervals": {"callback": {"criterion": "cka_intervals", "drop_blocks": 6}},
    "fixed, width": {"callback": {"criterion": "fixed", "drop_blocks": 5, "width": 0.5}},
    "width": {"callback": {"width": 0.67, "max_depth": 7}},
    "two processes, recovery": {"callback": {"recovery": "linear", "max_depth": 8}, "ranks": 2},
    "timm": {"model": TIMM},
    "timm, width": {"model": TIMM, "callback": {"criterion": "angular", "drop_blocks": 3, "width": 0.5}},
    "terramind": {"model": TERRAMIND},
    "dofa": {"model": DOFA},
    "GeoTIFF tiles": {"callback": {"tiles": TILES}},
}
EXPORTED = ("simpler", "timm")
"""Fits whose checkpoint is exported, with a step of training."""
UNSTEADY = {"latency_ms", "throughput", "batch_size", "peak_memory_mib"}
NEWER = {f"{probe}_gain{end}" for probe in ("knn", "linear") for end in ("", "_low", "_high")}
"""Columns of a sweep that came after the record."""
"""Columns of a sweep that depend on the machine."""


class FixedWeights(Callback):
    """Gives the model the same weights on every machine and with every version of its libraries."""

    def setup(self, trainer, pl_module, stage):
        # TerraTorch's command line asks for "high", which processors with AMX answer with fewer bits than others.
        torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            for name, value in pl_module.named_parameters():
                drawn = np.random.RandomState(zlib.crc32(name.encode())).random_sample(tuple(value.shape)) - 0.5
                scale = 6 / math.sqrt(value.shape[-1]) if value.dim() > 1 else 0.1
                one = 1.0 if value.dim() == 1 and name.endswith("weight") else 0.0  # of norms
                value.copy_(torch.from_numpy(one + scale * drawn))


class Pruned(Callback):
    """Writes, before the first step, what the weights of the model are."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        found = {name: value for name, value in pl_module.state_dict().items() if not name.endswith("_extra_state")}
        (self.folder / f"weights.{trainer.global_rank}.json").write_text(json.dumps(weights(found)))


def weights(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One hash of all tensors that pruning only selects from, and the moments of those that it computes."""
    digest, computed = hashlib.sha256(), {}
    for name in sorted(state):
        value = state[name].detach().contiguous()
        if "recover" in name:
            computed[name] = [list(value.shape), value.double().sum().item(), value.double().square().sum().item()]
        else:
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"tensors": len(state), "sha256": digest.hexdigest(), "computed": computed}


def settings(scenes: Path, folder: Path, callback: dict | None = None, model: dict | None = None) -> dict:
    """The YAML of one fit."""
    callback = copy.deepcopy(callback or {})
    if "tiles" in callback:
        callback["tiles"]["init_args"]["paths"] = str(scenes / "images")
    found = config(scenes, folder, **callback)
    arguments = found["model"]["init_args"]["model_args"] | (model or {})
    found["model"]["init_args"]["model_args"] = {key: value for key, value in arguments.items() if value is not None}
    ours, checkpoint, _ = found["trainer"]["callbacks"]
    recorder = {"class_path": "tests.golden.Pruned", "init_args": {"folder": str(folder)}}
    found["trainer"]["callbacks"] = [{"class_path": "tests.golden.FixedWeights"}, ours, recorder, checkpoint]
    found["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    return found


def fit(name: str, scenes: Path, folder: Path) -> dict[str, Any]:
    """The plan of one ``terratorch fit``, the weights that each process begins to train, and the state of the checkpoint."""
    case = FITS[name]
    ranks = case.get("ranks", 1)
    command = Command(folder, settings(scenes, folder, case.get("callback"), case.get("model")), ranks=ranks)
    if command.wait() != [0] * ranks:
        raise AssertionError(command.output()[-3000:])
    plan = json.loads((folder / "simpler" / "plan.json").read_text())
    del plan["versions"]
    plan.pop("verdict", None)  # newer than the record
    if plan["data"] is not None:
        plan["data"]["fingerprint"] = len(plan["data"]["fingerprint"])  # of pixels, which may be rounded otherwise elsewhere
    [last] = (folder / "checkpoints").glob("last.ckpt")
    state = torch.load(last, weights_only=True)["state_dict"]
    return {
        "plan": plan,
        "weights": [json.loads((folder / f"weights.{rank}.json").read_text()) for rank in range(ranks)],
        "checkpoint": {key: described(value) for key, value in state.items() if "block" not in key},
    }


def described(value: Any) -> Any:
    """A tensor's shape; what is no tensor as text."""
    return list(value.shape) if isinstance(value, torch.Tensor) else repr(value)


def exported(folder: Path) -> dict[str, Any]:
    """The plain config of a fit, and the tensors of its checkpoint."""
    out, config_of_fit = folder / "plain", folder / "without_recorders.yaml"
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["trainer"]["callbacks"] = content["trainer"]["callbacks"][1:2]
    config_of_fit.write_text(yaml.safe_dump(content))
    arguments = ["-c", str(config_of_fit), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt"), "-o", str(out)]
    if command_line(["export", *arguments]):
        raise AssertionError(f"export of {folder} failed")
    [text], [checkpoint] = out.glob("*.yaml"), out.glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    shapes = {key: list(value.shape) for key, value in state.items()}
    return {"config": yaml.safe_load(text.read_text())["model"], "state": shapes}


def swept(scenes: Path, folder: Path) -> list[dict[str, str]]:
    """The rows of a sweep over depths and widths, without what depends on the machine."""
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings(scenes, folder, callback={"recovery": "linear"})))
    if command_line(["sweep", "-c", str(path), "-o", str(folder), "--widths", "1", "0.5", "--repeats", "1"]):
        raise AssertionError("the sweep failed")
    with (folder / "sweep.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in UNSTEADY | NEWER} for row in csv.DictReader(file)]


def record(name: str, scenes: Path, folder: Path) -> dict[str, Any]:
    """What golden.json holds under a name."""
    if name == "sweep":
        return {"rows": swept(scenes, folder)}
    found = fit(name, scenes, folder)
    return {**found, "export": exported(folder)} if name in EXPORTED else found


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two records differ: numbers but for rounding, all else exactly."""
    if isinstance(found, dict) and isinstance(expected, dict):
        alone = [f"{where}/{key}: only in one" for key in sorted(found.keys() ^ expected.keys())]
        both = sorted(found.keys() & expected.keys())
        return alone + [line for key in both for line in differences(found[key], expected[key], f"{where}/{key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{where}/{i}")]
    if isinstance(found, str) and isinstance(expected, str):
        found, expected = number(found), number(expected)
    if isinstance(found, float) and isinstance(expected, float):
        equal = math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-5)
    else:
        equal = type(found) is type(expected) and found == expected
    return [] if equal else [f"{where}: {found}, expected {expected}"]


def number(text: str) -> str | float:
    """The number that a cell of a table holds, or its text."""
    try:
        return text if text.isdigit() else float(text)
    except ValueError:
        return text


def main() -> None:
    """Write the record anew."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = Path(folder, "scenes")
        write_scenes(scenes, {"train": 48, "val": 4, "test": 4}, size=64)
        found = {name: record(name, scenes, Path(folder, str(i))) for i, name in enumerate([*FITS, "sweep"])}
    RECORD.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
