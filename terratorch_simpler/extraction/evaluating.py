"""Run a module in eval mode without gradients and adapters, then restore its state and that of random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from terratorch_simpler.models.plain import Encoder


def _generators() -> list[torch.Generator]:
    """PyTorch's default generators: of the CPU, and of every accelerator that is in use."""
    generators = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():  # else there is none yet, and it will start from the user's seed
            generators += backend.default_generators
    if torch.backends.mps.is_available():
        generators.append(torch.mps._get_default_mps_generator())
    return generators


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Restore every random generator at exit: Python's, NumPy's, and PyTorch's on the CPU and on accelerators.

    Lightning's ``isolate_rng`` and ``torch.manual_seed`` do not fit: the one leaves out XPU and MPS, the other seeds
    accelerators that are not in use yet as soon as they are, long after the block has ended.

    Args:
        seed: Seed of Python and PyTorch inside the block; None to leave them as they are.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    states = [(generator, generator.get_state()) for generator in _generators()]
    try:
        if seed is not None:
            random.seed(seed)
            for generator, _ in states:
                generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in states:
            generator.set_state(state)


@contextmanager
def evaluating(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run a module in eval mode without gradients, then restore its modes and the random state, whatever happens.

    Some encoders draw random numbers even then (TerraMind's Thinking-in-Modalities samples tokens): from ``seed``. Move the
    module to its device before, so that the generator of that device is in use.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        with random_state_kept(seed), torch.no_grad():
            module.eval()
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def as_pretrained(encoder: nn.Module, backbone: Encoder) -> Iterator[None]:
    """Disable adapters (LoRA) and prompts that will be tuned: their initial values need not be neutral."""
    trainable = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    try:
        with ExitStack() as off:
            for part in encoder.modules():
                if hasattr(part, "disable_adapter"):
                    off.enter_context(part.disable_adapter())  # type: ignore[operator]
                    break  # PEFT's outermost module answers for all
            off.enter_context(backbone.without_prompts())
            yield
    finally:
        for parameter, wanted in trainable:  # PEFT makes all of an adapter trainable when it is back
            parameter.requires_grad_(wanted)


@contextmanager
def no_requires_grad(module: nn.Module) -> Iterator[None]:
    """Needed by the FLOP counter, which hooks gradients and fails on prompts that have none."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to a device for a while; Lightning moves it there only after setup.

    Afterwards all parameters and buffers are the same objects as before, each on the device where it was.
    """
    originals = [
        (tensors, name, tensor, tensor.device)
        for part in module.modules()
        for tensors in (part._parameters, part._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    metrics = [(part, part.device) for part in module.modules() if isinstance(part, Metric)]  # states are no buffers
    try:
        nn.Module.to(module, device)  # LightningModule.to would change its device property
        yield
    finally:
        for tensors, name, tensor, own in originals:
            tensors[name] = tensor  # type: ignore[assignment]
            if tensor.device != own:
                tensor.data = tensor.data.to(own)
        for metric, own in metrics:
            metric.to(own)
