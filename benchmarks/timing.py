"""Clocks that wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a call, the device's work included."""
    start = now(device)
    run()
    return now(device) - start
