"""Checks of training, by TerraTorch's own command in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.check import Finding, Settings, judged, skipped
from benchmarks.gpu.models import scenes
from terratorch_simpler.models.checkpoint import read_pruned_state
from tests import cli_runner

LORA = {
    "method": "LORA",
    "replace_qkv": "qkv",
    "peft_config_kwargs": {"target_modules": ["q_linear", "v_linear", "mlp.fc1"], "r": 4, "lora_alpha": 4},
}
CASES: dict[str, dict[str, Any]] = {
    "depth": {"callback": {"max_depth": 6}},
    "width 0.5": {"callback": {"width": 0.5, "criterion": "fixed", "drop_blocks": 7}},
    "recovery linear": {"callback": {"recovery": "linear", "max_depth": 6}},
    "LoRA": {"callback": {"max_depth": 6}, "model_args": {"peft_config": LORA, "backbone_pretrained": False}},
}
PRUNED = {"criterion": "fixed", "drop_blocks": 7, "width": 0.5}
KINDS = ("full", "sharded")
"""Of checkpoints of FSDP."""
PLAIN = "from terratorch.__main__ import main; main()"
ON_CPU = f"from tests import cli_runner; cli_runner.fsdp_on_cpu(0); {PLAIN}"


def start(
    settings: Settings, folder: Path, config: dict[str, Any], *args: str, code: str = PLAIN
) -> subprocess.Popen[bytes]:
    """Start ``terratorch fit`` with a config; what it says goes into ``output.txt`` of the folder."""
    folder.mkdir(parents=True)
    config["trainer"]["accelerator"] = "gpu" if settings.cuda else settings.device
    if settings.cuda:
        config["trainer"]["devices"] = [torch.device(settings.device).index or 0]
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", code, "fit", "--config", str(path), *args],
            cwd=folder, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def ended(process: subprocess.Popen[bytes], folder: Path, what: str) -> Iterator[Finding]:
    """Wait for a command; a finding only if it failed."""
    if process.wait() != 0:
        said = (folder / "output.txt").read_text(errors="replace")
        print(said)
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "nothing was said")
        yield judged(False, f"{what}: terratorch fit ended with status {process.returncode}: {last.strip()}")


def fit(settings: Settings) -> Iterator[Finding]:
    """After two steps every trainable tensor has moved, and the optimizer holds the model's tensors, each once."""
    started = {}
    for name, case in CASES.items():
        if name == "LoRA" and find_spec("peft") is None:
            yield skipped("LoRA: peft is not installed")
            continue
        folder = settings.scratch / "fit" / name.replace(" ", "-")
        config = cli_runner.config(scenes(settings), folder, **case["callback"])
        config["trainer"] |= {"max_steps": 2, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": False}
        trained = {"class_path": "tests.cli_runner.Trained", "init_args": {"folder": str(folder)}}
        config["trainer"]["callbacks"] = [config["trainer"]["callbacks"][0], trained]
        config["model"]["init_args"]["model_args"] |= cli_runner.WITHOUT_COORDINATES | case.get("model_args", {})
        started[name] = folder, start(settings, folder, config)
    for name, (folder, process) in started.items():
        failures = list(ended(process, folder, name))
        yield from failures or [moved(name, json.loads((folder / "moved.0.json").read_text()))]


def moved(name: str, found: dict[str, Any]) -> Finding:
    """Judge what :class:`tests.cli_runner.Trained` has written."""
    held = [tensor for group in found["groups"] for tensor in group["held"]]
    still = sorted(set(found["unchanged"]) & set(found["trainable"]))
    trainable = len(found["trainable"])
    right = not still and sorted(held) == sorted(found["names"]) and found["state"] == trainable and not found["stale_state"]
    pruned = len(found["kept"]) < 12 or found["width"] < 1
    numbers = {key: found[key] for key in ("kept", "width", "state", "stale_state")}
    return judged(
        right and pruned,
        f"{name}: {trainable - len(still)} of {trainable} trainable tensors moved; the optimizer holds {len(held)}, the "
        f"model {len(found['names'])}; {len(found['kept'])} of 12 blocks, width {found['width']:g}",
        **numbers | {"still": still, "trainable": trainable, "held": len(held), "names": len(found["names"])},
    )


def fsdp(settings: Settings) -> Iterator[Finding]:
    """Two steps, a checkpoint, and two steps more from there, with full and with sharded checkpoints."""
    code = PLAIN if settings.cuda else ON_CPU
    folders = {kind: settings.scratch / "fsdp" / kind for kind in KINDS}
    configs = {kind: cli_runner.fsdp_config(scenes(settings), folder, kind, PRUNED) for kind, folder in folders.items()}
    first: dict[str, Path] = {}
    for step in (2, 4):
        started = {}
        for kind, config in configs.items():
            if step == 4 and kind not in first:
                continue  # has failed already
            config["trainer"]["max_steps"] = step
            resume = ["--ckpt_path", str(first[kind])] if step == 4 else []
            folder = folders[kind] / f"to-{step}"
            started[kind] = folder, start(settings, folder, config, *resume, code=code)
        for kind, (folder, process) in started.items():
            failures = list(ended(process, folder, f"{kind}, to step {step}"))
            yield from failures
            if step == 2 and not failures:
                first[kind] = cli_runner.newest(folders[kind])
            elif not failures:
                yield resumed(kind, first[kind], cli_runner.newest(folders[kind]))


def resumed(kind: str, first: Path, last: Path) -> Finding:
    """Judge two checkpoints of one run."""
    shapes = [read_pruned_state(path, None) for path in (first, last)]
    steps = [path.stem.rpartition("=")[2] for path in (first, last)]
    right = shapes[0] == shapes[1] and shapes[0].kept == (0, 1, 2, 3, 4) and steps == ["2", "4"]
    told = ""
    if kind == "full":
        before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (first, last))
        fixed = [name for name in before if name.endswith(("pos_embed", "_extra_state"))]
        still = [name for name in before if name not in fixed and torch.equal(before[name], after[name])]
        right = right and before.keys() == after.keys() and not still
        told = f"; {len(before) - len(fixed) - len(still)} of {len(before) - len(fixed)} tensors moved after that"
    return judged(right, f"{kind}: checkpoints of steps {' and '.join(steps)} hold {shapes[1].kept} of 12 blocks{told}")
