"""/v1/completions, through OpenAI's own client."""

import pytest
from serve_fakes import EOS, tokens

from cluster.serve.completions import MAX_CHOICES_AT_ONCE


def complete(client, prompt="Once", **fields):
    return client.completions.create(model="base", prompt=prompt, **fields)


def test_a_text_is_completed(client, engine):
    answer = complete(client)
    assert answer.choices[0].text == "Hello, world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert answer.usage.prompt_tokens == len("Once")
    assert answer.usage.completion_tokens == len("Hello, world") + 1
    assert engine.submissions[0].prompt == tokens("Once")


def test_sixteen_tokens_are_the_default(client, engine):
    engine.answer = lambda prompt: "x" * 50
    answer = complete(client)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")


@pytest.mark.parametrize("prompt", [["ab", "c"], [[*tokens("ab")], [*tokens("c")]]])
def test_a_list_of_prompts_gets_n_choices_for_each_in_order(client, engine, prompt):
    engine.answer = lambda prompt: prompt.upper()
    answer = complete(client, prompt, n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (0, "AB"),
        (1, "AB"),
        (2, "C"),
        (3, "C"),
    ]
    assert answer.usage.prompt_tokens == 3
    assert answer.usage.completion_tokens == 2 * 3 + 2 * 2


def test_choices_beyond_those_that_run_at_once_wait_their_turn_and_keep_their_order(client, engine):
    engine.answer = lambda prompt: prompt.upper()
    prompts = [f"p{number}" for number in range(MAX_CHOICES_AT_ONCE + 8)]
    answer = complete(client, prompts, n=2)
    assert [choice.text for choice in answer.choices] == [
        prompt.upper() for prompt in prompts for _ in range(2)
    ]
    assert engine.most_at_once == MAX_CHOICES_AT_ONCE


def test_requests_share_cached_blocks_only_under_the_salt_that_they_name(client, engine):
    complete(client, ["a", "b"], n=2, extra_body={"cache_salt": "team 1"})
    complete(client, ["a"])
    assert [request.cache_salt for request in engine.submissions] == ["team 1"] * 4 + [""]


def test_a_prompt_has_the_same_seed_whatever_prompts_come_with_it(client, engine):
    complete(client, ["a", "b"], n=2, seed=-1)
    seeds = {request.prompt: [] for request in engine.submissions}
    for request in engine.submissions:
        seeds[request.prompt].append(request.sampling.seed)
    assert seeds == {tokens("a"): [2**63 - 1, 0], tokens("b"): [2**63 - 1, 0]}


def test_token_ids_are_a_prompt(client, engine):
    complete(client, [*tokens("ab")])
    assert engine.submissions[0].prompt == tokens("ab")


def test_a_stream_says_what_a_whole_answer_says(client):
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello, world"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("Hello, world") + 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Once ", [*tokens("Once ")]])
def test_echo_says_the_prompt_once_before_the_answer(client, prompt, stream):
    answer = complete(client, prompt, echo=True, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == "Once Hello, world"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_legacy_form_with_offsets_into_the_text(client, engine, stream):
    engine.answer = lambda prompt: "aéb"
    answer = complete(client, logprobs=1, stream=stream)
    parts = [part.choices[0].logprobs for part in (answer if stream else [answer])]
    assert [name for part in parts for name in part.tokens] == [
        "a",
        "bytes:\\xc3",
        "bytes:\\xa9",
        "b",
        f"token_id:{EOS}",
    ]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 2, 3]
    assert [logprob for part in parts for logprob in part.token_logprobs] == [-0.5] * 5
    assert parts[0].top_logprobs[0] == {"a": -0.5}


def test_logprobs_zero_tells_of_the_chosen_tokens(client):
    logprobs = complete(client, logprobs=0, max_tokens=1).choices[0].logprobs
    assert (logprobs.tokens, logprobs.top_logprobs) == (["H"], [{"H": -0.5}])
