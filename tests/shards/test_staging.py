"""Slots filled from real groups and real checkpoints compute bitwise what loaded ones do, while rows run."""

import os
import sys
import threading

import numpy as np
import pytest
import torch

from router.group_state import StagedBytes
from router.links.address import Address
from router.links.base import Kind
from router.links.rows import frame_of, rows_of
from router.links.stream import connect
from tests.shards.live_staging import (
    ALL,
    SECRET,
    assert_bitwise,
    bf16_model,
    eventually,
    make,
    peer_of,
    run,
)
from tests.shards.tiny_models import TinyModel

__all__ = ["bf16_model", "make", "peer_of"]  # fixtures, which tests ask for by name


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float16], ids=str)
def model(request: pytest.FixtureRequest, tiny_model) -> TinyModel:
    return tiny_model("mixtral", request.param)


def test_experts_staged_from_the_checkpoint_compute_bitwise_what_loaded_ones_do(make, model):
    staging = make(model)
    staging.stage_all(*ALL)
    assert_bitwise(staging.store, model)
    expected = sum(
        tensor.num_bytes for name, tensor in model.checkpoint.tensors.items() if ".experts." in name
    )
    assert staging.stager.staged_bytes == StagedBytes(checkpoint=expected)
    assert staging.stager.last_failure is None


def test_experts_staged_from_a_peer_compute_bitwise_the_same_and_no_file_is_read(make, peer_of, model):
    staging, peer = make(model), peer_of(model)
    staging.stage_all(*ALL, address=peer.address)
    assert_bitwise(staging.store, model)
    assert not staging.checkpoint.asked
    assert staging.stager.staged_bytes == StagedBytes(peer=sum(staging.store.get(*key).nbytes for key in ALL))


def test_one_link_serves_all_there_is_to_do_and_is_closed_behind_it(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    staging.stage_all(*ALL, address=peer.address)
    assert staging.connect.asked == [peer.address]
    eventually(lambda: peer.service.num_links == 0)
    staging.stager.free([(0, 0)])
    staging.stage_all((0, 0), address=peer.address)
    assert staging.connect.asked == [peer.address] * 2


def test_rows_run_bitwise_right_at_a_peer_that_gives_weights_meanwhile(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    link = connect(Address.parse(peer.address), SECRET, "engine")
    x_ND = torch.randn(6, bf16_model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([run(peer.store, 1, 2, x_ND[:4]), run(peer.store, 1, 3, x_ND[4:])])
    for sequence in range(20):
        staging.stager.free(ALL)
        staging.stage(*ALL, address=peer.address)
        meta = np.array([(2, 4), (3, 2)], "<i4").tobytes()
        link.send(frame_of(Kind.ROWS, x_ND, sequence=sequence, layer=1, meta=meta))
        answer = link.receive(10)
        assert (answer.kind, answer.sequence) == (Kind.RESULTS, sequence)
        assert torch.equal(rows_of(answer, x_ND.size(1)), expected)
    staging.settle()
    assert_bitwise(staging.store, bf16_model)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_the_thread_that_stages_steps_back_behind_those_that_serve(make):
    staging = make()
    staging.stage_all((0, 0))
    (thread,) = (each for each in threading.enumerate() if each.name == "stager")
    ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == min(ours + 10, 19)
