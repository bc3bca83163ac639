from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_runner import VOCAB_SIZE, ExpertGone, FakeRunner

from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest
from shards.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, seed=-7)
EVERYTHING = SamplingParams(
    temperature=1.1, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2, frequency_penalty=0.3, seed=5
)
SAMPLINGS = pytest.mark.parametrize(
    "sampling", [GREEDY, SEEDED, EVERYTHING], ids=["greedy", "seeded", "everything"]
)


def make_engine(*, num_blocks=64, max_step_tokens=64, max_running=64, context_length=200, **rest):
    return Engine(
        FakeRunner(num_blocks, max_step_tokens),
        vocab_size=VOCAB_SIZE,
        context_length=context_length,
        num_blocks=num_blocks,
        max_step_tokens=max_step_tokens,
        max_running=max_running,
        request_errors=(ExpertGone,),
        **rest,
    )


def make_request(id="a", prompt=(1, 2, 3), max_tokens=20, sampling=GREEDY, **rest):
    return GenerationRequest(id, tuple(prompt), max_tokens, sampling, **rest)


def collect(events, answers):
    for event in events:
        token_ids = answers.setdefault(event.request_id, ([], None))[0]
        if event.token_id is not None:
            token_ids.append(event.token_id)
        answers[event.request_id] = (token_ids, event)


def finish(engine, answers=None, max_steps=3000):
    """Step until all is done; return {request id: (tokens, last event)}."""
    answers = {} if answers is None else answers
    for _ in range(max_steps):
        if not engine.has_work:
            return answers
        collect(engine.step(), answers)
        engine.blocks.check()
    raise AssertionError(f"not finished after {max_steps} steps")


def alone(request):
    """The answer of a request that has a roomy engine for itself."""
    engine = make_engine(max_step_tokens=1000, prefix_caching=False)
    engine.submit(request)
    return finish(engine)[request.id][0]


