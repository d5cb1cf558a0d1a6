"""Arguments as users write them, in Python and on a command line, as the one type that is meant."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Set
from typing import Any

import numpy as np
from torch import Tensor

from terratorch_simpler.errors import TilesError


def whole_number(name: str, value: Any, least: int) -> int:
    """An int from an int of any library, a float without a fraction, or a number in text.

    Raises:
        TilesError: If it is none, or too small.
    """
    number = _number(value)
    if number is None or number != math.floor(number) or number < least:
        msg = f"Found {name} {_shown(value)}, expected {_a_whole_number(number)}at least {least}: change {name}."
        raise TilesError(msg)
    return int(number)


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A finite number from one of any library, or from text; an int where it has no fraction.

    Raises:
        TilesError: If it is none.
    """
    found = _number(value)
    if found is None:
        msg = f"Found {name} {_shown(value)}, expected {expected}: change {name}."
        raise TilesError(msg)
    return int(found) if abs(found) < 2**53 and found == math.floor(found) else found


def scaling(name: str, value: Any) -> float | str:
    """A finite float32, or "file" for what the file says.

    Raises:
        TilesError: If it is neither.
    """
    if isinstance(value, str) and value == "file":
        return "file"
    found = float(number(name, value, "a number or file"))
    _check_float32(name, [found], found)
    return found


def share(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        TilesError: If it is none.
    """
    found = _number(value)
    if found is None or not 0 <= found <= 1:
        msg = f"Found {name} {_shown(value)}, expected 0 to 1: change {name}."
        raise TilesError(msg)
    return float(found)


def numbers(name: str, values: Any) -> list[float]:
    """Numbers from a list, tuple, array or tensor; a single number is a list of one.

    Raises:
        TilesError: If they are none.
    """
    found = [_number(value) for value in _several(values)]
    if None in found:
        msg = f"Found {name} {_shown(values)}, expected numbers, one a band: change {name}."
        raise TilesError(msg)
    floats = [float(value) for value in found if value is not None]
    _check_float32(name, floats, floats)
    return floats


def bands(values: Any) -> list[int | str]:
    """Band numbers and descriptions; a single one is a list of one.

    Raises:
        TilesError: If there is none, or one is neither.
    """
    found: list[int | str] = []
    for value in _several(values):
        number = None if isinstance(value, str) else _number(value)
        if not isinstance(value, str) and (number is None or number != math.floor(number)):
            msg = f"Found bands {_shown(values)}, expected numbers from 1 or band descriptions: change bands."
            raise TilesError(msg)
        found.append(str(value) if number is None else int(number))
    if not found:
        msg = "Found an empty list of bands, expected at least one: name bands, or leave bands out to read all."
        raise TilesError(msg)
    return found


def flag(name: str, value: Any) -> bool:
    """True or false, also in text.

    Raises:
        TilesError: If it is neither.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    msg = f"Found {name} {_shown(value)}, expected true or false: change {name}."
    raise TilesError(msg)


def text(name: str, value: Any) -> str:
    """Text.

    Raises:
        TilesError: If it is none.
    """
    if not isinstance(value, str):
        msg = f"Found {name} {_shown(value)}, expected text: change {name}."
        raise TilesError(msg)
    return str(value)


def path(name: str, value: Any) -> str:
    """A path as text.

    Raises:
        TilesError: If it is none.
    """
    written = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(written, str) or not written or "\0" in written:
        msg = f"Found {name} {_shown(value)}, expected a path: change {name}."
        raise TilesError(msg)
    return str(written)


def _number(value: Any) -> float | int | None:
    """A finite number, an int exactly; None for what is none."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number | str):
        return None
    try:
        found = float(value)  # raises for an int that no file can hold
        if isinstance(value, int | np.integer):
            return int(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def _check_float32(name: str, values: list[float], written: object) -> None:
    largest = float(np.finfo(np.float32).max)
    if any(abs(value) > largest for value in values):
        msg = f"Found {name} {_shown(written)}, expected at most {largest:.2g}, since pixels are float32: change {name}."
        raise TilesError(msg)


def _several(values: Any) -> list[Any]:
    if isinstance(values, np.ndarray | Tensor):
        return list(values.reshape(-1).tolist())
    # Not sets and dicts: which value belongs to which band is a matter of order.
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | dict | Set) else [values]


def _a_whole_number(number: float | None) -> str:
    return "" if number is not None and number == math.floor(number) else "a whole number, "


def _shown(value: Any) -> str:
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    shown = repr(value)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
