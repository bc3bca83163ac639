"""The `tradewind` command."""

import sys
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from cluster.terminal.errors import sentence
from cluster.terminal.experts import Experts

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

experts = typer.Typer(no_args_is_help=True, help="Change a model's expert groups while it serves.")
app.add_typer(experts, name="experts")

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(envvar="TRADEWIND_URL", help="Where the endpoint is.")]
SparseModel = Annotated[
    str | None, typer.Option("--model", help="Which one; default: the first with expert groups.")
]
AdminKey = Annotated[
    str | None, typer.Option("--api-key", envvar="TRADEWIND_ADMIN_KEY", help="If it asks for it.")
]
Timeout = Annotated[float, typer.Option("--timeout", help="Watch for so many seconds.")]
DEFAULT_TIMEOUT_S = 300.0


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A YAML file; see configs/.")],
    host: Annotated[str | None, typer.Option(help="Listen here instead of http.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Listen here instead of http.port.")] = None,
) -> None:
    """Start a deployment on this machine, or on the Ray cluster at RAY_ADDRESS, until Ctrl-C."""
    from cluster.launch import launch
    from cluster.settings import load_settings

    launch(load_settings(config).on(host, port), Console(stderr=True))


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Which one; default: the first that is served.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="TRADEWIND_API_KEY", help="If it asks for it.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Chat in the terminal. Ctrl-C stops an answer, Ctrl-D leaves."""
    from cluster.terminal.chat import Chat

    Chat(url, model, system, temperature, api_key, Console(highlight=False)).run()


@app.command()
def status(
    url: Url = DEFAULT_URL,
    json: Annotated[bool, typer.Option("--json", help="Print it once, for programs.")] = False,
) -> None:
    """Show every process: pids, nodes, experts, load. Live in a terminal until Ctrl-C."""
    from cluster.terminal.status import print_json, show

    if json:
        print_json(url)
    else:
        show(url, Console())


@experts.command()
def scale(
    groups: Annotated[int, typer.Argument(help="How many expert groups there should be.")],
    url: Url = DEFAULT_URL,
    model: SparseModel = None,
    api_key: AdminKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Have more or fewer expert groups, without a pause for anybody."""
    _experts(url, model, api_key, timeout).scale(groups)


@experts.command()
def rebalance(
    url: Url = DEFAULT_URL,
    model: SparseModel = None,
    api_key: AdminKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Deal the experts out anew, for the load of the last seconds."""
    _experts(url, model, api_key, timeout).rebalance()


@experts.command()
def drain(
    group: Annotated[str, typer.Argument(help="Its name, or the number at its end; see `tradewind status`.")],
    url: Url = DEFAULT_URL,
    model: SparseModel = None,
    api_key: AdminKey = None,
    timeout: Timeout = DEFAULT_TIMEOUT_S,
) -> None:
    """Replace a group by a new one, which may be on another node; the old one serves until then."""
    _experts(url, model, api_key, timeout).drain(group)


def _experts(url: str, model: str | None, api_key: str | None, timeout_s: float) -> Experts:
    return Experts(url, model, api_key, timeout_s, Console(highlight=False))


def main() -> None:
    """Run the command; a user's mistake ends in one sentence and exit status 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        console = Console(stderr=True, highlight=False)
        console.print(f"[bold red]error:[/] {escape(sentence(error))}", soft_wrap=True)
        sys.exit(1)
