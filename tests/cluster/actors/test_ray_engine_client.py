"""One request between a gateway and an engine: a call as Serve makes it, and a real link for tokens."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from cluster.actors.ray_engine_client import RayEngineClient
from cluster.actors.token_links import TokenReceiver, TokenSender
from cluster.engine.request import EngineFull, EngineStopped, Generated, GenerationRequest, TokenEvent
from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from router.links.base import LinkLost
from router.links.listener import Listener
from shards.sampling_params import SamplingParams

HTTP_REQUEST = ContextVar[str]("HTTP_REQUEST", default="none")  # Serve has one like this
SECRET = b"one cluster's secret"
REQUEST = GenerationRequest("a", (1, 2, 3), 8, SamplingParams())
ENDED = Generated("length", 2)
FIRST, LAST = TokenEvent("a", 7), TokenEvent("a", 8, "length")

pytestmark = pytest.mark.timeout(60)


class Call:
    """What a handle's `remote` returns: awaitable, and to be cancelled."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self.cancelled = False

    def __await__(self):
        return self.ended.__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A Serve handle with one method, `generate`, whose calls the test ends."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.avoided: frozenset[str] = frozenset()  # of the last call
        self.http_request = ""  # that the last call seemed to be of
        self.generate = self

    def remote(self, request: GenerationRequest, gateway: str, avoided: frozenset[str]) -> Call:
        assert request.prompt == REQUEST.prompt
        self.avoided = avoided
        self.http_request = HTTP_REQUEST.get()
        self.calls.append(Call())
        return self.calls[-1]


@asynccontextmanager
async def running(
    directory: Path,
) -> AsyncIterator[tuple[Handle, RayEngineClient, TokenSender, TokenReceiver]]:
    listener = Listener(SECRET, "gateway", directory, "127.0.0.1")
    sender = TokenSender(SECRET, "engine", lambda gateway, then: None)
    receiver, handle = TokenReceiver(listener), Handle()
    try:
        client = RayEngineClient(handle, receiver, most_open=2, last_frame_timeout_s=0.2)
        yield handle, client, sender, receiver
    finally:
        sender.close()
        listener.close()


async def begin(
    client: RayEngineClient,
) -> tuple[AsyncGenerator[TokenEvent, None], "asyncio.Future[TokenEvent]"]:
    """Let the client call the engine; return its events, and the first of them, which is still to come."""
    events = client.generate(REQUEST)
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    return events, first


def test_serve_sees_no_relation_between_the_calls_of_one_http_request(tmp_path: Path) -> None:
    """Else it routes one of them, and forgets the others."""

    async def run() -> None:
        async with running(tmp_path) as (handle, client, sender, receiver):
            HTTP_REQUEST.set("with three prompts")
            _, first = await begin(client)
            assert handle.http_request == "none"
            sender.send(receiver.address, [FIRST])
            assert await first == FIRST
            assert HTTP_REQUEST.get() == "with three prompts"

    asyncio.run(run())


def test_events_come_in_order_until_the_last(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, sender, receiver):
            events, first = await begin(client)
            sender.send(receiver.address, [FIRST])
            assert await first == FIRST
            sender.send(receiver.address, [LAST])
            assert [event async for event in events] == [LAST]
            assert not handle.calls[0].cancelled, "the call was about to end by itself"

    asyncio.run(run())


def test_a_call_that_ends_before_the_last_frame_waits_for_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, sender, receiver):
            events, first = await begin(client)
            handle.calls[0].ended.set_result(ENDED)
            sender.send(receiver.address, [FIRST, LAST])
            assert [await first] + [event async for event in events] == [FIRST, LAST]

    asyncio.run(run())


def test_an_end_whose_last_frame_never_comes_is_a_loss(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, _, _):
            _, first = await begin(client)
            handle.calls[0].ended.set_result(ENDED)
            with pytest.raises(EngineLost):
                await first

    asyncio.run(run())


