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
from cluster.actors.block_links import MAX_RUNS, BlockReceiver, BlockSender, SendingLink
from cluster.engine.blocks import DIGEST_BYTES
from cluster.engine.copies import BlockRun, Progress, Sent
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
    """An engine to which runs come; it takes each in, and answers, when it is told to, or else at once."""

    def __init__(self, directory: Path, is_prompt: bool = True) -> None:
        self.runs: SimpleQueue[BlockRun] = SimpleQueue()
        self.answers: SimpleQueue[Callable[[int], None]] = SimpleQueue()  # of those that are not prompt
        self.is_prompt = is_prompt
        self.receiver = BlockReceiver(Listener(SECRET, "other", directory, "127.0.0.1"), ROW_SIZE, self.adopt)

    def adopt(self, run: BlockRun, then: Callable[[int], None]) -> None:
        self.runs.put(run)
        if self.is_prompt:
            then(len(run.digests))
        else:
            self.answers.put(then)

    def next_run(self) -> BlockRun:
        return self.runs.get(timeout=DEADLINE_S)


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


def run_of(num_digests: int = 1, num_rows: int = 1) -> BlockRun:
    """Make up a run; one without rows is a question."""
    digests = tuple(secrets.token_bytes(DIGEST_BYTES) for _ in range(num_digests))
    return BlockRun(digests, torch.randn(num_rows, ROW_SIZE) if num_rows else None)


def note_of(run: BlockRun) -> Sent:
    return Sent(Progress(standby=None), len(run.digests), is_question=run.rows_BN is None)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {DEADLINE_S:g} s"
        time.sleep(0.005)


def wait_for_link(sender: BlockSender) -> SendingLink:
    """Return the only standby, once it is there."""
    wait_until(lambda: sender.standby("answer") is not None, "a standby")
    return sender.standby("answer")


def names(sender: BlockSender) -> set[str]:
    return {*sender._open()}


def test_runs_arrive_as_they_were_sent_and_each_is_answered(sender, other):
    there = other()
    sender.follow({"b": there.receiver.address})
    link = wait_for_link(sender)
    runs = [run_of(1 + number % 5, number % 2) for number in range(60)]
    notes = [note_of(run) for run in runs]
    for run, note in zip(runs, notes, strict=True):
        link.send(run, note)
    for run in runs:
        arrived = there.next_run()
        assert arrived.digests == run.digests
        assert (arrived.rows_BN is None) == (run.rows_BN is None)
        assert run.rows_BN is None or torch.equal(arrived.rows_BN, run.rows_BN)
    heard = []

    def is_all_heard() -> bool:
        heard.extend(link.heard())
        return len(heard) == len(runs)

    wait_until(is_all_heard, "all answers")
    assert heard == [(note, note.num_digests) for note in notes]


def test_answers_are_shared_out_as_the_gateways_expect(sender, other):
    engines = {name: other() for name in "bcd"}
    sender.follow({name: engine.receiver.address for name, engine in engines.items()})
    wait_until(lambda: names(sender) == {*"bcd"}, "all three engines")
    for answer in (f"cmpl-{number}" for number in range(50)):
        assert sender.standby(answer) is sender._open()[choose_standby(answer, engines.keys())]


def test_an_engine_that_is_not_there_is_no_standby(sender, other):
    gone, there = other(), other()
    gone.receiver.close()
    sender.follow({"b": gone.receiver.address, "c": there.receiver.address})
    wait_until(lambda: names(sender) == {"c"}, "the only one there")
    assert {sender.standby(str(number)) for number in range(20)} == {sender._open()["c"]}


def test_an_engine_that_can_not_be_reached_is_left_alone_for_a_while(sender, other, caplog):
    caplog.set_level(logging.INFO, block_links.__name__)
    gone = other()
    gone.receiver.close()
    for _ in range(20):
        sender.follow({"b": gone.receiver.address})
        wait_until(lambda: "takes no copies" in caplog.text, "a word of it")
    assert caplog.text.count("takes no copies") == 1


