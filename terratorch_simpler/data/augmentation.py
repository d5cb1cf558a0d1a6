"""Disables random transforms in a copy of a dataset, and seeds the randomness that is left by the number of the sample."""

from __future__ import annotations

import copy
import functools
import random
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from albumentations import BaseCompose, BasicTransform, Compose, Sequential
from torch import nn
from torch.utils.data import Dataset

LIBRARIES = frozenset({"albumentations", "kornia", "torchvision"})

ALWAYS_RANDOM = (
    "albumentations.augmentations.dropout",
    "albumentations.augmentations.mixing",
    "albumentations.augmentations.geometric.distortion",
    "albumentations.augmentations.geometric.rotate",
    "albumentations.augmentations.geometric.transforms",
)
"""Modules whose transforms are random even with ``p=1``, and keep the size."""

RANDOM_NAMES = frozenset(
    {"AugMix", "AutoAugment", "ColorJiggle", "ColorJitter", "D4", "GaussNoise", "GaussianNoise", "RandAugment"}
)
"""Random transforms whose names do not begin with Random."""

RESIZING = ("Crop", "Resize", "Scale", "Size")
"""Parts of the names of transforms that images may need to fit into a batch."""

Generators = np.random.Generator | np.random.RandomState | random.Random | torch.Generator


class DeterministicDataset(Dataset[Any]):
    """A dataset whose samples depend on their number alone, and that does not touch the random state of the process.

    Random transforms of albumentations, torchvision and kornia that keep the size of the image are disabled, wherever the
    dataset's attributes hold them. Those that change it stay: they, and any other random draw of the dataset, are seeded
    with the number of the sample.

    Args:
        dataset: A copy that may be changed; its transforms are replaced, never changed.

    Attributes:
        dataset: The same, changed.
        disabled: Names of the disabled transforms.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset
        self.disabled: list[str] = []
        self._seeded: list[BaseCompose | BasicTransform] = []
        self._generators: dict[str, Generators] = {}
        self._visited: set[int] = set()
        for name, value in list(getattr(dataset, "__dict__", {}).items()):
            if isinstance(value, Generators):
                self._generators[name] = value
            elif isinstance(value, Dataset):  # a wrapped dataset
                inner = DeterministicDataset(copy.copy(value))
                setattr(dataset, name, inner.dataset)
                self.disabled += inner.disabled
                self._seeded += inner._seeded
            elif callable(value) or isinstance(value, dict):
                fixed = self._without_random(value)
                if fixed is not value:
                    setattr(dataset, name, fixed)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        for transform in self._seeded:
            transform.set_random_seed(index)
        for name, generator in self._generators.items():
            setattr(self.dataset, name, copy.deepcopy(generator))
        with seeded(index):
            return self.dataset[index]

    def _without_random(self, value: Any) -> Any:
        """A transform without its random parts; the value itself if there are none."""
        if isinstance(value, BaseCompose | BasicTransform):
            return self._albumentations(value)
        if isinstance(value, dict):
            parts = {key: self._without_random(part) for key, part in value.items()}
            return parts if any(parts[key] is not value[key] for key in value) else value
        if isinstance(value, type) or not callable(value):
            return value
        if self._disables(value):
            return nn.Identity()
        if isinstance(value, functools.partial):
            arguments, keywords = self._all_without_random(value.args), self._without_random(value.keywords)
            same = arguments is value.args and keywords is value.keywords
            return value if same else functools.partial(value.func, *arguments, **keywords)
        if isinstance(value, types.FunctionType):
            return self._closure(value)
        if isinstance(value, nn.Sequential) or _library(value) == "kornia":
            return self._modules(value)
        transforms = getattr(value, "transforms", None)  # Compose of torchvision, MultimodalTransforms of TerraTorch
        several = isinstance(transforms, list | tuple)
        fixed = self._all_without_random(transforms) if several else self._without_random(transforms)  # type: ignore[arg-type]
        if fixed is transforms:
            return value
        changed = copy.copy(value)
        changed.transforms = fixed
        return changed

    def _all_without_random(self, transforms: list[Any] | tuple[Any, ...]) -> list[Any] | tuple[Any, ...]:
        fixed = [self._without_random(transform) for transform in transforms if not self._disables(transform)]
        same = len(fixed) == len(transforms) and all(a is b for a, b in zip(fixed, transforms, strict=True))
        return transforms if same else fixed

    def _disables(self, transform: object) -> bool:
        if not is_random(transform):
            return False
        self.disabled.append(type(transform).__name__)
        return True

    def _albumentations(self, value: BaseCompose | BasicTransform) -> BaseCompose | BasicTransform:
        # Always a copy: it has a random generator of its own, and the user's must not advance.
        own = copy.deepcopy(value)
        if isinstance(own, BaseCompose):
            self._filter_compose(own)
        elif self._disables(own):
            return Compose([])
        self._seeded.append(own)
        return own

    def _filter_compose(self, compose: BaseCompose) -> None:
        compose.transforms = [transform for transform in compose.transforms if not self._disables(transform)]
        for transform in compose.transforms:
            if isinstance(transform, Compose | Sequential):  # not OneOf and SomeOf: their choices stay complete
                self._filter_compose(transform)

    def _closure(self, function: types.FunctionType) -> types.FunctionType:
        """TerraTorch wraps transforms in functions."""
        if id(function) in self._visited:
            return function  # calls itself
        self._visited.add(id(function))
        try:
            contents = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a name that has no value yet
            return function
        fixed = [self._without_random(part) if callable(part) else part for part in contents]
        if all(a is b for a, b in zip(fixed, contents, strict=True)):
            return function
        closure = tuple(types.CellType(part) for part in fixed)
        changed = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
        )
        changed.__kwdefaults__ = function.__kwdefaults__
        return changed

    def _modules(self, module: nn.Module) -> nn.Module:
        names = [name for name, part in module.named_children() if is_random(part)]
        if not names:
            return module
        changed = copy.deepcopy(module)
        for name in names:
            self._disables(changed._modules.pop(name))
        return changed


def is_random(transform: object) -> bool:
    """Whether this is a random transform of a known library that no image needs to fit into a batch."""
    if _library(transform) not in LIBRARIES:
        return False
    chance, name = getattr(transform, "p", 1), type(transform).__name__
    if isinstance(chance, int | float) and chance < 1:
        return True
    if isinstance(transform, BaseCompose) and not isinstance(transform, Compose | Sequential):  # OneOf, SomeOf
        return all(is_random(part) for part in transform.transforms)
    if type(transform).__module__.startswith(ALWAYS_RANDOM):
        return True
    return (name.startswith("Random") and not any(part in name for part in RESIZING)) or name in RANDOM_NAMES


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch on the CPU, and restore their random states afterwards."""
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
