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
from terratorch_simpler.criteria.probe import Probe
from terratorch_simpler.criteria.ranges import Angular, CkaIntervals
from terratorch_simpler.criteria.simpler import Simpler
from terratorch_simpler.criteria.sls import Sls
from terratorch_simpler.criteria.statistics import Evidence, GroupSums, LabelledFeatures, LabelSets, Statistics, naming
from terratorch_simpler.criteria.verdict import judge, verdict_on

for _criterion in (Simpler, Knee, BlockInfluence, Angular, CkaIntervals, Sls, Probe, Fixed):
    register(_criterion)

__all__ = [
    "Angular",
    "BlockInfluence",
    "Bounds",
    "BudgetCriterion",
    "Choice",
    "CkaIntervals",
    "Criterion",
    "Evidence",
    "Fixed",
    "GroupSums",
    "Knee",
    "LabelSets",
    "LabelledFeatures",
    "Probe",
    "Simpler",
    "Sls",
    "Statistics",
    "bootstrap",
    "build_criterion",
    "judge",
    "known_criteria",
    "naming",
    "register",
    "verdict_on",
]
