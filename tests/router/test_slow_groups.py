"""How long a dispatcher waits for a group that does not answer, and for whom it does not wait."""

import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from router.dispatch import DispatchCounts, ExpertUnavailable
from router.links.base import Link
from router.links.listener import Listener
from router.placement import Group, Placement
from tests.router.served_experts import (
    ALL,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SECRET,
    Watched,
    check,
    dispatcher_of,
    even,
    open_link,
    placed,
    reference,
    rows_of,
    some_rows,
)

pytestmark = pytest.mark.timeout(60)

ONE_ROW = torch.zeros(1, HIDDEN_SIZE), torch.tensor([[0]])


def test_the_only_group_that_holds_an_expert_is_lost_if_it_does_not_answer_in_time(serve, never):
    stuck = serve("stuck", ALL, before_run=never.wait)
    dispatch = dispatcher_of(placed(stuck.group), reply_timeout_s=0.1, deadline_s=0)
    with pytest.raises(ExpertUnavailable, match=r"'stuck' is lost: no answer within 0\.1 s$"):
        dispatch(0, *ONE_ROW)


@pytest.mark.parametrize("name_of_the_next", ["other", "stuck"])
def test_a_group_that_the_router_gives_up_is_not_waited_for_any_longer(
    serve, never, name_of_the_next: str, caplog
):
    """Its process is stopped: its sockets are open, and it will not answer. Its name may be used again."""
    asked = threading.Event()

    def before_run() -> None:
        asked.set()
        never.wait()

    stuck, other = serve("stuck", ALL, before_run=before_run), serve(name_of_the_next, ALL)
    placements = placed(stuck.group)

    def give_up() -> None:
        asked.wait(10)
        placements.push(Placement(2, (other.group,)))

    router = threading.Thread(target=give_up)
    router.start()
    dispatch = dispatcher_of(placements, doubt_after_s=3600, reply_timeout_s=3600)
    check(dispatch, seed=0)
    router.join(10)
    assert dispatch.counts.failovers == 1
    assert "'stuck' is lost: the router took it out of placement 2" in caplog.text


def test_a_slow_group_is_given_up_sooner_if_others_can_answer(serve, never, caplog):
    """Not even the router may have noticed: it may be on the wrong side of a broken network."""
    stuck = serve("stuck", ALL, before_run=never.wait)
    dispatch = dispatcher_of(
        placed(stuck.group, serve("other", ALL).group), doubt_after_s=0.1, reply_timeout_s=3600
    )
    check(dispatch, seed=0)
    assert dispatch.counts.failovers == 1
    assert "'stuck' is lost: no answer for 0.1 s, and others can be asked" in caplog.text


def test_a_group_that_reads_nothing_is_given_up_as_soon(serve, tmp_path: Path, caplog):
    """Its process is stopped, and the rows are more than the sockets hold."""
    hidden_size = 4096
    opened: dict[str, Link] = {}

    def connect(address: str) -> Link:
        opened[address] = open_link(address)
        return opened[address]

    with closing(Listener(SECRET, "stopped", tmp_path, "127.0.0.1")) as listener:
        stopped = Group("stopped", str(listener.address), ALL)
        other = serve("other", ALL, hidden_size=hidden_size).group
        dispatch = dispatcher_of(placed(stopped, other), connect, doubt_after_s=0.1, reply_timeout_s=3600)
        x_TD, expert_TK = some_rows(500, 0, hidden_size=hidden_size)
        assert torch.equal(dispatch(0, x_TD, expert_TK), reference(0, x_TD, expert_TK))
    assert "'stopped' is lost: no answer for 0.1 s, and others can be asked" in caplog.text
    assert opened[stopped.address].fileno() == -1  # half a question is on it


def test_a_group_that_computes_for_another_engine_does_not_keep_others_from_their_rows(serve, gate):
    """It reads nothing meanwhile, and the rows are more than the sockets hold."""
    hidden_size = 4096
    left, right = even(NUM_LAYERS, NUM_EXPERTS, 2)
    is_busy, others_have_rows = threading.Event(), gate()

    def before_run() -> None:
        is_busy.set()
        others_have_rows.wait()

    busy = serve("busy", left, hidden_size=hidden_size, before_run=before_run).group
    free = serve("free", right, hidden_size=hidden_size, before_run=others_have_rows.set).group
    another_engine = threading.Thread(
        target=dispatcher_of(placed(busy)), args=(0, torch.zeros(1, hidden_size), torch.tensor([[0]]))
    )
    another_engine.start()
    assert is_busy.wait(10)
    dispatch = dispatcher_of(placed(busy, free))
    expert_TK = torch.tensor([[0]] * 600 + [[1]] * 400)  # who has more rows gets them first: the busy one
    x_TD, _ = some_rows(1000, 0, hidden_size=hidden_size)
    assert torch.equal(dispatch(0, x_TD, expert_TK), reference(0, x_TD, expert_TK))
    assert dispatch.counts == DispatchCounts()
    another_engine.join(10)


