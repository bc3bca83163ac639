"""The loop of an expert group, asked over real links by engines of every temper."""

import os
import threading
from collections.abc import Iterator, Sequence
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
from router.links.wire import encode
from shards.expert_service import ExpertService

SECRET = b"one cluster's secret"
HIDDEN_SIZE = 8
SLOTS = ((0, 0), (0, 1), (1, 0), (1, 1))


class ScalingStore:
    """Slot s multiplies by s + 1. Notes what ran, and may be held up or made to fail."""

    def __init__(self) -> None:
        self.forget()
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    def forget(self) -> None:
        self.ran: list[tuple[int, int]] = []  # (slot, rows)
        self.is_running = threading.Semaphore(0)

    def run(self, slot: int, x_ND: Tensor, out_ND: Tensor) -> None:
        self.is_running.release()
        assert self.go_on.wait(10)
        if self.error:
            raise self.error
        self.ran.append((slot, len(x_ND)))
        out_ND.copy_(x_ND * (slot + 1))


class Served:
    def __init__(self, directory: Path) -> None:
        self.store = ScalingStore()
        self._listener = Listener(SECRET, "group", directory, "127.0.0.1")
        self.service = ExpertService(self.store, self._listener, SLOTS, HIDDEN_SIZE)
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


def test_each_run_of_rows_goes_through_its_slot_and_comes_back_in_order(served: Served):
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


def test_rows_of_several_engines_that_wait_for_a_slot_run_together(served: Served):
    first, *others = links = [served.link(f"engine {n}") for n in range(4)]
    for link in links:
        assert_serves(link)
    served.store.forget()
    served.store.go_on.clear()
    first.send(question([(3, 1)], rows(1), layer=1))
    assert served.store.is_running.acquire(timeout=5)  # from here on, questions wait
    x_ND = [rows(n + 1, seed=n) for n in range(3)]
    for link, x in zip(others, x_ND, strict=True):
        link.send(question([(0, len(x) - 1), (1, 1)], x))
    served.store.go_on.set()
    assert torch.equal(answer(first), rows(1) * 4)
    for link, x in zip(others, x_ND, strict=True):
        assert torch.equal(answer(link), torch.cat([x[:-1], x[-1:] * 2]))
    assert sorted(served.store.ran) == [(0, 3), (1, 3), (3, 1)]


def test_rows_are_counted_by_slot(served: Served):
    link = served.link()
    for _ in range(3):
        link.send(question([(0, 1), (1, 4)], rows(5)))
        answer(link)
    assert served.service.rows_per_slot == (3, 12, 0, 0)


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
        (question([(4, 1)], rows(1)), "slot 4 does not exist; there are 4"),
        (question([(-1, 1)], rows(1)), "slot -1 does not exist"),
        (question([(2, 1)], rows(1)), "slot 2 is of layer 1, not of layer 0"),
        (question([(0, 2)], rows(1)), "slot 0 can't have 2 of 1 rows"),
        (question([(0, -1), (1, 2)], rows(1)), "slot 0 can't have -1 of 1 rows"),
        (question([(0, 1)], rows(3)), "slots to 1 rows, but there are 3"),
        (question([(0, 1)], torch.zeros(1, HIDDEN_SIZE + 1)), "rows must have 8 elements; 1 rows of FLOAT32"),
        (question([(0, 1)], torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16)), "FLOAT32, not BFLOAT16"),
        (question([(0, 1)], torch.zeros(1, 2 * HIDDEN_SIZE, dtype=torch.bfloat16)), "not BFLOAT16"),
        (Frame(Kind.ROWS, 5), "FLOAT32, not NONE"),
        (Frame(Kind.ROWS, 5, meta=b"123", dtype=Dtype.FLOAT32), "3 bytes are not"),
        (Frame(Kind.TOKENS, 5), "not TOKENS"),
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
    assert "slot 1 (0, 1) failed: MemoryError('no room for rows')" in text_of_error(
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
