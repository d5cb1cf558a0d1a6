"""The source ``simpler`` in TerraTorch's backbone registry: ``simpler_<name>`` builds <name> inside a SimplerBackbone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
from jsonargparse import get_loader
from terratorch.registry import BACKBONE_REGISTRY, MultiSourceRegistry
from terratorch.utils import InvalidModelError
from torch import nn

from terratorch_simpler.encoders import refuse_by_name
from terratorch_simpler.errors import UnsupportedEncoderError
from terratorch_simpler.indices import resolve_width
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.terratorch.deployment import keep_import
from terratorch_simpler.terratorch.pretrained import check_loaded, load_pruned, take_pruned_weights

SOURCE = "simpler"
NO_ENCODERS = ("tokenizer", "IdentityBackbone", "UNet")
"""What else is in TerraTorch's own source."""
VISION_TRANSFORMERS = ("vision_transformer", "vision_transformer_hybrid", "deit", "beit", "eva", "embedder")
"""Modules of timm with encoders of known families; the last is TerraTorch's Clay."""
as_read: Callable[[str], Any] = get_loader("yaml")
"""Text as TerraTorch's parser would have read it."""


class SimplerSource:
    """A registry source over all other sources of TerraTorch's backbone registry.

    TerraTorch's registry takes the prefix off a name before it asks the source of that prefix, and asks every source for a
    name without one: those are left to the others.
    """

    def __contains__(self, name: object) -> bool:
        """Whether ``simpler_<name>`` can be built, also with weights after a dot (``.mae``), as in timm."""
        return isinstance(name, str) and _asked_by_prefix(name) and _find(name) is not None and _refused(name) is None

    def __iter__(self) -> Iterator[str]:
        """Names without ``simpler_`` that can be built."""
        return (name for name in _others() if _refused(name) is None)

    def __len__(self) -> int:
        """Number of names."""
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Callable[..., SimplerBackbone]:
        """What builds ``simpler_<name>``, as TerraTorch's ``find_class`` gives it.

        Raises:
            KeyError: If no other source knows the name.
            UnsupportedEncoderError: If the encoder cannot be cut.
        """
        if _find(name) is None:
            raise KeyError(name)
        if (reason := _refused(name)) is not None:
            raise reason
        return functools.partial(self.build, name)

    def build(
        self,
        name: str,
        *args: Any,
        plan: str | Path | None = None,
        keep: int | list[int] | str | None = None,
        width: float | str | None = None,
        block_path: str | None = None,
        out_indices: list[int] | str | None = None,
        **kwargs: Any,
    ) -> SimplerBackbone:
        """Build an encoder with all its blocks, wrap it, and cut it if asked to.

        Args:
            name: Name of the encoder without ``simpler_``.
            *args: For the encoder.
            plan: Path of a plan.json to apply.
            keep: First n blocks, or block numbers, to keep.
            width: Share of the units of every attention head and MLP to keep.
            block_path: Path of the blocks of an encoder of no known family.
            out_indices: Blocks whose features are returned, numbered as in the intact encoder.
            **kwargs: For the encoder.

        Raises:
            InvalidModelError: If no other source knows the name, as TerraTorch's registry expects.
            UnsupportedEncoderError: If the encoder cannot be cut.
            ConfigurationError: If ``width`` is no number above 0 and at most 1.
        """
        source = _find(name)
        if source is None or not _asked_by_prefix(name):
            msg = f"Found no backbone '{name}' behind 'simpler_{name}', expected a name that TerraTorch can build."
            raise InvalidModelError(msg)
        refuse_by_name(name)
        keep_import()
        # Settings of model_args given on the command line arrive as text.
        keep, width, out_indices = (
            as_read(value) if isinstance(value, str) else value for value in (keep, width, out_indices)
        )
        width = 1.0 if width is None else resolve_width(width)  # before weights are fetched
        if isinstance(kwargs.get("pretrained"), str):
            kwargs["pretrained"] = as_read(kwargs["pretrained"])  # 'false' would be taken for true
        weights = take_pruned_weights(name, kwargs)
        encoder = _build_encoder(source, args, kwargs)
        if weights is None:
            check_loaded(encoder, name, kwargs)
        backbone = SimplerBackbone(
            encoder,
            name=name,
            out_indices=out_indices,
            **({"keep": keep, "plan": plan, "width": width} if weights is None else {}),
            # DINOv3 takes its weights from ckpt_path alone; whether they are any good is not known here.
            pretrained=None if "pretrained" not in kwargs and kwargs.get("ckpt_path") else bool(kwargs.get("pretrained")),
            block_path=block_path,
        )
        if weights is not None:
            load_pruned(backbone, weights, keep, plan, width)
        return backbone


def _others() -> MultiSourceRegistry[Any]:
    return MultiSourceRegistry(**{key: BACKBONE_REGISTRY[key] for key in BACKBONE_REGISTRY.keys() if key != SOURCE})  # noqa: SIM118 (this registry iterates over names, not keys)


def _find(name: str) -> tuple[Any, str] | None:
    """The source that knows an encoder, and its name there; None if none does."""
    others = _others()
    for known in (name, name.partition(".")[0]):
        if known in others:
            source = others.find_registry(known)
            prefix = next(key for key in others.keys() if others[key] is source)  # noqa: SIM118
            return source, name.removeprefix(f"{prefix}_")
    return None


def _refused(name: str) -> UnsupportedEncoderError | None:
    """Why an encoder cannot be cut, as far as its name tells."""
    try:
        refuse_by_name(name)
    except UnsupportedEncoderError as err:
        return err
    model = name.removeprefix("timm_").partition(".")[0]
    if any(word in name for word in NO_ENCODERS) or (
        timm.is_model(model) and not timm.models.is_model_in_modules(model, VISION_TRANSFORMERS)
    ):
        msg = (
            f"Found backbone '{name}', expected an encoder with one stack of equal blocks of a known family such as "
            f"prithvi_eo_v2_300_tl: use '{name}' without 'simpler_'."
        )
        return UnsupportedEncoderError(msg)
    return None


def _build_encoder(found: tuple[Any, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    source, own_name = found
    try:
        return source.build(own_name, *args, **kwargs)  # type: ignore[no-any-return]
    except InvalidModelError as err:
        # TerraTorch takes a KeyError of a constructor for an unknown name, which this one is not.
        if isinstance(err.__context__, KeyError):
            raise err.__context__ from None
        raise


def _asked_by_prefix(name: str) -> bool:
    """Whether the registry was asked for ``simpler_<name>``; it does not say so otherwise than in its own variables."""
    frame = sys._getframe(2)
    for _ in range(2):  # it may ask in a generator
        if frame.f_locals.get("self") is BACKBONE_REGISTRY:
            return bool(frame.f_locals.get("name") != name)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return True


def register_source() -> None:
    """Add the source, once; importing the package does it."""
    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (see above)
        BACKBONE_REGISTRY.register_source(SOURCE, SimplerSource())
