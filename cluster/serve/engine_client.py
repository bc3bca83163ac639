"""How a gateway talks to the engines of one model."""

from collections.abc import AsyncGenerator
from typing import Protocol

from cluster.engine.request import GenerationRequest, TokenEvent


class EngineLost(ConnectionError):
    """The engine died before its last event; the request may be submitted to another one."""


class EngineOverloaded(RuntimeError):
    """The engines hold as many requests as they will; nothing of this one was computed."""


class EngineUnavailable(RuntimeError):
    """No engine of this model can take a request now, or the one that has it can not go on."""


class EngineClient(Protocol):
    """The engines of one model, whichever of them takes a request."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Submit a request and yield its events, receipts among them; the last one has a `finish_reason`.

        Closing the generator, or cancelling whoever waits for it, aborts the request at the engine. Raises
        EngineLost, EngineOverloaded or EngineUnavailable, whose text the client is shown.
        """
