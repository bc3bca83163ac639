"""The loop of an expert group, asked over real links by engines of every temper."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from router.links.address import Address
from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of, rows_of
from router.links.stream import StreamLink, connect
from router.links.wire import MAX_FRAME_BYTES, encode
from shards.config import ModelConfig
from shards.expert_service import ExpertService
from shards.expert_store import NotHeld
from shards.kernels.cpu import pack
from shards.layers.mlp import GatedMlp
from shards.weights_wire import fetch_frame, receive_mlp
from tests.router.links.hostile_bytes import announced

SECRET = b"one cluster's secret"
HIDDEN_SIZE = 8
HELD = {(0, 0): 1, (0, 1): 2, (1, 0): 3, (1, 1): 4}  # and what each multiplies by
CONFIG = ModelConfig("MixtralForCausalLM", 97, HIDDEN_SIZE, 2, 1, 1, 16, 16000, 128, 1e4, 1e-5, False)


class ScalingStore:
    """Experts that scale. Notes what ran, and may be held up, made to fail, or given real weights."""

    def __init__(self) -> None:
        self.forget()
        self.weights: dict[tuple[int, int], GatedMlp] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    def forget(self) -> None:
        self.ran: list[tuple[int, int, int]] = []  # (layer, expert, rows)
        self.is_running = threading.Semaphore(0)

    def get(self, layer: int, expert: int) -> GatedMlp:
        if (layer, expert) not in self.weights:
            raise NotHeld(layer, expert)
        return self.weights[layer, expert]

    def run(self, layer: int, runs: Sequence[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        self.is_running.release()
        assert self.go_on.wait(10)
        if self.error:
            raise self.error
        for expert, _ in runs:
            if (layer, expert) not in HELD:
                raise NotHeld(layer, expert)
        scale_N = [HELD[layer, expert] for expert, count in runs for _ in range(count)]
        out_ND.copy_(x_ND * torch.tensor(scale_N)[:, None])
        self.ran += [(layer, expert, count) for expert, count in runs]


class Served:
    def __init__(self, directory: Path, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.store = ScalingStore()
        self._listener = Listener(SECRET, "group", directory, "127.0.0.1", max_frame_bytes=max_frame_bytes)
        self.service = ExpertService(self.store, self._listener, HIDDEN_SIZE)
        self.service.start()

    @property
    def address(self) -> Address:
        return self._listener.address

    def link(self, name: str = "engine") -> StreamLink:
        return connect(self.address, SECRET, name)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.store.go_on.set()
    served.service.stop()


def question(runs: Sequence[tuple[int, int]], x_ND: Tensor, sequence: int = 5, layer: int = 0) -> Frame:
    meta = np.array(runs, "<i4").reshape(-1, 2).tobytes()
    return frame_of(Kind.ROWS, x_ND, sequence=sequence, layer=layer, meta=meta)


def rows(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def answer(link: StreamLink) -> Tensor:
    frame = link.receive(10)
    assert frame.kind == Kind.RESULTS, bytes(frame.meta)
    return rows_of(frame, HIDDEN_SIZE).clone()


def assert_serves(link: StreamLink) -> None:
    x_ND = rows(1)
    link.send(question([(0, 1)], x_ND))
    assert torch.equal(answer(link), x_ND)


def test_each_run_of_rows_goes_through_its_expert_and_comes_back_in_order(served: Served):
    link, x_ND = served.link(), rows(6)
    link.send(question([(1, 2), (0, 3), (1, 1)], x_ND, sequence=77))
    frame = link.receive(5)
    assert (frame.kind, frame.sequence, frame.layer) == (Kind.RESULTS, 77, 0)
    scale_N = torch.tensor([2, 2, 1, 1, 1, 2])
    assert torch.equal(rows_of(frame, HIDDEN_SIZE), x_ND * scale_N[:, None])


@pytest.mark.parametrize("runs", [[], [(1, 0)]])
def test_no_rows_get_an_answer_without_rows(served: Served, runs: list[tuple[int, int]]):
    link = served.link()
    link.send(question(runs, rows(0)))
    assert answer(link).shape == (0, HIDDEN_SIZE)


def test_rows_of_several_engines_that_wait_for_an_expert_run_together(served: Served):
    first, *others = links = [served.link(f"engine {n}") for n in range(4)]
    for link in links:
        assert_serves(link)
    served.store.forget()
    served.store.go_on.clear()
    first.send(question([(1, 1)], rows(1), layer=1))
    assert served.store.is_running.acquire(timeout=5)  # from here on, questions wait
    x_ND = [rows(n + 1, seed=n) for n in range(3)]
    for link, x in zip(others, x_ND, strict=True):
        link.send(question([(0, len(x) - 1), (1, 1)], x))
    served.store.go_on.set()
    assert torch.equal(answer(first), rows(1) * 4)
    for link, x in zip(others, x_ND, strict=True):
        assert torch.equal(answer(link), torch.cat([x[:-1], x[-1:] * 2]))
    assert sorted(served.store.ran) == [(0, 0, 3), (0, 1, 3), (1, 1, 1)]


def test_a_question_for_an_expert_that_is_not_held_leaves_those_beside_it_their_answers(served: Served):
    first, *others = links = [served.link(f"engine {n}") for n in range(4)]
    for link in links:
        assert_serves(link)
    served.store.go_on.clear()
    first.send(question([(1, 1)], rows(1), layer=1))
    assert served.store.is_running.acquire(timeout=5)  # from here on, questions wait
    asked = [[(0, 1), (1, 1)], [(1, 1), (7, 1)], [(1, 2)]]
    for link, runs in zip(others, asked, strict=True):
        link.send(question(runs, rows(2)))
    served.store.go_on.set()
    answer(first)
    assert torch.equal(answer(others[0]), rows(2) * torch.tensor([[1], [2]]))
    refusal = others[1].receive(5)
    assert (refusal.kind, bytes(refusal.meta)) == (Kind.ERROR, b"layer 0 expert 7 is not held here")
    assert torch.equal(answer(others[2]), rows(2) * 2)


def test_rows_are_counted_by_layer_and_expert(served: Served):
    link = served.link()
    for layer in (0, 1, 1):
        link.send(question([(0, 1), (1, 4)], rows(5), layer=layer))
        answer(link)
    assert served.service.rows_per_expert == {(0, 0): 1, (0, 1): 4, (1, 0): 2, (1, 1): 8}


def test_time_counts_as_busy_while_rows_run_and_not_while_none_are_here(served: Served):
    assert served.service.busy_s == 0
    link = served.link()
    started_s = time.perf_counter()
    assert_serves(link)
    assert 0 < served.service.busy_s < time.perf_counter() - started_s


def test_links_are_counted_while_they_last(served: Served):
    kept, closed = served.link("kept"), served.link("closed")
    assert_serves(kept)
    assert_serves(closed)
    assert served.service.num_links == 2
    closed.close()
    assert_serves(kept)  # the loop has seen the end of the other by the time it answers a second question
    assert_serves(kept)
    assert served.service.num_links == 1


def text_of_error(link: StreamLink, frame: Frame) -> str:
    link.send(frame)
    error = link.receive(5)
    assert (error.kind, error.sequence) == (Kind.ERROR, frame.sequence)
    return bytes(error.meta).decode()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (question([(4, 1)], rows(1)), "layer 0 expert 4 is not held here"),
        (question([(-1, 1)], rows(1)), "layer 0 expert -1 is not held here"),
        (question([(0, 1), (7, 2)], rows(3)), "layer 0 expert 7 is not held here"),
        (question([(0, 1)], rows(1), layer=2), "layer 2 expert 0 is not held here"),
        (question([(0, 1)], rows(1), layer=(1 << 32) - 1), "layer 4294967295 expert 0 is not held here"),
        (question([(0, 2)], rows(1)), "expert 0 can't have 2 of 1 rows"),
        (question([(0, -1), (1, 2)], rows(1)), "expert 0 can't have -1 of 1 rows"),
        (question([(0, 1)], rows(3)), "experts to 1 rows, but there are 3"),
        (question([(0, 1)], torch.zeros(1, HIDDEN_SIZE + 1)), "rows must have 8 elements; 1 rows of FLOAT32"),
        (question([(0, 1)], torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16)), "FLOAT32, not BFLOAT16"),
        (question([(0, 1)], torch.zeros(1, 2 * HIDDEN_SIZE, dtype=torch.bfloat16)), "not BFLOAT16"),
        (Frame(Kind.ROWS, 5), "FLOAT32, not NONE"),
        (Frame(Kind.ROWS, 5, meta=b"123", dtype=Dtype.FLOAT32), "3 bytes are not"),
        (Frame(Kind.TOKENS, 5), "not TOKENS"),
        (Frame(Kind.WEIGHTS, 5), "not WEIGHTS"),
        (fetch_frame(1, 9, 5), "layer 1 expert 9 is not held here"),
        (fetch_frame(1, -1, 5), "layer 1 expert -1 is not held here"),
        (Frame(Kind.FETCH, 5), "one int32, the expert, not 0 bytes"),
        (Frame(Kind.FETCH, 5, meta=b"12345678"), "one int32, the expert, not 8 bytes"),
    ],
)
def test_a_question_that_makes_no_sense_is_answered_by_what_is_wrong(
    served: Served, frame: Frame, reason: str
):
    link, bystander = served.link(), served.link("bystander")
    assert reason in text_of_error(link, frame)
    assert_serves(link)
    assert_serves(bystander)


def test_a_store_that_fails_is_reported_to_who_asked_and_serves_on(served: Served):
    link = served.link()
    served.store.error = MemoryError("no room for rows")
    assert "layer 0 failed: MemoryError('no room for rows')" in text_of_error(
        link, question([(1, 1)], rows(1))
    )
    served.store.error = None
    assert_serves(link)


def test_bytes_that_are_no_frame_cost_only_the_link_they_came_on(served: Served):
    bystander, broken = served.link("bystander"), served.link()
    os.write(broken.fileno(), b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    with pytest.raises(LinkLost):
        broken.receive(5)
    assert_serves(bystander)


def test_a_frame_for_which_there_is_no_memory_costs_only_the_link_it_came_on(tmp_path: Path):
    served = Served(tmp_path, max_frame_bytes=1 << 60)
    bystander, greedy = served.link("bystander"), served.link("greedy")
    os.write(greedy.fileno(), announced(num_rows=1 << 30, row_bytes=1 << 20))
    with pytest.raises(LinkLost):
        greedy.receive(5)
    assert_serves(bystander)
    served.service.stop()


def test_an_engine_that_stalls_in_the_middle_of_a_frame_delays_nobody(served: Served):
    stalled, other = served.link("stalled"), served.link("other")
    whole = b"".join(encode(question([(0, 100)], rows(100))))
    os.write(stalled.fileno(), whole[: len(whole) // 2])
    assert_serves(other)


def test_an_engine_that_does_not_read_its_answer_delays_nobody_and_gets_it_whole_later(served: Served):
    lazy, other = served.link("lazy"), served.link("other")
    x_ND = rows(100_000)
    lazy.send(question([(1, len(x_ND))], x_ND))
    assert served.store.is_running.acquire(timeout=5)
    assert_serves(other)
    assert torch.equal(answer(lazy), x_ND * 2)
    assert_serves(lazy)


def test_an_engine_that_dies_with_its_answer_under_way_costs_only_its_link(served: Served):
    dying, other = served.link("dying"), served.link("other")
    dying.send(question([(1, 100_000)], rows(100_000)))
    assert served.store.is_running.acquire(timeout=5)
    dying.close()
    assert_serves(other)
    assert_serves(other)
    assert served.service.num_links == 1


def test_rows_that_wait_with_those_of_an_expert_not_held_are_served(served: Served):
    first, unlucky, lucky = served.link("first"), served.link("unlucky"), served.link("lucky")
    for link in (first, unlucky, lucky):
        assert_serves(link)
    served.store.forget()
    served.store.go_on.clear()
    first.send(question([(0, 1)], rows(1)))
    assert served.store.is_running.acquire(timeout=5)  # from here on, questions wait
    unlucky.send(question([(0, 1), (7, 1)], rows(2)))
    lucky.send(question([(0, 1)], rows(1)))
    served.store.go_on.set()
    assert unlucky.receive(5).kind == Kind.ERROR
    assert torch.equal(answer(lucky), rows(1))


def some_expert() -> GatedMlp:
    """Return weights of two frames, of three megabytes in all: more than a socket's buffers take."""
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(2 * CONFIG.intermediate_size, HIDDEN_SIZE, generator=generator)
    down = torch.randn(HIDDEN_SIZE, CONFIG.intermediate_size, generator=generator)
    return GatedMlp(pack(gate_up), pack(down))


