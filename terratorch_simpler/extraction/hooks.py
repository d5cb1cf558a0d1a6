"""Reads rows off what enters the first block and every block's raw output while a batch passes through the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from terratorch_simpler.data import Batch
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.extraction.inputs import check_input, explain
from terratorch_simpler.extraction.token_sampling import Tokens, TokenSample, sample_tokens, token_masks
from terratorch_simpler.models.backbone import SimplerBackbone


class _EncoderDone(Exception):
    """Ends a forward pass once the encoder has answered: the decoder is of no interest."""


class EncoderPass(ABC):
    """Looks on while a batch passes through the encoder, and ends the pass there.

    Hooks fire before any final norm, for whatever wraps the encoder (TemporalWrapper, PEFT, the task's padding).

    Args:
        backbone: The encoder.
        stop_after: Module after which the rest of the model need not run.
    """

    def __init__(self, backbone: SimplerBackbone, stop_after: nn.Module) -> None:
        self.backbone = backbone
        self.inputs: Tensor | Mapping[str, Any] | None = None  # of the encoder; None before a batch has reached it
        self.input_shape: InputShape = ()
        self._stop_after = stop_after
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        handles = [self.backbone.register_forward_pre_hook(self._before, with_kwargs=True)]
        handles += self.backbone.register_block_hooks(self.see)
        handles += [self._stop_after.register_forward_hook(self._after_encoder)]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    @abstractmethod
    def see(self, tokens: Tensor) -> None:
        """Take what enters the first block, and then the raw output of every block, (B, N, D)."""

    def send(self, forward: Callable[[Batch], object], batch: Batch) -> None:
        """Send a batch through the model.

        Raises:
            TilesError: If the tiles have not the modalities or bands of the encoder when they reach it.
        """
        self.inputs = None
        try:
            forward(batch)
        except _EncoderDone:
            pass
        except Exception as err:
            if self.inputs is None:
                explain(err, self.backbone, batch["image"])
            raise

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.inputs = inputs = args[0] if args else next(iter(kwargs.values()))
        check_input(self.backbone, inputs)
        if isinstance(inputs, Mapping):
            images = {name: part for name, part in inputs.items() if isinstance(part, Tensor) and part.ndim >= 4}
            self.input_shape = {name: tuple(part.shape[1:]) for name, part in images.items()}
        else:
            self.input_shape = tuple(inputs.shape[1:])

    def _after_encoder(self, _module: nn.Module, _args: object, _output: object) -> None:
        raise _EncoderDone


class FeatureExtractor(EncoderPass):
    """Draws rows from what enters the first block, and from the raw output of every block, while a batch passes."""

    def __init__(
        self, backbone: SimplerBackbone, stop_after: nn.Module, tokens: Tokens, seed: int, with_special: bool = False
    ) -> None:
        super().__init__(backbone, stop_after)
        self.special = 0  # of the rows of a tile, how many show no patch: the last ones
        self._with_special = with_special
        self._tokens = tokens
        self._seed = seed
        self._rows: list[Tensor] = []
        self._drawn: TokenSample | None = None
        self._batch: Batch = {}

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> tuple[Tensor, list[int]]:
        """Send a batch through the model.

        Returns:
            Rows before the first block and after every block, (L + 1, R, D), and how many of the R rows came from each tile.

        Raises:
            TilesError: If the tiles have not the modalities or bands of the encoder.
        """
        self._batch, self._rows, self._drawn = batch, [], None
        self.send(forward, batch)
        assert self._drawn is not None
        return torch.stack(self._rows), self._drawn.counts

    def see(self, tokens: Tensor) -> None:
        """Draw the rows."""
        if self._drawn is None:  # only tokens tell how many there are
            assert self.inputs is not None
            layout = self.backbone.layout(self.inputs, tokens.shape[-2])
            valid, special = token_masks(self._batch["valid"], tokens.shape[0], layout)
            numbers = self._batch["index"]
            self._drawn = sample_tokens(valid, special, numbers, self._tokens, self._seed, tokens.device, self._with_special)
            self.special = self._drawn.special
        self._rows.append(self._drawn.gather(tokens))
