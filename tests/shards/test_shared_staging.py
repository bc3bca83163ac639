"""Groups of one host fill their slots with the same memory."""

import os
from dataclasses import replace

import pytest

from router.group_state import StagedBytes
from router.links.address import Address
from shards.expert_store import ExpertStore
from shards.kernels import shared_pages
from tests.shards.kernels.shared import needs_sharing
from tests.shards.live_staging import ALL, assert_bitwise, bf16_model, make, peer_of

__all__ = ["bf16_model", "make", "peer_of"]  # fixtures, which tests ask for by name

pytestmark = needs_sharing


@pytest.fixture(autouse=True)
def share_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_pages, "MIN_BYTES", 0)


def memory_of(store: ExpertStore) -> dict[tuple[int, int], list[int]]:
    """Name the memory of each expert, by the inodes of its files."""
    return {
        key: [os.fstat(weight.file.fileno()).st_ino for weight in (mlp.gate_up, mlp.down) if weight.file]
        for key in store.held
        for mlp in [store.get(*key)]
    }


def test_what_one_group_has_read_others_map_and_hand_on(make, peer_of, bf16_model):
    first, second, third = make(), make(), make()
    first.stage_all(*ALL)
    second.stage_all(*ALL, address=peer_of(bf16_model, store=first.store).address)
    third.stage_all(*ALL, address=peer_of(bf16_model, store=second.store).address)
    total = sum(third.store.get(*key).nbytes for key in ALL)
    for staging in (second, third):
        assert staging.stager.staged_bytes == StagedBytes(shared=total)
        assert not staging.checkpoint.asked
        assert memory_of(staging.store) == memory_of(first.store)
        assert_bitwise(staging.store, bf16_model)


def test_it_stays_where_it_is_held_when_others_free_it(make, peer_of, bf16_model):
    first, second = make(), make()
    first.stage_all(*ALL)
    second.stage_all(*ALL[:2], address=peer_of(bf16_model, store=first.store).address)
    first.stager.free(ALL)
    assert_bitwise(second.store, bf16_model, ALL[:2])


def test_a_group_of_another_host_gets_a_copy_of_its_own(make, peer_of, bf16_model):
    first, second = make(), make()
    first.stage_all((0, 1))
    address = Address.parse(peer_of(bf16_model, store=first.store).address)
    second.stage_all((0, 1), address=str(replace(address, host_id="another")))
    assert second.stager.staged_bytes == StagedBytes(peer=first.store.get(0, 1).nbytes)
    assert_bitwise(second.store, bf16_model, ((0, 1),))
    assert set(memory_of(second.store)[0, 1]).isdisjoint(memory_of(first.store)[0, 1])


def test_a_group_that_can_not_map_a_file_reads_the_checkpoint(make, peer_of, bf16_model, monkeypatch):
    first, second = make(), make()
    first.stage_all((0, 1))

    def refuse(file, num_bytes):
        raise OSError("no room for a mapping")

    monkeypatch.setattr(shared_pages, "adopt", refuse)
    second.stage_all((0, 1), address=peer_of(bf16_model, store=first.store).address)
    assert_bitwise(second.store, bf16_model, ((0, 1),))
    assert second.stager.staged_bytes.checkpoint > 0


def test_without_memory_to_share_each_group_has_a_copy(make, peer_of, bf16_model, monkeypatch):
    monkeypatch.setattr(shared_pages, "create", lambda num_bytes: None)
    first, second = make(), make()
    first.stage_all((0, 1))
    second.stage_all((0, 1), address=peer_of(bf16_model, store=first.store).address)
    assert second.stager.staged_bytes == StagedBytes(peer=first.store.get(0, 1).nbytes)
    assert_bitwise(second.store, bf16_model, ((0, 1),))
