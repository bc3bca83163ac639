import asyncio
from contextlib import aclosing

import pytest
from serve_fakes import EOS, TOKENIZER, tokens

from cluster.engine.request import TokenEvent
from cluster.serve.answer import merged, pieces
from cluster.serve.engine_client import EngineUnavailable
from cluster.text.detokenizer import Detokenizer


async def events_of(token_ids, last):
    for token_id in token_ids[:-1]:
        yield TokenEvent("r", token_id)
    yield TokenEvent("r", token_ids[-1], last)


def pieces_of(token_ids, last="length", stop=()):
    async def collect():
        return [piece async for piece in pieces(events_of(token_ids, last), Detokenizer(TOKENIZER, stop))]

    return asyncio.run(collect())


def test_a_token_without_text_comes_with_the_next_text():
    found = pieces_of(tokens("a€b"))
    assert [(piece.text, len(piece.tokens)) for piece in found] == [("a", 1), ("€", 3), ("b", 1)]


def test_text_that_waits_is_shown_at_the_end():
    found = pieces_of(tokens("ab<"), stop=("<end>",))
    assert [piece.text for piece in found] == ["a", "b", "<"]
    assert found[-1].finish_reason == "length"


def test_a_character_that_never_becomes_whole_is_shown_as_its_replacement():
    assert [piece.text for piece in pieces_of(tokens("a€")[:3])] == ["a", "\ufffd"]


def test_a_stop_string_on_the_last_token_ends_with_stop():
    assert pieces_of(tokens("ab"), stop=("b",))[-1].finish_reason == "stop"


def test_a_stop_token_that_is_no_special_token_is_not_shown():
    assert [piece.text for piece in pieces_of(tokens("ab"), last="stop")] == ["a", ""]


def test_every_token_is_in_one_piece():
    token_ids = (*tokens("one € <en <end"), EOS)
    found = pieces_of(token_ids, last="stop", stop=("<end>",))
    assert tuple(token.token_id for piece in found for token in piece.tokens) == token_ids


def test_an_engines_error_is_raised():
    async def failing():
        yield TokenEvent("r", None, "error", error="expert 3 has no replica")

    async def first():
        await anext(pieces(failing(), Detokenizer(TOKENIZER)))

    with pytest.raises(EngineUnavailable, match="expert 3 has no replica"):
        asyncio.run(first())


class Streams:
    """Endless streams that note when they are closed."""

    def __init__(self):
        self.num_closed = 0

    async def endless(self):
        try:
            while True:
                yield "item"
                await asyncio.Event().wait()
        finally:
            self.num_closed += 1

    async def failing(self):
        yield "item"
        raise EngineUnavailable("broken")


@pytest.mark.parametrize("num_streams", [1, 3])
def test_closing_the_merged_stream_closes_every_stream(num_streams):
    streams = Streams()

    async def take_all():
        async with aclosing(merged([streams.endless() for _ in range(num_streams)])) as items:
            return [await anext(items) for _ in range(num_streams)]

    assert sorted(asyncio.run(take_all())) == [(index, "item") for index in range(num_streams)]
    assert streams.num_closed == num_streams


def test_an_error_of_one_stream_closes_the_others():
    streams = Streams()

    async def take_all():
        return [item async for item in merged([streams.endless(), streams.failing(), streams.endless()])]

    with pytest.raises(EngineUnavailable, match="broken"):
        asyncio.run(take_all())
    assert streams.num_closed == 2
