"""A module lent for a while: evaluation mode, no gradients, as it was pretrained, and then as it was before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from terratorch_simpler.backbone import SimplerBackbone


@contextmanager
def borrowed(module: nn.Module, seed: int = 0) -> Iterator[None]:
    """Borrow a module: evaluation mode without gradients; modes and random state come back, whatever happens.

    Some encoders draw random numbers even then (TerraMind's Thinking-in-Modalities samples tokens): from ``seed``.
    """
    modes = [(part, part.training) for part in module.modules()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]), torch.no_grad():
            module.eval()
            random.seed(seed)
            torch.manual_seed(seed)
            yield
    finally:
        for part, training in modes:
            part.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def as_pretrained(encoder: nn.Module, backbone: SimplerBackbone) -> Iterator[None]:
    """Without the adapters (LoRA) and prompts that will be tuned: what they start from need not be neutral."""
    with ExitStack() as off:
        for part in encoder.modules():
            if hasattr(part, "disable_adapter"):
                off.enter_context(part.disable_adapter())
                break  # PEFT's outermost module answers for all
        off.enter_context(backbone.without_prompts())
        yield


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """The FLOP counter hooks the gradients of whatever has one, and stumbles over prompts where there are none."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
