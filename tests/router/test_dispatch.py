"""Rows to their experts and back, over real links to real loops, against running each row alone."""

import multiprocessing
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from router.dispatch import DispatchCounts, Dispatcher, ExpertUnavailable
from router.links.base import Frame, Kind, Link, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of
from router.placement import Group, Placement
from router.pushed_placements import PushedPlacements
from tests.router.served_experts import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_LAYERS,
    SECRET,
    ServedGroup,
    dispatcher_of,
    even,
    open_link,
    placed,
    reference,
    serve_until_killed,
    some_rows,
)

pytestmark = pytest.mark.timeout(60)

DEATHS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
ALL = even(NUM_LAYERS, NUM_EXPERTS, 1)[0]
ONE_ROW = torch.zeros(1, HIDDEN_SIZE), torch.tensor([[0]])


class Watched(PushedPlacements):
    """Calls `on_look` whenever the dispatcher looks for news: in each layer, and while it waits."""

    def __init__(self, on_look: Callable[[], None], *groups: Group) -> None:
        super().__init__()
        self._on_look = on_look
        self.push(Placement(1, groups))

    def current(self) -> Placement:
        self._on_look()
        return super().current()


@pytest.fixture
def gate(serve) -> Iterator[Callable[[], threading.Event]]:
    """Return a maker of events for groups to wait for; all come when the test is over, so that groups end."""
    gates: list[threading.Event] = []

    def make() -> threading.Event:
        gates.append(threading.Event())
        return gates[-1]

    yield make
    for each in gates:
        each.set()


@pytest.fixture
def never(gate) -> threading.Event:
    return gate()


def check(dispatch: Dispatcher, seed: int, num_tokens: int = 5) -> None:
    """Run every layer and compare bitwise."""
    for layer in range(NUM_LAYERS):
        x_TD, expert_TK = some_rows(num_tokens, seed)
        assert torch.equal(dispatch(layer, x_TD, expert_TK), reference(layer, x_TD, expert_TK))


def rows_of(group: ServedGroup) -> int:
    return sum(group.service.rows_per_expert.values())


@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 300])
def test_every_row_comes_back_from_its_expert(serve, num_groups: int, num_tokens: int):
    slots_of_group = even(NUM_LAYERS, NUM_EXPERTS, num_groups)
    groups = [serve(f"g{i}", slots).group for i, slots in enumerate(slots_of_group)]
    dispatch = dispatcher_of(placed(*groups))
    check(dispatch, seed=num_tokens, num_tokens=num_tokens)


def test_no_tokens_make_no_rows(serve):
    dispatch = dispatcher_of(placed(serve("g", ALL).group))
    y_TKD = dispatch(0, torch.empty(0, HIDDEN_SIZE), torch.empty(0, 2, dtype=torch.int64))
    assert y_TKD.shape == (0, 2, HIDDEN_SIZE)


def test_replicas_give_the_same_answer_and_share_the_rows(serve):
    served = [serve(f"g{i}", ALL) for i in range(3)]
    check(dispatcher_of(placed(*(each.group for each in served))), seed=0, num_tokens=90)
    rows = [rows_of(each) for each in served]
    assert sum(rows) == NUM_LAYERS * 90 * 2
    assert max(rows) - min(rows) < 20


def dies_in_run(number: int):
    """Return a `before_run` that ends the group's loop in the middle of a question, as a kill would."""
    runs = 0

    def before_run() -> None:
        nonlocal runs
        runs += 1
        if runs == number:
            raise SystemExit

    return before_run


@DEATHS
@pytest.mark.parametrize("number", range(1, 12))
def test_rows_of_a_group_that_dies_in_a_question_come_from_the_replicas(serve, number: int):
    groups = [serve("dying", ALL, before_run=dies_in_run(number)).group, serve("other", ALL).group]
    dispatch = dispatcher_of(placed(*groups))
    check(dispatch, seed=number)
    check(dispatch, seed=number + 1)


def test_rows_go_round_a_group_that_was_dead_before_the_first_question(serve):
    dead = serve("dead", ALL)
    dispatch = dispatcher_of(placed(dead.group, serve("other", ALL).group))
    dead.kill()
    check(dispatch, seed=0)


