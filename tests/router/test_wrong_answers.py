"""Groups that answer with an error, too late, or are not who they should be."""

import socket

import pytest
import torch

from router.dispatch import ExpertUnavailable
from router.links.base import Frame, Kind, Link, LinkLost
from router.links.rows import frame_of
from router.placement import Group
from tests.router.served_experts import (
    ALL,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    check,
    dispatcher_of,
    even,
    open_link,
    placed,
    rows_of,
)

pytestmark = pytest.mark.timeout(60)


def fails_in_run(number: int):
    """Return a `before_run` that makes the group report an error for one question."""
    runs = 0

    def before_run() -> None:
        nonlocal runs
        runs += 1
        if runs == number:
            raise OverflowError("no room")

    return before_run


@pytest.mark.parametrize("number", [1, 5])
def test_rows_of_a_group_that_reports_an_error_come_from_the_replicas(serve, number: int, caplog):
    groups = [serve("bad", ALL, before_run=fails_in_run(number)).group, serve("other", ALL).group]
    dispatch = dispatcher_of(placed(*groups))
    check(dispatch, seed=0)
    check(dispatch, seed=1)
    assert "expert group 'bad' is lost: it reports: " in caplog.text


def test_without_a_replica_a_group_that_reported_an_error_is_asked_again(serve):
    left, right = even(NUM_LAYERS, NUM_EXPERTS, 2)
    groups = [serve("bad", left, before_run=fails_in_run(1)).group, serve("good", right).group]
    dispatch = dispatcher_of(placed(*groups))
    check(dispatch, seed=0)
    check(dispatch, seed=1)


def test_an_unavailable_expert_tells_what_its_group_reported(serve):
    def fail() -> None:
        raise OverflowError("no room")

    dispatch = dispatcher_of(placed(serve("bad", ALL, before_run=fail).group), deadline_s=0)
    with pytest.raises(ExpertUnavailable, match=r"expert group 'bad' is lost: it reports: .*no room"):
        check(dispatch, seed=0)


def test_rows_never_go_to_another_group_that_answers_at_the_address(serve):
    impostor, other = serve("impostor", ALL), serve("other", ALL)
    opened: dict[str, Link] = {}

    def connect(address: str) -> Link:
        opened[address] = open_link(address)
        return opened[address]

    moved = Group("moved", impostor.group.address, ALL)
    dispatch = dispatcher_of(placed(moved, other.group), connect)
    check(dispatch, seed=0)
    assert rows_of(impostor) == 0
    assert opened[moved.address].fileno() == -1


def test_an_unavailable_expert_tells_that_another_process_answers(serve):
    moved = Group("moved", serve("impostor", ALL).group.address, ALL)
    dispatch = dispatcher_of(placed(moved), deadline_s=0)
    with pytest.raises(ExpertUnavailable, match="'moved' is lost: another process answers there: 'impostor'"):
        check(dispatch, seed=0)


class AnswersLate:
    """A link whose peer first sends the answer to an older question."""

    peer = "late"

    def __init__(self) -> None:
        self._readable, writable = socket.socketpair()
        writable.close()  # end of file: a poller says that there is something to read

    def post(self, frame: Frame) -> bool:
        self._question = frame
        return True

    def flush(self) -> bool:
        return True

    def poll(self) -> Frame:
        rows_ND = torch.zeros(self._question.num_rows, HIDDEN_SIZE)
        return frame_of(Kind.RESULTS, rows_ND, sequence=self._question.sequence - 1)

    def fileno(self) -> int:
        return self._readable.fileno()

    def close(self) -> None:
        self._readable.close()


def test_the_answer_to_an_older_question_is_never_taken():
    link = AnswersLate()
    placements = placed(Group("late", "address", ALL))
    dispatch = dispatcher_of(placements, lambda address: link, deadline_s=0)
    with pytest.raises(ExpertUnavailable):
        dispatch(0, torch.zeros(1, HIDDEN_SIZE), torch.tensor([[0, 1]]))
    assert link.fileno() == -1


def test_a_group_that_refuses_links_counts_as_lost():
    def refuse(address: str):
        raise LinkLost("nobody there")

    placements = placed(Group("gone", "address", ALL))
    dispatch = dispatcher_of(placements, refuse, deadline_s=0.01)
    with pytest.raises(ExpertUnavailable):
        dispatch(0, torch.zeros(1, HIDDEN_SIZE), torch.tensor([[0, 1]]))
