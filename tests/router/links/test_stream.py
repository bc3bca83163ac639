"""What only a link over a socket has; what it shares with every link is in test_link_conformance.py."""

import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.open_file import OpenFile
from router.links.stream import StreamLink
from router.links.wire import VERSION, encode
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


def memory_frame(content: bytes = b"weights", meta: bytes = b"meta") -> Frame:
    file = OpenFile(os.memfd_create("test"))
    os.write(file.fileno(), content)
    return Frame(Kind.MEMORY, 1, 2, meta, file=file)


def content_of(frame: Frame) -> bytes:
    assert frame.file is not None
    return os.pread(frame.file.fileno(), 100, 0)


@pytest.fixture
def unix_links() -> Iterator[tuple[StreamLink, StreamLink]]:
    left, right = (StreamLink(sock, "peer") for sock in unix_sockets())
    yield left, right
    left.close()
    right.close()


def test_a_file_arrives_with_its_frame(unix_links):
    left, right = unix_links
    left.send(memory_frame())
    frame = right.receive(5)
    assert (frame.kind, frame.sequence, frame.layer, bytes(frame.meta)) == (Kind.MEMORY, 1, 2, b"meta")
    assert content_of(frame) == b"weights"


def test_each_file_arrives_with_its_own_frame_among_others_however_little_is_taken_at_once(unix_links):
    left, right = unix_links
    sent = [rows_frame(bytes(3_000_000)), memory_frame(b"one"), rows_frame(bytes(300_000))]
    sent += [memory_frame(b"two", meta=bytes(100_000)), memory_frame(b"three"), Frame(Kind.TOKENS, meta=b"x")]
    for frame in sent:
        left.post(frame)
    arrived: list[Frame] = []
    files: list[bytes | None] = []
    while len(arrived) < len(sent):
        left.flush()
        if frame := right.poll():
            arrived.append(frame)
            files.append(content_of(frame) if frame.file else None)
    assert [frame.kind for frame in arrived] == [frame.kind for frame in sent]
    assert files == [None, b"one", None, b"two", b"three", None]


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_file_is_closed_on_each_side_when_nobody_there_refers_to_it(unix_links):
    left, right = unix_links
    before = open_files()
    left.send(memory_frame())
    frame = right.receive(5)
    assert len(open_files() - before) == 1, "the sender keeps none that has left"
    del frame
    assert open_files() == before


def test_a_file_that_nobody_asked_for_is_not_kept():
    raw, sock = unix_sockets()
    link = StreamLink(sock, "peer")
    before = open_files()
    file = OpenFile(os.memfd_create("test"))
    with raw:
        socket.send_fds(raw, encode(rows_frame(b"1234")), [file.fileno()])
        assert link.receive(5).file is None
        assert len(open_files() - before) == 1
        link.close()


@pytest.mark.parametrize(
    ("sockets", "reason"),
    [(unix_sockets, "it came without its file"), (tcp_sockets, "no file can come with it")],
)
def test_a_frame_that_lacks_its_file_ends_the_link(sockets, reason: str):
    raw, sock = sockets()
    with raw:
        raw.sendall(b"".join(map(bytes, encode(memory_frame()))))
        with pytest.raises(LinkLost, match=reason):
            StreamLink(sock, "peer").receive(5)


def test_a_frame_with_a_file_needs_meta_that_it_goes_with(raw_and_link):
    raw, link = raw_and_link
    raw.sendall(struct.pack("<4sHBB5I", b"TWND", VERSION, Kind.MEMORY, Dtype.NONE, 0, 0, 0, 0, 0))
    with pytest.raises(LinkLost, match="a MEMORY frame without meta"):
        link.receive(5)


class AllDescriptors(ExitStack):
    """Takes every descriptor that is left, of few."""

    def __enter__(self) -> "AllDescriptors":
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, open_files())) + 1, limits[1]))
        try:
            while True:
                self.enter_context(Path(os.devnull).open())
        except OSError:
            return self


def test_who_has_no_descriptor_left_for_a_file_says_so(unix_links):
    left, right = unix_links
    left.send(memory_frame())
    with AllDescriptors(), pytest.raises(LinkLost, match="no descriptor is free here for its file"):
        right.receive(5)


def test_no_file_is_sent_to_another_host():
    left, right = (StreamLink(sock, "peer") for sock in tcp_sockets())
    assert not left.carries_files
    with pytest.raises(ValueError, match="files do not travel between hosts"):
        left.send(memory_frame())
    left.send(rows_frame(b"1234"))
    assert right.receive(5).kind == Kind.ROWS
    left.close()
    right.close()
