"""Promise 2: a request's tokens depend on the model, the request and its seed, and on nothing else. Bitwise.

A tiny random Mixtral in bf16 runs under real engines; experts are inside, or behind real links in groups.
What could tell two runs apart varies: who shares the steps, how prompts are cut, what is cached or preempted,
where experts live, how many threads compute. Logprobs are compared too: they show the logits' last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest, TokenEvent
from router.dispatch import Dispatcher
from router.links.address import Address
from router.links.listener import Listener
from router.links.pool import LinkPool
from router.links.stream import connect
from router.placement import Group, Placement
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kernels.cpu import set_threads
from shards.sampling_params import SamplingParams
from shards.shard import Shard, load_shard
from tests.cluster.adopting_engine import AdoptingEngine, AdoptingEngines
from tests.router.served_experts import even
from tests.shards.tiny_models import TinyModel

SECRET = b"one answer"
NUM_BLOCKS = 256
Answer = list[tuple[int, float]]  # (token, its logprob)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., TinyModel]) -> TinyModel:
    return tiny_model("mixtral", torch.bfloat16)


@pytest.fixture(scope="module")
def shard(model: TinyModel) -> Shard:
    return model.shard(NUM_BLOCKS)


@pytest.fixture(scope="module")
def requests(model: TinyModel) -> list[GenerationRequest]:
    """32 requests: greedy and seeded, short and long, some with a prefix in common."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(model.config.vocab_size, (count,), generator=generator).tolist())

    shared = tokens(40)
    return [
        GenerationRequest(
            id=str(index),
            prompt=(shared if index % 3 == 0 else ()) + tokens(1 + 2 * index),
            max_tokens=12,
            sampling=SamplingParams(
                temperature=0.0 if index % 2 else 0.9,
                top_p=0.95,
                seed=index,
                repetition_penalty=1.1 if index % 4 else 1.0,
                num_logprobs=0,
            ),
        )
        for index in range(32)
    ]


@pytest.fixture(scope="module")
def alone(model: TinyModel, shard: Shard, requests: list[GenerationRequest]) -> dict[str, Answer]:
    """What each request gets when nobody else is there: whole prompt at once, nothing cached."""
    answers = {}
    for request in requests:
        answers |= run(engine(model, shard, prefix_caching=False), [request])
    return answers


def engine(model: TinyModel, shard: Shard, **knobs: object) -> Engine:
    defaults = {"num_blocks": NUM_BLOCKS, "max_step_tokens": 4096, "max_running": 32}
    return Engine(
        shard,
        vocab_size=model.config.vocab_size,
        context_length=model.config.context_length,
        **(defaults | knobs),
    )


def run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, Answer]:
    """Submit all at once and step until everybody is done."""
    for request in requests:
        engine.submit(request)
    answers: dict[str, Answer] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].append(token_of(event))
    return answers


def token_of(event: TokenEvent) -> tuple[int, float]:
    assert event.token_id is not None, f"{event.request_id} ended early: {event.finish_reason} {event.error}"
    assert event.logprob is not None
    return event.token_id, event.logprob.logprob


@contextmanager
def expert_groups(model: TinyModel, num_groups: int, directory: Path) -> Iterator[Dispatcher]:
    """Serve the model's experts from `num_groups` groups behind real links."""
    config = model.config
    listeners, services, groups = [], [], []
    for index, slots in enumerate(even(config.num_layers, config.num_experts, num_groups)):
        store = ExpertStore.load(model.checkpoint, config, slots, lambda done, total: None)
        listeners.append(Listener(SECRET, f"group-{index}", directory, "127.0.0.1"))
        services.append(ExpertService(store, listeners[-1], config.hidden_size))
        services[-1].start()
        groups.append(Group(f"group-{index}", str(listeners[-1].address), slots))

    class Fixed:
        """Placements that never change."""

        def current(self) -> Placement:
            return Placement(1, tuple(groups))

        def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
            return self.current()

    links = LinkPool(lambda address: connect(Address.parse(address), SECRET, "engine"))
    dispatcher = Dispatcher(Fixed(), links, config.num_layers, config.num_experts)
    try:
        yield dispatcher
    finally:
        dispatcher.close()
        for service, listener in zip(services, listeners, strict=True):
            service.stop()
            listener.close()


def test_a_batch_of_32_gives_what_each_gets_alone(model, shard, requests, alone) -> None:
    assert run(engine(model, shard, prefix_caching=False), requests) == alone


@pytest.mark.parametrize("max_step_tokens", [1, 7, 33])
def test_chunking_changes_nothing(model, shard, requests, alone, max_step_tokens: int) -> None:
    assert run(engine(model, shard, max_step_tokens=max_step_tokens), requests) == alone


def test_a_prefix_hit_changes_nothing(model, shard, requests, alone) -> None:
    caching = engine(model, shard, prefix_caching=True)
    run(caching, requests)
    assert run(caching, requests) == alone
    assert caching.stats().num_cached_tokens > 0


def test_going_on_from_copies_of_a_lost_engines_blocks_changes_nothing(model, shard, requests, alone) -> None:
    other = AdoptingEngine(engine(model, model.shard(NUM_BLOCKS)))
    lost = engine(model, shard, standbys=AdoptingEngines(other))
    answers: dict[str, Answer] = {request.id: [] for request in requests}
    for request in requests:
        lost.submit(request)
    for _ in range(7):
        for event in lost.step():
            answers[event.request_id].append(token_of(event))
        lost.copy_blocks()
    assert other.num_adopted > 0
    resumed = [
        replace(request, emitted=tuple(token for token, _ in answers[request.id]), is_resumed=True)
        for request in requests
    ]
    for id, rest in run(other.engine, resumed).items():
        answers[id] += rest
    assert answers == alone
    num_known = sum(len(request.prompt) + len(request.emitted) for request in resumed)
    assert other.engine.stats().num_computed_tokens < num_known / 2, "the copies were of no use"


def test_preemption_changes_nothing(model, shard, requests, alone) -> None:
    short_of_blocks = engine(model, shard, num_blocks=24)
    assert run(short_of_blocks, requests) == alone
    assert short_of_blocks.stats().num_preemptions > 0


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_the_number_of_expert_groups_changes_nothing(
    model, requests, alone, tmp_path, num_groups: int
) -> None:
    with expert_groups(model, num_groups, tmp_path) as dispatcher:
        shard = load_shard(model.checkpoint, model.config, dispatcher, NUM_BLOCKS, lambda done, total: None)
        assert run(engine(model, shard, max_step_tokens=50), requests) == alone
        # Every row went over a link: one per layer, expert of a token, and token computed.
        assert dispatcher.take_load().sum() > 0


def test_the_number_of_threads_changes_nothing(model, shard, requests, alone) -> None:
    try:
        set_threads(3, spin_us=10)
        assert run(engine(model, shard), requests) == alone
    finally:
        set_threads(1, spin_us=0)


@pytest.mark.parametrize("num_emitted", [1, 5, 11])
def test_another_engine_goes_on_where_one_was_lost(model, shard, requests, alone, num_emitted: int) -> None:
    resubmitted = [
        replace(request, emitted=tuple(token for token, _ in alone[request.id][:num_emitted]))
        for request in requests
    ]
    rest = run(engine(model, shard, max_step_tokens=20), resubmitted)
    assert rest == {id: answer[num_emitted:] for id, answer in alone.items()}
