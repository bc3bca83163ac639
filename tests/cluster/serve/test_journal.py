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

RETRY = RetryPolicy(max_losses=2, deadline_s=5.0, first_pause_s=0.001, longest_pause_s=0.002, receipt_s=2.0)
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


def test_a_request_that_no_engine_confirms_goes_to_another_and_that_is_no_loss():
    engine = ScriptedEngine(num_silent=RETRY.max_losses + 3)
    assert token_ids(run(engine, replace(RETRY, receipt_s=0.001))) == ANSWER
    assert len({request.id for request in engine.submissions}) == RETRY.max_losses + 4


def test_engines_have_longer_each_time_to_confirm_a_request():
    engine = ScriptedEngine(num_silent=100)
    with pytest.raises(EngineUnavailable):
        run(engine, replace(RETRY, receipt_s=0.001, deadline_s=0.3))
    assert len(engine.submissions) <= 9, "1 + 2 + 4 + ... + 256 ms are more than 300 ms"


def test_a_new_request_that_no_engine_takes_fails_at_the_deadline():
    with pytest.raises(EngineUnavailable, match=r"no engine took the request within 0\.02 s"):
        run(ScriptedEngine(num_silent=100), replace(RETRY, deadline_s=0.02))


class LostOnceThenSilent:
    """An engine that is lost after two tokens, and that nobody follows."""

    def __init__(self):
        self.first, self.silent = (
            ScriptedEngine(failures=[(2, EngineLost("gone"))]),
            ScriptedEngine(num_silent=100),
        )

    def generate(self, request):
        return (self.silent if self.first.submissions else self.first).generate(request)


def test_a_lost_request_that_no_other_engine_takes_fails_at_the_deadline():
    engine = LostOnceThenSilent()
    with pytest.raises(EngineUnavailable, match=r"no engine took the request within 0\.02 s"):
        run(engine, replace(RETRY, deadline_s=0.02))
    assert engine.silent.submissions[0].emitted == ANSWER[:2]


@pytest.mark.parametrize("failures", [[], [(2, EngineLost("gone"))]])
def test_an_engine_that_has_the_request_may_take_its_time(failures):
    engine = ScriptedEngine(failures=failures, prompt_s=0.1)
    assert token_ids(run(engine, replace(RETRY, deadline_s=0.05, receipt_s=0.05))) == ANSWER


def test_only_a_request_that_an_engine_had_is_resumed():
    engine = ScriptedEngine(num_silent=1, failures=[(0, EngineLost("none")), (0, EngineLost("gone"))])
    run(engine, replace(RETRY, receipt_s=0.01))
    assert [request.is_resumed for request in engine.submissions] == [False, False, True]


def test_only_the_first_submission_behind_a_loss_seeks_the_copies():
    lost = (1, EngineLost("gone"))
    engine = ScriptedEngine(failures=[lost, (0, EngineUnavailable("none")), (2, EngineLost("gone"))])
    run(engine)
    assert [request.seeks_copies for request in engine.submissions] == [False, True, False, True]


def test_all_submissions_of_a_request_have_one_answer_id():
    engine = ScriptedEngine(failures=[(3, EngineLost("gone"))])
    run(engine, request=replace(REQUEST, id="cmpl-a.b-0"))
    assert {request.answer_id for request in engine.submissions} == {"cmpl-a.b-0"}


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
