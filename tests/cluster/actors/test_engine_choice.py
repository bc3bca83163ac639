"""Serve's request router for engines, without Serve: which replicas it lets Serve choose from."""

import asyncio
from dataclasses import dataclass

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter

from cluster.actors.engine_choice import EngineChoice, engine_name, least_busy_first
from cluster.engine.request import GenerationRequest
from router.requests import choose_standby
from shards.sampling_params import SamplingParams

TAGS = ["aaa", "bbb", "ccc"]


def names(*tags: str) -> frozenset[str]:
    return frozenset(engine_name("model", tag) for tag in tags)


def test_those_with_the_fewest_requests_come_first() -> None:
    assert least_busy_first({"aaa": 3, "bbb": 1, "ccc": 2}, ()) == ["bbb", "ccc", "aaa"]


def test_of_equals_each_gets_its_turn() -> None:
    draws = [least_busy_first(dict.fromkeys(TAGS, 0), ()) for _ in range(200)]
    assert {draw[0] for draw in draws} == set(TAGS)


def test_an_avoided_engine_is_not_chosen_however_few_requests_it_has() -> None:
    assert least_busy_first({"aaa": 9, "bbb": 0, "ccc": 8}, names("bbb")) == ["ccc", "aaa"]


def test_the_only_engine_is_chosen_even_if_it_is_avoided() -> None:
    assert least_busy_first({"aaa": 1}, names("aaa", "gone")) == ["aaa"]


def test_without_engines_none_is_chosen() -> None:
    assert least_busy_first({}, names("gone")) == []


@dataclass(frozen=True)
class Replica:
    replica_id: ReplicaID


REPLICAS = [Replica(ReplicaID(tag, None)) for tag in TAGS]


def choice_without_serve() -> EngineChoice:
    choice = object.__new__(EngineChoice)  # what it chooses depends on no state of Serve's
    choice._use_replica_queue_len_cache = False
    choice.initialize_state()
    return choice


def test_what_the_call_says_to_avoid_is_avoided_also_when_serve_asks_again() -> None:
    async def run() -> None:
        choice = choice_without_serve()
        request = PendingRequest([], {"avoided": names("aaa", "ccc")}, metadata=None)
        for _ in range(20):
            assert await choice.choose_replicas(REPLICAS, request) == [[REPLICAS[1]]]
        assert request.routing_context.should_backoff, "Serve would ask again and again without a pause"

    assert issubclass(EngineChoice, RequestRouter)
    asyncio.run(run())


def test_requests_are_spread_evenly_and_count_until_they_end() -> None:
    async def run() -> None:
        choice = choice_without_serve()
        sent = []
        for _ in range(12):
            [[engine], *_] = await choice.choose_replicas(REPLICAS)
            choice.on_send_request(engine.replica_id)
            sent.append(engine)
        assert {engine: sent.count(engine) for engine in REPLICAS} == dict.fromkeys(REPLICAS, 4)

        for _ in range(4):
            choice.on_request_completed(REPLICAS[1].replica_id, "a request")
        for _ in range(4):
            [[engine], *_] = await choice.choose_replicas(REPLICAS)
            assert engine is REPLICAS[1]
            choice.on_send_request(engine.replica_id)

    asyncio.run(run())


def test_an_answer_goes_on_where_its_copies_are_however_busy_that_engine_is() -> None:
    async def run() -> None:
        choice = choice_without_serve()
        for number in range(20):
            request = GenerationRequest(f"cmpl-{number}.1", (1,), 9, SamplingParams(), seeks_copies=True)
            standby = choose_standby(f"cmpl-{number}", TAGS[1:])
            busy = REPLICAS[TAGS.index(standby)]
            choice.on_send_request(busy.replica_id)
            pending = PendingRequest([request], {"avoided": names("aaa")}, metadata=None)
            [[chosen], *others] = await choice.choose_replicas(REPLICAS, pending)
            assert chosen is busy
            assert len(others) == 1

    asyncio.run(run())


def test_calls_that_are_no_requests_go_anywhere() -> None:
    async def run() -> None:
        assert len(await choice_without_serve().choose_replicas(REPLICAS, PendingRequest([4], {}, None))) == 3

    asyncio.run(run())
