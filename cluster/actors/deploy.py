"""Settings, made into a Serve application: a Gateway, and for each model an Engine with its Router."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import ray
from ray import serve
from ray.serve import Application, RunTarget
from ray.serve.config import DeploymentActorConfig, HTTPOptions, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, DeploymentStatus, LoggingConfig

from cluster.actors.engine_choice import EngineChoice
from cluster.actors.engine_deployment import Engine
from cluster.actors.gateway_deployment import Gateway
from cluster.actors.quiet_start import QUIET_START, USUAL_START
from cluster.actors.router_actor import NAMESPACE, Router
from cluster.actors.router_client import ROUTER
from cluster.local_ray import check_port_is_free
from cluster.settings import HttpSettings, ModelSettings, Settings

APP = "tradewind"  # the Serve application's name
UNBOUNDED = 100_000  # Serve's own limit on ongoing requests; the engine has one of its own, `max_waiting`
POLL_PERIOD_S = 0.1
ANSWER_TIMEOUT_S = 60.0  # from the moment when all processes run; HAProxy follows within a second
HEALTH_CHECK_PERIOD_S = 1.0  # Serve sees the death of a replica at its next check; its default is 10 s
# A line in the log per request costs more than routing the request.
_LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)


def check_cluster(http: HttpSettings) -> None:
    """Raise ValueError if we can't be on this cluster: we are already, or the endpoint can't be there."""
    serving = _get_global_client(raise_if_no_controller_running=False)
    if serving is None:
        check_port_is_free(http.host, http.port)
        return
    there = serving.http_config
    if (there.host, there.port) != (http.host, http.port):
        raise ValueError(
            f"Ray Serve runs on this cluster already, and listens on {there.host} port {there.port}, not on "
            f"{http.host} port {http.port}; pass --host {there.host} --port {there.port}, or end it with "
            "`serve shutdown` first"
        )
    if APP in serve.status().applications:
        raise ValueError(
            f"this cluster has an application {APP!r} already; end its `tradewind serve` with Ctrl-C, or, if "
            f"that one is gone, take it off with `serve delete {APP}`"
        )


def deploy(settings: Settings, checkpoints: Mapping[str, Path], tell: Callable[[str], None]) -> None:
    """Deploy and wait until the endpoint answers; `tell` hears what is still awaited.

    Raises ValueError with the reason if a process can't start.
    """
    app = build_app(settings, checkpoints, secrets.token_bytes(32))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # its words are about itself
    serve.start(http_options=HTTPOptions(host=settings.http.host, port=settings.http.port))
    target = RunTarget(target=app, name=APP, route_prefix="/", logging_config=_LOGGING)
    serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    runs_since: float | None = None
    while True:
        status = serve.status().applications[APP]
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            raise ValueError(_reason(status))
        waiting = [name for name, its in status.deployments.items() if its.status != DeploymentStatus.HEALTHY]
        tell(", ".join(sorted(waiting)))
        if status.status == ApplicationStatus.RUNNING:
            if _answers(settings):
                return
            runs_since = runs_since or time.monotonic()
            if time.monotonic() - runs_since > ANSWER_TIMEOUT_S:
                raise ValueError(
                    f"all processes run, but nothing answers at {settings.http.url}/health; does HAProxy run "
                    "on this node? See RAY_SERVE_ENABLE_HA_PROXY in docs/configuration.md"
                )
        time.sleep(POLL_PERIOD_S)


def drain(timeout_s: float) -> bool:
    """Have the gateways take no more requests, and wait for the answers that run.

    Returns whether all of them have ended within `timeout_s`.
    """

    async def tell_gateways() -> list[object]:
        call = serve.get_app_handle(APP).broadcast("drain")
        outcomes: list[object] = await call.results_async(timeout_s=timeout_s, return_exceptions=True)
        return outcomes

    try:
        return not any(asyncio.run(tell_gateways()))  # of each gateway None, or why not
    except (TimeoutError, RayServeException):  # the latter: there is no gateway any more
        return False


def remove() -> None:
    """Take the application off a cluster that goes on without it, expert groups included."""
    try:
        serve.delete(APP)
    finally:
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{APP}/"):
                with suppress(ValueError):  # it has ended just now
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
        request_router_config=RequestRouterConfig(request_router_class=EngineChoice),
        ray_actor_options={"num_cpus": model.engine_cpus, "runtime_env": QUIET_START},
        deployment_actors=[
            DeploymentActorConfig(
                name=ROUTER,
                actor_class=Router,
                init_args=(APP, model, str(checkpoint), secret),
                # Not quietly, as it would with the engine's: engines wait for what it says when one is lost.
                actor_options={"num_cpus": 0, "runtime_env": USUAL_START},
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
