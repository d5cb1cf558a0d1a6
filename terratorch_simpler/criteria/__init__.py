"""Criteria that choose which blocks to keep: statistics in, scores and kept blocks out; pure tensors.

A criterion is a :class:`Criterion` with a unique name, registered by one line, :func:`register`.
"""

from terratorch_simpler.criteria.base import (
    Bounds,
    BudgetCriterion,
    Choice,
    Criterion,
    bootstrap,
    build_criterion,
    known_criteria,
    register,
)
from terratorch_simpler.criteria.block_influence import BlockInfluence
from terratorch_simpler.criteria.fixed import Fixed
from terratorch_simpler.criteria.knee import Knee
from terratorch_simpler.criteria.ranges import Angular, CkaIntervals
from terratorch_simpler.criteria.simpler import Simpler
from terratorch_simpler.criteria.sls import Sls
from terratorch_simpler.criteria.statistics import GroupSums, Labelled, Statistics

for _criterion in (Simpler, Knee, BlockInfluence, Angular, CkaIntervals, Sls, Fixed):
    register(_criterion)

__all__ = [
    "Angular",
    "BlockInfluence",
    "Bounds",
    "BudgetCriterion",
    "Choice",
    "CkaIntervals",
    "Criterion",
    "Fixed",
    "GroupSums",
    "Knee",
    "Labelled",
    "Simpler",
    "Sls",
    "Statistics",
    "bootstrap",
    "build_criterion",
    "known_criteria",
    "register",
]
