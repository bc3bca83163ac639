"""A Llama model in a GGUF file, under Hugging Face's names and conventions."""

# O outputs   I inputs   H heads   P pairs of a head's dimensions that RoPE turns together

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = int(gguf.TokenType.CONTROL)

_OUTER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


class GgufCheckpoint:
    """Reads one file; tensors are dequantized when asked for."""

    def __init__(self, path: Path):
        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    def _field(self, name: str) -> Any:
        return self._reader.fields[name].contents()

    @property
    def num_layers(self) -> int:
        return int(self._field("llama.block_count"))

    def outer_tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return what belongs to no layer: embeddings (they are the output matrix, too) and last norm."""
        return {name: self._dequantize(source) for name, source in _OUTER_NAMES.items()}

    def layer_tensors(self, layer: int) -> dict[str, NDArray[np.float32]]:
        """Return the tensors of one layer by their names behind `model.layers.{layer}.`."""
        tensors = {name: self._dequantize(f"blk.{layer}.{source}") for name, source in _LAYER_NAMES.items()}
        num_heads = self._field("llama.attention.head_count")
        num_kv_heads = self._field("llama.attention.head_count_kv")
        for name, heads in (
            ("self_attn.q_proj.weight", num_heads),
            ("self_attn.k_proj.weight", num_kv_heads),
        ):
            tensors[name] = rotate_half_order(tensors[name], heads)
        return tensors

    def _dequantize(self, name: str) -> NDArray[np.float32]:
        tensor = self._tensors[name]
        weight: NDArray[np.float32] = gguf.dequantize(tensor.data, tensor.tensor_type)
        return weight

    def config(self) -> dict[str, Any]:
        """Return config.json of the dense model, for weights stored in bfloat16."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._field("llama.vocab_size"),
            "hidden_size": self._field("llama.embedding_length"),
            "intermediate_size": self._field("llama.feed_forward_length"),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self._field("llama.attention.head_count"),
            "num_key_value_heads": self._field("llama.attention.head_count_kv"),
            "head_dim": self._field("llama.rope.dimension_count"),
            "hidden_act": "silu",
            "max_position_embeddings": self._field("llama.context_length"),
            "rms_norm_eps": float(
                f"{self._field('llama.attention.layer_norm_rms_epsilon'):.6g}"
            ),  # was a float32
            "rope_parameters": {"rope_type": "default", "rope_theta": self._field("llama.rope.freq_base")},
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            **self._token_ids(),
        }

    def generation_config(self) -> dict[str, Any]:
        return self._token_ids()

    def _token_ids(self) -> dict[str, int]:
        kinds = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {name: self._field(f"tokenizer.ggml.{kind}_token_id") for name, kind in kinds.items()}

    def tokenizer(self) -> Tokenizer:
        """Rebuild SmolLM2's own tokenizer.json: byte-level BPE that takes digits one by one."""
        if (pre := self._field("tokenizer.ggml.pre")) != "smollm":
            raise ValueError(f"tokenizer.ggml.pre is {pre!r}; only 'smollm' is known here")
        tokens = self._field("tokenizer.ggml.tokens")
        kinds = self._field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        tokens = self._field("tokenizer.ggml.tokens")
        kinds = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        special = {
            name: tokens[self._field(f"tokenizer.ggml.{kind}_token_id")] for name, kind in kinds.items()
        }
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            **special,
            "chat_template": self._field("tokenizer.chat_template"),
        }

    def write_json_files(self, directory: Path, config: dict[str, Any]) -> None:
        """Write everything of a Hugging Face checkpoint but the weights."""
        files = {
            "config.json": config,
            "generation_config.json": self.generation_config(),
            "tokenizer_config.json": self.tokenizer_config(),
        }
        for name, fields in files.items():
            (directory / name).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        self.tokenizer().save(str(directory / "tokenizer.json"))


def rotate_half_order(weight_OI: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Put the rows of a q or k projection into the order that Hugging Face's RoPE expects.

    llama.cpp turns neighbours (2i, 2i + 1) of a head together and stores the rows that way
    (`LlamaModel.permute` in convert_hf_to_gguf.py); Hugging Face turns (i, i + head_dim/2).
    """
    rows, inputs = weight_OI.shape
    weight_HP2I = weight_OI.reshape(num_heads, rows // num_heads // 2, 2, inputs)
    return weight_HP2I.swapaxes(1, 2).reshape(rows, inputs)
