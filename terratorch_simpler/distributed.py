"""The processes of a run that select together: what each has done, told to all, and rows that change hands.

Everything goes through a process group of its own on the CPU (gloo), whatever the strategy uses for training: a selection
never gets between collective calls of the GPUs, and a process that has gone is noticed at once.
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

PATIENCE = timedelta(minutes=30)
"""How long one process waits for the others before it ends: PyTorch's own default."""

Answer = TypeVar("Answer")


class _Told(NamedTuple):
    answer: Any
    error: BaseException | None


class Processes:
    """One process, or several of torch.distributed.

    Attributes:
        count: Number of processes.
        rank: This one, from 0.
        group: Their process group; None if there is only one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """One process, or those of a group."""
        self.group = group
        self.count = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @classmethod
    @contextmanager
    def of_run(cls, patience: timedelta = PATIENCE) -> Iterator[Processes]:
        """Those that torch.distributed has been set up for, or only this one.

        Args:
            patience: How long to wait for another process before the run is ended.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield cls()
            return
        group = dist.new_group(backend="gloo", timeout=patience)
        try:
            yield cls(group)
        finally:
            with suppress(RuntimeError):  # of a peer that has gone already
                dist.destroy_process_group(group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and decides."""
        return self.rank == 0

    def all_gather(self, work: Callable[[], Answer]) -> list[Answer]:
        """Do something in every process, and learn what came of it in all of them.

        This is where an error in one process ends the others: what may fail goes into ``work``.

        Args:
            work: What to do; its answer travels to all processes.

        Returns:
            The answers in order of the ranks.

        Raises:
            BaseException: What went wrong here.
            SimplerError: What went wrong in another process, with its rank.
            ProcessError: If an error of another kind came up in another process, or one does not answer.
        """
        if self.group is None:
            return [work()]
        answer, error = None, None
        try:
            answer = work()
        except BaseException as err:
            error = err
        try:
            parcel = pickle.dumps(_Told(answer, error and self._to_tell(error)))
        except Exception as err:  # what cannot be sent must not keep the others waiting
            error = error or err
            parcel = pickle.dumps(_Told(None, self._to_tell(err)))
        told = self._gather(parcel, error)
        if error is not None:
            raise error
        for other in told:
            if other.error is not None:
                raise other.error
        return [other.answer for other in told]

    def run_all(self, work: Callable[[], Answer]) -> Answer:
        """Do something in every process whose answer stays where it is; errors as in :meth:`each`."""
        answers: list[Answer] = []
        self.all_gather(lambda: answers.append(work()))
        return answers[0]

    def broadcast_from_zero(self, work: Callable[[], Answer]) -> Answer:
        """Do something in the first process only, and learn in all what came of it; errors as in :meth:`each`."""
        return self.all_gather(lambda: work() if self.first else None)[0]  # type: ignore[return-value]

    def all_to_all(self, parcels: Sequence[Sequence[Tensor]], rows: Sequence[int], like: Tensor) -> Tensor:
        """Hand rows over: every process gives some to every other.

        Args:
            parcels: For every process, tensors (L, rows, D) of what it is to get, on any device.
            rows: How many rows this process gets from every other.
            like: A tensor (L, any, D) of the type of all rows.

        Returns:
            What this process got, (L, sum of rows, D), on the CPU, in order of the ranks.

        Raises:
            ProcessError: If a process does not answer.
        """
        blocks, _, width = like.shape
        empty = like[:, :0].cpu()
        mine = [
            torch.cat([empty, *(part.cpu() for part in parcel)], dim=1).transpose(0, 1).contiguous() for parcel in parcels
        ]
        outgoing = torch.cat(mine).view(torch.uint8)  # bytes: not every backend knows bfloat16
        incoming = torch.empty(sum(rows), blocks, width, dtype=like.dtype).view(torch.uint8)
        try:
            dist.all_to_all_single(incoming, outgoing, list(rows), [len(part) for part in mine], group=self.group)
        except RuntimeError as err:
            raise self._gone(err) from err
        return incoming.view(like.dtype).transpose(0, 1)

    def all_reduce(self, value: Tensor) -> None:
        """Add up a tensor on the CPU over all processes, in place.

        Raises:
            ProcessError: If a process does not answer.
        """
        if self.group is None:
            return
        try:
            dist.all_reduce(value, group=self.group)
        except RuntimeError as err:
            raise self._gone(err) from err

    def _gather(self, parcel: bytes, error: BaseException | None) -> list[_Told]:
        everything: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(everything, parcel, group=self.group)
        except RuntimeError as err:
            raise error or self._gone(err) from err
        return [pickle.loads(one) for one in everything]

    def _to_tell(self, error: BaseException) -> BaseException:
        """An error as the other processes raise it."""
        if isinstance(error, SimplerError):
            return type(error)(f"In process {self.rank} of {self.count}: {error}")
        if not isinstance(error, Exception):  # an end that was asked for, such as SIGTERM, is the end of all
            return error
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return ProcessError(
            f"Found an error in process {self.rank} of {self.count} ({what}), expected all to select together: its own "
            "output says where."
        )

    def _gone(self, err: RuntimeError) -> ProcessError:
        what = " ".join(str(err).split())[:300]
        return ProcessError(
            f"Found a process that no longer answers process {self.rank} of {self.count} ({what}), expected all to select "
            "together: look for the first error, or for a kill, in the output of the others."
        )
