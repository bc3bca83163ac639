"""What only a link over NCCL has: streams, memory, and two communicators to open and to lose."""

import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.nccl import _OPENING, NcclLink
from router.links.rows import frame_of, rows_of
from router.links.stream import StreamLink
from tests.router.links import hostile_bytes
from tests.router.links.link_pairs import Ends, data_of, open_both, over_double, stream_links, unix_sockets
from tests.router.nccl_double import NcclError, World

SOON_S = 2.0


@pytest.fixture
def ends() -> Iterator[Ends]:
    with over_double(unix_sockets()) as ends:
        yield ends


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.check()


@pytest.fixture
def background() -> Iterator[Callable[..., Future]]:
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


@pytest.fixture
def streams() -> Iterator[tuple[StreamLink, StreamLink]]:
    streams = stream_links(unix_sockets())
    yield streams
    for stream in streams:
        stream.close()


def test_rows_on_the_device_come_back_as_the_tensor_that_was_sent(ends: Ends):
    x_ND = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    rows = ends.devices[0].empty(x_ND.nbytes)
    rows.copy_(x_ND.view(torch.uint8).flatten())
    sent = replace(frame_of(Kind.ROWS, x_ND), rows=memoryview(b""), device_rows=rows)
    ends.links[0].send(sent)
    assert torch.equal(rows_of(ends.links[1].receive(5), 4), x_ND)


def test_rows_leave_behind_the_kernel_that_makes_them(ends: Ends):
    frame = ends.frame(bytes(8), dtype=Dtype.UINT8)
    kernel = ends.devices[0].current_stream().run(lambda: frame.device_rows.fill_(9))
    ends.links[0].send(frame)
    assert ends.links[1].poll() is None
    kernel.open()
    assert data_of(ends.links[1].receive(5)) == b"\x09" * 8


def test_rows_are_not_overwritten_while_a_kernel_still_reads_them(ends: Ends):
    seen: list[int] = []
    ends.links[0].send(ends.frame(b"\1" * 8, dtype=Dtype.UINT8))
    first = ends.links[1].receive(5).device_rows
    kernel = ends.devices[1].current_stream().run(lambda: seen.extend(first.tolist()))
    ends.links[0].send(ends.frame(b"\2" * 8, dtype=Dtype.UINT8))
    assert ends.links[1].poll() is None
    kernel.open()
    assert data_of(ends.links[1].receive(5)) == b"\2" * 8
    assert seen == [1] * 8


def test_rows_that_were_given_away_live_until_they_have_left(ends: Ends):
    kernel = ends.devices[0].current_stream().run(lambda: None)
    ends.links[0].send(ends.frame(b"\5" * 8))
    kernel.open()  # the double reads the memory now, which only the link still holds
    assert data_of(ends.links[1].receive(5)) == b"\5" * 8


def test_the_receive_buffer_is_reused_and_grows(ends: Ends):
    before = len(ends.devices[1].allocated)
    for num_bytes in (400, 8, 400, 4000, 400):
        ends.links[0].send(ends.frame(bytes(num_bytes)))
        ends.links[1].receive(5)
    assert ends.devices[1].allocated[before:] == [400, 4000]


def test_a_receive_buffer_that_was_outgrown_is_let_go(ends: Ends):
    pointers = []
    for num_bytes in (400, 4000):
        ends.links[0].send(ends.frame(bytes(num_bytes)))
        pointers.append(ends.links[1].receive(5).device_rows.data_ptr())
    assert [ends.devices[1].holds(pointer, 400) for pointer in pointers] == [False, True]


def test_rows_do_not_leave_before_their_header(ends: Ends):
    """A kernel that waits for a peer that does not even read would only take room on the device."""
    host = Frame(Kind.WEIGHTS, dtype=Dtype.UINT8, num_rows=1, rows=memoryview(bytes(10_000_000)))
    assert not ends.links[0].post(host)
    assert not ends.links[0].post(ends.frame(bytes(8), sequence=2))
    outgoing = ends.links[0]._outgoing._comm
    assert not outgoing.pending
    kinds = []
    while len(kinds) < 2:
        ends.links[0].flush()
        if frame := ends.links[1].poll():
            kinds.append(frame.kind)
    assert kinds == [Kind.WEIGHTS, Kind.ROWS]


def test_rows_that_nobody_takes_lose_the_link_in_time(background):
    with over_double(unix_sockets(), timeout_s=0.1) as ends:
        ends.links[0].send(ends.frame(bytes(8)))
        # Nobody calls the link, and it still turns readable for its owner's selector.
        assert select.select([ends.links[0]], [], [], 5)[0] == [ends.links[0]]
        with pytest.raises(LinkLost, match=r"NCCL: the other side did not take part within 0\.1 s"):
            ends.links[0].poll()
        with pytest.raises(LinkLost):
            ends.links[1].receive(SOON_S)


def test_rows_that_never_come_lose_the_link_in_time():
    with over_double(unix_sockets(), timeout_s=0.1) as ends:
        ends.send_in_part(ends.frame(bytes(8)))
        began = time.monotonic()
        with pytest.raises(LinkLost, match="NCCL"):
            ends.links[1].receive()
        assert time.monotonic() - began < SOON_S


def test_who_waits_for_an_answer_hears_that_nobody_takes_the_rows():
    with over_double(unix_sockets(), timeout_s=0.1) as ends:
        ends.links[0].send(ends.frame(bytes(8)))
        with pytest.raises(LinkLost, match="NCCL: the other side did not take part"):
            ends.links[0].receive()


