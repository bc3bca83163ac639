"""What only a link over a socket has; what it shares with every link is in test_link_conformance.py."""

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.stream import StreamLink
from router.links.wire import encode
from tests.router.links.hostile_bytes import announced
from tests.router.links.link_pairs import tcp_sockets, unix_sockets


@pytest.fixture(params=[unix_sockets, tcp_sockets])
def links(request: pytest.FixtureRequest) -> Iterator[tuple[StreamLink, StreamLink]]:
    left, right = (StreamLink(sock, name) for sock, name in zip(request.param(), "ab", strict=True))
    yield left, right
    left.close()
    right.close()


@pytest.fixture(params=[unix_sockets, tcp_sockets])
def raw_and_link(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, StreamLink]]:
    """A link and, at its other end, a socket to misbehave with."""
    raw, sock = request.param()
    link = StreamLink(sock, "peer")
    with raw:
        yield raw, link
    link.close()


def rows_frame(data: bytes, num_rows: int = 1, sequence: int = 0) -> Frame:
    return Frame(Kind.ROWS, sequence, 3, b"meta", Dtype.FLOAT32, num_rows, memoryview(data))


def test_more_posted_frames_than_one_system_call_takes_arrive_in_order():
    left, right = (StreamLink(sock, "peer") for sock in unix_sockets())
    left.post(rows_frame(bytes(1_000_000), sequence=0))
    for sequence in range(1, 1000):
        left.post(Frame(Kind.TOKENS, sequence, meta=b"x"))
    sequences = []
    while len(sequences) < 1000:
        left.flush()
        if frame := right.poll():
            sequences.append(frame.sequence)
    assert sequences == list(range(1000))


def test_the_last_frame_stays_valid_for_who_holds_it_when_the_buffer_grows(links):
    links[0].send(rows_frame(b"\1\2\3\4"))
    kept = links[1].receive(5).rows
    sender = threading.Thread(target=links[0].send, args=(rows_frame(bytes(1_000_000)),))
    sender.start()
    links[1].receive(5)
    sender.join(5)
    assert kept == b"\1\2\3\4"


def test_the_receive_buffer_is_reused(links):
    rows = []
    for _ in range(2):
        links[0].send(rows_frame(bytes(4000)))
        rows.append(links[1].receive(5).rows)
    assert rows[0].obj is rows[1].obj


def test_a_trickle_of_bytes_does_not_stretch_the_timeout(raw_and_link):
    raw, link = raw_and_link
    data = b"".join(encode(rows_frame(bytes(4_000))))
    done = threading.Event()

    def trickle() -> None:
        for byte in data:
            if done.wait(0.01):
                return
            raw.send(bytes([byte]))

    thread = threading.Thread(target=trickle)
    thread.start()
    with pytest.raises(LinkLost, match="too long"):
        link.receive(0.1)
    done.set()
    thread.join(5)


def test_a_peer_that_takes_nothing_is_a_loss():
    sock, other = unix_sockets()
    with other:
        link = StreamLink(sock, "stuck", send_timeout_s=0.05)
        with pytest.raises(LinkLost, match="'stuck' is lost: the peer took too long"):
            link.send(rows_frame(bytes(10_000_000)))


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_are_a_loss_or_a_wait_and_nothing_else(data: bytes):
    sock, other = unix_sockets()
    link = StreamLink(sock, "stranger", max_frame_bytes=1000)
    with other:
        other.sendall(data)
    with pytest.raises(LinkLost):
        link.receive(5)


def test_a_frame_for_which_there_is_no_memory_is_a_loss():
    sock, other = unix_sockets()
    link = StreamLink(sock, "greedy", max_frame_bytes=1 << 60)
    with other:
        other.sendall(announced(num_rows=1 << 30, row_bytes=1 << 20))
        with pytest.raises(
            LinkLost, match="'greedy' is lost: no memory for a frame of 1125899906842624 bytes"
        ):
            link.receive(5)
    assert link.fileno() == -1


def test_tcp_links_send_small_frames_at_once():
    left, right = tcp_sockets()
    with right:
        link = StreamLink(left, "peer")
        assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        link.close()