def test_an_engine_that_leaves_is_no_standby_any_more_and_may_come_back(sender, other):
    there = other()
    for _ in range(3):
        sender.follow({"b": there.receiver.address})
        link = wait_for_link(sender)
        link.send(run := run_of(), note_of(run))
        assert there.next_run().digests == run.digests
        sender.follow({})
        assert sender.standby("answer") is None
        assert not link.has_room


def test_an_engine_that_dies_is_no_standby_any_more(sender, tmp_path):
    with_its_end = Listener(SECRET, "other", tmp_path, "127.0.0.1")
    sender.follow({"b": str(with_its_end.address)})
    link_there = with_its_end.accept(DEADLINE_S)
    link = wait_for_link(sender)
    link_there.close()
    with_its_end.close()

    def is_given_up() -> bool:
        assert link.heard() == []
        return sender.standby("answer") is None

    wait_until(is_given_up, "the loss")


def test_little_waits_for_an_engine_that_does_not_keep_up(sender, other, monkeypatch):
    monkeypatch.setattr(block_links, "MAX_QUEUED_BYTES", 20 * 4 * ROW_SIZE)
    there = other(is_prompt=False)
    sender.follow({"b": there.receiver.address})
    link = wait_for_link(sender)
    idle_since = time.monotonic()
    while time.monotonic() - idle_since < 0.5:  # until the sockets are full, too
        if link.has_room:
            link.send(run := run_of(), note_of(run))
            idle_since = time.monotonic()
        else:
            time.sleep(0.01)
    assert there.runs.qsize() == MAX_RUNS
    there.answers.get()(1)
    wait_until(lambda: there.runs.qsize() == MAX_RUNS + 1, "the next run")


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
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE), meta=b""),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE), meta=bytes(DIGEST_BYTES + 1)),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE - 1), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.COPY, torch.zeros(2, ROW_SIZE), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.COPY, torch.zeros(1, ROW_SIZE, dtype=torch.bfloat16), meta=bytes(DIGEST_BYTES)),
        frame_of(Kind.WEIGHTS, torch.zeros(1, ROW_SIZE), meta=bytes(DIGEST_BYTES)),
    ],
    ids=["nothing", "no digest", "odd digests", "short row", "too many rows", "bf16", "weights"],
)
def test_a_peer_that_sends_anything_else_is_cut_off_and_nobody_else(sender, other, frame):
    there = other()
    link = connect(Address.parse(there.receiver.address), SECRET, "odd")
    link.send(frame)
    with pytest.raises(LinkLost):
        link.receive(DEADLINE_S)
    sender.follow({"b": there.receiver.address})
    wait_for_link(sender).send(run := run_of(), note_of(run))
    assert there.next_run().digests == run.digests


@pytest.mark.parametrize("frame", [Frame(Kind.HELD, 1), Frame(Kind.TOKENS, 1, meta=bytes(4))])
def test_a_standby_that_answers_anything_else_is_one_no_more(sender, tmp_path, frame):
    listener = Listener(SECRET, "other", tmp_path, "127.0.0.1")
    sender.follow({"b": str(listener.address)})
    link_there = listener.accept(DEADLINE_S)
    link = wait_for_link(sender)
    link.send(run := run_of(), note_of(run))
    link_there.send(frame)
    wait_until(lambda: link.heard() == [] and not link.is_open, "the end of it")
    listener.close()
    link_there.close()


def test_nothing_is_left_behind(tmp_path):
    before = Belongings.now()
    for is_prompt in (True, False):
        there, sender = Other(tmp_path, is_prompt), BlockSender(SECRET, "one")
        sender.follow({"b": there.receiver.address})
        link = wait_for_link(sender)
        for _ in range(MAX_RUNS):
            link.send(run := run_of(), note_of(run))
        there.next_run()
        sender.close()
        there.receiver.close()
        del there, sender, link
    assert not before.leaks(), [thread.name for thread in threading.enumerate()]
