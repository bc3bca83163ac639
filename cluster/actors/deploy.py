"""Settings, made into a Serve application: a Gateway, and for each model an Engine with its Router."""

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.serve import Application, RunTarget
from ray.serve.config import DeploymentActorConfig, HTTPOptions
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, LoggingConfig

from cluster.actors.engine_deployment import Engine
from cluster.actors.gateway_deployment import Gateway
from cluster.actors.router_actor import NAMESPACE, Router
from cluster.actors.router_client import ROUTER
from cluster.settings import ModelSettings, Settings

APP = "tradewind"  # the Serve application's name
UNBOUNDED = 100_000  # Serve's own limit on ongoing requests; the engine has one of its own, `max_waiting`
POLL_PERIOD_S = 0.1
HEALTH_CHECK_PERIOD_S = 1.0  # Serve sees the death of a replica at its next check; its default is 10 s
# A line in the log per request costs more than routing the request.
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def deploy(settings: Settings, checkpoints: Mapping[str, Path], tell: Callable[[str], None]) -> None:
    """Deploy and wait until the endpoint answers; `tell` hears what is still awaited.

    Raises ValueError with the reason if a process can't start.
    """
    app = build_app(settings, checkpoints, secrets.token_bytes(32))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its words are about itself
    serve.start(http_options=HTTPOptions(host=settings.http.host, port=settings.http.port))
    target = RunTarget(target=app, name=APP, route_prefix="/", logging_config=_LOGGING)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while True:
        status = serve.status().applications[APP]
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise ValueError(_reason(status))
        waiting = [name for name, its in status.deployments.items() if its.status != DeploymentStatus.HEALTHY]
        tell(", ".join(sorted(waiting)))
        if status.status == ApplicationStatus.RUNNING and _answers(settings):
            return
        time.sleep(POLL_PERIOD_S)


def remove() -> None:
    """Take the application off a cluster that goes on without it, expert groups included."""
    serve.delete(APP)
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{APP}/"):
            ray.kill(ray.get_actor(actor["name"], NAMESPACE))


def build_app(settings: Settings, checkpoints: Mapping[str, Path], secret: bytes) -> Application:
    """Describe the application; `checkpoints` has each model's folder, as every node sees it."""
    engines = {
        model.name: _engine(model, checkpoints[model.name], secret).bind(
            model, str(checkpoints[model.name]), secret
        )
        for model in settings.models
    }
    gateway = serve.deployment(
        Gateway,
        name="Gateway",
        num_replicas=settings.http.gateways,
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": 1},
    )
    folders = {name: str(path) for name, path in checkpoints.items()}
    http = settings.http
    return gateway.bind(settings, folders, secret, http.api_keys(), engines, http.admin_keys())


def _engine(model: ModelSettings, checkpoint: Path, secret: bytes) -> "serve.Deployment":
    return serve.deployment(
        Engine,
        name=f"Engine-{model.name}",
        num_replicas=model.engines,
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        ray_actor_options={"num_cpus": model.engine_cpus},
        deployment_actors=[
            DeploymentActorConfig(
                name=ROUTER,
                actor_class=Router,
                init_args=(APP, model, str(checkpoint), secret),
                actor_options={"num_cpus": 0},
            )
        ],
    )


def _answers(settings: Settings) -> bool:
    """Say whether the endpoint is up: HAProxy learns of a gateway a moment after Serve does."""
    try:
        return httpx.get(f"{settings.http.url}/health", timeout=1.0).is_success
    except httpx.HTTPError:
        return False


def _reason(status: ApplicationStatusOverview) -> str:
    """Find the sentence in the traceback that a failed replica left."""
    messages = [its.message for its in status.deployments.values() if its.status != DeploymentStatus.HEALTHY]
    lines = [line.strip() for message in messages or [status.message] for line in message.splitlines()]
    errors = [line for line in lines if line.partition(": ")[0].endswith(("Error", "Checkpoint", "Failed"))]
    return str((errors or lines or ["the application could not be deployed"])[-1])
