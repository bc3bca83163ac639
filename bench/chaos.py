"""What does a client under load notice when a process dies, a host is cut off, or an operator changes things?

    make bench-chaos                                       # all of it: about 45 minutes
    python bench/chaos.py --only kill-group,kill-router    # some of it; --list names all
    python bench/chaos.py --json out.json --plot out.png   # numbers for programs, tokens per second for eyes

It starts deployments of its own. Under a steady load of streams, each fault does its harm in the middle. What
each stream got is compared, token by token and logprob by logprob, with what the same request got when
nothing happened; gaps and rates, with those right before the fault. All processes and this client share one
machine: the gaps are those of a machine that also starts the new processes. Exit status 1: a request failed,
or its answer differed.
"""

import argparse
import asyncio
import json
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
from about import describe_run
from chaos_deployment import Deployment, serve
from chaos_faults import FAULTS, Fault
from chaos_hosts import why_no_hosts
from chaos_load import Request, Stream, make_requests, play
from chaos_plot import plot
from chaos_report import (
    BIN_S,
    HEADER,
    LEAD_S,
    PROMISES,
    WHOLE,
    Answers,
    Bar,
    Row,
    Run,
    Window,
    complaints,
    line,
    make_row,
)
from chaos_target import Target

SETTLE_S = 8.0  # of load between two times of one fault, for it to be spread evenly again


@dataclass(frozen=True)
class Options:
    """How much load, and where."""

    port: int
    logs: Path
    streams: int
    requests: Sequence[Request]


@dataclass(frozen=True)
class Verdict:
    """One run, its row, and what it holds or breaks."""

    run: Run
    row: Row
    bars: tuple[tuple[str, bool], ...]
    complaints: list[dict[str, Any]]

    @property
    def keeps_promises(self) -> bool:
        return all(bar.holds(self.row) for bar in PROMISES)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a client notices of faults.")
    parser.add_argument("--only", help="names of faults, separated by commas; see --list")
    parser.add_argument("--list", action="store_true", help="print the faults' names, and end")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--streams", type=int, default=16, help="requests at a time")
    parser.add_argument(
        "--requests", type=int, default=48, help="length of the list that is asked again and again"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of an answer, on average")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw tokens per second over time here (PNG)")
    parser.add_argument("--logs", type=Path, help="keep the logs of all processes in this folder")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{fault.name:24}{fault.shape.name}" for fault in FAULTS))
        return
    if arguments.requests < 2 * arguments.streams:
        parser.error("--requests must be at least twice --streams, or the load is never steady")
    faults = _chosen(arguments.only, parser)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # through every cleanup

    about = describe_run()
    requests = make_requests(arguments.requests, arguments.tokens)
    with tempfile.TemporaryDirectory(prefix="tradewind-chaos-") as folder:
        options = Options(arguments.port, arguments.logs or Path(folder), arguments.streams, requests)
        verdicts = []
        for verdict in _run_all(faults, options):
            verdicts.append(verdict)
            if arguments.json:  # each time: what was measured must not go with what comes later
                arguments.json.write_text(
                    json.dumps({**about, "results": list(map(_fields, verdicts))}, indent=1)
                )
    if arguments.plot:
        plot(arguments.plot, [verdict.run for verdict in verdicts])
    if not all(verdict.keeps_promises for verdict in verdicts):
        sys.exit("broken: a request failed, or its answer was not the same")


def _chosen(only: str | None, parser: argparse.ArgumentParser) -> list[Fault]:
    names = only.split(",") if only else [fault.name for fault in FAULTS]
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"--only: there is no fault {', '.join(sorted(unknown))}; --list names all")
    return [fault for fault in FAULTS if fault.name in names]


