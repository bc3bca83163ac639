"""Slots of experts, and the experts within the engine's own process."""

import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.checkpoint import BrokenCheckpoint, Checkpoint
from shards.expert_store import ExpertStore, LocalExperts, NotHeld
from shards.partition import all_experts, expert_tensors


def test_an_expert_computes_its_formula(tiny_model):
    model = tiny_model("mixtral", torch.bfloat16)
    store = load(model, [(2, 1), (0, 3)])
    x_ND = torch.randn(5, model.config.hidden_size)
    for layer, expert in store.held:
        y_ND = run(store, layer, expert, x_ND)
        assert torch.equal(y_ND, run(load(model, [(layer, expert)]), layer, expert, x_ND))
        names = expert_tensors(model.config, layer, expert)
        w1, w3, w2 = (model.checkpoint.tensor(name).double() for name in names)
        x = x_ND.double()
        expected = (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        torch.testing.assert_close(y_ND, expected.float(), atol=1e-4, rtol=0)


def test_a_store_needs_only_its_own_experts_tensors(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    whole = load_file(model.directory / "model.safetensors")
    save_file(
        {name: whole[name] for name in expert_tensors(model.config, 1, 2)}, tmp_path / "model.safetensors"
    )
    x_ND = torch.randn(3, model.config.hidden_size)
    store = ExpertStore.load(Checkpoint(tmp_path), model.config, [(1, 2)], lambda done, total: None)
    assert torch.equal(run(store, 1, 2, x_ND), run(load(model, [(1, 2)]), 1, 2, x_ND))
    with pytest.raises(BrokenCheckpoint, match=r"experts\.3\.w1"):
        ExpertStore.load(Checkpoint(tmp_path), model.config, [(1, 2), (1, 3)], lambda done, total: None)


def test_progress_counts_the_bytes_of_the_assigned_experts(tiny_model):
    model, told = tiny_model("mixtral", torch.bfloat16), []
    ExpertStore.load(model.checkpoint, model.config, [(0, 0), (1, 1)], lambda *each: told.append(each))
    one_matrix = model.config.hidden_size * model.config.intermediate_size * 2
    assert told == [(n * one_matrix, 6 * one_matrix) for n in range(1, 7)]


def test_local_experts_give_each_row_what_its_expert_alone_would(tiny_model):
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
            assert torch.equal(y_TKD[t, k], run(store, 1, expert, x_TD[t : t + 1])[0])


def test_slots_are_filled_freed_and_filled_again(tiny_model):
    model = tiny_model("mixtral")
    mlp = load(model, [(0, 0)]).get(0, 0)
    store = ExpertStore(2)
    store.put(0, 0, mlp)
    store.put(2, 3, mlp)
    store.free(0, 0)
    store.put(1, 1, mlp)
    assert sorted(store.held) == [(1, 1), (2, 3)]
    assert store.holds(1, 1)
    assert not store.holds(0, 0)


def test_a_full_store_takes_no_more(tiny_model):
    store = load(tiny_model("mixtral"), [(0, 0), (0, 1)])
    with pytest.raises(ValueError, match="no slot is free for layer 1 expert 0: all 2 are filled"):
        store.put(1, 0, store.get(0, 0))
    assert store.held == ((0, 0), (0, 1))


def test_an_expert_is_held_once(tiny_model):
    store = ExpertStore(2)
    mlp = load(tiny_model("mixtral"), [(0, 0)]).get(0, 0)
    store.put(0, 0, mlp)
    with pytest.raises(ValueError, match="layer 0 expert 0 is held already"):
        store.put(0, 0, mlp)


def test_freeing_what_is_not_held_does_nothing():
    store = ExpertStore(1)
    store.free(0, 0)
    assert store.held == ()


def test_an_expert_that_is_not_held_neither_runs_nor_is_given_away(tiny_model):
    store = load(tiny_model("mixtral"), [(0, 0)])
    x_ND = torch.zeros(1, 48)
    with pytest.raises(NotHeld, match="layer 1 expert 0 is not held here"):
        run(store, 1, 0, x_ND)
    with pytest.raises(NotHeld, match="layer 0 expert 1 is not held here"):
        store.get(0, 1)


def test_rows_run_bitwise_right_or_not_at_all_while_the_slot_is_filled_and_freed(tiny_model):
    store = load(tiny_model("mixtral"), [(0, 0)])
    mlp, x_ND = store.get(0, 0), torch.randn(3, 48)
    expected, num_right, stop = mlp(x_ND), 0, threading.Event()

    def churn():
        while not stop.is_set():
            store.free(0, 0)
            store.put(0, 0, mlp)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        while num_right < 200:
            try:
                assert torch.equal(run(store, 0, 0, x_ND), expected)
                num_right += 1
            except NotHeld:
                pass
    finally:
        stop.set()
        churning.join()


def test_what_is_freed_leaves_memory_once_nobody_uses_it(tiny_model):
    store = load(tiny_model("mixtral"), [(0, 0)])
    in_use = store.get(0, 0)
    gone = weakref.ref(in_use.gate_up.data)
    store.free(0, 0)
    assert in_use(torch.zeros(1, 48)).shape == (1, 48)
    del in_use
    assert gone() is None


def load(model, assignments):
    return ExpertStore.load(model.checkpoint, model.config, assignments, lambda done, total: None)


def run(store, layer, expert, x_ND):
    out_ND = torch.empty_like(x_ND)
    store.run(layer, [(expert, len(x_ND))], x_ND, out_ND)
    return out_ND
