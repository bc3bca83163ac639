"""Whether a gateway takes more requests, and whether it still answers some."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.serve.errors import unavailable


class Intake:
    """Lets requests under /v1 in until it is closed, and knows when the last of them has been answered.

    For one event loop.
    """

    def __init__(self) -> None:
        self.is_closed = False
        self._num_running = 0
        self._ended = asyncio.Event()  # set when there are none, once it is closed

    async def close(self) -> None:
        """Let nobody in any more; wait until the last answer has been sent, or its client has left."""
        self.is_closed = True
        if self._num_running:
            await self._ended.wait()

    def before(self, app: ASGIApp) -> ASGIApp:
        """Put this intake before `app`, as ASGI middleware."""

        async def admit(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
                await app(scope, receive, send)
                return
            if self.is_closed:
                await unavailable("this server is about to end").response()(scope, receive, send)
                return
            self._num_running += 1
            try:
                await app(scope, receive, send)
            finally:
                self._num_running -= 1
                if self.is_closed and not self._num_running:
                    self._ended.set()

        return admit
