"""Which tensors of a checkpoint belong to which process, under the names and shapes they have on disk.

An engine holds all but the experts; one slot of an expert group holds one expert of one layer. The ranks of a
tensor-parallel engine divide its matrices among them as Megatron does (Shoeybi et al. 2019): what makes
heads, inner values and logits by rows, what reads them by columns.
"""

from dataclasses import dataclass, replace
from itertools import product

from shards.checkpoint import Part, Shape
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


@dataclass(frozen=True)
class Share:
    """What one rank holds of every layer: KV heads with their query heads, inner values, logits."""

    whole: ModelConfig
    rank: int
    size: int
    kv_heads: range
    inner: range
    vocabulary: range

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> "Share":
        """Divide a model. Raises ValueError if there are fewer KV heads than ranks."""
        if size > config.num_kv_heads:
            raise ValueError(
                f"tensor_parallel is {size}, but the model has {config.num_kv_heads} KV heads, each of which "
                f"stays whole; it must be at most {config.num_kv_heads}"
            )
        # Logits are gathered, so all ranks but the last ones have equally many.
        width = -(-config.vocab_size // size)
        vocabulary = range(min(rank * width, config.vocab_size), min((rank + 1) * width, config.vocab_size))
        kv_heads, inner = (_deal(n, rank, size) for n in (config.num_kv_heads, config.intermediate_size))
        return cls(config, rank, size, kv_heads, inner, vocabulary)

    @property
    def config(self) -> ModelConfig:
        """The model as this rank's attention and feed-forward layers see it."""
        heads_per_kv_head = self.whole.num_heads // self.whole.num_kv_heads
        return replace(
            self.whole,
            num_heads=len(self.kv_heads) * heads_per_kv_head,
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
        )

    def parts(self) -> dict[str, Part]:
        """Return the part to read of each tensor of which this rank needs only a part."""
        if self.size == 1:
            return {}
        dim, whole = self.whole.head_dim, self.whole
        per_head = dim * (whole.num_heads // whole.num_kv_heads)
        query, keys, inner = _scale(self.kv_heads, per_head), _scale(self.kv_heads, dim), self.inner
        parts = {}
        for layer in range(whole.num_layers):
            attention, mlp = f"{layer_prefix(layer)}self_attn.", f"{layer_prefix(layer)}mlp."
            parts[f"{attention}q_proj.weight"] = _rows(query)
            parts[f"{attention}k_proj.weight"] = _rows(keys)
            parts[f"{attention}v_proj.weight"] = _rows(keys)
            parts[f"{attention}o_proj.weight"] = _columns(query)
            if not whole.is_sparse:
                parts[f"{mlp}gate_proj.weight"] = _rows(inner)
                parts[f"{mlp}up_proj.weight"] = _rows(inner)
                parts[f"{mlp}down_proj.weight"] = _columns(inner)
        for layer, expert in all_experts(whole):
            prefix = expert_prefix(layer, expert)
            parts[f"{prefix}w1.weight"] = _rows(inner)
            parts[f"{prefix}w3.weight"] = _rows(inner)
            parts[f"{prefix}w2.weight"] = _columns(inner)
        if not whole.tie_embeddings:
            parts["lm_head.weight"] = _rows(self.vocabulary)
        return parts


def _deal(count: int, rank: int, size: int) -> range:
    """Divide `count` things as evenly as they go; the first ranks get one more."""
    each, rest = divmod(count, size)
    start = rank * each + min(rank, rest)
    return range(start, start + each + (rank < rest))


def _scale(span: range, factor: int) -> range:
    return range(span.start * factor, span.stop * factor)


def _rows(span: range) -> Part:
    return Part(0, span.start, span.stop)


def _columns(span: range) -> Part:
    return Part(1, span.start, span.stop)
