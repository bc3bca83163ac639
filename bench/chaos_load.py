"""A steady load: some streams at a time, a fixed list of requests, and what each stream saw.

The client shares the machine with what it measures. So it is one process that reads sockets itself, and only
notes which bytes came when; they are understood after the load has ended.
"""

import asyncio
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby, pairwise, repeat

STREAM_DEADLINE_S = 240.0  # more than the gateway itself waits for another engine
_WORDS = (
    "wind",
    "sail",
    "harbour",
    "rope",
    "keel",
    "tide",
    "star",
    "north",
    "anchor",
    "gull",
    "storm",
    "crew",
)


@dataclass(frozen=True)
class Request:
    """One of the list. Greedy or sampled, short or long, but always the same."""

    index: int
    seed: int
    temperature: float
    max_tokens: int
    prompt: str

    def body(self, model: str) -> bytes:
        """Return the JSON of a streamed completion with logprobs, which are compared bit for bit.

        Each time with another salt: asked again, it costs what it did at first, in spite of prefix caches.
        """
        fields = {
            "model": model,
            "prompt": self.prompt,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
            "cache_salt": secrets.token_hex(8),
        }
        return json.dumps(fields).encode()


@dataclass(frozen=True)
class Stream:
    """What came of one request. Times are of `time.perf_counter`."""

    request: Request
    began_at: float
    token_times: tuple[float, ...]
    tokens: tuple[tuple[str, float], ...]  # and their logprobs
    status: int  # of HTTP; that of the error, if the stream ended in one; 0: there was no answer
    error: str | None = None

    def gaps(self) -> Iterator[tuple[float, float]]:
        """Yield, for each token but the first ones, when it came, and how long after the one before.

        Tokens that only together make a character come together: they share the time since the last piece.
        """
        pieces = [(at, len(list(tokens))) for at, tokens in groupby(self.token_times)]
        for (before, _), (after, number) in pairwise(pieces):
            yield from repeat((after, (after - before) / number), number)


def make_requests(number: int, mean_tokens: int) -> list[Request]:
    """Make a list of requests, every other one greedy; lengths differ much, so that few end together."""
    requests = []
    for index in range(number):
        chance = random.Random(index)
        words = " ".join(chance.choices(_WORDS, k=chance.choice((2, 5, 12, 30, 60))))
        prompt = f"Story {index}. Once upon a time there was a {words}, and"
        max_tokens = mean_tokens + (19 * index % 49 - 24) * mean_tokens // 48
        requests.append(Request(index, 1000 + index, 0.8 * (index % 2), max_tokens, prompt))
    return requests


async def play(
    host: str, port: int, model: str, requests: Sequence[Request], num_streams: int, enough: asyncio.Event
) -> list[Stream]:
    """Ask the whole list, and again until `enough` is set, `num_streams` at a time, in a closed loop."""
    numbers = count()
    streams: list[Stream] = []

    async def one_after_another() -> None:
        for number in numbers:  # shared: each takes the next one
            if number >= len(requests) and enough.is_set():
                return
            streams.append(await _ask(host, port, model, requests[number % len(requests)]))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(one_after_another())
    return streams


@dataclass
class _Arrival:
    """What has come so far."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)


async def _ask(host: str, port: int, model: str, request: Request) -> Stream:
    began_at, arrival, error = time.perf_counter(), _Arrival(), None
    try:
        async with asyncio.timeout(STREAM_DEADLINE_S):
            await _converse(host, port, request.body(model), arrival)
    except TimeoutError:
        error = f"it had not ended after {STREAM_DEADLINE_S:g} s"
    except (OSError, EOFError, ValueError) as failure:
        error = f"the connection ended early: {failure!r}"
    return _understand(request, began_at, arrival, error)


async def _converse(host: str, port: int, body: bytes, arrival: _Arrival) -> None:
    """Send a request and note what comes. Raises OSError, EOFError or ValueError if it is no whole answer."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        status_line = await reader.readuntil(b"\r\n")
        headers = [line async for line in _lines(reader)]
        arrival.status = int(status_line.split()[1])
        if not any(b"chunked" in line.lower() for line in headers):
            arrival.pieces.append((time.perf_counter(), await reader.read()))
            return
        while size := int(await reader.readuntil(b"\r\n"), 16):
            piece = await reader.readexactly(size + 2)
            arrival.pieces.append((time.perf_counter(), piece[:-2]))
    finally:
        writer.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
        yield line


def _understand(request: Request, began_at: float, arrival: _Arrival, error: str | None) -> Stream:
    if arrival.status != 200:
        said = b"".join(data for _, data in arrival.pieces).decode(errors="replace")
        return Stream(
            request, began_at, (), (), arrival.status, error or f"HTTP {arrival.status}: {said[:300]}"
        )
    times: list[float] = []
    tokens: list[tuple[str, float]] = []
    status, is_done = 200, False
    for at, event in _events(arrival.pieces):
        if event == b"data: [DONE]":
            is_done = True
            continue
        said = json.loads(event.removeprefix(b"data: "))
        if "error" in said:
            status = 503 if said["error"]["code"] == "service_unavailable" else 500
            error = f"in mid-stream: {said['error']['message']}"
            break
        logprobs = said["choices"][0]["logprobs"] or {"tokens": (), "token_logprobs": ()}
        tokens += zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        times += [at] * len(logprobs["tokens"])
    if error is None and not is_done:
        error = "the stream was cut"
    if error is None and len(tokens) != request.max_tokens:
        error = f"{len(tokens)} tokens came, not {request.max_tokens}"
    return Stream(request, began_at, tuple(times), tuple(tokens), status, error)


def _events(pieces: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield each server-sent event, and when its last byte came."""
    rest = b""
    for at, data in pieces:
        *whole, rest = (rest + data).split(b"\n\n")
        yield from ((at, event) for event in whole)
