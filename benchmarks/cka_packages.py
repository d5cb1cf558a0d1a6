"""The same similarity from other packages, on the same rows of the same layers, in turn in one run.

    python -m benchmarks.cka_packages --device cuda

Groups of rows are drawn once and handed out by a model whose layers do nothing, so only the comparison is timed. Ours is the
whole state of the pass: unbiased HSIC, cosines and angles in float64, and the checks for features that cannot be compared.
``torch_cka`` (PyPI torch_cka) and ``cka`` (PyPI pytorch-cka) are called as their pages say. Memory is the most that one run
adds to the rows: on a GPU what PyTorch's allocator handed out, on a CPU the tensors that operators handed out; it is taken
with one group and with four times as many, in runs that are not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import record
from terratorch_simpler.functional.hsic import full_float32, hsic_matrix, normalise_hsic
from terratorch_simpler.metrics import LayerSimilarity
from terratorch_simpler.sweep.cost import added_memory


class Rows(Dataset[tuple[Tensor]]):
    """Rows of all layers: item i is row i of every layer, (L, D)."""

    def __init__(self, features: Tensor) -> None:
        """Take over features of shape (L, rows, D)."""
        self.features = features

    def __len__(self) -> int:
        """Number of rows."""
        return self.features.shape[1]

    def __getitem__(self, row: int) -> tuple[Tensor]:
        """One row."""
        return (self.features[:, row],)

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor]]:
        """Several, side by side in memory: collating is not what is compared."""
        return list(zip(self.features[:, rows].transpose(0, 1).unbind(0), strict=True))


class Replay(nn.Module):
    """A model whose layers hand out what they are given."""

    def __init__(self, layers: int) -> None:
        """Layers that do nothing."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, rows: Tensor) -> Tensor:
        """Feed each layer its rows of a batch (m, L, D)."""
        for number, layer in enumerate(self.layers):
            layer(rows[:, number])
        return rows


def drawn(layers: int, rows: int, width: int) -> Tensor:
    """Layers that drift apart: each is the one before it and something of its own."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(layers, rows, width, generator=generator)
    return steps.cumsum(dim=0)


def ours(features: Tensor, rows: int, device: torch.device) -> Tensor:
    """Our pass over all groups."""
    groups = features.shape[1] // rows
    found = LayerSimilarity(len(features) - 1, groups).to(device)
    for number, group in enumerate(features.split(rows, dim=1)):
        found.update(group.to(device), rows // 16, number)
    sums = found.sums().hsic.sum(dim=0)
    own = sums.diagonal().rsqrt()
    return (sums * own[:, None] * own).cpu()


def cka_alone(features: Tensor, rows: int, device: torch.device) -> Tensor:
    """What of our pass the other packages do as well."""
    groups = (hsic_matrix(group.to(device)) for group in features.split(rows, dim=1))
    return normalise_hsic(sum(groups, torch.zeros((), dtype=torch.float64, device=device))).cpu()


def torch_cka(features: Tensor, rows: int, device: torch.device) -> Tensor:
    """PyPI torch_cka."""
    from torch_cka import CKA

    model = Replay(len(features))
    names = [f"layers.{number}" for number in range(len(features))]
    loader = DataLoader(Rows(features), batch_size=rows)
    quiet = contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), quiet, torch.no_grad():
        warnings.simplefilter("ignore")
        cka = CKA(model, model, "one", "two", names, names, device=str(device))
        cka.compare(loader)
    matrix: Tensor = cka.export()["CKA"]
    return matrix.double()


def pytorch_cka(features: Tensor, rows: int, device: torch.device) -> Tensor:
    """PyPI pytorch-cka."""
    from cka import compute_cka

    model = Replay(len(features))
    names = [f"layers.{number}" for number in range(len(features))]
    loader = DataLoader(Rows(features), batch_size=rows)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        [matrix] = compute_cka(model, model, [loader], layers=names, device=device)
    return torch.as_tensor(matrix).cpu().double()


Contender = Callable[[Tensor, int, torch.device], Tensor]
CONTENDERS: dict[str, Contender] = {
    "terratorch_simpler": ours,
    "terratorch_simpler, CKA alone": cka_alone,
    "pytorch-cka": pytorch_cka,
    "torch_cka": torch_cka,
}


def peak_memory(run: Contender, features: Tensor, groups: int, rows: int, device: torch.device) -> int:
    """Most bytes that a run over some groups adds."""
    features = features[:, :rows].repeat(1, groups, 1)
    return added_memory(lambda: run(features, rows, device), [features], device)


def main(arguments: list[str] | None = None) -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    record.add_arguments(parser)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rows", type=int, default=1024, help="of a group")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args(arguments)
    device = settings.device
    features = drawn(settings.layers, settings.rows * settings.groups, settings.width)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    matrices: dict[str, Tensor] = {}
    with full_float32():
        for turn in range(settings.rounds):
            for name, run in CONTENDERS.items():
                if turn == 0:  # what is compiled or set aside in a first call does not count
                    run(features[:3, : settings.rows], settings.rows, device)
                start = time.perf_counter()
                matrices[name] = run(features, settings.rows, device)  # they lie on the CPU: the device is done
                times[name].append(time.perf_counter() - start)
                print(f"{name}: {times[name][-1]:.2f} s", flush=True)
    rows: list[dict[str, Any]] = []
    base = statistics.median(times["terratorch_simpler"])
    for name, run in CONTENDERS.items():
        few, many = (peak_memory(run, features[:6], groups, settings.rows // 4, device) for groups in (1, 4))
        rows.append(
            {
                "package": name,
                "seconds": statistics.median(times[name]),
                "times_ours": statistics.median(times[name]) / base,
                "largest_difference": float((matrices[name] - matrices["terratorch_simpler"]).abs().max()),
                "peak_mib_1_group": few / 2**20,
                "peak_mib_4_groups": many / 2**20,
            }
        )
    path = record.save("cka_packages", settings, rows, arguments)
    record.show("the same similarity", rows)
    print(path)


if __name__ == "__main__":
    main()
