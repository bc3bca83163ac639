"""The tokens emitted so far of each running request, and what to do with them when an engine dies."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count

from prometheus_client import Counter

from cluster.engine.request import GenerationRequest, TokenEvent
from cluster.serve.engine_client import EngineClient, EngineLost, EngineOverloaded, EngineUnavailable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How long a request outlives its engines."""

    max_losses: int = 3  # in a row without a token between: more, and the request is the likely cause
    # From the beginning, or a loss, until an engine has the request; one may have to start meanwhile.
    deadline_s: float = 120.0
    # For the receipt of the engine that Serve chose, which may be stopped, or not be there yet. Doubles each
    # time that none comes: what is slow under load must not be asked ever more.
    receipt_s: float = 3.0
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

        A lost request is submitted again with the tokens emitted so far, and one that no engine has confirmed
        as it was. Raises EngineOverloaded or EngineUnavailable: at once if an engine refuses a request that
        none has had before, else when `retry` is exhausted.
        """
        clock = asyncio.get_running_loop().time
        emitted = list(request.emitted)
        losses, pause_s, receipt_s = 0, 0.0, self.retry.receipt_s
        is_resumed, seeks_copies = request.is_resumed, False
        deadline = clock() + self.retry.deadline_s
        # An engine that was only out of reach may still hold an earlier attempt, so ids are not used twice.
        for attempt in count():
            submission = replace(
                request.attempt(attempt),
                emitted=tuple(emitted),
                is_resumed=is_resumed,
                seeks_copies=seeks_copies,
            )
            seeks_copies = False  # where none takes it, another may
            receipt_due: float | None = min(clock() + receipt_s, deadline)  # None: it is there
            try:
                async with aclosing(self.engine.generate(submission)) as events:
                    while True:
                        async with asyncio.timeout_at(receipt_due):
                            event = await anext(events, None)
                        receipt_due = None
                        if event is None or event.finish_reason == "abort":
                            raise EngineLost("the engine gave the request up in the middle")
                        if event.is_receipt:
                            continue
                        if event.num_cached and emitted:  # this engine found emitted tokens, too
                            event = replace(event, num_cached=0)
                        if event.token_id is not None:
                            emitted.append(event.token_id)
                            losses, pause_s = 0, 0.0
                        yield event
                        if event.finish_reason is not None:
                            return
            except EngineLost as error:
                losses += 1
                if losses > self.retry.max_losses:
                    raise EngineUnavailable(
                        f"{losses} engines in a row were lost under this request"
                    ) from error
                if receipt_due is None:
                    deadline, receipt_s = clock() + self.retry.deadline_s, self.retry.receipt_s
                is_resumed = seeks_copies = True
                self.resubmissions.inc()
            except (EngineOverloaded, EngineUnavailable):
                if not is_resumed or clock() + pause_s > deadline:
                    raise
            except TimeoutError:
                if clock() >= deadline:
                    raise EngineUnavailable(
                        f"no engine took the request within {self.retry.deadline_s:g} s"
                    ) from None
                logger.warning("no engine has confirmed %s within %g s; once more", submission.id, receipt_s)
                receipt_s *= 2
                continue
            await asyncio.sleep(pause_s)  # not at all after a first loss: another engine may be ready
            pause_s = min(max(2 * pause_s, self.retry.first_pause_s), self.retry.longest_pause_s)
