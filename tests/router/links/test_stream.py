"""A link over a socket, as its two ends see it."""

import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.stream import StreamLink
from router.links.wire import encode


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connecting = socket.create_connection(server.getsockname())
        return connecting, server.accept()[0]


@pytest.fixture(params=[unix_pair, tcp_pair])
def links(request: pytest.FixtureRequest) -> Iterator[tuple[StreamLink, StreamLink]]:
    left, right = (StreamLink(sock, name) for sock, name in zip(request.param(), "ab", strict=True))
    yield left, right
    left.close()
    right.close()


@pytest.fixture(params=[unix_pair, tcp_pair])
def raw_and_link(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, StreamLink]]:
    """A link and, at its other end, a socket to misbehave with."""
    raw, sock = request.param()
    link = StreamLink(sock, "peer")
    with raw:
        yield raw, link
    link.close()


def rows_frame(data: bytes, num_rows: int = 1, sequence: int = 0) -> Frame:
    return Frame(Kind.ROWS, sequence, 3, b"meta", Dtype.FLOAT32, num_rows, memoryview(data))


def test_a_frame_arrives_as_it_was_sent(links):
    links[0].send(rows_frame(bytes(range(24)), 3, sequence=9))
    assert links[1].receive(5) == rows_frame(bytes(range(24)), 3, sequence=9)


def test_frames_sent_in_one_go_arrive_one_by_one(links):
    for sequence in range(100):
        links[0].send(rows_frame(bytes(4 * sequence), 1 if sequence else 0, sequence))
    assert [links[1].receive(5).sequence for _ in range(100)] == list(range(100))


def test_a_frame_larger_than_the_sockets_buffers_arrives_whole(links):
    data = bytes(range(256)) * 40_000
    sender = threading.Thread(target=links[0].send, args=(rows_frame(data, 40),))
    sender.start()
    frame = links[1].receive(10)
    sender.join(10)
    assert frame.rows == data


def test_both_sides_can_send_large_frames_at_once_if_each_has_a_reader(links):
    data = bytes(4_000_000)
    threads = [threading.Thread(target=link.send, args=(rows_frame(data),)) for link in links]
    for thread in threads:
        thread.start()
    received: list[int] = []
    reader = threading.Thread(target=lambda: received.append(links[0].receive(10).rows.nbytes))
    reader.start()
    assert links[1].receive(10).rows.nbytes == len(data)
    for thread in (*threads, reader):
        thread.join(10)
    assert received == [len(data)]


def test_posted_frames_leave_without_blocking_as_the_peer_reads(links):
    data = bytes(range(256)) * 20_000
    links[0].post(rows_frame(data, sequence=1))
    links[0].post(rows_frame(data, sequence=2))
    assert not links[0].flush()
    arrived = []
    while len(arrived) < 2:
        links[0].flush()
        if frame := links[1].poll():
            arrived.append((frame.sequence, bytes(frame.rows) == data))
    assert arrived == [(1, True), (2, True)]
    assert links[0].flush()


def test_more_posted_frames_than_one_system_call_takes_arrive_in_order():
    left, right = (StreamLink(sock, "peer") for sock in unix_pair())
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


def test_the_end_of_the_peer_is_seen_at_once(links):
    links[0].close()
    began = time.monotonic()
    with pytest.raises(LinkLost, match="'b' is lost: "):
        links[1].receive(30)
    assert time.monotonic() - began < 1


def test_the_end_of_the_peer_in_the_middle_of_a_frame_is_a_loss(raw_and_link):
    raw, link = raw_and_link
    raw.sendall(b"".join(encode(rows_frame(bytes(400))))[:-1])
    raw.close()
    with pytest.raises(LinkLost):
        link.receive(5)


def test_sending_to_a_peer_that_is_gone_is_a_loss(links):
    links[1].close()

    def send_all() -> None:
        for _ in range(100):  # TCP takes a few before the peer's reset arrives
            links[0].send(rows_frame(bytes(1_000_000)))

    with pytest.raises(LinkLost):
        send_all()


def test_a_receive_that_takes_too_long_is_a_loss_and_closes_the_link(links):
    with pytest.raises(LinkLost, match="too long"):
        links[1].receive(0.02)
    with pytest.raises(LinkLost):
        links[0].receive(5)


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
    sock, other = unix_pair()
    with other:
        link = StreamLink(sock, "stuck", send_timeout_s=0.05)
        with pytest.raises(LinkLost, match="'stuck' is lost: the peer took too long"):
            link.send(rows_frame(bytes(10_000_000)))


def test_closing_wakes_a_thread_of_ours_that_waits(links):
    reasons: list[str] = []

    def wait() -> None:
        try:
            links[0].receive(30)
        except LinkLost as error:
            reasons.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    links[0].close()
    links[0].close()
    thread.join(5)
    assert len(reasons) == 1


def test_an_announced_ten_gigabytes_are_refused_without_allocating_them(raw_and_link):
    raw, link = raw_and_link
    raw.sendall(struct.pack("<4sHBB5I", b"TWND", 1, 1, 1, 0, 0, 2_500_000, 4096, 0))
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LinkLost, match="takes at most"):
        link.receive(5)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 10_000


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_are_a_loss_or_a_wait_and_nothing_else(data: bytes):
    sock, other = unix_pair()
    link = StreamLink(sock, "stranger", max_frame_bytes=1000)
    with other:
        other.sendall(data)
    with pytest.raises(LinkLost):
        link.receive(5)


def test_tcp_links_send_small_frames_at_once():
    left, right = tcp_pair()
    with right:
        link = StreamLink(left, "peer")
        assert left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        link.close()