@DEATHS
def test_a_lost_group_is_not_asked_again_under_the_same_placement(serve):
    """It is gone or ailing; only the router knows which, and says so by a newer placement."""
    dying, other = serve("dying", ALL, before_run=dies_in_run(1)), serve("other", ALL)
    connected: list[str] = []

    def connect(address: str) -> Link:
        connected.append(address)
        return open_link(address)

    dispatch = dispatcher_of(placed(dying.group, other.group), connect)
    check(dispatch, seed=0)
    check(dispatch, seed=1)
    assert sorted(connected) == sorted([dying.group.address, other.group.address])


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


@DEATHS
def test_failovers_and_the_rows_that_were_sent_again_are_counted(serve):
    groups = [serve("dying", ALL, before_run=dies_in_run(1)).group, serve("other", ALL).group]
    dispatch = dispatcher_of(placed(*groups))
    dispatch(0, torch.zeros(2, HIDDEN_SIZE), torch.tensor([[0, 1], [0, 1]]))
    assert dispatch.counts == DispatchCounts(failovers=1, rows_resent=2)


def test_between_calls_the_epoch_in_use_is_the_newest_that_has_come(serve):
    group = serve("g", ALL).group
    placements = placed(group)
    dispatch = dispatcher_of(placements)
    check(dispatch, seed=0)
    placements.push(Placement(2, (group,)))
    assert dispatch.epoch_in_use == placements.current().epoch == 2


def test_during_a_call_the_epoch_in_use_is_the_one_that_rows_were_sent_by(serve):
    epochs: list[int] = []

    def before_run() -> None:
        placements.push(Placement(2, (slow.group,)))
        epochs.append(dispatch.epoch_in_use)

    slow = serve("slow", ALL, before_run=before_run)
    placements = placed(slow.group)
    dispatch = dispatcher_of(placements)
    dispatch(0, torch.zeros(1, HIDDEN_SIZE), torch.tensor([[0]]))
    assert epochs == [1]
    assert dispatch.epoch_in_use == 2


@DEATHS
def test_without_a_replica_rows_wait_for_the_placement_that_restores_the_expert(serve):
    left, right = even(NUM_LAYERS, NUM_EXPERTS, 2)
    stays = serve("stays", left)
    dying = serve("dying", right, before_run=dies_in_run(2))

    class RestoredWhenMissed(PushedPlacements):
        def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
            self.push(Placement(2, (stays.group, serve("restored", right).group)))
            return super().wait_newer(epoch, timeout_s)

    placements = RestoredWhenMissed()
    placements.push(Placement(1, (stays.group, dying.group)))
    dispatch = dispatcher_of(placements)
    check(dispatch, seed=0)
    assert dispatch.counts.failovers == 1


def test_an_expert_that_nobody_restores_is_unavailable_after_the_deadline(serve):
    slots = [slot for slot in ALL if slot != (1, 3)]
    dispatch = dispatcher_of(placed(serve("g", slots).group), deadline_s=0.05)
    with pytest.raises(ExpertUnavailable, match="expert 3 of layer 1 has no live replica") as caught:
        dispatch(1, torch.zeros(1, HIDDEN_SIZE), torch.tensor([[2, 3]]))
    assert (caught.value.layer, caught.value.expert) == (1, 3)


def test_the_error_of_an_unavailable_expert_can_cross_a_process():
    error = ExpertUnavailable(7, 3, waited_s=60.0, last_loss="expert group 'g' is lost: why not")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_unavailable_expert_does_not_spoil_the_next_call(serve):
    slots = [slot for slot in ALL if slot != (1, 3)]
    dispatch = dispatcher_of(placed(serve("g", slots).group), deadline_s=0)
    x_TD = torch.ones(1, HIDDEN_SIZE)
    with pytest.raises(ExpertUnavailable):
        dispatch(1, x_TD, torch.tensor([[2, 3]]))
    assert torch.equal(dispatch(1, x_TD, torch.tensor([[2, 4]])), reference(1, x_TD, torch.tensor([[2, 4]])))


