"""The decoder against Hugging Face in fp32, on the two demo checkpoints, at every position of a text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.shard import load_shard
from shards.step import Chunk, StepBatch

# 89 tokens: attention folds 64 positions at a time, and the second fold must be right, too.
TEXT = (
    "The capital of France is Paris. Water boils at 100 degrees, but on a high mountain it boils at less. "
    "The trade winds blow steadily from the east, on both sides of the equator, and for centuries sailors "
    "have used them to cross the oceans. They bring rain to the islands that they reach, and leave dry land "
    "behind the mountains. A ship that waits for them in the right season needs neither oars nor coal."
)


@pytest.mark.parametrize("name", ["dense_checkpoint", "sparse_checkpoint"])
def test_logits_agree_with_transformers_on_the_demo_models(name: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(name)
    token_ids = tuple(AutoTokenizer.from_pretrained(directory)(TEXT).input_ids)
    with torch.inference_mode():
        oracle = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        theirs_TV = oracle(torch.tensor([token_ids])).logits[0]
    config = ModelConfig.from_checkpoint(directory)
    shard = load_shard(Checkpoint(directory), config, None, 8, lambda done, total: None)
    ours_TV = torch.cat(
        [
            shard.run(StepBatch((Chunk((token_id,), position, (3, 1, 5, 0, 7, 2, 6), True),)))
            for position, token_id in enumerate(token_ids)
        ]
    )
    # Relative to the largest logit, 39: ours are off by 2e-4, and transformers itself moves by 6e-5 if it
    # gets the first 60 tokens alone.
    assert (ours_TV - theirs_TV).abs().max() <= 1e-5 * theirs_TV.abs().max()
