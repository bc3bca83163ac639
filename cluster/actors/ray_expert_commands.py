"""Commands to a model's router, by way of its engines: a gateway has no other way there."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle

from cluster.actors.ray_errors import UNREACHABLE, sentence
from cluster.serve.errors import unavailable
from router.controller import Progress

TIMEOUT_S = 10.0  # a router that plans for a large model may take a second


class RayExpertCommands:
    """Implements ExpertCommands."""

    def __init__(
        self,
        engines: Mapping[str, DeploymentHandle],
        avoided: Callable[[], frozenset[str]],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`engines` has the engines of each model; `avoided()` names those that seem lost."""
        self._engines = engines
        self._avoided = avoided
        self._timeout_s = timeout_s

    async def scale(self, model: str, num_groups: int) -> Progress:
        return await self._answer(self._engines[model].scale_experts, num_groups)

    async def rebalance(self, model: str) -> Progress:
        return await self._answer(self._engines[model].rebalance_experts)

    async def drain(self, model: str, group: str) -> Progress:
        return await self._answer(self._engines[model].drain_experts, group)

    async def _answer(self, method: Any, *arguments: object) -> Progress:
        try:
            async with asyncio.timeout(self._timeout_s):
                progress: Progress = await method.remote(*arguments, avoided=self._avoided())
        except ValueError as error:
            raise ValueError(sentence(error)) from error
        except UNREACHABLE as error:
            raise unavailable(f"an engine or its router does not answer: {type(error).__name__}") from error
        return progress
