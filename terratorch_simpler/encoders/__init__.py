"""Families of encoders: where each keeps its blocks and how to cut them. One file a family, one line to register."""

from terratorch_simpler.encoders.base import EncoderAdapter, find_adapter, refuse_by_name, register_adapter
from terratorch_simpler.encoders.prithvi import PrithviAdapter

register_adapter(PrithviAdapter())

__all__ = ["EncoderAdapter", "PrithviAdapter", "find_adapter", "refuse_by_name", "register_adapter"]
