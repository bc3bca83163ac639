"""From an engine's tokens to what a client may read of each choice."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

from cluster.engine.request import TokenEvent
from cluster.metrics import GatewayMetrics
from cluster.serve.engine_client import EngineUnavailable
from cluster.text.detokenizer import Detokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """The next text of one choice, and all tokens that came since the piece before.

    A token may wait for its text: half a character, or the beginning of what may be a stop string.
    """

    text: str
    tokens: tuple[TokenEvent, ...]
    finish_reason: Literal["stop", "length"] | None = None  # set in the last piece


async def pieces(
    events: AsyncGenerator[TokenEvent, None], detokenizer: Detokenizer
) -> AsyncGenerator[Piece, None]:
    """Yield a choice's text as it settles; stop the engine when a stop string is complete.

    A stop token ends the answer without being shown, but is among its `tokens`. Raises EngineUnavailable when
    the engine says that it can not go on.
    """
    waiting: list[TokenEvent] = []
    async with aclosing(events):
        async for event in events:
            if event.finish_reason == "error":
                raise EngineUnavailable(event.error or "the engine could not go on with this request")
            if event.token_id is not None:
                waiting.append(event)
            shown = () if event.token_id is None or event.finish_reason == "stop" else (event.token_id,)
            settled = detokenizer.feed(shown)
            text, stop = settled.text, settled.stop
            if event.finish_reason is not None and stop is None:
                rest = detokenizer.flush()
                text, stop = text + rest.text, rest.stop
            if stop is not None or event.finish_reason == "stop":
                yield Piece(text, tuple(waiting), "stop")
                return
            if event.finish_reason is not None:
                yield Piece(text, tuple(waiting), "length")
                return
            if text:
                yield Piece(text, tuple(waiting))
                waiting.clear()


async def measured(
    events: AsyncGenerator[TokenEvent, None], metrics: GatewayMetrics, model: str
) -> AsyncGenerator[TokenEvent, None]:
    """Pass events on, and observe when they come."""
    latency = metrics.time_to_first_token_seconds.labels(model)
    between = metrics.inter_token_seconds.labels(model)
    generated = metrics.generated_tokens.labels(model)
    before_s = time.perf_counter()
    async with aclosing(events):
        async for event in events:
            if event.token_id is not None:
                now_s = time.perf_counter()
                latency.observe(now_s - before_s)
                generated.inc()
                latency, before_s = between, now_s
            yield event


async def in_turn(turns: asyncio.Semaphore, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Pass a stream on, once it is its turn; it has begun nothing before."""
    async with turns, aclosing(stream):
        async for item in stream:
            yield item


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (index of the stream, item) in the order of arrival. The first error closes all streams."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T | None]] = asyncio.Queue()  # None: this stream is at its end

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    arrived.put_nowait((index, item))
        finally:
            arrived.put_nowait((index, None))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        for _ in pumps:
            while (arrival := await arrived.get())[1] is not None:
                yield arrival[0], arrival[1]
            await pumps[arrival[0]]  # raises what ended the stream, if it was an error
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
