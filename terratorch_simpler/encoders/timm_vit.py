"""Vision transformers of timm: as they are, through TerraTorch's timm source, and those of torchgeo, which are timm's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from terratorch.models.backbones.torchgeo_vit import ViTEncoderWrapper
from terratorch.registry.timm_registry import TimmBackboneWrapper
from timm.models._features import FeatureGetterNet
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from terratorch_simpler.encoders.base import EncoderSpec, TerraTorchArguments, pair, select_modules


class _VisionTransformerSpec(EncoderSpec):
    """What all have in common: a timm model with ``blocks`` and tokens before the patches; features are images."""

    @abstractmethod
    def model(self, encoder: Any) -> Any:
        """The timm model inside."""

    def blocks(self, encoder: Any) -> nn.ModuleList | nn.Sequential:
        """The transformer blocks."""
        return self.model(encoder).blocks

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks and the rotary frequencies that some EVA models learn for each, and update ``feature_info``."""
        model = self.model(encoder)
        if getattr(model, "rope_mixed", False):  # the same parameter, which an optimizer may hold
            model.rope.freqs.data = model.rope.freqs.detach()[:, list(positions)].clone()
            model.rope.depth = len(positions)
        blocks = select_modules(model.blocks, positions)
        model.blocks = nn.Sequential(*blocks) if isinstance(model.blocks, nn.Sequential) else nn.ModuleList(blocks)
        model.feature_info = [{**model.feature_info[0], "module": f"blocks.{i}"} for i in range(len(blocks))]

    def dimensions_by_block(self, encoder: Any) -> dict[str, int]:
        """The learned rotary frequencies of some EVA models."""
        if not getattr(self.model(encoder), "rope_mixed", False):
            return {}
        frequencies = self.model(encoder).rope.freqs
        return {name: 1 for name, parameter in encoder.named_parameters() if parameter is frequencies}

    def out_channels(self, encoder: Any) -> list[int]:
        """The width of a token, after every block."""
        return [int(self.model(encoder).embed_dim)] * len(self.blocks(encoder))

    def prefix_tokens(self, encoder: Any) -> int:
        """Class and register tokens; the encoder itself drops them from its features."""
        return int(self.model(encoder).num_prefix_tokens)

    def patch_size(self, encoder: Any) -> tuple[int, int, int]:
        """Reduction of the feature maps, which counts a convolutional stem as well."""
        reduction = int(self.model(encoder).feature_info[0]["reduction"])
        return 1, reduction, reduction

    def input_shape(self, encoder: Any) -> tuple[int, ...] | None:
        """(C, H, W) of the patch embedding."""
        embed = self.model(encoder).patch_embed
        channels = next((part.in_channels for part in embed.modules() if isinstance(part, nn.Conv2d)), None)
        size = getattr(embed, "img_size", None)
        return None if channels is None or size is None else (channels, *pair(size))


class TimmViTSpec(_VisionTransformerSpec):
    """``timm_vit_*``, ``deit``, ``beit``, ``eva`` and DINOv3 of timm, with any of timm's weights (``.mae``, ``.dino``)."""

    family = "timm ViT"

    def matches(self, encoder: Any) -> bool:
        """VisionTransformer, Beit and Eva behind timm's feature getter; others shape tokens or blocks in other ways."""
        return (
            isinstance(encoder, TimmBackboneWrapper)
            and isinstance(_getter(encoder), FeatureGetterNet)
            and isinstance(encoder.model, VisionTransformer | Beit | Eva)
        )

    def model(self, encoder: Any) -> Any:
        """The model that the feature getter reads from."""
        return encoder.model

    def feature_blocks(self, encoder: Any, out_indices: Sequence[int] | int | None) -> Sequence[int]:
        """The last three blocks by default; order and repetitions are lost, as in timm."""
        total = len(self.blocks(encoder))
        if out_indices is None:
            wanted: Sequence[int] = _getter(encoder).out_indices
        elif isinstance(out_indices, int):
            wanted = range(total - out_indices, total)  # timm: the last n
        else:
            wanted = out_indices
        return sorted({i % total if -total <= i < total else i for i in wanted})

    def return_all_features(self, encoder: Any) -> None:
        """Return the features after all blocks."""
        encoder.prepare_features_for_image_model = _unchanged  # TerraTorch's lambda cannot be pickled
        self._return_all_blocks(encoder)

    def terratorch_kwargs(self, encoder: Any, positions: Sequence[int]) -> TerraTorchArguments | None:
        """``depth``, and ``out_indices`` without repetitions."""
        returned = sorted(set(positions))
        arguments = {"depth": len(self.blocks(encoder)), "out_indices": returned}
        return TerraTorchArguments(arguments, len(returned), [returned.index(position) for position in positions])

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks, and update timm's feature getter, which is not part of the module tree."""
        super().select_blocks(encoder, positions)
        self._return_all_blocks(encoder)

    def _return_all_blocks(self, encoder: Any) -> None:
        getter = _getter(encoder)
        getter.out_indices = list(range(len(self.blocks(encoder))))
        encoder._out_channels = self.out_channels(encoder)


def _getter(encoder: Any) -> Any:
    """TerraTorch keeps timm's feature getter only as the object that ``forward`` is bound to."""
    return getattr(encoder.forward, "__self__", None)


def _unchanged(features: list[Tensor]) -> list[Tensor]:
    return features


class TorchGeoViTSpec(_VisionTransformerSpec):
    """``ssl4eos12_vit_*`` and ``ssl4eol_vit_*``: torchgeo's ViTs with DINO, MoCo, MAE and other weights."""

    family = "torchgeo ViT"

    def matches(self, encoder: Any) -> bool:
        """Any ViT of torchgeo."""
        return isinstance(encoder, ViTEncoderWrapper)

    def model(self, encoder: Any) -> Any:
        """The torchgeo model."""
        return encoder.vit_model

    def feature_blocks(self, encoder: Any, out_indices: Sequence[int] | int | None) -> Sequence[int]:  # noqa: ARG002
        """All: TerraTorch accepts ``out_indices`` and ignores them."""
        return range(len(self.blocks(encoder)))

    def return_all_features(self, encoder: Any) -> None:
        """Nothing: it returns the features after all its blocks."""

    def terratorch_kwargs(self, encoder: Any, positions: Sequence[int]) -> TerraTorchArguments | None:
        """``depth``."""
        depth = len(self.blocks(encoder))
        return TerraTorchArguments({"depth": depth}, depth, list(positions))

    def select_blocks(self, encoder: Any, positions: Sequence[int]) -> None:
        """Select blocks, and update ``out_channels``."""
        super().select_blocks(encoder, positions)
        encoder.out_channels = self.out_channels(encoder)


class TimmModelSpec(_VisionTransformerSpec):
    """What ``timm.create_model`` returns for a vision transformer: ViT, DeiT, BEiT, EVA, DINOv3 and their relatives."""

    family = "timm model"

    def matches(self, encoder: Any) -> bool:
        """Models of timm with one list of blocks on tokens; hierarchical ones have no ``num_prefix_tokens``."""
        of_timm = any(base.__module__.startswith("timm.models.") for base in type(encoder).__mro__)
        return of_timm and all(hasattr(encoder, name) for name in ("blocks", "num_prefix_tokens", "feature_info"))

    def model(self, encoder: Any) -> Any:
        """The model itself."""
        return encoder

    def input_shape(self, encoder: Any) -> None:  # noqa: ARG002
        """Not needed: timm models check their input themselves."""
        return

    def return_all_features(self, encoder: Any) -> None:
        """Nothing: it returns what it did before."""
