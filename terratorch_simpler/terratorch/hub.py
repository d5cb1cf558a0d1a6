"""Weights from the Hugging Face Hub, without waiting for a Hub that does not answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # not in its stub

from terratorch_simpler.errors import DownloadError, causes
from terratorch_simpler.logger import log

SECONDS = 5.0
"""How long the Hub may take for a first answer; its client alone tries several times before it gives up."""


@contextmanager
def weights_at_hand(name: str) -> Iterator[None]:
    """Build a pretrained encoder: from the Hub if it answers, or else from its cache on this machine.

    Args:
        name: Name of the encoder.

    Raises:
        DownloadError: If the Hub does not answer and the weights are not in its cache.
    """
    offline = constants.HF_HUB_OFFLINE or not _answers()
    if offline and not constants.HF_HUB_OFFLINE:
        log.info("The Hugging Face Hub does not answer: weights are taken from its cache on this machine.")
    try:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", offline):
            yield
    except Exception as err:
        if not any(isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled) for cause in causes(err)):
            raise
        msg = (
            f"The weights of '{name}' are not in the cache of the Hugging Face Hub ({constants.HF_HUB_CACHE}), and the Hub "
            "does not answer: build the encoder once with internet and set HF_HOME to a copy of its cache, or give "
            "a local file as backbone_ckpt_path."
        )
        raise DownloadError(msg) from err


def _answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # of the HTTP library that this version of the client uses
        return False
    return True
