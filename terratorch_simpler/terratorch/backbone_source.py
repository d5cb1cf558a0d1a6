"""The source ``simpler`` in TerraTorch's backbone registry: ``simpler_<name>`` builds <name> inside a SimplerBackbone."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
from jsonargparse import get_loader
from terratorch.models.backbones.prithvi_vit import PRETRAINED_BANDS
from terratorch.registry import BACKBONE_REGISTRY, MultiSourceRegistry
from terratorch.utils import InvalidModelError
from torch import nn

from terratorch_simpler.encoders import refuse_by_name
from terratorch_simpler.errors import ConfigurationError, SimplerWarning, UnsupportedEncoderError, did_you_mean
from terratorch_simpler.indices import resolve_width
from terratorch_simpler.lightning.internals import asked_with_prefix
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.terratorch.deployment import keep_import
from terratorch_simpler.terratorch.hub import weights_at_hand
from terratorch_simpler.terratorch.pretrained import check_files, check_loaded, load_pruned, pop_pruned_weights, read_files
from terratorch_simpler.terratorch.registration import SOURCE
from terratorch_simpler.terratorch.timm_weights import MODULES, is_timm, load_file, pop_file

NOT_ENCODERS = ("tokenizer", "IdentityBackbone", "UNet")
"""Parts of names in TerraTorch's own source that are no encoders."""
OUR_ARGUMENTS = ("block_path", "keep", "out_indices", "plan", "pretrained", "width")
LOADS_ALWAYS = ("terramind", "clay", "dinov3")
"""Encoders that TerraTorch loads from ``ckpt_path`` whatever ``pretrained`` says."""
TIMM_MODULES = (*MODULES, "embedder")
"""Modules of timm with encoders of known families; ``embedder`` is TerraTorch's Clay."""
parse_yaml: Callable[[str], Any] = get_loader("yaml")
"""Parses text as TerraTorch's parser does."""


class UnknownBackboneError(ConfigurationError, InvalidModelError):  # type: ignore[misc]
    """No other source knows the name; TerraTorch's registry expects an InvalidModelError."""


class SimplerSource:
    """A registry source over all other sources of TerraTorch's backbone registry.

    TerraTorch's registry takes the prefix off a name before it asks the source of that prefix, and asks every source for a
    name without one: those are left to the others.
    """

    def __contains__(self, name: object) -> bool:
        """Whether ``simpler_<name>`` can be built, also with weights after a dot (``.mae``), as in timm."""
        return (
            isinstance(name, str)
            and asked_with_prefix(BACKBONE_REGISTRY, name)
            and _find(name) is not None
            and _refusal(name) is None
        )

    def __iter__(self) -> Iterator[str]:
        """Names without ``simpler_`` that can be built."""
        return (name for name in _other_sources() if _refusal(name) is None)

    def __len__(self) -> int:
        """Number of names."""
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Callable[..., SimplerBackbone]:
        """The constructor of ``simpler_<name>``, as TerraTorch's ``find_class`` returns it.

        Raises:
            KeyError: If no other source knows the name.
            UnsupportedEncoderError: If the encoder cannot be pruned.
        """
        if _find(name) is None:
            raise KeyError(name)
        if (reason := _refusal(name)) is not None:
            raise reason
        return functools.partial(self.build, name)

    def build(
        self,
        name: str,
        *args: Any,
        plan: str | Path | None = None,
        keep: Any = None,
        width: Any = None,
        block_path: str | None = None,
        out_indices: Any = None,
        **kwargs: Any,
    ) -> SimplerBackbone:
        """Build an encoder with all its blocks, wrap it, and prune it if asked to.

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
            UnknownBackboneError: If no other source knows the name.
            UnsupportedEncoderError: If the encoder cannot be pruned.
            CheckpointError: If a file of weights does not fit the encoder.
            ConfigurationError: If ``width`` is no number above 0 and at most 1, or an argument is a typo of one of ours.
            DownloadError: If weights have to be fetched and the Hugging Face Hub does not answer.
        """
        source = _find(name)
        if source is None or not asked_with_prefix(BACKBONE_REGISTRY, name):
            meant = did_you_mean(f"simpler_{name}", [f"simpler_{known.partition('_')[2]}" for known in self])
            msg = f"TerraTorch knows no backbone '{name}' for 'simpler_{name}'{meant}: change backbone in model_args."
            raise UnknownBackboneError(msg)
        refuse_by_name(name)
        _refuse_typos(kwargs)
        if kwargs.get("pretrained") and "prithvi" in name:
            _warn_of_bands(name, kwargs.get("bands") or kwargs.get("model_bands") or ())
        keep_import()
        keep, out_indices = _parsed(keep), _parsed(out_indices)
        width = 1.0 if width is None else resolve_width(_parsed(width))  # before weights are fetched
        if "pretrained" in kwargs:
            kwargs["pretrained"] = _parsed(kwargs["pretrained"])  # 'false' would be taken for true
        if not is_timm(*source) and kwargs.get("pretrained", True):
            check_files(kwargs)
        files = read_files(kwargs)
        random_weights = kwargs.get("pretrained") is False and not source[1].startswith(LOADS_ALWAYS)
        weights = pop_pruned_weights(name, kwargs, files)
        file = pop_file(source[1], kwargs) if weights is None and is_timm(*source) else None
        fetched = bool(kwargs.get("pretrained")) and weights is None and file is None and not files
        with weights_at_hand(name) if fetched else nullcontext():
            encoder = _build_encoder(source, args, kwargs)
        if file is not None:
            load_file(encoder, source[1], file)
        elif weights is None:
            check_loaded(encoder, name, kwargs, files)
        backbone = SimplerBackbone(
            encoder,
            name=name,
            out_indices=out_indices,
            keep=keep if weights is None else None,
            plan=plan if weights is None else None,
            width=width if weights is None else 1.0,
            # DINOv3 has no `pretrained`: its weights come from ckpt_path, and may be pretrained or not.
            pretrained=None
            if "pretrained" not in kwargs and kwargs.get("ckpt_path")
            else file is not None or bool(kwargs.get("pretrained")),
            block_path=block_path,
        )
        if weights is not None:
            load_pruned(backbone, weights, keep, plan, width, state_only=random_weights)
        return backbone


