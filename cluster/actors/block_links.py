"""Copies of KV blocks on their way between engines: each engine has a link to every other of its model.

Both ends run in the background (shards/background.py), with little in flight: a copy is for the day on which
its engine is lost, and what serves must not wait for it.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from queue import Queue

from cluster.engine.blocks import DIGEST_BYTES
from cluster.engine.copies import BlockCopy
from router.links.address import Address
from router.links.base import Dtype, Frame, Kind, Link, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of, rows_of
from router.links.stream import connect
from router.requests import choose_standby

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
MAX_QUEUED = 32  # copies that wait for one link, or behind one for the engine
MAX_REMEMBERED = 1 << 16  # digests of what was sent to one engine


class BlockSender:
    """An engine's links to the others; implements `Standbys`.

    An engine that can't be reached is none: copies go where they arrive. `follow` gives it another chance.
    """

    def __init__(self, secret: bytes, name: str) -> None:
        self._secret = secret
        self._name = name
        self._lock = threading.Lock()
        self._outboxes: dict[str, _Outbox] = {}

    def follow(self, engines: Mapping[str, str]) -> None:
        """Take note of all other engines of the model: the address that each listens at, by its name."""
        with self._lock:
            for name in self._outboxes.keys() - engines.keys():
                self._outboxes.pop(name).close()
            for name in engines.keys() - self._outboxes.keys():
                outbox = self._outboxes[name] = _Outbox()
                threading.Thread(
                    target=self._run, args=(name, engines[name], outbox), name="block-sender", daemon=True
                ).start()

    def standby(self, answer_id: str) -> str | None:
        with self._lock:
            reachable = [name for name, outbox in self._outboxes.items() if outbox.link]
        return choose_standby(answer_id, reachable)

    def room(self, standby: str) -> int:
        outbox = self._outboxes.get(standby)
        return MAX_QUEUED - outbox.copies.qsize() if outbox else 0

    def has(self, standby: str, digest: bytes) -> bool:
        outbox = self._outboxes.get(standby)
        return outbox is not None and digest in outbox.sent

    def send(self, standby: str, copy: BlockCopy) -> None:
        outbox = self._outboxes.get(standby)
        if outbox:
            outbox.put(copy)

    def close(self) -> None:
        """Close every link."""
        self.follow({})

    def _run(self, name: str, address: str, outbox: "_Outbox") -> None:
        try:
            link = connect(Address.parse(address), self._secret, self._name, CONNECT_TIMEOUT_S)
            try:
                outbox.link = link
                while (copy := outbox.copies.get()) is not None:
                    link.send(frame_of(Kind.COPY, copy.row[None], meta=b"".join(copy.digests)))
            finally:
                link.close()
        except (OSError, ValueError) as error:
            logger.info("engine %s takes no copies: %s", name, error)
        finally:
            with self._lock:
                if self._outboxes.get(name) is outbox:
                    del self._outboxes[name]


class _Outbox:
    """Copies for one engine. `send` and its likes are called by one thread, the engine's."""

    def __init__(self) -> None:
        self.link: Link | None = None  # once there is one
        self.copies: Queue[BlockCopy | None] = Queue()
        self.sent: OrderedDict[bytes, None] = OrderedDict()

    def put(self, copy: BlockCopy) -> None:
        self.sent[copy.digests[-1]] = None
        if len(self.sent) > MAX_REMEMBERED:
            self.sent.popitem(last=False)
        self.copies.put(copy)

    def close(self) -> None:
        """Let the thread end, also one that waits for an engine that takes nothing."""
        self.copies.put(None)
        if self.link:
            self.link.close()


class BlockReceiver:
    """The end of these links that an engine listens at."""

    def __init__(
        self, listener: Listener, row_size: int, adopt: Callable[[BlockCopy, Callable[[], None]], None]
    ) -> None:
        """`row_size` is that of a `BlockCopy`. `adopt(copy, then)` must not block, and call `then` later."""
        self._listener = listener
        self._row_size = row_size
        self._adopt = adopt
        threading.Thread(target=self._accept, name="block-accept", daemon=True).start()

    @property
    def address(self) -> str:
        return str(self._listener.address)

    def close(self) -> None:
        """Take no more links; those that are there end with their senders."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except LinkLost:
                return  # the listener was closed
            threading.Thread(target=self._read, args=(link,), name="block-receiver", daemon=True).start()

    def _read(self, link: Link) -> None:
        places = threading.Semaphore(MAX_QUEUED)
        try:
            while True:
                copy = _copy_of(link.receive(), self._row_size)
                places.acquire()
                self._adopt(copy, places.release)
        except (LinkLost, ValueError) as error:
            logger.info("no more copies come from %s: %s", link.peer, error)
            link.close()


def _copy_of(frame: Frame, row_size: int) -> BlockCopy:
    """Take a copy out of the link's buffer. Raises ValueError for any other frame."""
    digests = bytes(frame.meta)
    is_copy = frame.kind == Kind.COPY and frame.dtype == Dtype.FLOAT32 and frame.num_rows == 1
    if not is_copy or not digests or len(digests) % DIGEST_BYTES:
        raise ValueError(
            f"a copy of a block is one row of FLOAT32 and digests of {DIGEST_BYTES} bytes each; this is "
            f"{frame.kind.name} with {frame.num_rows} rows of {frame.dtype.name} and {len(digests)} bytes"
        )
    row_N = rows_of(frame, row_size)[0].clone()
    starts = range(0, len(digests), DIGEST_BYTES)
    return BlockCopy(tuple(digests[start : start + DIGEST_BYTES] for start in starts), row_N)
