"""What every link promises, whatever it is made of."""

import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from router.links.base import Dtype, Frame, Kind, LinkLost
from tests.router.links.link_pairs import KINDS, Ends, data_of

SOON_S = 2.0  # within which a loss must be seen; what takes longer waits for a timeout

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARAMS = [pytest.param(kind, marks=[pytest.mark.gpu, NO_GPU] if kind == "cuda" else []) for kind in KINDS]


@pytest.fixture(params=PARAMS)
def open_ends(request: pytest.FixtureRequest) -> Iterator[Callable[..., Ends]]:
    """Return a maker of links of one kind; they end with the test."""
    with ExitStack() as stack:
        yield lambda **knobs: stack.enter_context(KINDS[request.param](**knobs))


@pytest.fixture
def ends(open_ends) -> Ends:
    return open_ends()


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    """Return a runner of functions in threads of their own."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def pattern(num_bytes: int, start: int = 0) -> bytes:
    """Return bytes that repeat every 256, so that they are cheap to make on any device."""
    return bytes((start + i) % 256 for i in range(256)) * (num_bytes // 256) + bytes(
        (start + i) % 256 for i in range(num_bytes % 256)
    )


def fields(frame: Frame) -> tuple:
    return (
        frame.kind,
        frame.sequence,
        frame.layer,
        bytes(frame.meta),
        frame.dtype,
        frame.num_rows,
        data_of(frame),
    )


def receive_by_polling(link, flush) -> Frame:
    """Take a frame as a loop does that serves many links."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        flush()
        if (frame := link.poll()) is not None:
            return frame
    raise TimeoutError("no frame came")


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.UINT8])
@pytest.mark.parametrize(("num_rows", "num_bytes"), [(1, 4), (3, 24), (7, 7 * 4096), (0, 0), (5, 0)])
def test_a_frame_arrives_as_it_was_sent(ends: Ends, dtype: Dtype, num_rows: int, num_bytes: int):
    data = pattern(num_bytes)
    ends.links[0].send(ends.frame(data, num_rows, dtype, sequence=9))
    assert fields(ends.links[1].receive(5)) == (Kind.ROWS, 9, 3, b"meta", dtype, num_rows, data)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind != Kind.MEMORY])  # which has a file
def test_a_frame_may_carry_meta_alone_or_nothing(ends: Ends, kind: Kind):
    ends.links[0].send(Frame(kind, 2**32 - 1, 2**32 - 1, b"only meta"))
    ends.links[0].send(Frame(kind))
    assert fields(ends.links[1].receive(5)) == (kind, 2**32 - 1, 2**32 - 1, b"only meta", Dtype.NONE, 0, b"")
    assert fields(ends.links[1].receive(5)) == (kind, 0, 0, b"", Dtype.NONE, 0, b"")


def test_frames_of_all_sizes_arrive_one_by_one_in_the_order_of_sending(ends: Ends):
    sent = [pattern(4 * size, size) for size in (0, 1, 700, 3, 50_000, 0, 2)]
    for sequence, data in enumerate(sent):
        ends.links[0].send(ends.frame(data, sequence=sequence))
    arrived = [ends.links[1].receive(5) for _ in sent[:1]]
    assert data_of(arrived[0]) == sent[0]
    for sequence, data in list(enumerate(sent))[1:]:
        frame = ends.links[1].receive(5)
        assert (frame.sequence, data_of(frame)) == (sequence, data)


def test_a_frame_larger_than_any_buffer_arrives_whole(ends: Ends, background):
    data = pattern(10_000_000)
    sending = background(ends.links[0].send, ends.frame(data, 40))
    assert data_of(ends.links[1].receive(20)) == data
    sending.result(20)


def test_large_frames_pass_in_both_directions_at_once(ends: Ends, background):
    data = pattern(4_000_000), pattern(4_000_000, 7)

    def exchange(side: int) -> bool:
        sending = background(send_all, side)
        arrived = [data_of(ends.links[side].receive(20)) == data[1 - side] for _ in range(5)]
        sending.result(20)
        return all(arrived)

    def send_all(side: int) -> None:
        for _ in range(5):
            ends.links[side].send(ends.frame(data[side], side=side))

    assert [future.result(60) for future in [background(exchange, 0), background(exchange, 1)]] == [
        True,
        True,
    ]


def test_one_thread_can_move_large_frames_both_ways_by_posting_and_polling(ends: Ends):
    data = pattern(4_000_000), pattern(4_000_000, 7)
    for side, link in enumerate(ends.links):
        link.post(ends.frame(data[side], sequence=1, side=side))
        link.post(ends.frame(data[side], sequence=2, side=side))
    flush = [link.flush for link in ends.links]
    for sequence in (1, 2):
        for side in (0, 1):
            frame = receive_by_polling(ends.links[side], lambda: [each() for each in flush])
            assert (frame.sequence, data_of(frame) == data[1 - side]) == (sequence, True)
    assert [link.flush() for link in ends.links] == [True, True]


def test_polling_an_idle_link_finds_nothing(ends: Ends):
    assert ends.links[1].poll() is None


def test_a_selector_sees_a_frame_arrive_and_then_nothing_more(ends: Ends):
    assert select.select([ends.links[1]], [], [], 0)[0] == []
    ends.links[0].send(ends.frame(pattern(400)))
    assert select.select([ends.links[1]], [], [], SOON_S)[0] == [ends.links[1]]
    receive_by_polling(ends.links[1], lambda: None)
    assert select.select([ends.links[1]], [], [], 0)[0] == []


