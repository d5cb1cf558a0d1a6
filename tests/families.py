"""One encoder of every family, small enough for tests, with what the intact and the cut one must equal."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import timm
import torch
from terratorch.registry import BACKBONE_REGISTRY

from terratorch_simpler.models.backbone import SimplerBackbone

TWO_BANDS = ["RED", "NIR_NARROW"]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        key: Name of the test.
        title: Row of docs/encoders.md.
        names: Registered names, for docs/encoders.md.
        name: The one that is tested.
        kwargs: Arguments that keep it small.
        shape: Shape of one input, or of each modality.
        depth: Arguments with which TerraTorch itself builds the encoder with k blocks; None if it cannot.
        norm: The final norm, where only the last feature has passed through it.
        exports: Whether the host can express the cut model.
        graphs: Graph formats that the cut encoder can be written in.
        fit: What a whole ``terratorch fit`` with selection is tried on.
        tested: How the encoder of the test differs from the official one.
        fewest: Fewest blocks it works with.
        before: A context in which it can be built.
    """

    key: str
    title: str
    names: str
    name: str
    shape: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    depth: Callable[[int], dict[str, Any]] | None = None
    norm: Callable[[Any], Any] | None = None
    exports: bool = False
    graphs: tuple[str, ...] = ("onnx", "pt2")
    fit: str = ""
    tested: str = ""
    fewest: int = 1
    before: Callable[[], Any] = mock.MagicMock

    def image(self, batch: int = 2, seed: int = 1) -> Any:
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.shape, dict):
            return {name: torch.randn(batch, *shape, generator=generator) for name, shape in self.shape.items()}
        return torch.randn(batch, *self.shape, generator=generator)


def by_depth(k: int) -> dict[str, Any]:
    return {"depth": k}


# --- ViT-Adapter: TerraTorch's code, with the compiled operation replaced by TerraTorch's own pure-PyTorch one.


@functools.cache
def vit_adapter_ready() -> None:
    operation = types.ModuleType("MultiScaleDeformableAttention")

    def core(value, shapes, locations, weights):
        from terratorch.models.backbones.detr_ops.functions.ms_deform_attn_func import ms_deform_attn_core_pytorch

        return ms_deform_attn_core_pytorch(value, shapes.tolist(), locations, weights)

    def forward(value, shapes, _starts, locations, weights, _step):
        return core(value, shapes, locations, weights)

    def backward(value, shapes, _starts, locations, weights, gradient, _step):
        with torch.enable_grad():
            inputs = [part.detach().requires_grad_() for part in (value, locations, weights)]
            return torch.autograd.grad(core(inputs[0], shapes, inputs[1], inputs[2]), inputs, gradient)

    operation.ms_deform_attn_forward, operation.ms_deform_attn_backward = forward, backward
    sys.modules["MultiScaleDeformableAttention"] = operation
    from terratorch.models.backbones import prithvi_vit, prithvi_vit_adapter

    prithvi_vit.PrithviViTAdapter = importlib.reload(prithvi_vit_adapter).PrithviViTAdapter


def vit_adapter() -> Any:
    vit_adapter_ready()
    return mock.MagicMock()


