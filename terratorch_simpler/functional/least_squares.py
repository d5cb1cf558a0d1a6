"""Least squares from streamed normal equations: the linear map that replaces dropped blocks, in closed form.

With X the tokens that enter a range of blocks and Y those that leave it in the intact model, the map is W = I + Delta where
(X'X + lambda I) Delta = X'(Y - X), lambda = 1e-6 (arXiv 2609.36842, section 5 and appendix E). X'X and X'Y are D x D and add
up over tokens, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from terratorch_simpler.errors import RecoveryError
from terratorch_simpler.indices import Span

RIDGE = 1e-6


class NormalEquations:
    """Normal equations of the maps of some spans, in float64, for tokens to fit on and, apart, tokens to evaluate on.

    Args:
        spans: The spans.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self.tokens = torch.zeros(2, dtype=torch.int64)  # to fit on, to evaluate on
        self._states = sorted({state for span in spans for state in span})
        self._sums: dict[str, Tensor] = {}

    def nbytes(self, width: int) -> int:
        """Memory that the sums take for tokens of width D, whatever their number."""
        return sum(value.nbytes for value in self._empty(width, torch.device("meta")).values())

    def add(self, states: Tensor, fit: Sequence[int], evaluate: Sequence[int]) -> None:
        """Add tokens, on their device, or on the CPU if that has no memory left.

        Args:
            states: Tokens in every state, (L + 1, m, D).
            fit: Numbers of those to fit on.
            evaluate: Numbers of those to evaluate on; any others are left out.
        """
        added = 0  # steps done: none is repeated after running out of memory

        def add_rest(device: torch.device) -> None:
            nonlocal added
            for add in islice(self._additions(states, (fit, evaluate), device), added, None):
                add()
                added += 1

        try:
            return add_rest(states.device)
        except torch.OutOfMemoryError:
            pass  # the traceback holds what was allocated until here
        return add_rest(torch.device("cpu"))

    def _additions(
        self, states: Tensor, rows: tuple[Sequence[int], Sequence[int]], device: torch.device
    ) -> Iterator[Callable[[], object]]:
        """What there is to add, always in the same order; a step that fails has added nothing."""
        states = states.to(device)
        sums = self._sums or self._empty(states.shape[-1], device)
        self._sums = {name: value.to(device) for name, value in sums.items()}
        for half, numbers in enumerate(rows):
            gram, total, cross = (self._sums[name][half] for name in ("gram", "total", "cross"))
            wide = take_rows(states, numbers).double()
            for place, state in enumerate(self._states):
                yield partial(gram[place].addmm_, wide[state].mT, wide[state])
                yield partial(total[place].add_, wide[state].sum(dim=0))
            for place, (before, after) in enumerate(self.spans):
                yield partial(cross[place].addmm_, wide[before].mT, wide[after])
            yield partial(self.tokens[half].add_, len(numbers))

    def all_reduce(self, all_reduce: Callable[[Tensor], None], width: int) -> None:
        """Sum over all ranks.

        Args:
            all_reduce: Sums a tensor on the CPU over all ranks, in place.
            width: Width D of a token, for a rank that has added none.
        """
        self._sums = self._sums or self._empty(width, torch.device("cpu"))
        self._sums = {name: value.cpu() for name, value in self._sums.items()}
        for value in (self.tokens, *self._sums.values()):
            all_reduce(value)

    def weight(self, span: Span) -> Tensor:
        """The map W of a span, (D, D), float64, for tokens as rows: x W. From all tokens.

        Raises:
            RecoveryError: If there are fewer tokens to fit on than a token is wide.
        """
        self.check()
        gram, cross = self._of(span)
        return _solve(gram.sum(dim=0), cross.sum(dim=0))

    def explained(self, span: Span) -> float:
        """Explained variance (R2) of the output of the span on held-out tiles, by a map fitted on the other tiles.

        1 - |Y - X W|^2 / |Y - mean(Y)|^2; negative if the map is worse than the mean.

        Raises:
            RecoveryError: If there are fewer tokens to fit on than a token is wide.
        """
        self.check()
        gram, cross = self._of(span)
        after = self._states.index(span[1])
        square, total = self._sums["gram"][1, after].trace(), self._sums["total"][1, after]
        weight = _solve(gram[0], cross[0])
        residual = square - 2 * (weight * cross[1]).sum() + (weight * (gram[1] @ weight)).sum()
        variance = square - total.square().sum() / self.tokens[1]
        return float(1 - residual / variance)

    def covariance(self, state: int) -> Tensor:
        """Covariance of all tokens in a state that some span begins or ends with, (D, D), float64."""
        place, tokens = self._states.index(state), self.tokens.sum()
        mean = self._sums["total"][:, place].sum(dim=0) / tokens
        return self._sums["gram"][:, place].sum(dim=0) / tokens - mean[:, None] * mean

    @property
    def sufficient(self) -> bool:
        """Whether there are as many tokens to fit on as a token is wide, and any to evaluate on."""
        return bool(self._sums) and int(self.tokens[0]) >= self._sums["total"].shape[-1] and int(self.tokens[1]) > 1

    def check(self) -> None:
        """Raise unless there are enough tokens."""
        if not self.sufficient:
            width = self._sums["total"].shape[-1] if self._sums else "as many as a token is wide"
            msg = (
                f"Only {int(self.tokens[0])} tokens to fit a linear map on; at least {width} are needed: stream more tiles "
                "(min_tiles), or set recovery: none."
            )
            raise RecoveryError(msg)

    def _of(self, span: Span) -> tuple[Tensor, Tensor]:
        return self._sums["gram"][:, self._states.index(span[0])], self._sums["cross"][:, self.spans.index(span)]

    def _empty(self, width: int, device: torch.device) -> dict[str, Tensor]:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(2, *shape, dtype=torch.float64, device=device)

        return {
            "gram": zeros(len(self._states), width, width),
            "total": zeros(len(self._states), width),
            "cross": zeros(len(self.spans), width, width),
        }


def take_rows(states: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some rows of states (L + 1, m, D), without waiting for their device."""
    return states.index_select(1, torch.tensor(numbers, dtype=torch.int64).to(states.device, non_blocking=True))


def _solve(gram: Tensor, cross: Tensor) -> Tensor:
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    delta: Tensor = torch.linalg.solve(gram + RIDGE * identity, cross - gram)
    return identity + delta
