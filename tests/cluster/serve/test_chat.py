"""/v1/chat/completions, through OpenAI's own client."""

import openai
import pytest
from serve_fakes import CONTEXT_LENGTH, EOS, tokens

from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from shards.sampling_params import SamplingParams

HI = [{"role": "user", "content": "Hi"}]
RENDERED = "<user>Hi<answer>"


def chat(client, messages=HI, **fields):
    return client.chat.completions.create(model="echo", messages=messages, **fields)


def streamed(client, messages=HI, **fields):
    return list(chat(client, messages, stream=True, **fields))


def text(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_ends_at_the_stop_token_which_counts_but_is_not_shown(client):
    answer = chat(client)
    assert answer.choices[0].message.content == "Hello, world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.prompt_tokens == len(RENDERED)
    assert answer.usage.completion_tokens == len("Hello, world") + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_what_a_whole_answer_says(client):
    chunks = streamed(client)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert text(chunks) == "Hello, world"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_its_usage_if_asked_to(client, engine):
    engine.num_cached = 4
    last = streamed(client, stream_options={"include_usage": True})[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == len("Hello, world") + 1
    assert last.usage.prompt_tokens_details.cached_tokens == 4


def test_the_engine_gets_the_rendered_template_and_every_sampling_field(client, engine):
    knobs = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1}
    chat(
        client,
        [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.25,
        presence_penalty=-0.25,
        seed=11,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=20,
        extra_body={**knobs, "stop_token_ids": [5]},
    )
    (request,) = engine.submissions
    assert request.prompt == tokens("<system>Be brief<user>Hi<answer>")
    assert request.max_tokens == 20
    assert request.stop_token_ids == {5, EOS}
    assert request.sampling == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.25,
        presence_penalty=-0.25,
        seed=11,
        num_logprobs=2,
        **knobs,
    )


def test_without_max_tokens_an_answer_may_fill_the_context(client, engine):
    chat(client)
    assert engine.submissions[0].max_tokens == CONTEXT_LENGTH - len(RENDERED)


def test_an_answer_that_reaches_max_tokens_ends_with_length(client):
    answer = chat(client, max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hel", "length")


def test_ignore_eos_goes_on_behind_the_stop_token(client):
    answer = chat(client, max_tokens=18, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == "Hello, worldHello"
    assert answer.usage.completion_tokens == 18


def test_text_parts_are_joined_line_by_line(client, engine):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat(client, [{"role": "user", "content": parts}])
    assert engine.submissions[0].prompt == tokens("<user>a\nb<answer>")


def test_an_assistant_message_can_be_sent_back_as_it_was_received(client, engine):
    said = chat(client).choices[0].message
    chat(client, [*HI, said, {"role": "user", "content": "More"}])
    assert engine.submissions[1].prompt == tokens("<user>Hi<assistant>Hello, world<user>More<answer>")


def test_fields_that_cannot_change_the_answer_are_accepted(client):
    chat(client, user="me", metadata={"a": "b"}, store=True, service_tier="auto", tools=[], logit_bias={})
    chat(client, response_format={"type": "text"}, tool_choice="none", temperature=None)


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices_have_seeds_that_follow_each_other(client, engine, stream):
    answer = chat(client, n=3, seed=2**63 - 1, stream=stream)
    if stream:
        chunks = list(answer)
        assert [text(chunks, index) for index in range(3)] == ["Hello, world"] * 3
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.usage.prompt_tokens == len(RENDERED)
        assert answer.usage.completion_tokens == 3 * (len("Hello, world") + 1)
    assert [request.sampling.seed for request in engine.submissions] == [2**63 - 1, 0, 1]
    assert len({request.id for request in engine.submissions}) == 3


def test_a_seed_is_drawn_when_none_is_given(client, engine):
    chat(client)
    chat(client)
    assert engine.submissions[0].sampling.seed != engine.submissions[1].sampling.seed


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string_and_the_engine_is_told(client, engine, stream):
    if stream:
        chunks = streamed(client, stop=["wor"])
        assert text(chunks) == "Hello, "
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        answer = chat(client, stop="wor")
        assert answer.choices[0].message.content == "Hello, "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == len("Hello, wor")
    assert engine.aborted.acquire(timeout=5)


def test_a_beginning_of_a_stop_string_that_does_not_go_on_is_shown(client):
    assert text(streamed(client, stop=["world!"])) == "Hello, world"


def test_a_character_is_streamed_when_its_last_byte_is_there(client, engine):
    engine.answer = lambda prompt: "né€🙂"
    contents = [chunk.choices[0].delta.content for chunk in streamed(client)]
    assert contents == ["", "n", "é", "€", "🙂", None]


@pytest.mark.parametrize("stream", [False, True])
def test_each_generated_token_has_its_logprobs_also_when_its_text_waits(client, engine, stream):
    engine.answer = lambda prompt: "a€b"
    fields = {"logprobs": True, "top_logprobs": 2, "stop": ["bx"]}
    if stream:
        chunks = streamed(client, **fields)
        found = [
            token
            for chunk in chunks
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
    else:
        found = chat(client, **fields).choices[0].logprobs.content
    assert [token.token for token in found] == [
        "a",
        "bytes:\\xe2",
        "bytes:\\x82",
        "bytes:\\xac",
        "b",
        f"token_id:{EOS}",
    ]
    assert [token.bytes for token in found] == [[97], [0xE2], [0x82], [0xAC], [98], None]
    assert all(token.logprob == -0.5 for token in found)
    assert all([top.logprob for top in token.top_logprobs] == [-0.5, -1.5] for token in found)


def test_logprobs_without_top_logprobs_tell_of_the_chosen_token_only(client):
    found = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs.content
    assert [(token.token, token.top_logprobs) for token in found] == [("H", [])]


@pytest.mark.parametrize("num_before", [0, 1, 5])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_goes_on_unbroken_when_its_engine_dies(client, engine, stream, num_before):
    engine.failures = [(num_before, EngineLost("gone"))]
    if stream:
        chunks = streamed(client)
        assert text(chunks) == "Hello, world"
        assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == 1
    else:
        assert chat(client).choices[0].message.content == "Hello, world"
    assert [len(request.emitted) for request in engine.submissions] == [0, num_before]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (EngineOverloaded("256 requests wait"), openai.RateLimitError),
        (EngineUnavailable("none"), openai.APIError),
    ],
)
def test_what_fails_before_the_first_token_has_a_proper_status(client, engine, stream, error, expected):
    engine.failures = [(0, error)]
    with pytest.raises(expected, match=str(error)) as raised:
        chat(client, stream=stream)
    assert raised.value.status_code == (429 if isinstance(error, EngineOverloaded) else 503)
    assert raised.value.response.headers["retry-after"] == "1"


def test_what_fails_in_mid_stream_is_told_in_the_stream(client, engine):
    engine.failures = [(2, EngineUnavailable("expert 3 of layer 1 has no replica"))]
    seen = []
    with pytest.raises(openai.APIError, match="expert 3 of layer 1"):
        seen.extend(chat(client, stream=True))  # keeps what came before the error
    assert text(seen) == "He"


def test_one_failing_choice_fails_the_answer_and_ends_the_others(client, engine):
    engine.hang_after = 3
    engine.failures = [(1, EngineUnavailable("broken"))]
    with pytest.raises(openai.InternalServerError, match="broken"):
        chat(client, n=2)
    assert engine.aborted.acquire(timeout=5)
