"""TerraTorch's split of query, key and value for LoRA, where heads were narrowed at build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch
from terratorch.models import peft_utils
from terratorch.models.peft_utils import QKVSep
from torch import nn

_lock = RLock()  # re-entrant: a walk that was left open may be closed by the garbage collector while another one begins
_open = 0


@contextmanager
def narrow_heads_can_be_split() -> Iterator[None]:
    """Let TerraTorch split narrow heads in here; elsewhere its class is its own.

    Walks through modules overlap and end in any order, some only when they are garbage: the last one to end puts
    TerraTorch's class back.
    """
    global _open
    with _lock:
        _open += 1
        peft_utils.QKVSep = NarrowQKVSep
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            if not _open:
                peft_utils.QKVSep = QKVSep


def is_narrow(layer: nn.Module) -> bool:
    """Whether a layer may hold query, key and value of narrowed heads, which TerraTorch refuses to split."""
    return isinstance(layer, nn.Linear) and layer.out_features % 3 == 0 and layer.out_features < 3 * layer.in_features


class NarrowQKVSep(QKVSep):  # type: ignore[misc] # TerraTorch has no types
    """TerraTorch's split of query, key and value for LoRA, which it refuses where heads are narrow."""

    def __init__(self, original_qkv: nn.Linear) -> None:
        """Split into three layers; without narrow heads this is TerraTorch's own."""
        if not is_narrow(original_qkv):
            super().__init__(original_qkv)
            return
        nn.Module.__init__(self)
        self.in_features, self.out_features = original_qkv.in_features, original_qkv.out_features
        for number, name in enumerate(("q_linear", "k_linear", "v_linear")):
            part = nn.Linear(self.in_features, self.out_features // 3, bias=original_qkv.bias is not None)
            with torch.no_grad():
                for key, value in part.named_parameters():
                    value.copy_(getattr(original_qkv, key).chunk(3)[number])
            self.add_module(name, part)
