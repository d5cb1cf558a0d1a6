"""Width slimming: which weights of a block a narrower one holds, in the attention and MLP layers of all families.

An attention layer keeps all its heads and in each the first units of query, key and value, an MLP its first hidden units
(arXiv 2601.22841). Token width, norms and residual stream stay. A narrower layer computes what the whole one does with the
other units at zero and the softmax scale of the narrower head; layers where that does not hold are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from terratorch.models.backbones.clay_v1 import modules as clay
from terratorch.models.backbones.terramind.model import tm_utils as terramind
from terratorch.models.peft_utils import QKVSep
from timm.layers.attention import Attention, AttentionRope
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from terratorch_simpler.errors import UnsupportedEncoderError
from terratorch_simpler.indices import units

INTACT_UNITS = "intact_units"
"""Attribute of a narrowed layer: its units when intact."""
ADAPTERS = {"base_layer", "lora_A", "lora_B"}
"""Parts of a linear layer with LoRA."""


class TensorSlice(NamedTuple):
    """The part of one tensor of a layer that a width keeps."""

    layer: nn.Module
    name: str  # of a parameter or buffer
    dim: int
    positions: Tensor  # along that dimension

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now."""
        return getattr(self.layer, self.name)

    @property
    def shape(self) -> torch.Size:
        """Shape of the kept part."""
        shape = list(self.tensor.shape)
        shape[self.dim] = len(self.positions)
        return torch.Size(shape)