def fetched(link: StreamLink) -> GatedMlp:
    return receive_mlp(iter(lambda: link.receive(10), None), CONFIG)


def assert_same(one: GatedMlp, other: GatedMlp) -> None:
    assert torch.equal(one.gate_up.data, other.gate_up.data)
    assert torch.equal(one.down.data, other.down.data)


def test_weights_arrive_as_they_are_and_rows_on_the_same_link_after_them(served: Served):
    served.store.weights[1, 0] = mlp = some_expert()
    link = served.link("group")
    link.send(fetch_frame(1, 0, sequence=3))
    assert_same(fetched(link), mlp)
    assert_serves(link)


def test_a_group_that_does_not_read_the_weights_delays_nobody_and_gets_them_later(served: Served):
    served.store.weights[1, 0] = mlp = some_expert()
    lazy, other = served.link("lazy"), served.link("other")
    lazy.send(fetch_frame(1, 0, sequence=3))
    for _ in range(20):
        assert_serves(other)
    assert_same(fetched(lazy), mlp)


def test_weights_that_are_freed_on_their_way_arrive_whole(served: Served):
    served.store.weights[1, 0] = mlp = some_expert()
    slow, other = served.link("slow"), served.link("other")
    slow.send(fetch_frame(1, 0, sequence=3))
    assert_serves(other)
    assert_serves(other)  # so the question has been read
    expected = GatedMlp(*(replace(weight, data=weight.data.clone()) for weight in (mlp.gate_up, mlp.down)))
    del served.store.weights[1, 0], mlp
    assert_same(fetched(slow), expected)


