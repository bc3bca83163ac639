"""How an expert group's slots are filled while it serves: from other groups, else from the checkpoint."""

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from router.group_state import StagedBytes
from router.links.base import Frame, Kind, Link
from router.links.pool import LinkPool
from shards.background import step_back
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.expert_store import ExpertStore, read_expert
from shards.kernels.cpu import pack
from shards.layers.mlp import GatedMlp
from shards.partition import expert_tensors
from shards.weight_reader import WeightReader
from shards.weights_wire import fetch_frame, receive_mlp

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Request:
    """A wish for an expert. Told apart by identity: one may come while a cancelled one is being read."""

    layer: int
    expert: int
    address: str | None


class _Cancelled(Exception):
    """Nobody wants the expert that is being read any more."""


class _Refused(Exception):
    """A group can't give this one expert; it may well give others."""


class Stager:
    """Fills the slots of a store one after another, in a thread that steps back behind those that serve."""

    def __init__(
        self,
        store: ExpertStore,
        checkpoint: Checkpoint,
        config: ModelConfig,
        connect: Callable[[str], Link],
        *,
        peer_timeout_s: float = 10.0,
    ) -> None:
        """Give a group, to which `connect` opens a link by its address, `peer_timeout_s` for each frame."""
        self._store = store
        self._checkpoint = checkpoint
        self._config = config
        self._links = LinkPool(connect)
        self._peer_timeout_s = peer_timeout_s
        self._lost_peers: set[str] = set()  # until there is nothing left to do
        self._sequence = 0
        self._bytes_from_peers = 0
        self._bytes_from_checkpoint = 0
        self._bytes_shared = 0

        self._changed = threading.Condition()  # of what is below, and of the store where both must agree
        self._failures: dict[tuple[int, int], str] = {}  # of what was given up, until it is staged or freed
        self._pending: dict[tuple[int, int], _Request] = {}  # in order; the first is the one being read
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="stager", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> frozenset[tuple[int, int]]:
        """Each (layer, expert) that waits or is being read. Look here first, then at what the store holds."""
        with self._changed:
            return frozenset(self._pending)

    @property
    def staged_bytes(self) -> StagedBytes:
        """How many bytes of weights have come, also of experts that were not wanted any more in the end."""
        return StagedBytes(self._bytes_from_peers, self._bytes_from_checkpoint, self._bytes_shared)

    @property
    def last_failure(self) -> str | None:
        """Why the last expert that could not be staged was given up; None once it was staged or freed."""
        with self._changed:
            return next(reversed(self._failures.values()), None)

    def stage(self, wanted: Iterable[tuple[int, int, str | None]]) -> None:
        """Fill slots with each (layer, expert, address) in order, unless it is held or pending; don't wait.

        `address` is of a group that holds the expert; without one, or if that group fails, the checkpoint is
        read. An expert that can't be read, or for which no slot is free when its turn comes, is given up.
        """
        with self._changed:
            for layer, expert, address in wanted:
                if not self._store.holds(layer, expert):
                    self._pending.setdefault((layer, expert), _Request(layer, expert, address))
            self._changed.notify()

    def free(self, experts: Iterable[tuple[int, int]]) -> None:
        """Empty the slots of each (layer, expert); one that is pending will not appear in the store."""
        with self._changed:
            for layer, expert in experts:
                self._pending.pop((layer, expert), None)
                self._failures.pop((layer, expert), None)
                self._store.free(layer, expert)

    def close(self) -> None:
        """Give up what is pending and wait for the thread: for one read, or for a silent group's timeout."""
        with self._changed:
            self._is_closing = True
            self._pending.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        step_back()
        while request := self._next():
            try:
                self._fill(request)
            except _Cancelled:
                _log.info("layer %d expert %d is no longer wanted", request.layer, request.expert)
            except Exception as error:  # no memory, a broken disk, no free slot: whoever asked may ask again
                failure = f"layer {request.layer} expert {request.expert}: {error}"
                is_explained = isinstance(error, ValueError)
                _log.warning("can't be staged: %s", failure, exc_info=not is_explained)
                with self._changed:
                    if self._is_wanted(request):
                        self._failures.pop((request.layer, request.expert), None)  # to be the last again
                        self._failures[request.layer, request.expert] = failure
                    self._forget(request)
        self._links.close()

    def _next(self) -> _Request | None:
        """Wait for something to do; None at the end. Closes links that are of no more use."""
        with self._changed:
            if not self._pending:
                self._lost_peers.clear()
            self._links.retain({each.address for each in self._pending.values() if each.address is not None})
            self._changed.wait_for(lambda: self._pending or self._is_closing)
            return None if self._is_closing else next(iter(self._pending.values()))

    def _fill(self, request: _Request) -> None:
        if len(self._store.held) >= self._store.num_slots:  # before it takes the memory of one more
            raise ValueError(f"all {self._store.num_slots} slots are filled; free one first")
        mlp = self._load(request)
        with self._changed:
            if self._is_wanted(request):
                self._store.put(request.layer, request.expert, mlp)
                self._failures.pop((request.layer, request.expert), None)
                self._forget(request)

    def _load(self, request: _Request) -> GatedMlp:
        address = request.address
        if address is not None and address not in self._lost_peers:
            try:
                return self._from_peer(request, address)
            except _Refused as error:
                _log.warning("%s answers: %s; reading the checkpoint", address, error)
            except _Cancelled:
                self._links.drop(address)  # frames are still under way
                raise
            except Exception as error:  # whatever a group does wrong, the checkpoint is right
                _log.warning("%s can't give weights: %s; reading the checkpoint", address, error)
                self._links.drop(address)
                self._lost_peers.add(address)
        return self._from_checkpoint(request)

    def _from_peer(self, request: _Request, address: str) -> GatedMlp:
        link = self._links.get(address)
        self._sequence = (self._sequence + 1) % (1 << 32)
        link.send(fetch_frame(request.layer, request.expert, self._sequence))
        before = self._bytes_from_peers
        mlp = receive_mlp(self._answers(request, link), self._config)
        self._bytes_shared += mlp.nbytes - (self._bytes_from_peers - before)
        return mlp

    def _answers(self, request: _Request, link: Link) -> Iterator[Frame]:
        while True:
            frame = link.receive(self._peer_timeout_s)
            if frame.sequence != self._sequence:
                raise ValueError(f"answer {frame.sequence} to question {self._sequence}")
            if frame.kind == Kind.ERROR:
                raise _Refused(bytes(frame.meta[:300]).decode(errors="replace"))
            if frame.kind not in (Kind.WEIGHTS, Kind.MEMORY):
                raise ValueError(f"a {frame.kind.name} frame instead of WEIGHTS or MEMORY")
            self._bytes_from_peers += frame.rows.nbytes
            self._check_wanted(request)
            yield frame

    def _from_checkpoint(self, request: _Request) -> GatedMlp:
        before = self._bytes_from_checkpoint

        def note(done_bytes: int, total_bytes: int) -> None:
            self._bytes_from_checkpoint = before + done_bytes
            self._check_wanted(request)

        expected = expert_tensors(self._config, request.layer, request.expert)
        pack_alone = functools.partial(pack, alone=True, is_shared=True)
        reader = WeightReader(self._checkpoint, expected, note, pack_alone)
        return read_expert(reader, request.layer, request.expert)

    def _check_wanted(self, request: _Request) -> None:
        if not self._is_wanted(request):
            raise _Cancelled

    def _is_wanted(self, request: _Request) -> bool:
        """Without the lock, this is a hint: it may change at any moment."""
        return self._pending.get((request.layer, request.expert)) is request

    def _forget(self, request: _Request) -> None:
        if self._is_wanted(request):
            del self._pending[request.layer, request.expert]
