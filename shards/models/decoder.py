"""The decoder of the Llama family: Llama, Mistral and Mixtral, which differ in their configs only.

It reads as if it ran on one device; what each of several ranks holds is in `shards/partition.py`. A rank's
attention and MLP give its share of a sum, its head some columns of the logits.

T tokens of all chunks   R rows of logits   V vocabulary   D hidden   C chunks   B blocks of a chunk
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from router.groups.base import TensorGroup
from router.groups.single import SingleRank
from shards.config import ModelConfig
from shards.kernels.cpu import PackedWeight, Spans, linear, pack
from shards.kv_cache import KVCache
from shards.layers.attention import Attention
from shards.layers.mlp import GatedMlp
from shards.layers.moe import DividedMoe, Experts, SparseMoe
from shards.layers.norm import RmsNorm
from shards.layers.rope import RopeTables
from shards.partition import Share, layer_prefix
from shards.step import StepBatch
from shards.weight_reader import WeightReader


@dataclass(frozen=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: GatedMlp | SparseMoe | DividedMoe
    mlp_group: TensorGroup  # that adds up what the ranks' `mlp` give; of one rank if each gives all

    @classmethod
    def read(
        cls,
        reader: WeightReader,
        config: ModelConfig,
        layer: int,
        experts: Experts | None,
        group: TensorGroup,
        divide_tokens: bool,
    ) -> "DecoderLayer":
        prefix = layer_prefix(layer)
        mlp: GatedMlp | SparseMoe | DividedMoe
        if experts is None:
            mlp = GatedMlp.read(reader, *(f"{prefix}mlp.{name}_proj" for name in ("gate", "up", "down")))
        else:
            gate = reader.packed(f"{prefix}block_sparse_moe.gate.weight")
            moe = SparseMoe(layer, gate, config.experts_per_token, experts)
            mlp = DividedMoe(moe, group) if divide_tokens else moe
        return cls(
            RmsNorm.read(reader, f"{prefix}input_layernorm", config.rms_norm_eps),
            Attention.read(reader, f"{prefix}self_attn.", config),
            RmsNorm.read(reader, f"{prefix}post_attention_layernorm", config.rms_norm_eps),
            mlp,
            SingleRank() if divide_tokens else group,
        )


@dataclass(frozen=True)
class Decoder:
    """Tokens in, logits out. A row of logits depends on its own sequence only, bit for bit."""

    embedding_VD: Tensor
    layers: tuple[DecoderLayer, ...]
    norm: RmsNorm
    head: PackedWeight  # of this rank's part of the vocabulary
    rope: RopeTables
    group: TensorGroup

    @classmethod
    def read(
        cls,
        reader: WeightReader,
        share: Share,
        experts: Experts | None,
        group: TensorGroup,
        divide_tokens: bool = False,
    ) -> "Decoder":
        """Read one rank's weights; `experts` is None for a dense model, and only for a dense model.

        Give `divide_tokens` if the ranks divide the tokens, and not the experts, among them.
        """
        config = share.config
        assert (experts is not None) == config.is_sparse
        embedding_VD = reader.tensor("model.embed_tokens.weight")
        tied_VD = embedding_VD[share.vocabulary.start : share.vocabulary.stop]
        return cls(
            embedding_VD,
            tuple(
                DecoderLayer.read(reader, config, layer, experts, group, divide_tokens)
                for layer in range(config.num_layers)
            ),
            RmsNorm.read(reader, "model.norm", config.rms_norm_eps),
            pack(tied_VD) if config.tie_embeddings else reader.packed("lm_head.weight"),
            RopeTables.compute(config),
            group,
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch, cache: KVCache) -> Tensor:
        """Compute the chunks' tokens, and write their keys and values to `cache`.

        Returns logits_RV, fp32: one row for each chunk that wants logits, in order, of its last token.
        """
        spans = _spans(batch)
        token_T = torch.tensor([token for chunk in batch.chunks for token in chunk.token_ids])
        x_TD = self.embedding_VD[token_T].float()
        for layer, keys, values in zip(self.layers, cache.keys_BGHS, cache.values_BGSH, strict=True):
            mixed_TD = layer.attention(layer.attention_norm(x_TD), spans, self.rope, keys, values)
            x_TD = x_TD + self.group.all_reduce(mixed_TD)
            x_TD = x_TD + layer.mlp_group.all_reduce(layer.mlp(layer.mlp_norm(x_TD)))
        last_C = spans.token_start_C1[1:].long() - 1
        x_RD = x_TD[last_C[torch.tensor([chunk.wants_logits for chunk in batch.chunks])]]
        return self._logits(x_RD)

    def _logits(self, x_RD: Tensor) -> Tensor:
        vocab_size = self.embedding_VD.size(0)
        part_RV, width = linear(self.norm(x_RD), self.head), -(-vocab_size // self.group.size)
        if part_RV.size(1) < width:  # the last rank's, if the vocabulary does not divide evenly
            part_RV = pad(part_RV, (0, width - part_RV.size(1)))
        return self.group.all_gather(part_RV)[:, :vocab_size]


def _spans(batch: StepBatch) -> Spans:
    """Describe to the kernels where each chunk's tokens are, in the batch and in the cache."""
    lengths = [len(chunk.token_ids) for chunk in batch.chunks]
    num_blocks = max(len(chunk.block_ids) for chunk in batch.chunks)
    # No block has the number -1, so the kernels would notice a chunk that has too few.
    block_table_CB = torch.full((len(batch.chunks), num_blocks), -1, dtype=torch.int32)
    for row, chunk in zip(block_table_CB, batch.chunks, strict=True):
        row[: len(chunk.block_ids)] = torch.tensor(chunk.block_ids, dtype=torch.int32)
    return Spans(
        token_start_C1=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        position_C=torch.tensor([chunk.start for chunk in batch.chunks], dtype=torch.int32),
        block_table_CB=block_table_CB,
    )
