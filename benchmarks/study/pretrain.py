"""Pretrain a small Prithvi encoder as a masked autoencoder on any folders of GeoTIFF tiles.

The encoder shipped with the demo (``terratorch_simpler/demo/encoder.pt``) was made with this script; its model card,
``terratorch_simpler/demo/ENCODER.md``, gives the command and the data. Objective and architecture are TerraTorch's own
``PrithviMAE`` (He et al. 2022, arXiv 2111.06377; Prithvi-EO-2.0, arXiv 2412.02732), with a narrower decoder, since the
decoder is thrown away. A run that was ended goes on from its last 50 steps.

Every ``--tiles`` source is standardised by its own band statistics, because sensors and units differ between sources.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from terratorch.registry import FULL_MODEL_REGISTRY
from torch import Tensor

from terratorch_simpler.files import atomic_write

Tile = NDArray[np.float32]


def read_source(path: Path, pattern: str, names: set[str] | None) -> list[Tile]:
    """Read all six-band rasters of one source, standardised by the source's own band means and deviations.

    Args:
        path: A GeoTIFF or a folder of them.
        pattern: Glob pattern within a folder.
        names: If given, only files whose name contains one of these ids.

    Returns:
        Arrays of shape (C, H, W), zero where the raster has no data.
    """
    files = [path] if path.is_file() else sorted(path.glob(pattern))
    if names is not None:
        files = [file for file in files if any(name in file.name for name in names)]
    tiles = []
    for file in files:
        with rasterio.open(file) as src:
            tiles.append(src.read(masked=True).astype(np.float32).filled(np.nan))
    if not tiles:
        raise SystemExit(f"No raster in {path} matches {pattern}: give a folder of GeoTIFF files.")
    pixels = np.concatenate([tile.reshape(len(tile), -1) for tile in tiles], axis=1)
    mean, std = np.nanmean(pixels, axis=1), np.nanstd(pixels, axis=1)
    return [np.nan_to_num((tile - mean[:, None, None]) / std[:, None, None]) for tile in tiles]


def draw_batch(tiles: list[Tile], weights: NDArray[np.float64], batch: int, size: int, rng: np.random.Generator) -> Tensor:
    """Draw random crops of random extent, turned and flipped at random, resized to ``size``: (B, C, size, size)."""
    smallest = min(min(tile.shape[1:]) for tile in tiles)
    crop = int(rng.integers(size // 2, min(size, smallest) + 1))
    crops = []
    for index in rng.choice(len(tiles), size=batch, p=weights):
        tile = tiles[index]
        row, col = (int(rng.integers(0, extent - crop + 1)) for extent in tile.shape[1:])
        window = np.rot90(tile[:, row : row + crop, col : col + crop], k=int(rng.integers(4)), axes=(1, 2))
        crops.append(window[:, :, ::-1] if rng.random() < 0.5 else window)
    images = torch.from_numpy(np.stack(crops))
    return torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def pretrain(
    tiles: list[Tile],
    output: Path,
    *,
    model: str = "prithvi_eo_v2_tiny_tl_mae",
    depth: int | None = None,
    size: int = 128,
    steps: int = 2000,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | None = None,
) -> Path:
    """Train, then write the encoder's weights in half precision under the names that TerraTorch's loader expects.

    Args:
        tiles: Standardised images of shape (C, H, W).
        output: The file to write.
        model: Name of a masked autoencoder in TerraTorch's registry.
        depth: Blocks of its encoder; by default its own.
        size: Side of the crops in pixels.
        steps: Optimizer steps.
        batch: Crops of a step.
        lr: Peak learning rate.
        seed: Of weights, crops and masks.
        device: Where to train; by default a GPU if there is one.

    Returns:
        The file.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    area = np.array([tile.shape[1] * tile.shape[2] for tile in tiles], dtype=np.float64)
    deeper = {} if depth is None else {"depth": depth}
    mae = FULL_MODEL_REGISTRY.build(
        model, norm_pix_loss=True, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4, **deeper
    ).to(device)
    decay = [p for p in mae.parameters() if p.ndim > 1]
    rest = [p for p in mae.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3),
    )
    parts = {"model": mae, "optimizer": optimizer, "schedule": schedule}
    unfinished, done = output.with_suffix(".unfinished"), 0
    if unfinished.exists():
        state = torch.load(unfinished, map_location=device, weights_only=True)
        done = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.manual_seed(seed + done)
        rng = np.random.default_rng((seed, done))
    start, losses = time.monotonic(), []
    for step in range(done + 1, steps + 1):
        images = draw_batch(tiles, area / area.sum(), batch, size, rng).to(device)
        loss = mae(images)[0]["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            print(
                f"{output.stem}: step {step}: loss {np.mean(losses[-50:]):.4f}, {time.monotonic() - start:.0f} s", flush=True
            )
            with atomic_write(unfinished) as part_file:
                torch.save({"step": step, **{name: part.state_dict() for name, part in parts.items()}}, part_file)
    with atomic_write(output) as part_file:
        torch.save({f"encoder.{name}": value.half().cpu() for name, value in mae.encoder.state_dict().items()}, part_file)
    unfinished.unlink()
    return output


def main() -> None:
    """Pretrain on what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=Path, action="append", required=True, help="GeoTIFF or folder; repeatable")
    parser.add_argument("--pattern", default="*.tif", help="glob within folders")
    parser.add_argument("--ids", type=Path, help="text file with one tile id a line: only files that contain one of them")
    parser.add_argument("--model", default="prithvi_eo_v2_tiny_tl_mae")
    parser.add_argument("--depth", type=int, help="blocks of the encoder")
    parser.add_argument("--size", type=int, default=128, help="side of the training crops in pixels")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("encoder.pt"))
    args = parser.parse_args()
    names = set(args.ids.read_text().split()) if args.ids else None
    # The ids name files of folders; a source that is a single file was chosen by name already.
    tiles = [tile for path in args.tiles for tile in read_source(path, args.pattern, names if path.is_dir() else None)]
    pretrain(
        tiles,
        args.output,
        model=args.model,
        depth=args.depth,
        size=args.size,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
