"""Rules that pick which blocks to keep. One file a rule; statistics in, scores and kept blocks out; pure tensors.

A rule is a :class:`Criterion` with a name of its own, made known by one line, :func:`register`.
"""

from terratorch_simpler.criteria.base import Bounds, Choice, Criterion, build_criterion, register, vote
from terratorch_simpler.criteria.fixed import Fixed
from terratorch_simpler.criteria.simpler import Simpler

register(Simpler)
register(Fixed)

__all__ = ["Bounds", "Choice", "Criterion", "Fixed", "Simpler", "build_criterion", "register", "vote"]
