"""Copies of KV blocks on their way between engines: each engine has a link to every other of its model.

A copy is for the day on which its engine is lost, and what serves does not wait for it: little is in flight,
and the threads here have the priority of whoever makes them, which in an engine's process is that of the
background (cluster/actors/quiet_start.py).
"""

import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from queue import SimpleQueue

from cluster.engine.blocks import DIGEST_BYTES
from cluster.engine.copies import MAX_STEP_BYTES, BlockRun, Sent, Standby
from router.links.address import Address
from router.links.base import Dtype, Frame, Kind, Link, LinkLost
from router.links.listener import Listener, serve_links
from router.links.rows import frame_of, rows_of
from router.links.stream import connect
from router.requests import choose_standby

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
RETRY_S = 5.0  # before an engine that could not be reached is tried again
MAX_QUEUED_BYTES = 2 * MAX_STEP_BYTES  # that wait for one link
MAX_RUNS = 4  # of one link, that wait for the engine at its end
_COUNT = struct.Struct("<I")


class BlockSender:
    """An engine's links to the others; implements `Standbys`.

    An engine that can't be reached is none: copies go where they arrive.
    """

    def __init__(self, secret: bytes, name: str) -> None:
        self._secret = secret
        self._name = name
        self._lock = threading.Lock()
        self._links: Mapping[str, SendingLink] = {}  # replaced, never changed: the engine's thread reads it
        self._retry_at: dict[str, float] = {}

    def follow(self, engines: Mapping[str, str]) -> None:
        """Take note of all other engines of the model: the address that each listens at, by its name."""
        with self._lock:
            now = time.monotonic()
            left = [link for name, link in self._links.items() if name not in engines]
            kept = {name: link for name, link in self._links.items() if name in engines}
            new = {
                name: SendingLink()
                for name in engines.keys() - kept.keys()
                if self._retry_at.get(name, now) <= now
            }
            self._links = kept | new
            self._retry_at = {name: at for name, at in self._retry_at.items() if name in engines}
        for link in left:
            link.close()
        for name, link in new.items():
            threading.Thread(
                target=self._run, args=(name, engines[name], link), name="block-sender", daemon=True
            ).start()

    def all(self) -> Iterable[Standby]:
        return self._open().values()

    def standby(self, answer_id: str) -> Standby | None:
        links = self._open()
        name = choose_standby(answer_id, links.keys())
        return None if name is None else links[name]

    def close(self) -> None:
        """Close every link."""
        self.follow({})

    def _run(self, name: str, address: str, link: "SendingLink") -> None:
        try:
            link.open(connect(Address.parse(address), self._secret, self._name, CONNECT_TIMEOUT_S))
            link.run()
        except (OSError, ValueError) as error:
            logger.info("engine %s takes no copies: %s", name, error)
        finally:
            link.close()
            with self._lock:
                if self._links.get(name) is link:
                    self._links = {other: its for other, its in self._links.items() if its is not link}
                    self._retry_at[name] = time.monotonic() + RETRY_S

    def _open(self) -> dict[str, "SendingLink"]:
        return {name: link for name, link in self._links.items() if link.is_open}


