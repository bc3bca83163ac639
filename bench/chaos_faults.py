"""What is done to a deployment under load, and how little of it a client may notice."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
from chaos_deployment import FOUR_GROUPS, HOSTS, ONE_ENGINE, SHARDS, TWO_BY_TWO, Shape
from chaos_hosts import cut, mend
from chaos_load import Request, play
from chaos_report import Bar
from chaos_target import POLL_PERIOD_S, Target

STOPPED_S = 5.0
CUT_S = 5.0
SKEWED_S = 12.0  # longer than the half-life of a row in the router's load
STAGING_DEADLINE_S = 60.0

Act = Callable[[Target], Awaitable[None]]

# From the design: docs/reliability.md says where each comes from.
SHORT_GAP = Bar("longest gap grows by < 100 ms", lambda row: row.gap_growth_s < 0.1)
FAILOVER_GAP = Bar("longest gap < 2 s", lambda row: row.gap_s < 2)
STEADY = Bar("p99 between tokens grows by < 10 %", lambda row: row.p99_s < 1.1 * row.calm_p99_s)
NO_503 = Bar("no 503", lambda row: row.num_503 == 0)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, or is done on purpose."""

    name: str
    shape: Shape
    strike: Act
    bars: tuple[Bar, ...] = ()
    prepare: Act | None = None  # before the load that is measured


async def kill_group(target: Target) -> None:
    target.kill((await target.groups())[0])


async def kill_each_group(target: Target) -> None:
    for victim in await target.groups():
        target.kill(victim)
        await target.until_whole()


async def kill_all_but_one(target: Target) -> None:
    target.kill(*(await target.groups())[1:])


async def stop_group(target: Target) -> None:
    await target.stop_for((await target.groups())[0], STOPPED_S)


async def cut_network(target: Target) -> None:
    """Cut the host off that has an expert group, and not the gateway."""
    gateway = await target.gateway()
    victim = next(group["node"] for group in await target.groups() if group["node"] != gateway["node"])
    cut(victim)
    target.struck(f"cut {victim} off")
    try:
        await asyncio.sleep(CUT_S)
    finally:
        mend(victim)


async def kill_router(target: Target) -> None:
    target.kill(await target.router())


async def kill_engine(target: Target) -> None:
    target.kill((await target.engines())[0])


async def kill_shard(target: Target) -> None:
    target.kill((await target.shards())[0])


async def rolling_restart(target: Target) -> None:
    for victim in await target.groups():
        await target.drain(victim)
        await target.until_whole()


async def scale(target: Target) -> None:
    before = len(await target.groups())
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
    await target.rebalance()


async def kill_while_staging(target: Target) -> None:
    """Kill a group, and then the one that takes its place, while that is being filled."""
    old = {group["pid"] for group in await target.groups()}
    target.kill((await target.groups())[0])
    async with asyncio.timeout(STAGING_DEADLINE_S):
        while True:
            try:
                model = await target.model()
            except httpx.HTTPError:
                model = {"groups": ()}
            new = [group for group in model["groups"] if group["process"]["pid"] not in old]
            if new and new[0]["experts"] and model["progress"]["missing_replicas"]:
                return target.kill(new[0]["process"])
            await asyncio.sleep(POLL_PERIOD_S / 10)


async def kill_group_and_router(target: Target) -> None:
    target.kill((await target.groups())[0], await target.router())


async def kill_group_and_engine(target: Target) -> None:
    target.kill((await target.groups())[0], (await target.engines())[0])


FAULTS = (
    Fault("kill-group", TWO_BY_TWO, kill_group, (SHORT_GAP,)),
    Fault("kill-each-group", TWO_BY_TWO, kill_each_group, (SHORT_GAP,)),
    Fault("stop-group", TWO_BY_TWO, stop_group),
    Fault("kill-router", TWO_BY_TWO, kill_router),
    Fault("kill-engine", TWO_BY_TWO, kill_engine, (FAILOVER_GAP,)),
    Fault("kill-while-staging", TWO_BY_TWO, kill_while_staging, (SHORT_GAP,)),
    Fault("kill-group-and-router", TWO_BY_TWO, kill_group_and_router),
    Fault("kill-group-and-engine", TWO_BY_TWO, kill_group_and_engine, (FAILOVER_GAP,)),
    Fault("rolling-restart", TWO_BY_TWO, rolling_restart, (STEADY, NO_503)),
    Fault("scale", TWO_BY_TWO, scale, (STEADY, NO_503)),
    Fault("rebalance", FOUR_GROUPS, rebalance, (STEADY, NO_503), prepare=skew),
    Fault("kill-all-but-one", FOUR_GROUPS, kill_all_but_one),
    Fault("kill-only-engine", ONE_ENGINE, kill_engine),
    Fault("cut-network", HOSTS, cut_network),
    Fault("kill-shard", SHARDS, kill_shard, (FAILOVER_GAP,)),
)
