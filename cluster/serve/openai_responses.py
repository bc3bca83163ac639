"""The bodies of OpenAI's answers, whole and streamed.

A chunk is put together from prepared text, because its parts differ in one string only and thousands are sent
each second.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.engine.request import Logprob, TokenEvent
from cluster.serve.answer import Piece
from cluster.text.base import Tokenizer

_LEAST_LOGPROB = -9999.0  # OpenAI's number for "very unlikely"; JSON has no infinity


@dataclass(frozen=True)
class Envelope:
    """What every body and chunk of one answer repeats."""

    id: str
    model: str
    created: int

    def body(self, object: str, choices: Sequence[Any], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head(object), "choices": choices, "usage": usage}

    def chunk_parts(self, object: str, with_usage: bool) -> tuple[str, str]:
        """Return what stands before and behind the choices of a chunk."""
        return json.dumps(self._head(object))[
            :-1
        ] + ', "choices": [', '], "usage": null}' if with_usage else "]}"

    def usage_chunk(self, object: str, usage: dict[str, Any]) -> str:
        return json.dumps(self.body(object, [], usage))

    def _head(self, object: str) -> dict[str, Any]:
        return {"id": self.id, "object": object, "created": self.created, "model": self.model}


class Writer(Protocol):
    """How one endpoint words an answer. Holds what it has said of each choice so far: one per answer."""

    def chunks(self, index: int, piece: Piece) -> list[str]:
        """Return the JSON of the chunks that tell a client of `piece`."""

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        """Return the JSON of the last chunk, for who asked for `include_usage`."""

    def body(self, choices: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the whole answer; each choice is one piece here."""


class ChatWriter:
    """Words answers as `chat.completion`."""

    def __init__(self, envelope: Envelope, tokenizer: Tokenizer, logprobs: bool, with_usage: bool) -> None:
        self._envelope, self._tokenizer, self._wants_logprobs = envelope, tokenizer, logprobs
        self._before, self._behind = envelope.chunk_parts("chat.completion.chunk", with_usage)
        self._begun: set[int] = set()

    def chunks(self, index: int, piece: Piece) -> list[str]:
        chunks = []
        if index not in self._begun:
            self._begun.add(index)
            chunks.append(self._chunk(index, '{"role": "assistant", "content": ""}', None, None))
        delta = f'{{"content": {json.dumps(piece.text)}}}' if piece.text else "{}"
        return [*chunks, self._chunk(index, delta, self._logprobs(piece.tokens), piece.finish_reason)]

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        return self._envelope.usage_chunk("chat.completion.chunk", usage)

    def body(self, choices: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        worded = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece.tokens),
                "finish_reason": piece.finish_reason,
            }
            for index, piece in enumerate(choices)
        ]
        return self._envelope.body("chat.completion", worded, usage)

    def _chunk(self, index: int, delta: str, logprobs: dict[str, Any] | None, reason: str | None) -> str:
        ended = f'"{reason}"' if reason else "null"
        scores = json.dumps(logprobs) if logprobs else "null"
        choice = f'"index": {index}, "delta": {delta}, "logprobs": {scores}, "finish_reason": {ended}'
        return f"{self._before}{{{choice}}}{self._behind}"

    def _logprobs(self, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = [
            {**self._scored(token.logprob), "top_logprobs": [self._scored(top) for top in token.top_logprobs]}
            for token in tokens
            if token.logprob is not None
        ]
        return {"content": content, "refusal": None}

    def _scored(self, logprob: Logprob) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(logprob.token_id)
        name = token_name(logprob.token_id, data)
        return {"token": name, "logprob": _finite(logprob.logprob), "bytes": list(data) or None}


class CompletionWriter:
    """Words answers as `text_completion`. `echoes` holds what to say before each choice, if anything."""

    def __init__(
        self,
        envelope: Envelope,
        tokenizer: Tokenizer,
        logprobs: bool,
        with_usage: bool,
        echoes: Sequence[str] = (),
    ) -> None:
        self._envelope, self._tokenizer, self._wants_logprobs = envelope, tokenizer, logprobs
        self._before, self._behind = envelope.chunk_parts("text_completion", with_usage)
        self._echoes = dict(enumerate(echoes))  # each is said once
        self._offset: dict[int, int] = {}  # where the next token's text begins in the choice's text

    def chunks(self, index: int, piece: Piece) -> list[str]:
        text, ended = self._text(index, piece), f'"{piece.finish_reason}"' if piece.finish_reason else "null"
        logprobs = self._logprobs(index, piece.tokens)
        scores = json.dumps(logprobs) if logprobs else "null"
        choice = (
            f'"index": {index}, "text": {json.dumps(text)}, "logprobs": {scores}, "finish_reason": {ended}'
        )
        return [f"{self._before}{{{choice}}}{self._behind}"]

    def usage_chunk(self, usage: dict[str, Any]) -> str:
        return self._envelope.usage_chunk("text_completion", usage)

    def body(self, choices: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        worded = [
            {
                "index": index,
                "text": self._text(index, piece),
                "logprobs": self._logprobs(index, piece.tokens),
                "finish_reason": piece.finish_reason,
            }
            for index, piece in enumerate(choices)
        ]
        return self._envelope.body("text_completion", worded, usage)

    def _text(self, index: int, piece: Piece) -> str:
        return self._echoes.pop(index, "") + piece.text

    def _logprobs(self, index: int, tokens: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        names, logprobs, tops, offsets = [], [], [], []
        offset = self._offset.get(index, 0)
        for token in tokens:
            if token.logprob is None:
                continue
            data = self._tokenizer.token_bytes(token.logprob.token_id)
            names.append(token_name(token.logprob.token_id, data))
            logprobs.append(_finite(token.logprob.logprob))
            offsets.append(offset)
            offset += sum(byte & 0xC0 != 0x80 for byte in data)  # the bytes that begin a character
            tops.append(
                {self._name(top): _finite(top.logprob) for top in (*token.top_logprobs, token.logprob)}
            )
        self._offset[index] = offset
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, logprob: Logprob) -> str:
        return token_name(logprob.token_id, self._tokenizer.token_bytes(logprob.token_id))


def usage(num_prompt: int, num_generated: int, num_cached: int) -> dict[str, Any]:
    """Return the `usage` of an answer; cached tokens are among the prompt's."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def token_name(token_id: int, data: bytes) -> str:
    """Return a token's text, or a name that no other token has where it is none."""
    if not data:  # a special token adds nothing to the text
        return f"token_id:{token_id}"
    try:
        return data.decode()
    except UnicodeDecodeError:  # part of a character; written as OpenAI writes it
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