class Narrowing:
    """The slices of tensors and the attributes that bring blocks to another width.

    Args:
        blocks: Transformer blocks.
        width: Share of the intact units of every head and MLP, in (0, 1]. Units that were dropped before are
            restored as copies of the first one, for weights that will be loaded.

    Raises:
        UnsupportedEncoderError: If a block has layers that cannot be slimmed exactly.
    """

    def __init__(self, blocks: Iterable[nn.Module], width: float) -> None:
        """Collect the slices; nothing is changed yet."""
        self.slices: list[TensorSlice] = []
        self.settings: list[tuple[nn.Module, str, Any]] = []  # attributes; None removes an override of a method
        for number, block in enumerate(blocks):
            self._add_block(block, number, width)

    def shapes(self) -> dict[int, torch.Size]:
        """Shapes of the tensors that change, by their ``id``."""
        return {id(part.tensor): part.shape for part in self.slices}

    def apply(self) -> None:
        """Narrow, or restore, in place; dropped units are freed."""
        for layer, name, dim, positions in self.slices:
            tensor = getattr(layer, name)
            taken = tensor.detach().index_select(dim, positions)
            if isinstance(tensor, nn.Parameter):
                tensor.grad = None
                tensor.data = taken  # the same object, so an existing optimizer keeps training it
            else:
                setattr(layer, name, taken)
        for layer, name, value in self.settings:
            _set(layer, name, value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Narrow inside the context, by slices of the weights: gradients reach the full tensors."""
        tensors = [(_tensors_of(part), part.name, part.tensor) for part in self.slices]
        before = [(layer, name, vars(layer).get(name)) for layer, name, _ in self.settings]
        try:
            for part, (holder, name, tensor) in zip(self.slices, tensors, strict=True):
                holder[name] = tensor.index_select(part.dim, part.positions)
            for layer, name, value in self.settings:
                _set(layer, name, value)
            yield
        finally:
            for holder, name, tensor in tensors:
                holder[name] = tensor
            for layer, name, value in before:
                _set(layer, name, value)

    def _add_block(self, block: nn.Module, number: int, width: float) -> None:
        attentions = [part for part in block.modules() if _kind(part) in ATTENTIONS]
        mlps = [part for part in block.modules() if _kind(part) in MLPS]
        known = {id(value) for part in (*attentions, *mlps) for value in part.parameters()}
        # Whatever else holds a matrix may have a width of its own.
        odd = [name for name, value in block.named_parameters() if value.ndim > 1 and id(value) not in known]
        if odd or not attentions or not mlps:
            raise _unsupported(f"'{odd[0]}'" if odd else type(block).__name__, number)
        for part in attentions:
            self._add_attention(part, ATTENTIONS[_kind(part)], number, width)
        for part in mlps:
            self._add_mlp(part, MLPS[_kind(part)], number, width)

    def _add_attention(self, part: Any, kind: _Attention, number: int, width: float) -> None:
        joined, out = getattr(part, kind.joined), getattr(part, kind.out)
        layers = [out, *([joined] if joined is not None else [part.q_proj, part.k_proj, part.v_proj])]
        biases = [name for name in ("q_bias", "k_bias", "v_bias") if getattr(part, name, None) is not None]
        _check_parts(part, [*layers, *biases], kind.untouched, number)
        heads = int(getattr(part, kind.heads))
        if heads != getattr(part, "num_kv_heads", heads):
            raise _unsupported(f"{type(part).__name__} with fewer heads for keys than for queries", number)
        now = out.in_features // heads
        intact = getattr(part, INTACT_UNITS, now)
        # A rotation turns two units of a head at a time: pairs stay together. They are neighbours, or a half apart.
        after = 2 * units(intact // 2, width) if kind.rotary else units(intact, width)
        halves = 2 if kind.rotary and getattr(part, "rotate_half", kind.halves) else 1
        head = _repeat_positions(_first_positions(now // halves, after // halves), now // halves, halves)
        index = _repeat_positions(head, now, heads)
        for layer in layers[1:]:
            self._slice_outputs(layer, index, 3 if joined is not None else 1, number)
        for name in biases:
            self.slices.append(TensorSlice(part, name, 0, _tensor(index, getattr(part, name))))
        self._slice_inputs(out, index, number)
        sizes = {"head_dim": after, "attn_dim": after * heads, "kv_dim": after * heads, "scale": after**-0.5}
        self.settings += [(part, name, value) for name, value in sizes.items() if hasattr(part, name)]
        self.settings.append((part, INTACT_UNITS, intact))
        if kind.replacement is not None:
            self.settings.append((part, kind.method, partial(kind.replacement, part) if after < intact else None))

    def _add_mlp(self, part: nn.Module, kind: _Mlp, number: int, width: float) -> None:
        inputs: list[Any] = [part.get_submodule(name) for name in kind.inputs]
        out: Any = part.get_submodule(kind.out)
        _check_parts(part, [*inputs, out], kind.untouched, number)
        now = out.in_features
        intact = getattr(part, INTACT_UNITS, now)
        index = _first_positions(now, units(intact, width))
        for layer in inputs:
            self._slice_outputs(layer, index, layer.out_features // now, number)  # twice: gate and value in one matrix
        self._slice_inputs(out, index, number)
        self.settings.append((part, INTACT_UNITS, intact))

    def _slice_outputs(self, layer: Any, index: list[int], copies: int, number: int) -> None:
        """Slice the outputs of a linear layer, which are ``copies`` equal parts (query, key and value; gate and value)."""
        if isinstance(layer, QKVSep):
            for part in (layer.q_linear, layer.k_linear, layer.v_linear):
                self._slice_outputs(part, index, 1, number)
        elif _has_lora(layer, number):
            self._slice_outputs(layer.base_layer, index, copies, number)
            for part in layer.lora_B.values():
                self._slice_outputs(part, index, copies, number)
        else:
            rows = _repeat_positions(index, layer.out_features // copies, copies)
            for name in ("weight", "bias", "bias_mask"):
                if (tensor := getattr(layer, name, None)) is not None:
                    self.slices.append(TensorSlice(layer, name, 0, _tensor(rows, tensor)))
        self.settings.append((layer, "out_features", copies * len(index)))

    def _slice_inputs(self, layer: Any, index: list[int], number: int) -> None:
        """Slice the inputs of a linear layer."""
        if _has_lora(layer, number):
            self._slice_inputs(layer.base_layer, index, number)
            for part in layer.lora_A.values():
                self._slice_inputs(part, index, number)
        else:
            self.slices.append(TensorSlice(layer, "weight", 1, _tensor(index, layer.weight)))
        self.settings.append((layer, "in_features", len(index)))


class _Attention(NamedTuple):
    """How a class of attention layers is made.

    Some reshape the output of the heads to the token width, which equals that of all heads together only in an intact layer:
    ``replacement`` overrides ``method`` in narrowed layers.
    """

    joined: str = "qkv"  # query, key and value in one; None in the layer if they are apart
    out: str = "proj"
    heads: str = "num_heads"
    untouched: tuple[str, ...] = ()
    rotary: bool = False
    halves: bool = False  # the two units that rotation turns are half a head apart, unless the layer says otherwise
    replacement: Callable[..., Tensor] | None = None
    method: str = "forward"


class _Mlp(NamedTuple):
    """How a class of MLPs is made."""

    inputs: tuple[str, ...] = ("fc1",)
    out: str = "fc2"
    untouched: tuple[str, ...] = ()


def _terramind_forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    visible = None if mask is None else ~mask[:, None].to(dtype=torch.bool, device=x.device)  # True in the mask hides
    return _attend(self, *_split_heads(self.qkv(x), self.num_heads), visible)


def _beit_forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    bias = shared_rel_pos_bias
    if self.relative_position_bias_table is not None:
        own = self._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    return _attend(self, *_split_heads(_project_qkv(self, x), self.num_heads), bias)


def _eva_forward(
    self: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    if self.qkv is not None:
        query, key, value = _split_heads(_project_qkv(self, x), self.num_heads)
    else:
        apart = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in apart)
    if (angles := _narrow_angles(self, rope)) is not None:
        first = self.num_prefix_tokens
        query, key = (
            torch.cat(
                [part[:, :, :first], apply_rot_embed_cat(part[:, :, first:], angles, half=self.rotate_half)], dim=2
            ).type_as(value)
            for part in (query, key)
        )
    return _attend(self, query, key, value, attn_mask, is_causal)


def _rope_forward(self: Any, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
    return type(self).forward(self, x, rope=_narrow_angles(self, rope), **kwargs)


def _dinov3_attention(self: Any, qkv: Tensor, attn_bias: None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
    assert attn_bias is None  # Meta's own condition
    query, key, value = _split_heads(qkv, self.num_heads)
    if rope is not None:
        query, key = self.apply_rope(query, key, tuple(_first_angles(part, 2, query.shape[-1] // 2) for part in rope))
    return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _project_qkv(attention: Any, x: Tensor) -> Tensor:
    """Query, key and value, with a bias for queries and values only that timm keeps beside the matrix."""
    if attention.q_bias is None:
        return attention.qkv(x)
    bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    return attention.qkv(x) + bias if attention.qkv_bias_separate else linear(x, attention.qkv.weight, bias)


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, 3 H d) to query, key and value of shape (B, H, N, d)."""
    query, key, value = qkv.reshape(*qkv.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False
) -> Tensor:
    dropped = attention.attn_drop.p if attention.training else 0.0
    # Scaled by the width of these heads; a narrow layer's own scale is the same.
    x = scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropped, is_causal=is_causal)
    return attention.proj_drop(attention.proj(x.transpose(1, 2).flatten(2)))


