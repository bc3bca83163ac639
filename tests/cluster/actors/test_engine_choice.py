"""Serve's request router for engines, without Serve: which replicas it lets Serve choose from."""

import asyncio
from dataclasses import dataclass

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from cluster.actors.engine_choice import EngineChoice, engine_name, two_of

TAGS = ["aaa", "bbb", "ccc"]


def names(*tags: str) -> frozenset[str]:
    return frozenset(engine_name("model", tag) for tag in tags)


def test_two_are_drawn_and_each_gets_its_turn() -> None:
    draws = [two_of(TAGS, ()) for _ in range(200)]
    assert {len(set(draw)) for draw in draws} == {2}
    assert {tag for draw in draws for tag in draw} == set(TAGS)


def test_an_avoided_engine_is_not_drawn() -> None:
    assert {tag for _ in range(200) for tag in two_of(TAGS, names("bbb"))} == {"aaa", "ccc"}


def test_the_only_engine_is_drawn_even_if_it_is_avoided() -> None:
    assert two_of(["aaa"], names("aaa", "gone")) == ["aaa"]


def test_without_engines_none_is_drawn() -> None:
    assert two_of([], names("gone")) == []


@dataclass(frozen=True)
class Replica:
    replica_id: ReplicaID


def test_what_the_call_says_to_avoid_is_avoided_also_when_serve_asks_again() -> None:
    async def run() -> None:
        choice = object.__new__(EngineChoice)  # what it chooses depends on no state of Serve's
        replicas = [Replica(ReplicaID(tag, None)) for tag in TAGS]
        request = PendingRequest([], {"avoided": names("aaa", "ccc")}, metadata=None)
        for _ in range(20):
            assert await choice.choose_replicas(replicas, request) == [[replicas[1]]]
        assert request.routing_context.should_backoff, "Serve would ask again and again without a pause"

    assert issubclass(EngineChoice, RequestRouter)
    asyncio.run(run())
