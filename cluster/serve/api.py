"""The HTTP surface: OpenAI's endpoints, and the operator's."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.metrics import GatewayMetrics, exposition
from cluster.serve.access import check_key
from cluster.serve.admin import AdminAccess, ExpertCommands, admin_router
from cluster.serve.completions import Completions
from cluster.serve.errors import ApiError, invalid, unavailable
from cluster.serve.intake import Intake
from cluster.serve.journal import RetryPolicy
from cluster.serve.observer import Observer
from cluster.serve.served_model import ServedModel


def create_app(
    models: Mapping[str, ServedModel],
    *,
    metrics: GatewayMetrics,
    is_ready: Callable[[], Awaitable[bool]],
    status: Callable[[], Awaitable[Mapping[str, Any]]],
    api_keys: frozenset[str] = frozenset(),
    experts: ExpertCommands | None = None,
    admin_access: AdminAccess | None = None,
    retry: RetryPolicy | None = None,
    intake: Intake | None = None,
    expose: Callable[[], bytes] = exposition,
) -> FastAPI:
    """Build the app that serves `models` (by the name that clients use).

    With `api_keys`, everything under /v1 asks for one of them. With `experts`, there is an /admin for whom
    `admin_access` lets in; by default, that is nobody. Under /v1, nobody is let in once `intake` is
    closed. `expose` blocks and is called in a thread.
    """
    completions = Completions(models, metrics, retry or RetryPolicy())
    # The API is OpenAI's, and so is its documentation.
    app = FastAPI(title="Tradewind", openapi_url=None, redirect_slashes=False)
    app.add_middleware((intake or Intake()).before)
    app.add_middleware(Observer, metrics=metrics)  # around the other: what is refused is counted, too
    _word_errors(app)

    @app.get("/health")
    async def health() -> Response:
        if not await is_ready():
            raise unavailable(
                "not ready: a model has no engine that can answer, or this server is about to end"
            )
        return _json({"status": "ok"})

    @app.get("/status")
    async def report_status() -> Response:
        return _json(await status())

    @app.get("/metrics")
    async def report_metrics() -> Response:
        return Response(await asyncio.to_thread(expose), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.include_router(_openai_router(completions, api_keys))
    if experts:
        app.include_router(admin_router(completions.find, experts, admin_access or AdminAccess()))
    return app


def _openai_router(endpoints: Completions, api_keys: frozenset[str]) -> APIRouter:
    async def authorize(request: Request) -> None:
        if api_keys:
            check_key(request, api_keys, "API key")

    router = APIRouter(prefix="/v1", dependencies=[Depends(authorize)])

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await endpoints.chat(request)

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await endpoints.complete(request)

    @router.get("/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_card(model) for model in endpoints.models.values()]})

    @router.get("/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        return _json(_card(endpoints.find(name)))

    return router


def _word_errors(app: FastAPI) -> None:
    """Give every error OpenAI's body, also those that FastAPI raises itself."""

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def routing(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        message = messages.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        return invalid(f"{name}: {first['msg']}", name).response()


def _card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tradewind",
        "max_model_len": model.context_length,  # the name that load generators look for
    }


def _json(body: Mapping[str, Any]) -> Response:
    return Response(json.dumps(body), media_type="application/json")
