"""An expert group in threads of this process: what cluster/actors/expert_group.py is, without Ray.

It can be killed (all its sockets close at once, whatever it was doing) and stopped (nothing in it goes on,
and its sockets stay open).
"""

import math
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from router.group_state import GroupState, Slot, Wish
from router.links.address import Address
from router.links.base import Link, LinkLost
from router.links.listener import Listener
from router.links.stream import connect
from router.moves import StageOrder
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.layers.mlp import GatedMlp
from shards.staging import Stager
from tests.shards.tiny_models import TinyModel

SECRET = b"a live fleet's secret"
PEER_TIMEOUT_S = 0.5
CONNECT_TIMEOUT_S = 1.0


class Gate:
    """Where every thread of a stopped process waits, and every thread of a killed one ends."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self.is_dead = False

    def open(self) -> None:
        self._set(True, self.is_dead)

    def shut(self) -> None:
        self._set(False, self.is_dead)

    def kill(self) -> None:
        self._set(True, True)

    def go_through(self) -> None:
        """Wait until the gate is open. Raises SystemExit once the process was killed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
        if self.is_dead:
            raise SystemExit

    def _set(self, is_open: bool, is_dead: bool) -> None:
        with self._changed:
            self._is_open, self.is_dead = is_open, is_dead
            self._changed.notify_all()


class GatedStore(ExpertStore):
    """What all threads of a group pass sooner or later: rows, weights for others, and its own staging."""

    def __init__(self, num_slots: int, gate: Gate) -> None:
        super().__init__(num_slots)
        self._gate = gate

    def run(self, layer: int, runs: Iterable[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        self._gate.go_through()
        super().run(layer, runs, x_ND, out_ND)

    def get(self, layer: int, expert: int) -> GatedMlp:
        self._gate.go_through()
        return super().get(layer, expert)

    @property
    def held(self) -> tuple[tuple[int, int], ...]:
        self._gate.go_through()
        return super().held


class LiveGroup:
    """Real listener, service, store and stager; calls run one or two at a time, as a Ray actor's do."""

    def __init__(self, name: str, model: TinyModel, num_slots: int, directory: Path) -> None:
        self.name = name
        self.gate = Gate()
        self._resumes_at: float | None = None  # of the router's clock, while it is stopped
        self._known_dead_at = math.inf  # as long as it lives, and for some time after
        self.store = GatedStore(num_slots, self.gate)
        self._lock = threading.Lock()  # of the two below
        self._links: list[Link] = []  # to groups that weights come from
        self._is_killed = False
        self.stager = Stager(
            self.store, model.checkpoint, model.config, self._connect, peer_timeout_s=PEER_TIMEOUT_S
        )
        listener = Listener(SECRET, name, directory, "127.0.0.1")
        self.address = str(listener.address)
        self.service = ExpertService(self.store, listener, model.config.hidden_size)
        self.service.start()
        self._wish = Wish(0, 0)
        self._is_leaving = False
        self._num_answers = 0
        self._num_sharing = 1
        self._answering = threading.Lock()
        self._calls = ThreadPoolExecutor(2, f"calls of {name}")

    @property
    def is_killed(self) -> bool:
        return self._is_killed

    def is_known_dead(self, now_s: float) -> bool:
        """Whether Ray says that it is dead."""
        return now_s >= self._known_dead_at

    def state(self, wish: Wish, is_draining: bool) -> "Future[GroupState]":
        def state() -> GroupState:
            self._wish = max(self._wish, wish, key=lambda each: each.number)
            self._is_leaving |= is_draining
            return self._state()

        return self._call(state)

    def stage(self, orders: Iterable[StageOrder]) -> "Future[GroupState]":
        def stage() -> GroupState:
            self.stager.stage((order.layer, order.expert, order.peer) for order in orders)
            return self._state()

        return self._call(stage)

    def share(self, num_groups: int) -> "Future[GroupState]":
        def share() -> GroupState:
            self._num_sharing = num_groups
            return self._state()

        return self._call(share)

    def free(self, slots: Iterable[Slot]) -> "Future[GroupState]":
        def free() -> GroupState:
            self.stager.free(slots)
            return self._state()

        return self._call(free)

    def leave(self) -> None:
        """Do what SIGTERM does."""
        self._is_leaving = True

    def stop(self, resumes_at: float) -> None:
        """Let nothing go on here until `resume_if` is called with that time, or `resume`."""
        self._resumes_at = resumes_at
        self.gate.shut()

    def resume_if(self, now_s: float) -> None:
        if self._resumes_at is not None and now_s >= self._resumes_at:
            self.resume()

    def resume(self) -> None:
        self._resumes_at = None
        self.gate.open()

    def kill(self, known_at: float = 0.0) -> None:
        """End at once, also if it is stopped; from `known_at` on, of the router's clock, Ray knows.

        Returns when every thread and socket of it is gone.
        """
        with self._lock:
            if self._is_killed:
                return
            self._is_killed, self._known_dead_at = True, known_at
            links = [*self._links]
        self.gate.kill()
        for link in links:
            link.close()
        self.service.stop()
        self.stager.close()
        self._calls.shutdown(cancel_futures=True)

    def _call(self, work: Callable[[], GroupState]) -> "Future[GroupState]":
        def run() -> GroupState:
            self.gate.go_through()
            return work()

        try:
            return self._calls.submit(run)
        except RuntimeError:  # it was killed
            dead: Future[GroupState] = Future()
            dead.set_exception(SystemExit())
            return dead

    def _state(self) -> GroupState:
        with self._answering:
            self._num_answers += 1
            staging = self.stager.pending  # before `held`, as ExpertGroup does
            held = frozenset(self.store.held)
            return GroupState(
                self.name,
                self.address,
                self.store.num_slots,
                held,
                staging - held,
                self.service.busy_s,
                self._wish,
                self.stager.staged_bytes,
                self._is_leaving,
                self.stager.last_failure,
                self._num_answers,
                self._num_sharing,
            )

    def _connect(self, address: str) -> Link:
        self.gate.go_through()
        link = connect(Address.parse(address), SECRET, self.name, CONNECT_TIMEOUT_S)
        with self._lock:
            self._links = [each for each in self._links if each.fileno() >= 0]
            if self._is_killed:
                link.close()
                raise LinkLost("this group was killed")
            self._links.append(link)
        return link
