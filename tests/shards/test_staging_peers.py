"""Whatever is wrong with a peer, the experts that it was to send come from the checkpoint."""

import pytest
import torch

from router.links.base import Frame, Kind, LinkLost
from router.links.rows import frame_of
from router.links.stream import StreamLink
from shards.kernels.cpu import pack
from shards.layers.mlp import GatedMlp
from shards.weights_wire import weights_frames
from tests.shards.live_staging import (
    ALL,
    assert_bitwise,
    bf16_model,
    frames_for,
    loaded,
    make,
    peer_of,
    scripted,
)
from tests.shards.tiny_models import TinyModel

__all__ = ["bf16_model", "make", "peer_of", "scripted"]  # fixtures, which tests ask for by name


def test_experts_that_a_peer_does_not_hold_come_from_the_checkpoint(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model, ((0, 1), (2, 3)))
    staging.stage_all((0, 0), (0, 1), (2, 2), (2, 3), address=peer.address)
    assert_bitwise(staging.store, bf16_model, ((0, 0), (0, 1), (2, 2), (2, 3)))
    assert len(staging.connect.asked) == 1  # a refusal is no reason to leave
    assert len(staging.checkpoint.asked) == 2 * 3


def test_a_peer_that_is_gone_is_tried_once_and_the_checkpoint_read(make, peer_of, bf16_model):
    staging, peer = make(), peer_of(bf16_model)
    peer.service.stop()
    staging.stage_all(*ALL, address=peer.address)
    assert_bitwise(staging.store, bf16_model)
    assert staging.connect.asked == [peer.address]
    assert staging.stager.last_failure is None


def test_an_address_that_makes_no_sense_is_like_a_peer_that_is_gone(make, bf16_model):
    staging = make()
    staging.stage_all(*ALL[:2], address="nowhere")
    assert_bitwise(staging.store, bf16_model, ALL[:2])


def dies_at_once(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.close()
    raise LinkLost


def dies_in_mid_transfer(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.send(next(frames_for(model, fetch)))
    link.close()
    raise LinkLost


def answers_another_question(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    for frame in weights_frames(loaded(model, [(1, 1)]).get(1, 1), fetch.layer, fetch.sequence + 1):
        link.send(frame)


def answers_with_rows(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    link.send(frame_of(Kind.RESULTS, torch.zeros(3, 4), sequence=fetch.sequence))


def repeats_itself(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    first = next(frames_for(model, fetch))
    for _ in range(3):
        link.send(first)


def sends_an_expert_of_another_shape(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    mlp = GatedMlp(pack(torch.zeros(64, 48)), pack(torch.zeros(48, 32)))
    for frame in weights_frames(mlp, fetch.layer, fetch.sequence):
        link.send(frame)


def says_nothing(model: TinyModel, link: StreamLink, fetch: Frame) -> None:
    pass


@pytest.mark.parametrize(
    "answer",
    [
        dies_at_once,
        dies_in_mid_transfer,
        answers_another_question,
        answers_with_rows,
        repeats_itself,
        sends_an_expert_of_another_shape,
        says_nothing,
    ],
)
def test_whatever_a_peer_does_wrong_the_checkpoint_is_read(make, scripted, bf16_model, answer):
    staging = make()
    address = scripted(lambda link, fetch: answer(bf16_model, link, fetch))
    staging.stage_all((1, 1), (1, 2), address=address)
    assert_bitwise(staging.store, bf16_model, ((1, 1), (1, 2)))
    assert staging.connect.asked == [address]  # the second expert does not wait for it again
    assert staging.stager.last_failure is None
