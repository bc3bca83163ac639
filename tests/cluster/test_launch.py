import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cluster.launch import verify
from cluster.settings import ModelSettings


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    """Return a function: a copy of a tiny model that is complete, for a test to break."""

    def copy(name: str) -> Path:
        directory = Path(shutil.copytree(tiny_model(name).directory, tmp_path / name))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:97]  # as many as the model has ids
        tokenizer = tokenizers.Tokenizer(models.BPE({token: id for id, token in enumerate(alphabet)}, []))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(directory / "tokenizer.json"))
        (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
        return directory

    return copy


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(("name", "expert_groups"), [("llama", 0), ("mixtral", 0), ("mixtral", 4)])
def test_a_complete_checkpoint_is_accepted(checkpoint, name, expert_groups):
    verify(ModelSettings("m", name, expert_groups=expert_groups), checkpoint(name))


def test_a_dense_model_has_no_experts_to_deal_out(checkpoint):
    with pytest.raises(
        ValueError, match=r"'m' has expert_groups 2, but .*llama is a dense model; it must be 0"
    ):
        verify(ModelSettings("m", "llama", expert_groups=2), checkpoint("llama"))


def test_more_groups_than_experts_are_refused(checkpoint):
    with pytest.raises(ValueError, match="'m' has expert_groups 5, but only 4 experts"):
        verify(ModelSettings("m", "mixtral", expert_groups=5), checkpoint("mixtral"))


@pytest.mark.parametrize(("groups", "slots", "replicas", "enough"), [(2, 1, 1, 2), (3, 2, 2, 3)])
def test_too_few_slots_for_every_expert_are_refused(checkpoint, groups, slots, replicas, enough):
    model = ModelSettings("m", "mixtral", expert_groups=groups, expert_slots=slots, expert_replicas=replicas)
    sentence = f"expert_slots {slots} in expert_groups {groups}, .*; expert_slots must be {enough} at least"
    with pytest.raises(ValueError, match=sentence):
        verify(model, checkpoint("mixtral"))


def test_just_enough_slots_for_every_expert_are_accepted(checkpoint):
    model = ModelSettings("m", "mixtral", expert_groups=4, expert_slots=2, expert_replicas=2)
    verify(model, checkpoint("mixtral"))


def test_more_ranks_than_kv_heads_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"'m' has tensor_parallel 3, but .*llama has only 2 KV heads"):
        verify(ModelSettings("m", "llama", tensor_parallel=3), checkpoint("llama"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(checkpoint, file):
    directory = checkpoint("llama")
    (directory / file).unlink()
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        verify(ModelSettings("m", "llama"), directory)


def test_a_file_that_was_cut_short_is_named(checkpoint):
    directory = checkpoint("llama")
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors is cut short"):
        verify(ModelSettings("m", "llama"), directory)


def test_a_tensor_that_is_missing_is_named(checkpoint):
    directory = checkpoint("mixtral")
    change_config(directory, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"no tensor 'model\.layers\.3\."):
        verify(ModelSettings("m", "mixtral"), directory)


def test_a_tensor_of_another_shape_is_named(checkpoint):
    directory = checkpoint("llama")
    change_config(directory, intermediate_size=96)
    with pytest.raises(ValueError, match=r"is of shape \(80, 64\), but by config\.json .* \(96, 64\)"):
        verify(ModelSettings("m", "llama"), directory)


def test_an_architecture_that_is_not_served_is_named(checkpoint):
    directory = checkpoint("llama")
    change_config(directory, architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match="'MambaForCausalLM' is not supported"):
        verify(ModelSettings("m", "llama"), directory)


def test_a_context_longer_than_the_checkpoint_is_made_for_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"'m' has context_length 1000, but .* 128 tokens at most"):
        verify(ModelSettings("m", "llama", context_length=1000), checkpoint("llama"))