def _refuse_typos(arguments: Iterable[str]) -> None:
    """TerraTorch's encoders ignore arguments that they do not know."""
    for name in arguments:
        if name.startswith(tuple(f"{ours}_" for ours in OUR_ARGUMENTS)):  # such as timm's pretrained_cfg
            continue
        if name not in OUR_ARGUMENTS and (close := difflib.get_close_matches(name, OUR_ARGUMENTS, n=1, cutoff=0.8)):
            meant = f"(did you mean 'backbone_{close[0]}'?)"
            msg = f"The encoder takes no argument 'backbone_{name}' {meant}: change it in model_args."
            raise ConfigurationError(msg)


def _warn_of_bands(name: str, bands: Iterable[Any]) -> None:
    """TerraTorch gives bands that Prithvi does not know random weights, and says nothing of it."""
    known = [band.name for band in PRETRAINED_BANDS]
    unknown = [str(band) for band in bands if isinstance(band, str) and band.rpartition(".")[2] not in known]
    if unknown:
        warnings.warn(
            f"'{name}' was pretrained on the bands {', '.join(known)}, so that its weights for {', '.join(unknown)} are "
            "random: if they are some of these bands, write these names in backbone_bands.",
            SimplerWarning,
            stacklevel=3,
        )


def _parsed(value: Any) -> Any:
    """Settings of ``model_args`` that are given on the command line arrive as text."""
    return parse_yaml(value) if isinstance(value, str) else value


def _other_sources() -> MultiSourceRegistry[Any]:
    return MultiSourceRegistry(**{key: BACKBONE_REGISTRY[key] for key in BACKBONE_REGISTRY.keys() if key != SOURCE})  # noqa: SIM118 (this registry iterates over names, not keys)


def _find(name: str) -> tuple[Any, str] | None:
    """The source that knows an encoder, and its name there; None if none does."""
    others = _other_sources()
    for known in (name, name.partition(".")[0]):
        if known in others:
            source = others.find_registry(known)
            prefix = next(key for key in others.keys() if others[key] is source)  # noqa: SIM118
            return source, name.removeprefix(f"{prefix}_")
    return None


def _refusal(name: str) -> UnsupportedEncoderError | None:
    """Why an encoder cannot be pruned, as far as its name tells."""
    try:
        refuse_by_name(name)
    except UnsupportedEncoderError as err:
        return err
    model = name.removeprefix("timm_").partition(".")[0]
    if any(word in name for word in NOT_ENCODERS) or (
        timm.is_model(model) and not timm.models.is_model_in_modules(model, TIMM_MODULES)
    ):
        msg = (
            f"Found backbone '{name}', expected an encoder with one stack of equal blocks of a known family such as "
            f"prithvi_eo_v2_300_tl: use '{name}' without 'simpler_'."
        )
        return UnsupportedEncoderError(msg)
    return None


def _build_encoder(source_and_name: tuple[Any, str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    source, own_name = source_and_name
    try:
        return source.build(own_name, *args, **kwargs)  # type: ignore[no-any-return]
    except InvalidModelError as err:
        # TerraTorch takes a KeyError of a constructor for an unknown name, which this one is not.
        if isinstance(err.__context__, KeyError):
            raise err.__context__ from None
        raise
