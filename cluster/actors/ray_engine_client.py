"""The engines of one model behind a Serve handle: one unary call per request, tokens on a link."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import Context

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.actors.ray_errors import sentence
from cluster.actors.token_links import TokenReceiver
from cluster.engine.request import EngineFull, EngineStopped, Generated, GenerationRequest, TokenEvent
from cluster.serve.engine_client import EngineLost, EngineOverloaded, EngineUnavailable
from router.links.base import LinkLost

logger = logging.getLogger(__name__)

# The call may return before the last frame has come over the link, but not by much.
LAST_FRAME_TIMEOUT_S = 5.0


class RayEngineClient:
    """Implements EngineClient. The call says only that the request has ended, or why it could not."""

    def __init__(
        self,
        handle: DeploymentHandle,
        receiver: TokenReceiver,
        most_open: int,
        last_frame_timeout_s: float = LAST_FRAME_TIMEOUT_S,
    ) -> None:
        """`most_open` requests at a time, also while there is no engine; those that are resumed go beyond."""
        self._handle = handle
        self._receiver = receiver
        self._most_open = most_open
        self._num_open = 0
        self._last_frame_timeout_s = last_frame_timeout_s

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the request's events, as EngineClient says; leaving early cancels the call."""
        if self._num_open >= self._most_open and not request.is_resumed:
            raise EngineOverloaded(f"this gateway already holds {self._num_open} requests of the model")
        self._num_open += 1
        try:
            async with aclosing(self._events(request)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_open -= 1

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        receiver = self._receiver
        # Serve takes the HTTP request's id for each of its calls, from the context. But its request routers
        # know calls by that id, and forget all but one of those that wait at the same time (Ray 2.60).
        response = Context().run(
            self._handle.generate.remote, request, receiver.address, avoided=receiver.avoided
        )
        events = receiver.open(request.id)
        call = asyncio.ensure_future(_result(response))
        call.add_done_callback(_retrieve)
        next_event = asyncio.ensure_future(events.get())
        ended = False
        try:
            while not ended:
                await asyncio.wait((call, next_event), return_when=asyncio.FIRST_COMPLETED)
                if not next_event.done():
                    if call.cancelled():  # not by us: else this generator would be, too
                        raise EngineLost("the engine gave the call up")
                    call.result()  # raises what ended the call early
                    await asyncio.wait((next_event,), timeout=self._last_frame_timeout_s)
                    if not next_event.done():
                        raise EngineLost("the engine ended the request, but its last tokens did not arrive")
                event = next_event.result()
                if isinstance(event, LinkLost):
                    raise EngineLost(f"the engine is out of reach: {event}") from event
                ended = event.finish_reason is not None
                next_event = asyncio.ensure_future(events.get())
                yield event
        finally:
            receiver.close(request.id)
            next_event.cancel()
            if not ended and not call.done():
                response.cancel()


async def _result(response: object) -> None:
    """Wait for the call's end, and give what went wrong the names that EngineClient has for it."""
    try:
        end: Generated = await response  # type: ignore[misc]  # awaitable, but not typed so
    except (EngineStopped, RayActorError) as error:
        raise EngineLost(f"the engine died: {error}") from error
    except RequestCancelledError as error:  # by us, since nobody waits any more
        raise EngineLost(str(error)) from error
    except (EngineFull, BackPressureError) as error:
        raise EngineOverloaded(str(error)) from error
    except DeploymentUnavailableError as error:
        raise EngineUnavailable(str(error)) from error
    except ValueError as error:  # it does not fit that engine
        raise EngineUnavailable(sentence(error)) from error
    except Exception as error:
        # A process may die in ways that Serve has no name for. The journal bounds how often it is tried.
        logger.warning("a call to an engine failed", exc_info=True)
        raise EngineLost(f"the call to the engine failed: {error}") from error
    if end.finish_reason == "abort":  # by an engine whose link to here was lost: nothing more will come
        raise EngineLost("the engine gave the request up")


def _retrieve(call: "asyncio.Future[None]") -> None:
    """Look at a call's outcome, which nobody may be waiting for any more; asyncio complains otherwise."""
    if not call.cancelled():
        call.exception()
