"""A link over a socket: Unix within a host, TCP across hosts."""

import array
import contextlib
import mmap
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from router.links.address import Address, this_host_id
from router.links.base import Frame, Kind, LinkLost
from router.links.handshake import DEADLINE_S, check_identity, greet_as_connector
from router.links.open_file import OpenFile
from router.links.wire import HEADER_BYTES, MAX_FRAME_BYTES, Header, decode_body, decode_header, encode

# A host that vanishes sends no end of file: notice within about ten seconds, idle or in the middle of a send.
_TCP_OPTIONS = (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPIDLE", 4),
    ("TCP_KEEPINTVL", 2),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 10_000),
)


class StreamLink:
    """A connected, authenticated stream socket that carries frames; implements `Link`.

    `send` and `receive` block. `post`, `flush` and `poll` are the same in steps that never block, for a
    process that serves many links from one selector and must not wait for any single peer.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        *,
        send_timeout_s: float = 30.0,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._sock = sock
        self._peer = peer
        self._send_timeout_s = send_timeout_s  # how long a peer may take nothing at all
        self._max_frame_bytes = max_frame_bytes
        # Each item is for a system call of its own; a file goes with its first byte.
        self._unsent: deque[tuple[list[memoryview], OpenFile | None]] = deque()
        self._head = memoryview(bytearray(HEADER_BYTES))
        self._buffer = memoryview(bytearray(4096))  # grows to the largest frame seen
        self._header: Header | None = None  # of the frame whose body is arriving
        self._awaits_file = False  # with the next byte
        self._file: OpenFile | None = None  # of the frame whose body is arriving
        self._target = self._head  # what the next bytes fill
        self._filled = 0

        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _TCP_OPTIONS:
                if hasattr(socket, name):  # some are Linux only
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def carries_files(self) -> bool:
        """Whether MEMORY frames can be sent: only if both sides are on one host, and it is Linux."""
        return self._sock.family == socket.AF_UNIX and hasattr(socket, "MSG_CMSG_CLOEXEC")

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a thread of ours that waits on this socket
        self._sock.close()

    def send(self, frame: Frame) -> None:
        """Send one frame; block while the peer's buffers are full.

        Raises LinkLost, also when the peer takes no byte for `send_timeout_s` seconds.
        """
        is_sent = self.post(frame)
        while not is_sent:
            self._wait(select.POLLOUT, self._send_timeout_s)
            is_sent = self.flush()

    def receive(self, timeout_s: float | None = None) -> Frame:
        """Wait for one frame. Raises LinkLost, also when `timeout_s` seconds pass without a whole frame."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (frame := self.poll()) is None:
            self._wait(select.POLLIN, None if deadline is None else deadline - time.monotonic())
        return frame

    def post(self, frame: Frame) -> bool:
        """Start to send a frame, without blocking; return whether all of it has left. Raises LinkLost.

        If not, its meta and rows must stay as they are until `flush` returns True.
        """
        parts = [memoryview(part) for part in encode(frame)]
        if frame.file is None:
            self._unsent.append((parts, None))
        elif self.carries_files:
            self._unsent += ((parts[:1], None), (parts[1:], frame.file))
        else:
            raise ValueError("files do not travel between hosts")
        return self.flush()

    def flush(self) -> bool:
        """Send what the peer takes now; return whether nothing is left. Raises LinkLost."""
        while self._unsent:
            parts, file = self._unsent[0]
            try:
                num_sent = (
                    self._sock.sendmsg(parts)
                    if file is None
                    else socket.send_fds(self._sock, parts, [file.fileno()])
                )
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._lost(str(error)) from error
            if rest := _behind(parts, num_sent):
                self._unsent[0] = rest, None
            else:
                self._unsent.popleft()
        return True

    def poll(self) -> Frame | None:
        """Take in what has arrived and return a frame once it is whole, without blocking. Raises LinkLost."""
        if self._header is None:
            if not self._fill():
                return None
            try:
                self._header = decode_header(self._head, self._max_frame_bytes)
            except LinkLost as error:
                raise self._lost(str(error)) from None
            self._target = self._room_for(self._header)
            if self._header.kind == Kind.MEMORY:
                if not self.carries_files:
                    raise self._lost("protocol: a MEMORY frame, but no file can come with it")
                self._awaits_file = True
        if not self._fill():
            return None
        frame = decode_body(self._header, self._target, self._file)
        self._header, self._target, self._file = None, self._head, None
        return frame

    def _fill(self) -> bool:
        """Receive into the target; return whether it is full, and if so start over."""
        while self._filled < self._target.nbytes:
            try:
                num_received = self._receive_into(self._target[self._filled :])
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._lost(str(error)) from error
            if num_received == 0:
                raise self._lost("the peer closed it")
            self._filled += num_received
        self._filled = 0
        return True

    def _receive_into(self, target: memoryview) -> int:
        """Receive some bytes; and the file, if one should come with the first of them."""
        if not self._awaits_file:
            return self._sock.recv_into(target)
        room = socket.CMSG_LEN(array.array("i").itemsize)
        num_received, ancillary, flags, _ = self._sock.recvmsg_into([target], room, socket.MSG_CMSG_CLOEXEC)
        if num_received:
            self._file, self._awaits_file = _file_in(ancillary), False
            if self._file is None:
                is_cut = flags & socket.MSG_CTRUNC
                why = "no descriptor is free here for its file" if is_cut else "it came without its file"
                raise self._lost(f"protocol: a MEMORY frame: {why}")
        return num_received

    def _room_for(self, header: Header) -> memoryview:
        start = -header.meta_bytes % 64  # so that the rows behind the meta lie as aligned as the buffer
        end = start + header.body_bytes
        if end > self._buffer.nbytes:
            # A new one: whoever still holds views of the last frame keeps the old one alive. Mapped, so that
            # what a peer announces takes no memory before it arrives.
            try:
                self._buffer = memoryview(mmap.mmap(-1, end))
            except OSError as error:
                raise self._lost(f"no memory for a frame of {header.body_bytes} bytes: {error}") from error
        return self._buffer[start:end]

    def _wait(self, event: int, timeout_s: float | None) -> None:
        poller = select.poll()
        try:
            poller.register(self._sock, event)
        except ValueError:
            raise self._lost("it was closed on this side") from None
        timed_out = timeout_s is not None and timeout_s <= 0  # also under a peer that trickles
        if timed_out or not poller.poll(None if timeout_s is None else timeout_s * 1000):
            raise self._lost("the peer took too long")

    def _lost(self, why: str) -> LinkLost:
        self.close()
        return LinkLost(f"link to {self._peer!r} is lost: {why}")


