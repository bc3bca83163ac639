"""Slots of experts, and the experts within the engine's own process."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.checkpoint import BrokenCheckpoint, Checkpoint
from shards.expert_store import ExpertStore, LocalExperts
from shards.partition import all_experts, expert_tensors


def test_a_slot_computes_its_experts_formula(tiny_model):
    model = tiny_model("mixtral", torch.bfloat16)
    store = load(model, [(2, 1), (0, 3)])
    x_ND = torch.randn(5, model.config.hidden_size)
    for slot, (layer, expert) in enumerate(store.assignments):
        assert torch.equal(run(store, slot, x_ND), run(load(model, [(layer, expert)]), 0, x_ND))
        names = expert_tensors(model.config, layer, expert)
        w1, w3, w2 = (model.checkpoint.tensor(name).double() for name in names)
        x = x_ND.double()
        expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        torch.testing.assert_close(run(store, slot, x_ND), expected.float(), atol=1e-4, rtol=0)


def test_a_store_needs_only_its_own_experts_tensors(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    whole = load_file(model.directory / "model.safetensors")
    save_file(
        {name: whole[name] for name in expert_tensors(model.config, 1, 2)}, tmp_path / "model.safetensors"
    )
    x_ND = torch.randn(3, model.config.hidden_size)
    store = ExpertStore.load(Checkpoint(tmp_path), model.config, [(1, 2)], lambda done, total: None)
    assert torch.equal(run(store, 0, x_ND), run(load(model, [(1, 2)]), 0, x_ND))
    with pytest.raises(BrokenCheckpoint, match=r"experts\.3\.w1"):
        ExpertStore.load(Checkpoint(tmp_path), model.config, [(1, 2), (1, 3)], lambda done, total: None)


def test_progress_counts_the_bytes_of_the_assigned_experts(tiny_model):
    model, told = tiny_model("mixtral", torch.bfloat16), []
    ExpertStore.load(model.checkpoint, model.config, [(0, 0), (1, 1)], lambda *each: told.append(each))
    one_matrix = model.config.hidden_size * model.config.intermediate_size * 2
    assert told == [(n * one_matrix, 6 * one_matrix) for n in range(1, 7)]


def test_local_experts_give_each_row_what_its_slot_alone_would(tiny_model):
    model = tiny_model("mixtral")
    config = model.config
    store = load(model, all_experts(config)[::-1])  # in any order
    x_TD = torch.randn(9, config.hidden_size)
    expert_TK = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    expert_TK[expert_TK == 3] = 0  # an expert that nobody chose
    y_TKD = LocalExperts(store, config)(1, x_TD, expert_TK)
    assert y_TKD.shape == (9, 2, config.hidden_size)
    for t, row in enumerate(expert_TK.tolist()):
        for k, expert in enumerate(row):
            slot = store.assignments.index((1, expert))
            assert torch.equal(y_TKD[t, k], run(store, slot, x_TD[t : t + 1])[0])


def load(model, assignments):
    return ExpertStore.load(model.checkpoint, model.config, assignments, lambda done, total: None)


def run(store, slot, x_ND):
    out_ND = torch.empty_like(x_ND)
    store.run(slot, x_ND, out_ND)
    return out_ND
