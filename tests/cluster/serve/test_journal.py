import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Counter
from serve_fakes import EOS, ScriptedEngine, tokens

from cluster.engine.request import GenerationRequest, TokenEvent
from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from cluster.serve.journal import Journal, RetryPolicy
from shards.sampling_params import SamplingParams

RETRY = RetryPolicy(max_losses=2, deadline_s=5.0, first_pause_s=0.001, longest_pause_s=0.002)
REQUEST = GenerationRequest("r", tokens("Hi"), 50, SamplingParams(), frozenset({EOS}))
ANSWER = (*tokens("Hello, world"), EOS)


def journal_of(engine, retry=RETRY):
    return Journal(engine, retry, Counter("resubmissions", "", registry=CollectorRegistry()))


def run(engine, retry=RETRY, request=REQUEST):
    async def collect():
        return [event async for event in journal_of(engine, retry).generate(request)]

    return asyncio.run(collect())


def token_ids(events):
    return tuple(event.token_id for event in events)


def test_a_request_that_loses_no_engine_passes_unchanged():
    engine = ScriptedEngine()
    assert token_ids(run(engine)) == ANSWER
    assert [replace(request, id="r") for request in engine.submissions] == [REQUEST]


@pytest.mark.parametrize("losses", [[0], [5], [1, 2, 3, 4], [0, 0, 3, 0, 1, 0]])
def test_a_request_outlives_any_number_of_engines_that_each_made_progress(losses):
    engine = ScriptedEngine(failures=[(after, EngineLost("gone")) for after in losses])
    assert token_ids(run(engine)) == ANSWER


def test_each_submission_has_an_id_of_its_own_and_the_tokens_so_far():
    engine = ScriptedEngine(failures=[(3, EngineLost("gone")), (4, EngineLost("gone"))])
    run(engine)
    assert [request.emitted for request in engine.submissions] == [(), ANSWER[:3], ANSWER[:7]]
    assert len({request.id for request in engine.submissions}) == 3


def test_a_request_that_kills_every_engine_is_given_up():
    engine = ScriptedEngine(failures=[(0, EngineLost("gone"))] * 10)
    with pytest.raises(EngineUnavailable, match="3 engines in a row"):
        run(engine)
    assert len(engine.submissions) == 3


@pytest.mark.parametrize("error", [EngineOverloaded("full"), EngineUnavailable("none")])
def test_a_request_that_no_engine_ever_took_fails_at_once(error):
    engine = ScriptedEngine(failures=[(0, error)])
    with pytest.raises(type(error)):
        run(engine)
    assert len(engine.submissions) == 1


@pytest.mark.parametrize("error", [EngineOverloaded("full"), EngineUnavailable("none")])
def test_a_lost_request_waits_until_an_engine_takes_it(error):
    engine = ScriptedEngine(failures=[(2, EngineLost("gone")), *[(0, error)] * 5])
    assert token_ids(run(engine)) == ANSWER


@pytest.mark.parametrize("error", [EngineOverloaded("full"), EngineUnavailable("none")])
def test_a_lost_request_that_no_engine_takes_fails_at_the_deadline(error):
    engine = ScriptedEngine(failures=[(2, EngineLost("gone")), *[(0, error)] * 1000])
    # The pauses are long, so that a slow machine does not meet the deadline within an attempt.
    with pytest.raises(type(error)):
        run(engine, replace(RETRY, deadline_s=0.7, first_pause_s=0.3, longest_pause_s=0.3))


def test_a_lost_request_whose_next_engine_is_silent_fails_at_the_deadline():
    engine = ScriptedEngine(failures=[(2, EngineLost("gone"))], hang_after=2)
    with pytest.raises(EngineUnavailable, match=r"no other went on within 0\.02 s"):
        run(engine, replace(RETRY, deadline_s=0.02))


def test_prompt_tokens_are_counted_as_cached_once():
    engine = ScriptedEngine(failures=[(2, EngineLost("gone"))], num_cached=2)
    assert [event.num_cached for event in run(engine)] == [2] + [0] * (len(ANSWER) - 1)


class GivesUp:
    """An engine whose first attempt ends without an end, in one of two ways."""

    def __init__(self, *last):
        self.last, self.whole = last, ScriptedEngine()

    async def generate(self, request):
        async for event in self.whole.generate(request):
            if len(self.whole.submissions) == 1 and event.token_id == ANSWER[4]:
                for last in self.last:
                    yield last
                return
            yield event


@pytest.mark.parametrize("last", [[], [TokenEvent("r", None, "abort")]])
def test_an_answer_without_an_end_is_gone_on_with(last):
    assert token_ids(run(GivesUp(*last))) == ANSWER


def test_closing_aborts_the_request_at_the_engine():
    engine = ScriptedEngine()

    async def take_one():
        async with aclosing(journal_of(engine).generate(REQUEST)) as events:
            await anext(events)

    asyncio.run(take_one())
    assert engine.aborted.acquire(blocking=False)
