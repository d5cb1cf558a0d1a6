"""A linear map in the place of dropped blocks, from sums over tokens in closed form.

With X the tokens that enter a range of blocks and Y those that leave it in the intact model, the map is W = I + Delta where
(X'X + lambda I) Delta = X'(Y - X), lambda = 1e-6 (arXiv 2609.36842, section 5 and appendix E). X'X and X'Y are D x D and add
up over tokens, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from terratorch_simpler.errors import RecoveryError

RIDGE = 1e-6
Span = tuple[int, int]
"""States before and after a range of blocks: 0 is the input of the first block, l the output of block l."""


class SpanSums:
    """Sums over tokens for the maps of some spans, in float64, apart for tokens to fit on and tokens to judge on.

    Args:
        spans: The spans.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        """Nothing is added yet."""
        self.spans = tuple(spans)
        self.tokens = torch.zeros(2, dtype=torch.int64)  # to fit on, to judge on
        self._befores = sorted({before for before, _ in spans})
        self._afters = sorted({after for _, after in spans})
        self._sums: dict[str, Tensor] = {}

    def add(self, states: Tensor, held_out: Tensor) -> None:
        """Add tokens.

        Args:
            states: Tokens in every state, (L + 1, m, D).
            held_out: Which of them to judge on, (m,), on the CPU.
        """
        self._sums = self._sums or self._empty(states.shape[-1], torch.device("cpu"))
        try:
            self._add(states, held_out, states.device)
        except torch.OutOfMemoryError:
            self._add(states, held_out, torch.device("cpu"))

    def _add(self, states: Tensor, held_out: Tensor, device: torch.device) -> None:
        # Whatever needs memory comes before the first sum is added to: it may be tried again elsewhere.
        self._sums = {name: value.to(device) for name, value in self._sums.items()}
        parts = [chosen.nonzero().flatten().to(states.device) for chosen in (~held_out, held_out)]
        halves = [states[:, part].to(device, torch.float64) for part in parts]
        for half, wide in enumerate(halves):
            for place, before in enumerate(self._befores):
                self._sums["gram"][half, place].addmm_(wide[before].mT, wide[before])
            for place, (before, after) in enumerate(self.spans):
                self._sums["cross"][half, place].addmm_(wide[before].mT, wide[after])
            for place, after in enumerate(self._afters):
                self._sums["mean"][half, place] += wide[after].sum(dim=0)
                self._sums["square"][half, place] += wide[after].square().sum()
            self.tokens[half] += wide.shape[1]

    def merge(self, add_up: Callable[[Tensor], None], width: int) -> None:
        """Add the sums of other processes.

        Args:
            add_up: Adds up a tensor on the CPU over all processes, in place.
            width: Width D of a token, for a process that has added none.
        """
        self._sums = self._sums or self._empty(width, torch.device("cpu"))
        self._sums = {name: value.cpu() for name, value in self._sums.items()}
        for value in (self.tokens, *self._sums.values()):
            add_up(value)

    def weight(self, span: Span) -> Tensor:
        """The map W of a span, (D, D), float64, for tokens as rows: x W. From all tokens.

        Raises:
            RecoveryError: If there are fewer tokens to fit on than a token is wide.
        """
        self.check()
        gram, cross = self._of(span)
        return _solve(gram.sum(dim=0), cross.sum(dim=0))

    def explained(self, span: Span) -> float:
        """Share of the variance of what leaves the span that a map fitted on other tiles explains on the held-out ones.

        1 - |Y - X W|^2 / |Y - mean(Y)|^2; negative if the map is worse than the mean.

        Raises:
            RecoveryError: If there are fewer tokens to fit on than a token is wide.
        """
        self.check()
        gram, cross = self._of(span)
        place = self._afters.index(span[1])
        square, mean = self._sums["square"][1, place], self._sums["mean"][1, place]
        weight = _solve(gram[0], cross[0])
        missed = square - 2 * (weight * cross[1]).sum() + (weight * (gram[1] @ weight)).sum()
        variance = square - mean.square().sum() / self.tokens[1]
        return float(1 - missed / variance)

    @property
    def enough(self) -> bool:
        """Whether there are as many tokens to fit on as a token is wide, and any to judge on."""
        return bool(self._sums) and int(self.tokens[0]) >= self._sums["mean"].shape[-1] and int(self.tokens[1]) > 1

    def check(self) -> None:
        """Raise unless there are enough tokens."""
        if not self.enough:
            width = self._sums["mean"].shape[-1] if self._sums else "as many as a token is wide"
            msg = (
                f"Found {int(self.tokens[0])} tokens to fit a linear map on, expected at least {width}: stream more tiles "
                "(min_tiles), or set recovery: none."
            )
            raise RecoveryError(msg)

    def _of(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._sums["gram"][:, self._befores.index(span[0])], self._sums["cross"][:, self.spans.index(span)]

    def _empty(self, width: int, device: torch.device) -> dict[str, Tensor]:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(2, *shape, dtype=torch.float64, device=device)

        return {
            "gram": zeros(len(self._befores), width, width),
            "cross": zeros(len(self.spans), width, width),
            "mean": zeros(len(self._afters), width),
            "square": zeros(len(self._afters)),
        }


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    delta: Tensor = torch.linalg.solve(gram + RIDGE * identity, cross - gram)
    return identity + delta


def spans_between(kept: Sequence[int], num_blocks: int) -> list[Span]:
    """The ranges of dropped blocks, as states before and after.

    Args:
        kept: Kept blocks, 0-based, ascending.
        num_blocks: Blocks of the intact encoder.

    Example:
        >>> spans_between([0, 3, 4], 6)
        [(1, 3), (5, 6)]
    """
    edges = [-1, *kept, num_blocks]
    return [(low + 1, high) for low, high in pairwise(edges) if high - low > 1]
