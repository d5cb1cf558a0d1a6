"""What changes a model: its width, and linear recovery of dropped blocks."""
