"""What the package needs to know of an encoder, and the table of families that know it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import nn

from terratorch_simpler.errors import ConfigurationError, UnsupportedEncoderError

HIERARCHICAL = ("swin", "convnext", "resnet", "efficientnet", "hiera", "pvt", "maxvit", "mobilenet")


class EncoderAdapter(ABC):
    """Where one family of encoders keeps what is measured and cut. Adapters hold no state.

    Attributes:
        family: Name for messages.
    """

    family: str

    @abstractmethod
    def matches(self, encoder: nn.Module) -> bool:
        """Whether the encoder is of this family.

        Raises:
            UnsupportedEncoderError: If it is, but a variant that cannot be cut.
        """

    @abstractmethod
    def prepare(self, encoder: nn.Module) -> None:
        """Make ``encoder(...)`` return the features after every block it holds, and copy correctly."""

    @abstractmethod
    def blocks(self, encoder: nn.Module) -> nn.ModuleList:
        """Blocks the encoder holds, in order; their outputs are what is compared."""

    @abstractmethod
    def rearrange(self, encoder: nn.Module, positions: Sequence[int]) -> None:
        """Put blocks, and all that belongs to a block, in the given order; those not named are dropped.

        Everything in the encoder that describes its depth agrees afterwards.

        Args:
            encoder: The encoder, changed in place.
            positions: Positions in the present list; a repeated one becomes a copy of its own.
        """

    @abstractmethod
    def out_channels(self, encoder: nn.Module) -> list[int]:
        """Channels of the features after each block of the intact encoder."""

    @abstractmethod
    def prefix_tokens(self, encoder: nn.Module) -> int:
        """Number of tokens before the patch tokens in a block's output (class, register and prompt tokens)."""

    @abstractmethod
    def patch_size(self, encoder: nn.Module) -> tuple[int, int, int]:
        """Extent of a patch token as (frames, rows, columns) of the input."""

    @abstractmethod
    def input_shape(self, encoder: nn.Module) -> tuple[int, ...]:
        """Shape of one native input image, (C, H, W) or (C, T, H, W)."""


def take(items: Iterable[nn.Module], positions: Sequence[int]) -> list[nn.Module]:
    """Items at the given positions; a repeated one is copied, so that no two share weights."""
    held = list(items)
    taken: list[nn.Module] = []
    for number, position in enumerate(positions):
        item = held[position]
        taken.append(copy.deepcopy(item) if position in positions[:number] else item)
    return taken


_ADAPTERS: list[EncoderAdapter] = []


def register_adapter(adapter: EncoderAdapter) -> EncoderAdapter:
    """Make a family known.

    Raises:
        ConfigurationError: If the family is known already.
    """
    if any(known.family == adapter.family for known in _ADAPTERS):
        msg = f"Found a second adapter for family '{adapter.family}', expected one: use another family name."
        raise ConfigurationError(msg)
    _ADAPTERS.append(adapter)
    return adapter


def find_adapter(encoder: nn.Module) -> EncoderAdapter:
    """Adapter of an encoder's family.

    Raises:
        UnsupportedEncoderError: If no family matches.
    """
    for adapter in _ADAPTERS:
        if adapter.matches(encoder):
            return adapter
    known = ", ".join(adapter.family for adapter in _ADAPTERS)
    msg = (
        f"Found an encoder of class {type(encoder).__name__}, expected one of the families {known}: use its plain name "
        "without 'simpler_', or register an adapter for it."
    )
    raise UnsupportedEncoderError(msg)


def refuse_by_name(name: str) -> None:
    """Refuse hierarchical encoders before building them.

    Raises:
        UnsupportedEncoderError: If the name says that the encoder has stages of different resolution and width.
    """
    if any(word in name.lower() for word in HIERARCHICAL):
        msg = (
            f"Found backbone '{name}', expected an encoder with one stack of equal blocks such as prithvi_eo_v2_300_tl: a "
            "hierarchical encoder changes resolution and width between stages, so depth cannot be cut from its end; use "
            f"'{name}' without 'simpler_'."
        )
        raise UnsupportedEncoderError(msg)
