import json
from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engine.request import FinishReason, Logprob, TokenEvent
from cluster.engine.token_wire import decode_events, encode_events

token_ids = st.integers(0, 2**31)
logprobs = st.builds(Logprob, token_ids, st.floats(max_value=0, allow_nan=False))
events = st.builds(
    TokenEvent,
    st.text(),
    st.none() | token_ids,
    st.none() | st.sampled_from(get_args(FinishReason)),
    st.none() | logprobs,
    st.lists(logprobs, max_size=3).map(tuple),
    st.integers(0, 2**31),
    st.none() | st.text(),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(st.lists(events))
def test_events_survive_their_journey(sent):
    assert decode_events(encode_events(sent)) == sent


def test_a_frame_may_be_read_from_a_links_buffer():
    sent = [TokenEvent("a", 7), TokenEvent("b", None, "error", error="no replica")]
    assert decode_events(memoryview(encode_events(sent))) == sent


def test_a_token_and_nothing_else_is_two_fields():
    assert encode_events([TokenEvent("a", 7)]) == b'[["a",7]]'


@given(st.binary())
def test_bytes_are_read_or_refused(data):
    with suppress(ValueError):
        decode_events(data)


@given(json_values | st.lists(st.tuples(st.text(max_size=3), json_values, json_values)))
def test_what_is_read_is_what_was_sent_and_anything_else_is_refused(value):
    try:
        decoded = decode_events(json.dumps(value).encode())
    except ValueError:
        return
    assert decode_events(encode_events(decoded)) == decoded


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b'{"ab": 1}',
        b'["ab"]',
        b"[[]]",
        b'[["a"]]',
        b'[["a", "7"]]',
        b'[["a", true]]',
        b'[["a", 7.0]]',
        b"[[1, 7]]",
        b'[["a", 7, "done"]]',
        b'[["a", 7, []]]',
        b'[["a", 7, null, "3"]]',
        b'[["a", 7, null, 0, 3]]',
        b'[["a", 7, null, 0, null, "ab"]]',
        b'[["a", 7, null, 0, null, [1]]]',
        b'[["a", 7, null, 0, null, [1, "x"]]]',
        b'[["a", 7, null, 0, null, null, [1]]]',
        b'[["a", 7, null, 0, null, null, [], 1]]',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_frame_that_no_engine_sends_is_refused(data):
    with pytest.raises(ValueError):  # noqa: PT011  # its words are for our log only
        decode_events(data)
