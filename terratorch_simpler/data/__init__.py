"""Where images come from: windows of GeoTIFF files, or the datamodule's training images. Neither knows the model."""

from terratorch_simpler.data.datamodule import DatamoduleTiles, Split
from terratorch_simpler.data.geotiff import GeoTiffTiles
from terratorch_simpler.data.source import Batch, Share, Skip, Skipped, TileSource

__all__ = ["Batch", "DatamoduleTiles", "GeoTiffTiles", "Share", "Skip", "Skipped", "Split", "TileSource"]
