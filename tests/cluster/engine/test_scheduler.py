import functools

from fake_runner import VOCAB_SIZE, ExpertGone, FakeRunner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cluster.engine.blocks import BlockPool
from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest
from cluster.engine.request_state import RequestState
from cluster.engine.scheduler import Scheduler
from shards.sampling_params import SamplingParams

NUM_BLOCKS = 5


def make_scheduler(*, num_blocks=20, max_step_tokens=64, max_running=8, prefix_caching=True):
    return Scheduler(BlockPool(num_blocks, prefix_caching), max_step_tokens, max_running)


def submit(scheduler, id, prompt_length, max_tokens=50, first_token=0, is_resumed=False):
    prompt = tuple(range(first_token, first_token + prompt_length))
    request = GenerationRequest(id, prompt, max_tokens, SamplingParams(), is_resumed=is_resumed)
    state = RequestState(request, context_length=1000)
    scheduler.submit(state)
    return state


def step(scheduler):
    """Plan and commit a step in which the model always says 7; return {request id: tokens computed}."""
    plan = scheduler.plan_step()
    scheduler.commit(plan)
    for state, chunk in zip(plan.requests, plan.batch.chunks, strict=True):
        if chunk.wants_logits:
            state.token_ids.append(7)
    scheduler.blocks.check()
    return {
        state.id: len(chunk.token_ids) for state, chunk in zip(plan.requests, plan.batch.chunks, strict=True)
    }


def test_a_long_prompt_is_read_in_chunks_of_the_budget():
    scheduler = make_scheduler(max_step_tokens=30)
    submit(scheduler, "a", 70)
    assert [step(scheduler) for _ in range(4)] == [{"a": 30}, {"a": 30}, {"a": 10}, {"a": 1}]


def test_only_the_chunk_with_the_last_known_token_wants_logits():
    scheduler = make_scheduler(max_step_tokens=30)
    submit(scheduler, "a", 60)
    wants = []
    for _ in range(3):
        plan = scheduler.plan_step()
        scheduler.commit(plan)
        wants.append(plan.batch.chunks[0].wants_logits)
        if wants[-1]:
            plan.requests[0].token_ids.append(7)
    assert wants == [False, True, True]


def test_decoding_and_reading_a_prompt_share_a_step_and_the_older_goes_first():
    scheduler = make_scheduler(max_step_tokens=30)
    submit(scheduler, "a", 10)
    step(scheduler)
    submit(scheduler, "b", 70)
    assert [step(scheduler) for _ in range(3)] == [{"a": 1, "b": 29}] * 2 + [{"a": 1, "b": 12}]


def test_requests_are_admitted_in_the_order_of_arrival():
    scheduler = make_scheduler(num_blocks=6, max_step_tokens=200, prefix_caching=False)
    submit(scheduler, "a", 40, max_tokens=8)
    submit(scheduler, "b", 60, max_tokens=8)  # no room beside a
    submit(scheduler, "c", 4, max_tokens=8)  # would fit, but it is not c's turn
    assert step(scheduler) == {"a": 40}
    assert step(scheduler) == {"a": 1}


def test_no_more_than_max_running_requests_run():
    scheduler = make_scheduler(max_running=2)
    for id in "abc":
        submit(scheduler, id, 5)
    assert step(scheduler) == {"a": 5, "b": 5}


def fill_memory():
    """Three requests of one block each, all of which need a second one in the next step; two are free."""
    scheduler = make_scheduler(num_blocks=5)
    states = [submit(scheduler, id, 16, first_token=100 * i) for i, id in enumerate("abc")]
    assert step(scheduler) == {"a": 16, "b": 16, "c": 16}
    return scheduler, states


def test_the_youngest_is_preempted_and_waits_in_front():
    scheduler, (_, _, c) = fill_memory()
    submit(scheduler, "d", 1)
    assert step(scheduler) == {"a": 1, "b": 1}
    assert [state.id for state in scheduler.waiting] == ["c", "d"]
    assert (c.num_computed, scheduler.num_preemptions) == (0, 1)


def test_requests_of_a_lost_engine_wait_behind_those_that_have_begun_and_before_all_others():
    scheduler, _ = fill_memory()
    submit(scheduler, "new", 1)
    step(scheduler)  # preempts c
    for id in ("resumed 1", "resumed 2"):
        submit(scheduler, id, 1, is_resumed=True)
    submit(scheduler, "newer", 1)
    assert [state.id for state in scheduler.waiting] == ["c", "resumed 1", "resumed 2", "new", "newer"]


