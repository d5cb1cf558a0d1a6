"""A GPU that is not there: tensors that know their device and compute nothing, so that mixed devices and waits are errors.

``FakeTensorMode`` refuses an operator whose tensors lie on different devices, and one that reads a value back to the host
(``.item()``, a boolean mask). It does not see ``.cpu()``.
"""

from contextlib import contextmanager

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from terratorch_simpler.extraction import TokenSampler
from terratorch_simpler.lightning import task
from terratorch_simpler.models.backbone import SimplerBackbone


def on_host(function):
    """What is computed on the processor is computed as ever."""

    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


class FakeGpu:
    """Runs the package as if its models and images lay on a GPU."""

    def __init__(self, monkeypatch):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.device = torch.device("cuda")
        if Version(torch.__version__) < Version("2.10"):  # some ask for a driver all the same
            try:
                with self.mode:
                    torch.nn.Linear(1, 1).to(self.device)
            except RuntimeError as error:
                pytest.skip(f"PyTorch {torch.__version__} cannot pretend a GPU: {str(error).splitlines()[0]}")
        sample = TokenSampler.sample

        def sample_on_host(sampler, batch, images, layout, device):
            with unset_fake_temporarily():
                drawn = sample(sampler, batch, images, layout, torch.device("cpu"))
            return type(drawn)(*[self.like(value) for value in drawn])

        monkeypatch.setattr(TokenSampler, "sample", sample_on_host)
        monkeypatch.setattr(SimplerBackbone, "layout", on_host(SimplerBackbone.layout))
        monkeypatch.setattr(task, "overlap_transfer", lambda move, device: move)  # streams are not pretended

    def like(self, value):
        """A tensor of that shape on the GPU; anything else as it is."""
        if isinstance(value, dict):
            return {key: self.like(part) for key, part in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        with self.mode:
            return torch.empty(value.shape, dtype=value.dtype, device=self.device)

    @contextmanager
    def lent(self, lend, module, device):
        """``on_device`` under this mode, without it inside."""
        with self.mode:
            evaluating = lend(module, self.device)
            evaluating.__enter__()
        try:
            yield
        finally:
            with self.mode:
                evaluating.__exit__(None, None, None)
