"""Converts arguments as users write them, in Python and on a command line, to one type, or refuses them by name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Set
from typing import Any

import numpy as np
from torch import Tensor

from terratorch_simpler.errors import TilesError

MAX_FLOAT32 = float(np.finfo(np.float32).max)


def integer(name: str, value: Any, least: int) -> int:
    """An int from an int of any library, a float without a fraction, or text."""
    number = _number(value)
    whole = number is not None and number == math.floor(number)
    if number is None or not whole or number < least:
        raise _error(name, value, f"{'' if whole else 'a whole number, '}at least {least}")
    return int(number)


def number(name: str, value: Any, expected: str = "a number") -> float:
    """A finite number from one of any library, or from text; an int where it has no fraction."""
    number = _number(value)
    if number is None:
        raise _error(name, value, expected)
    return int(number) if abs(number) < 2**53 and number == math.floor(number) else number


def scaling(name: str, value: Any) -> float | str:
    """A finite float32, or "file"."""
    if isinstance(value, str) and value == "file":
        return "file"
    factor = float(number(name, value, "a number or file"))
    _check_float32(name, [factor], factor)
    return factor


def fraction(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    number = _number(value)
    if number is None or not 0 <= number <= 1:
        raise _error(name, value, "0 to 1")
    return float(number)


def numbers(name: str, values: Any) -> list[float]:
    """Floats from a list, tuple, array or tensor; a single number is a list of one."""
    found = [_number(value) for value in _items(values)]
    floats = [float(value) for value in found if value is not None]
    if len(floats) < len(found):
        raise _error(name, values, "numbers, one per band")
    _check_float32(name, floats, floats)
    return floats


def bands(values: Any) -> list[int | str]:
    """Band numbers and descriptions; a single one is a list of one."""
    bands: list[int | str] = []
    for value in _items(values):
        number = None if isinstance(value, str) else _number(value)
        if not isinstance(value, str) and (number is None or number != math.floor(number)):
            raise _error("bands", values, "numbers from 1 or band descriptions")
        bands.append(str(value) if number is None else int(number))
    if not bands:
        raise TilesError("bands is empty, expected at least one: name bands, or leave bands out to read all.")
    return bands


def flag(name: str, value: Any) -> bool:
    """A bool, also from text."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise _error(name, value, "true or false")


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise _error(name, value, "text")
    return str(value)


def path(name: str, value: Any) -> str:
    """A path as text."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise _error(name, value, "a path")
    return str(path)


def _error(name: str, value: Any, expected: str) -> TilesError:
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    shown = repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    return TilesError(f"{name} is {shown}, expected {expected}: change {name}.")


def _number(value: Any) -> float | int | None:
    """A finite number, ints exactly; None for anything else."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number | str):
        return None
    try:
        number = float(value)  # raises for an int that no file can hold
        if isinstance(value, int | np.integer):
            return int(value)
    except (ValueError, TypeError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _check_float32(name: str, values: list[float], shown: object) -> None:
    if any(abs(value) > MAX_FLOAT32 for value in values):
        raise _error(name, shown, f"at most {MAX_FLOAT32:.2g}, since pixels are float32")


def _items(values: Any) -> list[Any]:
    if isinstance(values, np.ndarray | Tensor):
        return list(values.reshape(-1).tolist())
    # Not sets and dicts: their order says nothing about which value is whose band.
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | dict | Set) else [values]
