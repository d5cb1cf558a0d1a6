"""Sources of tiles: windows of GeoTIFF files, or the images of a datamodule. Neither depends on the model."""

from terratorch_simpler.data.batches import BatchTiles, num_tiles
from terratorch_simpler.data.datamodule import DatamoduleTiles, Split, band_names, batch_transform
from terratorch_simpler.data.geotiff import GeoTiffTiles
from terratorch_simpler.data.source import TILE_KEYS, Batch, Shard, Skip, SkipCounter, TileSource

__all__ = [
    "TILE_KEYS",
    "Batch",
    "BatchTiles",
    "DatamoduleTiles",
    "GeoTiffTiles",
    "Shard",
    "Skip",
    "SkipCounter",
    "Split",
    "TileSource",
    "band_names",
    "batch_transform",
    "num_tiles",
]
