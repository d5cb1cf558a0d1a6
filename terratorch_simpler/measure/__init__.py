"""Runs an intact encoder over tiles and gathers the statistics of its blocks. No mathematics."""

from terratorch_simpler.measure.borrow import as_pretrained, borrowed, random_state_kept
from terratorch_simpler.measure.cost import count_macs, macs_by_block
from terratorch_simpler.measure.inputs import check_input, explain
from terratorch_simpler.measure.labelled import IMAGES, LabelledRows, Readout, check_labels, collect_labelled
from terratorch_simpler.measure.memory import Feeder
from terratorch_simpler.measure.repairs import Repairs
from terratorch_simpler.measure.stream import Measurement, measure
from terratorch_simpler.measure.tap import Tap
from terratorch_simpler.measure.tokens import Tokens
from terratorch_simpler.measure.unfinished import Unfinished

__all__ = [
    "IMAGES",
    "Feeder",
    "LabelledRows",
    "Measurement",
    "Readout",
    "Repairs",
    "Tap",
    "Tokens",
    "Unfinished",
    "as_pretrained",
    "borrowed",
    "check_input",
    "check_labels",
    "collect_labelled",
    "count_macs",
    "explain",
    "macs_by_block",
    "measure",
    "random_state_kept",
]
