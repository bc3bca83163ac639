"""Run tokens through their experts, wherever those live, and whatever dies on the way."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.exchange import Batch, Wait, exchange
from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.pool import LinkPool
from router.placement import Group, Placement

# T tokens   K experts per token   D hidden   N rows = T*K   S rows in the order of sending   R runs of rows

_log = logging.getLogger(__name__)

_RETRY_S = 0.25  # how often a lost group is tried again while an expert of it has no other replica
_FORGIVE_S = 5.0  # before a lost group is tried again although others hold its experts


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


class Dispatcher:
    """Sends the rows of each layer to expert groups and brings back what these made of them.

    Implements the `Experts` seam of the layers. Experts hold no state, so rows of a lost group are simply
    sent again: to another replica, or, if there is none, to the one that a newer placement brings.
    A group that reports an error, or at whose address another process answers, counts as lost too; so does,
    while we wait for it, one that a newer placement no longer has, and one that alone is slow.
    For one thread, except for `take_load`, `counts` and `epoch_in_use`.
    """

    def __init__(
        self,
        placements: Placements,
        links: LinkPool,
        num_layers: int,
        num_experts: int,
        *,
        doubt_after_s: float = 2.0,
        reply_timeout_s: float = 30.0,
        deadline_s: float = 60.0,
    ) -> None:
        """Give a group `reply_timeout_s` to answer, less if others could answer instead.

        Those then get `doubt_after_s` after the layer's last answer, or after its rows were sent. An expert
        without replica gets `deadline_s` to return.
        """
        self._placements = placements
        self._links = links
        self._doubt_after_s = min(doubt_after_s, reply_timeout_s)
        self._reply_timeout_s = reply_timeout_s
        self._deadline_s = deadline_s
        self._newest = Placement(-1, ())
        self._live = self._newest  # without the groups that we lost
        self._forgive_at = 0.0  # when these get another chance
        self._opened = self._newest  # those of `_live` that had an open link when we looked last
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
        patience_s = self._doubt_after_s
        while waiting_N.size:
            self._adopt(self._placements.current())
            rows_S = waiting_N[expert_N[waiting_N].argsort(kind="stable")]
            num_rows = Counter(expert_N[rows_S].tolist())  # by expert, in the order of `rows_S`
            orphan = next((expert for expert in num_rows if not self._live.replicas(layer, expert)), None)
            if orphan is not None:
                deadline = deadline or time.monotonic() + self._deadline_s
                self._await_replica(layer, orphan, deadline)
                continue
            batches = self._batches(layer, x_TD, top_k, rows_S, num_rows)
            why_hopeless = partial(self._why_hopeless, patience_s=patience_s)
            lost = exchange(batches, self._links, y_ND, why_hopeless)
            for batch, error in lost:
                self._lose(batch.group, error)
            # Once doubted, rows are waited for: perhaps it is they that take so long.
            patience_s = self._reply_timeout_s
            waiting_N = np.concatenate([batch.rows_S for batch, _ in lost]) if lost else waiting_N[:0]
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
        num_rows: Mapping[int, int],
    ) -> list[Batch]:
        """Cut rows that are sorted by expert into one message per group."""
        self._sequence = (self._sequence + 1) % (1 << 32)
        placement = self._reachable(layer, num_rows)
        starts = dict(zip(num_rows, accumulate(num_rows.values(), initial=0), strict=False))
        runs: dict[int, list[tuple[int, int]]] = {}  # by group
        parts: dict[int, list[NDArray[np.int64]]] = {}
        for share in placement.share_out(layer, num_rows.items(), self._sequence):
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
            batches.append(Batch(placement.groups[group], its_rows_S, frame))
        return batches

    def _reachable(self, layer: int, experts: Iterable[int]) -> Placement:
        """Return the live groups; without those to which no link is open yet, if one can do without them.

        Those are linked to in the background: a group that has just come, or one that was lost and may be
        back, must not hold up a step.
        """
        live = self._live
        closed = [group for group in live.groups if not self._links.is_open(group.address)]
        if not closed:
            return live
        groups = tuple(group for group in live.groups if group not in closed)
        if self._opened.groups != groups:
            self._opened = Placement(live.epoch, groups)
        opened = self._opened
        if not all(opened.replicas(layer, expert) for expert in experts):
            return live
        for group in closed:
            self._links.prepare(group.address)
        return opened

    def _why_hopeless(self, batch: Batch, wait: Wait, patience_s: float) -> str | None:
        """Say why the answer to a batch is not waited for any longer; None if it is.

        A group is doubted once all answers have been silent for `patience_s`, if others could answer in its
        place. Those that owe an answer themselves could not: they are as late, so perhaps it is the rows.
        """
        if wait.waited_s > self._reply_timeout_s:
            return f"no answer within {self._reply_timeout_s:g} s"
        newest = self._placements.current()
        # By address: a group's name is used again by the one that takes its place.
        if newest.epoch > self._newest.epoch and batch.group.address not in {
            g.address for g in newest.groups
        }:
            return f"the router took it out of placement {newest.epoch}"
        if wait.quiet_s > patience_s:
            experts = np.frombuffer(batch.frame.meta, "<i4")[::2].tolist()
            if all(self._is_held_by_others(batch.frame.layer, expert, wait.owing) for expert in experts):
                return f"no answer for {patience_s:g} s, and others can be asked"
        return None

    def _is_held_by_others(self, layer: int, expert: int, names: Collection[str]) -> bool:
        """Say whether a live group other than these holds the expert."""
        return any(self._live.groups[group].name not in names for group in self._live.replicas(layer, expert))

    def _lose(self, group: Group, error: LinkLost) -> None:
        self._last_loss = f"expert group {group.name!r} is lost: {error}"
        _log.warning("%s", self._last_loss)
        self._live = self._live.without(group.name)
        self._forgive_at = time.monotonic() + _FORGIVE_S

    def _adopt(self, placement: Placement) -> None:
        if placement.epoch > self._newest.epoch:
            self._newest = self._live = placement
            self._links.retain([group.address for group in placement.groups])
        elif len(self._live.groups) < len(self._newest.groups) and time.monotonic() > self._forgive_at:
            self._live = self._newest
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
