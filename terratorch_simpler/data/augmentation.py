"""Takes random transforms out of a copy of a dataset, and makes what is left of randomness the same in every read."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from albumentations import BaseCompose, BasicTransform, Compose, Sequential
from torch import nn
from torch.utils.data import Dataset

LIBRARIES = frozenset({"albumentations", "kornia", "torchvision"})

NEVER_NEEDED = (
    "albumentations.augmentations.dropout",
    "albumentations.augmentations.mixing",
    "albumentations.augmentations.geometric.distortion",
    "albumentations.augmentations.geometric.rotate",
    "albumentations.augmentations.geometric.transforms",
)
"""Modules whose transforms are random even with ``p=1``, and keep the size."""

NAMED = frozenset(
    {"AugMix", "AutoAugment", "ColorJiggle", "ColorJitter", "D4", "GaussNoise", "GaussianNoise", "RandAugment"}
)
"""Random transforms whose names do not begin with Random."""

GIVES_SIZE = ("Crop", "Resize", "Scale", "Size")
"""Parts of the names of transforms that a batch may need for its size."""

Generators = np.random.Generator | np.random.RandomState | random.Random | torch.Generator


class Repeatable(Dataset[Any]):
    """A dataset whose samples depend on their number alone, and that leaves the random state of the process alone.

    Random transforms of albumentations, torchvision and kornia that keep the size are left out, wherever the dataset's
    attributes hold them. Those that give an image its size stay: they, and whatever else the dataset draws, start from the
    number of the sample.

    Args:
        dataset: A copy that may be changed; its transforms are replaced, never changed.

    Attributes:
        dataset: The same, changed.
        left_out: Names of the transforms that were left out.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Replace the transforms."""
        self.dataset = dataset
        self.left_out: list[str] = []
        self._seeded: list[BaseCompose | BasicTransform] = []
        self._generators: dict[str, Generators] = {}
        self._functions: set[int] = set()
        for name, value in list(getattr(dataset, "__dict__", {}).items()):
            if isinstance(value, Generators):
                self._generators[name] = value
            elif isinstance(value, Dataset):  # one inside the other
                inner = Repeatable(copy.copy(value))
                setattr(dataset, name, inner.dataset)
                self.left_out += inner.left_out
                self._seeded += inner._seeded
            elif callable(value) or isinstance(value, dict):
                calm = self._calm(value)
                if calm is not value:
                    setattr(dataset, name, calm)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        for transform in self._seeded:
            transform.set_random_seed(index)
        for name, generator in self._generators.items():
            setattr(self.dataset, name, copy.deepcopy(generator))
        with random_state_of(index):
            return self.dataset[index]

    def _calm(self, value: Any) -> Any:
        """The same transform without what is random; the value itself if nothing is."""
        if isinstance(value, BaseCompose | BasicTransform):
            return self._calm_albumentations(value)
        if isinstance(value, dict):
            parts = {key: self._calm(part) for key, part in value.items()}
            return parts if any(parts[key] is not value[key] for key in value) else value
        if isinstance(value, type) or not callable(value):
            return value
        if self._leave_out(value):
            return nn.Identity()
        if isinstance(value, functools.partial):
            arguments, keywords = self._calm_all(value.args), self._calm(value.keywords)
            return value if arguments is value.args and keywords is value.keywords else _bound(value, arguments, keywords)
        if isinstance(value, types.FunctionType):
            return self._calm_closure(value)
        if isinstance(value, nn.Sequential) or _library(value) == "kornia":
            return self._calm_modules(value)
        transforms = getattr(value, "transforms", None)  # Compose of torchvision, MultimodalTransforms of TerraTorch
        calm = self._calm_all(transforms) if isinstance(transforms, list | tuple) else self._calm(transforms)
        if calm is transforms:
            return value
        changed = copy.copy(value)
        changed.transforms = calm
        return changed

    def _calm_all(self, transforms: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        """The list without what is random; the list itself if nothing is."""
        calm = [self._calm(transform) for transform in transforms if not self._leave_out(transform)]
        same = len(calm) == len(transforms) and all(a is b for a, b in zip(calm, transforms, strict=True))
        return transforms if same else calm

    def _leave_out(self, transform: object) -> bool:
        if not is_random(transform):
            return False
        self.left_out.append(type(transform).__name__)
        return True

    def _calm_albumentations(self, value: BaseCompose | BasicTransform) -> BaseCompose | BasicTransform:
        # A copy in any case: it draws from a generator of its own, which is not to be moved on.
        own = copy.deepcopy(value)
        if isinstance(own, BaseCompose):
            self._thin_out(own)
        elif self._leave_out(own):
            return Compose([])
        self._seeded.append(own)
        return own

    def _thin_out(self, compose: BaseCompose) -> None:
        compose.transforms = [transform for transform in compose.transforms if not self._leave_out(transform)]
        for transform in compose.transforms:
            if isinstance(transform, Compose | Sequential):  # not those that choose: what they choose from stays whole
                self._thin_out(transform)

    def _calm_closure(self, function: types.FunctionType) -> types.FunctionType:
        """Functions that TerraTorch wraps transforms in."""
        if id(function) in self._functions:
            return function  # calls itself
        self._functions.add(id(function))
        try:
            held = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a name that has no value yet
            return function
        calm = [self._calm(part) if callable(part) else part for part in held]
        if all(a is b for a, b in zip(calm, held, strict=True)):
            return function
        closure = tuple(types.CellType(part) for part in calm)
        again = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        again.__kwdefaults__ = function.__kwdefaults__
        return again

    def _calm_modules(self, module: nn.Module) -> nn.Module:
        """Containers of torch and kornia."""
        random_parts = [name for name, part in module.named_children() if is_random(part)]
        if not random_parts:
            return module
        changed = copy.deepcopy(module)
        for name in random_parts:
            self._leave_out(changed._modules.pop(name))
        return changed


def is_random(transform: object) -> bool:
    """Whether this is a transform of a known library that is random and that no batch needs for its size."""
    if _library(transform) not in LIBRARIES:
        return False
    chance, name = getattr(transform, "p", 1), type(transform).__name__
    if isinstance(chance, int | float) and chance < 1:
        return True
    if isinstance(transform, BaseCompose) and not isinstance(transform, Compose | Sequential):  # OneOf, SomeOf
        return all(is_random(part) for part in transform.transforms)
    if type(transform).__module__.startswith(NEVER_NEEDED):
        return True
    return (name.startswith("Random") and not any(part in name for part in GIVES_SIZE)) or name in NAMED


@contextmanager
def random_state_of(seed: int) -> Iterator[None]:
    """Python, NumPy and PyTorch on the CPU start from a seed, and go on afterwards where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _library(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _bound(value: functools.partial[Any], arguments: Sequence[Any], keywords: dict[str, Any]) -> functools.partial[Any]:
    return functools.partial(value.func, *arguments, **keywords)
