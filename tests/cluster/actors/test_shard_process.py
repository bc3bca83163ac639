"""How a shard learns of placements, and of steps."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cluster.actors.engine_shards import LeadingShard
from cluster.actors.shard_process import follow
from router.links.base import Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.stream import StreamLink, connect
from router.placement import Placement
from router.pushed_placements import PushedPlacements
from shards.shard import Shard
from shards.step import StepBatch
from shards.step_wire import decode_step
from tests.shards.ranks import ranks_of
from tests.shards.tiny_models import TinyModel, chunks_of

SECRET = b"one cluster's secret"


def test_a_placement_that_a_newer_one_overtook_is_dropped():
    placements = PushedPlacements()
    for epoch in (1, 3, 2):
        placements.push(Placement(epoch, ()))
    assert placements.current().epoch == 3


def test_who_waits_for_a_newer_placement_gets_it_when_it_comes():
    placements = PushedPlacements()
    pusher = threading.Thread(target=lambda: placements.push(Placement(5, ())))
    pusher.start()
    assert placements.wait_newer(4, timeout_s=30).epoch == 5
    pusher.join()


def test_who_waits_in_vain_gets_what_there_is():
    assert PushedPlacements().wait_newer(0, timeout_s=0.01).epoch == 0


@pytest.fixture
def link(tmp_path: Path) -> Iterator[tuple[StreamLink, StreamLink]]:
    """Yield the engine's and the shard's end of a link."""
    listener = Listener(SECRET, "engine", tmp_path, "127.0.0.1")
    shards_end = connect(listener.address, SECRET, "shard")
    engines_end = listener.accept(10)
    yield engines_end, shards_end
    for end in (listener, engines_end, shards_end):
        end.close()


def test_rank_0_sends_each_step_to_the_shards_and_runs_it_too(link, tiny_model):
    model: TinyModel = tiny_model("llama")
    engines_end, shards_end = link
    step = StepBatch(tuple(chunks_of(model.tokens(20), [20], (3, 9))))
    logits = LeadingShard(model.shard(), (engines_end,)).run(step)
    frame = shards_end.receive(10)
    assert frame.kind == Kind.STEP
    assert decode_step(frame.meta) == step
    assert torch.equal(logits, model.shard().run(step))


def test_a_shard_that_is_gone_fails_the_step(link, tiny_model):
    model: TinyModel = tiny_model("llama")
    engines_end, shards_end = link
    shards_end.close()
    step = StepBatch(tuple(chunks_of(model.tokens(20), [20], (3, 9))))
    with pytest.raises(LinkLost):
        LeadingShard(model.shard(), (engines_end,)).run(step)


def test_a_rank_does_what_rank_0_does_with_steps_and_blocks(link, tiny_model):
    model: TinyModel = tiny_model("llama-uneven")
    engines_end, shards_end = link
    token_ids = model.tokens(40)
    (chunk,) = chunks_of(token_ids, [40], (3, 9, 1))
    first, rest = chunks_of(token_ids, [32, 8], (5, 2, 4))
    kinds = (Kind.STEP, Kind.READ, Kind.WRITE, Kind.STEP)

    def run_rank_1(shard: Shard) -> list[Kind]:
        frames = []
        for _ in kinds:
            frame = shards_end.receive(10)
            frames.append(frame.kind)
            follow(frame, shard)
        return frames

    with ranks_of(model, 2) as ranks, ThreadPoolExecutor(1) as pool:
        leading = LeadingShard(ranks.shards[0], (engines_end,))
        followed = pool.submit(run_rank_1, ranks.shards[1])
        logits = leading.run(StepBatch((chunk,)))
        leading.write_blocks([5, 2], leading.read_blocks([3, 9]))
        assert torch.equal(leading.run(StepBatch((rest,))), logits[-1:])
        assert followed.result(10) == [*kinds]
    assert first.block_ids == rest.block_ids[:2]


def test_a_shard_does_nothing_that_rank_0_does_not_ask_for(tiny_model):
    with pytest.raises(ValueError, match="TOKENS"):
        follow(Frame(Kind.TOKENS), tiny_model("llama").shard())
