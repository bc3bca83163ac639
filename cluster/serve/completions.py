"""Answers completion requests: from a validated body to a response, whole or streamed."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from cluster.engine.request import GenerationRequest
from cluster.metrics import GatewayMetrics
from cluster.serve.answer import Piece, in_turn, measured, merged, pieces
from cluster.serve.connection import EventStream, read_json, while_connected
from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from cluster.serve.errors import ApiError, internal, overloaded, unavailable
from cluster.serve.journal import Journal, RetryPolicy
from cluster.serve.observer import Exchange
from cluster.serve.openai_requests import ChatCompletionRequest, CompletionFields, CompletionRequest, parse
from cluster.serve.openai_responses import ChatWriter, CompletionWriter, Envelope, Writer, usage
from cluster.serve.served_model import ServedModel
from cluster.serve.submission import chat_prompt, completion_prompts, submissions
from cluster.text.detokenizer import Detokenizer

# A request may ask for more choices than any engine holds; all at once, they would be refused for ever.
MAX_CHOICES_AT_ONCE = 32

ENGINE_ERRORS = (EngineLost, EngineOverloaded, EngineUnavailable)

_log = logging.getLogger(__name__)

Pieces = AsyncGenerator[tuple[int, Piece], None]  # (index of the choice, its next piece)


class Tally:
    """Counts one answer's tokens for its `usage`."""

    def __init__(self, requests: Sequence[GenerationRequest], n: int) -> None:
        self._n = n
        self._num_prompt = sum(len(request.prompt) for request in requests[::n])
        self._num_generated = self._num_cached = 0

    def add(self, index: int, piece: Piece) -> None:
        self._num_generated += len(piece.tokens)
        if index % self._n == 0:  # the other choices of a prompt find what the first one computed
            self._num_cached += sum(token.num_cached for token in piece.tokens)

    def usage(self) -> dict[str, object]:
        return usage(self._num_prompt, self._num_generated, self._num_cached)


