"""Rules that pick which blocks to keep. One file a rule; statistics in, scores and kept blocks out; pure tensors.

A rule is a :class:`Criterion` with a name of its own, made known by one line, :func:`register`.
"""

from terratorch_simpler.criteria.angular import Angular
from terratorch_simpler.criteria.base import Bounds, Choice, Criterion, bootstrap, build_criterion, known_criteria, register
from terratorch_simpler.criteria.block_influence import BlockInfluence
from terratorch_simpler.criteria.budget import BudgetCriterion
from terratorch_simpler.criteria.cka_intervals import CkaIntervals
from terratorch_simpler.criteria.fixed import Fixed
from terratorch_simpler.criteria.knee import Knee
from terratorch_simpler.criteria.simpler import Simpler
from terratorch_simpler.criteria.sls import Sls
from terratorch_simpler.criteria.statistics import GroupSums, Labelled, Statistics

for _rule in (Simpler, Knee, BlockInfluence, Angular, CkaIntervals, Sls, Fixed):
    register(_rule)

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
