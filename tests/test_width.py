"""Width slimming: a narrow encoder computes what the whole one does with the dropped units at zero, in every family."""

import contextlib
import copy
import gc
import inspect
import io
import json
import math
import pickle
import random
import types
import weakref
from fractions import Fraction

import pytest
import timm
import timm.layers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from rich.console import Console
from terratorch.tasks import SemanticSegmentationTask
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.encoders import Narrowing
from terratorch_simpler.errors import CheckpointError, ConfigurationError, ExportError, UnsupportedEncoderError
from terratorch_simpler.export import export_graph, export_plain, load_trained
from terratorch_simpler.extraction import count_macs
from terratorch_simpler.functional.hsic import full_float32
from terratorch_simpler.indices import units
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import read_pruned_state
from terratorch_simpler.models.state import PrunedState
from terratorch_simpler.report import plan_table
from tests.checkpoints import as_buffers, bits, changed, said
from tests.cli_runner import Command, config
from tests.extras import needs_onnx, needs_peft
from tests.families import FAMILIES, wrapped
from tests.test_peft import FAMILIES as LORA
from tests.test_peft import backbone_of, image, lora, model, randomise_adapters

ignored = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)
adapters = pytest.mark.filterwarnings("ignore:You are using PEFT without a pretrained backbone")
WIDTHS = ("1/2", "3/10", "1/100")
PARTS = {"fc1": "fc2", "fc1_g": "fc2", "fc1_x": "fc2", "fc3": "fc2", "w1": "w3", "w2": "w3", "net.1": "net.3"}
"""Layers into the hidden units of an MLP, and the one out of them."""


def layers(block):
    """Attention and MLP of a block."""
    return (block.attn, block.mlp) if hasattr(block, "attn") else tuple(block)


def kept(size: int, width: Fraction) -> int:
    return max(1, math.floor(width * size))


