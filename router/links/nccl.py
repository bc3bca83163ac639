"""A link whose rows go from GPU to GPU, by NCCL, while all else goes over a socket."""

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue

from router.communicator import Communicator, CommunicatorLost
from router.device import Device, Event
from router.links.base import DeviceRows, Dtype, Frame, Kind, LinkLost
from router.links.stream import StreamLink
from router.links.wire import HEADER_BYTES, MAX_FRAME_BYTES, decode_header, encode_header

_OPENING = struct.Struct("<I128s")  # version of NCCL, and the unique id of the sender's outgoing communicator
_SENDER, _RECEIVER = 0, 1  # the ranks of a communicator
_HUNG_UP = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL
_NO_DEVICE_ROWS = encode_header(Frame(Kind.OPEN), 0)


class NcclLink:
    """A socket, and one two-rank communicator for each direction; implements `Link`.

    On the socket, the meta of every frame starts with a header of its own, which says what comes by NCCL. The
    sender puts the rows on its device's stream once that has left, the receiver when it has read it: nobody
    receives what nobody sends. In one communicator, operations run in the order of the calls, so if each side
    sent before it received, both would wait for ever; with one per direction, the order is the sender's, and
    the receiver follows it. Host rows stay on the socket.

    No calls are grouped: NCCL promises nothing when one side groups what the other does not
    (github.com/NVIDIA/nccl/issues/1279), and a receiver does not know what follows the frame that it reads.

    The end of the socket is the end of both communicators: NCCL itself does not notice that a peer has died.
    What is on its way when a link is closed may be lost. One thread may send while another receives.
    """

    def __init__(
        self,
        stream: StreamLink,
        device: Device,
        *,
        open_timeout_s: float = 30.0,
        timeout_s: float = 30.0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """Take `stream` over and open both communicators with the peer, which must do the same at this time.

        Rows that are not sent, or do not arrive, within `timeout_s` seconds lose the link. Blocks for
        `open_timeout_s` seconds at most for each communicator; raises LinkLost.
        """
        self._stream = stream
        self._device = device
        self._max_frame_bytes = max_frame_bytes
        self._unsent: deque[Frame] = deque()  # their rows leave when the socket has taken what precedes them
        self._arriving: Frame | None = None
        self._receiving: SimpleQueue[Event | None] = SimpleQueue()
        self._buffer = device.empty(1)  # grows to the largest frame seen
        self._communicators: list[Communicator] = []
        # A byte in it makes `fileno` readable: rows have arrived, or a communicator is lost.
        self._bell, self._bell_end = socket.socketpair()
        self._bell_end.setblocking(False)
        self._epoll = select.epoll()
        for source in (stream, self._bell_end):
            self._epoll.register(source, select.EPOLLIN)
        with self._closing_on_loss():
            self._open(open_timeout_s, timeout_s)
            threading.Thread(target=self._ring_for_rows, name=f"rows of {self.peer}", daemon=True).start()

    @property
    def peer(self) -> str:
        return self._stream.peer

    def fileno(self) -> int:
        return -1 if self._epoll.closed else self._epoll.fileno()

    def close(self) -> None:
        self._stream.close()
        for communicator in self._communicators:
            communicator.close()
        self._receiving.put(None)
        self._epoll.close()
        self._bell.close()
        self._bell_end.close()

    def send(self, frame: Frame) -> None:
        """Send one frame; block while the socket's buffers are full, not for device rows. Raises LinkLost."""
        with self._closing_on_loss():
            self._stream.send(_on_socket(frame))
            self._unsent.append(frame)
            self._flush()

    def post(self, frame: Frame) -> bool:
        with self._closing_on_loss():
            self._stream.post(_on_socket(frame))
            self._unsent.append(frame)
            return self._flush()

    def flush(self) -> bool:
        with self._closing_on_loss():
            return self._flush()

    def receive(self, timeout_s: float | None = None) -> Frame:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._closing_on_loss():
            while (frame := self.poll()) is None:
                self._wait(None if deadline is None else deadline - time.monotonic())
            return frame

    def poll(self) -> Frame | None:
        with self._closing_on_loss():
            if self._arriving is None and (outer := self._stream.poll()) is not None:
                self._begin(outer)
            frame = self._arrived()
            for communicator in self._communicators:
                communicator.check()  # last: the bell rings for a loss, too
            return frame

    def _open(self, open_timeout_s: float, timeout_s: float) -> None:
        version, ours = self._device.nccl.get_version(), self._device.nccl.get_unique_id()
        self._stream.send(Frame(Kind.OPEN, meta=_OPENING.pack(version, ours)))
        answer = self._stream.receive(open_timeout_s)
        meta = bytes(answer.meta)
        if answer.kind != Kind.OPEN or len(meta) != _OPENING.size:
            raise LinkLost(f"{self.peer!r} does not open NCCL: it answers with a frame {answer.kind.name}")
        their_version, theirs = _OPENING.unpack(meta)
        if their_version != version:
            raise LinkLost(
                f"{self.peer!r} has NCCL {their_version}, we have {version}; install the same on both"
            )

        for unique_id in sorted((ours, theirs)):  # both sides in the same order, for each of them blocks
            rank = _SENDER if unique_id == ours else _RECEIVER
            self._communicators.append(
                Communicator(
                    self._device,
                    unique_id,
                    rank,
                    2,
                    self._say_hello if rank == _SENDER else self._hear_hello,
                    open_timeout_s=open_timeout_s,
                    timeout_s=timeout_s,
                    on_lost=self._ring,
                    is_wanted=lambda: not self._has_hung_up(),
                )
            )
        self._outgoing, self._incoming = sorted(self._communicators, key=lambda each: each.rank)

    def _say_hello(self, communicator: Communicator) -> None:
        communicator.send(self._device.empty(1), Dtype.UINT8, _RECEIVER)

    def _hear_hello(self, communicator: Communicator) -> None:
        communicator.receive(self._device.empty(1), Dtype.UINT8, _SENDER)

    def _flush(self) -> bool:
        self._outgoing.is_idle()  # lets go of rows that have left
        if not self._stream.flush():
            return False
        while self._unsent:
            frame = self._unsent.popleft()
            if frame.device_rows is not None and frame.device_rows.nbytes:
                self._outgoing.send(frame.device_rows, frame.dtype, _RECEIVER)
        return True

    def _begin(self, outer: Frame) -> None:
        """Read the inner header of a frame, and receive the rows that it announces."""
        meta = memoryview(outer.meta)
        if meta.nbytes < HEADER_BYTES:
            raise LinkLost(f"protocol: a frame of {self.peer!r} does not say what comes by NCCL")
        header = decode_header(meta[:HEADER_BYTES], self._max_frame_bytes)
        self._arriving = replace(outer, meta=meta[HEADER_BYTES:])
        if header.dtype == Dtype.NONE:
            return
        rows = self._room_for(header.num_rows * header.row_bytes)
        self._arriving = replace(
            self._arriving, dtype=header.dtype, num_rows=header.num_rows, device_rows=rows
        )
        if rows.nbytes:
            self._receiving.put(self._incoming.receive(rows, header.dtype, _SENDER))
            # Or the next frame's header would keep `fileno` readable until the rows are there.
            self._listen_for(select.EPOLLRDHUP)

    def _arrived(self) -> Frame | None:
        """Return the frame that arrives if the bell rang for its rows."""
        frame = self._arriving
        if frame is not None and frame.device_rows is not None and frame.device_rows.nbytes:
            if not self._has_rung():
                if self._has_hung_up():
                    raise LinkLost(f"link to {self.peer!r} is lost: the peer closed it while it sent rows")
                return None
            self._incoming.is_idle()  # lets go of the rows
            self._listen_for(select.EPOLLIN)
        self._arriving = None
        return frame

    def _room_for(self, num_bytes: int) -> DeviceRows:
        if num_bytes > self._buffer.nbytes:
            self._buffer = self._device.empty(num_bytes)
        return self._buffer[:num_bytes]

    def _wait(self, timeout_s: float | None) -> None:
        # Not the epoll: it forgets a socket that another thread closes, and would sleep on.
        poller = select.poll()
        try:
            poller.register(self._stream, select.POLLIN if self._arriving is None else select.POLLRDHUP)
            poller.register(self._bell_end, select.POLLIN)
        except ValueError:
            raise LinkLost(f"link to {self.peer!r} is lost: it was closed on this side") from None
        timed_out = timeout_s is not None and timeout_s <= 0  # also under a peer that trickles
        if timed_out or not poller.poll(None if timeout_s is None else timeout_s * 1000):
            raise LinkLost(f"link to {self.peer!r} is lost: the peer took too long")

    def _ring_for_rows(self) -> None:
        """Ring when the rows of a frame are there, once for each; in a thread, so that nobody spins."""
        with self._device.use():
            while (done := self._receiving.get()) is not None:
                with contextlib.suppress(RuntimeError):  # of the device; who asks for the rows hears of it
                    done.synchronize()
                self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # the link is closed
            self._bell.send(b"!")

    def _has_rung(self) -> bool:
        try:
            return bool(self._bell_end.recv(1))
        except OSError:  # there is nothing, or the link is closed
            return False

    def _listen_for(self, events: int) -> None:
        with contextlib.suppress(ValueError, OSError):  # the link is closed
            self._epoll.modify(self._stream, events)

    def _has_hung_up(self) -> bool:
        """Return whether the peer, or we, closed the socket, whatever it still holds."""
        poller = select.poll()
        try:
            poller.register(self._stream, select.POLLRDHUP)
        except ValueError:
            return True
        return any(events & _HUNG_UP for _, events in poller.poll(0))

    @contextlib.contextmanager
    def _closing_on_loss(self) -> Iterator[None]:
        try:
            yield
        except CommunicatorLost as error:
            self.close()
            raise LinkLost(f"link to {self.peer!r} is lost: NCCL: {error}") from error
        except RuntimeError as error:  # of NCCL, or of the device: no memory for rows, which can't be skipped
            self.close()
            raise LinkLost(f"link to {self.peer!r} is lost: {error}") from error
        except LinkLost:
            self.close()
            raise


def _on_socket(frame: Frame) -> Frame:
    """Return what the socket carries of a frame. Raises ValueError for a frame that a peer would refuse."""
    if frame.device_rows is None:
        return replace(frame, meta=_NO_DEVICE_ROWS + bytes(frame.meta))
    header = encode_header(frame, frame.device_rows.nbytes)
    return Frame(frame.kind, frame.sequence, frame.layer, header + bytes(frame.meta))
