"""What is done to a deployment under load, and how little of it a client may notice."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx
from chaos_deployment import FEW_SLOTS, FOUR_GROUPS, HOSTS, ONE_ENGINE, SHARDS, SMALL_STEPS, TWO_BY_TWO, Shape
from chaos_hosts import cut, mend
from chaos_load import Request, play
from chaos_report import Bar
from chaos_target import POLL_PERIOD_S, Target, called

STOPPED_S = 5.0
CUT_S = 5.0
SKEWED_S = 12.0  # longer than the half-life of a row in the router's load
REBALANCE_PERIOD_S = 6.0
STAGING_DEADLINE_S = 60.0

Act = Callable[[Target], Awaitable[None]]

# From the design: docs/reliability.md says where each comes from.
SHORT_GAP = Bar("longest gap grows by < 100 ms", lambda row: row.gap_growth_s < 0.1)
FAILOVER_GAP = Bar("longest gap < 2 s", lambda row: row.gap_s < 2)
STEADY = Bar("p99 between tokens grows by < 10 %", lambda row: row.p99_growth < 0.1)
NO_503 = Bar("no 503", lambda row: row.num_503 == 0)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, or is done on purpose."""

    name: str
    shape: Shape
    strike: Act
    bars: tuple[Bar, ...] = ()
    prepare: Act | None = None  # before the load that is measured
    times: int = 1  # more, where a bar compares times that vary by themselves
    before_s: float = 20.0  # of undisturbed load, that what follows is compared with
    shortest_s: float = 5.0  # of what follows


def kill_one(*kinds: str) -> Act:
    """Kill one process of each kind, at once."""

    async def act(target: Target) -> None:
        target.kill(*[(await target.processes(kind))[0] for kind in kinds])

    return act


async def kill_each_group(target: Target) -> None:
    for victim in await target.processes("ExpertGroup"):
        target.kill(victim)
        await target.until_whole()


async def kill_all_but_one(target: Target) -> None:
    target.kill(*(await target.processes("ExpertGroup"))[1:])


async def kill_while_staging(target: Target) -> None:
    """Kill a group, and then the one that takes its place, while that is being filled."""
    old = await target.processes("ExpertGroup")
    target.kill(old[0])
    async with asyncio.timeout(STAGING_DEADLINE_S):
        while True:
            with suppress(httpx.HTTPError):
                model = await target.model()
                new = [group for group in model["groups"] if group["process"] not in old]
                if new and new[0]["experts"] and model["progress"]["missing_replicas"]:
                    target.kill(new[0]["process"])
                    return
            await asyncio.sleep(POLL_PERIOD_S / 10)


def stop_one(kind: str) -> Act:
    """Stop a process for a while."""

    async def act(target: Target) -> None:
        await target.stop_for((await target.processes(kind))[0], STOPPED_S)

    return act


async def cut_network(target: Target) -> None:
    """Cut a host off for a while."""
    host, victims = await _host_to_lose(target)
    cut(host)
    target.struck(f"cut {host} off: {called(*victims)}")
    try:
        await asyncio.sleep(CUT_S)
    finally:
        mend(host)


async def lose_host(target: Target) -> None:
    """Cut a host off for ever."""
    host, victims = await _host_to_lose(target)
    cut(host)
    target.struck(f"lose {host}: {called(*victims)}", *victims)


async def rolling_restart(target: Target) -> None:
    for victim in await target.processes("ExpertGroup"):
        await target.drain(victim)
        await target.until_whole()


async def scale(target: Target) -> None:
    before = len(await target.processes("ExpertGroup"))
    await target.scale(2 * before)
    await target.until_whole()
    await target.scale(before)


async def skew(target: Target) -> None:
    """Have the placement made for a load of one prompt."""
    deployment = target.deployment
    one = [Request(0, seed=0, temperature=0, max_tokens=32, prompt="the " * 16)]
    enough = asyncio.Event()
    load = asyncio.create_task(
        play(deployment.host, deployment.port, deployment.shape.model_name, one, 8, enough)
    )
    await asyncio.sleep(SKEWED_S)
    await target.rebalance()
    await target.until_whole()
    enough.set()
    await load
    target.blows.clear()


async def rebalance(target: Target) -> None:
    """Rebalance once more, as the load that the placement was made for is forgotten."""
    await target.rebalance()
    await target.until_whole()
    await asyncio.sleep(REBALANCE_PERIOD_S)


async def _host_to_lose(target: Target) -> tuple[str, list[dict[str, Any]]]:
    """Choose a host with an expert group, but without the gateway, which has the clients' connections."""
    everyone = await target.processes()
    spared = {process["node"] for process in everyone if process["kind"] == "Gateway"}
    hosts = [p["node"] for p in everyone if p["kind"] == "ExpertGroup" and p["node"] not in spared]
    if not hosts:
        raise LookupError("Ray has put every expert group on the gateway's host")
    return hosts[0], [process for process in everyone if process["node"] == hosts[0]]


FAULTS = (
    Fault("kill-group", SMALL_STEPS, kill_one("ExpertGroup"), (SHORT_GAP,), times=5),
    Fault("kill-each-group", SMALL_STEPS, kill_each_group, (SHORT_GAP,)),
    Fault("kill-while-staging", SMALL_STEPS, kill_while_staging, (SHORT_GAP,), times=3),
    Fault("kill-only-engine", ONE_ENGINE, kill_one("Engine")),
    Fault("stop-group", TWO_BY_TWO, stop_one("ExpertGroup")),
    Fault("stop-engine", TWO_BY_TWO, stop_one("Engine")),
    Fault("kill-router", TWO_BY_TWO, kill_one("Router")),
    Fault("kill-engine", TWO_BY_TWO, kill_one("Engine"), (FAILOVER_GAP,), times=3),
    Fault("kill-group-and-router", TWO_BY_TWO, kill_one("ExpertGroup", "Router")),
    Fault("kill-group-and-engine", TWO_BY_TWO, kill_one("ExpertGroup", "Engine"), (FAILOVER_GAP,)),
    # It is over in seconds, which have too few gaps for a p99 of their own.
    Fault("rolling-restart", TWO_BY_TWO, rolling_restart, (NO_503,), times=4, shortest_s=20.0),
    Fault("scale", TWO_BY_TWO, scale, (STEADY, NO_503), times=6, shortest_s=20.0),
    # The router would not wait longer before it balances by itself.
    Fault("rebalance", FEW_SLOTS, rebalance, (STEADY, NO_503), skew, times=4, before_s=8.0),
    Fault("kill-all-but-one", FOUR_GROUPS, kill_all_but_one),
    Fault("cut-network", HOSTS, cut_network),
    Fault("lose-host", HOSTS, lose_host),  # last: it does not come back
    Fault("kill-shard", SHARDS, kill_one("Shard"), (FAILOVER_GAP,)),
)
