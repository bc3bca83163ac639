"""The tokens emitted so far of each running request, and what to do with them when an engine dies."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count

from prometheus_client import Counter

from cluster.engine.request import GenerationRequest, TokenEvent
from cluster.serve.engine_client import EngineClient, EngineLost, EngineOverloaded, EngineUnavailable


@dataclass(frozen=True)
class RetryPolicy:
    """How long a request outlives its engines."""

    max_losses: int = 3  # in a row without a token between: more, and the request is the likely cause
    deadline_s: float = 120.0  # from the loss to the next token; an engine may have to start meanwhile
    first_pause_s: float = 0.02  # before asking again while no engine takes it; doubles each time
    longest_pause_s: float = 1.0


@dataclass(frozen=True)
class Journal:
    """Runs requests on the engines of one model, and keeps each alive when its engine dies."""

    engine: EngineClient
    retry: RetryPolicy
    resubmissions: Counter  # already labelled with the model

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the request's events as if one engine had run it from first to last.

        A lost request is submitted again with the tokens emitted so far. Raises EngineOverloaded or
        EngineUnavailable: at once if no engine ever took the request, later when `retry` is exhausted.
        """
        clock = asyncio.get_running_loop().time
        emitted = list(request.emitted)
        losses, pause_s = 0, 0.0
        deadline: float | None = None  # set from a loss to the next token
        # An engine that was only out of reach may still hold an earlier attempt, so ids are not used twice.
        for attempt in count():
            submission = replace(request, id=f"{request.id}.{attempt}", emitted=tuple(emitted))
            try:
                async with aclosing(self.engine.generate(submission)) as events:
                    while True:
                        async with asyncio.timeout_at(deadline):
                            event = await anext(events, None)
                        if event is None or event.finish_reason == "abort":
                            raise EngineLost("the engine gave the request up in the middle")
                        if event.num_cached and emitted:  # this engine found emitted tokens, too
                            event = replace(event, num_cached=0)
                        if event.token_id is not None:
                            emitted.append(event.token_id)
                            losses, pause_s, deadline = 0, 0.0, None
                        yield event
                        if event.finish_reason is not None:
                            return
            except EngineLost as error:
                losses += 1
                if losses > self.retry.max_losses:
                    raise EngineUnavailable(
                        f"{losses} engines in a row were lost under this request"
                    ) from error
                deadline = deadline or clock() + self.retry.deadline_s
                self.resubmissions.inc()
            except (EngineOverloaded, EngineUnavailable):
                if deadline is None or clock() + pause_s > deadline:
                    raise
            except TimeoutError:
                raise EngineUnavailable(
                    f"the engine was lost, and no other went on within {self.retry.deadline_s:g} s"
                ) from None
            await asyncio.sleep(pause_s)  # not at all after a first loss: another engine may be ready
            pause_s = min(max(2 * pause_s, self.retry.first_pause_s), self.retry.longest_pause_s)
