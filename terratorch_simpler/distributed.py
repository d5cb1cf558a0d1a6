"""Collective operations of the ranks of a run that select together.

They use a process group of their own on the CPU (gloo), whatever the strategy uses for training: a selection never
interleaves with collectives of the GPUs, and a rank that died is noticed at once.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from terratorch_simpler.errors import ProcessError, SimplerError

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others: PyTorch's own default."""

T = TypeVar("T")


class _Outcome(NamedTuple):
    result: Any
    error: BaseException | None


class Processes:
    """One process, or several of torch.distributed.

    Attributes:
        count: Number of processes.
        rank: This one, from 0.
        group: Their process group; None if there is only one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    @contextmanager
    def of_run(cls, timeout: timedelta = TIMEOUT) -> Iterator[Processes]:
        """Ranks of the initialised torch.distributed, or only this process.

        Args:
            timeout: How long to wait for another rank before the run fails.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield cls()
            return
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # this rank is in it
        try:
            yield cls(group)
        finally:
            with suppress(RuntimeError):  # of a rank that died already
                dist.destroy_process_group(group)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and decides."""
        return self.rank == 0

    def all_gather(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank and gather the results.

        If it fails on one rank, all ranks raise: whatever may fail belongs in ``work``.

        Args:
            work: What to do; its result is pickled.

        Returns:
            The results in order of the ranks.

        Raises:
            BaseException: The error of this rank.
            SimplerError: The error of another rank, which it names.
            ProcessError: If another rank failed with an error of another kind, or does not answer.
        """
        if self.group is None:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except BaseException as err:
            error = err
        try:
            payload = pickle.dumps(_Outcome(result, error and self._for_others(error)))
        except Exception as err:  # a result that cannot be pickled must not keep the others waiting
            error = error or err
            payload = pickle.dumps(_Outcome(None, self._for_others(err)))
        outcomes = self._gather(payload, error)
        if error is not None:
            raise error
        for other in outcomes:
            if other.error is not None:
                raise other.error
        return [other.result for other in outcomes]

    def run_all(self, work: Callable[[], T]) -> T:
        """Call ``work`` on every rank and return the result of this one; raises as :meth:`all_gather`."""
        results: list[T] = []
        self.all_gather(lambda: results.append(work()))
        return results[0]

    def broadcast_from_zero(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 only and return its result on all; raises as :meth:`all_gather`."""
        return self.all_gather(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def all_to_all(self, outgoing: Sequence[Sequence[Tensor]], rows: Sequence[int], like: Tensor) -> Tensor:
        """Exchange rows: every rank sends some to every other.

        Args:
            outgoing: For every rank, tensors (L, rows, D) to send to it, on any device.
            rows: How many rows this rank receives from every other.
            like: A tensor (L, any, D) of the type of all rows.

        Returns:
            Received rows, (L, sum of rows, D), on the CPU, in order of the ranks.

        Raises:
            ProcessError: If a rank does not answer.
        """
        blocks, _, width = like.shape
        empty = like[:, :0].cpu()
        sent = [
            torch.cat([empty, *(part.cpu() for part in parts)], dim=1).transpose(0, 1).contiguous() for parts in outgoing
        ]
        sent_bytes = torch.cat(sent).view(torch.uint8)  # bytes: not every backend knows bfloat16
        received = torch.empty(sum(rows), blocks, width, dtype=like.dtype).view(torch.uint8)
        try:
            dist.all_to_all_single(received, sent_bytes, list(rows), [len(part) for part in sent], group=self.group)
        except RuntimeError as err:
            raise self._lost(err) from err
        return received.view(like.dtype).transpose(0, 1)

    def all_reduce(self, value: Tensor) -> None:
        """Sum a tensor on the CPU over all ranks, in place.

        Raises:
            ProcessError: If a rank does not answer.
        """
        if self.group is None:
            return
        try:
            dist.all_reduce(value, group=self.group)
        except RuntimeError as err:
            raise self._lost(err) from err

    def _gather(self, payload: bytes, error: BaseException | None) -> list[_Outcome]:
        gathered: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(gathered, payload, group=self.group)
        except RuntimeError as err:
            raise error or self._lost(err) from err
        return [pickle.loads(one) for one in gathered]

    def _for_others(self, error: BaseException) -> BaseException:
        """The error that the other ranks raise."""
        if isinstance(error, SimplerError):
            return type(error)(f"In process {self.rank} of {self.count}: {error}")
        if not isinstance(error, Exception):  # a requested end, such as SIGTERM, ends all ranks
            return error
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return ProcessError(
            f"Process {self.rank} of {self.count} failed ({what}), so the selection cannot continue: see its own output."
        )

    def _lost(self, err: RuntimeError) -> ProcessError:
        what = " ".join(str(err).split())[:300]
        return ProcessError(
            f"Process {self.rank} of {self.count} lost the connection to another one ({what}), so the selection cannot "
            "continue: look for the first error, or for a kill, in the output of the others."
        )
