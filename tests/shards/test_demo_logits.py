"""The decoder against Hugging Face in fp32, on the two demo checkpoints, at every position of a text."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shards.checkpoint import Checkpoint
from shards.config import ModelConfig
from shards.shard import load_shard
from shards.step import Chunk, StepBatch

TEXT = "The capital of France is Paris. Water boils at 100 degrees, but on a high mountain it boils at less."


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
            shard.run(StepBatch((Chunk((token_id,), position, (3, 1, 5, 0), True),)))
            for position, token_id in enumerate(token_ids)
        ]
    )
    # Relative to the largest logit, 39: transformers moves by 2e-4 itself if the prompt gets longer.
    assert (ours_TV - theirs_TV).abs().max() <= 1e-5 * theirs_TV.abs().max()
