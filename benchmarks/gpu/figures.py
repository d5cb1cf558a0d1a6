"""The figures of docs/evidence.md, by the benchmarks that make them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import selection_overhead, speed
from benchmarks.gpu.check import Finding, Settings, judged, skipped

NARROW = '{"embed_dim":48,"num_heads":3}'


def speed_and_memory(settings: Settings) -> Iterator[Finding]:
    """Training and inference of whole models, intact and cut, against the bars of docs/evidence.md."""
    size = "--sizes 224 512 --rounds 10 --decoders linear unet upernet"
    if settings.small:
        size = "--backbone prithvi_eo_tiny --blocks 4 --keep 1 --sizes 64 --batches 2 --rounds 2 --decoders linear"
    where = ["--device", settings.device, "-o", str(settings.results)]
    speed.main([*size.split(), "--precisions", "bf16", *where])
    found = read(settings, "speed")
    for row in found["rows"]:
        for kind in ("train", "infer"):
            rates = {
                rate["model"]: rate
                for rate in found["rates"]
                if rate["run"] == kind and (rate["decoder"], rate["size"]) == (row["decoder"], row["size"])
            }
            yield faster(row, kind, rates["intact"], rates["cut"], settings.small)


def faster(row: dict[str, Any], kind: str, intact: dict[str, Any], cut: dict[str, Any], small: bool) -> Finding:
    """Judge one decoder, size and way to run it.

    Args:
        row: Of the benchmark.
        kind: ``train`` or ``infer``.
        intact: Images a second and peak memory of one model.
        cut: The same of the other.
        small: Whether the sizes are none that a bar is for.
    """
    speedup = row[f"{kind}_speedup"]
    what = (
        f"{row['decoder']}, {row['size']} px, {kind}: {told(cut)} against {told(intact)} images/s, {speedup:.2f}x "
        f"({row[f'{kind}_range']}), bar {row['bar']:g}x, by operations {row['limit']:.2f}x; {cut['peak_mib']:.0f} against "
        f"{intact['peak_mib']:.0f} MiB"
    )
    numbers = {"speedup": speedup, "bar": row["bar"], "limit": row["limit"], "intact": intact, "cut": cut}
    if small:
        return skipped(f"{what}; too small to be judged", **numbers)
    if row["limit"] < row["bar"]:
        return skipped(f"{what}; the bar is above what operations allow: not judged", **numbers)
    return judged(speedup >= row["bar"] and cut["peak_mib"] < intact["peak_mib"], what, **numbers)


def told(rate: dict[str, Any]) -> str:
    """Median, and least to most."""
    return f"{rate['images_a_second']:.0f} ({rate['least']:.0f}-{rate['most']:.0f})"


def overhead(settings: Settings) -> Iterator[Finding]:
    """The selection pass beside the encoder's own forward pass, in both precisions."""
    size = "--backbone prithvi_eo_v2_300 --tiles 1024 --batch 64 --rounds 5"
    if settings.small:
        size = f"--backbone prithvi_eo_v2_tiny_tl --arguments {NARROW} --tiles 40 --batch 8 --rounds 1"
    for precision in ("bf16", "fp32"):
        where = ["--device", settings.device, "-o", str(settings.results)]
        selection_overhead.main([*size.split(), "--precision", precision, *where])
        [row] = read(settings, "selection_overhead")["rows"]
        what = (
            f"{row['size']} px, {precision}: {row['tiles'] / row['selection_s']:.0f} tiles/s against "
            f"{row['tiles'] / row['encoder_alone_s']:.0f} of the encoder alone, {row['ratio']:.3f}x the time "
            f"({row['range']}), bar {row['bar']:g}x"
        )
        if settings.small:
            yield skipped(f"{what}; too small to be judged", **row)
        else:
            yield judged(row["ratio"] <= row["bar"], what, **row)


def read(settings: Settings, name: str) -> dict[str, Any]:
    """What a benchmark has written last."""
    path: Path = settings.results / f"{name}-{settings.device.partition(':')[0]}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found
