"""SimplerBackbone: an encoder that can lose blocks and width and still answers as if it had all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders import (
    BlockPathSpec,
    EncoderSpec,
    InputShape,
    Layout,
    Narrowing,
    TerraTorchArguments,
    spec_of,
)
from terratorch_simpler.errors import CheckpointError, ConfigurationError, DepthError, PlanError
from terratorch_simpler.indices import feature_position, resolve_keep, resolve_width
from terratorch_simpler.models.state import EXTRA_KEY, PrunedState, pop_state
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.pruning.recovery import LinearRecovery, RecoveryWeights
from terratorch_simpler.pruning.split_qkv import is_narrow, narrow_heads_can_be_split


class SimplerBackbone(nn.Module):
    """An encoder for TerraTorch's factories that can be cut in place.

    Feature i of the intact encoder is answered by kept block ceil((i + 1) k / L) - 1, so the list of features keeps its
    length and necks, indices and decoders built for the intact encoder go on working. The final norm follows the last
    kept block, so every index that maps to it receives the normed tensor, as in an encoder built with k blocks.
    When nothing is cut the features are those of the inner encoder, bit for bit. Attributes and methods of the encoder are
    reachable; ``out_indices`` is in the numbering of the intact encoder.

    The kept blocks and the width are the module's extra state, so every checkpoint says what shape it has; loading one cuts,
    or grows back, to match before the weights of the blocks are read. One that was trained at several widths is loaded at
    the width that the backbone was built with. Weights that do not tell a shape are loaded into the present one.

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
        self._spec = spec_of(encoder) if block_path is None else _by_path(encoder, block_path)
        self.full_num_blocks = len(self._spec.blocks(encoder))
        # Negative indices count from the end of the intact encoder.
        self._out_indices = tuple(int(i) for i in self._spec.feature_blocks(encoder, out_indices))
        channels = self._spec.out_channels(encoder)
        self._spec.return_all_features(encoder)
        self.encoder = encoder
        self.name = name or type(encoder).__name__
        self.pretrained = pretrained
        for index in self._out_indices:
            feature_position(index, self.full_num_blocks, self.full_num_blocks)  # refuses what does not exist
        self.out_channels = [channels[i] for i in self._out_indices]
        self._plan: SlimmingPlan | None = None
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
            self.prune_depth(resolve_keep(keep, self.full_num_blocks))
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
    def pruned_state(self) -> PrunedState:
        """What is left of the encoder."""
        return PrunedState(self._kept, self.full_num_blocks, self._width, self._trained_widths, self._repaired)

    @property
    def family(self) -> str:
        """Family of the encoder."""
        return self._spec.family

    @property
    def fewest_blocks(self) -> int:
        """Fewest blocks that an encoder of this family works with."""
        return self._spec.fewest_blocks

    @property
    def out_indices(self) -> list[int]:
        """Blocks whose features are returned, numbered as in the intact encoder."""
        return list(self._out_indices)

    @property
    def feature_positions(self) -> tuple[int, ...]:
        """Which kept block answers each feature."""
        return tuple(self._positions)

    @property
    def blocks(self) -> nn.ModuleList | nn.Sequential:
        """The kept blocks, in order."""
        return self._spec.blocks(self.encoder)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches in a block's output: class, register and prompt tokens."""
        return self._spec.prefix_tokens(self.encoder)

    @property
    def input_shape(self) -> InputShape | None:
        """Shape of one native input: (C, H, W), (C, T, H, W), or one of these for each modality; None if unknown."""
        return self._spec.input_shape(self.encoder)

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm that follows the last kept block; None if there is none."""
        return self._spec.final_norm(self.encoder)

    def terratorch_kwargs(self) -> TerraTorchArguments | None:
        """How TerraTorch itself can build the encoder as it stands; None if it has no setting for it."""
        expressible = self._width == 1 and not self._repaired
        return self._spec.terratorch_kwargs(self.encoder, self._positions) if expressible else None

    def without_prompts(self) -> AbstractContextManager[object]:
        """Run the encoder as it was pretrained, without the visual prompts that will be tuned."""
        return self._spec.without_prompts(self.encoder)

    def register_block_hooks(self, seen: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Tell what enters the first kept block, and the raw output of every kept block, each time the encoder runs.

        Args:
            seen: Called with tokens (B, N, D): once before the first block, then once for every block, in order.

        Returns:
            Handles that end it.
        """
        return self._spec.register_block_hooks(self.encoder, seen)

    def layout(self, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """What the tokens of a block's output stand for.

        Args:
            inputs: First argument of the encoder.
            length: Number of tokens.
        """
        return self._spec.layout(self.encoder, inputs, length)

    def num_parameters(self) -> int:
        """Parameters of the encoder as it stands now, maps in the place of dropped blocks included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Features of the encoder; arguments, coordinates among them, go to it unchanged.

        Returns:
            One entry per requested index, shaped as the encoder does it: tokens (B, N, D), images (B, D, h, w), or a
            dictionary of modalities; indices that share a kept block share a tensor.
        """
        return self._spec.features(self.encoder, self._positions, args, kwargs)

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
        self.prune_depth(plan.kept_blocks)
        self.set_width(plan.width)
        self._repair(plan.maps or {})
        self._plan = plan
        return self.kept

    def prune_depth(self, blocks: Sequence[int]) -> None:
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
                f"{self._spec.why_fewest}."
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

    def _repair(self, maps: Mapping[int, RecoveryWeights]) -> None:
        """Put linear maps in the place of dropped ranges, by the state before each; none takes those away that are there."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.recovery.clear()
        self._repaired = ()
        device = next(self.encoder.parameters()).device
        # Where the encoder is frozen (LoRA, freeze_backbone), so is what stands for a part of it.
        trainable = all(parameter.requires_grad for parameter in self.blocks.parameters())
        prefix = self.prefix_tokens
        for before, span_map in maps.items():
            token_map = LinearRecovery(span_map, prefix).to(device).requires_grad_(trainable)
            position = self._kept.index(before - 1) if before else -1
            self._handles.append(self._spec.insert_after_block(self.encoder, position, token_map))
            self.recovery[str(before)] = token_map
        self._repaired = tuple((before, len(one.patch), int(one.special is not None)) for before, one in maps.items())

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

    def match_checkpoint(self, shape: PrunedState) -> None:
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

    def _reshape(self, kept: tuple[int, ...]) -> None:
        # A block that is not there any more is grown as a copy of the first one: same shape, weights to be loaded.
        self._repair({})  # maps stand for what is dropped now
        held = {block: position for position, block in enumerate(self._kept)}
        self._spec.select_blocks(self.encoder, [held.get(block, 0) for block in kept])
        self._set_kept(kept)

    def _set_kept(self, kept: tuple[int, ...]) -> None:
        self._kept = kept
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
        for name, part in super().named_modules(*args, **kwargs):
            with narrow_heads_can_be_split() if self.width < 1 and is_narrow(part) else nullcontext():
                yield name, part

    def freeze(self) -> None:
        """Freeze the encoder, the way the encoder itself does it if it has one (Prithvi keeps VPT prompts trainable)."""
        if callable(getattr(self.encoder, "freeze", None)):
            self.encoder.freeze()  # type: ignore[operator]
        else:
            self.encoder.requires_grad_(False)
        self.recovery.requires_grad_(False)

    def get_extra_state(self) -> Tensor:
        """The shape, for checkpoints: not as buffers, which averaging of weights would average."""
        return self.pruned_state.as_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing is left to do: the shape has to be there before the weights of the blocks are loaded."""

    def __getattr__(self, name: str) -> Any:
        """Attributes of the encoder, where this module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            encoder = vars(self).get("_modules", {}).get("encoder")  # not there yet while a copy is made
            if encoder is None:
                raise
        return getattr(encoder, name)

    def extra_repr(self) -> str:
        """Name, depth and width."""
        return f"name={self.name}, num_blocks={self.num_blocks} of {self.full_num_blocks}, width={self.width:g}"


def _by_path(encoder: nn.Module, path: str) -> EncoderSpec:
    adapter = BlockPathSpec(path)
    adapter.matches(encoder)  # says what is wrong with the path
    return adapter


def _blank_map(width: int, special: bool) -> RecoveryWeights:
    """A map whose weights are to be loaded."""
    return RecoveryWeights(torch.eye(width), torch.eye(width) if special else None)


def _match_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: object, *_strict_and_lists: object
) -> None:
    """Reshape the backbone to the checkpoint before its children are visited.

    PyTorch always says that loading is strict here, and complains afterwards itself of what is missing.
    """
    assert isinstance(module, SimplerBackbone)
    shape = pop_state(state_dict, prefix, f"at '{prefix}'")
    if shape is None:
        _refuse_plain(module, state_dict, prefix)
        return
    state_dict[f"{prefix}{EXTRA_KEY}"] = shape.as_tensor()
    if shape.total == module.full_num_blocks:  # otherwise that is the clearer thing to say
        _check_shapes(module, state_dict, f"{prefix}encoder.", shape.width)
        _check_blocks(module, state_dict, f"{prefix}encoder.", shape)
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


def _refuse_plain(module: SimplerBackbone, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse the weights of the same encoder without a SimplerBackbone: none of them would be loaded."""
    names = [name for name, _ in module.encoder.named_parameters()]
    plain = sum(f"{prefix}{name}" in state_dict for name in names)
    own = sum(f"{prefix}encoder.{name}" in state_dict for name in names)
    if plain > max(own, len(names) // 2):
        msg = (
            f"The checkpoint holds '{module.name}' without 'simpler_' ({plain} weights at '{prefix}'), expected one written "
            "with it: give the file as backbone_ckpt_path, or load it into the attribute encoder of the backbone."
        )
        raise CheckpointError(msg)


def _check_blocks(module: SimplerBackbone, state_dict: Mapping[str, Any], prefix: str, shape: PrunedState) -> None:
    """Refuse a checkpoint that says its shape but lacks blocks that would have to be grown for it."""
    if (shape.kept, shape.width) == (module.kept, module.width):
        return
    stack = next(name for name, part in module.encoder.named_modules() if part is module.blocks)
    held = {
        key.removeprefix(f"{prefix}{stack}.").partition(".")[0] for key in state_dict if key.startswith(f"{prefix}{stack}.")
    }
    if missing := [block for position, block in enumerate(shape.kept) if str(position) not in held]:
        msg = (
            f"The checkpoint says that '{module.name}' keeps the blocks {list(shape.kept)} and holds no weights of "
            f"{missing}, expected those of all: it is damaged, take an earlier one."
        )
        raise CheckpointError(msg)


def _check_maps(shape: PrunedState, state_dict: Mapping[str, Tensor], prefix: str) -> None:
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
    if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        return  # holds parts of its weights only
    changed = {} if width == module.width else module.at_width(width).shapes()
    for key, value in module.encoder.state_dict(keep_vars=True).items():
        other, shape = state_dict.get(prefix + key), changed.get(id(value), value.shape)
        if other is not None and other.shape != shape:
            msg = (
                f"Found '{prefix}{key}' of shape {tuple(other.shape)} in the checkpoint, expected {tuple(shape)} of "
                f"'{module.name}': give the configuration the checkpoint was trained with."
            )
            raise CheckpointError(msg)
