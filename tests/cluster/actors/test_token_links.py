import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

from cluster.actors.token_links import SILENCE_S, TokenReceiver, TokenSender
from cluster.engine.request import Logprob, TokenEvent
from cluster.engine.token_wire import decode_events, encode_events
from router.links.base import Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.stream import connect
from tests.stepped_back import is_in_foreground, made_stepped_back

SECRET = b"one cluster's secret"
DEADLINE_S = 10.0

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(SECRET, "gateway", tmp_path, "127.0.0.1")
    yield listener
    listener.close()


@pytest.fixture
def lost() -> SimpleQueue[str]:
    """The gateways that senders have lost, in order."""
    return SimpleQueue()


@pytest.fixture
def engine(lost: SimpleQueue[str]):
    """Return a maker of senders, by the engine's name; they are closed in the end."""
    senders = []

    def make(name: str = "engine 0", secret: bytes = SECRET) -> TokenSender:
        senders.append(TokenSender(secret, name, lambda gateway, then: lost.put(gateway)))
        return senders[-1]

    yield make
    for sender in senders:
        sender.close()


@contextmanager
def opened(receiver: TokenReceiver, *request_ids: str) -> Iterator[list[asyncio.Queue[TokenEvent]]]:
    yield [receiver.open(id) for id in request_ids]
    for id in request_ids:
        receiver.close(id)


async def take(queue: asyncio.Queue[TokenEvent], count: int) -> list[TokenEvent]:
    async with asyncio.timeout(DEADLINE_S):
        return [await queue.get() for _ in range(count)]


def test_each_request_gets_its_events_in_order_whatever_else_is_sent(listener, engine):
    async def run() -> None:
        receiver = TokenReceiver(listener)
        first, second = engine("engine 0"), engine("engine 1")
        with opened(receiver, "a", "b", "c") as queues:
            for step in range(200):
                first.send(receiver.address, [TokenEvent("a", step), TokenEvent("b", step + 1000)])
                second.send(receiver.address, [TokenEvent("c", step + 2000)])
            for queue, start in zip(queues, (0, 1000, 2000), strict=True):
                events = await take(queue, 200)
                assert [event.token_id for event in events] == list(range(start, start + 200))

    asyncio.run(run())


def test_all_that_an_event_says_arrives(listener, engine):
    sent = [
        TokenEvent("a", None),
        TokenEvent("a", 7, None, Logprob(7, -0.5), (Logprob(7, -0.5), Logprob(8, float("-inf"))), 32),
        TokenEvent("a", None, "error", error="expert 3 has no replica: \N{WIND BLOWING FACE}"),
    ]

    async def run() -> None:
        receiver = TokenReceiver(listener)
        with opened(receiver, "a") as (queue,):
            engine().send(receiver.address, sent)
            assert await take(queue, 3) == sent

    asyncio.run(run())


def test_an_engine_that_has_nothing_to_say_gives_a_sign_of_life(listener, engine):
    engine().send(str(listener.address), [TokenEvent("a", 1)])
    link = listener.accept(DEADLINE_S)
    link.receive(DEADLINE_S)
    for _ in range(2):
        assert decode_events(link.receive(SILENCE_S).meta) == []


def test_an_engine_that_falls_silent_is_lost_and_avoided(listener):
    async def run() -> None:
        receiver = TokenReceiver(listener, silence_s=0.2)
        stopped = connect(listener.address, SECRET, "model/stopped")
        with opened(receiver, "a", "elsewhere") as (queue, other):
            assert receiver.avoided == frozenset()
            stopped.send(Frame(Kind.TOKENS, meta=encode_events([TokenEvent("a", None)])))
            (receipt,) = await take(queue, 1)
            assert receipt.is_receipt
            (loss,) = await take(queue, 1)
            assert isinstance(loss, LinkLost)
            assert "took too long" in str(loss)
            assert receiver.avoided == {"model/stopped"}
            assert other.empty()
        # And so the engine learns, once it goes on, that nobody waits for its requests.
        with pytest.raises(LinkLost, match="the peer closed it"):
            await asyncio.to_thread(stopped.receive, DEADLINE_S)

    asyncio.run(run())