def test_a_selector_sleeps_until_the_rows_are_there(ends: Ends):
    """Also when the header of the next frame is there already."""
    kernel = ends.devices[0].current_stream().run(lambda: None)
    for sequence in (1, 2):
        ends.links[0].send(ends.frame(bytes(8), sequence=sequence))
    assert ends.links[1].poll() is None
    assert select.select([ends.links[1]], [], [], 0)[0] == []
    kernel.open()
    for sequence in (1, 2):
        frame = None
        while frame is None:  # readable for the header, or for the rows
            assert select.select([ends.links[1]], [], [], SOON_S)[0] == [ends.links[1]]
            frame = ends.links[1].poll()
        assert frame.sequence == sequence
    assert select.select([ends.links[1]], [], [], 0)[0] == []


def test_no_memory_on_the_device_for_a_frame_loses_the_link(ends: Ends):
    """The rows can't be skipped, so nothing behind them could be told apart."""
    ends.devices[1].free_bytes = 100
    ends.links[0].send(ends.frame(bytes(400)))
    with pytest.raises(LinkLost, match="'a' is lost: device of b is out of memory"):
        ends.links[1].poll()
    assert ends.links[1].fileno() == -1
    with pytest.raises(LinkLost):
        ends.links[0].receive(SOON_S)


def test_an_error_of_the_network_loses_the_link():
    with over_double(unix_sockets(), timeout_s=1.0) as ends:
        ends.send_in_part(ends.frame(bytes(8)))
        ends.links[1]._incoming._comm.clique.network_error = NcclError("remote process exited")
        with pytest.raises(LinkLost, match="remote process exited"):
            ends.links[1].receive()


def test_a_peer_that_is_no_nccl_link_is_refused_by_name(world: World, streams):
    streams[1].send(Frame(Kind.ERROR, meta=b"an expert group answers ROWS frames, not OPEN"))
    with pytest.raises(LinkLost, match="'b' does not open NCCL: it answers with a frame ERROR"):
        NcclLink(streams[0], world.device("a"))
    with pytest.raises(LinkLost):  # behind the question, the end
        [streams[1].receive(SOON_S) for _ in range(2)]


def test_a_peer_with_another_nccl_is_refused_by_both(world: World, streams):
    devices = world.device("a"), world.device("b")
    devices[1].nccl._version = 22703
    with pytest.raises(LinkLost, match=r"has NCCL (22703, we have 23203|23203, we have 22703)"):
        open_both(streams, devices)


def test_an_nccl_that_does_not_work_is_a_loss_for_both_sides(world: World, streams):
    def fail() -> bytes:
        raise NcclError("NCCL_ERROR_SYSTEM_ERROR: no socket interface found")

    device = world.device("a")
    device.nccl.get_unique_id = fail
    with pytest.raises(LinkLost, match="'b' is lost: NCCL_ERROR_SYSTEM_ERROR: no socket interface"):
        NcclLink(streams[0], device)
    with pytest.raises(LinkLost):
        streams[1].receive(SOON_S)


def test_a_peer_that_says_nothing_is_a_loss_in_time(world: World, streams):
    with pytest.raises(LinkLost, match="too long"):
        NcclLink(streams[0], world.device("a"), open_timeout_s=0.05)


def opening_of(world: World) -> bytes:
    return _OPENING.pack(23203, world.device("somebody").nccl.get_unique_id())


def test_a_peer_that_does_not_come_to_open_is_a_loss_in_time(world: World, streams):
    streams[1].send(Frame(Kind.OPEN, meta=opening_of(world)))
    with pytest.raises(LinkLost, match=r"not all 2 ranks came within 0\.05 s"):
        NcclLink(streams[0], world.device("a"), open_timeout_s=0.05)


def test_a_peer_that_dies_while_opening_is_noticed_at_once(world: World, streams, background):
    streams[1].send(Frame(Kind.OPEN, meta=opening_of(world)))
    opening = background(NcclLink, streams[0], world.device("a"))
    streams[1].receive(SOON_S)
    streams[1].close()
    with pytest.raises(LinkLost):
        opening.result(SOON_S)


def test_ten_announced_gigabytes_are_refused_and_no_device_memory_is_taken(ends: Ends):
    ends.links[0]._stream.send(Frame(Kind.ROWS, meta=hostile_bytes.TEN_GIGABYTES))
    before = len(ends.devices[1].allocated)
    with pytest.raises(LinkLost, match="a frame of 10240000000 bytes"):
        ends.links[1].receive(SOON_S)
    assert len(ends.devices[1].allocated) == before


@pytest.mark.parametrize("meta", [b"", b"short", bytes(28), b"TWND" + bytes(24)])
def test_a_frame_without_a_good_inner_header_is_a_loss(ends: Ends, meta: bytes):
    ends.links[0]._stream.send(Frame(Kind.ROWS, meta=meta))
    with pytest.raises(LinkLost, match="protocol"):
        ends.links[1].receive(SOON_S)


def test_closing_aborts_both_communicators_of_both_sides(ends: Ends):
    communicators = [each._comm for link in ends.links for each in link._communicators]
    ends.links[0].close()
    with pytest.raises(LinkLost):
        ends.links[1].receive(SOON_S)
    world = ends.devices[0].world
    with world.changed:
        assert world.changed.wait_for(lambda: all(each.is_aborted for each in communicators), SOON_S)
    assert len(communicators) == 4


def test_closing_ends_all_threads_of_both_sides(ends: Ends):
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(("rows of", "nccl rank"))]
    ends.links[0].close()
    with pytest.raises(LinkLost):
        ends.links[1].receive(SOON_S)
    for thread in threads:
        thread.join(SOON_S)
    assert len(threads) >= 6
    assert [thread.name for thread in threads if thread.is_alive()] == []
