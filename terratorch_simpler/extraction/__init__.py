"""Runs an intact encoder over tiles and gathers the statistics of its blocks. No mathematics."""

from terratorch_simpler.extraction.auto_batch import AutoBatch
from terratorch_simpler.extraction.cost import count_macs, macs_by_block
from terratorch_simpler.extraction.evaluating import as_pretrained, evaluating, random_state_kept
from terratorch_simpler.extraction.hooks import FeatureExtractor
from terratorch_simpler.extraction.inputs import check_input, explain
from terratorch_simpler.extraction.labelled import IMAGES, LabelledRows, Readout, check_labels, collect_labelled
from terratorch_simpler.extraction.loop import Measurement, measure
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.extraction.recovery_sums import RecoverySums
from terratorch_simpler.extraction.token_sampling import Tokens

__all__ = [
    "IMAGES",
    "AutoBatch",
    "FeatureExtractor",
    "LabelledRows",
    "Measurement",
    "PartialResult",
    "Readout",
    "RecoverySums",
    "Tokens",
    "as_pretrained",
    "check_input",
    "check_labels",
    "collect_labelled",
    "count_macs",
    "evaluating",
    "explain",
    "macs_by_block",
    "measure",
    "random_state_kept",
]
