"""A request as an engine sees it: tokens in, tokens out. Free of torch, so that a gateway can import it."""

from dataclasses import dataclass, replace
from typing import Literal

from shards.sampling_params import SamplingParams

# stop: a stop token; length: max_tokens or the context's end; abort: the gateway asked for it;
# error: the engine could not go on (`TokenEvent.error` says why)
FinishReason = Literal["stop", "length", "abort", "error"]


class EngineFull(RuntimeError):
    """The engine holds as many requests as it will, running and waiting; nothing of this one was computed."""


class EngineStopped(RuntimeError):
    """The engine's steps have ended; another engine may go on with the request."""


@dataclass(frozen=True)
class GenerationRequest:
    """What a gateway submits.

    `emitted` holds the tokens that an earlier engine already produced for this request: the answer goes
    on behind them exactly as it would have there. They count towards `max_tokens` and the penalties.

    `is_resumed` says that an earlier engine had the request, though it may have emitted nothing: somebody has
    been promised an answer, so it goes before requests that nobody has taken yet, and is never one too many.

    Requests share cached keys and values only with those of the same `cache_salt`.
    """

    id: str  # another for every submission of the same answer
    prompt: tuple[int, ...]
    max_tokens: int  # of the answer, `emitted` included; at least 1
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()  # ends the answer; the token itself is emitted, too
    emitted: tuple[int, ...] = ()
    is_resumed: bool = False
    seeks_copies: bool = False  # of its keys and values: should go to the engine that may have them
    cache_salt: str = ""

    def attempt(self, number: int) -> "GenerationRequest":
        """Return the request as it is submitted for the `number`-th time."""
        return replace(self, id=f"{self.id}.{number}")

    @property
    def answer_id(self) -> str:
        """What the ids of all attempts at this answer have in common."""
        return self.id.rpartition(".")[0] or self.id


@dataclass(frozen=True)
class Logprob:
    token_id: int
    logprob: float  # natural logarithm, of the model's distribution before any sampling knob


@dataclass(frozen=True)
class TokenEvent:
    """One step's result for one request: a token, or an end without one (abort, error).

    Or neither, in no step: a receipt, which says that the engine has the request.
    """

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprob: Logprob | None = None  # of the chosen token, if the request asked for logprobs
    top_logprobs: tuple[Logprob, ...] = ()  # the likeliest tokens, best first
    num_cached: int = 0  # prompt tokens that came from the prefix cache; set with the first token
    error: str | None = None

    @property
    def is_receipt(self) -> bool:
        return self.token_id is None and self.finish_reason is None


@dataclass(frozen=True)
class Generated:
    """How a request ended."""

    finish_reason: FinishReason
    num_tokens: int  # produced here; tokens that came with the request do not count
