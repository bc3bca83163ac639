"""What an engine sends to others, and what they make of it."""

from collections import defaultdict
from dataclasses import replace

import pytest
from fake_runner import VOCAB_SIZE, FakeRunner

from cluster.engine.copies import MAX_STEP_BYTES
from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest
from shards.kv_cache import BLOCK_SIZE
from shards.sampling_params import SamplingParams
from tests.cluster.adopting_engine import AdoptingEngine, AdoptingEngines

NUM_BLOCKS = 100
PROMPT = tuple(range(60)) + tuple(range(4))  # four full blocks


class Copying:
    """An engine whose loop is this test, and two others that may go on with its answers."""

    def __init__(self, max_step_tokens=512, others=(), **rest):
        self.others = AdoptingEngines(*(others or (AdoptingEngine(make_engine()) for _ in range(2))))
        self.engine = make_engine(max_step_tokens, standbys=self.others, **rest)
        self.tokens = defaultdict(list)

    def submit(self, id="a", prompt=PROMPT, max_tokens=100):
        request = GenerationRequest(id, prompt, max_tokens, SamplingParams(temperature=0.0))
        self.engine.submit(request)
        return request

    def step(self, count=1):
        for _ in range(count):
            for event in self.engine.step():
                self.tokens[event.request_id].append(event.token_id)
            self.engine.copy_blocks()


def make_engine(max_step_tokens=512, num_blocks=NUM_BLOCKS, **rest):
    return Engine(
        FakeRunner(num_blocks, max_step_tokens),
        vocab_size=VOCAB_SIZE,
        context_length=1000,
        num_blocks=num_blocks,
        max_step_tokens=max_step_tokens,
        max_running=8,
        **rest,
    )


def test_each_full_block_is_sent_once_when_it_is_full():
    one = Copying()
    other = one.others.engines[0]
    one.submit()
    one.step()
    assert other.num_received == 0, "it was not asked what it has"
    one.step()
    assert other.num_received == 4
    one.step(BLOCK_SIZE - 2)
    assert other.num_received == 4
    one.step(1 + 3 * BLOCK_SIZE)
    assert other.num_received == other.num_adopted == one.engine.stats().num_copied_blocks == 8


def test_what_the_other_engine_has_is_not_sent():
    one = Copying()
    other = one.others.engines[0]
    one.submit("a", (*PROMPT, 1, 2))
    one.step(2)
    one.submit("b", (*PROMPT, 3, 4, *range(30)))
    one.step(2)
    assert other.num_received == 4 + 2
    assert other.num_adopted == 6


def test_a_prefix_that_was_found_in_the_cache_is_sent_too():
    one = Copying()
    one.others.chosen = None
    one.submit("a", max_tokens=1)
    one.step()
    one.others.chosen = other = one.others.engines[0]
    one.submit("b", (*PROMPT, 1, 2))
    one.step(2)
    assert one.engine.stats().num_cached_tokens == len(PROMPT)
    assert other.num_adopted == 4


def test_what_finds_no_room_is_sent_when_there_is_some():
    one = Copying()
    other = one.others.engines[0]
    other.has_room = False
    one.submit()
    one.step(3)
    assert other.num_received == 0
    other.has_room = True
    one.step()
    assert other.num_received == 4


