"""A deployment under load, as faults see it: what can be killed and commanded, and whether all is whole."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import httpx
from chaos_deployment import Deployment

POLL_PERIOD_S = 0.25
WHOLE_DEADLINE_S = 180.0
_BYTES_METRIC = "tradewind_rebalance_bytes_total"

T = TypeVar("T")


@dataclass
class Blow:
    """Something that was done to a deployment. Times are of `time.perf_counter`."""

    what: str
    at: float
    whole_at: float | None = None  # when every process and replica was there again


class Target:
    """One deployment, whose processes may be hit. Waits are bounded: raises TimeoutError."""

    def __init__(self, deployment: Deployment, client: httpx.AsyncClient) -> None:
        self.deployment = deployment
        self.blows: list[Blow] = []
        self._client = client
        self._num_groups = deployment.shape.groups
        self._gone: set[int] = set()  # pids

    async def model(self) -> dict[str, Any]:
        """Return the model's part of /status. Raises httpx.HTTPError while there is nobody to ask."""
        (model,) = (await self._status())["models"]
        return dict(model)

    async def processes(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the processes of these kinds, as /status calls them, or of all."""
        status = await self._patiently(self._status)
        (model,) = status["models"]
        engines = [[engine["process"], *engine["shards"]] for engine in model["engines"]]
        groups = [group["process"] for group in model["groups"]]
        everyone = [status["gateway"], model["router"], *chain.from_iterable(engines), *groups]
        return [process for process in everyone if not kinds or process["kind"] in kinds]

    def kill(self, *victims: Mapping[str, Any]) -> None:
        """Kill processes at once, with SIGKILL."""
        for victim in victims:
            os.kill(victim["pid"], signal.SIGKILL)
        self.struck(f"kill -9 {called(*victims)}", *victims)

    def struck(self, what: str, *gone: Mapping[str, Any]) -> None:
        """Note what was done just now, and which processes must be replaced for it."""
        self.blows.append(Blow(what, time.perf_counter()))
        self._gone |= {process["pid"] for process in gone}

    async def stop_for(self, victim: Mapping[str, Any], duration_s: float) -> None:
        """Stop a process for some time, with SIGSTOP and SIGCONT."""
        os.kill(victim["pid"], signal.SIGSTOP)
        self.struck(f"stop {called(victim)}")
        try:
            await asyncio.sleep(duration_s)
        finally:
            os.kill(victim["pid"], signal.SIGCONT)

    async def scale(self, num_groups: int) -> None:
        await self._command("scale", {"groups": num_groups})
        self._num_groups = num_groups
        self.struck(f"scale to {num_groups}")

    async def rebalance(self) -> None:
        await self._command("rebalance", {})
        self.struck("rebalance")

    async def drain(self, victim: Mapping[str, Any]) -> None:
        await self._command("drain", {"group": victim["name"]})
        self.struck(f"drain {called(victim)}", victim)

    async def until_whole(self) -> None:
        """Wait until every process and replica is there that should be; note when, for all blows so far."""
        async with asyncio.timeout(WHOLE_DEADLINE_S):
            while not await self.is_whole():
                await asyncio.sleep(POLL_PERIOD_S)
        for blow in self.blows:
            blow.whole_at = blow.whole_at or time.perf_counter()

    async def is_whole(self) -> bool:
        """Say whether all that should be there is, and whether every engine knows."""
        try:
            model = await self.model()
        except httpx.HTTPError:
            return False
        shape, progress = self.deployment.shape, model["progress"]
        engines = [engine for engine in model["engines"] if self._lives(engine["process"], *engine["shards"])]
        groups = [group for group in model["groups"] if self._lives(group["process"])]
        return (
            self._lives(model["router"])
            and len(engines) == shape.engines
            and all(len(engine["shards"]) == shape.shards for engine in engines)
            and all(engine["epoch"] == model["epoch"] for engine in engines)
            and (
                progress is None or (progress["is_settled"] and progress["wished_groups"] == self._num_groups)
            )
            and len(groups) == self._num_groups
        )

    def _lives(self, *processes: Mapping[str, Any]) -> bool:
        """Say whether none of these is one that we ended; reports of the dead are shown for a while."""
        return self._gone.isdisjoint(process["pid"] for process in processes)

    async def moved_bytes(self) -> int:
        """Return how many bytes of weights groups have copied so far; those that they share are not moved."""

        async def metrics() -> str:
            return (await self._client.get("/metrics")).raise_for_status().text

        copied = rf'^{_BYTES_METRIC}{{.*source="(?:peer|checkpoint)".*}} (\S+)$'
        values = re.findall(copied, await self._patiently(metrics), re.MULTILINE)
        return int(sum(map(float, values)))

    async def _status(self) -> dict[str, Any]:
        return dict((await self._client.get("/status")).raise_for_status().json())

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again and again while there is nobody who answers."""
        async with asyncio.timeout(WHOLE_DEADLINE_S):
            while True:
                try:
                    return await ask()
                except httpx.HTTPError:
                    await asyncio.sleep(POLL_PERIOD_S)

    async def _command(self, name: str, body: Mapping[str, Any]) -> None:
        """Give an operator's command. Raises httpx.HTTPStatusError if it is refused."""
        path = f"/admin/models/{self.deployment.shape.model_name}/experts/{name}"
        (await self._client.post(path, json=body)).raise_for_status()


def called(*processes: Mapping[str, Any]) -> str:
    """Name processes for people."""
    return ", ".join(f"{process['kind']} {process['name'].rpartition('/')[2]}" for process in processes)
