"""Tiles held in memory, for tests of what is done with them."""

import torch

from terratorch_simpler.data import Shard, Skip, SkipCounter


class Tiles:
    """A source of tiles from a tensor, or one for each modality; those in ``broken`` cannot be read."""

    def __init__(self, images, valid=None, batch_size=16, extra=None, broken=(), max_bad_fraction=1.0):
        self.images = images
        first = next(iter(images.values())) if isinstance(images, dict) else images
        self.count = len(first)
        self.valid = torch.ones(self.count, *first.shape[-2:], dtype=torch.bool) if valid is None else valid
        self.batch_size = batch_size
        self.extra = extra or {}
        self.broken = set(broken)
        self.max_bad_fraction = max_bad_fraction
        self.share = Shard()
        self.skips = self.new_skip_counter()
        self.on_skip = None
        self.pin_memory = False

    @property
    def skipped(self):
        return dict(self.skips.counts)

    def new_skip_counter(self):
        return SkipCounter(self.count, self.max_bad_fraction)

    def shard(self, num_shards, index, block=1, start=0):
        self.share = Shard(num_shards, index, block, start)
        return self

    def describe(self):
        return {}

    def __len__(self):
        return self.count

    def __iter__(self):
        self.skips = self.new_skip_counter()
        waiting = []
        for position in self.share.positions(self.count).tolist():
            if position in self.broken:
                skip = Skip(position, "unreadable", f"tile {position}", bad=True)
                self.skips.add(skip)
                if self.on_skip:
                    self.on_skip(skip)
                continue
            waiting.append(position)
            if len(waiting) == self.batch_size:
                yield self.batch(waiting)
                waiting = []
        if waiting:
            yield self.batch(waiting)

    def batch(self, positions):
        extra = {key: value[positions] for key, value in self.extra.items()}
        images = self.images
        return {
            "image": {k: v[positions] for k, v in images.items()} if isinstance(images, dict) else images[positions],
            "valid": self.valid[positions],
            "index": positions,
            "position": positions,
            **extra,
        }


def land(count, size=64, bands=6, seed=0):
    """Smooth images with large differences between tiles, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, bands, 5, 5, generator=generator)
    tint = torch.randn(count, bands, 1, 1, generator=generator)
    return tint + torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