def test_one_step_copies_no_more_than_requests_can_wait_for():
    one = Copying(block_bytes=MAX_STEP_BYTES // 3)
    other = one.others.engines[0]
    one.submit("a")
    one.submit("b", PROMPT[::-1])
    one.step()
    for num_received in (3, 6, 8):
        one.step()
        assert other.num_received == num_received


def test_a_block_that_is_larger_than_that_is_copied_all_the_same():
    one = Copying(block_bytes=2 * MAX_STEP_BYTES)
    one.submit()
    one.step(3)
    assert one.others.engines[0].num_received == 2


def test_another_standby_gets_everything():
    one = Copying()
    one.submit()
    one.step(2)
    one.others.chosen = one.others.engines[1]
    one.step(2)
    assert one.others.engines[1].num_adopted == 4


def test_without_a_standby_nothing_is_read():
    one = Copying()
    one.others.chosen = None
    one.submit()
    one.step(2)
    assert one.engine.stats().num_copied_blocks == 0


def test_what_the_other_engine_has_evicted_is_sent_again():
    one = Copying()
    other = one.others.engines[0]
    one.submit()
    one.step(2)
    other.engine.submit(GenerationRequest("its own", (5,) * 990, 1, SamplingParams()))
    other.engine.step()
    other.engine.submit(GenerationRequest("more", (6,) * 900, 1, SamplingParams()))
    while other.engine.has_work:
        other.engine.step()
    assert other.engine.blocks.refresh(other.runs[0].digests) == 0, "this test evicts nothing"
    one.step(2 * BLOCK_SIZE + 3)
    assert other.engine.blocks.refresh(other.runs[-1].digests) == len(other.runs[-1].digests)
    prefix = max((run.digests for run in other.runs if run.rows_BN is None), key=len)
    assert other.engine.blocks.refresh(prefix) == len(prefix) > 4


def test_an_engine_without_memory_is_not_sent_the_same_again_and_again():
    other = AdoptingEngine(make_engine(num_blocks=2))
    one = Copying(others=[other])
    one.submit(max_tokens=10 * BLOCK_SIZE)
    one.step(10 * BLOCK_SIZE)
    # At first four; then, whenever another block is full, a question, and what is still missing.
    assert sum(run.rows_BN is None for run in other.runs) <= 11
    assert other.num_received <= sum(range(14))
    other.engine.blocks.check()


def test_copies_go_on_behind_a_preemption():
    one = Copying(num_blocks=9)
    other = one.others.engines[0]
    first, second = (one.submit(id, prompt, 70) for id, prompt in (("a", PROMPT), ("b", PROMPT[::-1])))
    one.step(60)
    assert one.engine.stats().num_preemptions > 0, "this test preempts nobody"
    while one.engine.has_work:
        one.step()
    for request in (first, second):
        emitted = tuple(one.tokens[request.id][:50])
        other.engine.submit(replace(request, emitted=emitted, is_resumed=True))
        answer = list(emitted)
        while other.engine.has_work:
            answer += [event.token_id for event in other.engine.step()]
        assert answer == one.tokens[request.id]


@pytest.mark.parametrize("num_steps", [2, 10, 40])
def test_a_lost_answer_goes_on_the_same_where_its_copies_are_and_only_the_rest_is_computed(num_steps):
    one = Copying(max_step_tokens=64)
    request = one.submit()
    one.step(num_steps)
    emitted = tuple(one.tokens["a"])

    other = one.others.engines[0].engine
    num_known = len(PROMPT) + len(emitted)
    other.submit(replace(request, emitted=emitted, is_resumed=True))
    (event,) = other.step()
    num_adopted = other.stats().num_adopted_blocks
    assert num_adopted == (num_known - 1) // BLOCK_SIZE
    assert other.stats().num_computed_tokens == num_known - num_adopted * BLOCK_SIZE

    answer = [*emitted, event.token_id]
    while other.has_work:
        answer += [event.token_id for event in other.step()]
    one.step(200)
    assert answer == one.tokens["a"]


def test_an_engine_of_another_model_does_not_use_copies():
    other = AdoptingEngine(make_engine(model=b"other"))
    one = Copying(others=[other], model=b"one")
    request = one.submit()
    one.step(10)
    assert other.num_adopted == 4
    other.engine.submit(request)
    other.engine.step()
    assert other.engine.stats().num_computed_tokens == len(PROMPT)


def test_the_beginning_of_a_long_prefix_is_not_evicted_before_its_end():
    one = Copying(max_step_tokens=512)
    other = one.others.engines[0]
    request = one.submit(prompt=PROMPT * 10, max_tokens=300)
    one.step(290)
    other.engine.submit(GenerationRequest("its own", (5,) * 900, 1, SamplingParams()))
    while other.engine.has_work:
        other.engine.step()
    digests = max((run.digests for run in other.runs), key=len)
    num_left = other.engine.blocks.refresh(digests)
    assert 0 < num_left < len(digests), "nothing, or all, was evicted in this test"
    held = sum(other.engine.blocks.refresh([digest]) for digest in digests)
    assert num_left >= held - 16, "what is left is of no use without what stood before it"
    assert request.answer_id == "a"