def test_events_of_a_request_that_was_closed_are_dropped(listener, engine):
    async def run() -> None:
        receiver = TokenReceiver(listener)
        sender = engine()
        with opened(receiver, "b") as (queue,):
            with opened(receiver, "a") as (closed,):
                sender.send(receiver.address, [TokenEvent("a", 1), TokenEvent("b", 1)])
                await take(queue, 1)
            sender.send(receiver.address, [TokenEvent("a", 2), TokenEvent("nobody", 2), TokenEvent("b", 2)])
            assert await take(queue, 1) == [TokenEvent("b", 2)]
            assert closed.get_nowait() == TokenEvent("a", 1)
            assert closed.empty()

    asyncio.run(run())


def test_what_was_queued_is_sent_before_a_sender_closes(listener, engine):
    async def run() -> None:
        receiver = TokenReceiver(listener)
        sender = engine()
        with opened(receiver, "a") as (queue,):
            for step in range(50):
                sender.send(receiver.address, [TokenEvent("a", step)])
            sender.close()
            assert len(await take(queue, 50)) == 50

    asyncio.run(run())


@pytest.mark.parametrize("meta", [b"\xff", b'{"ab": 1}', b"[" * 10_000])
def test_a_link_that_carries_nonsense_is_closed_and_no_other(listener, engine, meta):
    async def run() -> None:
        receiver = TokenReceiver(listener)
        strange = connect(listener.address, SECRET, "strange")
        with opened(receiver, "a") as (queue,):
            strange.send(Frame(Kind.TOKENS, meta=meta))
            with pytest.raises(LinkLost, match="the peer closed it"):
                await asyncio.to_thread(strange.receive, DEADLINE_S)
            engine().send(receiver.address, [TokenEvent("a", 1)])
            assert await take(queue, 1) == [TokenEvent("a", 1)]

    asyncio.run(run())


def test_a_gateway_that_is_not_there_is_lost(listener, engine, lost):
    gateway = str(listener.address)
    listener.close()
    engine().send(gateway, [TokenEvent("a", 1)])
    assert lost.get(timeout=DEADLINE_S) == gateway


def test_an_address_that_is_none_is_lost(engine, lost):
    engine().send("no address", [TokenEvent("a", 1)])
    assert lost.get(timeout=DEADLINE_S) == "no address"


def test_a_gateway_of_another_cluster_is_lost(listener, engine, lost):
    engine(secret=b"another cluster's").send(str(listener.address), [TokenEvent("a", 1)])
    assert lost.get(timeout=DEADLINE_S) == str(listener.address)


def test_a_gateway_that_dies_is_lost_once_and_late_events_for_it_are_dropped(listener, engine, lost):
    gateway, sender = str(listener.address), engine()
    sender.send(gateway, [TokenEvent("a", 1)])
    link = listener.accept(DEADLINE_S)
    link.receive(DEADLINE_S)
    link.close()
    for step in range(100):
        sender.send(gateway, [TokenEvent("a", step)])
    assert lost.get(timeout=DEADLINE_S) == gateway
    sender.send(gateway, [TokenEvent("a", 101)])
    with pytest.raises(TimeoutError):  # nobody knocks again
        listener.accept(0.1)
    with pytest.raises(Empty):
        lost.get_nowait()


def test_losing_one_gateway_does_not_disturb_another(listener, engine, lost):
    async def run() -> None:
        receiver = TokenReceiver(listener)
        sender = engine()
        with opened(receiver, "a") as (queue,):
            sender.send("nowhere", [TokenEvent("b", 1)])
            assert await asyncio.to_thread(lost.get, True, DEADLINE_S) == "nowhere"
            sender.send(receiver.address, [TokenEvent("a", 1)])
            assert await take(queue, 1) == [TokenEvent("a", 1)]

    asyncio.run(run())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a weight")
def test_tokens_go_out_in_the_foreground_whoever_sends_first(listener, engine):
    made_stepped_back(lambda: engine().send(str(listener.address), [TokenEvent("a", 1)]))
    listener.accept(DEADLINE_S)
    assert is_in_foreground("token-link")


def test_a_lost_gateway_gets_a_new_link_once_its_requests_have_ended(listener):
    ended: SimpleQueue = SimpleQueue()
    gateway, sender = str(listener.address), TokenSender(SECRET, "engine", lambda _, then: ended.put(then))
    sender.send(gateway, [TokenEvent("a", 1)])
    listener.accept(DEADLINE_S).close()
    for step in range(100):
        sender.send(gateway, [TokenEvent("a", step)])
    ended.get(timeout=DEADLINE_S)()
    sender.send(gateway, [TokenEvent("b", 1)])
    link = listener.accept(DEADLINE_S)
    assert b'"b"' in bytes(link.receive(DEADLINE_S).meta)  # and nothing of "a", whose answer has a hole
    sender.close()