def kept_of_head(attention, size: int, width: Fraction) -> torch.Tensor:
    """Which dimensions of a head are kept; those that a rotation turns, in pairs."""
    mask = torch.zeros(size, dtype=torch.bool)
    if hasattr(attention, "rotate_half"):
        pairs = mask.view(2, -1).T if attention.rotate_half else mask.view(-1, 2)
        pairs[: kept(size // 2, width)] = True
    else:
        mask[: kept(size, width)] = True
    return mask


@torch.no_grad()
def masked(backbone: SimplerBackbone, width: Fraction) -> SimplerBackbone:
    """The whole encoder with units at zero, and queries that undo its softmax scale."""
    whole = copy.deepcopy(backbone)
    for block in whole.blocks:
        attention, mlp = layers(block)
        heads = getattr(attention, "num_heads", None) or attention.heads
        out = getattr(attention, "proj", None) or attention.to_out
        size = out.in_features // heads
        mask = kept_of_head(attention, size, width)
        louder = math.sqrt(size / int(mask.sum()))
        joined = getattr(attention, "qkv", None) or attention.to_qkv
        for values in (joined.weight, joined.bias):
            if values is not None:
                apart = values.view(3, heads, size, -1)
                apart[:, :, ~mask] = 0
                apart[0] *= louder
        for number, name in enumerate(("q_bias", "k_bias", "v_bias")):
            if getattr(attention, name, None) is not None:
                apart = getattr(attention, name).view(heads, size)
                apart[:, ~mask] = 0
                apart *= louder if number == 0 else 1
        out.weight.view(-1, heads, size)[:, :, ~mask] = 0
        named = dict(mlp.named_modules())
        for into, back in PARTS.items():
            if into in named:
                hidden = kept(named[back].in_features, width)
                named[into].weight[hidden:] = 0
                if named[into].bias is not None:
                    named[into].bias[hidden:] = 0
                named[back].weight[:, hidden:] = 0
    return whole


@contextlib.contextmanager
def attention_of(fused: bool):
    before = timm.layers.config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(fused)
    try:
        yield
    finally:
        timm.layers.config._USE_FUSED_ATTN = before


def flat(features):
    for feature in features:
        yield from flat(feature.values()) if isinstance(feature, dict) else [feature]


def answers(backbone, images):
    random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad(), full_float32():  # TerraTorch allows less
        return [feature.double() for feature in flat(backbone(copy.copy(images)))]


def assert_alike(found, expected, tolerance=1e-6):
    assert [part.shape for part in found] == [part.shape for part in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_narrow_encoder_is_the_whole_one_with_units_at_zero(family, fused):
    with attention_of(fused):
        backbone = wrapped(family)
        with torch.no_grad():  # biases start at zero in most
            for name, value in [*backbone.encoder.named_parameters(), *backbone.encoder.named_buffers()]:
                if name.endswith("bias") and value.is_floating_point():
                    value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        images = family.image()
        intact = answers(backbone, images)
        for text in WIDTHS:
            width = Fraction(text)
            narrow = copy.deepcopy(backbone)
            narrow.set_width(float(width))
            found = answers(narrow, images)
            assert_alike(found, answers(masked(backbone, width), images))
            assert not all(torch.equal(a, b) for a, b in zip(found, intact, strict=True))
        with backbone.at_width(float(width)).applied():
            assert all(torch.equal(a, b) for a, b in zip(answers(backbone, images), found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(answers(backbone, images), intact, strict=True))


# --- what a family needs besides: layers that the user has to fetch, and those that cannot be cut


class SelfAttention(torch.nn.Module):
    """An attention layer that is made as Meta's DINOv3 code makes it: the shape of the answer is that of the tokens."""

    __module__ = "dinov3.layers.attention"

    def __init__(self, dim, num_heads, linear):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def apply_rope(self, query, key, rope):
        sine, cosine = rope
        first = query.shape[-2] - sine.shape[-2]

        def turned(part):
            low, high = part[:, :, first:].chunk(2, dim=-1)
            rotated = part[:, :, first:] * cosine + torch.cat([-high, low], dim=-1) * sine
            return torch.cat([part[:, :, :first], rotated], dim=2)

        return turned(query), turned(key)

    def compute_attention(self, qkv, attn_bias=None, rope=None):
        batch, tokens, _ = qkv.shape
        width = self.qkv.in_features
        parts = qkv.reshape(batch, tokens, 3, self.num_heads, width // self.num_heads).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        query, key = self.apply_rope(query, key, rope)
        answer = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return answer.transpose(1, 2).reshape(batch, tokens, width)

    def forward(self, x, attn_bias=None, rope=None):
        return self.proj(self.compute_attention(self.qkv(x), attn_bias=attn_bias, rope=rope))


class LinearKMaskedBias(torch.nn.Linear):
    """Meta's linear layer without bias for keys, by a mask of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        mask = torch.ones(3, sizes[1] // 3)
        mask[1] = 0
        self.register_buffer("bias_mask", mask.flatten())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias * self.bias_mask)


class SwiGLUFFN(torch.nn.Module):
    __module__ = "dinov3.layers.ffn_layers"

    def __init__(self, dim, hidden):
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(dim, hidden), torch.nn.Linear(dim, hidden)
        self.w3 = torch.nn.Linear(hidden, dim)

    def forward(self, x):
        return self.w3(torch.nn.functional.silu(self.w1(x)) * self.w2(x))


class MetaBlock(torch.nn.Module):
    def __init__(self, linear=LinearKMaskedBias):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.mlp = SelfAttention(24, 2, linear), SwiGLUFFN(24, 21)

    def forward(self, x, rope):
        x = x + self.attn(x, rope=rope)
        return x + self.mlp(x)


@pytest.mark.parametrize("text", WIDTHS)
@pytest.mark.parametrize("linear", [LinearKMaskedBias, torch.nn.Linear])
def test_layers_of_metas_dinov3(linear, text):
    block, width = MetaBlock(linear).eval(), Fraction(text)
    block.attn.rotate_half = True  # for the reference alone
    x, angles = torch.randn(2, 10, 24), torch.rand(9, 6).repeat(1, 2)
    rope = (angles.sin(), angles.cos())
    whole = types.SimpleNamespace(blocks=[block])
    reference = masked(whole, width).blocks[0]
    del block.attn.rotate_half
    narrow = copy.deepcopy(block)
    Narrowing([narrow], float(width)).apply()
    with torch.no_grad(), full_float32():
        assert (narrow(x, rope) - reference(x, rope)).abs().max() < 1e-6
    assert narrow.attn.qkv.out_features == 3 * narrow.attn.proj.in_features == 3 * 2 * 2 * kept(6, width)
    assert narrow.mlp.w3.in_features == kept(21, width)
    Narrowing([narrow], 1.0).apply()  # grown for weights to come
    narrow.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert torch.equal(narrow(x, rope), block(x, rope))


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", embed_dim=24, num_heads=2, depth=1, img_size=32, **kwargs).blocks


REFUSED = {
    "'q_norm.weight' in Attention": lambda: vit(qk_norm=True),
    "'norm.weight' in Attention": lambda: vit(scale_attn_norm=True),
    "'norm.weight' in Mlp": lambda: vit(scale_mlp_norm=True),
    r"torch\.nn\.modules\.linear\.Identity": lambda: _with(vit(), "mlp.fc1", torch.nn.Identity()),
    r".*test_width\.Doubled": lambda: _with(vit(), "attn.proj", Doubled(24, 24)),
    "'attn.in_proj_weight' in block 0": lambda: _with(vit(), "attn", torch.nn.MultiheadAttention(24, 2)),
    "'mixer.weight' in block 0": lambda: _with(vit(), "mixer", torch.nn.Conv1d(24, 24, 1)),
    "Sequential in block 0": lambda: [torch.nn.Sequential(torch.nn.LayerNorm(3))],
    "AttentionRope with fewer heads for keys": lambda: _with(
        vit(), "attn", AttentionRope(24, num_heads=4, num_kv_heads=2, qkv_fused=False, attn_head_dim=6)
    ),
}  # fmt: skip
if "num_kv_heads" not in inspect.signature(AttentionRope).parameters:  # timm before 1.0.30
    del REFUSED["AttentionRope with fewer heads for keys"]


class Doubled(torch.nn.Linear):
    """A linear layer that computes otherwise."""


def _with(blocks, path, part):
    parent, _, name = path.rpartition(".")
    setattr(blocks[0].get_submodule(parent), name, part)
    return blocks


@pytest.mark.parametrize("found", REFUSED)
def test_what_cannot_be_cut_exactly_is_refused_by_name(found):
    with pytest.raises(UnsupportedEncoderError, match=f"Found {found}"):
        Narrowing(REFUSED[found](), 0.5)


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param({"rotate_half": False}, id="neighbours are turned"),
        pytest.param({"rotate_half": True}, id="halves are turned"),
        pytest.param({"qkv_fused": False, "rotate_half": True}, id="query, key and value apart"),
    ],
)
@pytest.mark.parametrize("kind", [AttentionRope, EvaAttention])
def test_rotated_heads_keep_pairs(kind, attention):
    torch.manual_seed(0)
    blocks = _with(vit(), "attn", kind(24, num_heads=2, num_prefix_tokens=1, **({"scale_norm": False} | attention)))
    layer = blocks[0].attn.eval()
    rope = torch.randn(9, 24)  # sines and cosines of 12 units
    x = torch.randn(2, 10, 24)
    narrow = copy.deepcopy(blocks)
    Narrowing(narrow, 0.5).apply()
    # Three pairs of six; the others at zero, and the queries louder.
    keep = torch.zeros(12, dtype=torch.bool)
    keep[[0, 1, 2, 6, 7, 8] if attention["rotate_half"] else [0, 1, 2, 3, 4, 5]] = True
    with torch.no_grad(), full_float32():
        louder = math.sqrt(2)
        parts = [layer.qkv] if layer.qkv is not None else [layer.q_proj, layer.k_proj, layer.v_proj]
        for part in parts:
            part.weight.view(-1, 12, 24)[:, ~keep] = 0
            if part.bias is not None:
                part.bias.view(-1, 12)[:, ~keep] = 0
        if layer.qkv is None:
            parts[0].weight *= louder
            parts[0].bias *= louder
        else:
            parts[0].weight[:24] *= louder
            if parts[0].bias is not None:
                parts[0].bias[:24] *= louder
        layer.proj.weight.view(24, 2, 12)[:, :, ~keep] = 0
        found, expected = narrow[0].attn.eval()(x, rope=rope), layer(x, rope=rope)
    assert (found - expected).abs().max() < 1e-6


# --- what a width is


@pytest.mark.parametrize("width", [0, 0.0, -0.5, 1.0000001, 2, float("nan"), float("inf"), True, "wide", [0.5], None])
def test_what_is_no_width_is_refused(build, width):
    message = r"Found width .*, expected a number above 0 and at most 1: change the width"
    with pytest.raises(ConfigurationError, match=message):
        build().set_width(width)
    with pytest.raises(ConfigurationError, match=message):
        SimplerCallback(width=width)
    if width is not None:
        with pytest.raises(ConfigurationError, match=message):
            build(width=width)


def test_no_criterion_chooses_a_width(build):
    with pytest.raises(
        ConfigurationError, match=r"Found width 'auto'.*no criterion chooses a width: compare widths in a sweep"
    ):
        SimplerCallback(width="auto")
    with pytest.raises(ConfigurationError, match=r"Found width 'auto'"):
        build(width="auto")


@pytest.mark.parametrize("text", ["0.5", "1", "1.0"])
def test_width_from_the_command_line_is_text(build, text):
    assert build(width=text).width == float(text)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(1, 10_000), width=st.decimals(0, 1, places=4).filter(lambda d: d > 0))
def test_units_are_those_of_exact_arithmetic(size, width):
    assert units(size, float(width)) == max(1, math.floor(size * Fraction(width)))


def test_a_product_just_below_an_integer_is_that_integer():
    assert 0.29 * 100 < 29  # as Python has it
    assert units(100, 0.29) == 29


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=st.floats(0, 1, exclude_min=True),
    second=st.floats(0, 1, exclude_min=True),
    keep=st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
)
def test_any_width_after_any_other_gives_consistent_layers(build, first, second, keep):
    wide, narrow = sorted([first, second], reverse=True)
    backbone = build("simpler_prithvi_eo_tiny", embed_dim=48, num_heads=4)
    direct = copy.deepcopy(backbone)
    backbone.set_width(wide)
    backbone.prune_depth(keep)
    backbone.set_width(narrow)
    direct.set_width(narrow)
    direct.prune_depth(keep)
    assert backbone.width == narrow
    assert backbone.kept == tuple(sorted(keep))
    for a, b in zip(backbone.state_dict().values(), direct.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for block in backbone.blocks:
        head, hidden = units(12, narrow), units(192, narrow)
        assert block.attn.qkv.weight.shape == (3 * 4 * head, 48) == (block.attn.qkv.out_features, 48)
        assert block.attn.qkv.bias.shape == (3 * 4 * head,)
        assert block.attn.proj.weight.shape == (48, 4 * head) == (48, block.attn.proj.in_features)
        assert (block.attn.head_dim, block.attn.attn_dim, block.attn.scale) == (head, 4 * head, head**-0.5)
        assert block.mlp.fc1.weight.shape == (hidden, 48) == block.mlp.fc2.weight.T.shape
    with torch.no_grad():
        assert all(torch.isfinite(feature).all() for feature in backbone(torch.randn(1, 6, 32, 32)))


def test_what_is_gone_cannot_come_back(build):
    backbone = build(width=0.5)
    backbone.set_width(0.5)
    with pytest.raises(ConfigurationError, match=r"Found width 0.75 for an encoder of width 0.5, expected at most that"):
        backbone.set_width(0.75)


def test_narrowing_frees_what_is_dropped(build):
    backbone = build("simpler_prithvi_eo_tiny")
    weight = backbone.blocks[0].mlp.fc1.weight
    storage = weakref.ref(weight.untyped_storage())
    weight.grad = torch.zeros_like(weight)
    backbone.set_width(0.25)
    gc.collect()
    assert storage() is None
    assert backbone.blocks[0].mlp.fc1.weight is weight  # an optimizer that holds it goes on training it
    assert weight.grad is None
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in backbone.parameters())


def test_the_intact_encoder_is_untouched_by_a_width_of_one(build):
    plain, backbone = build("prithvi_eo_v2_tiny_tl"), build(width=1.0)
    state = backbone.state_dict()
    backbone.set_width(1.0)
    assert "kept_widths" not in said(state["_extra_state"])
    assert all(torch.equal(state[f"encoder.{name}"], value) for name, value in plain.state_dict().items())
    assert not any("intact_units" in vars(part) or "forward" in vars(part) for part in backbone.blocks.modules())


# --- parameters and MACs in closed form


def prithvi_count(width, dim=192, hidden=768, heads=3, blocks=12, tokens=17):
    head, hidden = kept(dim // heads, width), kept(hidden, width)
    inner = heads * head
    weights = dim * 3 * inner + inner * dim + 2 * dim * hidden
    biases = 3 * inner + dim + hidden + dim
    outside = 6 * 16 * 16 * dim  # the patch embedding
    return (
        blocks * (weights + biases + 4 * dim),
        blocks * (tokens * weights + 2 * heads * tokens**2 * head) + (tokens - 1) * outside,
    )


def terramind_count(width, dim=768, hidden=2048, heads=12, blocks=12, tokens=4):
    head, hidden = kept(dim // heads, width), kept(hidden, width)
    weights = dim * 4 * heads * head + 3 * dim * hidden
    outside = 12 * 16 * 16 * dim
    return (
        blocks * (weights + 2 * dim),
        blocks * (tokens * weights + 2 * heads * tokens**2 * head) + tokens * outside,
    )


def clay_count(width, dim=768, hidden=3072, heads=12, blocks=12, tokens=17):
    head, hidden = kept(dim // heads, width), kept(hidden, width)
    weights = dim * 4 * heads * head + 2 * dim * hidden
    return blocks * (weights + hidden + dim + 4 * dim), blocks * (tokens * weights + 2 * heads * tokens**2 * head)


@pytest.mark.parametrize(
    ("key", "count"), [("prithvi", prithvi_count), ("terramind gated", terramind_count), ("clay", clay_count)]
)
def test_parameters_and_macs_are_those_of_the_closed_form(key, count):
    family = next(family for family in FAMILIES if family.key == key)
    backbone = wrapped(family)
    outside = None
    for text in ("1", "3/5", "1/4", "1/100"):
        width = Fraction(text)
        backbone.set_width(float(width))
        parameters, macs = count(width)
        in_blocks = sum(p.numel() for p in backbone.blocks.parameters())
        assert in_blocks == parameters
        counted = (backbone.num_parameters() - parameters, count_macs(backbone, family.shape) - macs)
        assert outside in (None, counted)  # what lies outside the blocks stays
        outside = counted
    if key != "clay":  # whose patch embedding computes its own weights
        assert outside[1] == 0


# --- checkpoints


SHAPES = [(None, 1.0), (5, 0.5), ([0, 4, 9], 0.3), (None, 0.25)]


@pytest.mark.parametrize(("keep", "width"), SHAPES)
@pytest.mark.parametrize(("own", "own_width"), SHAPES)
def test_loading_takes_depth_and_width_of_the_checkpoint(build, keep, width, own, own_width):
    saved = build(seed=3, keep=keep, width=width)
    backbone = build(seed=4, keep=own, width=own_width)
    state = saved.state_dict()
    keys = list(state)
    backbone.load_state_dict(state, strict=True)
    assert list(state) == keys
    assert backbone.pruned_state == saved.pruned_state
    x = torch.randn(2, 6, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), saved(x), strict=True))
    assert backbone.state_dict().keys() == state.keys()
    parameters = list(backbone.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.key in ("terramind", "beit", "eva", "clay")], ids=lambda f: f.key
)
def test_every_family_grows_back(family):
    intact, backbone = wrapped(family), wrapped(family, seed=5, width=0.3)
    backbone.load_state_dict(intact.state_dict(), strict=True)
    images = family.image()
    assert all(torch.equal(a, b) for a, b in zip(answers(backbone, images), answers(intact, images), strict=True))
    assert not any("forward" in vars(part) for part in backbone.blocks.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_width_survives_other_precisions(build, dtype):
    backbone = build(width=0.3).to(dtype)
    other = build(seed=1).to(dtype)
    other.load_state_dict(backbone.state_dict())
    assert other.width == 0.3


@pytest.mark.parametrize(
    "found",
    [bits(0.0), bits(-0.5), bits(1.5), bits(float("nan")), bits(0.5, 0.25), bits(), torch.tensor([0.5]), bits(0.5)[0]],
    ids=str,
)
def test_damaged_widths_are_said(build, found):
    state = {**as_buffers(build(width=0.5).state_dict()), "kept_widths": found}
    with pytest.raises(CheckpointError, match=r"has 'kept_\w+' .*: it is damaged, take an earlier"):
        build().load_state_dict(state)


@pytest.mark.parametrize("found", [[0.0], [-0.5], [1.5], [float("nan")], [0.5, 0.25], [], ["0.5"], 0.5, {}], ids=str)
def test_damaged_widths_of_the_present_form_are_said(build, found):
    state = changed(build(width=0.5).state_dict(), kept_widths=found)
    with pytest.raises(CheckpointError, match=r"has 'kept_widths' .*, expected ascending numbers above 0 and at most 1"):
        build().load_state_dict(state)


def test_a_width_that_does_not_fit_the_weights_is_said(build):
    state = changed(build(width=0.5).state_dict(), kept_widths=[0.25])
    with pytest.raises(CheckpointError, match=r"qkv.weight' of shape \(288, 192\) in the checkpoint, expected \(144, 192\)"):
        build().load_state_dict(state)


def test_a_width_lost_from_a_checkpoint_is_said(build):
    state = changed(build(width=0.5).state_dict(), kept_widths=None)
    with pytest.raises(CheckpointError, match=r"qkv.weight' of shape \(288, 192\) in the checkpoint, expected \(576, 192\)"):
        build(width=0.5).load_state_dict(state)


@pytest.mark.parametrize("how", ["copy", "pickle"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.key in ("prithvi", "terramind", "beit")], ids=lambda f: f.key)
def test_copies_run_their_own_weights(family, how):
    backbone = wrapped(family, width=0.5)
    images = family.image()
    expected = answers(backbone, images)
    twin = copy.deepcopy(backbone) if how == "copy" else pickle.loads(pickle.dumps(backbone))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(answers(twin, images), expected, strict=True))
    twin.set_width(0.25)
    assert backbone.width == 0.5


# --- plans and the callback


def plan(width, **more):
    return SlimmingPlan(
        "prithvi_eo_v2_tiny_tl", 12, (0, 1, 2), {"name": "fixed", "args": {}}, width=width, **more
    )  # fmt: skip


def test_a_plan_applies_its_width(build, tmp_path):
    path = plan(0.5).save(tmp_path / "plan.json")
    backbone = build(plan=path)
    assert (backbone.num_blocks, backbone.width) == (3, 0.5)
    assert backbone.plan == plan(0.5)
    with pytest.raises(ConfigurationError, match=r"Found both width 0.25 and a plan, expected one of them"):
        build(plan=path, width=0.25)
    with pytest.raises(ConfigurationError, match=r"Found both width 0.5 and a plan, expected one of them"):
        SimplerCallback(plan=str(path), width=0.5)
    backbone.set_width(0.25)
    assert backbone.plan is None


def test_the_table_tells_the_width():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(plan_table(plan(0.3, parameters={"before": 100, "after": 10})))
    said = console.export_text()
    assert "first 3 of 12 blocks kept at width 0.3" in said
    assert "-70.0 %" in said
    console.print(plan_table(plan(1.0)))
    assert "width" not in console.export_text()


def quiet(**more):
    return {"limit_train_batches": 1, "limit_val_batches": 1, **more}


@ignored
def test_fit_narrows_on_top_of_the_chosen_depth(trainer, task, datamodule, tmp_path, capsys):
    modules = {width: task() for width in (1.0, 0.5)}
    plans = {}
    for width, module in modules.items():
        folder = tmp_path / str(width)
        run = trainer(SimplerCallback(width=width, output_dir=str(folder)), **quiet())
        run.fit(module, datamodule=datamodule())
        plans[width] = SlimmingPlan.load(folder / "plan.json")
    backbone = modules[0.5].model.encoder
    held = sum(p.numel() for group in run.optimizers[0].param_groups for p in group["params"])
    assert held == sum(p.numel() for p in modules[0.5].parameters())
    assert plans[0.5].kept_blocks == plans[1.0].kept_blocks == backbone.kept
    assert plans[0.5].similarity == plans[1.0].similarity
    assert plans[0.5].parameters == {"before": plans[1.0].parameters["before"], "after": backbone.num_parameters()}
    assert plans[0.5].macs["after"] == count_macs(backbone, (6, 64, 64)) < plans[1.0].macs["after"]
    assert (plans[0.5].width, backbone.width, backbone.plan) == (0.5, 0.5, plans[0.5])
    assert "at width 0.5" in capsys.readouterr().out


@ignored
def test_cached_plans_serve_any_width(trainer, task, datamodule, tmp_path, monkeypatch):
    def fit(width):
        module = task()
        callback = SimplerCallback(width=width, plan_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "out"))
        trainer(callback, **quiet(limit_train_batches=0)).fit(module, datamodule=datamodule())
        return SlimmingPlan.load(tmp_path / "out" / "plan.json"), module.model.encoder

    first, backbone = fit(0.5)
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    second, whole = fit(1.0)
    third, narrow = fit(0.5)
    assert third == first
    assert narrow.pruned_state == backbone.pruned_state
    assert (whole.width, second.width, second.kept_blocks) == (1.0, 1.0, first.kept_blocks)
    assert second.parameters == {**first.parameters, "after": whole.num_parameters()}


@ignored
def test_resuming_takes_the_width_of_the_checkpoint(trainer, task, datamodule, tmp_path):
    first = task()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="last")
    run = trainer(SimplerCallback(width=0.5, max_depth=6), saved, enable_checkpointing=True, **quiet())
    run.fit(first, datamodule=datamodule())
    second = task(seed=5)
    again = trainer(SimplerCallback(), max_epochs=2, **quiet())
    again.fit(second, datamodule=datamodule(), ckpt_path=tmp_path / "last.ckpt")
    assert second.model.encoder.pruned_state == first.model.encoder.pruned_state
    assert again.global_step == 2 * run.global_step
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in second.parameters()}
    loaded = SemanticSegmentationTask.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    x = torch.randn(1, 6, 64, 64)
    assert torch.equal(loaded(x).output, first.eval()(x).output)
    for test in (trainer().test, trainer().validate, trainer().predict):
        fresh = task(seed=6)
        data = datamodule(predict_data_root=tmp_path) if test.__name__ == "predict" else datamodule()
        if test.__name__ != "predict":
            test(fresh, datamodule=data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
            assert fresh.model.encoder.pruned_state == first.model.encoder.pruned_state


def test_an_encoder_that_was_cut_by_hand_is_narrowed(trainer, task, datamodule, tmp_path):
    module = task(backbone_keep=[0, 4, 11])
    trainer(SimplerCallback(width=0.5), **quiet()).fit(module, datamodule=datamodule())
    assert module.model.encoder.pruned_state == PrunedState((0, 4, 11), 12, 0.5)
    module = task(backbone_width=0.5)
    trainer(SimplerCallback(), **quiet()).fit(module, datamodule=datamodule())
    assert module.model.encoder.pruned_state == PrunedState(tuple(range(12)), 12, 0.5)
    assert not (tmp_path / "simpler").exists()


def test_layers_that_cannot_be_narrowed_are_refused_before_streaming(trainer, task, datamodule, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    module = task()
    module.model.encoder.blocks[3].attn.q_norm = torch.nn.LayerNorm(64)
    with pytest.raises(UnsupportedEncoderError, match=r"Found 'q_norm.weight' in Attention in block 3"):
        trainer(SimplerCallback(width=0.5)).fit(module, datamodule=datamodule())


@ignored
def test_averaged_weights_have_the_width(trainer, task, datamodule):
    module = task()
    callbacks = (SimplerCallback(width=0.5), EMAWeightAveraging(decay=0.0))
    trainer(*callbacks, limit_train_batches=2, limit_val_batches=1).fit(module, datamodule=datamodule())
    assert module.model.encoder.width == 0.5


def test_shape_in_a_checkpoint_folder(tmp_path, trainer, task, datamodule):
    callback = SimplerCallback(criterion="fixed", drop_blocks=5, width=0.3)
    trainer(callback, limit_train_batches=0).fit(task(), datamodule=datamodule())
    torch.save({"callbacks": {callback.state_key: callback.state_dict()}}, tmp_path / "meta.pt")
    assert read_pruned_state(tmp_path, None) == PrunedState(tuple(range(7)), 12, 0.3)


def test_terratorch_fit_with_a_width(scenes, tmp_path):
    """The whole command in a process of its own, and again from its checkpoint."""
    settings = config(scenes, tmp_path, width=0.5, max_depth=6)
    for epochs in (1, 2):
        settings["trainer"]["max_epochs"] = epochs
        command = Command(tmp_path, settings, *(["--ckpt_path", "last"] if epochs == 2 else []))
        assert command.wait() == [0], command.output()
        trained = json.loads((tmp_path / "trained.0.json").read_text())
        assert trained["epoch"] == epochs
    assert "at width 0.5" in command.output()
    chosen = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    assert chosen.width == 0.5
    assert trained["kept"] == list(chosen.kept_blocks)


# --- LoRA


@needs_peft
@adapters
@pytest.mark.parametrize("family", LORA)
def test_attach_then_narrow_is_narrow_then_attach(family):
    attached, reference = randomise_adapters(model(family)), model(family, seed=3, backbone_width=0.3)
    whole = copy.deepcopy(attached)
    backbone_of(attached).prune_depth([0, 5, 11])
    backbone_of(reference).prune_depth([0, 5, 11])
    backbone_of(attached).set_width(0.3)
    reference.load_state_dict(attached.state_dict(), strict=True)
    x = image(family)
    assert torch.equal(reference(x).output, attached(x).output)
    for built in (attached, reference):
        built(x).output.square().mean().backward()
    trained = [{n: p.grad for n, p in built.named_parameters() if p.requires_grad} for built in (attached, reference)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, trained), strict=True) if a is not None)
    fresh = model(family, seed=7)
    fresh.load_state_dict(attached.state_dict(), strict=True)
    assert torch.equal(fresh(x).output, attached(x).output)
    with torch.no_grad(), full_float32():
        merged = copy.deepcopy(attached)
        expected = merged(x).output
        merged.encoder = merged.encoder.merge_and_unload()
        assert torch.allclose(merged(x).output, expected, atol=1e-4 * float(expected.abs().max()))
        # Folding the adapters in first and narrowing then is the same: the rows and columns of B A are theirs.
        whole.encoder = whole.encoder.merge_and_unload()
        backbone_of(whole).prune_depth([0, 5, 11])
        backbone_of(whole).set_width(0.3)
        assert torch.allclose(whole(x).output, expected, atol=1e-4 * float(expected.abs().max()))


@needs_peft
@adapters
def test_adapters_that_are_no_sum_cannot_be_narrowed():
    built = model(config=lora("mlp.fc2", use_dora=True))
    with pytest.raises(UnsupportedEncoderError, match=r"Found peft\.tuners\.lora.* in block 0"):
        backbone_of(built).set_width(0.5)


# --- export


@pytest.mark.parametrize("format_", [pytest.param("onnx", marks=needs_onnx), "pt2"])
def test_graphs_of_a_narrow_model(trainer, task, datamodule, tmp_path, format_):
    module = task(backbone_keep=[0, 3, 7], backbone_width=0.5)
    saver = trainer()
    saver.strategy.connect(module)
    saver.save_checkpoint(tmp_path / "fit.ckpt")
    trained = load_trained({"model": {"class_path": "terratorch.tasks.SemanticSegmentationTask"}}, tmp_path / "fit.ckpt")
    path, gap = export_graph(trained, format_, tmp_path, size=64)
    assert path.is_file()
    assert gap < 1e-4
    with pytest.raises(ExportError, match=r"at width 0.5, expected 1, .*use --formats onnx or pt2"):
        export_plain(trained, {}, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    with pytest.raises(ConfigurationError, match=r"Found width 0.25 for a checkpoint that was trained at width 0.5 only"):
        load_trained({"model": {"class_path": "SemanticSegmentationTask"}}, tmp_path / "fit.ckpt", width=0.25)


def test_export_of_a_narrow_model_is_refused_before_training(trainer, task, datamodule, tmp_path):
    with pytest.raises(ConfigurationError, match=r"Found export: true with a width below 1\.0"):
        trainer(SimplerCallback(export=True, width=0.5), enable_checkpointing=True).fit(task(), datamodule=datamodule())
    callback = SimplerCallback(export=True, plan=str(plan(0.5).save(tmp_path / "given.json")))
    with pytest.raises(ConfigurationError, match=r"Found export: true with a width below 1\.0"):
        trainer(callback, enable_checkpointing=True).fit(task(), datamodule=datamodule())
