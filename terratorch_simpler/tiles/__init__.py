"""Where images come from: windows of GeoTIFF files, or the datamodule's training images. Neither knows the model."""

from terratorch_simpler.tiles.datamodule import DatamoduleTiles, Split
from terratorch_simpler.tiles.geotiff import GeoTiffTiles
from terratorch_simpler.tiles.source import Batch, Share, Skip, Skipped, TileSource

__all__ = ["Batch", "DatamoduleTiles", "GeoTiffTiles", "Share", "Skip", "Skipped", "Split", "TileSource"]
