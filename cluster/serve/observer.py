"""What is known about every HTTP request, whatever becomes of it."""

import logging
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.metrics import GatewayMetrics
from cluster.serve.connection import ClientGone
from cluster.serve.errors import internal

_log = logging.getLogger(__name__)


@dataclass
class Exchange:
    """One HTTP request and its outcome, filled in as it goes on."""

    request_id: str
    model: str = ""  # set only once it is known to exist: a label must not be the client's to choose
    status: int = 499  # nobody was there to be answered


class Observer:
    """ASGI middleware: counts requests, names them (`x-request-id`), and answers for what nobody caught.

    A request that comes with a name keeps it; behind Serve, each does, and Serve puts it on the answer.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        exchange = Exchange(given or f"req-{uuid.uuid4().hex}")
        scope.setdefault("state", {})["exchange"] = exchange
        started, began_s = False, time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, exchange.status = True, message["status"]
                if not given:
                    named = (b"x-request-id", exchange.request_id.encode())
                    message = {**message, "headers": [*message["headers"], named]}
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except (ClientGone, ClientDisconnect):
            exchange.status = 499
        except Exception:
            _log.exception("%s failed", exchange.request_id)
            if started:
                raise  # the server must cut the connection, or the answer would look whole
            await internal(exchange.request_id).response()(scope, receive, send_named)
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(exchange.model, endpoint, str(exchange.status)).inc()
            duration = self.metrics.request_seconds.labels(exchange.model, endpoint)
            duration.observe(time.perf_counter() - began_s)
