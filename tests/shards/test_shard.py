"""What a process reads, and that the experts' place changes nothing."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.checkpoint import BrokenCheckpoint, Checkpoint
from shards.expert_store import ExpertStore, LocalExperts
from shards.partition import all_experts, engine_tensors
from shards.shard import load_shard
from tests.shards.tiny_models import MODELS, chunks_of, run_alone


@pytest.mark.parametrize("name", MODELS)
def test_loading_reads_each_tensor_of_the_model_once(tiny_model, name):
    model, told = tiny_model(name), []
    load_shard(model.checkpoint, model.config, None, 4, lambda *each: told.append(each))
    total_bytes = sum(tensor.num_bytes for tensor in model.checkpoint.tensors.values())
    assert told[-1] == (total_bytes, total_bytes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_rank_reads_no_more_than_its_parts(tiny_model):
    model = tiny_model("llama-uneven")

    def bytes_read(rank: int) -> int:
        told = []
        group = LonelyRank(rank, 3)
        load_shard(model.checkpoint, model.config, None, 4, lambda *each: told.append(each), group)
        (done, total) = told[-1]
        assert done == total
        return done

    num_bytes = {name: tensor.num_bytes for name, tensor in model.checkpoint.tensors.items()}
    replicated = sum(num_bytes[name] for name in num_bytes if "norm" in name or "embed_tokens" in name)
    assert sum(map(bytes_read, range(3))) == sum(num_bytes.values()) + 2 * replicated


def test_an_engine_whose_experts_are_elsewhere_reads_none_of_them(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    elsewhere = LocalExperts(
        ExpertStore.load(model.checkpoint, model.config, all_experts(model.config), ignore), model.config
    )
    whole = load_file(model.directory / "model.safetensors")
    save_file({name: whole[name] for name in engine_tensors(model.config)}, tmp_path / "model.safetensors")
    shard = load_shard(Checkpoint(tmp_path), model.config, elsewhere, 4, ignore)
    chunks = chunks_of(model.tokens(30), [30], (0, 1))
    assert torch.equal(run_alone(shard, chunks), run_alone(model.shard(), chunks))


def test_a_broken_checkpoint_is_found_before_anything_is_read(tiny_model, tmp_path):
    model = tiny_model("mixtral")
    whole = load_file(model.directory / "model.safetensors")
    del whole["model.norm.weight"]
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"model\.norm\.weight"):
        load_shard(Checkpoint(tmp_path), model.config, None, 4, refuse)


def ignore(done: int, total: int) -> None:
    pass


def refuse(done: int, total: int) -> None:
    raise AssertionError("something was read")


class LonelyRank:
    """A rank that only loads its share, and never meets the others."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        raise AssertionError("nobody is there")

    def all_gather(self, x_TC: Tensor) -> Tensor:
        raise AssertionError("nobody is there")

    def close(self) -> None:
        pass
