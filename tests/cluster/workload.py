"""What a tiny model is asked, and what it answers when nobody disturbs it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.engine.engine import Engine
from cluster.engine.request import GenerationRequest
from shards.sampling_params import SamplingParams
from tests.cluster.live_engine import Answer, token_of
from tests.shards.tiny_models import TinyModel


@dataclass(frozen=True)
class Workload:
    """Requests, and what each gets when nobody disturbs."""

    model: TinyModel
    requests: tuple[GenerationRequest, ...]
    answers: dict[str, Answer]

    @classmethod
    def make(cls, model: TinyModel, num_requests: int = 24) -> "Workload":
        draw = random.Random(1)
        vocab_size = model.config.vocab_size

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(draw.randrange(vocab_size) for _ in range(count))

        shared = tokens(20)
        requests = tuple(
            GenerationRequest(
                str(number),
                (shared if number % 3 == 0 else ()) + tokens(1 + number),
                max_tokens=20 + 3 * (number % 10),
                sampling=SamplingParams(0.9 if number % 2 else 0.0, top_p=0.95, seed=number, num_logprobs=0),
            )
            for number in range(num_requests)
        )
        return cls(model, requests, _undisturbed(model, requests))


def _undisturbed(model: TinyModel, requests: Sequence[GenerationRequest]) -> dict[str, Answer]:
    """Run all requests in one engine that holds the experts itself."""
    engine = Engine(
        model.shard(256),
        vocab_size=model.config.vocab_size,
        context_length=model.config.context_length,
        num_blocks=256,
        max_step_tokens=4096,
        max_running=len(requests),
    )
    answers: dict[str, Answer] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].append(token_of(event))
    return answers
