"""A module lent for a while: evaluation mode, no gradients, as it was pretrained, and then as it was before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from terratorch_simpler.models.backbone import SimplerBackbone


def _generators() -> list[torch.Generator]:
    """Those that PyTorch draws from by itself: of the CPU, and of every accelerator that is in use."""
    found = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        if backend.is_initialized():  # else there is none yet, and it will start from the user's seed
            found += backend.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Leave every random generator as it was found: Python's, NumPy's, and PyTorch's on the CPU and on accelerators.

    ``torch.manual_seed`` is not for this: it seeds all accelerators, and those that are not in use yet once they are, long
    after the block has ended.

    Args:
        seed: Where Python and PyTorch start from inside the block; None to go on as they are.
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
    """Borrow a module: evaluation mode without gradients; modes and random state come back, whatever happens.

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
def as_pretrained(encoder: nn.Module, backbone: SimplerBackbone) -> Iterator[None]:
    """Without the adapters (LoRA) and prompts that will be tuned: what they start from need not be neutral."""
    trainable = [(parameter, parameter.requires_grad) for parameter in encoder.parameters()]
    try:
        with ExitStack() as off:
            for part in encoder.modules():
                if hasattr(part, "disable_adapter"):
                    off.enter_context(part.disable_adapter())
                    break  # PEFT's outermost module answers for all
            off.enter_context(backbone.without_prompts())
            yield
    finally:
        for parameter, wanted in trainable:  # PEFT makes all of an adapter trainable when it is back
            parameter.requires_grad_(wanted)


@contextmanager
def no_requires_grad(module: nn.Module) -> Iterator[None]:
    """The FLOP counter hooks the gradients of whatever has one, and stumbles over prompts where there are none."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