def _first_angles(rope: Tensor, runs: int, kept: int) -> Tensor:
    """Sines and cosines (..., runs of units) of the first ``kept`` units in every run: those that a narrowed head keeps."""
    return rope.reshape(*rope.shape[:-1], runs, -1)[..., :kept].flatten(-2)


def _narrow_angles(attention: Any, rope: Tensor | None) -> Tensor | None:
    """Of timm's [sines, cosines], each one run if neighbours are turned together, two if the pairs are half a head apart."""
    halves = 2 if attention.rotate_half else 1
    return None if rope is None else _first_angles(rope, 2 * halves, attention.head_dim // halves)


ATTENTIONS: dict[object, _Attention] = {
    Attention: _Attention(),
    AttentionRope: _Attention(rotary=True, replacement=_rope_forward),
    beit.Attention: _Attention(untouched=("relative_position_bias_table",), replacement=_beit_forward),
    eva.EvaAttention: _Attention(rotary=True, replacement=_eva_forward),
    terramind.Attention: _Attention(replacement=_terramind_forward),
    clay.Attention: _Attention("to_qkv", "to_out", "heads", untouched=("norm",)),
    "dinov3.layers.attention.SelfAttention": _Attention(
        rotary=True, halves=True, replacement=_dinov3_attention, method="compute_attention"
    ),
}
MLPS: dict[object, _Mlp] = {
    Mlp: _Mlp(),
    GluMlp: _Mlp(),
    SwiGLU: _Mlp(("fc1_g", "fc1_x")),
    terramind.Mlp: _Mlp(),
    terramind.GatedMlp: _Mlp(("fc1", "fc3")),
    clay.FeedForward: _Mlp(("net.1",), "net.3", untouched=("net.0",)),
    "dinov3.layers.ffn_layers.Mlp": _Mlp(),
    "dinov3.layers.ffn_layers.SwiGLUFFN": _Mlp(("w1", "w2"), "w3"),
}
"""By class, or by the full name of one that the user has to fetch. Subclasses may compute otherwise, so they are others."""


def _kind(part: nn.Module) -> object:
    own = type(part)
    name = f"{own.__module__}.{own.__qualname__}"
    return name if name.startswith("dinov3.") else own


def _check_parts(part: nn.Module, known: Sequence[Any], untouched: tuple[str, ...], number: int) -> None:
    """Refuse norms over units, gates, and whatever else would not be slimmed with the rest."""
    fine = {name for name in known if isinstance(name, str)} | set(untouched)
    layers = [layer for layer in known if isinstance(layer, nn.Module)]
    for layer in layers:
        if not isinstance(layer, QKVSep):
            _has_lora(layer, number)
    held = {id(value) for layer in layers for value in layer.parameters()}
    for name, value in part.named_parameters():
        if id(value) not in held and not any(name == other or name.startswith(f"{other}.") for other in fine):
            raise _unsupported(f"'{name}' in {type(part).__name__}", number)


def _has_lora(layer: Any, number: int) -> bool:
    """Whether it is a linear layer inside one of LoRA; anything but the two is refused."""
    if hasattr(layer, "base_layer"):
        if {name.partition(".")[0] for name, _ in layer.named_parameters()} <= ADAPTERS:
            return True
    elif type(layer) is nn.Linear or type(layer).__name__ == "LinearKMaskedBias":  # DINOv3's
        return False
    raise _unsupported(f"{type(layer).__module__}.{type(layer).__name__}", number)


def _unsupported(found: str, number: int) -> UnsupportedEncoderError:
    return UnsupportedEncoderError(
        f"Found {found} in block {number}, expected attention and MLP layers that can be slimmed exactly: leave the "
        "width at 1.0; the depth can still be pruned."
    )


def _first_positions(now: int, after: int) -> list[int]:
    """Positions of the first units; one that was dropped is a copy of the first."""
    return [unit if unit < now else 0 for unit in range(after)]


def _repeat_positions(index: Sequence[int], size: int, copies: int) -> list[int]:
    """The same positions in each of some parts of a size."""
    return [part * size + position for part in range(copies) for position in index]


def _tensor(index: list[int], like: Tensor) -> Tensor:
    return torch.tensor(index, device=like.device)


def _tensors_of(part: TensorSlice) -> dict[str, Any]:
    """The dictionary of parameters or buffers that holds the tensor."""
    return part.layer._parameters if part.name in part.layer._parameters else part.layer._buffers


def _set(layer: nn.Module, name: str, value: object) -> None:
    if value is None:
        vars(layer).pop(name, None)
    else:
        setattr(layer, name, value)
