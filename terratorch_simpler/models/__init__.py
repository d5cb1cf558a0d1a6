"""The model that takes part in TerraTorch, and its state in checkpoints."""
