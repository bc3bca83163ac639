"""Commands on their way to a router: what Ray makes of answers and errors, and what a client is told."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from cluster.actors.ray_expert_commands import RayExpertCommands
from cluster.serve.errors import ApiError
from router.controller import Progress

AVOIDED = frozenset({"m/stopped"})
DONE = Progress(2, {"live": 2}, 0, 0, 1.0)


class Engine:
    """A Serve handle: every method is there, and ends as the test says."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.asked = []

    def __getattr__(self, name):
        return Method(self, name)


class Method:
    def __init__(self, engine, name):
        self.engine, self.name = engine, name

    async def remote(self, *arguments, avoided):
        assert avoided == AVOIDED
        self.engine.asked.append((self.name, *arguments))
        if isinstance(self.engine.outcome, Exception):
            raise self.engine.outcome
        if self.engine.outcome is None:
            await asyncio.Event().wait()
        return self.engine.outcome


def through_ray(error):
    """Return the error as a handle raises it: of two classes, with a traceback for a text."""
    return RayTaskError("scale_experts", "Traceback ...", error, "", 1, "127.0.0.1").as_instanceof_cause()


@pytest.mark.parametrize(
    ("name", "arguments", "asked"),
    [
        ("scale", (4,), ("scale_experts", 4)),
        ("rebalance", (), ("rebalance_experts",)),
        ("drain", ("m/0",), ("drain_experts", "m/0")),
    ],
)
def test_a_command_goes_to_an_engine_of_its_model(name, arguments, asked):
    engines = {"m": Engine(DONE), "other": Engine(DONE)}
    commands = RayExpertCommands(engines, lambda: AVOIDED)
    assert asyncio.run(getattr(commands, name)("m", *arguments)) == DONE
    assert (engines["m"].asked, engines["other"].asked) == ([asked], [])


@pytest.mark.parametrize("wrapped", [through_ray, lambda error: error])
def test_a_mistake_keeps_its_sentence_and_loses_the_traceback(wrapped):
    commands = RayExpertCommands(
        {"m": Engine(wrapped(ValueError("groups is 1, but it takes 2")))}, lambda: AVOIDED
    )
    with pytest.raises(ValueError, match=r"^groups is 1, but it takes 2$"):
        asyncio.run(commands.scale("m", 1))


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        through_ray(ActorDiedError()),
        through_ray(KeyError("a fault of ours")),
        RayServeException("no replica"),
        DeploymentUnavailableError(None),
        None,  # nothing comes
    ],
)
def test_who_does_not_answer_is_unavailable(error):
    commands = RayExpertCommands({"m": Engine(error)}, lambda: AVOIDED, timeout_s=0.05)
    with pytest.raises(ApiError) as raised:
        asyncio.run(commands.rebalance("m"))
    assert raised.value.status == 503
