"""Which tensors of a checkpoint belong to which process, under the names and shapes they have on disk.

An engine holds all but the experts; one slot of an expert group holds one expert of one layer.
"""

from itertools import product

from shards.checkpoint import Shape
from shards.config import ModelConfig


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expert_prefix(layer: int, expert: int) -> str:
    return f"{layer_prefix(layer)}block_sparse_moe.experts.{expert}."


def engine_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of each tensor that an engine needs: all but the experts."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        in_layer: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (heads, hidden),
            "self_attn.k_proj.weight": (kv_heads, hidden),
            "self_attn.v_proj.weight": (kv_heads, hidden),
            "self_attn.o_proj.weight": (hidden, heads),
            "post_attention_layernorm.weight": (hidden,),
        }
        if config.is_sparse:
            in_layer["block_sparse_moe.gate.weight"] = (config.num_experts, hidden)
        else:
            in_layer["mlp.gate_proj.weight"] = (inner, hidden)
            in_layer["mlp.up_proj.weight"] = (inner, hidden)
            in_layer["mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {layer_prefix(layer) + name: shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> dict[str, Shape]:
    """Return the shape of each tensor of one expert."""
    hidden, inner = config.hidden_size, config.intermediate_size
    in_expert: dict[str, Shape] = {
        "w1.weight": (inner, hidden),
        "w3.weight": (inner, hidden),
        "w2.weight": (hidden, inner),
    }
    return {expert_prefix(layer, expert) + name: shape for name, shape in in_expert.items()}


def all_experts(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return each (layer, expert) of the model, layer by layer; nothing for a dense model."""
    return tuple(product(range(config.num_layers), range(config.num_experts)))


def all_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of each tensor of the model."""
    shapes = engine_tensors(config)
    for layer, expert in all_experts(config):
        shapes |= expert_tensors(config, layer, expert)
    return shapes
