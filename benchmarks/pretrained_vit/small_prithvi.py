"""What every criterion says of the small Prithvi encoder that ships with the package, on HLS tiles.

    python -m benchmarks.pretrained_vit.small_prithvi DATA

DATA holds ``hls_water``. The encoder was pretrained for 3000 steps on the images of the same training tiles.
"""

from __future__ import annotations

import argparse
import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from terratorch.registry import BACKBONE_REGISTRY
from torch import Tensor

from benchmarks import record
from benchmarks.pretrained_vit.frozen import kept_name, level
from benchmarks.study.data import BANDS, COVER, IGNORED, read_split
from terratorch_simpler import select_depth
from terratorch_simpler.criteria import Angular, BlockInfluence, CkaIntervals, Knee, Probe, Simpler
from terratorch_simpler.demo import ENCODER
from terratorch_simpler.errors import DepthError

NAME = "simpler_prithvi_eo_v2_tiny_tl"
LABELS = {"cover": "landcover/{}_landcover.tif", "water": "water_mask/{}_mask.tif"}
BATCH = 34


def read_batches(data: Path, split: str, target: str) -> list[dict[str, Any]]:
    """Batches of a split in random order, standardized by the training tiles; ``filename`` starts with the place."""
    statistics = json.loads((data / "train_stats.json").read_text())
    mean, std = (torch.tensor(statistics[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    with (data / "tiles.csv").open() as file:
        place = {row["tile"]: row["site_group"] for row in csv.DictReader(file)}
    names = read_split(data, split)
    names = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    batches = []
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        images = torch.stack([(_read(data / f"images/{name}_image.tif").float() - mean) / std for name in part])
        codes = torch.stack([_read(data / LABELS[target].format(name))[0] for name in part])
        masks = codes
        if target == "cover":
            masks = torch.full_like(codes, IGNORED)
            for number, code in enumerate(COVER):
                masks[codes == code] = number
        batches.append({"image": images, "mask": masks, "filename": [f"{place[name]}|{name}" for name in part]})
    return batches


def _read(path: Path) -> Tensor:
    with rasterio.open(path) as source:
        return torch.from_numpy(source.read().astype(np.int64))


def rows(data: Path) -> list[dict[str, Any]]:
    """A line for every criterion; ``probe`` is given the labels of all training and validation tiles."""
    encoder = BACKBONE_REGISTRY.build(NAME, pretrained=True, ckpt_path=str(ENCODER), bands=BANDS, num_frames=1)
    half = encoder.full_num_blocks // 2
    table = []
    batches = {(split, target): read_batches(data, split, target) for split in ("train", "val") for target in LABELS}
    criteria = [(one, "") for one in (Simpler(), Knee(), Angular(half), BlockInfluence(half), CkaIntervals(half))]
    for criterion, target in [*criteria, *((Probe(groups=r"(.+)\|"), target) for target in LABELS)]:
        validation = batches["val", target] if target else None
        train = batches["train", target or "water"]
        kept, verdict, why = "-", "no answer", ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is unsettled is in the table
            try:
                plan = select_depth(
                    encoder, train, criterion=criterion, validation=validation, min_tiles=len(train) * BATCH, progress=False
                )
            except DepthError as error:
                why = str(error)
            else:
                kept, verdict = kept_name(list(plan.kept_blocks)), level(plan.verdict)
                why = " ".join(plan.verdict.reasons) if plan.verdict else ""
        table.append({"criterion": f"{criterion.name}, {target}" if target else criterion.name, "kept": kept})
        table[-1] |= {"verdict": verdict, "why": why}
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Select with every criterion, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    record.add_arguments(parser)
    args = parser.parse_args(arguments)
    table = rows(args.data / "hls_water")
    record.show("The small Prithvi", table)
    record.save("pretrained_vit_small", args, table, arguments, module="pretrained_vit.small_prithvi")


if __name__ == "__main__":
    main()