class SendingLink:
    """A link to one other engine, once it is open; implements `Standby`.

    `run` has a thread of its own, the engine's thread calls what `Standby` has, and any thread `close`.
    """

    def __init__(self) -> None:
        self._link: Link | None = None
        self._outbox: SimpleQueue[tuple[int, BlockRun] | None] = SimpleQueue()
        self._is_closed = False
        self._sequence = 0
        self._notes: dict[int, Sent] = {}  # of what has no answer yet, by sequence
        self._put_bytes = 0
        self._sent_bytes = 0

    @property
    def is_open(self) -> bool:
        return self._link is not None and not self._is_closed

    @property
    def has_room(self) -> bool:
        return self.is_open and self._put_bytes - self._sent_bytes < MAX_QUEUED_BYTES

    def send(self, run: BlockRun, note: Sent) -> None:
        self._sequence = (self._sequence + 1) % (1 << 32)
        self._notes[self._sequence] = note
        self._put_bytes += run.num_bytes
        self._outbox.put((self._sequence, run))

    def heard(self) -> list[tuple[Sent, int]]:
        heard = []
        try:
            while self._link and self.is_open and (frame := self._link.poll()):
                number = _count_of(frame)
                if note := self._notes.pop(frame.sequence, None):
                    heard.append((note, number))
        except (LinkLost, ValueError) as error:
            logger.info("another engine takes no more copies: %s", error)
            self.close()
        return heard

    def open(self, link: Link) -> None:
        """Let it be used from now on."""
        self._link = link

    def run(self) -> None:
        """Send what should be sent, until this is closed. Raises LinkLost."""
        assert self._link
        while (item := self._outbox.get()) is not None:
            sequence, run = item
            meta = b"".join(run.digests)
            if run.rows_BN is None:
                self._link.send(Frame(Kind.COPY, sequence, meta=meta))
            else:
                self._link.send(frame_of(Kind.COPY, run.rows_BN, sequence=sequence, meta=meta))
            self._sent_bytes += run.num_bytes

    def close(self) -> None:
        """Let the thread end, also one that waits for an engine that takes nothing."""
        self._is_closed = True
        self._outbox.put(None)
        if self._link:
            self._link.close()


class BlockReceiver:
    """The end of these links that an engine listens at."""

    def __init__(
        self, listener: Listener, row_size: int, adopt: Callable[[BlockRun, Callable[[int], None]], None]
    ) -> None:
        """`row_size` is how many numbers a block has. `adopt` is `EngineLoop.adopt`."""
        self._listener = listener
        self._row_size = row_size
        self._adopt = adopt
        serve_links(listener, self._read, "block-receiver")

    @property
    def address(self) -> str:
        return str(self._listener.address)

    def close(self) -> None:
        """Take no more links; those that are there end with their senders."""
        self._listener.close()

    def _read(self, link: Link) -> None:
        places = threading.Semaphore(MAX_RUNS)

        def answer(number: int, sequence: int) -> None:
            try:
                if not link.post(Frame(Kind.HELD, sequence, meta=_COUNT.pack(number))):
                    link.close()  # answers are small: who does not read them is no engine of ours
            except LinkLost:
                pass  # its thread ends
            places.release()

        try:
            while True:
                frame = link.receive()
                run = _run_of(frame, self._row_size)
                places.acquire()
                self._adopt(run, partial(answer, sequence=frame.sequence))
        except (LinkLost, ValueError) as error:
            logger.info("no more copies come from %s: %s", link.peer, error)
        finally:
            link.close()


def _run_of(frame: Frame, row_size: int) -> BlockRun:
    """Take a run out of the link's buffer. Raises ValueError for any other frame."""
    meta = bytes(frame.meta)
    digests = tuple(meta[start : start + DIGEST_BYTES] for start in range(0, len(meta), DIGEST_BYTES))
    is_run = frame.kind == Kind.COPY and frame.dtype in (Dtype.NONE, Dtype.FLOAT32)
    if not is_run or not digests or len(digests[-1]) != DIGEST_BYTES or frame.num_rows > len(digests):
        raise ValueError(
            f"blocks are rows of FLOAT32, and digests of {DIGEST_BYTES} bytes, at least as many; this is "
            f"{frame.kind.name} with {frame.num_rows} rows of {frame.dtype.name} and {len(meta)} bytes"
        )
    return BlockRun(digests, rows_of(frame, row_size).clone() if frame.num_rows else None)


def _count_of(frame: Frame) -> int:
    """Return what an answer says. Raises ValueError for any other frame."""
    meta = memoryview(frame.meta)
    if frame.kind != Kind.HELD or meta.nbytes != _COUNT.size:
        raise ValueError(f"{frame.kind.name} with {meta.nbytes} bytes is no answer to a copy")
    (number,) = _COUNT.unpack(meta)
    return int(number)