def test_a_group_that_alone_was_asked_is_given_up_if_another_could_have_been(serve, never):
    asked: list[str] = []

    def before_run() -> None:
        asked.append("one of them")
        if len(asked) == 1:
            never.wait()

    groups = [serve(name, ALL, before_run=before_run).group for name in ("a", "b")]
    dispatch = dispatcher_of(placed(*groups), doubt_after_s=0.1, reply_timeout_s=3600)
    dispatch(0, *ONE_ROW)
    assert dispatch.counts == DispatchCounts(failovers=1, rows_resent=1)


def test_groups_that_are_all_slow_are_all_waited_for(serve, gate):
    """It is the rows that take long: a big prompt. To give up everybody would not make it shorter."""
    may_answer = gate()

    def on_look() -> None:
        if time.monotonic() > began_at + 1:
            may_answer.set()

    groups = [serve(name, ALL, before_run=may_answer.wait).group for name in ("a", "b")]
    dispatch = dispatcher_of(Watched(on_look, *groups), doubt_after_s=0.5, deadline_s=0)
    began_at = time.monotonic()
    dispatch(0, *some_rows(5, seed=0))
    assert dispatch.counts == DispatchCounts()


def test_a_group_is_not_given_up_right_after_another_was_slow(serve, gate):
    first_may, second_may = gate(), gate()
    answered_at: list[float] = []

    def on_look() -> None:
        now = time.monotonic()
        if now > began_at + 1:
            first_may.set()
        if rows_of(first):
            answered_at.append(now)
        if answered_at and now > answered_at[0] + 0.2:
            second_may.set()

    first = serve("first", ALL, before_run=first_may.wait)
    second = serve("second", ALL, before_run=second_may.wait)
    placements = Watched(on_look, first.group, second.group)
    dispatch = dispatcher_of(placements, doubt_after_s=0.7, deadline_s=0)
    began_at = time.monotonic()
    dispatch(0, *some_rows(5, seed=0))
    assert dispatch.counts == DispatchCounts()


def test_rows_for_which_one_group_was_given_up_are_waited_for(serve, gate, never):
    """They may take everybody long, and a third group would take no less."""
    asked: list[float] = []
    may_answer = gate()

    def on_look() -> None:
        if len(asked) > 1 and time.monotonic() > asked[1] + 0.5:
            may_answer.set()

    def before_run() -> None:
        asked.append(time.monotonic())
        (never if len(asked) == 1 else may_answer).wait()

    groups = [serve(name, ALL, before_run=before_run).group for name in ("a", "b", "c")]
    dispatch = dispatcher_of(Watched(on_look, *groups), doubt_after_s=0.1)
    dispatch(0, *ONE_ROW)
    assert (len(asked), dispatch.counts.failovers) == (2, 1)


def test_a_group_that_has_come_is_linked_to_in_the_background_while_others_serve(serve):
    """Its machine may be slow to answer, and no step must wait for it."""
    old, new = serve("old", ALL), serve("new", ALL)
    may_connect, connected = threading.Event(), threading.Event()

    def connect(address: str) -> Link:
        if address == old.group.address:
            return open_link(address)
        may_connect.wait(20)
        try:
            return open_link(address)
        finally:
            connected.set()

    placements = placed(old.group)
    dispatch = dispatcher_of(placements, connect)
    check(dispatch, seed=0)
    placements.push(Placement(2, (old.group, new.group)))
    check(dispatch, seed=1)
    assert rows_of(new) == 0
    may_connect.set()
    connected.wait(10)
    deadline = time.monotonic() + 10
    while not rows_of(new):
        assert time.monotonic() < deadline, "the new group was never asked"
        check(dispatch, seed=2)


def test_a_newer_placement_that_keeps_the_group_does_not_disturb_the_wait_for_its_answer(serve):
    asked, go_on = threading.Event(), threading.Event()

    def before_run() -> None:
        asked.set()
        go_on.wait(20)

    slow = serve("slow", ALL, before_run=before_run)
    placements = placed(slow.group)

    def move() -> None:
        asked.wait(10)
        placements.push(Placement(2, (slow.group, serve("another", ALL).group)))
        go_on.set()

    router = threading.Thread(target=move)
    router.start()
    dispatch = dispatcher_of(placements)
    check(dispatch, seed=0)
    router.join(10)
    assert dispatch.counts == DispatchCounts()
