import openai
import pytest
from prometheus_client import CollectorRegistry
from serve_fakes import ScriptedEngine, served
from starlette.testclient import TestClient

from cluster.metrics import GatewayMetrics, exposition
from cluster.serve.api import create_app
from cluster.serve.journal import RetryPolicy


async def _ready() -> bool:
    return True


async def _status() -> dict[str, object]:
    return {"models": ["echo"]}


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def app(engine, registry):
    return create_app(
        {"echo": served(engine), "base": served(engine, "base", template=None)},
        metrics=GatewayMetrics(registry),
        is_ready=_ready,
        status=_status,
        retry=RetryPolicy(max_losses=2, deadline_s=5.0, first_pause_s=0.001, longest_pause_s=0.002),
        expose=lambda: exposition(registry),
    )


@pytest.fixture
def http(app):
    with TestClient(app) as client:
        yield client


@pytest.fixture
def client(http) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)