def test_a_received_frame_stays_as_it_is_until_the_next_receive(ends: Ends):
    ends.links[0].send(ends.frame(pattern(4000), sequence=1))
    first = ends.links[1].receive(5)
    ends.links[0].send(ends.frame(pattern(4000, 99), sequence=2))
    assert select.select([ends.links[1]], [], [], SOON_S)[0] == [ends.links[1]]
    assert fields(first) == (Kind.ROWS, 1, 3, b"meta", Dtype.FLOAT32, 1, pattern(4000))
    assert data_of(ends.links[1].receive(5)) == pattern(4000, 99)


def test_a_frame_that_no_peer_would_take_is_a_mistake_and_harms_nothing(ends: Ends):
    for frame in (
        Frame(Kind.ROWS, sequence=2**32),
        ends.frame(bytes(6), num_rows=1),
        ends.frame(bytes(8), 0),
    ):
        with pytest.raises(ValueError, match=r"."):
            ends.links[0].send(frame)
    ends.links[0].send(ends.frame(pattern(8), sequence=5))
    assert ends.links[1].receive(5).sequence == 5


def test_a_frame_above_the_receivers_bound_is_a_loss_for_both_sides(open_ends):
    ends = open_ends(max_frame_bytes=1000)
    ends.links[0].send(ends.frame(pattern(2000)))
    with pytest.raises(LinkLost, match="at most 1000"):
        ends.links[1].receive(5)
    with pytest.raises(LinkLost):
        ends.links[0].receive(5)


def test_closing_is_seen_by_the_peer_at_once(ends: Ends):
    ends.links[0].close()
    with pytest.raises(LinkLost, match="'a' is lost"):
        ends.links[1].receive(SOON_S)
    with pytest.raises(LinkLost):
        ends.links[1].poll()


def test_closing_turns_the_peer_readable(ends: Ends):
    ends.links[0].close()
    assert select.select([ends.links[1]], [], [], SOON_S)[0] == [ends.links[1]]


def test_a_closed_link_is_of_no_more_use(ends: Ends):
    ends.links[0].close()
    ends.links[0].close()
    for use in (
        lambda: ends.links[0].send(Frame(Kind.TOKENS)),
        lambda: ends.links[0].post(ends.frame(pattern(8))),
        lambda: ends.links[0].receive(5),
        ends.links[0].poll,
    ):
        with pytest.raises(LinkLost):
            use()


def test_closing_wakes_a_thread_of_ours_that_waits(ends: Ends, background):
    waiting = background(ends.links[0].receive, 30)
    ends.links[0].close()
    with pytest.raises(LinkLost):
        waiting.result(SOON_S)


def test_a_killed_peer_is_seen_at_once(ends: Ends, background):
    waiting = background(ends.links[1].receive, 30)
    ends.kill(0)
    with pytest.raises(LinkLost):
        waiting.result(SOON_S)


def test_sending_to_a_killed_peer_is_a_loss(ends: Ends):
    ends.kill(1)

    def send_all() -> None:
        for _ in range(100):  # TCP takes a few before the peer's reset arrives
            ends.links[0].send(ends.frame(pattern(100_000)))

    with pytest.raises(LinkLost):
        send_all()


def test_a_frame_of_which_a_part_has_arrived_is_no_frame_yet(ends: Ends):
    ends.send_in_part(ends.frame(pattern(400)))
    assert select.select([ends.links[1]], [], [], SOON_S)[0] == [ends.links[1]]
    assert [ends.links[1].poll() for _ in range(20)] == [None] * 20


@pytest.mark.parametrize(
    "end", [Ends.kill, lambda ends, side: ends.links[side].close()], ids=["kill", "close"]
)
def test_a_peer_that_ends_between_header_and_rows_is_a_loss_for_who_waits(ends: Ends, background, end):
    ends.send_in_part(ends.frame(pattern(400)))
    assert ends.links[1].poll() is None
    waiting = background(ends.links[1].receive, 30)
    end(ends, 0)
    with pytest.raises(LinkLost):
        waiting.result(SOON_S)


def test_a_peer_that_ends_between_header_and_rows_is_a_loss_for_who_polls(ends: Ends):
    ends.send_in_part(ends.frame(pattern(400)))
    assert ends.links[1].poll() is None
    ends.kill(0)
    with pytest.raises(LinkLost):
        receive_by_polling(ends.links[1], lambda: None)


@pytest.mark.parametrize(
    "begin", [lambda ends: None, lambda ends: ends.send_in_part(ends.frame(pattern(400)))]
)
def test_a_receive_that_takes_too_long_is_a_loss_for_both_sides(ends: Ends, begin):
    begin(ends)
    began = time.monotonic()
    with pytest.raises(LinkLost, match="too long"):
        ends.links[1].receive(0.1)
    assert time.monotonic() - began < SOON_S
    with pytest.raises(LinkLost):
        ends.links[0].receive(SOON_S)


def test_threads_that_send_and_receive_do_not_disturb_each_other(ends: Ends, background):
    """Small frames, as fast as they go: what two threads of one side share shows here."""
    begin = threading.Barrier(2)

    def answer() -> None:
        for _ in range(50):
            ends.links[1].send(ends.frame(data_of(ends.links[1].receive(20)), side=1))

    def ask() -> None:
        begin.wait(5)
        for number in range(50):
            ends.links[0].send(ends.frame(pattern(64, number)))

    def read() -> list[bytes]:
        begin.wait(5)
        return [data_of(ends.links[0].receive(20)) for _ in range(50)]

    answering, asking, reading = background(answer), background(ask), background(read)
    assert reading.result(30) == [pattern(64, number) for number in range(50)]
    asking.result(5)
    answering.result(5)
