"""Run tokens through their experts, wherever those live, and whatever dies on the way."""

import logging
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.links.base import Dtype, Frame, Kind, Link, LinkLost
from router.links.pool import LinkPool
from router.placement import Group, Placement

# T tokens   K experts per token   D hidden   N rows = T*K   S rows in the order of sending
# G1 groups, and one more for the end   R runs: (slot, number of rows)

_log = logging.getLogger(__name__)

_RETRY_S = 0.25  # how often a lost group is tried again while an expert of it has no other replica


class ExpertUnavailable(RuntimeError):
    """No group holds this expert, and none came to hold it in time."""

    def __init__(self, layer: int, expert: int, waited_s: float, last_loss: str | None = None) -> None:
        # All of them, so that it can be pickled, to cross a Ray call.
        super().__init__(layer, expert, waited_s, last_loss)
        self.layer = layer
        self.expert = expert
        self._waited_s = waited_s
        self._last_loss = last_loss

    def __str__(self) -> str:
        loss = f"; the last loss: {self._last_loss}" if self._last_loss else ""
        return (
            f"expert {self.expert} of layer {self.layer} has no live replica, and none came back within "
            f"{self._waited_s:g} s{loss}"
        )


class Placements(Protocol):
    """Where the dispatcher learns of new placements; the router pushes them, from another thread."""

    def current(self) -> Placement:
        """Return the newest placement known here, without blocking: it is asked in every layer."""

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        """Wait until there is a placement newer than `epoch`; return the newest, also when time is up."""


@dataclass(frozen=True)
class _Batch:
    """One group's share of a layer's rows."""

    group: Group
    rows_S: NDArray[np.int64]  # which of the layer's N rows, in sending order
    frame: Frame


