"""The events of one engine step as the bytes of one frame."""

import json
from collections.abc import Iterable
from typing import Any, TypeVar, get_args

from cluster.engine.request import FinishReason, Logprob, TokenEvent

T = TypeVar("T")

_DEFAULTS: tuple[object, ...] = (None, 0, [])  # of the packed fields behind the token id
_FINISH_REASONS = (None, *get_args(FinishReason))


def encode_events(events: Iterable[TokenEvent]) -> bytes:
    """Encode events as JSON: one array per event, its trailing defaults left out."""
    return json.dumps([_pack(event) for event in events], separators=(",", ":")).encode()


def decode_events(data: bytes | memoryview) -> list[TokenEvent]:
    """Invert `encode_events`. Raises ValueError for anything else."""
    try:
        return [_unpack(*_checked(list, fields)) for fields in _checked(list, json.loads(bytes(data)))]
    except (TypeError, RecursionError) as error:
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
    while rest and rest[-1] in _DEFAULTS:
        rest.pop()
    return fields + rest


def _unpack(
    request_id: object,
    token_id: object,
    finish_reason: Any = None,
    num_cached: object = 0,
    error: object = None,
    logprob: object = None,
    top_logprobs: object = None,
) -> TokenEvent:
    if finish_reason not in _FINISH_REASONS:
        raise TypeError(f"{finish_reason!r} is no finish reason")
    return TokenEvent(
        _checked(str, request_id),
        None if token_id is None else _checked(int, token_id),
        finish_reason,
        None if logprob is None else _logprob(logprob),
        () if top_logprobs is None else tuple(map(_logprob, _checked(list, top_logprobs))),
        _checked(int, num_cached),
        None if error is None else _checked(str, error),
    )


def _logprob(fields: object) -> Logprob:
    token_id, logprob = _checked(list, fields)
    return Logprob(_checked(int, token_id), _checked(float, logprob))


def _checked(kind: type[T], value: object) -> T:
    if type(value) is not kind:  # not isinstance: True is an int to Python, but not to us
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value
