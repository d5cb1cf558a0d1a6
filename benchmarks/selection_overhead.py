"""What the similarity pass costs beside the encoder's own forward pass, measured in turn in one run.

    python -m benchmarks.selection_overhead --backbone prithvi_eo_v2_300 --device cuda

Prints a line a round and the median ratio. Tiles are random and held in memory, so
reading is not part of it, unless ``--paths`` names GeoTIFF files to stream: then the share of the selection that the encoder
waited for tiles is told as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from terratorch.registry import BACKBONE_REGISTRY

import terratorch_simpler  # noqa: F401  makes simpler_ known
from benchmarks import record
from benchmarks.timing import seconds
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.data import Batch, GeoTiffTiles, Skip, SkipCounter, TileSource
from terratorch_simpler.extraction import ExtractionConfig, measure

BARS = {"cpu": 1.25, "cuda": 1.15}
"""What the pass may cost at most, as a multiple of the encoder's own time."""


class RandomTiles:
    """Random tiles in memory, each batch the same."""

    def __init__(self, shape: tuple[int, ...], tiles: int, batch: int) -> None:
        """Draw one batch."""
        self.image = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        self.tiles = tiles
        self.skips = self.new_skip_counter()
        self.skipped: dict[str, int] = {}
        self.pin_memory = False
        self.on_skip: Callable[[Skip], None] | None = None

    def __len__(self) -> int:
        """Number of tiles."""
        return self.tiles

    def describe(self) -> dict[str, Any]:
        """Nothing to describe."""
        return {}

    def new_skip_counter(self) -> SkipCounter:
        """None of them is skipped."""
        return SkipCounter(self.tiles, 0.1)

    def shard(self, num_shards: int, index: int, block: int = 1, start: int = 0) -> RandomTiles:  # noqa: ARG002
        """All of them: there is one process."""
        return self

    def __iter__(self) -> Iterator[Batch]:
        """Stream the batch until there are enough tiles."""
        batch = len(self.image)
        for start in range(0, self.tiles, batch):
            valid = torch.ones(batch, *self.image.shape[-2:], dtype=torch.bool)
            numbers = list(range(start, start + batch))
            yield {"image": self.image, "valid": valid, "index": numbers, "position": numbers}


def main(arguments: list[str] | None = None) -> None:
    """Time both in turn, after one round that is not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="prithvi_eo_v2_100_tl")
    parser.add_argument("--arguments", type=json.loads, default={}, help='of the backbone, e.g. {"modalities": ["S2L2A"]}')
    record.add_arguments(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="that the encoder runs in")
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paths", help="GeoTIFF files, folder or glob to stream; by default random tiles in memory")
    parser.add_argument("--tile_size", type=int, help="pixels; by default as the encoder is built")
    args = parser.parse_args(arguments)
    backbone = BACKBONE_REGISTRY.build(f"simpler_{args.backbone}", **args.arguments).to(args.device).eval()
    shape = backbone.input_shape
    bands, *_, height, width = next(iter(shape.values())) if isinstance(shape, dict) else shape  # the first modality
    height, width = (args.tile_size or height, args.tile_size or width)
    tiles: TileSource = RandomTiles((bands, height, width), args.tiles, args.batch)
    if args.device.type == "cuda" and isinstance(tiles, RandomTiles):
        tiles.image = tiles.image.pin_memory()  # as tiles that are read lie there
    if args.paths:
        tiles = GeoTiffTiles(args.paths, height, batch_size=args.batch, pin_memory=args.device.type == "cuda")

    def forward(batch: Batch) -> object:
        autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        with torch.no_grad(), autocast:
            return backbone(batch["image"].to(args.device, non_blocking=True))

    waits = []

    def plain() -> None:
        seen = 0
        for batch in tiles:
            forward(batch)
            seen += len(batch["index"])
            if seen >= args.tiles:
                break

    def select() -> None:
        found = measure(forward, backbone, tiles, ExtractionConfig(Simpler(), min_tiles=args.tiles, max_tiles=args.tiles))
        waits.append(found.data_wait / found.seconds)

    rounds = [(seconds(plain, args.device), seconds(select, args.device)) for _ in range(args.rounds + 1)][1:]
    for encoder, selection in rounds:
        print(f"encoder alone {encoder:.2f} s, selection {selection:.2f} s, ratio {selection / encoder:.3f}")
    ratios = sorted(selection / encoder for encoder, selection in rounds)
    row = {
        "backbone": args.backbone,
        "tiles": args.tiles,
        "size": height,
        "batch": args.batch,
        "precision": args.precision,
        "encoder_alone_s": statistics.median(encoder for encoder, _ in rounds),
        "selection_s": statistics.median(selection for _, selection in rounds),
        "ratio": statistics.median(ratios),
        "range": f"{ratios[0]:.3f}-{ratios[-1]:.3f}",
        "bar": BARS[args.device.type],
        "waiting_for_tiles": statistics.median(waits[1:]),
    }
    path = record.save("selection_overhead", args, [row], arguments)
    record.show("the pass beside the encoder alone", [row])
    print(path)


if __name__ == "__main__":
    main()
