"""What the package costs and gains, measured side by side in one run; ``make bench`` runs all."""
