"""What an exchange tells those who decide whether to wait on; all else of it is in test_dispatch.py."""

import threading

import numpy as np
import pytest

from router.exchange import Batch, Wait, exchange
from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.pool import LinkPool
from router.links.stream import StreamLink
from router.placement import Group
from tests.router.links.link_pairs import unix_sockets

pytestmark = pytest.mark.timeout(60)


def batch_of(name: str, row: int) -> Batch:
    """Return one row of one number, for a group whose address is its name."""
    frame = Frame(Kind.ROWS, 7, 0, b"", Dtype.FLOAT32, 1, np.ones((1, 1), np.float32).data)
    return Batch(Group(name, name, ()), np.array([row]), frame)


def link_to(name: str) -> tuple[StreamLink, StreamLink]:
    """Return our end of a link to a group, and the group's."""
    ours, theirs = unix_sockets()
    return StreamLink(ours, name), StreamLink(theirs, "engine")


def test_time_counts_from_the_last_answer_too_and_who_has_answered_owes_nothing():
    ends = {name: link_to(name) for name in "ab"}
    y_ND = np.zeros((2, 1), np.float32)
    waits: list[Wait] = []

    def why_hopeless(batch: Batch, wait: Wait) -> str | None:
        if "a" not in wait.owing:
            waits.append(wait)
            return "enough"
        answer = np.full((1, 1), 3, np.float32).data
        if batch.group.name == "a":
            ends["a"][1].send(Frame(Kind.RESULTS, 7, 0, b"", Dtype.FLOAT32, 1, answer))
        return None

    links = LinkPool(lambda address: ends[address][0])
    ((batch, error),) = exchange([batch_of("a", 1), batch_of("b", 0)], links, y_ND, why_hopeless)
    assert (batch.group.name, str(error)) == ("b", "enough")
    assert y_ND.tolist() == [[0], [3]]
    assert set(waits[0].owing) == {"b"}
    assert waits[0].quiet_s < waits[0].waited_s
    assert (links.is_open("a"), links.is_open("b")) == (True, False)
    links.close()


def test_nobody_waits_for_answers_while_another_group_is_connected_to():
    """A host that has vanished takes as long to give up as a slow group does."""
    ours, _ = link_to("there")
    waits: list[Wait] = []

    def connect(address: str) -> StreamLink:
        if address == "there":
            return ours
        threading.Event().wait(1)
        raise LinkLost("nobody answers")

    def why_hopeless(batch: Batch, wait: Wait) -> str:
        waits.append(wait)
        return "enough"

    batches = [batch_of("there", 0), batch_of("vanished", 1)]
    lost = exchange(batches, LinkPool(connect), np.zeros((2, 1), np.float32), why_hopeless)
    assert {batch.group.name: str(error) for batch, error in lost} == {
        "vanished": "nobody answers",
        "there": "enough",
    }
    assert waits[0].waited_s < 1
    assert set(waits[0].owing) == {"there", "vanished"}
