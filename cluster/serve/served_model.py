"""A model as the gateway knows it: its text side, its limits, and its engines."""

from dataclasses import dataclass

from cluster.serve.engine_client import EngineClient
from cluster.text.base import Tokenizer
from cluster.text.templates import ChatTemplate


@dataclass(frozen=True)
class ServedModel:
    name: str  # what clients write into `model`
    tokenizer: Tokenizer
    template: ChatTemplate | None  # None: a base model, which completes but does not chat
    context_length: int  # tokens, prompt and answer together
    stop_token_ids: frozenset[int]  # they end an answer, unless the request says `ignore_eos`
    created: int  # seconds since 1970
    engine: EngineClient
