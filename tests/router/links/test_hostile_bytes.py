"""Bytes that mean harm, or mean nothing, cost a link its life and nobody else anything."""

import random
import resource
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from router.links.base import Frame, Kind, LinkLost
from router.links.handshake import greet_as_connector
from router.links.listener import Listener
from router.links.stream import StreamLink, connect
from router.links.wire import VERSION, encode
from tests.router.links import hostile_bytes

SECRET = b"one cluster's secret"
HELLO = b"TWHS" + VERSION.to_bytes(2, "little")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(SECRET, "group 0", tmp_path / "sockets", "127.0.0.1", handshake_deadline_s=1)
    yield listener
    listener.close()


@pytest.fixture
def bystander(listener: Listener) -> Iterator[Callable[[], None]]:
    """Return a check that a link which was there before still works, and that another can be opened."""
    links = [connect(listener.address, SECRET, "engine 1"), listener.accept(5)]

    def check() -> None:
        links[0].send(Frame(Kind.TOKENS, meta=b"still here"))
        assert links[1].receive(2).meta == b"still here"
        links.append(connect(listener.address, SECRET, "engine 2", timeout_s=2))
        links.append(listener.accept(2))
        assert links[-1].peer == "engine 2"

    yield check
    for link in links:
        link.close()


def raw_connection(listener: Listener) -> socket.socket:
    return socket.create_connection((listener.address.tcp_host, listener.address.tcp_port), 5)


def authenticated(listener: Listener) -> tuple[socket.socket, StreamLink]:
    """Return a raw socket of a peer that knows the secret, and our end of its link."""
    sock = raw_connection(listener)
    greet_as_connector(sock, SECRET, "mallory")
    return sock, listener.accept(5)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def read_to_the_end(link: StreamLink) -> int:
    """Return how many frames a link takes before it is lost."""
    num_frames = 0
    while True:
        try:
            link.receive(5)
        except LinkLost:
            return num_frames
        num_frames += 1


def wait_for_log(caplog: pytest.LogCaptureFixture, text: str) -> None:
    deadline = time.monotonic() + 5
    while text not in caplog.text and time.monotonic() < deadline:
        pass
    assert text in caplog.text


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" + bytes(40),
        b"".join(encode(Frame(Kind.TOKENS))) * 4,
        bytes(99),
    ],
)
def test_a_stranger_is_refused_and_logged_and_disturbs_nobody(listener, bystander, caplog, data: bytes):
    with raw_connection(listener) as stranger:
        stranger.sendall(data)
        wait_for_log(caplog, "refused a connection: handshake: the peer is not a Tradewind process")
    bystander()


def test_a_peer_that_sends_frames_before_its_proof_is_refused(listener, bystander, caplog):
    with raw_connection(listener) as stranger:
        stranger.recv(38)
        hello = HELLO + bytes(32) + b"\x07" + b"mallory"
        stranger.sendall(hello + hostile_bytes.TEN_GIGABYTES + bytes(100))
        wait_for_log(caplog, "'mallory' does not know this cluster's secret")
    bystander()


def test_ten_gigabytes_announced_by_a_peer_are_refused_and_nothing_is_allocated(listener, bystander):
    sock, link = authenticated(listener)
    with sock:
        sock.sendall(hostile_bytes.TEN_GIGABYTES)
        tracemalloc.start()
        with pytest.raises(LinkLost, match=r"'mallory' is lost: protocol: a frame of 10240000000 bytes"):
            link.receive(5)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 100_000
        assert sock.recv(1) == b""  # and it is told so
    bystander()


def test_a_gigabyte_that_is_announced_and_not_sent_takes_no_memory(listener, bystander):
    """It is within the bound: only what arrives may cost."""
    sock, link = authenticated(listener)
    before_bytes = resident_bytes()
    with sock:
        sock.sendall(hostile_bytes.A_GIGABYTE + bytes(100_000))
        assert link.poll() is None
        assert resident_bytes() - before_bytes < 20_000_000
        link.close()
    bystander()


@pytest.mark.parametrize("num_bytes", [1, 27, 28, 29, 60])
def test_a_truncated_frame_is_a_loss_and_disturbs_nobody(listener, bystander, num_bytes: int):
    sock, link = authenticated(listener)
    with sock:
        sock.sendall(b"".join(encode(Frame(Kind.TOKENS, meta=bytes(40))))[:num_bytes])
    with pytest.raises(LinkLost, match="'mallory' is lost: the peer closed it"):
        link.receive(5)
    bystander()


def test_garbage_of_peers_that_know_the_secret_disturbs_nobody(listener, bystander):
    rng = random.Random(0)
    for _ in range(30):
        sock, link = authenticated(listener)
        with sock:
            sock.sendall(hostile_bytes.damaged(hostile_bytes.random_frames(rng), rng))
        assert read_to_the_end(link) <= 3
    bystander()


@pytest.mark.parametrize("seed", range(5))
def test_damaged_frames_are_taken_as_what_they_are_or_refused(seed: int):
    rng = random.Random(seed)
    for _ in range(300):
        hostile_bytes.feed_link(hostile_bytes.damaged(hostile_bytes.random_frames(rng), rng))


def test_good_frames_are_all_taken():
    rng = random.Random(1)
    for _ in range(100):
        data = hostile_bytes.random_frames(rng)
        assert hostile_bytes.feed_link(data) == data.count(b"TWND")


@pytest.mark.parametrize("seed", range(3))
def test_no_random_handshake_is_believed(seed: int):
    rng = random.Random(seed)
    for _ in range(100):
        start = rng.choice([b"", HELLO, HELLO + bytes(32) + b"\x05hello"])
        hostile_bytes.feed_handshake(start + rng.randbytes(rng.randrange(200)))
