"""A router in a thread of this process: a real Controller, and what GroupKeeper does for it, without Ray.

The controller's clock runs SPEED times as fast as ours: its patience, in seconds, costs us milliseconds.
"""

import asyncio
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from router.controller import Controller, Orders
from router.epochs import Epochs
from router.group_state import GroupState
from router.links.address import Address
from router.links.base import LinkLost
from router.links.stream import StreamLink, connect
from router.policy import Policy
from tests.cluster.live_engine import EngineKilled, LiveEngines
from tests.cluster.live_group import CONNECT_TIMEOUT_S, SECRET, LiveGroup

SPEED = 20.0  # seconds of the controller in one of ours
# In seconds of the controller:
HEARTBEAT_S = 0.5
TICK_S = 0.25
FIRST_ROUND_S = 2.0


@dataclass(eq=False)
class _Kept:
    """A group, as one router knows it."""

    group: LiveGroup
    link: StreamLink | None = None
    is_asked: bool = False  # a heartbeat is on its way
    ask_at: float = 0.0


class LiveRouter:
    """Keeps groups, made by `start`, for `engines`. Methods are for other threads than its own."""

    def __init__(self, policy: Policy, start: Callable[[str], LiveGroup], engines: LiveEngines) -> None:
        self._policy, self._start, self._engines = policy, start, engines
        self._started_at = time.monotonic()
        self._kept: dict[str, _Kept] = {}
        self._answers: SimpleQueue[tuple[_Kept, bool, GroupState]] = SimpleQueue()
        self._commands: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        for sock in (self._wake, self._woken):
            sock.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._is_closing = False
        self.failure: BaseException | None = None  # why the thread ended, if it was not asked to
        self._begin()
        self._thread = threading.Thread(target=self._run, name="router")
        self._thread.start()

    @property
    def now_s(self) -> float:
        """Of the controller's clock."""
        return (time.monotonic() - self._started_at) * SPEED

    @property
    def groups(self) -> dict[str, LiveGroup]:
        """Those that the router believes to exist, by name."""
        return {name: kept.group for name, kept in [*self._kept.items()]}

    def do(self, work: Callable[[Controller, Epochs], Any], timeout_s: float = 10.0) -> Any:
        """Have `work` done in the router's thread; return what it returns, raise what it raises."""
        done: Future[Any] = Future()
        self._commands.put((lambda: work(self._controller, self._epochs), done))
        self._wake_up()
        return done.result(timeout_s)

    def restart(self) -> None:
        """Kill the router; another one finds the groups, and knows nothing else."""
        self.do(lambda controller, epochs: self._begin())

    def close(self) -> None:
        """End the thread, then every group."""
        self._is_closing = True
        self._wake_up()
        self._thread.join()
        for kept in self._kept.values():
            self._unlink(kept)
            kept.group.kill()
        self._selector.close()
        self._wake.close()
        self._woken.close()
        self._loop.close()

    def _begin(self) -> None:
        self._epochs = Epochs()
        self._controller = Controller(self._policy, self._epochs, "group/", self.now_s)
        self._first_round_until = self.now_s + FIRST_ROUND_S
        found = [kept.group for kept in self._kept.values()]
        for kept in self._kept.values():
            self._unlink(kept)
        self._kept = {}
        for group in found:
            if not group.is_known_dead(self.now_s):  # else Ray no longer lists it
                self._controller.found(group.name, self.now_s)
                self._kept[group.name] = _Kept(group)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._hear()
                self._obey()
                self._look_after_groups()
                self._hear_engines()
                if self._is_first_round_over():
                    self._carry_out(self._controller.tick(self.now_s))
                self._tell_engines()
                self._wait()
        except BaseException as failure:
            self.failure = failure
        with suppress(Empty):
            while True:  # nobody must wait for a thread that has ended
                self._commands.get_nowait()[1].set_exception(RuntimeError(f"ended: {self.failure!r}"))

    def _hear(self) -> None:
        with suppress(Empty):
            while True:
                kept, is_heartbeat, state = self._answers.get_nowait()
                if self._kept.get(kept.group.name) is not kept:
                    continue  # another process has its name by now, or another router asked
                if is_heartbeat:
                    kept.is_asked = False
                self._controller.heard(state, self.now_s)
                if kept.link is None:
                    self._link(kept)

    def _obey(self) -> None:
        with suppress(Empty):
            while True:
                work, done = self._commands.get_nowait()
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)

    def _look_after_groups(self) -> None:
        now = self.now_s
        for name, kept in [*self._kept.items()]:
            kept.group.resume_if(now)
            if kept.group.is_known_dead(now):
                self._forget(name)
                self._controller.lost(name, "it was killed", now)
            elif not kept.is_asked and now >= kept.ask_at:
                kept.is_asked, kept.ask_at = True, now + HEARTBEAT_S
                call = kept.group.state(self._controller.wish, self._controller.is_draining(name))
                self._expect(kept, call, is_heartbeat=True)

    def _expect(self, kept: _Kept, call: "Future[GroupState]", is_heartbeat: bool = False) -> None:
        def done(call: "Future[GroupState]") -> None:
            if not call.cancelled() and not call.exception():  # else it was killed: there is no answer
                self._answers.put((kept, is_heartbeat, call.result()))
                self._wake_up()

        call.add_done_callback(done)

    def _hear_engines(self) -> None:
        for engine in self._engines.engines:
            with suppress(EngineKilled):
                self._controller.saw_engine(engine.name, *engine.report(), self.now_s)

    def _is_first_round_over(self) -> bool:
        starting = self._controller.progress(self.now_s).groups["starting"]
        return not starting or self._epochs.newest.epoch > 0 or self.now_s > self._first_round_until

    def _carry_out(self, orders: Orders) -> None:
        for name in (*orders.kill, *orders.let_go):
            if kept := self._forget(name):
                kept.group.kill()
        for name in orders.start:
            self._kept[name] = _Kept(self._start(name))
        for name, stage in orders.stage.items():
            if kept := self._kept.get(name):
                self._expect(kept, kept.group.stage(stage))
        for name, slots in orders.free.items():
            if kept := self._kept.get(name):
                self._expect(kept, kept.group.free(slots))
        for name, num_groups in orders.share.items():
            if kept := self._kept.get(name):
                self._expect(kept, kept.group.share(num_groups))

    def _tell_engines(self) -> None:
        """Do what the engines' long polls do."""
        for engine in self._engines.engines:
            if engine.placements.follows:
                known = engine.placements.known.epoch
                if newer := self._loop.run_until_complete(self._epochs.after(known, timeout_s=0)):
                    engine.placements.push(newer)

    def _wait(self) -> None:
        for key, _ in self._selector.select(TICK_S / SPEED):
            if key.fileobj is self._woken:
                with suppress(BlockingIOError):
                    self._woken.recv(4096)
            else:  # a group sends nothing over it, but the end of file
                self._unlink(key.data)
                self._controller.doubt(key.data.group.name)

    def _wake_up(self) -> None:
        with suppress(OSError):  # full: it wakes up anyway; closed: it has ended
            self._wake.send(b"!")

    def _forget(self, name: str) -> _Kept | None:
        if kept := self._kept.pop(name, None):
            self._unlink(kept)
        return kept

    def _link(self, kept: _Kept) -> None:
        with suppress(LinkLost):
            link = connect(Address.parse(kept.group.address), SECRET, "router", CONNECT_TIMEOUT_S)
            self._selector.register(link, selectors.EVENT_READ, kept)
            kept.link = link

    def _unlink(self, kept: _Kept) -> None:
        if kept.link:
            self._selector.unregister(kept.link)
            kept.link.close()
            kept.link = None
