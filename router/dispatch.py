"""Run tokens through their experts, wherever those live, and whatever dies on the way."""

import logging
import select
import threading
import time
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.links.base import Dtype, Frame, Kind, Link, LinkLost
from router.links.pool import LinkPool
from router.placement import Group, Placement

# T tokens   K experts per token   D hidden   N rows = T*K   S rows in the order of sending   R runs of rows

_log = logging.getLogger(__name__)

_RETRY_S = 0.25  # how often a lost group is tried again while an expert of it has no other replica
_LOOK_S = 0.05  # how soon a call that waits for an answer notices a newer placement


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
class DispatchCounts:
    """What a dispatcher has been through since it was made."""

    failovers: int = 0  # links lost, or answers given up, with rows on the way
    rows_resent: int = 0


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
    A group that reports an error, or at whose address another process answers, counts as lost too; so does
    one that a newer placement no longer has, while we wait for it.
    For one thread, except for `take_load`, `counts` and `epoch_in_use`.
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
        self._oldest_in_use: int | None = None  # epoch; None between two calls
        self._last_loss: str | None = None
        self._sequence = 0
        self._counts = DispatchCounts()
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
        self._oldest_in_use = self._newest.epoch  # before we look for a newer one: see `epoch_in_use`
        try:
            self._run(layer, x_TD.numpy(), expert_N, top_k, y_ND)
        finally:
            self._oldest_in_use = None
        return torch.from_numpy(y_ND).view(num_tokens, top_k, hidden_size)

    @property
    def epoch_in_use(self) -> int:
        """The epoch such that no row will any more be sent by an older placement. From any thread."""
        newest = self._placements.current().epoch
        oldest = self._oldest_in_use  # read after `newest`: a call that starts now finds that one, or a newer
        return newest if oldest is None else min(newest, oldest)

    @property
    def counts(self) -> DispatchCounts:
        """What went wrong so far, and was mended. From any thread."""
        return self._counts

    def take_load(self) -> NDArray[np.int64]:
        """Return how many rows each expert got since the last call, [layers, experts]; from any thread."""
        with self._load_lock:
            load_LE, self._load_LE = self._load_LE, np.zeros_like(self._load_LE)
        return load_LE

    def close(self) -> None:
        """Close every link."""
        self._links.close()

    def _run(
        self,
        layer: int,
        x_TD: NDArray[np.float32],
        expert_N: NDArray[np.int64],
        top_k: int,
        y_ND: NDArray[np.float32],
    ) -> None:
        deadline: float | None = None
        waiting_N = np.arange(len(expert_N))
        while waiting_N.size:
            self._adopt(self._placements.current())
            order_S = expert_N[waiting_N].argsort(kind="stable")
            batches, orphan = self._batches(layer, x_TD, top_k, waiting_N[order_S], expert_N)
            if orphan is not None:
                deadline = deadline or time.monotonic() + self._deadline_s
                self._await_replica(layer, orphan, deadline)
                continue
            lost = self._exchange(batches, y_ND)
            waiting_N = np.concatenate([batch.rows_S for batch in lost]) if lost else waiting_N[:0]
            if lost:
                self._counts = DispatchCounts(
                    self._counts.failovers + len(lost), self._counts.rows_resent + len(waiting_N)
                )

    def _batches(
        self,
        layer: int,
        x_TD: NDArray[np.float32],
        top_k: int,
        rows_S: NDArray[np.int64],
        expert_N: NDArray[np.int64],
    ) -> tuple[list[_Batch], int | None]:
        """Cut rows that are sorted by expert into one message per group; or name an expert without any."""
        self._sequence = (self._sequence + 1) % (1 << 32)
        num_rows = Counter(expert_N[rows_S].tolist())  # in the order of `rows_S`
        for expert in num_rows:
            if not self._live.replicas(layer, expert):
                return [], expert
        starts = dict(zip(num_rows, accumulate(num_rows.values(), initial=0), strict=False))
        runs: dict[int, list[tuple[int, int]]] = {}  # by group
        parts: dict[int, list[NDArray[np.int64]]] = {}
        for share in self._live.share_out(layer, num_rows.items(), self._sequence):
            start = starts[share.expert]
            starts[share.expert] = end = start + share.num_rows
            runs.setdefault(share.group, []).append((share.expert, share.num_rows))
            parts.setdefault(share.group, []).append(rows_S[start:end])
        batches = []
        for group, its_runs in runs.items():
            its_rows_S = np.concatenate(parts[group])
            rows_SD = x_TD[its_rows_S // top_k]
            meta = np.array(its_runs, "<i4").data
            frame = Frame(Kind.ROWS, self._sequence, layer, meta, Dtype.FLOAT32, len(rows_SD), rows_SD.data)
            batches.append(_Batch(self._live.groups[group], its_rows_S, frame))
        return batches, None

    def _exchange(self, batches: list[_Batch], y_ND: NDArray[np.float32]) -> list[_Batch]:
        """Send every batch, then receive every answer into `y_ND`; return the batches of lost groups.

        This can't deadlock, however large the frames: a group blocks on no peer, neither to read nor to
        write, so it takes in what we send even while answers to us or to others wait for their readers.
        """
        lost = []
        unanswered: dict[int, tuple[_Batch, Link]] = {}  # by file descriptor
        try:
            for batch in batches:
                try:
                    link = self._links.get(batch.group.address)
                    if link.peer != batch.group.name:  # the address of a dead group was given to another
                        raise LinkLost(f"another process answers there: {link.peer!r}")
                    link.send(batch.frame)
                    unanswered[link.fileno()] = batch, link
                except LinkLost as error:
                    lost.append(batch)
                    self._lose(batch.group, error)
            deadline = time.monotonic() + self._reply_timeout_s
            poller = select.poll()
            for number in unanswered:
                poller.register(number, select.POLLIN)
            while unanswered:
                ready = [number for number, _ in poller.poll(_LOOK_S * 1000)]
                hopeless = {} if ready else self._hopeless(unanswered, deadline)
                for number in ready or hopeless:
                    batch, link = unanswered[number]
                    try:
                        if number in hopeless:
                            raise LinkLost(hopeless[number])
                        answer = link.poll()
                        if answer is None:
                            continue
                        _receive(batch, answer, y_ND)
                    except LinkLost as error:
                        lost.append(batch)
                        self._lose(batch.group, error)
                    poller.unregister(number)
                    del unanswered[number]
        finally:
            # Left over if we are on the way out: nobody must ever take their answers for others.
            for batch, _ in unanswered.values():
                self._links.drop(batch.group.address)
        return lost

    def _hopeless(self, unanswered: dict[int, tuple[_Batch, Link]], deadline: float) -> dict[int, str]:
        """Return the links on which no answer is waited for any longer, and why."""
        if time.monotonic() > deadline:
            return dict.fromkeys(unanswered, f"no answer within {self._reply_timeout_s:g} s")
        placement = self._placements.current()
        if placement.epoch <= self._newest.epoch:
            return {}
        listed = {group.name for group in placement.groups}
        return {
            number: f"the router took it out of placement {placement.epoch}"
            for number, (batch, _) in unanswered.items()
            if batch.group.name not in listed
        }

    def _lose(self, group: Group, error: LinkLost) -> None:
        self._last_loss = f"expert group {group.name!r} is lost: {error}"
        _log.warning("%s", self._last_loss)
        self._links.drop(group.address)
        self._live = self._live.without(group.name)

    def _adopt(self, placement: Placement) -> None:
        if placement.epoch > self._newest.epoch:
            self._newest = self._live = placement
            self._links.retain([group.address for group in placement.groups])
        self._oldest_in_use = self._newest.epoch

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
