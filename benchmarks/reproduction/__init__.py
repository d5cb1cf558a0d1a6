"""The tables of the SIMPLER paper, run again: ``python -m benchmarks.reproduction``."""
