"""Slots filled from real groups and real checkpoints, while rows run and peers fail."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
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
from torch import Tensor

from router.links.address import Address
from router.links.base import Frame, Kind, Link, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of, rows_of
from router.links.stream import StreamLink, connect
from shards.checkpoint import Checkpoint, Part
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import pack
from shards.layers.mlp import GatedMlp
from shards.staging import Stager
from shards.weights_wire import weights_frames
from tests.shards.tiny_models import TinyModel, save_random_model

SECRET = b"one cluster's secret"
ALL = tuple(product(range(3), range(4)))  # of the tiny mixtral


class GatedCheckpoint(Checkpoint):
    """Lets tensors be read only as far as it is told; counts those that were asked for, by name."""

    def __init__(self, directory: Path, permits: int = 1_000_000) -> None:
        super().__init__(directory)
        self._changed = threading.Condition()
        self._permits = permits
        self.asked: list[str] = []

    def tensor(self, name: str, part: Part | None = None) -> Tensor:
        with self._changed:
            self.asked.append(name)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._permits > 0, 20)
            self._permits -= 1
        return super().tensor(name, part)

    def permit(self, num_tensors: int = 1_000_000) -> None:
        with self._changed:
            self._permits += num_tensors
            self._changed.notify_all()

    def wait_asked(self, num_tensors: int) -> None:
        """Wait until so many tensors have been asked for; the last of them may still be held up."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= num_tensors, 20)


class Connector:
    """Opens links, and remembers them."""

    def __init__(self) -> None:
        self.links: list[StreamLink] = []
        self.asked: list[str] = []

    def __call__(self, address: str) -> Link:
        self.asked.append(address)
        self.links.append(connect(Address.parse(address), SECRET, "stager"))
        return self.links[-1]


class Staging:
    """A store, its stager, and what they work with."""

    def __init__(self, model: TinyModel, num_slots: int = len(ALL), *, permits: int = 1_000_000) -> None:
        self.model = model
        self.store = ExpertStore(num_slots)
        self.checkpoint = GatedCheckpoint(model.directory, permits)
        self.connect = Connector()
        self.stager = Stager(self.store, self.checkpoint, model.config, self.connect, peer_timeout_s=2)

    def stage(self, *experts: tuple[int, int], address: str | None = None) -> None:
        self.stager.stage((layer, expert, address) for layer, expert in experts)

    def stage_all(self, *experts: tuple[int, int], address: str | None = None) -> None:
        self.stage(*experts, address=address)
        self.settle()

    def settle(self) -> None:
        eventually(lambda: not self.stager.pending)

    def close(self) -> None:
        self.checkpoint.permit()
        self.stager.close()


class Peer:
    """A group that serves some experts."""

    def __init__(self, model: TinyModel, experts: tuple[tuple[int, int], ...], directory: Path) -> None:
        self.store = loaded(model, experts)
        self._listener = Listener(SECRET, "peer", directory, "127.0.0.1")
        self.service = ExpertService(self.store, self._listener, model.config.hidden_size)
        self.service.start()
        self.address = str(self._listener.address)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


def loaded(model: TinyModel, experts) -> ExpertStore:
    return ExpertStore.load(model.checkpoint, model.config, experts, lambda done, total: None)


def run(store: ExpertStore, layer: int, expert: int, x_ND: Tensor) -> Tensor:
    out_ND = torch.empty_like(x_ND)
    store.run(layer, [(expert, len(x_ND))], x_ND, out_ND)
    return out_ND


def assert_bitwise(store: ExpertStore, model: TinyModel, experts=ALL) -> None:
    reference = loaded(model, experts)
    assert set(store.held) == set(experts)
    x_ND = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer, expert in experts:
        assert torch.equal(run(store, layer, expert, x_ND), run(reference, layer, expert, x_ND))


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float16], ids=str)
def model(request: pytest.FixtureRequest, tiny_model) -> TinyModel:
    return tiny_model("mixtral", request.param)


@pytest.fixture
def bf16_model(tiny_model) -> TinyModel:
    return tiny_model("mixtral", torch.bfloat16)


@pytest.fixture
def make(bf16_model: TinyModel) -> Iterator[Callable[..., Staging]]:
    made: list[Staging] = []

    def staging(model: TinyModel = bf16_model, num_slots: int = len(ALL), **knobs) -> Staging:
        made.append(Staging(model, num_slots, **knobs))
        return made[-1]

    yield staging
    for each in made:
        each.close()


