"""Marks of tests that need an extra of the package; without it they are skipped (`make test-plain`)."""

from importlib.util import find_spec

import pytest

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="the extra 'peft' is not installed")
needs_onnx = pytest.mark.skipif(
    find_spec("onnxscript") is None or find_spec("onnxruntime") is None, reason="the extra 'onnx' is not installed"
)