def _run_all(faults: Sequence[Fault], options: Options) -> Iterator[Verdict]:
    """Run and print one fault after the other; those of one shape share a deployment while it is whole."""
    answers: dict[str, Answers] = {}  # of each model: they depend on nothing else
    for shape, its_faults in groupby(faults, lambda fault: fault.shape):
        left = list(its_faults)
        if shape.has_hosts and (reason := why_no_hosts()):
            print(f"\n{', '.join(fault.name for fault in left)}: skipped; {reason}")
            continue
        while left:
            with serve(shape, options.port, options.logs) as deployment:
                print(f"\n{shape.name}, {options.streams} streams\n{HEADER}")
                first = asyncio.run(_undisturbed(deployment, options))
                known = answers.setdefault(
                    shape.model_name, {stream.request.index: stream.tokens for stream in first.streams}
                )
                yield _judge(first, known, ())
                is_whole = True
                while left and is_whole:
                    run = asyncio.run(_disturbed(deployment, fault := left.pop(0), options))
                    yield _judge(run, known, (WHOLE, *fault.bars))
                    is_whole = run.trouble is None


async def _undisturbed(deployment: Deployment, options: Options) -> Run:
    """Ask the whole list."""
    began_at, enough = time.perf_counter(), asyncio.Event()
    enough.set()
    return Run("undisturbed", deployment.shape.name, began_at, await _load(deployment, options, enough))


async def _disturbed(deployment: Deployment, fault: Fault, options: Options) -> Run:
    """Let a fault do its harm under load, as many times as it should."""
    async with httpx.AsyncClient(base_url=deployment.url, timeout=30) as client:
        target = Target(deployment, client)
        if fault.prepare:
            await fault.prepare(target)
        moved_before = await target.moved_bytes()
        began_at, enough, trouble = time.perf_counter(), asyncio.Event(), None
        struck = []
        load = asyncio.create_task(_load(deployment, options, enough))
        await asyncio.sleep(LEAD_S)
        try:
            for _ in range(fault.times):
                await asyncio.sleep(fault.before_s)
                num_before = len(target.blows)
                await fault.strike(target)
                await target.until_whole()
                window = Window(target.blows[num_before].at, time.perf_counter())
                struck.append(window)
                await asyncio.sleep(max(fault.shortest_s - window.length_s, 0) + SETTLE_S)
        except (httpx.HTTPError, TimeoutError, LookupError, StopIteration) as error:
            trouble = f"{type(error).__name__}: {error}"
        enough.set()
        streams = await load
        moved = await target.moved_bytes() - moved_before
        return Run(
            fault.name,
            deployment.shape.name,
            began_at,
            streams,
            target.blows,
            struck,
            fault.before_s,
            fault.shortest_s,
            moved,
            trouble,
        )


async def _load(deployment: Deployment, options: Options, enough: asyncio.Event) -> list[Stream]:
    return await play(
        deployment.host,
        deployment.port,
        deployment.shape.model_name,
        options.requests,
        options.streams,
        enough,
    )


def _judge(run: Run, answers: Answers, bars: Sequence[Bar]) -> Verdict:
    """Say what a run has shown, and print it."""
    row = make_row(run, answers)
    held = tuple((bar.text, bar.holds(row)) for bar in (*PROMISES, *bars))
    verdict = Verdict(run, row, held, complaints(run, answers))
    print(line(row), flush=True)
    print("  " + ", ".join(f"{text}: {'holds' if holds else 'BROKEN'}" for text, holds in held))
    for complaint in verdict.complaints[:10]:
        print(f"  {complaint}")
    if run.trouble:
        print(f"  {run.trouble}", flush=True)
    return verdict


def _fields(verdict: Verdict) -> dict[str, Any]:
    run = verdict.run
    row = asdict(verdict.row)
    return {
        # A gap that never came is infinite, which JSON does not know.
        **{name: None if value == math.inf else value for name, value in row.items()},
        "bars": dict(verdict.bars),
        "complaints": verdict.complaints,
        "blows": [
            {
                "what": blow.what,
                "at_s": blow.at - run.began_at,
                "whole_after_s": blow.whole_at and blow.whole_at - blow.at,
            }
            for blow in run.blows
        ],
        "bin_s": BIN_S,
        "tokens_per_bin": run.tokens_per_bin(),
    }


if __name__ == "__main__":
    main()
