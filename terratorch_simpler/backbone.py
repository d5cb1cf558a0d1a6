"""SimplerBackbone: an encoder that can lose blocks and width and still answers as if it had all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders import (
    BlockPathAdapter,
    EncoderAdapter,
    HostSettings,
    InputShape,
    Layout,
    Narrowing,
    find_adapter,
)
from terratorch_simpler.encoders.qkv import narrow_heads_can_be_split
from terratorch_simpler.errors import CheckpointError, ConfigurationError, DepthError, PlanError
from terratorch_simpler.plan import LARGEST_DEPTH, SlimmingPlan, feature_position, is_width, resolve_keep, resolve_width
from terratorch_simpler.recovery import LARGEST_WIDTH, SpanMap, TokenMap, spans_between

KEPT_KEY = "kept_blocks"
DEPTH_KEY = "total_blocks"
WIDTHS_KEY = "kept_widths"
REPAIRED_KEY = "repaired"
SHAPE_KEYS = (KEPT_KEY, DEPTH_KEY, WIDTHS_KEY, REPAIRED_KEY)
"""Buffers that tell the shape; the last two are there only if there is something to tell."""
MOST_WIDTHS = 100
"""At which one encoder is trained; nobody waits for as many."""


class Shape(NamedTuple):
    """What is left of an encoder, as a checkpoint says it.

    Attributes:
        kept: Kept blocks, numbered as in the intact encoder.
        total: Blocks of the intact encoder.
        width: Kept share of the units of every attention head and MLP.
        trained_widths: Widths at which the same weights were trained; empty after ordinary training.
        repaired: Maps in the place of dropped ranges: the state before the range (0 is the input of the first block, l the
            output of block l), the width of a token, and whether class and register tokens have a map of their own.
    """

    kept: tuple[int, ...]
    total: int
    width: float = 1.0
    trained_widths: tuple[float, ...] = ()
    repaired: tuple[tuple[int, int, int], ...] = ()


class SimplerBackbone(nn.Module):
    """An encoder for TerraTorch's factories that can be cut in place.

    Feature i of the intact encoder is answered by kept block ceil((i + 1) k / L) - 1, so the list of features keeps its
    length and necks, indices and decoders built for the intact encoder go on working. The final norm follows the last
    kept block, so every index that maps to it receives the normed tensor, as in an encoder built with k blocks.
    When nothing is cut the features are those of the inner encoder, bit for bit.

    The kept blocks, and a width below 1, are buffers, so every checkpoint says what shape it has; loading one cuts, or grows
    back, to match before the weights of the blocks are read. One that was trained at several widths is loaded at the width
    that the backbone was built with.

    Args:
        encoder: Encoder of a supported family, with all its blocks.
        name: Its name in TerraTorch's registry; by default the name of its class.
        out_indices: Blocks whose features are returned, numbered as in the intact encoder; by default those that the
            encoder returns in TerraTorch (all, the last, or the last three).
        keep: First n blocks, or block numbers (0-based), to keep from the start.
        plan: A plan, or the path of a plan.json, to apply from the start.
        width: Share of the units of every attention head and MLP to keep from the start.
        pretrained: Whether the encoder holds pretrained weights; None if unknown.
        block_path: Path of the blocks of an encoder of no supported family, such as ``vit.blocks``.

    Raises:
        UnsupportedEncoderError: If the encoder is of no supported family, has no equal blocks at ``block_path``, or has
            layers whose width cannot be cut.
        ConfigurationError: If ``width`` is no number above 0 and at most 1, or both ``width`` and ``plan`` are given.
        DepthError: If ``keep`` or ``out_indices`` do not fit the encoder, or both ``keep`` and ``plan`` are given.
        PlanError: If the plan is damaged or made for another encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        name: str | None = None,
        out_indices: Sequence[int] | None = None,
        keep: int | Sequence[int] | None = None,
        plan: SlimmingPlan | str | Path | None = None,
        pretrained: bool | None = None,
        block_path: str | None = None,
        width: float = 1.0,
    ) -> None:
        """Take over an encoder."""
        super().__init__()
        self._adapter = find_adapter(encoder) if block_path is None else _by_path(encoder, block_path)
        self.full_num_blocks = len(self._adapter.blocks(encoder))
        # Negative indices count from the end of the intact encoder.
        self._out_indices = tuple(int(i) for i in self._adapter.feature_blocks(encoder, out_indices))
        channels = self._adapter.out_channels(encoder)
        self._adapter.prepare(encoder)
        self.encoder = encoder
        self.name = name or type(encoder).__name__
        self.pretrained = pretrained
        for index in self._out_indices:
            feature_position(index, self.full_num_blocks, self.full_num_blocks)  # refuses what does not exist
        self.out_channels = [channels[i] for i in self._out_indices]
        self._plan: SlimmingPlan | None = None
        self.register_buffer(DEPTH_KEY, torch.tensor(self.full_num_blocks))
        self._set_kept(tuple(range(self.full_num_blocks)))
        self._set_widths(1.0, ())
        self.recovery = nn.ModuleDict()
        self._repaired: tuple[tuple[int, int, int], ...] = ()
        self._handles: list[RemovableHandle] = []
        self._wanted_width: float | None = None
        self.register_load_state_dict_pre_hook(_match_checkpoint)
        self.register_load_state_dict_post_hook(_narrow_loaded)
        width = resolve_width(width)
        if width != 1 and plan is not None:
            msg = f"Found both width {width} and a plan, expected one of them: remove backbone_width or backbone_plan."
            raise ConfigurationError(msg)
        if keep is not None and plan is not None:
            msg = f"Found both keep {keep} and a plan, expected one of them: remove backbone_keep or backbone_plan."
            raise DepthError(msg)
        if keep is not None:
            self.keep_blocks(resolve_keep(keep, self.full_num_blocks))
        if plan is not None:
            self.slim(plan if isinstance(plan, SlimmingPlan) else SlimmingPlan.load(plan))
        self.set_width(min(width, self.width))

    @property
    def plan(self) -> SlimmingPlan | None:
        """The plan that was applied, or None."""
        return self._plan

    @property
    def kept(self) -> tuple[int, ...]:
        """Kept blocks in the numbering of the intact encoder, 0-based."""
        return self._kept

    @property
    def num_blocks(self) -> int:
        """Number of kept blocks."""
        return len(self._kept)

    @property
    def width(self) -> float:
        """Kept share of the units of every attention head and MLP."""
        return self._width

    @property
    def trained_widths(self) -> tuple[float, ...]:
        """Widths at which the present weights were trained together; empty after ordinary training."""
        return self._trained_widths

    @property
    def shape(self) -> Shape:
        """What is left of the encoder."""
        return Shape(self._kept, self.full_num_blocks, self._width, self._trained_widths, self._repaired)

    @property
    def family(self) -> str:
        """Family of the encoder."""
        return self._adapter.family

    @property
    def fewest_blocks(self) -> int:
        """Fewest blocks that an encoder of this family works with."""
        return self._adapter.fewest_blocks

    @property
    def feature_positions(self) -> tuple[int, ...]:
        """Which kept block answers each feature."""
        return tuple(self._positions)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The kept blocks, in order."""
        return self._adapter.blocks(self.encoder)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches in a block's output: class, register and prompt tokens."""
        return self._adapter.prefix_tokens(self.encoder)

    @property
    def input_shape(self) -> InputShape | None:
        """Shape of one native input: (C, H, W), (C, T, H, W), or one of these for each modality; None if unknown."""
        return self._adapter.input_shape(self.encoder)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm that follows the last kept block; None if there is none."""
        return self._adapter.final_norm(self.encoder)

    def host_settings(self) -> HostSettings | None:
        """How TerraTorch itself can build the encoder as it stands; None if it has no setting for it."""
        expressible = self._width == 1 and not self._repaired
        return self._adapter.host_settings(self.encoder, self._positions) if expressible else None

    def without_prompts(self) -> AbstractContextManager[object]:
        """Run the encoder as it was pretrained, without the visual prompts that will be tuned."""
        return self._adapter.without_prompts(self.encoder)

    def watch(self, seen: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Tell what enters the first kept block, and the raw output of every kept block, each time the encoder runs.

        Args:
            seen: Called with tokens (B, N, D): once before the first block, then once for every block, in order.

        Returns:
            Handles that end it.
        """
        return self._adapter.watch(self.encoder, seen)

    def layout(self, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """What the tokens of a block's output stand for.

        Args:
            inputs: First argument of the encoder.
            length: Number of tokens.
        """
        return self._adapter.layout(self.encoder, inputs, length)

    def num_parameters(self) -> int:
        """Parameters of the encoder as it stands now, maps in the place of dropped blocks included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Features of the encoder; arguments, coordinates among them, go to it unchanged.

        Returns:
            One entry per requested index, shaped as the encoder does it: tokens (B, N, D), images (B, D, h, w), or a
            dictionary of modalities; indices that share a kept block share a tensor.
        """
        return self._adapter.features(self.encoder, self._positions, args, kwargs)

    def slim(self, plan: SlimmingPlan) -> tuple[int, ...]:
        """Cut the encoder in place and free what is dropped.

        Args:
            plan: What to keep.

        Returns:
            The kept blocks.

        Raises:
            PlanError: If the plan was made for another encoder, or lacks the maps of its recovery.
            DepthError: If a block to keep has been dropped before.
            ConfigurationError: If the encoder is narrower than the plan.
            RecoveryError: If no map fits the encoder.
        """
        plan.check_encoder(self.name, self.full_num_blocks)
        if plan.recovery != "none" and plan.maps is None:
            msg = (
                f"Found a plan with recovery {plan.recovery} and no maps, expected them: load it from its file, beside "
                "which they lie."
            )
            raise PlanError(msg)
        self.keep_blocks(plan.kept_blocks)
        self.set_width(plan.width)
        self._repair(plan.maps or {})
        self._plan = plan
        return self.kept

    def keep_blocks(self, blocks: Sequence[int]) -> None:
        """Drop all blocks but these.

        Args:
            blocks: Blocks to keep, numbered as in the intact encoder.

        Raises:
            DepthError: If one does not exist or has been dropped before, or they are too few for the encoder.
            ConfigurationError: If adapters (LoRA) were asked for in some blocks only and none of these is kept.
        """
        kept = resolve_keep(list(blocks), self.full_num_blocks)
        if len(kept) < self.fewest_blocks:
            msg = (
                f"Found {len(kept)} blocks to keep, expected at least {self.fewest_blocks} for {self.family}: "
                f"{self._adapter.why_fewest}."
            )
            raise DepthError(msg)
        if gone := sorted(set(kept) - set(self._kept)):
            msg = f"Found blocks {gone} to keep, expected some of {list(self._kept)}, the blocks this encoder still holds."
            raise DepthError(msg)
        named = self._blocks_named_by_peft()
        if named and not named & set(kept):
            msg = (
                f"Found adapters (LoRA) in blocks {sorted(named)} only, expected some in the kept blocks {list(kept)}: "
                "adapters are dropped with their blocks: change layers_to_transform, or keep more blocks."
            )
            raise ConfigurationError(msg)
        if kept != self._kept:
            self._reshape(kept)

    def set_width(self, width: float) -> None:
        """Keep the first units of every attention head and MLP, and free the others.

        Args:
            width: Share of the units of the intact encoder, in (0, 1]; at least one is kept, a pair where they are rotated.

        Raises:
            ConfigurationError: If it is no such number, the encoder is narrower already, or its weights were trained at
                several widths and this is none of them.
            UnsupportedEncoderError: If the encoder has layers whose width cannot be cut exactly.
        """
        width = resolve_width(width)
        if width > self._width:
            msg = (
                f"Found width {width:g} for an encoder of width {self._width:g}, expected at most that: what was dropped is "
                "gone, build the encoder anew."
            )
            raise ConfigurationError(msg)
        if self._trained_widths and width not in self._trained_widths:
            msg = (
                f"Found width {width:g} for weights that were trained at {_listed(self._trained_widths)}, expected one of "
                "these: change the width."
            )
            raise ConfigurationError(msg)
        if width != self._width:
            self._plan = None  # it described another shape
            self._narrow(width)
            self._set_widths(width, ())

    def _repair(self, maps: Mapping[int, SpanMap]) -> None:
        """Put linear maps in the place of dropped ranges, by the state before each; none takes those away that are there."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recovery.clear()
        self._buffers.pop(REPAIRED_KEY, None)
        self._repaired = ()
        device = self.get_buffer(DEPTH_KEY).device
        # Where the encoder is frozen (LoRA, freeze_backbone), so is what stands for a part of it.
        trainable = all(parameter.requires_grad for parameter in self.blocks.parameters())
        prefix = self.prefix_tokens
        for before, span_map in maps.items():
            token_map = TokenMap(span_map, prefix).to(device).requires_grad_(trainable)
            position = self._kept.index(before - 1) if before else -1
            self._handles.append(self._adapter.insert(self.encoder, position, token_map))
            self.recovery[str(before)] = token_map
        if maps:
            self._repaired = tuple((before, len(one.patch), int(one.special is not None)) for before, one in maps.items())
            self.register_buffer(REPAIRED_KEY, torch.tensor(self._repaired, device=device))

    def at_width(self, width: float) -> Narrowing:
        """What changes at another width, to be lent for single forward passes.

        Args:
            width: Share of the units of the intact encoder, at most what is kept.
        """
        return Narrowing(self.blocks, resolve_width(width))

    def mark_trained_widths(self, widths: Sequence[float]) -> None:
        """Have checkpoints say at which widths their weights were trained together.

        Args:
            widths: The widths, of which the largest is the present one.
        """
        self._set_widths(self._width, tuple(widths))

    def match_checkpoint(self, shape: Shape) -> None:
        """Take the shape of a checkpoint, growing what is missing; its weights are to be loaded next.

        Args:
            shape: That of the checkpoint.

        Raises:
            CheckpointError: If the intact encoder is of another depth than this one.
            UnsupportedEncoderError: If it is of another width, and this encoder cannot be.
        """
        if shape.total != self.full_num_blocks:
            msg = (
                f"Found a checkpoint of an encoder with {shape.total} blocks, expected one of '{self.name}' with "
                f"{self.full_num_blocks}: give the configuration the checkpoint was trained with."
            )
            raise CheckpointError(msg)
        kept = resolve_keep(list(shape.kept), self.full_num_blocks)
        if (kept, shape.width, shape.repaired) != (self._kept, self._width, self._repaired):
            self._plan = None  # it described another shape
        if kept != self._kept:
            self._reshape(kept)
        if shape.width != self._width:
            self._narrow(shape.width)
        self._set_widths(shape.width, shape.trained_widths)
        if shape.repaired != self._repaired:
            self._repair({before: _blank_map(width, bool(special)) for before, width, special in shape.repaired})

    def _narrow(self, width: float) -> None:
        Narrowing(self.blocks, width).apply()

    def _set_widths(self, width: float, trained: Sequence[float]) -> None:
        self._width, self._trained_widths = width, tuple(trained)
        self._buffers.pop(WIDTHS_KEY, None)
        if trained or width != 1:
            # As bits: precisions such as bf16-true would round a buffer of floating-point numbers.
            bits = torch.tensor(trained or [width], dtype=torch.float64).view(torch.int64)
            self.register_buffer(WIDTHS_KEY, bits.to(self.get_buffer(DEPTH_KEY).device))

    def _reshape(self, kept: tuple[int, ...]) -> None:
        # A block that is not there any more is grown as a copy of the first one: same shape, weights to be loaded.
        self._repair({})  # maps stand for what is dropped now
        held = {block: position for position, block in enumerate(self._kept)}
        self._adapter.rearrange(self.encoder, [held.get(block, 0) for block in kept])
        self._set_kept(kept)

    def _set_kept(self, kept: tuple[int, ...]) -> None:
        self._kept = kept
        device = self.get_buffer(DEPTH_KEY).device
        self.register_buffer(KEPT_KEY, torch.tensor(kept, device=device))
        self._positions = [feature_position(i, len(kept), self.full_num_blocks) for i in self._out_indices]

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """Configuration of the adapters, which PEFT leaves here once it has put them into the blocks."""
        if "_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")  # PEFT asks whether there is one
        return self._peft_config

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, Any]) -> None:
        self._peft_config = configs
        named = self._blocks_named_by_peft()
        if not named or self.num_blocks == self.full_num_blocks:
            return
        # PEFT counts the blocks it finds, which is the numbering of the intact encoder only without gaps.
        if self._kept != tuple(range(self.num_blocks)):
            msg = (
                f"Found adapters (LoRA) for blocks {sorted(named)} of an encoder cut to blocks {list(self._kept)}, expected "
                "no block numbers where blocks in between are gone: remove layers_to_transform."
            )
            raise ConfigurationError(msg)
        if gone := sorted(named - set(self._kept)):
            msg = (
                f"Found adapters (LoRA) for blocks {gone}, expected some of {list(self._kept)}, the blocks this encoder "
                "still holds: change layers_to_transform."
            )
            raise ConfigurationError(msg)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self._peft_config  # PEFT does so when it merges

    def _blocks_named_by_peft(self) -> set[int]:
        """Blocks that adapters are limited to, numbered as in the intact encoder; none if there is no limit."""
        stack = next(name for name, part in self.named_modules() if part is self.blocks).rpartition(".")[2]
        named: set[int] = set()
        for config in getattr(self, "peft_config", {}).values():
            layers = getattr(config, "layers_to_transform", None)
            named |= {layers} if isinstance(layers, int) else set(layers or ())
            targets = getattr(config, "target_modules", None) or ()
            for target in [targets] if isinstance(targets, str) else targets:
                named |= {int(number) for number in re.findall(rf"{re.escape(stack)}\\?\.(\d+)", target)}
        return named

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Its parts; TerraTorch, which splits query, key and value while it walks through them, may split narrow ones."""
        with narrow_heads_can_be_split() if self.width < 1 else nullcontext():
            yield from super().named_modules(*args, **kwargs)

    def freeze(self) -> None:
        """Freeze the encoder, the way the encoder itself does it if it has one (Prithvi keeps VPT prompts trainable)."""
        if callable(getattr(self.encoder, "freeze", None)):
            self.encoder.freeze()  # type: ignore[operator]
        else:
            self.encoder.requires_grad_(False)
        self.recovery.requires_grad_(False)

    def __getattr__(self, name: str) -> Any:
        """Offer ``prepare_features_for_image_model`` only if the encoder does: TerraTorch asks whether it exists."""
        if name == "prepare_features_for_image_model":
            return getattr(self.encoder, name)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Name, depth and width."""
        return f"name={self.name}, num_blocks={self.num_blocks} of {self.full_num_blocks}, width={self.width:g}"


def _by_path(encoder: nn.Module, path: str) -> EncoderAdapter:
    adapter = BlockPathAdapter(path)
    adapter.matches(encoder)  # says what is wrong with the path
    return adapter


def shape_in_checkpoint(state_dict: Mapping[str, Tensor], source: str) -> Shape:
    """Shape of the encoder that a checkpoint says it has.

    Args:
        state_dict: Weights of a whole model.
        source: Where they came from, for messages.

    Raises:
        CheckpointError: If there is no SimplerBackbone in it, or what it says is damaged.
    """
    for key, kept in state_dict.items():
        if (
            key.rpartition(".")[2] == KEPT_KEY
            and (total := state_dict.get(key.removesuffix(KEPT_KEY) + DEPTH_KEY)) is not None
        ):
            blocks, number = _plain_depth(kept, total, source)
            widths = _plain_widths(state_dict.get(key.removesuffix(KEPT_KEY) + WIDTHS_KEY), source)
            repaired = _plain_repairs(state_dict.get(key.removesuffix(KEPT_KEY) + REPAIRED_KEY), blocks, number, source)
            return Shape(blocks, number, widths[-1], widths if len(widths) > 1 else (), repaired)
    msg = (
        f"Found no '{KEPT_KEY}' in checkpoint {source}, expected one written with a 'simpler_' backbone: remove 'simpler_' "
        "and the callback to go on with it, or start a new run."
    )
    raise CheckpointError(msg)


def _plain_depth(kept: Tensor, total: Tensor, source: str) -> tuple[tuple[int, ...], int]:
    integers = {kept.dtype, total.dtype} <= {torch.int64, torch.int32}
    if kept.ndim != 1 or total.numel() != 1 or not 0 < len(kept) <= LARGEST_DEPTH or not integers:
        msg = (
            f"Found '{KEPT_KEY}' of shape {tuple(kept.shape)} and type {kept.dtype} in checkpoint {source}, expected a list "
            "of block numbers: the checkpoint is damaged, take an earlier one."
        )
        raise CheckpointError(msg)
    blocks, number = [int(block) for block in kept.tolist()], int(total)
    ascending = all(low < high for low, high in zip([-1, *blocks], [*blocks, number], strict=True))
    if not ascending or number > LARGEST_DEPTH:
        msg = (
            f"Found '{KEPT_KEY}' {blocks} of {number} blocks in checkpoint {source}, expected ascending block numbers of "
            "that encoder: the checkpoint is damaged, take an earlier one."
        )
        raise CheckpointError(msg)
    return tuple(blocks), number


def _plain_widths(bits: Tensor | None, source: str) -> tuple[float, ...]:
    if bits is None:
        return (1.0,)
    if bits.ndim == 1 and bits.dtype == torch.int64 and 0 < len(bits) <= MOST_WIDTHS:
        found = bits.cpu().view(torch.float64).tolist()
        if all(map(is_width, found)) and found == sorted(set(found)):
            return tuple(found)
    msg = (
        f"Found '{WIDTHS_KEY}' of shape {tuple(bits.shape)} and type {bits.dtype} in checkpoint {source}, expected the bits "
        "of ascending numbers above 0 and at most 1: the checkpoint is damaged, take an earlier one."
    )
    raise CheckpointError(msg)


def _plain_repairs(
    repaired: Tensor | None, kept: Sequence[int], total: int, source: str
) -> tuple[tuple[int, int, int], ...]:
    if repaired is None:
        return ()
    befores = [before for before, _ in spans_between(kept, total)]
    if repaired.dtype == torch.int64 and repaired.shape == (len(befores), 3) and repaired[:, 0].tolist() == befores:
        found = tuple((int(before), int(width), int(special)) for before, width, special in repaired.tolist())
        if len({width for _, width, _ in found}) == 1 and all(
            0 < width <= LARGEST_WIDTH and special in (0, 1) for _, width, special in found
        ):
            return found
    msg = (
        f"Found '{REPAIRED_KEY}' of shape {tuple(repaired.shape)} and type {repaired.dtype} in checkpoint {source}, "
        "expected a state, a width and a flag for each dropped range: the checkpoint is damaged, take an earlier one."
    )
    raise CheckpointError(msg)


def _blank_map(width: int, special: bool) -> SpanMap:
    """A map whose weights are to be loaded."""
    return SpanMap(torch.eye(width), torch.eye(width) if special else None)


def _match_checkpoint(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _local_metadata: object,
    strict: bool,
    *_lists: list[str],
) -> None:
    """Reshape the backbone to the checkpoint before its children are visited."""
    assert isinstance(module, SimplerBackbone)
    own = {key: state_dict[prefix + key] for key in SHAPE_KEYS if prefix + key in state_dict}
    if not own and not strict:
        return
    shape = shape_in_checkpoint(own, f"at '{prefix}'")
    if shape.total == module.full_num_blocks:  # otherwise that is the clearer thing to say
        _check_shapes(module, state_dict, f"{prefix}encoder.", shape.width)
        _check_maps(shape, state_dict, f"{prefix}recovery.")
    wanted = module.width if shape.trained_widths else shape.width
    if wanted != shape.width and wanted not in shape.trained_widths:
        msg = (
            f"Found a checkpoint trained at {_listed(shape.trained_widths)} for '{module.name}' of width {wanted:g}, "
            "expected one of these: change backbone_width."
        )
        raise CheckpointError(msg)
    module.match_checkpoint(shape)
    module._wanted_width = wanted


def _check_maps(shape: Shape, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Refuse a checkpoint whose maps are not those that it says it has, before room is made for them."""
    for before, width, _ in shape.repaired:
        weight = state_dict.get(f"{prefix}{before}.patch.weight")
        if weight is None or weight.shape != (width, width):
            msg = (
                f"Found no map of {width} x {width} for '{prefix}{before}' in the checkpoint, expected one, since it says "
                "it was repaired: the checkpoint is damaged, take an earlier one."
            )
            raise CheckpointError(msg)


def _narrow_loaded(module: nn.Module, _incompatible: object) -> None:
    """Weights for several widths are in: keep those of the one that the backbone was built with."""
    assert isinstance(module, SimplerBackbone)
    wanted, module._wanted_width = module._wanted_width, None
    if wanted is not None and wanted < module.width:
        module.set_width(wanted)


def _listed(widths: Sequence[float]) -> str:
    return "widths " + ", ".join(f"{width:g}" for width in widths)


def _check_shapes(module: SimplerBackbone, state_dict: Mapping[str, Tensor], prefix: str, width: float) -> None:
    """Refuse a checkpoint of an encoder that differs in more than depth and width."""
    changed = {} if width == module.width else module.at_width(width).shapes()
    for key, value in module.encoder.state_dict(keep_vars=True).items():
        other, shape = state_dict.get(prefix + key), changed.get(id(value), value.shape)
        if other is not None and other.shape != shape:
            msg = (
                f"Found '{prefix}{key}' of shape {tuple(other.shape)} in the checkpoint, expected {tuple(shape)} of "
                f"'{module.name}': give the configuration the checkpoint was trained with."
            )
            raise CheckpointError(msg)
