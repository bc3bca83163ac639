"""The `tradewind` command."""

import sys
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from cluster.terminal.errors import sentence

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(envvar="TRADEWIND_URL", help="Where the endpoint is.")]


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