class Dispatcher:
    """Sends the rows of each layer to expert groups and brings back what these made of them.

    Implements the `Experts` seam of the layers. Experts hold no state, so rows of a lost group are simply
    sent again: to another replica, or, if there is none, to the one that a newer placement brings.
    A group that reports an error, or at whose address another process answers, counts as lost too.
    For one thread, except for `take_load`.
    """

    def __init__(
        self,
        placements: Placements,
        links: LinkPool,
        num_layers: int,
        num_experts: int,
        *,
        reply_timeout_s: float = 30.0,
        deadline_s: float = 60.0,
    ) -> None:
        """Give a group `reply_timeout_s` to answer, and an expert without replica `deadline_s` to return."""
        self._placements = placements
        self._links = links
        self._reply_timeout_s = reply_timeout_s
        self._deadline_s = deadline_s
        self._newest = Placement(-1, ())
        self._live = self._newest  # without the groups that we lost
        self._last_loss: str | None = None
        self._sequence = 0
        self._load_lock = threading.Lock()
        self._load_LE = np.zeros((num_layers, num_experts), np.int64)

    def __call__(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        """Return y_TKD: what expert `expert_TK[t, k]` of the layer made of token t, in fp32.

        `x_TD` is fp32, `expert_TK` int64, both on the CPU. Blocks until the last row is back. Raises
        ExpertUnavailable, with the reason of the last loss, if an expert stays without a replica.
        """
        (num_tokens, top_k), hidden_size = expert_TK.shape, x_TD.size(1)
        expert_N = expert_TK.reshape(-1).numpy()
        # All that follows is numpy: on a few rows a call of torch costs several times one of numpy.
        y_ND = np.empty((num_tokens * top_k, hidden_size), np.float32)
        self._count(layer, expert_N)

        deadline: float | None = None
        waiting_N = np.arange(len(expert_N))
        while waiting_N.size:
            self._adopt(self._placements.current())
            place_S = self._live.choose(layer, expert_N[waiting_N], waiting_N)
            order_S = place_S.argsort(kind="stable")
            waiting_N, place_S = waiting_N[order_S], place_S[order_S]
            if place_S[0] < 0:
                deadline = deadline or time.monotonic() + self._deadline_s
                self._await_replica(layer, int(expert_N[waiting_N[0]]), deadline)
                continue
            lost = self._exchange(self._batches(layer, x_TD.numpy(), top_k, waiting_N, place_S), y_ND)
            waiting_N = np.concatenate([batch.rows_S for batch in lost]) if lost else waiting_N[:0]
        return torch.from_numpy(y_ND).view(num_tokens, top_k, hidden_size)

    def take_load(self) -> NDArray[np.int64]:
        """Return how many rows each expert got since the last call, [layers, experts]; from any thread."""
        with self._load_lock:
            load_LE, self._load_LE = self._load_LE, np.zeros_like(self._load_LE)
        return load_LE

    def close(self) -> None:
        """Close every link."""
        self._links.close()

    def _batches(
        self,
        layer: int,
        x_TD: NDArray[np.float32],
        top_k: int,
        rows_S: NDArray[np.int64],
        place_S: NDArray[np.int64],
    ) -> list[_Batch]:
        """Cut rows that are sorted by place into one message per group."""
        self._sequence = (self._sequence + 1) % (1 << 32)
        first_place_G1 = self._live.first_place_G1
        bounds_G1 = place_S.searchsorted(first_place_G1).tolist()
        batches = []
        for index, group in enumerate(self._live.groups):
            mine = slice(bounds_G1[index], bounds_G1[index + 1])
            if mine.start == mine.stop:
                continue
            slot_S = place_S[mine] - first_place_G1[index]
            runs_R2 = np.array(list(Counter(slot_S.tolist()).items()), "<i4")  # in the order of `slot_S`
            rows_SD = x_TD[rows_S[mine] // top_k]
            frame = Frame(
                Kind.ROWS, self._sequence, layer, runs_R2.data, Dtype.FLOAT32, len(rows_SD), rows_SD.data
            )
            batches.append(_Batch(group, rows_S[mine], frame))
        return batches

    def _exchange(self, batches: list[_Batch], y_ND: NDArray[np.float32]) -> list[_Batch]:
        """Send every batch, then receive every answer into `y_ND`; return the batches of lost groups.

        This can't deadlock, however large the frames: a group blocks on no peer, neither to read nor to
        write, so it takes in what we send even while answers to us or to others wait for their readers.
        """
        lost = []
        unanswered: deque[tuple[_Batch, Link]] = deque()
        try:
            for batch in batches:
                try:
                    link = self._links.get(batch.group.address)
                    if link.peer != batch.group.name:  # the address of a dead group was given to another
                        raise LinkLost(f"another process answers there: {link.peer!r}")
                    link.send(batch.frame)
                    unanswered.append((batch, link))
                except LinkLost as error:
                    lost.append(batch)
                    self._lose(batch.group, error)
            while unanswered:
                batch, link = unanswered[0]
                try:
                    _receive(batch, link.receive(self._reply_timeout_s), y_ND)
                except LinkLost as error:
                    lost.append(batch)
                    self._lose(batch.group, error)
                unanswered.popleft()
        finally:
            # Left over if we are on the way out: nobody must ever take their answers for others.
            for batch, _ in unanswered:
                self._links.drop(batch.group.address)
        return lost

    def _lose(self, group: Group, error: LinkLost) -> None:
        self._last_loss = f"expert group {group.name!r} is lost: {error}"
        _log.warning("%s", self._last_loss)
        self._links.drop(group.address)
        self._live = self._live.without(group.name)

    def _adopt(self, placement: Placement) -> None:
        if placement.epoch > self._newest.epoch:
            self._newest = self._live = placement
            self._links.retain([group.address for group in placement.groups])

    def _await_replica(self, layer: int, expert: int, deadline: float) -> None:
        """Wait for a newer placement for a while, then give every group of the newest one another chance."""
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise ExpertUnavailable(layer, expert, self._deadline_s, self._last_loss)
        self._adopt(self._placements.wait_newer(self._newest.epoch, min(remaining_s, _RETRY_S)))
        self._live = self._newest

    def _count(self, layer: int, expert_N: NDArray[np.int64]) -> None:
        with self._load_lock:
            self._load_LE[layer] += np.bincount(expert_N, minlength=self._load_LE.shape[1])


def _receive(batch: _Batch, answer: Frame, y_ND: NDArray[np.float32]) -> None:
    """Write an answer to the rows it is for. Raises LinkLost if it doesn't answer `batch`, or by an error."""
    if answer.sequence != batch.frame.sequence:
        raise LinkLost(f"protocol: answer {answer.sequence} to question {batch.frame.sequence}")
    if answer.kind == Kind.ERROR:
        reason = bytes(answer.meta).decode(errors="replace")
        raise LinkLost(f"it reports: {reason}")
    expected = Kind.RESULTS, Dtype.FLOAT32, batch.frame.num_rows, batch.frame.rows.nbytes
    if (answer.kind, answer.dtype, answer.num_rows, answer.rows.nbytes) != expected:
        raise LinkLost(
            f"protocol: {answer.num_rows} rows of {answer.dtype.name}, {answer.rows.nbytes} bytes, in a "
            f"{answer.kind.name} frame answer {batch.frame.num_rows} rows of {batch.frame.rows.nbytes} bytes"
        )
    y_ND[batch.rows_S] = np.frombuffer(answer.rows, np.float32).reshape(len(batch.rows_S), -1)
