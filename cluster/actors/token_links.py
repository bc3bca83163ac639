"""Tokens on their way from engines to gateways: one link per pair, one frame per engine step.

A gateway listens and an engine connects, when the gateway's first request arrives. Both sides put threads
around the blocking links: an engine must not wait for a slow gateway, nor an event loop for a socket.

A link is never silent for long. An engine that has nothing to say, because a step takes its time, sends
frames without events; so a gateway learns within seconds of one that is stopped, or whose host is gone.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from cluster.engine.request import TokenEvent
from cluster.engine.token_wire import decode_events, encode_events
from router.links.address import Address
from router.links.base import Frame, Kind, Link, LinkLost
from router.links.listener import Listener, serve_links
from router.links.stream import connect
from shards.background import in_foreground

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
SIGN_OF_LIFE_PERIOD_S = 0.5
SILENCE_S = 3.0  # after which an engine is lost
# For so long, requests go to other engines than one whose link was lost. Serve counts requests, and finds a
# lost engine idle, until it has sent none there for 10 s; then it asks, and gets no answer.
AVOIDED_S = 15.0


class TokenSender:
    """An engine's links to its gateways, opened when first needed, each with a thread that sends."""

    def __init__(self, secret: bytes, name: str, on_lost: Callable[[str, Callable[[], None]], None]) -> None:
        """`on_lost(gateway, then)` is called, from the link's thread, when a gateway can't be reached.

        It must end that gateway's requests, and then call `then` from the thread that calls `send`: no token
        of theirs may come behind it, as it would go over a new link, and their answers would have a hole.
        """
        self._secret = secret
        self._name = name
        self._on_lost = on_lost
        self._lock = threading.Lock()  # so that nothing is put into an outbox behind its end
        self._outboxes: dict[str, SimpleQueue[list[TokenEvent] | None]] = {}

    def send(self, gateway: str, events: list[TokenEvent]) -> None:
        """Queue events for the gateway at this address; never blocks.

        Any thread may send receipts; one and the same sends all else.
        """
        with self._lock:
            outbox = self._outboxes.get(gateway)
            if outbox is None:
                outbox = self._outboxes[gateway] = SimpleQueue()
                link = threading.Thread(
                    target=self._run, args=(gateway, outbox), name="token-link", daemon=True
                )
                in_foreground(link.start)
            outbox.put(events)

    def close(self) -> None:
        """Close every link behind what is queued."""
        with self._lock:
            for outbox in self._outboxes.values():
                outbox.put(None)

    def _run(self, gateway: str, outbox: "SimpleQueue[list[TokenEvent] | None]") -> None:
        try:
            link = connect(Address.parse(gateway), self._secret, self._name, CONNECT_TIMEOUT_S)
            try:
                while (events := _next(outbox)) is not None:
                    link.send(Frame(Kind.TOKENS, meta=encode_events(events)))
            finally:
                link.close()
        except (OSError, ValueError) as error:
            logger.warning("the gateway at %s is lost, and its requests with it: %s", gateway, error)
            self._on_lost(gateway, lambda: self._forget(gateway))
            while outbox.get() is not None:  # events of the requests that it had, until `_forget`
                pass

    def _forget(self, gateway: str) -> None:
        with self._lock:
            self._outboxes.pop(gateway).put(None)


def _next(outbox: "SimpleQueue[list[TokenEvent] | None]") -> list[TokenEvent] | None:
    """Wait for the next events, but not for long: none are a sign of life."""
    try:
        return outbox.get(timeout=SIGN_OF_LIFE_PERIOD_S)
    except Empty:
        return []


class TokenReceiver:
    """A gateway's end of the token links: routes every event to the request that waits for it."""

    def __init__(self, listener: Listener, silence_s: float = SILENCE_S) -> None:
        """Must be made on the event loop that the waiting requests run on."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._silence_s = silence_s
        self._lost_at: dict[str, float] = {}  # by the engine's name, in the loop's seconds
        self._waiting: dict[str, asyncio.Queue[TokenEvent | LinkLost]] = {}
        self._link_of: dict[str, Link] = {}  # by the request whose events come over it
        serve_links(listener, self._read, "token-link")

    @property
    def address(self) -> str:
        return str(self._listener.address)

    @property
    def avoided(self) -> frozenset[str]:
        """The engines, by name, whose links were lost not long ago."""
        since = self._loop.time() - AVOIDED_S
        self._lost_at = {name: at for name, at in self._lost_at.items() if at > since}
        return frozenset(self._lost_at)

    def open(self, request_id: str) -> "asyncio.Queue[TokenEvent | LinkLost]":
        """Return the queue into which this request's events will come, until `close`.

        A LinkLost in it says that no more will come: the engine that had sent some is gone.
        """
        queue: asyncio.Queue[TokenEvent | LinkLost] = asyncio.Queue()
        self._waiting[request_id] = queue
        return queue

    def close(self, request_id: str) -> None:
        """Let go of a request; events that still come for it are dropped."""
        del self._waiting[request_id]
        self._link_of.pop(request_id, None)

    def _read(self, link: Link) -> None:
        try:
            while True:
                events = decode_events(link.receive(self._silence_s).meta)
                self._loop.call_soon_threadsafe(self._route, events, link)
        except (LinkLost, ValueError) as error:
            logger.info("the token link from %s ended: %s", link.peer, error)
            link.close()
            self._loop.call_soon_threadsafe(self._lose, link, LinkLost(str(error)))

    def _route(self, events: list[TokenEvent], link: Link) -> None:
        for event in events:
            queue = self._waiting.get(event.request_id)
            if queue is not None:
                self._link_of[event.request_id] = link
                queue.put_nowait(event)

    def _lose(self, link: Link, error: LinkLost) -> None:
        """Tell whoever waits for this engine. It may be stopped, and Ray takes a minute to miss a host.

        A request of which nothing has come yet, not even a receipt, is not told: nobody knows who has it.
        """
        self._lost_at[link.peer] = self._loop.time()
        for request_id, its_link in self._link_of.items():
            if its_link is link:
                self._waiting[request_id].put_nowait(error)
