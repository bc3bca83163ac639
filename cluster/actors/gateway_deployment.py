"""The gateway as a Serve ingress: the HTTP app, handles to the engines, and links from them."""

import asyncio
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.actors.node import listen
from cluster.actors.process_log import log_to_stderr
from cluster.actors.ray_engine_client import RayEngineClient
from cluster.actors.ray_errors import UNREACHABLE
from cluster.actors.ray_expert_commands import RayExpertCommands
from cluster.actors.reports import ModelReport, Process
from cluster.actors.token_links import TokenReceiver
from cluster.metrics import GatewayMetrics
from cluster.serve.admin import AdminAccess, progress_fields
from cluster.serve.api import create_app
from cluster.serve.errors import unavailable
from cluster.serve.intake import Intake
from cluster.serve.served_model import ServedModel
from cluster.settings import ModelSettings, Settings
from cluster.text.huggingface import HuggingFaceTokenizer
from cluster.text.templates import ChatTemplate
from shards.config import ModelConfig

STATUS_TIMEOUT_S = 5.0
READY_TIMEOUT_S = 0.8  # a load balancer's probe waits a second


@serve.ingress()
class Gateway:
    """One replica: no weights and no torch, only text, HTTP and the journal."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        checkpoints: dict[str, str],
        secret: bytes,
        api_keys: frozenset[str],
        engines: dict[str, DeploymentHandle],
        admin_keys: frozenset[str] = frozenset(),
    ) -> None:
        log_to_stderr()
        self._intake = Intake()
        self._name = f"gateway-{uuid.uuid4().hex[:8]}"
        self._api_keys = api_keys
        # A setting that names keys is never read as "everyone", not even if the keys did not come here.
        is_open = settings.http.admin_keys_env is None and settings.http.is_loopback
        self._admin_access = AdminAccess(admin_keys, is_open)
        self._engines = engines
        self._receiver = TokenReceiver(listen(secret, self._name))
        self._models = {
            model.name: self._serve(model, Path(checkpoints[model.name])) for model in settings.models
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(
            self._models,
            metrics=GatewayMetrics(),
            is_ready=self._is_ready,
            status=self._status,
            api_keys=self._api_keys,
            experts=RayExpertCommands(self._engines, lambda: self._receiver.avoided),
            admin_access=self._admin_access,
            intake=self._intake,
        )

    async def drain(self) -> None:
        """Take no more requests; return when the last of those that run has been answered."""
        await self._intake.close()

    def _serve(self, model: ModelSettings, directory: Path) -> ServedModel:
        """Read the model's text side. Whether it has an engine is a matter of each request."""
        config = ModelConfig.from_checkpoint(directory)
        tokenizer, template = (
            HuggingFaceTokenizer.from_checkpoint(directory),
            ChatTemplate.from_checkpoint(directory),
        )
        return ServedModel(
            name=model.name,
            tokenizer=tokenizer,
            template=template,
            context_length=model.served_context(config.context_length),
            stop_token_ids=frozenset(config.eos_token_ids),
            created=int((directory / "config.json").stat().st_mtime),
            engine=RayEngineClient(self._engines[model.name], self._receiver, model.most_open),
        )

    async def _reports(self) -> list[ModelReport]:
        calls = (
            engine.model_report.remote(avoided=self._receiver.avoided) for engine in self._engines.values()
        )
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            return list(await asyncio.gather(*calls))

    async def _is_ready(self) -> bool:
        """Say whether requests are taken, and every model has an engine that answers."""
        if self._intake.is_closed:
            return False
        calls = (engine.ping.remote(avoided=self._receiver.avoided) for engine in self._engines.values())
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                await asyncio.gather(*calls)
        except UNREACHABLE:
            return False
        return True

    async def _status(self) -> dict[str, Any]:
        """Describe every process of the deployment, as far as this gateway can see."""
        try:
            reports = await self._reports()
        except UNREACHABLE as error:
            raise unavailable(f"an engine or its router does not answer: {type(error).__name__}") from error
        return {
            "gateway": asdict(Process.this("Gateway", self._name)),
            "models": [_fields(report) for report in reports],
        }


def _fields(report: ModelReport) -> dict[str, Any]:
    progress = report.progress and progress_fields(report.progress)
    return {**asdict(report), "progress": progress}
