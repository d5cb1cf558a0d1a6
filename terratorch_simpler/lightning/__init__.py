"""What runs inside a Lightning Trainer: the callbacks, and the selection that they start."""
