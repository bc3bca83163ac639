"""Tokens on their way from engines to gateways: one link per pair, one frame per engine step.

A gateway listens and an engine connects, when the gateway's first request arrives. Both sides put threads
around the blocking links: an engine must not wait for a slow gateway, nor an event loop for a socket.
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
from router.links.listener import Listener
from router.links.stream import StreamLink, connect

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
IDLE_PERIOD_S = 10.0  # how soon the death of an idle gateway is noticed


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
        self._outboxes: dict[str, SimpleQueue[list[TokenEvent] | None]] = {}

    def send(self, gateway: str, events: list[TokenEvent]) -> None:
        """Queue one step's events for the gateway at this address; never blocks. One thread may call it."""
        outbox = self._outboxes.get(gateway)
        if outbox is None:
            outbox = self._outboxes[gateway] = SimpleQueue()
            threading.Thread(target=self._run, args=(gateway, outbox), name="token-link", daemon=True).start()
        outbox.put(events)

    def close(self) -> None:
        """Close every link behind what is queued."""
        for outbox in self._outboxes.values():
            outbox.put(None)

    def _run(self, gateway: str, outbox: "SimpleQueue[list[TokenEvent] | None]") -> None:
        try:
            link = connect(Address.parse(gateway), self._secret, self._name, CONNECT_TIMEOUT_S)
            try:
                while (events := _next(outbox, link)) is not None:
                    link.send(Frame(Kind.TOKENS, meta=encode_events(events)))
            finally:
                link.close()
        except (OSError, ValueError) as error:
            logger.warning("the gateway at %s is lost, and its requests with it: %s", gateway, error)
            self._on_lost(gateway, lambda: self._forget(gateway))
            while outbox.get() is not None:  # events of the requests that it had, until `_forget`
                pass

    def _forget(self, gateway: str) -> None:
        self._outboxes.pop(gateway).put(None)


def _next(outbox: "SimpleQueue[list[TokenEvent] | None]", link: StreamLink) -> list[TokenEvent] | None:
    """Wait for the next events; look now and then whether the gateway is still there. Raises LinkLost."""
    while True:
        try:
            return outbox.get(timeout=IDLE_PERIOD_S)
        except Empty:
            link.poll()  # gateways send nothing, but an end of file


class TokenReceiver:
    """A gateway's end of the token links: routes every event to the request that waits for it."""

    def __init__(self, listener: Listener) -> None:
        """Must be made on the event loop that the waiting requests run on."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._waiting: dict[str, asyncio.Queue[TokenEvent | LinkLost]] = {}
        self._link_of: dict[str, Link] = {}  # by the request whose events come over it
        threading.Thread(target=self._accept, name="token-accept", daemon=True).start()

    @property
    def address(self) -> str:
        return str(self._listener.address)

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

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except LinkLost:
                return  # the listener was closed
            threading.Thread(target=self._read, args=(link,), name="token-link", daemon=True).start()

    def _read(self, link: Link) -> None:
        try:
            while True:
                events = decode_events(link.receive().meta)
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
        """Tell whoever waits for this engine. Its host may be gone, and Ray may take a minute to say so.

        A request of which nothing has come yet hears of it from Ray: nobody knows which engine has it.
        """
        for request_id, its_link in self._link_of.items():
            if its_link is link:
                self._waiting[request_id].put_nowait(error)
