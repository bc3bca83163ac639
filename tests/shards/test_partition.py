"""Each tensor of a checkpoint belongs to exactly one process."""

import pytest

from shards.partition import all_experts, all_tensors, engine_tensors, expert_tensors
from tests.shards.tiny_models import MODELS


@pytest.mark.parametrize("name", MODELS)
def test_all_tensors_are_what_hugging_face_saves(tiny_model, name):
    model = tiny_model(name)
    saved = {name: stored.shape for name, stored in model.checkpoint.tensors.items()}
    assert all_tensors(model.config) == saved


def test_engine_and_experts_share_no_tensor(tiny_model):
    config = tiny_model("mixtral").config
    parts = [engine_tensors(config), *(expert_tensors(config, *each) for each in all_experts(config))]
    assert len(parts) == 1 + 3 * 4
    assert sum(len(part) for part in parts) == len(all_tensors(config))


def test_a_dense_model_is_all_engine(tiny_model):
    config = tiny_model("llama").config
    assert engine_tensors(config) == all_tensors(config)
