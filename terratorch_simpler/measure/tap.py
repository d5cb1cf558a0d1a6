"""Reads rows off what enters the first block and every block's raw output while a batch passes through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.measure.inputs import check_input
from terratorch_simpler.measure.tokens import Draw, Tokens, draw, token_masks
from terratorch_simpler.tiles import Batch


class _EncoderDone(Exception):
    """Ends a forward pass once the encoder has answered: the decoder is of no interest."""


class Tap:
    """Draws rows from what enters the first block, and from the raw output of every block, while a batch passes.

    Hooks fire before any final norm, for whatever wraps the encoder (TemporalWrapper, PEFT, the task's padding).
    """

    def __init__(
        self, backbone: SimplerBackbone, stop_after: nn.Module, tokens: Tokens, seed: int, with_special: bool = False
    ) -> None:
        self.special = 0  # of the rows of a tile, how many show no patch: the last ones
        self._with_special = with_special
        self.input_shape: InputShape = ()
        self._backbone = backbone
        self._stop_after = stop_after
        self._tokens = tokens
        self._seed = seed
        self._hooks = ExitStack()
        self._rows: list[Tensor] = []
        self._inputs: Tensor | Mapping[str, Any] = {}
        self._drawn: Draw | None = None
        self._batch: Batch = {}

    def __enter__(self) -> Tap:
        handles = [self._backbone.register_forward_pre_hook(self._before, with_kwargs=True)]
        handles += self._backbone.watch(self._state)
        handles += [self._stop_after.register_forward_hook(self._after_encoder)]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> tuple[Tensor, list[int]]:
        """Send a batch through the model.

        Returns:
            Rows before the first block and after every block, (L + 1, R, D), and how many of the R rows came from each tile.

        Raises:
            TilesError: If the tiles have not the modalities or bands of the encoder.
        """
        check_input(self._backbone, batch["image"])  # before the datamodule's means meet another number of bands
        self._batch, self._rows, self._drawn = batch, [], None
        with suppress(_EncoderDone):
            forward(batch)
        assert self._drawn is not None
        return torch.stack(self._rows), self._drawn.counts

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        self._inputs = inputs
        if isinstance(inputs, Mapping):
            images = {name: part for name, part in inputs.items() if isinstance(part, Tensor) and part.ndim >= 4}
            self.input_shape = {name: tuple(part.shape[1:]) for name, part in images.items()}
        else:
            self.input_shape = tuple(inputs.shape[1:])

    def _state(self, tokens: Tensor) -> None:
        if self._drawn is None:  # only tokens tell how many there are
            layout = self._backbone.layout(self._inputs, tokens.shape[-2])
            valid, special = token_masks(self._batch["valid"], tokens.shape[0], layout)
            numbers = self._batch["index"]
            self._drawn = draw(valid, special, numbers, self._tokens, self._seed, tokens.device, self._with_special)
            self.special = self._drawn.special
        self._rows.append(self._drawn.take(tokens))

    def _after_encoder(self, _module: nn.Module, _args: object, _output: object) -> None:
        raise _EncoderDone
