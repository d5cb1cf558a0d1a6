"""Feature extraction: streams tiles through an intact encoder and accumulates the statistics of its blocks."""

from terratorch_simpler.extraction.auto_batch import AutoBatch
from terratorch_simpler.extraction.collector import ExtractionConfig
from terratorch_simpler.extraction.evaluating import as_pretrained, evaluating, on_device, random_state_kept
from terratorch_simpler.extraction.hooks import FeatureExtractor, Readout
from terratorch_simpler.extraction.inputs import check_input, explain
from terratorch_simpler.extraction.labelled import (
    IMAGES,
    LabelledRows,
    check_labels,
    collect_label_sets,
    collect_labelled,
    layer_normed,
    rows_per_image,
)
from terratorch_simpler.extraction.loop import Measurement, measure
from terratorch_simpler.extraction.macs import count_macs, macs_by_block
from terratorch_simpler.extraction.partial_result import PartialResult
from terratorch_simpler.extraction.progress import progress_bar
from terratorch_simpler.extraction.recovery_statistics import RecoveryStatistics
from terratorch_simpler.extraction.token_sampling import Tokens, TokenSampler

__all__ = [
    "IMAGES",
    "AutoBatch",
    "ExtractionConfig",
    "FeatureExtractor",
    "LabelledRows",
    "Measurement",
    "PartialResult",
    "Readout",
    "RecoveryStatistics",
    "TokenSampler",
    "Tokens",
    "as_pretrained",
    "check_input",
    "check_labels",
    "collect_label_sets",
    "collect_labelled",
    "count_macs",
    "evaluating",
    "explain",
    "layer_normed",
    "macs_by_block",
    "measure",
    "on_device",
    "progress_bar",
    "random_state_kept",
    "rows_per_image",
]
