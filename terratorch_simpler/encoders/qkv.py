"""TerraTorch's split of query, key and value for LoRA, where heads were narrowed at build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from terratorch.models import peft_utils
from terratorch.models.peft_utils import QKVSep
from torch import nn


@contextmanager
def narrow_heads_can_be_split() -> Iterator[None]:
    """Let TerraTorch split narrow heads in here; elsewhere its class is its own."""
    with mock.patch.object(peft_utils, "QKVSep", NarrowQKVSep):
        yield


class NarrowQKVSep(QKVSep):  # type: ignore[misc] # TerraTorch has no types
    """TerraTorch's split of query, key and value for LoRA, which it refuses where heads are narrow."""

    def __init__(self, original_qkv: nn.Linear) -> None:
        """Split into three layers; without narrow heads this is TerraTorch's own."""
        if original_qkv.out_features % 3 or original_qkv.out_features >= 3 * original_qkv.in_features:
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