def interaction_indexes(k: int) -> dict[str, Any]:
    ends = [-(-quarter * k // 4) - 1 for quarter in (1, 2, 3, 4)]
    return {"depth": k, "interaction_indexes": [[a + 1, b] for a, b in zip([-1, *ends[:-1]], ends, strict=True)]}


# --- DINOv3: timm's model of the same architecture behind the methods of Meta's that TerraTorch calls. Meta's own code and
# weights need a download that their licence ties to a person.


class MetaDinoV3(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        model = timm.create_model("vit_small_patch16_dinov3", embed_dim=96, num_heads=3, depth=6, img_size=64)
        self.cls_token, self.storage_tokens = model.cls_token, model.reg_token
        self.patch_embed, self.blocks, self.norm, self.rope_embed = model.patch_embed, model.blocks, model.norm, model.rope
        self.embed_dim, self.n_blocks, self.patch_size = model.embed_dim, len(model.blocks), 16
        self.n_storage_tokens = model.num_prefix_tokens - 1

    def get_intermediate_layers(self, x, n, return_class_token):
        x = self.patch_embed(x)
        batch, rows, columns, width = x.shape
        rope = self.rope_embed.get_embed(shape=[rows, columns])
        first = torch.cat([self.cls_token, self.storage_tokens], dim=1).expand(batch, -1, -1)
        x, outputs = torch.cat([first, x.reshape(batch, -1, width)], dim=1), []
        for i, block in enumerate(self.blocks):
            x = block(x, rope=rope)
            if i in n:
                outputs.append(self.norm(x))
        assert len(outputs) == len(n), f"only {len(outputs)} / {len(n)} blocks found"
        patches = [out[:, 1 + self.n_storage_tokens :] for out in outputs]
        return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True)) if return_class_token else patches


def dinov3() -> Any:
    return mock.patch("torch.hub.load", side_effect=lambda *args, **kwargs: MetaDinoV3())


PRITHVI = "`prithvi_eo_tiny`, `prithvi_eo_v1_100`, `prithvi_eo_v2_*`"
TERRAMIND = "`terramind_v1_tiny` to `_large`, `terramind_v01_base`"
TIMM_SMALL = {"embed_dim": 48, "num_heads": 3, "img_size": 64}
NARROW = {"embed_dim": 48, "num_heads": 3}

# fmt: off
FAMILIES = [
    Family(
        "prithvi", "Prithvi", PRITHVI, "prithvi_eo_v2_tiny_tl", (6, 64, 64),
        depth=by_depth, norm=lambda e: e.norm, exports=True,
        fit="real HLS tiles",
    ),
    Family(
        "prithvi time series", "Prithvi, time series", PRITHVI, "prithvi_eo_v2_300_tl", (2, 3, 64, 64),
        kwargs={**NARROW, "num_frames": 3, "bands": TWO_BANDS},
        depth=by_depth, norm=lambda e: e.norm, exports=True,
        fit="generated time series in the layout of Sen4Map",
    ),
    Family(
        "prithvi vpt", "Prithvi with VPT", "`backbone_vpt: true`", "prithvi_eo_v2_tiny_tl", (6, 64, 64),
        kwargs={"vpt": True, "vpt_n_tokens": 3},
        depth=by_depth, norm=lambda e: e.norm, exports=True,
        fit="real HLS tiles",
    ),
    Family(
        "prithvi vit_adapter", "Prithvi with ViT-Adapter", "`backbone_vit_adapter: true`", "prithvi_eo_v2_300_tl",
        (6, 64, 64),
        kwargs={"vit_adapter": True, "embed_dim": 48, "num_heads": 4, "deform_num_heads": 4, "conv_inplane": 8},
        depth=interaction_indexes, exports=True, fewest=4, before=vit_adapter,
        tested="pure-PyTorch deformable attention in place of the CUDA operation",
        graphs=(), fit="generated scenes",
    ),
    Family(
        "terramind", "TerraMind", TERRAMIND, "terramind_v1_tiny", (12, 64, 64),
        kwargs={"modalities": ["S2L2A"]}, norm=lambda e: e.encoder_norm,
        fit="real Sen1Floods11 chips",
    ),
    Family(
        "terramind gated", "TerraMind", TERRAMIND, "terramind_v1_base", (12, 32, 32),
        kwargs={"modalities": ["S2L2A"]}, norm=lambda e: e.encoder_norm,
    ),
    Family(
        "terramind modalities", "TerraMind, several modalities", "`backbone_modalities: [S2L2A, S1RTC]`",
        "terramind_v1_tiny",
        {"S2L2A": (12, 64, 64), "S1RTC": (2, 64, 64)}, kwargs={"modalities": ["S2L2A", "S1RTC"], "merge_method": None},
        norm=lambda e: e.encoder_norm,
        fit="real Sentinel-2 and Sentinel-1 tiles",
    ),
    Family(
        "terramind tim", "TerraMind TiM", "`terramind_v1_tiny_tim` to `_large_tim`", "terramind_v1_tiny_tim", (12, 32, 32),
        kwargs={"modalities": ["S2L2A"], "merge_method": None, "img_size": 32},
        norm=lambda e: e.encoder_norm,
        graphs=(),
    ),
    Family(
        "dofa", "DOFA", "`dofa_small_patch16_224`, `_base_`, `_large_`", "dofa_small_patch16_224", (2, 64, 64),
        kwargs={"model_bands": TWO_BANDS, "img_size": 64, "out_indices": list(range(12))},
    ),
    Family(
        "torchgeo", "torchgeo ViT", "`ssl4eos12_vit_small_*`, `ssl4eol_vit_small_*`",
        "ssl4eos12_vit_small_patch16_224_sentinel2_all_dino", (2, 64, 64),
        kwargs={"model_bands": TWO_BANDS, "embed_dim": 48, "num_heads": 3, "img_size": 64},
        depth=by_depth, exports=True,
    ),
    Family(
        "clay", "Clay v1", "`clay_v1_base`", "clay_v1_base", (2, 32, 32),
        kwargs={"bands": TWO_BANDS, "img_size": 32}, norm=lambda e: e.clay_encoder.transformer.norm,
    ),
    Family(
        "clay vpt", "Clay v1 with VPT", "`backbone_vpt: true`", "clay_v1_base", (2, 32, 32),
        kwargs={"bands": TWO_BANDS, "img_size": 32, "vpt": True, "vpt_n_tokens": 2},
        norm=lambda e: e.clay_encoder.transformer.norm,
    ),
    Family(
        "dinov3", "DINOv3", "`dinov3_vits16` to `dinov3_vit7b16`", "dinov3_vits16", (3, 64, 64),
        kwargs={"ckpt_path": None}, before=dinov3,
        tested="timm's model of the architecture in place of Meta's code",
    ),
    Family(
        "timm", "timm ViT", "`timm_vit_*`, `timm_deit*`, with weights as `.mae` or `.dino`", "timm_vit_base_patch16_224.mae",
        (3, 64, 64), kwargs={**TIMM_SMALL, "out_indices": list(range(12))},
        depth=lambda k: {"depth": k, "out_indices": list(range(k))}, exports=True,
        fit="generated images in the layout of CIFAR-100",
    ),
    Family(
        "eva", "timm EVA and DINOv3", "`timm_eva02_*`, `timm_vit_*_dinov3`",
        "timm_vit_small_patch16_dinov3",
        (3, 64, 64), kwargs={**TIMM_SMALL, "out_indices": list(range(12))},
        depth=lambda k: {"depth": k, "out_indices": list(range(k))}, exports=True,
    ),
    Family(
        "beit", "timm BEiT", "`timm_beit*`, `timm_beitv2*`", "timm_beit_base_patch16_224",
        (3, 64, 64), kwargs={**TIMM_SMALL, "out_indices": list(range(12))},
        depth=lambda k: {"depth": k, "out_indices": list(range(k))}, exports=True,
        graphs=("pt2",),
    ),
    Family(
        "by path", "any other, by its block path", "`backbone_block_path: vit_model.blocks`",
        "ssl4eol_vit_small_patch16_224_landsat_tm_toa_moco", (2, 64, 64),
        kwargs={
            "model_bands": TWO_BANDS, "embed_dim": 48, "num_heads": 3, "img_size": 64, "block_path": "vit_model.blocks",
        },
        graphs=(),
    ),
]
# fmt: on


def plain(family: Family, seed: int = 0, **more: Any) -> Any:
    """The encoder as TerraTorch builds it."""
    kwargs = {key: value for key, value in {**family.kwargs, **more}.items() if key != "block_path"}
    torch.manual_seed(seed)
    with family.before():
        return BACKBONE_REGISTRY.build(family.name, pretrained=False, **kwargs).eval()


def wrapped(family: Family, seed: int = 0, **more: Any) -> SimplerBackbone:
    """The encoder in a ``SimplerBackbone``; built once in a process if it is like the table, and copied after that."""
    if seed or more:
        return _wrapped(family, seed, **more)
    if family.key not in built:
        built[family.key] = _wrapped(family, seed), torch.get_rng_state()
    backbone, random_state = built[family.key]
    torch.set_rng_state(random_state)
    return copy.deepcopy(backbone)


built: dict[str, tuple[SimplerBackbone, torch.Tensor]] = {}
"""By key, with the state of PyTorch's random generator after it."""


def _wrapped(family: Family, seed: int, **more: Any) -> SimplerBackbone:
    torch.manual_seed(seed)
    with family.before():
        arguments = {"pretrained": "ckpt_path" in more, **family.kwargs, **more}
        return BACKBONE_REGISTRY.build(f"simpler_{family.name}", **arguments).eval()


# --- the table of docs/encoders.md

START, END = "<!-- families -->", "<!-- end of families -->"


def table() -> str:
    lines = [
        "| encoder | names after `simpler_` | depth | width | export | how it is tested |",
        "|---|---|---|---|---|---|",
    ]
    for title in dict.fromkeys(family.title for family in FAMILIES):
        rows = [family for family in FAMILIES if family.title == title]
        first = rows[0]
        formats = [*(["plain"] if first.exports else []), *first.graphs]
        kept = "to 1 block" if first.fewest == 1 else f"to {first.fewest} blocks"
        like = "TerraTorch built with k blocks" if first.depth else "the features of the intact encoder"
        how = [
            f"equal to {like}",
            *([f"`fit` on {first.fit}"] if first.fit else []),
            *([first.tested] if first.tested else []),
        ]
        lines.append(f"| {title} | {first.names} | {kept} | yes | {', '.join(formats) or 'no'} | {'; '.join(how)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from pathlib import Path

    page = Path(__file__).parents[1] / "docs" / "encoders.md"
    before, rest = page.read_text().split(START)
    page.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}")
