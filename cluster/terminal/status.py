"""The deployment's processes as a live table."""

import json
import time
from collections.abc import Mapping
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.terminal.errors import sentence
from cluster.terminal.progress import in_words

PERIOD_S = 1.0
TIMEOUT_S = 10.0


def print_json(url: str) -> None:
    """Print the endpoint's /status once, as JSON. Raises httpx.HTTPError."""
    print(json.dumps(_fetch(url), indent=2))


def show(url: str, console: Console) -> None:
    """Show the table, in a terminal again each second until Ctrl-C.

    Raises httpx.HTTPError if it fails at first; later, something may be restarting.
    """
    status = _fetch(url)
    if not console.is_terminal:
        console.print(render(status))
        return
    try:
        with Live(render(status), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(PERIOD_S)
                live.update(current(url), refresh=True)
    except KeyboardInterrupt:
        pass


def current(url: str) -> RenderableType:
    """Fetch what to show now: the tables, or a sentence about why there are none."""
    try:
        return render(_fetch(url))
    except httpx.HTTPError as error:
        return Text(sentence(error), style="red")


def render(status: Mapping[str, Any]) -> Group:
    """Lay out what /status says: a table of processes, and one of experts for each sparse model."""
    processes = Table("process", "name", "pid", "node", "doing", title="Tradewind", title_justify="left")
    _add(processes, status["gateway"], "HTTP, text, journal")
    tables = [processes]
    for model in status["models"]:
        _add(processes, model["router"], _placement(model))
        for engine in model["engines"]:
            _add(
                processes,
                engine["process"],
                f"{engine['tokens_per_s']:.1f} tokens/s, {engine['num_running']} running, "
                f"{engine['num_waiting']} waiting, "
                f"{engine['used_blocks']} of {engine['total_blocks']} KV blocks",
            )
            for rank, shard in enumerate(engine["shards"], start=1):
                _add(processes, shard, f"rank {rank} of {1 + len(engine['shards'])}")
        for group in model["groups"]:
            _add(
                processes,
                group["process"],
                f"experts {', '.join(group['experts'])}; {sum(group['rows'].values()):,} rows, "
                f"{group['num_links']} links, {group['num_threads']} threads",
            )
        if model["groups"]:
            tables.append(_experts(model))
    return Group(*tables)


def _placement(model: Mapping[str, Any]) -> str:
    progress = model["progress"]
    if progress is None:
        return "no expert groups"
    return f"epoch {model['epoch']}; {in_words(progress)}; imbalance {progress['imbalance']:.2f}"


def _experts(model: Mapping[str, Any]) -> Table:
    table = Table(
        "expert", "group", "layers", "rows", "share", title=f"{model['model']}, epoch {model['epoch']}"
    )
    table.title_justify = "left"
    total = sum(sum(group["rows"].values()) for group in model["groups"]) or 1
    lines = [
        (int(expert), group["process"]["name"], layers, group["rows"].get(expert, 0))
        for group in model["groups"]
        for expert, layers in group["experts"].items()
    ]
    for expert, group, layers, rows in sorted(lines):
        table.add_row(str(expert), group, str(layers), f"{rows:,}", f"{rows / total:.1%}")
    return table


def _add(table: Table, process: Mapping[str, Any], doing: str) -> None:
    table.add_row(process["kind"], process["name"], str(process["pid"]), process["node"], doing)


def _fetch(url: str) -> dict[str, Any]:
    response = httpx.get(f"{url.rstrip('/')}/status", timeout=TIMEOUT_S).raise_for_status()
    status: dict[str, Any] = response.json()
    return status
