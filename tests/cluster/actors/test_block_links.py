"""Copies of blocks between engines, over real sockets."""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch

from cluster.actors import block_links
from cluster.actors.block_links import MAX_QUEUED, BlockReceiver, BlockSender
from cluster.engine.blocks import DIGEST_BYTES
from cluster.engine.copies import BlockCopy
from router.links.address import Address
from router.links.base import Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of
from router.links.stream import connect
from router.requests import choose_standby
from tests.cluster.belongings import Belongings

SECRET = b"one cluster's secret"
ROW_SIZE = 300
DEADLINE_S = 10.0

pytestmark = pytest.mark.timeout(60)


class Other:
    """An engine that keeps, or only counts, the copies that come to it."""

    def __init__(self, directory: Path, keeps_up: bool = True) -> None:
        self.copies: SimpleQueue[BlockCopy] = SimpleQueue()
        self.keeps_up = keeps_up
        self.receiver = BlockReceiver(Listener(SECRET, "other", directory, "127.0.0.1"), ROW_SIZE, self.adopt)

    def adopt(self, copy: BlockCopy, then: Callable[[], None]) -> None:
        self.copies.put(copy)
        if self.keeps_up:
            then()


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def sender(cleanup: ExitStack) -> BlockSender:
    sender = BlockSender(SECRET, "one")
    cleanup.callback(sender.close)
    return sender


@pytest.fixture
def other(tmp_path: Path, cleanup: ExitStack) -> Callable[..., Other]:
    def make(**rest: bool) -> Other:
        made = Other(tmp_path, **rest)
        cleanup.callback(made.receiver.close)
        return made

    return make


def copy_of(num_blocks: int = 1) -> BlockCopy:
    """Make up a copy of the last of so many blocks."""
    digests = tuple(secrets.token_bytes(DIGEST_BYTES) for _ in range(num_blocks))
    return BlockCopy(digests, torch.randn(ROW_SIZE))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {DEADLINE_S:g} s"
        time.sleep(0.005)


def wait_for_standby(sender: BlockSender, name: str | None) -> None:
    wait_until(lambda: sender.standby("answer") == name, f"{name} as standby")


def test_copies_arrive_as_they_were_sent(sender, other):
    there = other()
    sender.follow({"b": there.receiver.address})
    wait_for_standby(sender, "b")
    copies = [copy_of(1 + number % 5) for number in range(100)]
    for copy in copies:
        wait_until(lambda: sender.room("b") > 0, "room")
        sender.send("b", copy)
    for copy in copies:
        arrived = there.copies.get(timeout=DEADLINE_S)
        assert arrived.digests == copy.digests
        assert torch.equal(arrived.row, copy.row)


def test_answers_are_shared_out_as_the_gateways_expect(sender, other):
    engines = {name: other() for name in "bcd"}
    sender.follow({name: engine.receiver.address for name, engine in engines.items()})
    answers = [f"cmpl-{number}" for number in range(50)]
    expected = [choose_standby(answer, engines.keys()) for answer in answers]
    wait_until(lambda: [*map(sender.standby, answers)] == expected, "all three engines")


def test_what_was_sent_is_remembered_for_each_engine(sender, other):
    b, c = other(), other()
    sender.follow({"b": b.receiver.address, "c": c.receiver.address})
    wait_until(lambda: {sender.standby(str(number)) for number in range(99)} == {"b", "c"}, "two engines")
    copy = copy_of(2)
    sender.send("b", copy)
    first, last = copy.digests
    assert [sender.has("b", last), sender.has("b", first), sender.has("c", last)] == [True, False, False]


def test_an_engine_that_is_not_there_is_no_standby(sender, other):
    gone, there = other(), other()
    gone.receiver.close()
    sender.follow({"b": gone.receiver.address, "c": there.receiver.address})
    wait_until(lambda: {sender.standby(str(number)) for number in range(20)} == {"c"}, "the only one there")
    assert (sender.room("b"), sender.has("b", bytes(32))) == (0, False)


def test_an_engine_that_leaves_is_no_standby_any_more_and_may_come_back(sender, other):
    there = other()
    for _ in range(3):
        sender.follow({"b": there.receiver.address})
        wait_for_standby(sender, "b")
        copy = copy_of()
        sender.send("b", copy)
        assert there.copies.get(timeout=DEADLINE_S).digests == copy.digests
        sender.follow({})
        assert sender.standby("answer") is None


def test_an_engine_that_dies_is_no_standby_once_a_copy_did_not_arrive(sender, tmp_path):
    with_its_end = Listener(SECRET, "other", tmp_path, "127.0.0.1")
    sender.follow({"b": str(with_its_end.address)})
    link = with_its_end.accept(DEADLINE_S)
    wait_for_standby(sender, "b")
    link.close()
    with_its_end.close()

    def is_given_up() -> bool:
        sender.send("b", copy_of())
        return sender.standby("answer") is None

    wait_until(is_given_up, "the loss")


def test_little_is_in_flight_to_an_engine_that_does_not_keep_up(sender, other):
    there = other(keeps_up=False)
    sender.follow({"b": there.receiver.address})
    wait_for_standby(sender, "b")
    num_sent = 0
    # 300 numbers a copy: the sockets hold many. The engine has some in hand, and the link's outbox is short.
    while num_sent < 100_000:
        if sender.room("b") > 0:
            sender.send("b", copy_of())
            num_sent += 1
        elif there.copies.qsize() >= MAX_QUEUED:
            break
    assert sender.room("b") <= 0
    assert there.copies.qsize() == MAX_QUEUED


def test_an_engine_of_another_cluster_is_no_standby(other, cleanup, tmp_path, caplog):
    caplog.set_level(logging.INFO, block_links.__name__)
    stranger = BlockSender(b"another secret", "one")
    cleanup.callback(stranger.close)
    stranger.follow({"b": other().receiver.address})
    wait_until(lambda: "takes no copies" in caplog.text, "a word of it")
    assert stranger.standby("answer") is None


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.COPY),
        Frame(Kind.COPY, meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE), meta=b""),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE), meta=bytes(DIGEST_BYTES + 1)),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE - 1), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.COPY, torch.zeros(2, ROW_SIZE), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE, dtype=torch.bfloat16), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.WEIGHTS, torch.zeros(1, ROW_SIZE), meta=bytes(DIGEST_BYTES)),
    ],
    ids=["nothing", "no row", "no digest", "odd digests", "short row", "two rows", "bf16", "weights"],
)
def test_a_peer_that_sends_anything_else_is_cut_off_and_nobody_else(sender, other, frame):
    there = other()
    link = connect(Address.parse(there.receiver.address), SECRET, "odd")
    link.send(frame)
    with pytest.raises(LinkLost):
        link.receive(DEADLINE_S)
    sender.follow({"b": there.receiver.address})
    wait_for_standby(sender, "b")
    sender.send("b", copy := copy_of())
    assert there.copies.get(timeout=DEADLINE_S).digests == copy.digests


def test_nothing_is_left_behind(tmp_path):
    before = Belongings.now()
    for keeps_up in (True, False):
        there, sender = Other(tmp_path, keeps_up), BlockSender(SECRET, "one")
        sender.follow({"b": there.receiver.address})
        wait_for_standby(sender, "b")
        for _ in range(MAX_QUEUED):
            sender.send("b", copy_of())
        there.copies.get(timeout=DEADLINE_S)
        sender.close()
        there.receiver.close()
        del there, sender
    assert not before.leaks(), [thread.name for thread in threading.enumerate()]
