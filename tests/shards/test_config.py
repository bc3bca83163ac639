"""What config.json may say, and what a person reads if it says something else."""

import json

import pytest

from shards.config import ModelConfig

FIELDS = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}


def test_an_explicit_null_means_that_the_field_is_not_set(tmp_path):
    config = read(tmp_path, head_dim=None, sliding_window=None, num_key_value_heads=None)
    assert (config.head_dim, config.sliding_window, config.num_kv_heads) == (16, None, 4)


def test_head_dim_need_not_follow_from_hidden_size(tmp_path):
    assert read(tmp_path, head_dim=32).head_dim == 32


@pytest.mark.parametrize(
    ("architecture", "window", "theta"),
    [("LlamaForCausalLM", None, 1e4), ("MistralForCausalLM", 4096, 1e4), ("MixtralForCausalLM", None, 1e6)],
)
def test_a_field_left_out_has_the_default_of_transformers(tmp_path, architecture, window, theta):
    config = read(tmp_path, architectures=[architecture])
    assert (config.sliding_window, config.rope_theta) == (window, theta)


def test_rope_theta_is_found_where_either_version_of_transformers_writes_it(tmp_path):
    assert read(tmp_path, rope_theta=5e5).rope_theta == 5e5
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5}).rope_theta == 5e5


def test_stop_tokens_of_both_files_count(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert read(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["GPT2LMHeadModel"], "'GPT2LMHeadModel' is not supported; it must be one of"),
        ("hidden_size", 0, "'hidden_size' must be a positive int, but it is 0"),
        ("hidden_size", "64", "'hidden_size' must be a positive int, but it is '64'"),
        ("num_key_value_heads", 3, "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ("head_dim", 24, "head_dim 24 must be a multiple of 16"),
        ("num_experts_per_tok", 5, "num_experts_per_tok 5 must not exceed num_local_experts 4"),
        ("sliding_window", 0, "'sliding_window' must be a positive int, but it is 0"),
        ("attention_bias", True, "attention_bias is not supported; it must be false"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope type 'yarn' is not supported"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(tmp_path, field, value, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        read(tmp_path, **{field: value})


def test_a_folder_without_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        ModelConfig.from_checkpoint(tmp_path)


def read(directory, **changes):
    (directory / "config.json").write_text(json.dumps(FIELDS | changes))
    return ModelConfig.from_checkpoint(directory)
