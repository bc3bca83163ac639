"""Wishes come and are cancelled while experts are read: no slot is lost, and nothing freed comes back."""

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from router.links.base import Frame
from router.links.stream import StreamLink
from tests.shards.live_staging import (
    ALL,
    Staging,
    assert_bitwise,
    bf16_model,
    eventually,
    frames_for,
    loaded,
    make,
    scripted,
)
from tests.shards.tiny_models import TinyModel, save_random_model

__all__ = ["bf16_model", "make", "scripted"]  # fixtures, which tests ask for by name


def test_a_second_wish_for_an_expert_that_is_read_queued_or_held_is_ignored(make, bf16_model):
    staging = make(permits=0)
    staging.stage((0, 0), (0, 1))
    staging.checkpoint.wait_asked(1)
    staging.stage((0, 0), (0, 1), (0, 1))
    assert staging.stager.pending == {(0, 0), (0, 1)}
    staging.checkpoint.permit()
    staging.settle()
    staging.stage_all((0, 0), (0, 1))
    assert len(staging.checkpoint.asked) == 2 * 3
    assert_bitwise(staging.store, bf16_model, ((0, 0), (0, 1)))


def test_experts_are_staged_in_the_order_in_which_they_were_wished_for(make):
    staging = make(permits=0)
    staging.stage((2, 0), (0, 3))
    staging.stage((1, 1))
    staging.checkpoint.permit()
    staging.settle()
    assert staging.store.held == ((2, 0), (0, 3), (1, 1))


def test_an_expert_freed_while_it_waits_is_never_read(make):
    staging = make(permits=0)
    staging.stage((0, 0), (0, 1))
    staging.checkpoint.wait_asked(1)
    staging.stager.free([(0, 1)])
    staging.checkpoint.permit()
    staging.settle()
    assert staging.store.held == ((0, 0),)
    assert len(staging.checkpoint.asked) == 3


def test_an_expert_freed_while_it_is_read_is_read_no_further_and_never_appears(make):
    staging = make(permits=0)
    staging.stage((0, 0), (0, 1))
    staging.checkpoint.wait_asked(1)
    staging.stager.free([(0, 0)])
    assert staging.stager.pending == {(0, 1)}
    staging.checkpoint.permit()
    staging.settle()
    assert staging.store.held == ((0, 1),)
    assert len(staging.checkpoint.asked) == 1 + 3


def test_an_expert_freed_while_a_peer_sends_it_never_appears(make, scripted, bf16_model):
    staging = make()
    frees: list[Callable[[], None]] = [lambda: staging.stager.free([(1, 1)])]

    def answer(link: StreamLink, fetch: Frame) -> None:
        if frees:
            frees.pop()()
        for frame in frames_for(bf16_model, fetch):
            link.send(frame)

    staging.stage_all((1, 1), (1, 2), address=scripted(answer))
    assert staging.store.held == ((1, 2),)
    assert len(staging.connect.asked) == 2  # what was under way is not taken for the next


def test_an_expert_wished_for_again_while_its_cancelled_read_goes_on_is_read_anew(make, bf16_model):
    staging = make(permits=0)
    staging.stage((0, 0))
    staging.checkpoint.wait_asked(1)
    staging.stager.free([(0, 0)])
    staging.stage((0, 0))
    staging.checkpoint.permit()
    staging.settle()
    assert_bitwise(staging.store, bf16_model, ((0, 0),))
    assert len(staging.checkpoint.asked) == 1 + 3


def test_freeing_empties_the_slot(make):
    staging = make()
    staging.stage_all((0, 0), (0, 1))
    staging.stager.free([(0, 0), (2, 2)])
    assert staging.store.held == ((0, 1),)


def test_an_expert_without_a_free_slot_is_not_read_and_can_be_wished_for_again(make):
    staging = make(num_slots=1)
    staging.stage_all((0, 0), (0, 1))
    assert staging.store.held == ((0, 0),)
    assert staging.stager.last_failure == "layer 0 expert 1: all 1 slots are filled; free one first"
    assert len(staging.checkpoint.asked) == 3
    staging.stager.free([(0, 0)])
    staging.stage_all((0, 1))
    assert staging.store.held == ((0, 1),)
    assert staging.stager.last_failure is None


