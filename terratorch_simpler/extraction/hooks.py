"""Features of every block of an encoder, read by hooks while a batch passes through the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from terratorch_simpler.data import Batch
from terratorch_simpler.encoders import InputShape, Layout
from terratorch_simpler.extraction.input_statistics import InputStatistics
from terratorch_simpler.extraction.inputs import check_input, explain
from terratorch_simpler.extraction.token_sampling import Sample
from terratorch_simpler.models.plain import Encoder

Readout = Callable[[int, Tensor], Tensor]
"""Number of a kept block, from 0, and its raw output (B, N, D); returns its features (B, N, D')."""


Sampled = TypeVar("Sampled", bound=Sample)
SampledByIt = TypeVar("SampledByIt", bound=Sample, covariant=True)


class Sampler(Protocol[SampledByIt]):
    """Anything like :class:`~terratorch_simpler.extraction.TokenSampler`."""

    def sample(self, batch: Batch, images: int, layout: Layout, device: torch.device) -> SampledByIt:
        """Sample the tiles of a batch."""


class EncoderDone(Exception):
    """Ends a forward pass after the encoder: the decoder is not needed."""


class FeatureExtractor(Generic[Sampled]):
    """Extracts sampled tokens of the input of the first block, and of the raw output of every block.

    Hooks fire before any final norm, whatever wraps the encoder (TemporalWrapper, PEFT, the task's padding). Used as a
    context manager; the hooks are removed at its end.

    Args:
        backbone: The encoder.
        stop_after: Module after which the rest of the model need not run.
        sampler: Chooses the tokens of each tile, once per batch.
        readout: What is taken for the features of a block; by default its raw output.
        include_input: Whether to extract the input of the first block too.
        input_statistics: Takes the images as they reach the encoder.

    Attributes:
        input_shape: Shape of one input of the encoder, without the batch; of each modality by name.
    """

    def __init__(
        self,
        backbone: Encoder,
        stop_after: nn.Module,
        sampler: Sampler[Sampled],
        *,
        readout: Readout | None = None,
        include_input: bool = True,
        input_statistics: InputStatistics | None = None,
    ) -> None:
        self.backbone = backbone
        self.input_shape: InputShape = ()
        self._stop_after = stop_after
        self._sampler = sampler
        self._readout = readout
        self._include_input = include_input
        self._input_statistics = input_statistics
        self._hooks = ExitStack()
        self._inputs: Tensor | Mapping[str, Any] | None = None  # of the encoder; None before a batch has reached it
        self._batch: Batch = {}
        self._state = 0
        self._rows: list[Tensor] = []
        self._sample: Sampled | None = None

    def __enter__(self) -> Self:
        handles = [self.backbone.register_forward_pre_hook(self._before_encoder, with_kwargs=True)]
        handles += self.backbone.register_block_hooks(self.collect)
        handles += [self._stop_after.register_forward_hook(self._after_encoder)]
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> tuple[Tensor, Sampled]:
        """Send a batch through the model.

        Returns:
            Rows before the first block and after every block, (L + 1, R, D), or after every block only, (L, R, D); and
            which tokens of which tile they are.

        Raises:
            TilesError: If the tiles do not have the modalities or bands of the encoder when they reach it.
        """
        self._batch, self._inputs, self._state, self._rows, self._sample = batch, None, 0, [], None
        try:
            forward(batch)
        except EncoderDone:
            pass
        except Exception as err:
            if self._inputs is None:
                explain(err, self.backbone, batch["image"])
            raise
        assert self._sample is not None
        return torch.stack(self._rows), self._sample

    def collect(self, tokens: Tensor) -> None:
        """Hook of the blocks: the input of the first one, then the raw output of each, (B, N, D)."""
        block, self._state = self._state - 1, self._state + 1
        if block < 0 and not self._include_input:
            return
        if self._sample is None:  # only the tokens themselves show how many there are
            assert self._inputs is not None
            layout = self.backbone.layout(self._inputs, tokens.shape[-2])
            self._sample = self._sampler.sample(self._batch, tokens.shape[0], layout, tokens.device)
        output = tokens if self._readout is None or block < 0 else self._readout(block, tokens)
        self._rows.append(self._sample.gather(output))

    def _before_encoder(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._inputs = inputs = args[0] if args else next(iter(kwargs.values()))
        check_input(self.backbone, inputs)
        if self._input_statistics is not None:
            self._input_statistics.add(inputs, self._batch["valid"], self._batch["position"])
        if isinstance(inputs, Mapping):
            images = {name: part for name, part in inputs.items() if isinstance(part, Tensor) and part.ndim >= 4}
            self.input_shape = {name: tuple(part.shape[1:]) for name, part in images.items()}
        else:
            self.input_shape = tuple(inputs.shape[1:])

    def _after_encoder(self, _module: nn.Module, _args: object, _output: object) -> None:
        raise EncoderDone
