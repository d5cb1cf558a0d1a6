"""SimplerBackbone: an encoder that is pruned and slimmed in place and returns features as if it were intact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from terratorch_simpler.encoders import (
    BlockPathSpec,
    InputShape,
    Layout,
    Narrowing,
    TerraTorchArguments,
    spec_of,
)
from terratorch_simpler.errors import CheckpointError, ConfigurationError, DepthError, PlanError
from terratorch_simpler.indices import feature_position, resolve_keep, resolve_width
from terratorch_simpler.models.checkpoint import check_weights, refuse_plain_weights
from terratorch_simpler.models.peft import adapter_blocks, check_adapter_blocks
from terratorch_simpler.models.state import EXTRA_KEY, PrunedState, as_widths, pop_state
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.pruning.recovery import LinearRecovery, RecoveryWeights
from terratorch_simpler.pruning.split_qkv import is_narrow, narrow_heads_can_be_split


class SimplerBackbone(nn.Module):
    """An encoder for TerraTorch's factories that can be pruned in place.

    Feature i of the intact encoder is taken from kept block ceil((i + 1) k / L) - 1, so the list of features keeps its
    length, and necks, indices and decoders built for the intact encoder work unchanged. The final norm follows the last
    kept block, so every index that maps to it receives the normed tensor, as in an encoder built with k blocks.
    With all blocks kept, the features are those of the wrapped encoder, bit for bit. Its attributes and methods are
    reachable; ``out_indices`` is in the numbering of the intact encoder.

    The pruned state (kept blocks, width, recovery maps) is the module's extra state, so every checkpoint holds it; loading
    one prunes the encoder, or restores blocks, to match before the weights of the blocks are read. One that was trained at
    several widths is loaded at the width that the backbone was built with. Weights without a pruned state are loaded into
    the present one.

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

    Attributes:
        blocks_given: Whether it was built with ``keep`` or ``plan``: nothing is selected then, even if they are all blocks.

    Raises:
        UnsupportedEncoderError: If the encoder is of no supported family, has no equal blocks at ``block_path``, or has
            layers that cannot be slimmed.
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
        super().__init__()
        self._spec = spec_of(encoder) if block_path is None else BlockPathSpec(block_path)
        self._spec.matches(encoder)  # raises if there are no equal blocks at the path
        self.full_num_blocks = len(self._spec.blocks(encoder))
        # Negative indices count from the end of the intact encoder.
        self._out_indices = tuple(int(i) for i in self._spec.feature_blocks(encoder, out_indices))
        channels = self._spec.out_channels(encoder)
        self._spec.return_all_features(encoder)
        self.encoder = encoder
        self.name = name or type(encoder).__name__
        self.pretrained = pretrained
        self.blocks_given = keep is not None or plan is not None
        for index in self._out_indices:
            feature_position(index, self.full_num_blocks, self.full_num_blocks)  # raises if there is no such block
        self.out_channels = [channels[i] for i in self._out_indices]
        self._plan: SlimmingPlan | None = None
        self._width: float = 1.0
        self._trained_widths: tuple[float, ...] = ()
        self._set_kept(tuple(range(self.full_num_blocks)))
        self.recovery = nn.ModuleDict()
        self._recovered: tuple[tuple[int, int, int], ...] = ()
        self._recovery_handles: list[RemovableHandle] = []
        self._requested_width: float | None = None
        self.register_load_state_dict_pre_hook(_match_checkpoint)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_narrow_loaded)  # type: ignore[no-untyped-call]
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

    @plan.setter
    def plan(self, plan: SlimmingPlan) -> None:
        self._plan = replace(plan, weights=None)  # they are in the encoder, and as large as it

    @property
    def is_given(self) -> bool:
        """Whether blocks or width are given already, so that nothing is to be selected."""
        return self.blocks_given or self.num_blocks < self.full_num_blocks or self.width < 1

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
        """What is left of the encoder, as checkpoints hold it."""
        return PrunedState(self._kept, self.full_num_blocks, self._width, self._trained_widths, self._recovered)

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
        """Positions of the kept blocks that the features are taken from, one for each of ``out_indices``."""
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
        """Arguments with which TerraTorch itself builds the encoder in its present state; None if it has none for it."""
        expressible = self._width == 1 and not self._recovered
        return self._spec.terratorch_kwargs(self.encoder, self._positions) if expressible else None

    def without_prompts(self) -> AbstractContextManager[object]:
        """Run the encoder as it was pretrained, without the visual prompts that will be tuned."""
        return self._spec.without_prompts(self.encoder)

    def register_block_hooks(self, observe: Callable[[Tensor], None]) -> list[RemovableHandle]:
        """Observe the input of the first kept block and the raw output of every kept block, each time the encoder runs.

        Args:
            observe: Called with tokens (B, N, D): once before the first block, then once for every block, in order.

        Returns:
            Handles that remove the hooks.
        """
        return self._spec.register_block_hooks(self.encoder, observe)

    def layout(self, inputs: Tensor | Mapping[str, Any], length: int) -> Layout:
        """Which tokens of a block's output show patches, and which do not.

        Args:
            inputs: First argument of the encoder.
            length: Number of tokens.
        """
        return self._spec.layout(self.encoder, inputs, length)

    def num_parameters(self) -> int:
        """Number of parameters of the encoder in its present state, recovery maps included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Features of the encoder; all arguments are passed on unchanged.

        Returns:
            One entry per index in ``out_indices``, as the encoder returns it: tokens (B, N, D), images (B, D, h, w), or a
            dictionary of modalities; indices that map to the same kept block share a tensor.
        """
        return self._spec.features(self.encoder, self._positions, args, kwargs)

    def slim(self, plan: SlimmingPlan) -> tuple[int, ...]:
        """Apply a plan in place and free what is dropped.

        Args:
            plan: What to keep.

        Returns:
            The kept blocks.

        Raises:
            PlanError: If the plan was made for another encoder, or lacks its recovery maps or distilled weights.
            DepthError: If a block to keep has been dropped before.
            ConfigurationError: If the encoder is narrower than the plan.
            RecoveryError: If a recovery map does not fit the encoder.
        """
        plan.check_encoder(self.name, self.full_num_blocks)
        needed = {"linear": ("maps", plan.maps), "distill": ("weights", plan.weights)}
        what, found = needed.get(plan.recovery, ("", {}))
        if found is None:
            msg = (
                f"Found a plan with recovery {plan.recovery} and no {what}, expected them: load it from its file, beside "
                "which they lie."
            )
            raise PlanError(msg)
        self.prune_depth(plan.kept_blocks)
        self.set_width(plan.width)
        self._insert_recovery(plan.maps or {})
        self._load_distilled(plan.weights or {})
        self.plan = plan
        return self.kept

    def dimensions_by_block(self) -> dict[str, int]:
        """Parameters of the encoder, outside of its blocks, that hold something for each, and in which dimension."""
        return self._spec.dimensions_by_block(self.encoder)

    def prune_depth(self, blocks: Sequence[int]) -> None:
        """Drop all other blocks.

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
        if dropped := sorted(set(kept) - set(self._kept)):
            msg = (
                f"Found blocks {dropped} to keep, expected some of {list(self._kept)}, the blocks this encoder still holds."
            )
            raise DepthError(msg)
        named = adapter_blocks(self)
        if named and not named & set(kept):
            msg = (
                f"Found adapters (LoRA) in blocks {sorted(named)} only, expected some in the kept blocks {list(kept)}: "
                "adapters are dropped with their blocks: change layers_to_transform, or keep more blocks."
            )
            raise ConfigurationError(msg)
        if kept != self._kept:
            self._select_blocks(kept)

    def set_width(self, width: float) -> None:
        """Keep the first units of every attention head and MLP, and free the others.

        Args:
            width: Share of the units of the intact encoder, in (0, 1]; at least one is kept, a pair where they are rotated.

        Raises:
            ConfigurationError: If it is no such number, the encoder is narrower already, or its weights were trained at
                several widths and this is none of them.
            UnsupportedEncoderError: If the encoder has layers that cannot be slimmed exactly.
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
                f"Found width {width:g} for weights that were trained at {as_widths(self._trained_widths)}, expected one of "
                "these: change the width."
            )
            raise ConfigurationError(msg)
        if width != self._width:
            self._plan = None  # the plan described another state
            Narrowing(self.blocks, width).apply()
            self._width, self._trained_widths = width, ()

    def _load_distilled(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of a distillation into the pruned encoder.

        Raises:
            PlanError: If they are of another encoder.
        """
        own = dict(self.encoder.named_parameters())
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                found = "none" if name not in own else f"one of shape {tuple(own[name].shape)}"
                msg = (
                    f"Found weights of shape {tuple(weight.shape)} for '{name}' in the plan, and {found} in '{self.name}', "
                    "expected the same: build the encoder as for the run that made the plan, adapters (LoRA) included."
                )
                raise PlanError(msg)
        with torch.no_grad():
            for name, weight in weights.items():
                own[name].copy_(weight)

    def _insert_recovery(self, maps: Mapping[int, RecoveryWeights]) -> None:
        """Replace the recovery maps; the keys are the states before the dropped ranges."""
        for handle in self._recovery_handles:
            handle.remove()
        self._recovery_handles.clear()
        self.recovery.clear()
        self._recovered = ()
        device = next(self.encoder.parameters()).device
        # Where the encoder is frozen (LoRA, freeze_backbone), its recovery maps are too.
        trainable = all(parameter.requires_grad for parameter in self.blocks.parameters())
        for before, weights in maps.items():
            recovery = LinearRecovery(weights, self.prefix_tokens).to(device).requires_grad_(trainable)
            position = self._kept.index(before - 1) if before else -1
            self._recovery_handles.append(self._spec.insert_after_block(self.encoder, position, recovery))
            self.recovery[str(before)] = recovery
        self._recovered = tuple(
            (before, len(weights.patch), int(weights.special is not None)) for before, weights in maps.items()
        )

    def at_width(self, width: float) -> Narrowing:
        """The slices of another width, to run single forward passes with.

        Args:
            width: Share of the units of the intact encoder, at most what is kept.
        """
        return Narrowing(self.blocks, resolve_width(width))

    def mark_trained_widths(self, widths: Sequence[float]) -> None:
        """Record in checkpoints the widths at which their weights were trained together.

        Args:
            widths: The widths, of which the largest is the present one.
        """
        self._trained_widths = tuple(widths)

    def match_checkpoint(self, state: PrunedState) -> None:
        """Change the encoder to the pruned state of a checkpoint, restoring dropped blocks; its weights must be loaded next.

        Args:
            state: That of the checkpoint.

        Raises:
            CheckpointError: If its intact encoder has another number of blocks.
            UnsupportedEncoderError: If it is of another width, and this encoder cannot be slimmed.
        """
        if state.full_num_blocks != self.full_num_blocks:
            msg = (
                f"Found a checkpoint of an encoder with {state.full_num_blocks} blocks, expected one of '{self.name}' with "
                f"{self.full_num_blocks}: give the configuration the checkpoint was trained with."
            )
            raise CheckpointError(msg)
        kept = resolve_keep(list(state.kept), self.full_num_blocks)
        if (kept, state.width, state.recovered) != (self._kept, self._width, self._recovered):
            self._plan = None  # the plan described another state
        if kept != self._kept:
            self._select_blocks(kept)
        if state.width != self._width:
            Narrowing(self.blocks, state.width).apply()
        self._width, self._trained_widths = state.width, state.trained_widths
        if state.recovered != self._recovered:
            eyes = {before: (torch.eye(width), special) for before, width, special in state.recovered}
            self._insert_recovery(
                {before: RecoveryWeights(eye, eye if special else None) for before, (eye, special) in eyes.items()}
            )

    def _select_blocks(self, kept: tuple[int, ...]) -> None:
        # A block that was dropped before is restored as a copy of the first one: same sizes, its weights are loaded next.
        self._insert_recovery({})  # recovery maps stand for what is dropped now
        self._plan = None  # the plan described another state
        positions = {block: position for position, block in enumerate(self._kept)}
        self._spec.select_blocks(self.encoder, [positions.get(block, 0) for block in kept])
        self._set_kept(kept)

    def _set_kept(self, kept: tuple[int, ...]) -> None:
        self._kept = kept
        self._positions = [feature_position(i, len(kept), self.full_num_blocks) for i in self._out_indices]

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """Configuration of the adapters, which PEFT leaves here once it has put them into the blocks."""
        if "_peft_config" not in self.__dict__:
            raise AttributeError("peft_config")  # PEFT tests for it with hasattr
        return self._peft_config

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, Any]) -> None:
        self._peft_config = configs
        check_adapter_blocks(self)

    @peft_config.deleter
    def peft_config(self) -> None:
        del self._peft_config  # when PEFT merges adapters

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in ``nn.Module``; lets TerraTorch, which splits query, key and value meanwhile, split slimmed ones."""
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
        """The pruned state, for checkpoints: no buffers, since weight averaging averages those."""
        return self.pruned_state.as_tensor()

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: the pre-hook has matched the pruned state before any weights are loaded."""

    def __getattr__(self, name: str) -> Any:
        """Attributes of the encoder, where this module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            encoder = vars(self).get("_modules", {}).get("encoder")  # missing while the module is being copied
            if encoder is None:
                raise
        return getattr(encoder, name)

    def extra_repr(self) -> str:
        """Name, depth and width."""
        return f"name={self.name}, num_blocks={self.num_blocks} of {self.full_num_blocks}, width={self.width:g}"


def _match_checkpoint(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _local_metadata: object, *_strict_and_lists: object
) -> None:
    """Match the pruned state of the checkpoint before the weights of the children are loaded.

    PyTorch passes strict=True whatever the caller asked for, and reports missing keys itself.
    """
    assert isinstance(module, SimplerBackbone)
    state = pop_state(state_dict, prefix, f"at '{prefix}'")
    if state is None:
        refuse_plain_weights(module, state_dict, prefix)
        return
    state_dict[f"{prefix}{EXTRA_KEY}"] = state.as_tensor()
    for name, axis in module.dimensions_by_block().items():
        weight = state_dict.get(f"{prefix}encoder.{name}")
        if weight is not None and weight.shape[axis] == state.full_num_blocks:  # earlier versions left it as it was
            state_dict[f"{prefix}encoder.{name}"] = weight.narrow(axis, 0, len(state.kept))
    if state.full_num_blocks == module.full_num_blocks:  # otherwise match_checkpoint has the clearer message
        check_weights(module, state_dict, prefix, state)
    requested = module.width if state.trained_widths else state.width
    if requested not in (state.width, *state.trained_widths):
        msg = (
            f"Found a checkpoint trained at {as_widths(state.trained_widths)} for '{module.name}' of width {requested:g}, "
            "expected one of these: change backbone_width."
        )
        raise CheckpointError(msg)
    module.match_checkpoint(state)
    module._requested_width = requested


def _narrow_loaded(module: nn.Module, _incompatible: object) -> None:
    """Keep the slices of the width that the backbone was built with, once weights for several widths are loaded."""
    assert isinstance(module, SimplerBackbone)
    requested, module._requested_width = module._requested_width, None
    if requested is not None and requested < module.width:
        module.set_width(requested)


def find_backbone(module: nn.Module) -> SimplerBackbone:
    """The one SimplerBackbone of a task, however deep it is wrapped.

    Raises:
        ConfigurationError: If there is none, or more than one.
    """
    backbones = [part for part in module.modules() if isinstance(part, SimplerBackbone)]
    if len(backbones) == 1:
        return backbones[0]
    if backbones:
        msg = (
            f"Found {len(backbones)} SimplerBackbones in {type(module).__name__}, expected one: prune one encoder at a time."
        )
        raise ConfigurationError(msg)
    arguments = getattr(module, "hparams", {}).get("model_args") or {}
    name = arguments.get("backbone") if isinstance(arguments, dict) else None
    found = f"Found backbone '{name}'" if isinstance(name, str) else "There is no SimplerBackbone"
    msg = (
        f"{found} in {type(module).__name__}, expected one whose name starts with 'simpler_': write "
        f"backbone: simpler_{name if isinstance(name, str) else '<name>'}."
    )
    raise ConfigurationError(msg)