def test_an_expert_that_can_not_be_read_is_given_up_and_the_next_is_staged(make, tmp_path):
    save_random_model("mixtral", torch.bfloat16, tmp_path)
    staging = make(TinyModel(tmp_path))
    layer, expert = 7, 0  # which the checkpoint does not have
    staging.stage_all((layer, expert), (0, 1))
    assert staging.store.held == ((0, 1),)
    assert "layer 7 expert 0: " in staging.stager.last_failure
    assert "model.layers.7.block_sparse_moe.experts.0.w1.weight" in staging.stager.last_failure


def test_closing_ends_the_thread_with_much_left_to_do(make):
    staging = make(permits=0)
    staging.stage(*ALL)
    staging.checkpoint.wait_asked(1)
    closing = threading.Thread(target=staging.stager.close)
    closing.start()
    eventually(lambda: not staging.stager.pending)
    staging.checkpoint.permit()
    closing.join(20)
    assert not closing.is_alive()
    assert staging.store.held == ()
    assert len(staging.checkpoint.asked) == 1


EXPERT = st.sampled_from(ALL[:6])
NUM_SLOTS = 3


class Slots(RuleBasedStateMachine):
    """Wishes come and are cancelled while experts are read tensor by tensor; a model says what must be."""

    model: TinyModel

    def __init__(self) -> None:
        super().__init__()
        self.staging = Staging(self.model, NUM_SLOTS, permits=0)
        self.held: set[tuple[int, int]] = set()
        self.pending: list[tuple[int, int]] = []
        self.num_asked = 0  # tensors, since the start
        self.is_reading = False  # the first of `pending`, or one that was cancelled meanwhile
        self.is_wanted = False
        self.num_read = 0  # tensors of the expert that is being read

    @rule(experts=st.lists(EXPERT, min_size=1, max_size=4))
    def stage(self, experts) -> None:
        self.staging.stage(*experts)
        self.pending += [e for e in dict.fromkeys(experts) if e not in self.held and e not in self.pending]
        self.go_on()

    @rule(experts=st.lists(EXPERT, min_size=1, max_size=3))
    def free(self, experts) -> None:
        self.staging.stager.free(experts)
        if self.is_wanted and self.pending[0] in experts:
            self.is_wanted = False
        self.pending = [expert for expert in self.pending if expert not in experts]
        self.held -= set(experts)

    @precondition(lambda self: not self.pending)  # a slot taken behind the stager's back is one it may lack
    @rule(expert=EXPERT)
    def put(self, expert) -> None:
        mlp = loaded(self.model, [expert]).get(*expert)
        if expert not in self.held and len(self.held) < NUM_SLOTS:
            self.staging.store.put(*expert, mlp)
            self.held.add(expert)
        else:
            with pytest.raises(ValueError, match=r"held already|no slot is free"):
                self.staging.store.put(*expert, mlp)

    @precondition(lambda self: self.is_reading)
    @rule()
    def read_one_tensor(self) -> None:
        self.staging.checkpoint.permit(1)
        self.num_read += 1
        if self.is_wanted and self.num_read < 3:
            self.num_asked += 1
        else:
            if self.is_wanted:
                self.held.add(self.pending.pop(0))
            self.is_reading = self.is_wanted = False
        self.go_on()

    def go_on(self) -> None:
        """Do as the thread does until it asks for a tensor or has nothing to do, and wait for it there."""
        while self.pending and not self.is_reading:
            if len(self.held) == NUM_SLOTS:
                self.pending.pop(0)  # given up
            else:
                self.is_reading, self.is_wanted, self.num_read = True, True, 0
                self.num_asked += 1
        self.staging.checkpoint.wait_asked(self.num_asked)
        eventually(lambda: self.staging.stager.pending == frozenset(self.pending))

    @invariant()
    def holds_and_reads_what_it_must(self) -> None:
        assert set(self.staging.store.held) == self.held
        assert self.staging.stager.pending == frozenset(self.pending)
        assert len(self.staging.checkpoint.asked) == self.num_asked
        assert len(self.held) + self.is_wanted <= NUM_SLOTS

    def teardown(self) -> None:
        self.staging.close()
        assert set(self.staging.store.held) == self.held


def test_no_slot_is_lost_and_nothing_freed_comes_back(bf16_model):
    class SlotsOfModel(Slots):
        model = bf16_model

    run_state_machine_as_test(
        SlotsOfModel, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
