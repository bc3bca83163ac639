"""Rows to their experts and back, over real links to real loops, against running each row alone."""

import multiprocessing
import pickle
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from router.dispatch import DispatchCounts, ExpertUnavailable
from router.links.base import Link
from router.placement import Placement
from router.pushed_placements import PushedPlacements
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
    reference,
    rows_of,
    serve_until_killed,
    some_rows,
)

pytestmark = pytest.mark.timeout(60)

DEATHS = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


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
