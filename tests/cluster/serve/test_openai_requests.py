import json
from typing import get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from cluster.serve.errors import ApiError
from cluster.serve.openai_requests import ChatCompletionRequest, CompletionRequest, parse

USER = {"role": "user", "content": "Hi"}


def outcome(body, kind):
    try:
        return str(parse(json.dumps(body).encode(), kind))
    except ApiError as error:
        return error.message


def refusal(kind=ChatCompletionRequest, **fields):
    base = {"messages": [USER]} if kind is ChatCompletionRequest else {"prompt": "Hi"}
    with pytest.raises(ApiError) as raised:
        parse(json.dumps({"model": "m", **base, **fields}).encode(), kind)
    assert raised.value.status == 400
    return raised.value.param, raised.value.message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", "is 2.5, but it should be less than or equal to 2"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "0.5"}, "temperature", 'is "0.5", but it should be a valid number'),
        ({"temperature": True}, "temperature", "is true, but it should be a valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.01}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"frequency_penalty": 2.1}, "frequency_penalty", "less than or equal to 2"),
        ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"cache_salt": "x" * 257}, "cache_salt", "at most 256 characters"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 129}, "n", "less than or equal to 128"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5.0}, "max_tokens", "valid integer"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "up to 4 strings"),
        ({"stop": 7}, "stop", "string or a list"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "unknown field"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream to be true"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": None}, "messages", "is required"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", "is required"),
        ({"messages": [USER, {"role": "tool", "content": "1"}]}, "messages[1].role", "'assistant'"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0]", "tool_calls is not supported"),
        ({"messages": [{**USER, "colour": 1}]}, "messages[0]", "unknown field 'colour'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "'image_url'",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"audio": {}}, "audio", "not supported"),
        ({"temprature": 1}, "temprature", "unknown field"),
        ({"model": None}, "model", "is required"),
    ],
)
def test_a_wrong_chat_field_is_named_with_its_value_and_what_would_be_right(fields, param, words):
    found, message = refusal(**fields)
    assert (found, words in message) == (param, True), message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "must be a string"),
        ({"prompt": [[]]}, "prompt", "not empty"),
        ({"prompt": [1, "a"]}, "prompt", "must hold"),
        ({"prompt": [True]}, "prompt", "must hold"),
        ({"prompt": None}, "prompt", "is required"),
        ({"prompt": ["a"] * 9, "n": 128}, "n", "9 prompts x n 128 is more than the 1024"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"echo": True, "logprobs": 1}, "echo", "prompts are not scored"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
    ],
)
def test_a_wrong_completion_field_is_named_with_its_value_and_what_would_be_right(fields, param, words):
    found, message = refusal(CompletionRequest, **fields)
    assert (found, words in message) == (param, True), message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff",
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": "m", "prompt": "Hi", "temperature": NaN}',
        b'{"model": "m", "prompt": "Hi", "temperature": -Infinity}',
        b'{"model": "m", "prompt": "Hi", "temperature": 1e999}',
    ],
)
def test_what_is_no_json_object_of_finite_numbers_is_refused(body):
    with pytest.raises(ApiError) as raised:
        parse(body, CompletionRequest)
    assert raised.value.status == 400


def test_a_long_wrong_value_is_not_repeated_whole():
    _, message = refusal(model=["x" * 10_000])
    assert len(message) < 300


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        (chat_create_params.CompletionCreateParamsBase, ChatCompletionRequest),
        (completion_create_params.CompletionCreateParamsBase, CompletionRequest),
    ],
)
def test_every_field_of_openais_client_is_known_here(params, kind):
    prompt = {"messages": [USER]} if kind is ChatCompletionRequest else {"prompt": "Hi"}
    for name in get_type_hints(params):
        # No field takes this value, so all but those without effect are refused, each for its own reason.
        body = {"model": "m", **prompt, name: {"not": "right"}}
        assert f"unknown field {name!r}" not in outcome(body, kind)
