"""What the similarity pass costs beside the encoder's own forward pass, measured in turn in one run.

    python benchmarks/selection_overhead.py --backbone prithvi_eo_v2_300 --device cuda

Prints a line a round and the median ratio; ``--json FILE`` writes the figures too. Tiles are random and held in memory, so
reading is not part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from terratorch.registry import BACKBONE_REGISTRY

import terratorch_simpler  # noqa: F401  makes simpler_ known
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.measure import measure
from terratorch_simpler.tiles import Batch, Skipped


class RandomTiles:
    """Random tiles in memory, each batch the same."""

    def __init__(self, shape: tuple[int, ...], tiles: int, batch: int) -> None:
        """Draw one batch."""
        self.image = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        self.tiles = tiles
        self.skips = Skipped(tiles, 0.1)
        self.skipped: dict[str, int] = {}

    def __len__(self) -> int:
        """Number of tiles."""
        return self.tiles

    def describe(self) -> dict[str, Any]:
        """Nothing to describe."""
        return {}

    def __iter__(self) -> Iterator[Batch]:
        """Stream the batch until there are enough tiles."""
        batch = len(self.image)
        for start in range(0, self.tiles, batch):
            valid = torch.ones(batch, *self.image.shape[-2:], dtype=torch.bool)
            yield {"image": self.image, "valid": valid, "index": list(range(start, start + batch))}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Time both in turn, after one round that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="prithvi_eo_v2_100_tl")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    backbone = BACKBONE_REGISTRY.build(f"simpler_{args.backbone}").to(args.device).eval()
    bands, *_, height, width = backbone.input_shape
    tiles = RandomTiles((bands, height, width), args.tiles, args.batch)

    def forward(batch: Batch) -> object:
        with torch.no_grad():
            return backbone(batch["image"].to(args.device, non_blocking=True))

    def plain() -> None:
        for batch in tiles:
            forward(batch)

    def select() -> None:
        measure(forward, backbone, tiles, Simpler(), Bounds(), min_tiles=args.tiles, max_tiles=args.tiles)

    rounds = [(seconds(plain, args.device), seconds(select, args.device)) for _ in range(args.rounds + 1)][1:]
    for encoder, selection in rounds:
        print(f"encoder alone {encoder:.2f} s, selection {selection:.2f} s, ratio {selection / encoder:.3f}")
    ratio = statistics.median(selection / encoder for encoder, selection in rounds)
    print(f"{args.backbone}, {args.tiles} tiles of {height} x {width}, batch {args.batch}, {args.device}: ratio {ratio:.3f}")
    if args.json:
        settings = {"backbone": args.backbone, "tiles": args.tiles, "batch": args.batch, "device": str(args.device)}
        args.json.write_text(json.dumps({**settings, "seconds": rounds, "median_ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
