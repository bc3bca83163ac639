"""How a shard learns of placements, and of steps."""

import threading
from collections.abc import Iterator
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
from shards.step import StepBatch
from shards.step_wire import decode_step
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


def test_a_shard_does_what_rank_0_does_with_steps_and_blocks(link, tiny_model):
    model: TinyModel = tiny_model("llama")
    engines_end, shards_end = link
    step = StepBatch(tuple(chunks_of(model.tokens(40), [40], (3, 9, 1))))
    leading, shard = LeadingShard(model.shard(), (engines_end,)), model.shard()
    leading.run(step)
    row = leading.read_blocks([9])[0]
    leading.write_block(5, row)
    for kind in (Kind.STEP, Kind.READ, Kind.WRITE):
        frame = shards_end.receive(10)
        assert frame.kind == kind
        follow(frame, shard)
    assert torch.equal(shard.read_blocks([3, 5, 9]), leading.shard.read_blocks([3, 5, 9]))
    assert torch.equal(shard.read_blocks([5])[0], row)


def test_a_shard_does_nothing_that_rank_0_does_not_ask_for(tiny_model):
    with pytest.raises(ValueError, match="TOKENS"):
        follow(Frame(Kind.TOKENS), tiny_model("llama").shard())
