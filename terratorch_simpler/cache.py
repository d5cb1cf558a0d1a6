"""A cache of plans in a folder that several runs share: on a hit no tiles are streamed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from terratorch_simpler.criteria import Bounds, Criterion
from terratorch_simpler.data import TILE_KEYS, Batch, TileSource
from terratorch_simpler.errors import ConfigurationError, PlanError, SimplerWarning
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.peft import PROMPTS, adapter_names
from terratorch_simpler.plan import SlimmingPlan

SAMPLED_TILES = 64
"""Number of tiles that are hashed to recognise the data of an earlier run."""
PATIENCE_SECONDS = 20 * 60.0
"""Time a run waits for another that computes the same plan; then it computes the plan itself."""


class PlanCache:
    """Cached plans, by a hash of everything they depend on.

    Files count by name, size and time of the last change, and the tiles by a sample of 64 that is spread over all that may
    be streamed. Copies of the data share plans if the times were copied with the files.

    Args:
        folder: The folder; runs on any number of machines may use it at the same time.
        every_tile: Hash every tile that may be streamed instead of a sample of 64, for which all of them are read.
    """

    def __init__(self, folder: str | Path, every_tile: bool = False) -> None:
        """Nothing is read yet."""
        self.folder = Path(folder)
        self.every_tile = every_tile

    @contextmanager
    def entry(self, selection: Mapping[str, Any], backbone: SimplerBackbone) -> Iterator[tuple[Path, SlimmingPlan | None]]:
        """Look up the plan of a selection; on a miss, lock the entry so that other runs wait for it.

        The lock only saves work: without it two runs compute the same plan, and either writes a complete file.

        Args:
            selection: Everything the plan depends on, as plain values.
            backbone: The encoder it is for.

        Yields:
            Path of the entry, and its plan, or None on a miss.

        Raises:
            ConfigurationError: If the folder cannot be written to.
        """
        key = hashlib.sha256(json.dumps(selection, sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"{key}.json"
        if (plan := _load(path, backbone)) is not None:  # most runs of a sweep: no lock needed
            yield path, plan
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            msg = f"Could not write to plan_cache {self.folder} ({err}), expected a folder to write to: change plan_cache."
            raise ConfigurationError(msg) from err
        with _locked(path.with_suffix(".lock")):
            yield path, _load(path, backbone)


def describe_selection(
    backbone: SimplerBackbone,
    source: TileSource,
    criterion: Criterion,
    bounds: Bounds,
    max_tiles: int,
    normalize: Callable[[Batch], Batch],
    every_tile: bool = False,
) -> dict[str, object]:
    """What a plan depends on: the encoder, the tiles as it reads them, and the criterion.

    Args:
        backbone: The intact encoder, on the CPU.
        source: The tiles.
        criterion: Chooses the plan.
        bounds: Bounds on the depth.
        max_tiles: Tiles after which the stream ends.
        normalize: Normalises a batch as for the encoder.
        every_tile: Hash all tiles that may be streamed, not only a sample of them.

    Returns:
        Plain values; a part of what :meth:`PlanCache.entry` takes.
    """
    tiles = min(len(source), max_tiles)
    return {
        "backbone": backbone.name,
        "weights": hash_of_weights(backbone),
        "data": source.describe(),
        "changed": source.modification_fingerprint(),
        "seen": _hash_tiles(source, normalize, tiles, tiles if every_tile else SAMPLED_TILES),
        "criterion": [type(criterion).__module__, type(criterion).__qualname__, repr(sorted(vars(criterion).items()))],
        "bounds": repr(bounds),
    }


def _hash_tiles(source: TileSource, normalize: Callable[[Batch], Batch], tiles: int, sample: int) -> list[tuple[int, str]]:
    """Positions and hashes of tiles spread over the stream, as the encoder reads them: bands, scale, normalisation.

    Names, sizes and times of files say nothing about these. The stream is in a seeded random order, so every n-th tile of it
    is a random sample of all.
    """
    hashes: list[tuple[int, str]] = []
    for batch in source.shard(-(-tiles // sample) or 1, 0):
        inputs = normalize({key: value for key, value in batch.items() if key not in TILE_KEYS})
        for tile, position in enumerate(batch["position"]):
            if position >= tiles:
                return hashes
            hashes.append((position, hash_of_tensors({name: value[tile] for name, value in _named_tensors(inputs)})))
    return hashes


def _named_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for name, value in batch.items():
        if isinstance(value, dict):  # modalities
            yield from _named_tensors(value)
        elif isinstance(value, Tensor):
            yield name, value


def store_plan(plan: SlimmingPlan, path: Path) -> None:
    """Write a plan to the cache; a failure is a warning, and the run continues."""
    try:
        plan.save(path)
    except OSError as err:
        msg = f"Could not write the plan to plan_cache ({err}), expected a folder to write to; continuing without caching."
        warnings.warn(msg, SimplerWarning, stacklevel=2)


def hash_of_weights(backbone: SimplerBackbone) -> str:
    """SHA-256 over the names and bits of an encoder's pretrained weights.

    Adapters (LoRA) and visual prompts are left out: they are switched off when blocks are compared, and start from other
    random numbers in every run.

    Args:
        backbone: The intact encoder, on the CPU.
    """
    tuned = {PROMPTS, *adapter_names(backbone)}
    return hash_of_tensors(
        {name: value for name, value in backbone.encoder.state_dict().items() if tuned.isdisjoint(name.split("."))}
    )


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _load(path: Path, backbone: SimplerBackbone) -> SlimmingPlan | None:
    if not path.exists():
        return None
    try:
        plan = SlimmingPlan.load(path)
        plan.check_encoder(backbone.name, backbone.full_num_blocks)
    except PlanError as err:
        warnings.warn(f"{err} It is made again.", SimplerWarning, stacklevel=2)
        return None
    return plan


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info(f"Another run is making the same plan; waiting for it ({path}).")
            lock.acquire(timeout=PATIENCE_SECONDS, poll_interval=0.5)
    except (Timeout, OSError, RuntimeError) as err:  # a file system without locks, or a run that hangs
        log.info(f"Going on without the lock {path} ({type(err).__name__}): the same plan may be made twice.")
        yield
        return
    try:
        yield
    finally:
        # Waiting runs hold the deleted file open; they find the plan once they acquire the lock.
        with suppress(OSError):
            path.unlink()
        lock.release()
