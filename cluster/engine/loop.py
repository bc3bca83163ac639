"""The thread that steps an engine, and the thread-safe door to it."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from cluster.engine.copies import MAX_STEP_BYTES, BlockRun
from cluster.engine.engine import Engine
from cluster.engine.observer import EngineObserver
from cluster.engine.request import EngineFull, EngineStopped, Generated, GenerationRequest, TokenEvent
from shards.background import in_foreground

logger = logging.getLogger(__name__)

LEAST_RUN_BYTES = 1 << 20  # what a run counts against MAX_STEP_BYTES, beside what it holds


@dataclass
class _Open:
    """A request that this loop has accepted and not finished."""

    gateway: str
    future: Future[Generated]
    submitted_at: float = field(default_factory=time.perf_counter)  # also the time in the inbox counts
    num_tokens: int = 0


class EngineLoop:
    """Step an engine in a thread of its own, and hand each step's events to their gateways.

    `deliver(gateway, events)` is called from that thread once per step and gateway, and with a receipt from
    whoever submits; it must not block.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[str, list[TokenEvent]], None],
        observer: EngineObserver,
        max_open: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._observer = observer
        self._max_open = max_open
        self._on_failure = on_failure
        self._open: dict[str, _Open] = {}  # by request id; touched by the thread alone
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._runs: SimpleQueue[tuple[BlockRun, Callable[[int], None]]] = SimpleQueue()
        self._stopping = False
        self.failure: BaseException | None = None  # why the thread ended, if it was not asked to
        observer.saw_stats(engine.stats())
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        in_foreground(self._thread.start)

    def submit(self, request: GenerationRequest, gateway: str) -> "Future[Generated]":
        """Queue a request, and let its gateway know at once. The future ends with the request.

        In it, ValueError says why the request can never be served, EngineFull that it can't be now.
        """
        future: Future[Generated] = Future()
        open_ = _Open(gateway, future)
        self._inbox.put(lambda: self._admit(request, open_))
        if self._stopping:  # set before the thread's last look: it may have missed this request
            self._turn_away()
        else:  # not from the thread, which may be in a step for seconds
            self._deliver(gateway, [TokenEvent(request.id, None)])
        return future

    def abort(self, request_id: str) -> None:
        """End a request before the next step; one that is unknown, or has ended, is ignored."""
        self._inbox.put(lambda: self._abort([request_id]))

    def abort_gateway(self, gateway: str, then: Callable[[], None] = lambda: None) -> None:
        """End every request of a gateway that is gone; call `then` when no more of their tokens will come."""

        def abort() -> None:
            self._abort([id for id, open_ in self._open.items() if open_.gateway == gateway])
            then()

        self._inbox.put(abort)

    def adopt(self, run: BlockRun, then: Callable[[int], None]) -> None:
        """Keep another engine's copies of blocks, in a pause between steps.

        `then(number)` says how many of the run's digests are here; from the thread, so it must not block. It
        is not called if this loop ends before.
        """
        self._runs.put((run, then))
        self._inbox.put(lambda: None)  # wakes the thread

    def stop(self) -> None:
        """Stop after the step in progress and wait for the thread's end."""

        def stop() -> None:
            self._stopping = True

        self._inbox.put(stop)
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                self._read_inbox(wait=not self._engine.has_work and self._runs.empty())
                if self._stopping:
                    return
                self._adopt_some()
                if self._engine.has_work:
                    self._step()
        except BaseException as failure:
            logger.exception("the engine's step failed; this engine is lost")
            self.failure = failure
        finally:
            for open_ in self._open.values():
                open_.future.set_exception(EngineStopped("the engine has stopped"))
            self._open.clear()
            self._turn_away()
            if self.failure:
                self._on_failure()

    def _turn_away(self) -> None:
        """Refuse what is still in the inbox: nobody will step for it. Safe from any thread."""
        self._stopping = True
        self._read_inbox(wait=False)

    def _read_inbox(self, wait: bool) -> None:
        try:
            if wait:
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            return

    def _admit(self, request: GenerationRequest, open_: _Open) -> None:
        # From here on the future can't be cancelled: the engine's last event ends it.
        if not open_.future.set_running_or_notify_cancel():
            return
        if self._stopping:
            open_.future.set_exception(EngineStopped("the engine has stopped"))
            return
        if request.id in self._open:  # the engine may have let go of it already, in an end not yet reported
            open_.future.set_exception(ValueError(f"request {request.id!r} is here already"))
            return
        if len(self._open) >= self._max_open and not request.is_resumed:
            open_.future.set_exception(EngineFull(f"the engine already holds {self._max_open} requests"))
            return
        self._open[request.id] = open_
        try:
            self._engine.submit(request)
        except ValueError as error:
            del self._open[request.id]
            open_.future.set_exception(error)

    def _abort(self, request_ids: Iterable[str]) -> None:
        if not self._stopping:  # else `_turn_away` calls, perhaps from another thread than the engine's
            for request_id in request_ids:
                self._engine.abort(request_id)

    def _adopt_some(self) -> None:
        """Take in copies, but few: requests wait for it."""
        left = MAX_STEP_BYTES
        while left > 0 and not self._runs.empty():
            run, then = self._runs.get()
            then(self._engine.adopt(run))
            left -= LEAST_RUN_BYTES + run.num_bytes
        if left < MAX_STEP_BYTES:
            self._observer.saw_stats(self._engine.stats())

    def _step(self) -> None:
        started_at = time.perf_counter()
        events = self._engine.step()
        now = time.perf_counter()
        by_gateway: dict[str, list[TokenEvent]] = defaultdict(list)
        for event in events:
            open_ = self._open[event.request_id]
            by_gateway[open_.gateway].append(event)
            if event.token_id is not None:
                if open_.num_tokens == 0:
                    self._observer.saw_first_token(now - open_.submitted_at)
                open_.num_tokens += 1
        for gateway, its_events in by_gateway.items():
            self._deliver(gateway, its_events)
        for event in events:
            if event.finish_reason:
                ended = self._open.pop(event.request_id)
                ended.future.set_result(Generated(event.finish_reason, ended.num_tokens))
        self._engine.copy_blocks()
        num_generated = sum(event.token_id is not None for event in events)
        self._observer.saw_step(now - started_at, num_generated, self._engine.stats())
