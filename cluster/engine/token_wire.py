"""The events of one engine step as the bytes of one frame."""

import json
from collections.abc import Iterable
from typing import Any

from cluster.engine.request import Logprob, TokenEvent


def encode_events(events: Iterable[TokenEvent]) -> bytes:
    """Encode events as JSON: one array per event, its trailing defaults left out."""
    return json.dumps([_pack(event) for event in events], separators=(",", ":")).encode()


def decode_events(data: bytes | memoryview) -> list[TokenEvent]:
    """Invert `encode_events`. Raises ValueError for anything else."""
    try:
        return [_unpack(*fields) for fields in json.loads(bytes(data))]
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"not a frame of token events: {error}") from None


def _pack(event: TokenEvent) -> list[Any]:
    fields: list[Any] = [event.request_id, event.token_id]
    rest = [
        event.finish_reason,
        event.num_cached,
        event.error,
        [event.logprob.token_id, event.logprob.logprob] if event.logprob else None,
        [[top.token_id, top.logprob] for top in event.top_logprobs],
    ]
    while rest and not rest[-1]:
        rest.pop()
    return fields + rest


def _unpack(
    request_id: str,
    token_id: int | None,
    finish_reason: Any = None,
    num_cached: int | None = None,
    error: str | None = None,
    logprob: list[Any] | None = None,
    top_logprobs: list[list[Any]] | None = None,
) -> TokenEvent:
    return TokenEvent(
        request_id,
        token_id,
        finish_reason,
        Logprob(*logprob) if logprob else None,
        tuple(Logprob(*top) for top in top_logprobs or ()),
        num_cached or 0,
        error,
    )
