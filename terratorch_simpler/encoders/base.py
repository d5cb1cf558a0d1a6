"""EncoderSpec, the interface of an encoder family, and the registry of families."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.errors import ConfigurationError, UnsupportedEncoderError
from terratorch_simpler.pruning.recovery import LinearRecovery

HIERARCHICAL = (
    *("swin", "hiera", "pvt", "maxvit", "mvitv2", "poolformer", "edgenext", "convnext", "resnet", "resnext", "regnet"),
    *("densenet", "efficientnet", "mobilenet", "mobilevit"),
)

InputShape = tuple[int, ...] | dict[str, tuple[int, ...]]
"""(C, H, W) or (C, T, H, W) of one image, or that of every modality by name."""


class PatchGrid(NamedTuple):
    """Tokens that stand for patches of one image, in row-major order."""

    size: tuple[int, int, int]  # frames, rows and columns of the image
    patch: tuple[int, int, int]  # of one patch

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        frames, rows, columns = (extent // step for extent, step in zip(self.size, self.patch, strict=True))
        return frames * rows * columns


Layout = list["int | PatchGrid"]
"""Tokens of one image (or set of modalities) in order: numbers of tokens that show no patch, and grids of those that do."""


class TerraTorchArguments(NamedTuple):
    """Arguments with which TerraTorch itself builds a pruned encoder."""

    arguments: dict[str, Any]  # for TerraTorch's encoder of the same name
    num_features: int  # how many features that encoder returns
    positions: list[int]  # position among them of each feature of the pruned encoder


class EncoderSpec(ABC):
    """Where one family of encoders keeps its blocks, and how to prune them. Specs hold no state of an encoder.

    Attributes:
        family: Name for messages.
        fewest_blocks: Fewest blocks that an encoder of this family works with.
        why_fewest: The reason, as a clause.
    """

    family: str
    fewest_blocks: int = 1
    why_fewest: str = ""

    @abstractmethod
    def matches(self, encoder: nn.Module) -> bool:
        """Whether the encoder is of this family."""

    @abstractmethod
    def return_all_features(self, encoder: nn.Module) -> None:
        """Make ``encoder(...)`` return the features after every block it holds, also once it is copied or pickled."""

    @abstractmethod
    def blocks(self, encoder: nn.Module) -> nn.ModuleList | nn.Sequential:
        """Blocks the encoder holds, in order; their outputs are what is compared."""

    @abstractmethod
    def select_blocks(self, encoder: nn.Module, positions: Sequence[int]) -> None:
        """Keep the blocks at the given positions, in that order, with all that belongs to a block; drop the others.

        Attributes of the encoder that describe its depth are updated.

        Args:
            encoder: The encoder, changed in place.
            positions: Positions in the present list; a repeated one becomes a deep copy.
        """

    def dimensions_by_block(self, encoder: nn.Module) -> dict[str, int]:  # noqa: ARG002
        """Parameters outside of the blocks that hold something for each block, by name, and in which dimension."""
        return {}

    @abstractmethod
    def out_channels(self, encoder: nn.Module) -> list[int]:
        """Channels of the features after each block that the encoder holds."""

    @abstractmethod
    def prefix_tokens(self, encoder: nn.Module) -> int:
        """Number of tokens before the patch tokens in a block's output (class, register and prompt tokens)."""

    @abstractmethod
    def patch_size(self, encoder: nn.Module) -> tuple[int, int, int]:
        """Extent of a patch token as (frames, rows, columns) of the input."""

    @abstractmethod
    def input_shape(self, encoder: nn.Module) -> InputShape | None:
        """Shape of one native input, or None if unknown."""

    def feature_blocks(self, encoder: nn.Module, out_indices: Sequence[int] | int | None) -> Sequence[int]:
        """Blocks whose features TerraTorch's encoder returns, in its order, when it is built with ``out_indices``.

        Called on the intact encoder, before :meth:`return_all_features`.

        Args:
            encoder: The encoder, built without ``out_indices``.
            out_indices: ``backbone_out_indices`` of the configuration.
        """
        if out_indices is None:
            return range(len(self.blocks(encoder)))
        return [out_indices] if isinstance(out_indices, int) else list(out_indices)

    def features(
        self,
        encoder: nn.Module,
        positions: Sequence[int],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[Any]:
        """Run the encoder.

        Args:
            encoder: The encoder, after :meth:`return_all_features`.
            positions: Positions of the kept blocks that each feature is selected from.
            args: Positional arguments of the encoder.
            kwargs: Keyword arguments of the encoder.

        Returns:
            One feature for each position, in the shape that the encoder gives it.
        """
        features = encoder(*args, **kwargs)
        return [features[position] for position in positions]

    def final_norm(self, encoder: nn.Module) -> nn.Module | None:
        """The norm that follows the last block; None if the encoder returns the output of its last block without one."""
        del encoder
        return None

    def without_prompts(self, encoder: nn.Module) -> AbstractContextManager[object]:
        """Run the encoder as it was pretrained, without the visual prompts that will be tuned."""
        del encoder
        return nullcontext()

    def terratorch_kwargs(self, encoder: nn.Module, positions: Sequence[int]) -> TerraTorchArguments | None:
        """How TerraTorch itself can build the encoder as it stands.

        Args:
            encoder: The encoder, after :meth:`return_all_features`, pruned.
            positions: Positions of the kept blocks that each feature is selected from.

        Returns:
            The settings; None if TerraTorch has none for the depth of this family.
        """
        del encoder, positions
        return None

    def register_block_hooks(self, encoder: nn.Module, observe: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Observe the input of the first block and the raw output of every block, before any final norm.

        Args:
            encoder: The encoder.
            observe: Called with tokens (B, N, D), each time the encoder runs: once before the first block, then once
                for every block, in order.

        Returns:
            Handles that remove the hooks.
        """

        def after_block(_block: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            # Blocks of older versions of transformers return attention weights as well.
            observe(output if isinstance(output, Tensor) else output[0])

        blocks = list(self.blocks(encoder))
        return [register_input_hook(blocks[0], observe), *(block.register_forward_hook(after_block) for block in blocks)]

    def insert_after_block(self, encoder: nn.Module, position: int, token_map: LinearRecovery) -> RemovableHandle:
        """Apply a linear recovery map to the tokens after a block, each time the encoder runs.

        Args:
            encoder: The encoder.
            position: Position of a kept block; -1 for the input of the first one.
            token_map: The map.

        Returns:
            A handle that removes the hook.

        Raises:
            RecoveryError: If no map fits the encoder.
        """
        blocks = self.blocks(encoder)
        if position < 0:
            return blocks[0].register_forward_pre_hook(token_map.before, with_kwargs=True)
        return blocks[position].register_forward_hook(token_map.after)

    def layout(self, encoder: nn.Module, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """Which tokens of a block's output show patches, and which do not.

        Args:
            encoder: The encoder.
            inputs: Its first argument: a batch of images, or modalities by name.
            length: Number N of tokens of the output.
        """
        del length
        assert isinstance(inputs, Tensor)
        return [self.prefix_tokens(encoder), PatchGrid(image_size(inputs), self.patch_size(encoder))]


def register_input_hook(part: nn.Module, observe: Callable[[Tensor], None]) -> RemovableHandle:
    """Observe the first argument of a module each time it runs."""

    def before(_part: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        observe(args[0] if args else next(iter(kwargs.values())))

    return part.register_forward_pre_hook(before, with_kwargs=True)


def image_size(images: Tensor) -> tuple[int, int, int]:
    """Frames, rows and columns of a batch of images, (B, C, H, W) or (B, C, T, H, W)."""
    frames = images.shape[2] if images.ndim == 5 else 1
    return int(frames), int(images.shape[-2]), int(images.shape[-1])


def select_modules(items: Iterable[nn.Module], positions: Sequence[int]) -> list[nn.Module]:
    """Items at the given positions; a repeated one is copied, so that no two share weights."""
    originals = list(items)
    selected: list[nn.Module] = []
    for number, position in enumerate(positions):
        item = originals[position]
        selected.append(copy.deepcopy(item) if position in positions[:number] else item)
    return selected


def select_prompts(module: Any, positions: Sequence[int]) -> None:
    """Keep the visual prompts of the selected blocks: TerraTorch stores them beside the blocks, by position."""
    if getattr(module, "vpt", False):
        module.vpt_prompt_embeddings = nn.ParameterList(select_modules(module.vpt_prompt_embeddings, positions))
        module.vpt_dropout_layers = nn.ModuleList(select_modules(module.vpt_dropout_layers, positions))


@contextmanager
def prompts_disabled(module: Any) -> Iterator[None]:
    """Make TerraTorch's forward pass skip the visual prompts that it adds to the tokens of each block."""
    before = module.vpt
    module.vpt = False
    try:
        yield
    finally:
        module.vpt = before


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a size that is given as one number or two."""
    rows, columns = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return int(rows), int(columns)


_SPECS: list[EncoderSpec] = []


def register_encoder(spec: EncoderSpec) -> EncoderSpec:
    """Register the spec of a family.

    Raises:
        ConfigurationError: If the family is registered already.
    """
    if any(other.family == spec.family for other in _SPECS):
        msg = f"Found a second encoder spec for family '{spec.family}', expected one: use another family name."
        raise ConfigurationError(msg)
    _SPECS.append(spec)
    return spec


def families() -> tuple[str, ...]:
    """Names of the registered families."""
    return tuple(spec.family for spec in _SPECS)


def known_spec(encoder: nn.Module) -> EncoderSpec | None:
    """Spec of an encoder's family; None if no family matches."""
    return next((spec for spec in _SPECS if spec.matches(encoder)), None)


def spec_of(encoder: nn.Module) -> EncoderSpec:
    """Spec of an encoder's family.

    Raises:
        UnsupportedEncoderError: If no family matches.
    """
    if (spec := known_spec(encoder)) is not None:
        return spec
    msg = (
        f"Found an encoder of class {type(encoder).__name__}, expected one of the families {', '.join(families())}: say "
        "where its blocks are with backbone_block_path, or use its plain name without 'simpler_'."
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
            "hierarchical encoder changes resolution and width between stages, so its depth cannot be pruned; use "
            f"'{name}' without 'simpler_'."
        )
        raise UnsupportedEncoderError(msg)
