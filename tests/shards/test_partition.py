"""Each tensor of a checkpoint belongs to exactly one process, or is divided among the ranks of one engine."""

import pytest

from shards.checkpoint import Part
from shards.config import ModelConfig
from shards.partition import Share, all_experts, all_tensors, engine_tensors, expert_tensors
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


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mistral-window"}))  # which has one KV head
def test_the_parts_of_all_ranks_are_the_whole_tensor_in_order(tiny_model, name):
    config = tiny_model(name).config
    for size in range(2, config.num_kv_heads + 1):
        check_parts(config, size)


def check_parts(config: ModelConfig, size: int) -> None:
    parts = [Share.of(config, rank, size).parts() for rank in range(size)]
    for tensor, shape in all_tensors(config).items():
        cuts = [its[tensor] for its in parts if tensor in its]
        if not cuts:
            assert is_replicated(tensor), tensor
            continue
        (axis,) = {cut.axis for cut in cuts}
        borders = [0, *(cut.stop for cut in cuts)]
        assert [cut.start for cut in cuts] == borders[:-1], tensor
        assert borders[-1] == shape[axis], tensor


def is_replicated(tensor: str) -> bool:
    return any(word in tensor for word in ("norm", "gate.weight", "embed_tokens"))


def test_a_rank_reads_the_query_heads_of_its_kv_heads(tiny_model):
    config = tiny_model("llama-uneven").config  # 6 heads of 16 values share 3 KV heads
    first, second = (Share.of(config, rank, 2) for rank in range(2))
    assert (first.config.num_heads, first.config.num_kv_heads) == (4, 2)
    assert (second.config.num_heads, second.config.num_kv_heads) == (2, 1)
    name = "model.layers.1.self_attn."
    assert second.parts()[f"{name}q_proj.weight"] == Part(0, 64, 96)
    assert second.parts()[f"{name}o_proj.weight"] == Part(1, 64, 96)
    assert second.parts()[f"{name}v_proj.weight"] == Part(0, 32, 48)


def test_one_rank_reads_every_tensor_whole(tiny_model):
    config = tiny_model("mixtral").config
    share = Share.of(config, 0, 1)
    assert share.config == config
    assert share.parts() == {}


def test_more_ranks_than_kv_heads_are_refused(tiny_model):
    with pytest.raises(ValueError, match=r"tensor_parallel is 4, but the model has 3 KV heads, .* at most 3"):
        Share.of(tiny_model("llama-uneven").config, 0, 4)