def test_an_engine_whose_link_ends_is_lost_before_ray_says_so(tmp_path: Path) -> None:
    """Its host may be cut off: then the call neither returns nor fails for a minute."""

    async def run() -> None:
        async with running(tmp_path) as (handle, client, sender, receiver):
            events, first = await begin(client)
            sender.send(receiver.address, [FIRST])
            assert await first == FIRST
            sender.close()
            with pytest.raises(EngineLost, match="out of reach"):
                await anext(events)
            assert handle.calls[0].cancelled, "it may still be at work, for nobody"
            await begin(client)
            assert handle.avoided == {"engine"}, "the next call must not go where this one was lost"

    asyncio.run(run())


def test_the_end_of_one_engines_link_is_no_news_for_requests_of_another(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (_, client, sender, receiver):
            other = TokenSender(SECRET, "other engine", lambda gateway, then: None)
            queue = receiver.open("b")
            other.send(receiver.address, [TokenEvent("b", 7)])
            await queue.get()
            events, first = await begin(client)
            sender.send(receiver.address, [FIRST])
            await first
            other.close()
            assert isinstance(await queue.get(), LinkLost)
            sender.send(receiver.address, [LAST])
            assert [event async for event in events] == [LAST]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (ActorDiedError(), EngineLost),
        (NodeDiedError("the host is gone"), EngineLost),
        (OutOfMemoryError("the kernel took it"), EngineLost),
        (AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()), EngineLost),
        (RequestCancelledError("a"), EngineLost),
        (RuntimeError("Unexpected error (StatusCode.UNKNOWN): ."), EngineLost),  # without first metadata
        (asyncio.CancelledError(), EngineLost),  # by the engine, as its replica ends
        (RayTaskError("generate", "...", EngineFull("full")).as_instanceof_cause(), EngineOverloaded),
        (EngineStopped("the engine has stopped"), EngineLost),
        (EngineFull("full"), EngineOverloaded),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), EngineOverloaded),
        (ValueError("the prompt does not fit"), EngineUnavailable),
    ],
)
def test_what_ends_the_call_gets_its_name(
    tmp_path: Path, error: BaseException, wanted: type[Exception]
) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, _, _):
            _, first = await begin(client)
            handle.calls[0].ended.set_exception(error)
            with pytest.raises(wanted):
                await first

    asyncio.run(run())


def test_a_request_that_the_engine_gave_up_is_lost_whatever_is_still_on_its_way(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, _, _):
            _, first = await begin(client)
            handle.calls[0].ended.set_result(Generated("abort", 1))
            with pytest.raises(EngineLost, match="gave the request up"):
                await first

    asyncio.run(run())


def test_who_leaves_early_cancels_the_call(tmp_path: Path) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, sender, receiver):
            async with aclosing(client.generate(REQUEST)) as events:
                first = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0)
                sender.send(receiver.address, [FIRST])
                await first
            assert handle.calls[0].cancelled
            again = receiver.open("a")  # the id is free, and late events go nowhere
            assert again.empty()

    asyncio.run(run())


def test_one_request_too_many_is_refused_though_no_engine_was_asked_and_a_resumed_one_is_not(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with running(tmp_path) as (handle, client, _, _):
            requests = [replace(REQUEST, id=str(number)) for number in range(4)]
            running_ = [client.generate(request) for request in requests[:2]]
            waiting = [asyncio.ensure_future(anext(events)) for events in running_]
            await asyncio.sleep(0)
            with pytest.raises(EngineOverloaded, match="already holds 2 requests"):
                await anext(client.generate(requests[2]))
            assert len(handle.calls) == 2
            resumed = client.generate(replace(requests[2], is_resumed=True))
            waiting.append(asyncio.ensure_future(anext(resumed)))
            await asyncio.sleep(0)
            assert len(handle.calls) == 3
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            last = asyncio.ensure_future(anext(client.generate(requests[3])))
            await asyncio.sleep(0)
            assert len(handle.calls) == 4, "those who have left count no more"
            last.cancel()

    asyncio.run(run())
