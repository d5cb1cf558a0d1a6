"""What recovers the output of dropped blocks: linear maps as a part of the model, and the file beside plan.json.

The file holds the maps (``recovery: linear``), or the weights of the pruned encoder (``recovery: distill``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from terratorch_simpler.errors import PlanError
from terratorch_simpler.files import atomic_write, load_tensors

FORMAT = "terratorch-simpler/recovery"
LARGEST_WIDTH = 2**14
"""Of a token; none is as wide."""


class RecoveryWeights(NamedTuple):
    """The map of one span, for tokens as rows: x W.

    Attributes:
        patch: W of patch tokens, (D, D), float32.
        special: W of class and register tokens; None if they share that of the patches.
    """

    patch: Tensor
    special: Tensor | None


class LinearRecovery(nn.Module):
    """A :class:`RecoveryWeights` as part of a model.

    Args:
        span_map: The map.
        prefix: How many tokens at the front are not patches; they have a map of their own if there is one.
    """

    def __init__(self, span_map: RecoveryWeights, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.patch = _linear(span_map.patch)
        self.special = None if span_map.special is None else _linear(span_map.special)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, D)."""
        if self.special is None:
            mapped = self.patch(tokens)
        else:
            first, rest = tokens[..., : self.prefix, :], tokens[..., self.prefix :, :]
            mapped = torch.cat([self.special(first), self.patch(rest)], dim=-2)
        # Under autocast blocks add to tokens in single precision, and should after the map as well.
        return mapped.to(tokens.dtype)  # type: ignore[no-any-return]

    # Hooks are methods of this module, so that a copy of a model runs the copy's map.

    def after(self, _block: nn.Module, _args: object, output: Tensor) -> Tensor:
        """Change the output of a block."""
        return self(output)  # type: ignore[no-any-return]

    def after_branch(self, _branch: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Change the output of a residual branch, so that the sum with its input is mapped."""
        return self(output + args[0]) - args[0]  # type: ignore[no-any-return]

    def before(
        self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Change the first argument of a module."""
        if args:
            return (self(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self(kwargs[name])}


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(rows, columns, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.T.contiguous().float())
    return layer


def save_maps(maps: Mapping[int, RecoveryWeights], path: Path, plan: str) -> None:
    """Write maps, whole or not at all.

    Args:
        maps: The maps by the state before their range.
        path: File to write.
        plan: Text of the plan they belong to.
    """
    content = {before: {"patch": one.patch, "special": one.special} for before, one in maps.items()}
    with atomic_write(path) as part:
        torch.save({"format": FORMAT, "plan": _digest(plan), "maps": content}, part)


def load_maps(path: Path, plan: str, befores: Sequence[int]) -> dict[int, RecoveryWeights]:
    """Read the maps of a plan.

    Args:
        path: File to read.
        plan: Text of the plan.
        befores: States before the ranges that the plan drops.

    Raises:
        PlanError: If there is no such file, it is damaged, or belongs to another plan.
    """
    with _readable(path, "maps", "linear"):
        content = _of_plan(path, plan)["maps"]
        if list(content) != list(befores):
            raise ValueError("made for another plan")
        maps = {before: RecoveryWeights(one["patch"], one["special"]) for before, one in content.items()}
        tensors = [weight for one in maps.values() for weight in one if weight is not None]
        if not all(_is_square(weight, tensors[0]) for weight in tensors):
            raise ValueError("not square matrices of one width")
    return maps


def save_weights(weights: Mapping[str, Tensor], path: Path, plan: str) -> None:
    """Write the weights of a distilled encoder, whole or not at all.

    Args:
        weights: Tensors by their name in the pruned encoder.
        path: File to write.
        plan: Text of the plan they belong to.
    """
    with atomic_write(path) as part:
        torch.save({"format": FORMAT, "plan": _digest(plan), "weights": dict(weights)}, part)


def load_weights(path: Path, plan: str) -> dict[str, Tensor]:
    """Read the weights of a distilled encoder.

    Args:
        path: File to read.
        plan: Text of the plan.

    Raises:
        PlanError: If there is no such file, it is damaged, or belongs to another plan.
    """
    with _readable(path, "weights", "distill"):
        weights = dict(_of_plan(path, plan)["weights"])
        if not all(isinstance(name, str) and _is_finite(weight) for name, weight in weights.items()):
            raise ValueError("not finite tensors by name")
    return weights


def _of_plan(path: Path, plan: str) -> dict[str, Any]:
    content: dict[str, Any] = load_tensors(path)
    if content["format"] != FORMAT or content["plan"] != _digest(plan):
        raise ValueError("made for another plan")
    return content


@contextmanager
def _readable(path: Path, what: str, recovery: str) -> Iterator[None]:
    """Turn what a missing or damaged file raises into a PlanError."""
    try:
        yield
    except Exception as err:  # a damaged file raises anything
        why = " ".join(str(err).split())[:120]
        msg = (
            f"There are no readable {what} at {path} ({why}), expected those of a plan with recovery {recovery}: keep the "
            "file beside its plan, or make the plan again."
        )
        raise PlanError(msg) from err


def _is_finite(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.dtype == torch.float32 and bool(torch.isfinite(weight).all())


def _is_square(weight: object, like: Tensor) -> bool:
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return False
    return (
        weight.shape == like.shape == (len(weight), len(weight)) and 0 < len(weight) <= LARGEST_WIDTH and _is_finite(weight)
    )


def _digest(plan: str) -> str:
    return hashlib.sha256(plan.encode("utf-8")).hexdigest()
