"""What an engine sends to others, and what they make of it."""

from collections import defaultdict
from dataclasses import replace

import pytest
from fake_runner import VOCAB_SIZE, FakeRunner

from cluster.engine.copies import MAX_BLOCKS_PER_STEP
from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest
from shards.kv_cache import BLOCK_SIZE
from shards.sampling_params import SamplingParams

NUM_BLOCKS = 100
PROMPT = tuple(range(60)) + tuple(range(4))  # four full blocks


class Others:
    """Implements `Standbys` without a link: keeps the copies."""

    def __init__(self):
        self.chosen = "other"
        self.places = 1000
        self.copies = defaultdict(list)  # by engine

    def standby(self, answer_id):
        return self.chosen

    def room(self, standby):
        return self.places

    def has(self, standby, digest):
        return digest in (copy.digests[-1] for copy in self.copies[standby])

    def send(self, standby, copy):
        assert not self.has(standby, copy.digests[-1])
        self.places -= 1
        self.copies[standby].append(copy)


class Copying:
    """An engine whose loop is this test."""

    def __init__(self, max_step_tokens=512, **rest):
        self.others = Others()
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

    def num_sent(self, standby="other"):
        return len(self.others.copies[standby])


def make_engine(max_step_tokens=512, **rest):
    return Engine(
        FakeRunner(NUM_BLOCKS, max_step_tokens),
        vocab_size=VOCAB_SIZE,
        context_length=1000,
        num_blocks=NUM_BLOCKS,
        max_step_tokens=max_step_tokens,
        max_running=8,
        **rest,
    )


def test_each_full_block_is_sent_once_when_it_is_full():
    one = Copying()
    one.submit()
    one.step()
    assert one.num_sent() == 4
    one.step(BLOCK_SIZE - 1)
    assert one.num_sent() == 4
    one.step(1 + 3 * BLOCK_SIZE)
    assert one.num_sent() == 8
    assert one.engine.stats().num_copied_blocks == 8


def test_a_copy_names_the_whole_prefix_that_it_ends():
    one = Copying()
    one.submit()
    one.step()
    copies = one.others.copies["other"]
    assert [copy.digests for copy in copies] == [copies[-1].digests[: end + 1] for end in range(4)]


def test_requests_share_the_copies_of_a_common_prefix_too():
    one = Copying()
    one.submit("a", (*PROMPT, 1, 2))
    one.submit("b", (*PROMPT, 3, 4))
    one.step()
    assert one.num_sent() == 4
    one.submit("c", (*PROMPT, 5, 6))
    one.step()
    assert one.num_sent() == 4


def test_a_prefix_that_was_found_in_the_cache_is_sent_too():
    one = Copying()
    one.others.chosen = None
    one.submit("a", max_tokens=1)
    one.step()
    one.others.chosen = "other"
    one.submit("b", (*PROMPT, 1, 2))
    one.step()
    assert one.engine.stats().num_cached_tokens == len(PROMPT)
    assert one.num_sent() == 4


def test_what_finds_no_room_is_sent_when_there_is_some():
    one = Copying()
    one.others.places = 2
    one.submit()
    one.step(3)
    assert one.num_sent() == 2
    one.others.places = 10
    one.step()
    assert one.num_sent() == 4


def test_one_step_copies_no_more_than_requests_can_wait_for():
    one = Copying()
    one.submit(prompt=PROMPT * 8)
    one.step()
    assert one.num_sent() == MAX_BLOCKS_PER_STEP
    one.step()
    assert one.num_sent() == 32


def test_another_standby_is_sent_everything():
    one = Copying()
    one.submit()
    one.step()
    one.others.chosen = "third"
    one.step()
    assert one.num_sent("third") == 4


def test_without_a_standby_nothing_is_read():
    one = Copying()
    one.others.chosen = None
    one.submit()
    one.step()
    assert one.engine.stats().num_copied_blocks == 0


@pytest.mark.parametrize("num_steps", [1, 10, 40])
def test_a_lost_answer_goes_on_the_same_where_its_copies_are_and_only_the_rest_is_computed(num_steps):
    one = Copying(max_step_tokens=64)
    request = one.submit()
    one.step(num_steps)
    emitted = tuple(one.tokens["a"])

    other = make_engine()
    for copy in one.others.copies["other"]:
        other.adopt(copy)
    other.blocks.check()
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


def test_a_copy_that_an_engine_has_no_use_for_changes_nothing():
    one, other = Copying(), make_engine()
    one.submit()
    one.step()
    *_, last = one.others.copies["other"]
    other.adopt(last)
    assert other.stats().num_adopted_blocks == 0
    assert other.runner.cache == {}
