"""The end that waits for links."""

import contextlib
import logging
import os
import selectors
import socket
import threading
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

from router.links.address import Address, this_host_id
from router.links.base import Link, LinkLost
from router.links.handshake import check_identity, greet_as_listener
from router.links.private_folder import make_private
from router.links.stream import StreamLink
from router.links.wire import MAX_FRAME_BYTES

_MAX_UNIX_PATH_BYTES = 107  # sockaddr_un holds 108, one of them a zero
# Idle strangers make others wait until their handshakes are over. That must be sooner than those give up (an
# engine: after 2 s), and happen only once: so there are places for all that the backlog holds.
_HANDSHAKE_DEADLINE_S = 1.0
_MAX_HANDSHAKES = 128  # at once on each socket; further connections wait in the system's backlog
_BACKLOG = 64
_PAUSE_S = 0.1  # before accepting again when the system is out of descriptors or threads

_log = logging.getLogger(__name__)


class Listener:
    """Accepts authenticated links on a Unix socket and on a TCP port.

    Each handshake has a thread and a deadline of its own, so a silent or hostile stranger delays nobody. But
    threads are bounded, on each socket by itself: 128 strangers at once, on TCP, delay those who come after
    them on TCP, by that deadline. The Unix socket is in a folder that only this user may enter.
    """

    def __init__(
        self,
        secret: bytes,
        name: str,
        directory: Path,
        host: str,
        *,
        handshake_deadline_s: float = _HANDSHAKE_DEADLINE_S,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        """Listen at once. `directory` is for the Unix socket; `host` is the name others reach this host by.

        The directory is created if need be, and rid of the sockets of killed processes. Raises ValueError if
        its path is too long for a socket or if others may enter it, OSError if the system refuses.
        """
        check_identity(secret, name)
        unix_path = directory.absolute() / f"{uuid.uuid4().hex[:16]}.sock"
        if len(os.fsencode(unix_path)) > _MAX_UNIX_PATH_BYTES:
            longest = _MAX_UNIX_PATH_BYTES - len(unix_path.name) - 1
            raise ValueError(
                f"directory {str(directory)!r} is too long for Unix sockets: at most {longest} bytes"
            )
        make_private(directory)
        _remove_dead_sockets(directory)

        self._secret, self._name = secret, name
        self._handshake_deadline_s, self._max_frame_bytes = handshake_deadline_s, max_frame_bytes
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._tcp = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind(str(unix_path))
        self._unix.listen(_BACKLOG)
        self._address = Address(this_host_id(), str(unix_path), host, self._tcp.getsockname()[1])

        self._lock = threading.Lock()  # of the three below
        self._closing = threading.Event()
        self._greeting: set[socket.socket] = set()
        self._accepted: deque[StreamLink] = deque()
        # Carries a byte for each link in `_accepted`, so that a selector can wait for them.
        self._ready, self._announce = socket.socketpair()
        self._stop, self._stopped = socket.socketpair()
        self._threads = [
            threading.Thread(target=self._listen, args=(server,), name=f"listener {name}", daemon=True)
            for server in (self._tcp, self._unix)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> Address:
        return self._address

    def fileno(self) -> int:
        """Return the file descriptor that turns readable when `accept` has a link, for a selector."""
        return self._ready.fileno()

    def accept(self, timeout_s: float | None = None) -> StreamLink:
        """Wait for the next link. Raises TimeoutError, and LinkLost once the listener is closed."""
        try:
            self._ready.settimeout(timeout_s)
            if self._ready.recv(1):
                return self._accepted.popleft()
        except (TimeoutError, BlockingIOError):
            raise TimeoutError(f"no link to {self._name!r} came within {timeout_s} s") from None
        except (OSError, IndexError):
            pass  # closed at this moment
        raise LinkLost(f"listener {self._name!r} is closed")

    def close(self) -> None:
        """Stop listening, remove the socket file, end what nobody accepted yet; accepted links live on."""
        with self._lock:
            if self._closing.is_set():
                return
            self._closing.set()
            for sock in (self._stop, self._announce, *self._greeting):
                _shut_down(sock)
        for thread in self._threads:
            thread.join()
        # `_ready` stays open: reading its end of file is how `accept` learns that this listener is closed.
        for sock in (self._tcp, self._unix, self._stop, self._stopped):
            sock.close()
        Path(self._address.unix_path).unlink(missing_ok=True)
        while self._accepted:
            self._accepted.popleft().close()

    def _listen(self, server: socket.socket) -> None:
        places = threading.BoundedSemaphore(_MAX_HANDSHAKES)
        server.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._stopped, selectors.EVENT_READ)
            selector.register(server, selectors.EVENT_READ)
            while not self._closing.is_set():
                selector.select()
                places.acquire()  # the handshakes' deadline bounds this wait
                if not self._admit(server, places):
                    places.release()

    def _admit(self, server: socket.socket, places: threading.BoundedSemaphore) -> bool:
        """Accept a connection and start its handshake, which frees its place; return whether it began."""
        sock = None
        try:
            sock, _ = server.accept()
            thread = threading.Thread(
                target=self._greet, args=(sock, places), name=f"handshake {self._name}", daemon=True
            )
            with self._lock:
                if self._closing.is_set():
                    raise LinkLost("the listener was closed")
                thread.start()
                self._greeting.add(sock)
            return True
        except BlockingIOError:  # the stranger is gone already, or it was the end that woke us
            return False
        except (OSError, RuntimeError) as error:  # RuntimeError: the system has no thread for us
            if sock:
                sock.close()
            if not self._closing.is_set():
                _log.error("listener %r cannot accept a connection: %s", self._name, error)
                self._closing.wait(_PAUSE_S)
            return False

    def _greet(self, sock: socket.socket, places: threading.BoundedSemaphore) -> None:
        try:
            peer = greet_as_listener(sock, self._secret, self._name, self._handshake_deadline_s)
            link = StreamLink(sock, peer, max_frame_bytes=self._max_frame_bytes)
            with self._lock:
                if self._closing.is_set():
                    raise LinkLost("the listener was closed")
                self._accepted.append(link)
            self._announce.send(b"+")
        except OSError as error:  # LinkLost is one
            if not self._closing.is_set():
                _log.warning("listener %r refused a connection: %s", self._name, error)
            sock.close()
        finally:
            with self._lock:
                self._greeting.discard(sock)
            places.release()


def serve_links(listener: Listener, serve: Callable[[Link], None], name: str) -> None:
    """Run `serve` for each link that comes, in a thread of its own, until the listener is closed.

    Does not wait; all threads have this name.
    """

    def accept() -> None:
        while True:
            try:
                link = listener.accept()
            except LinkLost:
                return  # it was closed
            threading.Thread(target=serve, args=(link,), name=name, daemon=True).start()

    threading.Thread(target=accept, name=name, daemon=True).start()


def _remove_dead_sockets(directory: Path) -> None:
    """Unlink the socket files of processes that were killed before they could do so."""
    for path in directory.glob("*.sock"):
        # A datagram socket: a live listener refuses it by its type, and never learns that we asked.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:  # nobody holds it; also the answer for any other kind of file
                if path.is_socket():
                    path.unlink(missing_ok=True)
            except OSError:
                pass  # alive, or gone by now


def _shut_down(sock: socket.socket) -> None:
    """End the connection without freeing its descriptor, so that a thread blocked on it wakes safely."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