def test_nobody_is_admitted_in_a_step_that_was_short_of_memory():
    scheduler = make_scheduler(num_blocks=5, max_step_tokens=20, prefix_caching=False)
    submit(scheduler, "a", 30)
    submit(scheduler, "b", 32, max_tokens=40)
    for _ in range(4):
        assert scheduler.num_preemptions == 0
        step(scheduler)
    # Both go on with their 33rd token, and one block is free. What b then gives back would do for its
    # first 19 tokens, which would be given back at once in the next step.
    assert step(scheduler) == {"a": 1}
    assert scheduler.num_preemptions == 1


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler, (_, b, c) = fill_memory()
    step(scheduler)
    scheduler.remove(b)
    assert step(scheduler) == {"a": 1, "c": 1}  # its answer's one token; the prompt was still there
    assert c.num_computed == 17


def test_a_preempted_request_keeps_its_answer():
    scheduler, (_, _, c) = fill_memory()
    before = list(c.token_ids)
    step(scheduler)
    assert c.token_ids == before == [*range(200, 216), 7]


def test_what_was_cached_at_first_admission_is_all_that_counts_as_cached():
    scheduler, (_, b, c) = fill_memory()
    step(scheduler)
    scheduler.remove(b)
    step(scheduler)
    assert (c.num_cached, scheduler.num_cached_tokens) == (0, 0)


@functools.cache
def answer_alone(prompt, max_tokens, sampling, emitted):
    engine = Engine(
        FakeRunner(NUM_BLOCKS, 1000),
        vocab_size=VOCAB_SIZE,
        context_length=1000,
        num_blocks=NUM_BLOCKS,
        max_step_tokens=1000,
        max_running=1,
        prefix_caching=False,
    )
    engine.submit(GenerationRequest("alone", prompt, max_tokens, sampling, emitted=emitted))
    token_ids = []
    while engine.has_work:
        token_ids += [event.token_id for event in engine.step()]
    return token_ids


class Traffic(RuleBasedStateMachine):
    """Requests come, are aborted and meet errors, in an engine whose memory is far too small for them all."""

    @initialize(
        max_step_tokens=st.integers(1, 60), max_running=st.integers(1, 6), prefix_caching=st.booleans()
    )
    def start(self, max_step_tokens, max_running, prefix_caching):
        self.runner = FakeRunner(NUM_BLOCKS, max_step_tokens)  # checks the budget of each step
        self.engine = Engine(
            self.runner,
            vocab_size=VOCAB_SIZE,
            context_length=1000,
            num_blocks=NUM_BLOCKS,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            prefix_caching=prefix_caching,
            request_errors=(ExpertGone,),
        )
        self.requests, self.answers, self.ends = {}, {}, {}

    @rule(
        stem=st.sampled_from([(), (1,) * 16, (1,) * 16 + (2,) * 16, (1,) * 16 + (3,) * 20, (3,) * 33]),
        own=st.lists(st.integers(0, 2), min_size=1, max_size=3),
        max_tokens=st.integers(1, 40),
        emitted=st.lists(st.integers(0, 1), max_size=2),
        temperature=st.sampled_from([0.0, 1.0]),
    )
    def submit(self, stem, own, max_tokens, emitted, temperature):
        prompt, emitted = stem + tuple(own), tuple(emitted[: max_tokens - 1])
        request = GenerationRequest(
            f"r{len(self.requests)}", prompt, max_tokens, SamplingParams(temperature, seed=3), emitted=emitted
        )
        self.engine.submit(request)
        self.requests[request.id], self.answers[request.id] = request, []

    @rule(data=st.data())
    def abort(self, data):
        if going_on := sorted(set(self.requests) - set(self.ends)):
            self.engine.abort(data.draw(st.sampled_from(going_on)))

    @rule(num_steps=st.integers(1, 20))
    def run(self, num_steps):
        for _ in range(num_steps):
            for event in self.engine.step():
                assert event.request_id not in self.ends, "an event after the end"
                if event.token_id is not None:
                    self.answers[event.request_id].append(event.token_id)
                if event.finish_reason:
                    self.ends[event.request_id] = event.finish_reason

    @rule()
    def fail(self):
        self.runner.next_error = ExpertGone("gone")
        self.run(1)
        self.runner.next_error = None

    @invariant()
    def blocks_add_up(self):
        self.engine.blocks.check()

    @invariant()
    def requests_stay_in_the_order_of_arrival(self):
        scheduler = self.engine.scheduler
        order = [int(state.id[1:]) for state in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        assert len(scheduler.running) <= scheduler.max_running

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(40 * len(self.requests)):
            self.run(20)
            if not self.engine.has_work:
                break
        assert set(self.ends) == set(self.requests), "somebody waits for ever"
        assert self.engine.blocks.num_used == 0
        self.engine.blocks.check()
        for id, request in self.requests.items():
            whole = answer_alone(request.prompt, request.max_tokens, request.sampling, request.emitted)
            if self.ends[id] == "length":
                assert self.answers[id] == whole
            else:
                assert self.answers[id] == whole[: len(self.answers[id])]


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
