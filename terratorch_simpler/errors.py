"""Every error and warning of the package: what was found, what was expected, what to do, in one sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class SimplerError(Exception):
    """Base of all errors that terratorch_simpler raises on purpose."""


class ConfigurationError(SimplerError, ValueError):
    """The run is set up in a way that cannot work: an option, a callback order, a missing part."""


class SettingsError(ConfigurationError):
    """The arguments or the config of a command are wrong, before anything ran."""


class UnsupportedEncoderError(SimplerError, TypeError):
    """The encoder has no stack of equal blocks, or no encoder spec knows where it is."""


class DepthError(SimplerError, ValueError):
    """Block numbers, a depth or bounds on it do not fit the encoder."""


class PlanError(SimplerError, ValueError):
    """A plan file is damaged, of another version, or made for another encoder."""


class CheckpointError(SimplerError, RuntimeError):
    """A checkpoint does not fit the encoder it is loaded into."""


class DownloadError(SimplerError, RuntimeError):
    """Weights are neither on this machine nor can they be fetched."""


class ExportError(SimplerError, RuntimeError):
    """A model cannot be expressed without this package, or the outputs of what was written differ."""


class ComparisonError(ExportError):
    """The outputs of the trained model cannot tell it from another one, so that comparing them proves nothing."""


class NotCarriedError(ExportError):
    """A checkpoint holds something of the model that would be lost where this package is not installed."""


class DegenerateFeaturesError(SimplerError, ValueError):
    """A block's output cannot be compared: constant, not finite, or too few rows."""


class NoAnswerError(SimplerError, ValueError):
    """The criterion has no answer for this encoder: what it looks for is not there."""


class UnsettledError(SimplerError, RuntimeError):
    """The choice is unsettled, and ``on_unsettled`` is "error"."""


class RecoveryError(SimplerError, ValueError):
    """A recovery is not possible: too few tokens or tiles, values that are not finite, or an encoder where none fits."""


class OutOfMemoryError(SimplerError, RuntimeError):
    """Not even one tile, or for a distillation not both encoders, fit into the memory of the device."""


class ProcessError(SimplerError, RuntimeError):
    """Another process of the same run has failed, or no longer answers."""


class TilesError(SimplerError, ValueError):
    """Tiles cannot be used: too few, not fitting the encoder, or wrong arguments of GeoTiffTiles."""


class TooFewTilesError(TilesError):
    """A pass over all tiles saw too few of them to compare blocks.

    Args:
        message: What was found, what was expected and what to do.
        tiles: Number of usable tiles.
        input_shape: Shape of one input of the encoder, or of each modality; empty if no tile has reached it.
        skipped: Number of tiles that could not be used, by reason.
    """

    def __init__(self, message: str, tiles: int, input_shape: Any = (), skipped: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.tiles = tiles
        self.input_shape = input_shape
        self.skipped = dict(skipped or {})


class LabelsError(SimplerError, ValueError):
    """There are no labels to judge features by, or none of a kind that can be used."""


class SimplerWarning(UserWarning):
    """Something is unusual but the result is still what was asked for."""


class UntrainedEncoderWarning(SimplerWarning):
    """The encoder holds random weights, so a depth chosen on it means nothing."""


class UnsettledWarning(SimplerWarning):
    """The data do not support any one depth: the choice is taken, or replaced as ``on_unsettled`` says."""


class ImplausibleInputWarning(SimplerWarning):
    """A band of the tiles is far from zero mean and unit variance after normalization."""


class FewTilesWarning(SimplerWarning):
    """Fewer tiles than ``min_tiles`` were available; all were used."""


class SkippedTilesWarning(SimplerWarning):
    """Some tiles could not be used and were counted instead."""


def causes(err: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, the last one first."""
    while err is not None:
        yield err
        err = err.__cause__ or err.__context__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A suggestion to put behind a wrong name, or nothing.

    Args:
        name: What was given.
        known: What could have been meant.

    Example:
        >>> did_you_mean("--widht", ["--width", "--debug"]), did_you_mean("x", ["--debug"])
        (" (did you mean '--width'?)", '')
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