def test_a_group_lost_by_a_broken_link_alone_is_found_again_without_a_newer_placement(serve):
    opened: list[Link] = []

    def connect(address: str) -> Link:
        opened.append(open_link(address))
        return opened[-1]

    dispatch = dispatcher_of(placed(serve("only", ALL).group), connect)
    check(dispatch, seed=0)
    opened[0].close()
    check(dispatch, seed=1)
    assert len(opened) == 2


def test_a_newer_placement_is_followed_and_links_it_does_not_need_are_closed(serve):
    old, new = serve("old", ALL), serve("new", ALL)
    placements = placed(old.group)
    opened: dict[str, Link] = {}

    def connect(address: str) -> Link:
        opened[address] = open_link(address)
        return opened[address]

    dispatch = dispatcher_of(placements, connect)
    check(dispatch, seed=0)
    placements.push(Placement(2, (new.group,)))
    check(dispatch, seed=1)
    assert rows_of(old) == rows_of(new) == NUM_LAYERS * 10
    assert opened[old.group.address].fileno() == -1


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


@DEATHS
def test_two_engines_share_groups_while_one_of_these_dies(serve):
    left, right = even(NUM_LAYERS, NUM_EXPERTS, 2)
    groups = [
        serve("left", left).group,
        serve("right", right).group,
        serve("dying", ALL, before_run=dies_in_run(100)).group,
    ]
    failures: list[BaseException] = []

    def engine(num_tokens: int) -> None:
        try:
            dispatch = dispatcher_of(placed(*groups))
            for seed in range(30):
                check(dispatch, seed, num_tokens)
        except BaseException as error:
            failures.append(error)

    engines = [threading.Thread(target=engine, args=(num_tokens,)) for num_tokens in (3, 8)]
    for thread in engines:
        thread.start()
    for thread in engines:
        thread.join(30)
    assert failures == []


def test_nothing_is_lost_when_a_groups_process_is_killed_under_load(serve, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=serve_until_killed, args=("killed", tmp_path, queue), daemon=True)
    process.start()
    dispatch = dispatcher_of(placed(queue.get(timeout=60), serve("other", ALL).group))
    killer = threading.Thread(target=process.kill)
    for seed in range(100):
        check(dispatch, seed)
        if seed == 20:
            killer.start()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    check(dispatch, seed=100)


def test_large_frames_of_several_engines_to_all_groups_do_not_deadlock(serve):
    """Each message and each answer is many times what the sockets buffer, in both directions at once."""
    hidden_size, num_tokens = 4096, 256
    slots_of_group = even(NUM_LAYERS, NUM_EXPERTS, 2)
    groups = [serve(f"g{i}", slots, hidden_size=hidden_size).group for i, slots in enumerate(slots_of_group)]
    matches: list[bool] = []

    def engine(number: int) -> None:
        # Some engines know the groups in the other order, as after different histories.
        dispatch = dispatcher_of(placed(*groups[:: 1 if number % 2 else -1]), reply_timeout_s=20)
        x_TD, expert_TK = some_rows(num_tokens, number, hidden_size=hidden_size)
        expected = reference(0, x_TD, expert_TK)
        matches.extend(torch.equal(dispatch(0, x_TD, expert_TK), expected) for _ in range(4))

    engines = [threading.Thread(target=engine, args=(number,)) for number in range(4)]
    for thread in engines:
        thread.start()
    for thread in engines:
        thread.join(50)
    assert matches == [True] * 16


def test_the_load_is_counted_by_layer_and_expert_and_starts_over_when_taken(serve):
    dispatch = dispatcher_of(placed(serve("g", ALL).group))
    dispatch(2, torch.zeros(3, HIDDEN_SIZE), torch.tensor([[0, 7], [7, 1], [3, 7]]))
    expected = np.zeros((NUM_LAYERS, NUM_EXPERTS), np.int64)
    expected[2] = [1, 1, 0, 1, 0, 0, 0, 3]
    assert np.array_equal(dispatch.take_load(), expected)
    assert not dispatch.take_load().any()
