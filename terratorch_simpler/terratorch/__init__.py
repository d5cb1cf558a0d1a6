"""What TerraTorch's own registry, factories and command line need to know of this package."""