@pytest.fixture
def peer_of(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def peer(model: TinyModel, experts=ALL) -> Peer:
        made.append(Peer(model, experts, tmp_path))
        return made[-1]

    yield peer
    for each in made:
        each.service.stop()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Return a starter of peers that answer each FETCH by a script; it returns their address."""
    listeners: list[Listener] = []

    def start(answer: Callable[[StreamLink, Frame], None]) -> str:
        listeners.append(listener := Listener(SECRET, "scripted", tmp_path, "127.0.0.1"))

        def serve() -> None:
            while True:
                try:
                    link = listener.accept()
                except LinkLost:
                    return
                try:
                    while True:
                        answer(link, link.receive(20))
                except LinkLost:
                    link.close()

        threading.Thread(target=serve, daemon=True).start()
        return str(listener.address)

    yield start
    for listener in listeners:
        listener.close()


def test_experts_staged_from_the_checkpoint_compute_bitwise_what_loaded_ones_do(make, model):
    staging = make(model)
    staging.stage_all(*ALL)
    assert_bitwise(staging.store, model)
    expected = sum(
        tensor.num_bytes for name, tensor in model.checkpoint.tensors.items() if ".experts." in name
    )
    assert (staging.stager.bytes_from_checkpoint, staging.stager.bytes_from_peers) == (expected, 0)
    assert staging.stager.last_failure is None


def test_experts_staged_from_a_peer_compute_bitwise_the_same_and_no_file_is_read(make, peer_of, model):
    staging, peer = make(model), peer_of(model)
    staging.stage_all(*ALL, address=peer.address)
    assert_bitwise(staging.store, model)
    assert not staging.checkpoint.asked
    assert staging.stager.bytes_from_checkpoint == 0
    assert staging.stager.bytes_from_peers == sum(
        weight.data.nbytes for key in ALL for weight in vars(staging.store.get(*key)).values()
    )


def test_one_link_serves_all_there_is_to_do_and_is_closed_behind_it(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    staging.stage_all(*ALL, address=peer.address)
    assert staging.connect.asked == [peer.address]
    eventually(lambda: peer.service.num_links == 0)
    staging.stager.free([(0, 0)])
    staging.stage_all((0, 0), address=peer.address)
    assert staging.connect.asked == [peer.address] * 2


def test_rows_run_bitwise_right_at_a_peer_that_gives_weights_meanwhile(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    link = connect(Address.parse(peer.address), SECRET, "engine")
    x_ND = torch.randn(6, bf16_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([run(peer.store, 1, 2, x_ND[:4]), run(peer.store, 1, 3, x_ND[4:])])
    for sequence in range(20):
        staging.stager.free(ALL)
        staging.stage(*ALL, address=peer.address)
        meta = np.array([(2, 4), (3, 2)], "<i4").tobytes()
        link.send(frame_of(Kind.ROWS, x_ND, sequence=sequence, layer=1, meta=meta))
        answer = link.receive(10)
        assert (answer.kind, answer.sequence) == (Kind.RESULTS, sequence)
        assert torch.equal(rows_of(answer, x_ND.size(1)), expected)
    staging.settle()
    assert_bitwise(staging.store, bf16_model)


def test_experts_that_a_peer_does_not_hold_come_from_the_checkpoint(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model, ((0, 1), (2, 3)))
    staging.stage_all((0, 0), (0, 1), (2, 2), (2, 3), address=peer.address)
    assert_bitwise(staging.store, bf16_model, ((0, 0), (0, 1), (2, 2), (2, 3)))
    assert len(staging.connect.asked) == 1  # a refusal is no reason to leave
    assert len(staging.checkpoint.asked) == 2 * 3


def test_a_peer_that_is_gone_is_tried_once_and_the_checkpoint_read(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    peer.service.stop()
    staging.stage_all(*ALL, address=peer.address)
    assert_bitwise(staging.store, bf16_model)
    assert staging.connect.asked == [peer.address]
    assert staging.stager.last_failure is None


def test_an_address_that_makes_no_sense_is_like_a_peer_that_is_gone(make, bf16_model):
    staging = make()
    staging.stage_all(*ALL[:2], address="nowhere")
    assert_bitwise(staging.store, bf16_model, ALL[:2])


def frames_for(model: TinyModel, fetch: Frame) -> Iterator[Frame]:
    return weights_frames(loaded(model, [(1, 1)]).get(1, 1), fetch.layer, fetch.sequence)


def dies_at_once(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.close()
    raise LinkLost


def dies_in_mid_transfer(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.send(next(frames_for(model, fetch)))
    link.close()
    raise LinkLost


def answers_another_question(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    for frame in weights_frames(loaded(model, [(1, 1)]).get(1, 1), fetch.layer, fetch.sequence + 1):
        link.send(frame)


def answers_with_rows(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.send(frame_of(Kind.RESULTS, torch.zeros(3, 4), sequence=fetch.sequence))


def repeats_itself(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    first = next(frames_for(model, fetch))
    for _ in range(3):
        link.send(first)


def sends_an_expert_of_another_shape(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    mlp = GatedMlp(pack(torch.zeros(64, 48)), pack(torch.zeros(48, 32)))
    for frame in weights_frames(mlp, fetch.layer, fetch.sequence):
        link.send(frame)


def says_nothing(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    pass


@pytest.mark.parametrize(
    "answer",
    [
        dies_at_once,
        dies_in_mid_transfer,
        answers_another_question,
        answers_with_rows,
        repeats_itself,
        sends_an_expert_of_another_shape,
        says_nothing,
    ],
)
def test_whatever_a_peer_does_wrong_the_checkpoint_is_read(make, scripted, bf16_model, answer):
    staging = make()
    address = scripted(lambda link, fetch: answer(bf16_model, link, fetch))
    staging.stage_all((1, 1), (1, 2), address=address)
    assert_bitwise(staging.store, bf16_model, ((1, 1), (1, 2)))
    assert staging.connect.asked == [address]  # the second expert does not wait for it again
    assert staging.stager.last_failure is None


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_thread_that_stages_steps_back_behind_those_that_serve(make):
    staging = make()
    staging.stage_all((0, 0))
    (thread,) = (each for each in threading.enumerate() if each.name == "stager")
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == min(ours + 10, 19)


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