def test_a_group_that_dies_in_the_middle_of_weights_costs_only_its_link(served: Served):
    served.store.weights[1, 0] = mlp = some_expert()
    dying, other = served.link("dying"), served.link("other")
    assert_serves(dying)
    dying.send(fetch_frame(1, 0, sequence=3))
    assert dying.receive(5).kind == Kind.WEIGHTS
    dying.close()
    assert_serves(other)
    assert_serves(other)
    assert served.service.num_links == 1
    other.send(fetch_frame(1, 0, sequence=4))
    assert_same(fetched(other), mlp)


def test_weights_that_nobody_takes_do_not_keep_the_service_from_stopping(served: Served):
    served.store.weights[1, 0] = some_expert()
    lazy = served.link("lazy")
    lazy.send(fetch_frame(1, 0, sequence=3))
    assert_serves(served.link("other"))
    served.service.stop()
    assert not served.service.is_serving


def test_stopping_ends_the_links_and_refuses_new_ones(tmp_path: Path):
    served = Served(tmp_path)
    link = served.link()
    assert_serves(link)
    served.service.stop()
    assert not served.service.is_serving
    assert served.service.num_links == 0
    with pytest.raises(LinkLost):
        link.receive(5)
    with pytest.raises(LinkLost):
        served.link()
