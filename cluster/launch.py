"""The steps of `tradewind serve`, each told as it goes."""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.demo import DEMO_MODELS
from cluster.local_ray import check_port_is_free, joins_a_cluster, ray_cluster
from cluster.settings import ModelSettings, Settings
from cluster.text.huggingface import HuggingFaceTokenizer
from cluster.text.templates import ChatTemplate
from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.home import default_home
from shards.kernels import build as kernels
from shards.partition import all_tensors


def launch(settings: Settings, console: Console) -> None:
    """Serve until SIGINT or SIGTERM, then end all that was started. Raises ValueError for a mistake."""
    if not joins_a_cluster():  # whose Serve may be what listens there
        check_port_is_free(settings.http.host, settings.http.port)
    settings.http.api_keys(), settings.http.admin_keys()  # raise now, not when Ray has been started
    checkpoints = {model.name: _checkpoint(model, console) for model in settings.models}
    with _step("Checking the checkpoints", console):
        for model in settings.models:
            verify(model, checkpoints[model.name])
    with _step("Compiling the kernels, unless they are in the cache", console):
        kernels.library_path()

    _end_on_signals()
    with ExitStack() as cleanup:
        with _step("Starting Ray", console):
            is_ours = cleanup.enter_context(ray_cluster(settings.num_cpus))
            from cluster.actors import deploy  # imports Ray Serve, which reads its environment then
        _end_on_signals()  # again: Ray has put handlers of its own there
        deploy.check_cluster(settings.http)  # before there is anything that we may take off it
        if not is_ours:  # ours takes everything with it
            cleanup.callback(deploy.remove)
        cleanup.callback(console.print, "Stopping ...")
        cleanup.callback(_ignore_signals)
        with _step("Starting the processes and loading the weights", console) as tell:
            deploy.deploy(settings, checkpoints, tell)
        _invite(settings, console)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()
        with suppress(KeyboardInterrupt):
            with _step("Letting running answers end (Ctrl-C again cuts them)", console):
                all_ended = deploy.drain(settings.http.drain_s)
            if not all_ended:
                console.print(f"not all did in {settings.http.drain_s:g} s (http.drain_s); they are cut")


def _end_on_signals() -> None:
    """Make SIGTERM end this process as Ctrl-C does: through every cleanup."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _ignore_signals() -> None:
    """See the cleanup through: a second, impatient Ctrl-C would leave processes behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def verify(model: ModelSettings, directory: Path) -> None:
    """Check what can be checked before any process starts. Raises ValueError, naming the file or the key."""
    config = ModelConfig.from_checkpoint(directory)
    Checkpoint(directory).verify(all_tensors(config))
    HuggingFaceTokenizer.from_checkpoint(directory)
    ChatTemplate.from_checkpoint(directory)
    if model.context_length and model.context_length > config.context_length:
        raise ValueError(
            f"model {model.name!r} has context_length {model.context_length}, but {directory} is made for "
            f"{config.context_length} tokens at most"
        )
    if model.tensor_parallel > config.num_kv_heads:
        raise ValueError(
            f"model {model.name!r} has tensor_parallel {model.tensor_parallel}, but {directory} has only "
            f"{config.num_kv_heads} KV heads, each of which one process must hold whole"
        )
    if model.expert_groups and not config.is_sparse:
        raise ValueError(
            f"model {model.name!r} has expert_groups {model.expert_groups}, but {directory} is a dense "
            "model; it must be 0"
        )
    if model.expert_groups > config.num_experts:
        raise ValueError(
            f"model {model.name!r} has expert_groups {model.expert_groups}, but only {config.num_experts} "
            "experts to share out"
        )
    slots, replicas = model.slots_per_layer(config.num_experts), config.num_experts * model.expert_replicas
    if model.expert_groups and model.expert_groups * slots < replicas:
        raise ValueError(
            f"model {model.name!r} has expert_slots {slots} in expert_groups {model.expert_groups}, but "
            f"{config.num_experts} experts with expert_replicas {model.expert_replicas} to hold; "
            f"expert_slots must be {-(-replicas // model.expert_groups)} at least"
        )


def _checkpoint(model: ModelSettings, console: Console) -> Path:
    """Find the model's folder; build it if it is a demo model that is not there yet."""
    home = default_home()
    for directory in (Path(model.checkpoint).expanduser(), home / "models" / model.checkpoint):
        if directory.is_dir():
            return directory.absolute()
    if model.checkpoint not in DEMO_MODELS:
        raise ValueError(
            f"checkpoint {model.checkpoint!r} of model {model.name!r} is neither a folder nor in "
            f"{home / 'models'}, nor a demo model ({', '.join(DEMO_MODELS)})"
        )
    from cluster.demo.build import build  # not above: it needs torch, and is rarely needed

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"Building {model.checkpoint}")

        def show(what: str, done: int, total: int) -> None:
            progress.update(task, description=what.capitalize(), completed=done, total=total)

        return build(model.checkpoint, home, show)


@contextmanager
def _step(what: str, console: Console) -> Iterator[Callable[[str], None]]:
    """Show a spinner while it goes on, and a line with its duration behind it.

    Yields a function that tells more beside the spinner.
    """
    started_at = time.monotonic()
    with console.status(f"{what} ...") as status:
        yield lambda more: status.update(f"{what} ... [dim]{escape(more)}[/]")
    console.print(f"[green]done[/] {what} [dim]({time.monotonic() - started_at:.1f} s)[/]", highlight=False)


def _invite(settings: Settings, console: Console) -> None:
    """Say where the endpoint is, and show a first question to paste."""
    url, command = settings.http.url, sys.argv[0]
    body = {
        "model": settings.models[0].name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    key = " -H 'Authorization: Bearer YOUR-KEY'" if settings.http.api_keys_env else ""
    curl = f"curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    lines = (
        f"\nReady at {url}/v1 - try, in another terminal:\n",
        f"  {curl}\n",
        f"  {command} chat --url {url}",
        f"  {command} status --url {url}\n",
        "Ctrl-C stops it.\n",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
