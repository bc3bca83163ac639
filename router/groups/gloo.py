"""A tensor-parallel group over gloo, for processes that compute on CPUs.

T tokens   C columns of one rank   R ranks
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from router.groups.base import GroupLost
from router.groups.ordered import OrderedGroup

_c10d: Any = distributed  # its type stubs leave out what we need of gloo; torch is pinned
_MEET_TIMEOUT_S = 60.0  # for processes that may still be starting
_TAG = 0  # gloo keeps the order of messages between two ranks


class MeetingPoint:
    """Where the ranks of one group find each other; rank 0 holds it until they have."""

    def __init__(self, host: str) -> None:
        """Listen at once, at an address of this host that the other ranks can reach."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = socket.create_server((host, 0), family=family)
        self.host, self.port = host, int(server.getsockname()[1])
        # Without the socket of ours, the store would listen at every address of this host.
        self._store = _c10d.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
        )

    @property
    def address(self) -> tuple[str, int]:
        """Return host and port, for the other ranks."""
        return self.host, self.port


class GlooGroup(OrderedGroup):
    """Implements `TensorGroup` over TCP; for one thread.

    Every rank sends its tensor to every other and adds up what came in the order of the ranks. Gloo's own
    all_reduce cuts a tensor into pieces by its size and adds each up in another order, so a row of it would
    depend on the batch.
    """

    def __init__(
        self,
        meeting_point: tuple[str, int],
        rank: int,
        size: int,
        host: str,
        *,
        timeout_s: float = 10.0,
        meet_timeout_s: float = _MEET_TIMEOUT_S,
    ) -> None:
        """Wait until all ranks are there; listen at `host`, an address of this host.

        Later calls wait `timeout_s` seconds at most for each of the other ranks. Raises GroupLost if not all
        ranks came within `meet_timeout_s`.
        """
        assert 0 <= rank < size
        self._rank, self._size = rank, size
        self._timeout = timedelta(seconds=timeout_s)
        gloo = _c10d.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._threads = 1  # of collectives, which we do not use
        options._timeout = timedelta(seconds=meet_timeout_s)
        try:
            store = _c10d.TCPStore(*meeting_point, timeout=options._timeout, wait_for_workers=False)
            self._gloo: Any = gloo(store, rank, size, options)
        except RuntimeError as error:
            host, port = meeting_point
            raise GroupLost(
                f"not all {size} ranks met at {host}:{port} within {meet_timeout_s:g} s: {_reason(error)}"
            ) from None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def close(self) -> None:
        """Leave the group; the other ranks' next call raises GroupLost. Closing twice does no harm."""
        self._gloo = None

    def _exchange(self, x_TC: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in order."""
        if self._gloo is None:
            raise GroupLost("this rank has left the group")
        if not x_TC.numel():  # gloo sends no empty message, and a sum of nothing needs none
            return [x_TC] * self._size
        x_TC = x_TC.contiguous()
        others = [rank for rank in range(self._size) if rank != self._rank]
        parts = [x_TC if rank == self._rank else torch.empty_like(x_TC) for rank in range(self._size)]
        # Receives first: a message that is awaited needs no copy of its own.
        transfers = [(rank, self._gloo.recv, parts[rank]) for rank in others]
        transfers += [(rank, self._gloo.send, x_TC) for rank in others]
        works = []
        for rank, start, part_TC in transfers:
            with self._with(rank):
                works.append(start([part_TC], rank, _TAG))
        for (rank, _, _), work in zip(transfers, works, strict=True):
            with self._with(rank):
                work.wait(self._timeout)
        return parts

    @contextmanager
    def _with(self, rank: int) -> Iterator[None]:
        """Leave the group and raise GroupLost if gloo raises its error; it does so from every call."""
        try:
            yield
        except RuntimeError as error:
            self.close()
            raise GroupLost(f"rank {rank} of {self._size} is lost: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return what happened, without gloo's source lines before it and its advice behind it."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[[^]]*\] ", "", line).partition(". This is typically")[0]