def mixed_requests(count, sampling):
    """Requests of many lengths, of which some share prompts, or the beginnings of prompts."""
    numbers = np.random.default_rng(count)
    stem = numbers.integers(0, VOCAB_SIZE, 100).tolist()
    requests = []
    for i in range(count):
        own = numbers.integers(0, VOCAB_SIZE, numbers.integers(1, 20)).tolist()
        prompt = stem[: numbers.integers(0, 100)] + own if i % 3 else stem[:48]
        params = replace(sampling, seed=i // 2)
        requests.append(make_request(f"r{i}", prompt, int(numbers.integers(1, 30)), params))
    return requests


def answers_of(engine, requests):
    for request in requests:
        engine.submit(request)
    answers = {id: tokens for id, (tokens, _) in finish(engine).items()}
    assert engine.blocks.num_used == 0
    return answers


# One answer, whatever happens around it


@SAMPLINGS
def test_an_answer_in_a_batch_of_32_is_that_of_the_request_alone(sampling):
    requests = mixed_requests(32, sampling)
    answers = answers_of(make_engine(num_blocks=300, max_step_tokens=128), requests)
    assert answers == {request.id: alone(request) for request in requests}


@SAMPLINGS
@pytest.mark.parametrize("max_step_tokens", [1, 5, 16, 17, 200])
def test_an_answer_does_not_depend_on_max_step_tokens(sampling, max_step_tokens):
    requests = mixed_requests(6, sampling)
    answers = answers_of(make_engine(max_step_tokens=max_step_tokens), requests)
    assert answers == {request.id: alone(request) for request in requests}


def test_requests_of_different_salts_share_nothing():
    engine = make_engine()
    for salt, expected in (("", 0), ("a", 0), ("b", 0), ("a", 32), ("", 64)):
        answers_of(engine, [make_request(prompt=range(33), cache_salt=salt)])
        assert engine.stats().num_cached_tokens == expected


@SAMPLINGS
@pytest.mark.parametrize("prompt_length", [15, 16, 17, 31, 32, 33, 48])
def test_an_answer_does_not_depend_on_a_prefix_hit(sampling, prompt_length):
    request = make_request(prompt=range(prompt_length), sampling=sampling)
    engine = make_engine()
    first = answers_of(engine, [request])
    computed = engine.stats().num_computed_tokens
    assert answers_of(engine, [request]) == first == {"a": alone(request)}
    expected = (prompt_length - 1) // 16 * 16
    assert engine.stats().num_cached_tokens == expected
    assert engine.stats().num_computed_tokens == 2 * computed - expected


@SAMPLINGS
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_an_answer_does_not_depend_on_preemption(sampling, prefix_caching):
    requests = mixed_requests(12, sampling)
    engine = make_engine(num_blocks=13, max_step_tokens=24, prefix_caching=prefix_caching)
    answers = answers_of(engine, requests)
    assert engine.stats().num_preemptions > 0
    assert answers == {request.id: alone(request) for request in requests}


@SAMPLINGS
def test_an_answer_does_not_depend_on_aborted_neighbours(sampling):
    requests = mixed_requests(12, sampling)
    engine = make_engine(num_blocks=16, max_step_tokens=24)
    for request in requests:
        engine.submit(request)
    answers = {}
    for index, request in enumerate(requests):
        if index % 3:
            engine.abort(request.id)
            collect(engine.step(), answers)
    finish(engine, answers)
    for request in requests[::3]:
        assert answers[request.id][0] == alone(request)


@SAMPLINGS
def test_a_resubmitted_request_goes_on_as_it_would_have(sampling):
    request = make_request(prompt=range(20), max_tokens=40, sampling=sampling)
    whole = alone(request)
    for count in range(len(whole)):
        rest = alone(replace(request, emitted=tuple(whole[:count])))
        assert rest == whole[count:]


def test_a_resubmitted_request_stops_where_it_would_have():
    whole = alone(make_request(max_tokens=40))
    request = make_request(max_tokens=40, stop_token_ids=frozenset(whole[9:10]), emitted=tuple(whole[:3]))
    assert alone(request) == whole[3 : whole.index(whole[9]) + 1]


@pytest.mark.parametrize(
    ("emitted", "stop_token_ids", "reason"),
    [((7, 8), frozenset([8]), "stop"), ((7, 8, 9), frozenset(), "length")],
)
def test_a_request_resubmitted_after_its_last_token_only_ends(emitted, stop_token_ids, reason):
    engine = make_engine()
    engine.submit(make_request(max_tokens=3, emitted=emitted, stop_token_ids=stop_token_ids))
    (event,) = engine.step()
    assert (event.token_id, event.finish_reason) == (None, reason)
    assert not engine.has_work


# How answers end


def last_event(**request):
    engine = make_engine(context_length=30)
    engine.submit(make_request(**request))
    return finish(engine)["a"]


def test_an_answer_ends_with_its_stop_token():
    whole, _ = last_event(max_tokens=20)
    tokens, event = last_event(max_tokens=20, stop_token_ids=frozenset([whole[4]]))
    assert tokens == whole[: whole.index(whole[4]) + 1]
    assert (event.token_id, event.finish_reason) == (whole[4], "stop")


def test_a_stop_token_in_the_prompt_does_not_end_the_answer():
    tokens, _ = last_event(prompt=(1, 2, 3), max_tokens=1, stop_token_ids=frozenset([3]))
    assert len(tokens) == 1


def test_a_stop_token_as_last_token_allowed_is_a_stop():
    whole, _ = last_event(max_tokens=1)
    assert last_event(max_tokens=1, stop_token_ids=frozenset(whole))[1].finish_reason == "stop"


def test_an_answer_ends_at_max_tokens():
    tokens, event = last_event(max_tokens=5)
    assert (len(tokens), event.finish_reason) == (5, "length")


def test_an_answer_ends_where_the_context_does():
    tokens, event = last_event(prompt=range(24), max_tokens=20)
    assert (len(tokens), event.finish_reason) == (6, "length")


def test_a_prompt_may_leave_room_for_one_token():
    tokens, event = last_event(prompt=range(29), max_tokens=20)
    assert (len(tokens), event.finish_reason) == (1, "length")


def test_a_lone_request_may_fill_the_whole_pool():
    engine = make_engine(num_blocks=3, max_step_tokens=7)
    engine.submit(make_request(prompt=range(20), max_tokens=29))  # 49 tokens; the last needs no memory
    assert len(finish(engine)["a"][0]) == 29


# Refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(prompt=()), "prompt is empty"),
        (make_request(max_tokens=0), "max_tokens is 0"),
        (make_request(prompt=[1] * 200), "prompt has 200 tokens.*at most 199"),
        (make_request(prompt=[1] * 20, max_tokens=30), "4 blocks.*the engine has 3"),
        (make_request(prompt=[1, VOCAB_SIZE]), "token 64 is outside the vocabulary, 0 to 63"),
        (make_request(prompt=[1], emitted=(-1,)), "token -1 is outside"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused(request_, message):
    engine = make_engine(num_blocks=3)
    with pytest.raises(ValueError, match=f"^request 'a'.*{message}"):
        engine.submit(request_)
    assert not engine.has_work


def test_an_id_in_use_is_refused_and_free_again_later():
    engine = make_engine()
    engine.submit(make_request())
    with pytest.raises(ValueError, match="'a' is here already"):
        engine.submit(make_request())
    finish(engine)
    engine.submit(make_request())


@pytest.mark.parametrize(
    "name", ["vocab_size", "context_length", "num_blocks", "max_step_tokens", "max_running"]
)
def test_a_setting_of_zero_is_refused_by_name(name):
    settings = dict.fromkeys(
        ["vocab_size", "context_length", "num_blocks", "max_step_tokens", "max_running"], 1
    )
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Engine(FakeRunner(1, 1), **(settings | {name: 0}))


# Aborts and errors


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_an_abort_frees_the_blocks_and_is_reported(num_steps):
    engine = make_engine(max_step_tokens=16)
    engine.submit(make_request(prompt=range(40)))
    for _ in range(num_steps):
        engine.step()
    engine.abort("a")
    assert engine.blocks.num_used == 0
    assert engine.has_work
    (event,) = engine.step()
    assert (event.token_id, event.finish_reason) == (None, "abort")
    assert not engine.has_work


def test_aborting_an_unknown_request_does_nothing():
    engine = make_engine()
    engine.abort("nobody")
    assert not engine.has_work


def test_a_request_level_error_ends_the_requests_of_the_step_only():
    engine = make_engine(max_running=2)
    requests = [make_request(id, prompt=range(20)) for id in "abc"]
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.runner.next_error = ExpertGone("expert 3 of layer 7 has no replica")
    events = engine.step()
    assert [(event.request_id, event.finish_reason) for event in events] == [("a", "error"), ("b", "error")]
    assert events[0].error == "expert 3 of layer 7 has no replica"
    assert engine.blocks.num_used == 0
    assert finish(engine)["c"][0] == alone(requests[2])


def test_what_a_failed_step_wrote_is_not_in_the_prefix_cache():
    engine = make_engine()
    request = make_request(prompt=range(40))
    engine.submit(request)
    engine.runner.next_error = ExpertGone()
    engine.step()
    assert answers_of(engine, [request]) == {"a": alone(request)}
    assert engine.stats().num_cached_tokens == 0


def test_any_other_error_comes_out_of_the_step():
    engine = make_engine()
    engine.submit(make_request())
    engine.runner.next_error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.step()


def test_logits_that_are_not_finite_end_their_request_only():
    engine = make_engine()
    inner, engine.runner = engine.runner, BrokenRow(engine.runner)
    engine.submit(make_request("a"))
    engine.submit(make_request("b"))
    event, other = engine.step()
    assert (event.request_id, event.token_id, event.finish_reason) == ("a", None, "error")
    assert "not finite" in event.error
    assert other.token_id is not None
    engine.runner = inner
    assert finish(engine, {"b": ([other.token_id], other)})["b"][0] == alone(make_request("b"))


class BrokenRow:
    """A runner whose first row of logits is NaN."""

    def __init__(self, runner):
        self.runner = runner

    def run(self, batch):
        logits_RV = self.runner.run(batch)
        logits_RV[0] = torch.nan
        return logits_RV


# What is reported


def test_the_first_token_says_how_much_of_the_prompt_was_cached():
    engine = make_engine()
    for expected in (0, 32):
        engine.submit(make_request(prompt=range(40), max_tokens=3))
        assert [engine.step()[0].num_cached for _ in range(3)] == [expected, 0, 0]


def test_a_cached_answer_does_not_count_as_cached_prompt():
    engine = make_engine()
    request = make_request(prompt=range(20), max_tokens=40)
    answer = answers_of(engine, [request])["a"]
    engine.submit(replace(request, emitted=tuple(answer[:30])))
    assert engine.step()[0].num_cached == 20


def test_logprobs_come_with_each_token_if_asked_for():
    engine = make_engine()
    engine.submit(make_request(sampling=SamplingParams(temperature=0.0, num_logprobs=3)))
    (event,) = engine.step()
    assert event.logprob == event.top_logprobs[0]
    assert event.logprob.token_id == event.token_id
    assert len(event.top_logprobs) == 3


def test_no_logprobs_come_unless_asked_for():
    engine = make_engine()
    engine.submit(make_request())
    (event,) = engine.step()
    assert (event.logprob, event.top_logprobs) == (None, ())


def test_stats_count_what_is_here_and_what_was_done():
    engine = make_engine(max_running=1, max_step_tokens=16)
    engine.submit(make_request("a", prompt=range(20)))
    engine.submit(make_request("b"))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 1)
    assert (stats.used_blocks, stats.total_blocks) == (1, 64)
    assert stats.num_computed_tokens == 16


def test_a_step_without_requests_does_not_call_the_runner():
    engine = make_engine()
    assert engine.step() == []
    assert engine.stats().num_computed_tokens == 0
