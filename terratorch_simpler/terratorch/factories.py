"""Model factories of TerraTorch that know nothing of its backbone registry, and so of no ``simpler_`` name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from terratorch_simpler.errors import SettingsError

WITHOUT_REGISTRY = frozenset(
    {
        "Clay1_5ModelFactory",
        "ClayModelFactory",
        "GenericUnetModelFactory",
        "PrithviModelFactory",
        "SMPModelFactory",
        "SatMAEModelFactory",
        "TimmModelFactory",
        "WxCModelFactory",
    }
)


def check_factory(settings: Mapping[str, Any]) -> None:
    """Refuse a ``simpler_`` name with a factory that fails on it in words of its own.

    Args:
        settings: Those of a run, as TerraTorch's parser has read them.

    Raises:
        SettingsError: If there is one.
    """
    arguments = (settings.get("model") or {}).get("init_args") or {}
    factory = arguments.get("model_factory")
    backbone = (arguments.get("model_args") or {}).get("backbone")
    if factory in WITHOUT_REGISTRY and str(backbone).startswith("simpler_"):
        msg = (
            f"Found model_factory {factory} with backbone '{backbone}', expected EncoderDecoderFactory, since {factory} "
            "does not look up names in TerraTorch's backbone registry: set model_factory: EncoderDecoderFactory."
        )
        raise SettingsError(msg)
