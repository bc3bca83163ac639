"""An engine in a thread of this process, and a gateway's journal over several of them: no Ray, no HTTP."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter

from cluster.actors.block_links import BlockReceiver, BlockSender
from cluster.engine.engine import Engine
from cluster.engine.loop import EngineLoop
from cluster.engine.observer import EngineObserver
from cluster.engine.request import EngineFull, EngineStopped, Generated, GenerationRequest, TokenEvent
from cluster.metrics import EngineMetrics
from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from cluster.serve.journal import Journal, RetryPolicy
from router.dispatch import Dispatcher, ExpertUnavailable
from router.links.address import Address
from router.links.listener import Listener
from router.links.pool import LinkPool
from router.links.stream import connect
from router.placement import Placement
from router.requests import choose_standby
from shards.kv_cache import block_bytes, block_numbers
from shards.shard import load_shard
from tests.cluster.live_group import CONNECT_TIMEOUT_S, SECRET
from tests.shards.tiny_models import TinyModel

NUM_BLOCKS = 48  # fewer than all requests at once would like, so that some are preempted
REPLY_TIMEOUT_S = 1.5
EXPERT_DEADLINE_S = 15.0
GATEWAY = "gateway"

Answer = list[tuple[int, float]]  # (token, its logprob)


class EngineKilled(Exception):
    """The engine's process is gone."""


class FollowedPlacements:
    """The dispatcher's `Placements`; of a killed engine, the place where its thread ends.

    A dispatcher looks here in every layer, and while it waits for answers: so an engine dies in the middle of
    a step, with questions on their way.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest = Placement(0, ())
        self._is_killed = False
        self.follows = True  # else news do not come through

    @property
    def known(self) -> Placement:
        return self._newest

    def current(self) -> Placement:
        if self._is_killed:
            raise EngineKilled
        return self._newest

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        with self._changed:
            self._changed.wait_for(lambda: self._newest.epoch > epoch or self._is_killed, timeout_s)
        return self.current()

    def push(self, placement: Placement) -> None:
        with self._changed:
            self._newest = placement
            self._changed.notify_all()

    def kill(self) -> None:
        with self._changed:
            self._is_killed = True
            self._changed.notify_all()


class LiveEngine:
    """A real loop, engine, shard and dispatcher."""

    def __init__(self, name: str, model: TinyModel, directory: Path) -> None:
        """`directory` is for its socket."""
        self.name = name
        self.placements = FollowedPlacements()
        config = model.config
        self.dispatcher = Dispatcher(
            self.placements,
            LinkPool(lambda address: connect(Address.parse(address), SECRET, name, CONNECT_TIMEOUT_S)),
            config.num_layers,
            config.num_experts,
            reply_timeout_s=REPLY_TIMEOUT_S,
            deadline_s=EXPERT_DEADLINE_S,
        )
        shard = load_shard(model.checkpoint, config, self.dispatcher, NUM_BLOCKS, lambda done, total: None)
        self.sender = BlockSender(SECRET, name)
        self.engine = Engine(
            shard,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            num_blocks=NUM_BLOCKS,
            max_step_tokens=64,
            max_running=8,
            standbys=self.sender,
            block_bytes=block_bytes(config),
            request_errors=(ExpertUnavailable,),
        )
        self._listeners: dict[str, Callable[[TokenEvent], None]] = {}  # by request id
        observer = EngineObserver(EngineMetrics(CollectorRegistry()), "model")
        self.loop = EngineLoop(self.engine, self._deliver, observer, max_open=64)
        self.receiver = BlockReceiver(
            Listener(SECRET, name, directory, "127.0.0.1"), block_numbers(config), self.loop.adopt
        )

    def submit(self, request: GenerationRequest, listen: Callable[[TokenEvent], None]) -> "Future[Generated]":
        self._listeners[request.id] = listen
        return self.loop.submit(request, GATEWAY)

    def forget(self, request_id: str) -> None:
        self._listeners.pop(request_id, None)

    def report(self) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch in use, and the rows sent since the last call. Raises EngineKilled."""
        return self.dispatcher.epoch_in_use, self.dispatcher.take_load()

    def kill(self) -> None:
        """End at once, also in the middle of a step. Returns when the thread and all sockets are gone."""
        self.placements.kill()
        self.loop.stop()
        self.dispatcher.close()
        self.sender.close()
        self.receiver.close()

    def _deliver(self, gateway: str, events: list[TokenEvent]) -> None:
        for event in events:
            if listen := self._listeners.get(event.request_id):
                listen(event)


@dataclass
class LiveEngines:
    """Implements EngineClient: each request goes to the next engine in turn, or to where its copies are."""

    engines: list[LiveEngine] = field(default_factory=list)  # replaced, never changed
    _turn: int = 0

    def replace(self, engines: list[LiveEngine]) -> None:
        """Let requests go to these engines, and their copies go from each to the others."""
        self.engines = engines
        for engine in engines:
            engine.sender.follow({each.name: each.receiver.address for each in engines if each is not engine})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        engines = self.engines
        if not engines:
            raise EngineUnavailable("there is no engine")
        self._turn += 1
        engine = engines[self._turn % len(engines)]
        if request.seeks_copies:
            standby = choose_standby(request.answer_id, [each.name for each in engines])
            (engine,) = (each for each in engines if each.name == standby)
        news: asyncio.Queue[TokenEvent | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(what: TokenEvent | BaseException) -> None:
            loop.call_soon_threadsafe(news.put_nowait, what)

        def tell_failure(call: "Future[Generated]") -> None:
            if error := call.exception():
                tell(error)

        engine.submit(request, tell).add_done_callback(tell_failure)
        has_ended = False
        try:
            while not has_ended:
                match await news.get():
                    case EngineStopped() as error:
                        raise EngineLost(str(error)) from error
                    case EngineFull() as error:
                        raise EngineOverloaded(str(error)) from error
                    case BaseException() as error:
                        raise EngineUnavailable(str(error)) from error
                    case event:
                        has_ended = event.finish_reason is not None
                        yield event
        finally:
            engine.forget(request.id)
            if not has_ended:
                engine.loop.abort(request.id)


class LiveGateway:
    """Runs requests through a real journal, on an event loop of its own, and counts the tokens that come."""

    def __init__(self, engines: LiveEngines) -> None:
        self.resubmissions = Counter("resubmissions", "", registry=CollectorRegistry())
        self._journal = Journal(engines, RetryPolicy(deadline_s=15.0), self.resubmissions)
        self._arrived = threading.Condition()
        self._num_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway")
        self._thread.start()

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def submit(self, request: GenerationRequest) -> "Future[Answer]":
        return asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def wait_tokens(self, count: int, timeout_s: float) -> None:
        """Wait until so many more tokens have come for anybody, or time is up."""
        with self._arrived:
            wanted = self._num_tokens + count
            self._arrived.wait_for(lambda: self._num_tokens >= wanted, timeout_s)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, request: GenerationRequest) -> Answer:
        answer = []
        async for event in self._journal.generate(request):
            answer.append(token_of(event))
            with self._arrived:
                self._num_tokens += 1
                self._arrived.notify_all()
        return answer


def token_of(event: TokenEvent) -> tuple[int, float]:
    assert event.token_id is not None, f"{event.request_id} ended early: {event.finish_reason} {event.error}"
    assert event.logprob is not None
    return event.token_id, event.logprob.logprob
