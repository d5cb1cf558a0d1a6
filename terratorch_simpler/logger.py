"""The package's logger, ``terratorch_simpler``: shown like Lightning's own, on rank zero only.

Silence it with ``logging.getLogger("terratorch_simpler").setLevel("WARNING")``, which also hides the table of a plan in
``fit``.
"""

import logging

from lightning.fabric.utilities.rank_zero import rank_zero_only


def _on_rank_zero(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or getattr(rank_zero_only, "rank", 0) == 0


log = logging.getLogger("terratorch_simpler")
log.addFilter(_on_rank_zero)
if log.level == logging.NOTSET:  # a level that the application has set stays
    log.setLevel(logging.INFO)
if not log.hasHandlers():  # as lightning.pytorch does: an application that configures logging gets the records instead
    log.addHandler(logging.StreamHandler())
    log.propagate = False
