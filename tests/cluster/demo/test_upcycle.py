import hashlib

import numpy as np
import pytest

from cluster.demo.upcycle import EXPERTS_PER_TOKEN, NUM_EXPERTS, sparse_config, sparse_layer

HIDDEN, UNITS = 8, 12


@pytest.fixture
def dense():
    values = np.random.Generator(np.random.Philox(1))

    def matrix(*shape):
        return values.standard_normal(shape, np.float32)

    return {
        "self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": matrix(UNITS, HIDDEN),
        "mlp.up_proj.weight": matrix(UNITS, HIDDEN),
        "mlp.down_proj.weight": matrix(HIDDEN, UNITS),
    }


def mlp(x, w1, w2, w3):
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def expert(sparse, number):
    return [sparse[f"block_sparse_moe.experts.{number}.w{i}.weight"] for i in (1, 2, 3)]


def test_an_expert_without_noise_computes_what_the_dense_mlp_does(dense, monkeypatch):
    monkeypatch.setattr("cluster.demo.upcycle.NOISE", 0.0)
    sparse = sparse_layer(3, dense)
    x = np.ones((2, HIDDEN), np.float32)
    want = mlp(x, *(dense[f"mlp.{name}_proj.weight"] for name in ("gate", "down", "up")))
    for number in range(NUM_EXPERTS):
        np.testing.assert_allclose(mlp(x, *expert(sparse, number)), want, rtol=1e-5)


def test_no_two_experts_of_any_layer_are_alike(dense):
    first = [sparse_layer(layer, dense) for layer in range(3)]
    matrices = [
        matrix.tobytes() for sparse in first for e in range(NUM_EXPERTS) for matrix in expert(sparse, e)
    ]
    assert len(set(matrices)) == len(matrices)


def test_the_order_in_which_experts_are_made_changes_nothing(dense):
    def backwards(function, numbers):
        return [function(number) for number in reversed(numbers)]

    forwards = sparse_layer(5, dense)
    for name, weight in sparse_layer(5, dense, backwards).items():
        np.testing.assert_array_equal(weight, forwards[name])


def test_the_weights_are_these_very_bits(dense):
    sparse = sparse_layer(2, dense)
    digest = hashlib.sha256(b"".join(name.encode() + sparse[name].tobytes() for name in sorted(sparse)))
    assert digest.hexdigest() == "d2176125879c86e107dca6f16e1264a49536d26b908b7199ebd20020249e0ad9"


def test_what_is_not_the_mlp_stays(dense):
    assert sparse_layer(0, dense)["self_attn.q_proj.weight"] is dense["self_attn.q_proj.weight"]


def test_the_config_becomes_mixtrals():
    config = sparse_config({"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "mlp_bias": False})
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    assert config["hidden_size"] == 576