@dataclass(frozen=True)
class Completions:
    """Both completion endpoints, over all models of one gateway process."""

    models: Mapping[str, ServedModel]
    metrics: GatewayMetrics
    retry: RetryPolicy

    def find(self, name: str) -> ServedModel:
        """Return a model, or raise ApiError with the names that there are."""
        if name not in self.models:
            served = ", ".join(map(repr, sorted(self.models)))
            raise ApiError(
                404, f"model {name!r} is not served here; there is {served}", "model", "model_not_found"
            )
        return self.models[name]

    def _choose(self, request: Request, body: CompletionFields) -> ServedModel:
        model = self.find(body.model)
        request.state.exchange.model = model.name
        return model

    async def chat(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions."""
        body = parse(await read_json(request), ChatCompletionRequest)
        model = self._choose(request, body)
        # In a thread: a long prompt must not hold up the streams of others.
        prompt = await asyncio.to_thread(chat_prompt, model, body.messages)
        envelope = Envelope(f"chatcmpl-{uuid.uuid4().hex}", model.name, int(time.time()))
        requests = submissions(model, body, [prompt], envelope.id)
        with_usage = body.stream_options.include_usage
        return await self._answer(
            request, body, model, requests, ChatWriter(envelope, model.tokenizer, body.logprobs, with_usage)
        )

    async def complete(self, request: Request) -> Response:
        """Answer POST /v1/completions."""
        body = parse(await read_json(request), CompletionRequest)
        model = self._choose(request, body)
        prompts = await asyncio.to_thread(completion_prompts, model, body.prompt)
        envelope = Envelope(f"cmpl-{uuid.uuid4().hex}", model.name, int(time.time()))
        requests = submissions(model, body, prompts, envelope.id)
        writer = CompletionWriter(
            envelope,
            model.tokenizer,
            body.logprobs is not None,
            body.stream_options.include_usage,
            _texts(model, body) if body.echo else (),
        )
        return await self._answer(request, body, model, requests, writer)

    async def _answer(
        self,
        request: Request,
        body: CompletionFields,
        model: ServedModel,
        requests: Sequence[GenerationRequest],
        writer: Writer,
    ) -> Response:
        """Run `requests` and word what comes. No header is sent before an engine's first word."""
        exchange: Exchange = request.state.exchange
        tally = Tally(requests, body.n)
        answer = self._run(model, requests, body.stop)
        try:
            if not body.stream:
                choices = await while_connected(request.receive, _collect(answer, len(requests), tally))
                whole = json.dumps(writer.body(choices, tally.usage()))
                return Response(whole, media_type="application/json")
            first = await while_connected(request.receive, _next(answer))
        except BaseException as error:
            await answer.aclose()
            if isinstance(error, ENGINE_ERRORS):
                raise _explain(error) from error
            raise
        with_usage = body.stream_options.include_usage
        return EventStream(_events(first, answer, writer, tally, with_usage, exchange))

    async def _run(
        self, model: ServedModel, requests: Sequence[GenerationRequest], stop: Sequence[str]
    ) -> Pieces:
        """Submit all requests, MAX_CHOICES_AT_ONCE at a time, and yield what comes of them."""
        turns = asyncio.Semaphore(MAX_CHOICES_AT_ONCE)
        metrics = self.metrics
        journal = Journal(model.engine, self.retry, metrics.resubmissions.labels(model.name))
        choices = [
            in_turn(
                turns,
                pieces(
                    measured(journal.generate(request), metrics, model.name),
                    Detokenizer(model.tokenizer, stop),
                ),
            )
            for request in requests
        ]
        metrics.prompt_tokens.labels(model.name).inc(sum(len(request.prompt) for request in requests))
        with metrics.in_flight.labels(model.name).track_inprogress():
            async with aclosing(merged(choices)) as answer:
                async for index, piece in answer:
                    yield index, piece


def _texts(model: ServedModel, body: CompletionRequest) -> list[str]:
    """Return the prompt's text for each choice."""
    decode = model.tokenizer.decode
    texts = [prompt if isinstance(prompt, str) else decode(prompt) for prompt in body.prompt]
    return [text for text in texts for _ in range(body.n)]


async def _next(answer: Pieces) -> tuple[int, Piece]:
    return await anext(answer)


async def _collect(answer: Pieces, num_choices: int, tally: Tally) -> list[Piece]:
    """Wait for all pieces and return each choice as one."""
    parts: list[list[Piece]] = [[] for _ in range(num_choices)]
    async for index, piece in answer:
        parts[index].append(piece)
        tally.add(index, piece)
    return [
        Piece(
            "".join(piece.text for piece in choice),
            tuple(token for piece in choice for token in piece.tokens),
            choice[-1].finish_reason,
        )
        for choice in parts
    ]


async def _events(
    first: tuple[int, Piece],
    answer: Pieces,
    writer: Writer,
    tally: Tally,
    with_usage: bool,
    exchange: Exchange,
) -> AsyncGenerator[bytes, None]:
    """Yield an answer as server-sent events. An error is one, too: the header has long said 200."""
    failure: ApiError | None = None
    try:
        async with aclosing(answer):
            piece: tuple[int, Piece] | None = first
            while piece is not None:
                tally.add(*piece)
                yield b"".join(map(_event, writer.chunks(*piece)))  # one write, however many chunks
                piece = await anext(answer, None)
    except ENGINE_ERRORS as error:
        failure = _explain(error)
    except Exception:
        _log.exception("%s failed in mid-stream", exchange.request_id)
        failure = internal(exchange.request_id)
    if failure is not None:
        exchange.status = failure.status
        yield _event(json.dumps(failure.body()))
        return
    if with_usage:
        yield _event(writer.usage_chunk(tally.usage()))
    yield b"data: [DONE]\n\n"


def _event(data: str) -> bytes:
    return b"data: %b\n\n" % data.encode()


def _explain(error: Exception) -> ApiError:
    """Word an engine's failure for a client."""
    message = str(error) or "no engine can answer now"
    return overloaded(message) if isinstance(error, EngineOverloaded) else unavailable(message)