def connect(address: Address, secret: bytes, name: str, timeout_s: float = DEADLINE_S) -> StreamLink:
    """Open a link to the listener at `address`: by its Unix socket if it is on this host, else by TCP.

    Blocks for `timeout_s` seconds at most. Raises LinkLost if nobody is there, or if its secret is another.
    """
    check_identity(secret, name)
    deadline = time.monotonic() + timeout_s
    sock = _connected_socket(address, timeout_s)
    try:
        return StreamLink(sock, greet_as_connector(sock, secret, name, deadline - time.monotonic()))
    except LinkLost:
        sock.close()
        raise
    except OSError as error:  # of an option: some systems refuse to set any once the peer is gone
        sock.close()
        raise LinkLost(f"no link to {address}: {error}") from error


def _connected_socket(address: Address, timeout_s: float) -> socket.socket:
    try:
        if address.host_id != this_host_id() or not Path(address.unix_path).exists():
            return socket.create_connection((address.tcp_host, address.tcp_port), timeout_s)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(address.unix_path)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise LinkLost(f"no listener at {address}: {error}") from error


def _file_in(ancillary: Iterable[tuple[int, int, bytes]]) -> OpenFile | None:
    """Return the file of a received control message, which had room for one descriptor."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            return OpenFile(array.array("i", data)[0])
    return None


def _behind(parts: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Return what is left of `parts` behind their first `num_bytes` bytes."""
    for index, part in enumerate(parts):
        if num_bytes < part.nbytes:
            return [part.cast("B")[num_bytes:], *parts[index + 1 :]]
        num_bytes -= part.nbytes
    return []
