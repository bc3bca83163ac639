"""The proofs of a handshake, played by hand."""

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from router.links import handshake
from router.links.base import LinkLost
from router.links.handshake import check_identity, greet_as_connector, greet_as_listener
from router.links.wire import VERSION

SECRET = b"one cluster's secret"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Background:
    """Runs one side in a thread; `result` returns what it returned or raises what it raised."""

    def __init__(self, side, *args) -> None:
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run, args=(side, args), daemon=True)
        self._thread.start()

    def _run(self, side, args) -> None:
        try:
            self._outcome = side(*args)
        except LinkLost as error:
            self._outcome = error
            args[0].close()

    def result(self) -> object:
        self._thread.join(10)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


def hello(nonce: bytes, name: bytes = b"mallory") -> bytes:
    return struct.pack("<4sH32sB", b"TWHS", VERSION, nonce, len(name)) + name


def read_hello(sock: socket.socket) -> bytes:
    """Return the nonce of the hello that arrives."""
    sock.settimeout(5)
    head = sock.recv(39, socket.MSG_WAITALL)
    sock.recv(head[38], socket.MSG_WAITALL)
    return head[6:38]


def test_two_sides_with_one_secret_learn_each_others_names(ends):
    listener = Background(greet_as_listener, ends[0], SECRET, "group 0")
    assert greet_as_connector(ends[1], SECRET, "engine é") == "group 0"
    assert listener.result() == "engine é"


def test_sides_with_different_secrets_refuse_each_other(ends):
    listener = Background(greet_as_listener, ends[0], SECRET, "group 0")
    with pytest.raises(LinkLost, match="same secret"):
        greet_as_connector(ends[1], b"another secret", "engine")
    with pytest.raises(LinkLost, match="'engine' does not know this cluster's secret"):
        listener.result()


def test_a_listener_gives_no_proof_to_a_stranger(ends):
    listener = Background(greet_as_listener, ends[0], SECRET, "group 0")
    read_hello(ends[1])
    ends[1].sendall(hello(bytes(32)) + bytes(32))
    assert ends[1].recv(1) == b""
    with pytest.raises(LinkLost):
        listener.result()


def test_a_connector_refuses_a_listener_that_only_echoes_its_proof(ends):
    connector = Background(greet_as_connector, ends[0], SECRET, "engine")
    ends[1].sendall(hello(b"n" * 32))
    read_hello(ends[1])
    ends[1].sendall(ends[1].recv(32, socket.MSG_WAITALL))
    with pytest.raises(LinkLost, match="'mallory' does not know"):
        connector.result()


def test_a_listener_refuses_a_proof_that_another_listener_made(ends):
    """Mallory lets the victim's own cluster answer its challenge, in the wrong role."""
    listener = Background(greet_as_listener, ends[0], SECRET, "group 0")
    nonce = read_hello(ends[1])
    ours = handshake._Hello(b"m" * 32, b"mallory")
    theirs = handshake._Hello(nonce, b"group 0")
    ends[1].sendall(ours.encode() + handshake._proof(SECRET, b"listener", theirs, ours))
    with pytest.raises(LinkLost, match="does not know"):
        listener.result()


def test_a_recorded_transcript_opens_no_second_link(ends):
    left, middle_left = socket.socketpair()
    middle_right, right = socket.socketpair()
    with left, middle_left, middle_right, right:
        listener = Background(greet_as_listener, left, SECRET, "group 0")
        connector = Background(greet_as_connector, right, SECRET, "engine")
        middle_right.sendall(middle_left.recv(39 + len("group 0"), socket.MSG_WAITALL))
        recorded = middle_right.recv(39 + len("engine") + 32, socket.MSG_WAITALL)
        middle_left.sendall(recorded)
        middle_right.sendall(middle_left.recv(32, socket.MSG_WAITALL))
        assert (listener.result(), connector.result()) == ("engine", "group 0")

    again = Background(greet_as_listener, ends[0], SECRET, "group 0")
    ends[1].sendall(recorded)
    with pytest.raises(LinkLost, match="'engine' does not know"):
        again.result()


@pytest.mark.parametrize("greet", [greet_as_listener, greet_as_connector])
@pytest.mark.parametrize("num_bytes", [0, 1, 38, 40, 60])
def test_a_truncated_handshake_is_refused(ends, greet, num_bytes: int):
    side = Background(greet, ends[0], SECRET, "me")
    ends[1].sendall((hello(b"n" * 32) + bytes(32))[:num_bytes])
    ends[1].shutdown(socket.SHUT_WR)
    with pytest.raises(LinkLost, match="closed the connection"):
        side.result()


@pytest.mark.parametrize("greet", [greet_as_listener, greet_as_connector])
def test_a_silent_peer_is_refused_at_the_deadline(ends, greet):
    with pytest.raises(LinkLost, match=r"timed out|too long"):
        greet(ends[0], SECRET, "me", 0.05)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\n" + bytes(40), "not a Tradewind process"),
        (b"TWHS\x09\x00" + bytes(40), "version 9"),
    ],
)
def test_a_peer_of_another_protocol_or_version_is_refused(ends, data: bytes, reason: str):
    ends[1].sendall(data)
    with pytest.raises(LinkLost, match=reason):
        greet_as_listener(ends[0], SECRET, "me")


@pytest.mark.parametrize(("secret", "name"), [(b"", "me"), (SECRET, ""), (SECRET, "é" * 128)])
def test_an_empty_secret_or_an_unfit_name_is_a_users_mistake(secret: bytes, name: str):
    with pytest.raises(ValueError, match=r"secret|name"):
        check_identity(secret, name)
