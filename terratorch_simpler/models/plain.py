"""PlainEncoder: any PyTorch model with transformer blocks, as an encoder that can be compared and pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders import HIERARCHICAL, PLAIN_SPECS, EncoderSpec, InputShape, Layout, StackSpec, known_spec
from terratorch_simpler.errors import DepthError, TilesError, UnsupportedEncoderError
from terratorch_simpler.indices import resolve_keep
from terratorch_simpler.models.backbone import SimplerBackbone


class PlainEncoder(nn.Module):
    """A model of timm, torchvision, transformers, TerraTorch, or of one's own, without changing it.

    It offers what :func:`terratorch_simpler.extraction.measure` asks of a ``SimplerBackbone``. The model may contain its
    vision transformer anywhere; its own forward pass is used.

    Args:
        model: The model.
        blocks: Path of the blocks, as in ``model.get_submodule``; by default they are looked for.
        prefix_tokens: Tokens before the patches in a block's output; by default what the model says, or what remains
            beside the patches.

    Attributes:
        path: Path of the blocks.

    Raises:
        UnsupportedEncoderError: If there is no stack of equal blocks, or more than one.
    """

    pretrained = None  # a plain model does not tell

    def __init__(self, model: nn.Module, blocks: str | None = None, prefix_tokens: int | None = None) -> None:
        super().__init__()
        self.encoder = model
        self.name = type(model).__name__
        # In a tuple, since the part is no second child of this module.
        self._part_and_spec = _find(model, blocks, prefix_tokens)
        self._prefix_tokens = prefix_tokens
        self.full_num_blocks = self.num_blocks
        self.path = next(name for name, part in model.named_modules() if part is self.blocks)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The blocks, in order."""
        part, spec = self._part_and_spec
        return spec.blocks(part)

    @property
    def num_blocks(self) -> int:
        """Number of blocks the model holds now."""
        return len(self.blocks)

    @property
    def fewest_blocks(self) -> int:
        """Fewest blocks that a model of this family works with."""
        return self._part_and_spec[1].fewest_blocks

    @property
    def input_shape(self) -> InputShape | None:
        """Shape of one input, if known."""
        part, spec = self._part_and_spec
        return spec.input_shape(part)

    @property
    def last_called(self) -> nn.Module:
        """Module after which nothing more of the model need run: the last block, unless it is never called itself."""
        called = type(self._part_and_spec[1]).register_block_hooks is EncoderSpec.register_block_hooks
        return self.blocks[-1] if called else self

    def without_prompts(self) -> AbstractContextManager[object]:
        """Run the encoder as it was pretrained, without the visual prompts that will be tuned."""
        part, spec = self._part_and_spec
        return spec.without_prompts(part)

    def register_block_hooks(self, observe: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Call a function with what enters the first block, and with the raw output of every block.

        Args:
            observe: Called with tokens (B, N, D), each time the model runs.

        Returns:
            Handles that end it.
        """

        def check(tokens: Tensor) -> None:
            if not isinstance(tokens, Tensor) or tokens.ndim != 3:
                shape = f" of shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else ""
                msg = (
                    f"The blocks of {self.name} at '{self.path}' pass on a {type(tokens).__name__}{shape}, expected tokens "
                    "of shape (B, N, D): only blocks of a plain vision transformer can be compared."
                )
                raise UnsupportedEncoderError(msg)
            observe(tokens)

        part, spec = self._part_and_spec
        return spec.register_block_hooks(part, check)

    def layout(self, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """What the tokens of a block's output stand for.

        Args:
            inputs: First argument of the model.
            length: Number of tokens.

        Raises:
            TilesError: If the tokens are not prefix tokens and patches.
        """
        part, spec = self._part_and_spec
        layout = spec.layout(part, inputs, length)
        if self._prefix_tokens is not None and isinstance(layout[0], int):
            layout = [self._prefix_tokens, *layout[1:]]
        sizes = [one if isinstance(one, int) else one.tokens for one in layout]
        if sum(sizes) != length:
            msg = (
                f"The blocks of {self.name} return {length} tokens, expected {' + '.join(map(str, sizes))} (prefix tokens "
                "and patches): set prefix_tokens, and let the model see whole images, without masking or dropping patches."
            )
            raise TilesError(msg)
        return layout

    def num_parameters(self) -> int:
        """Parameters of the whole model as it stands now."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model itself."""
        return self.encoder(*args, **kwargs)

    def prune_depth(self, blocks: Sequence[int]) -> None:
        """Drop all blocks but these, in the model itself.

        Args:
            blocks: Blocks to keep, 0-based.

        Raises:
            DepthError: If one does not exist, or they are too few.
        """
        kept = resolve_keep(list(blocks), self.num_blocks)
        part, spec = self._part_and_spec
        if len(kept) < spec.fewest_blocks:
            msg = (
                f"{len(kept)} blocks are too few: {self.name} needs at least {spec.fewest_blocks}, since {spec.why_fewest}."
            )
            raise DepthError(msg)
        if len(kept) < self.num_blocks:
            spec.return_all_features(part)
            spec.select_blocks(part, kept)


Encoder = SimplerBackbone | PlainEncoder
"""What can be measured."""


def _find(model: nn.Module, path: str | None, prefix_tokens: int | None) -> tuple[nn.Module, EncoderSpec]:
    """The outermost part of a model whose family is known and that holds the blocks."""
    parts: dict[str, tuple[nn.Module, EncoderSpec]] = {}
    for name, part in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in parts)
        if not inside and (spec := _spec_of(part)) is not None:
            parts[name] = part, spec
    if path is not None:
        own = StackSpec(path, prefix_tokens)
        own.matches(model)  # says what is wrong with the path
        same = (match for match in parts.values() if match[1].blocks(match[0]) is own.blocks(model))
        return next(same, (model, own))
    if len(parts) == 1:
        return next(iter(parts.values()))
    if parts:
        msg = (
            f"{type(model).__name__} contains {len(parts)} encoders ({', '.join(parts)}), and one is pruned at a time: set "
            "blocks to the path of the blocks of one of them."
        )
        raise UnsupportedEncoderError(msg)
    raise _unsupported(model)


def _spec_of(part: nn.Module) -> EncoderSpec | None:
    return known_spec(part) or next((spec for spec in PLAIN_SPECS if spec.matches(part)), None)


def _unsupported(model: nn.Module) -> UnsupportedEncoderError:
    names = (type(part).__name__ for part in model.modules())
    if hierarchical := next((name for name in names if any(word in name.lower() for word in HIERARCHICAL)), None):
        return UnsupportedEncoderError(
            f"{hierarchical} is hierarchical: resolution and width change between its stages, so that blocks cannot be "
            "dropped from its end. Use an encoder with one stack of equal blocks, such as a ViT."
        )
    stacks = [
        name for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential) and len(part) > 2
    ]
    return UnsupportedEncoderError(
        f"No transformer blocks were recognized in {type(model).__name__}: set blocks to the path of its list of blocks"
        f"{f', such as {stacks[0]!r}' if stacks else ''} (as in model.get_submodule)."
    )
