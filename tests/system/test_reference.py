"""The endpoint's greedy answers against transformers in fp32, on the very checkpoints that are served."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.serve.openai_responses import token_name
from cluster.text.huggingface import HuggingFaceTokenizer
from tests.system.demo_deployment import MODEL, Deployment

pytestmark = pytest.mark.system

NUM_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three most important inventions of the nineteenth century were",
    "Water boils at",
    "Dear Professor Miller,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "In the beginning of the war, the two countries",
    "How to bake bread:\n1.",
    "The mitochondria of a cell",
    "Photosynthesis is the process by which",
    '"Where are you going?" she asked.',
]


def test_greedy_answers_equal_transformers_in_fp32(deployment: Deployment, sparse_checkpoint: Path) -> None:
    """Every token must be transformers' likeliest behind the prompt and the tokens before it.

    By induction that is what its greedy search would have found, at the price of one pass per prompt.
    """
    response = deployment.client().completions.create(
        model=MODEL, prompt=PROMPTS, temperature=0, max_tokens=NUM_TOKENS, logprobs=0
    )
    assert response.usage.completion_tokens > 10 * NUM_TOKENS
    tokenizer = HuggingFaceTokenizer.from_checkpoint(sparse_checkpoint)
    id_of = {token_name(id, tokenizer.token_bytes(id)): id for id in range(tokenizer.vocab_size)}
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoint, dtype=torch.float32).eval()
    for prompt, choice in zip(PROMPTS, response.choices, strict=True):
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=True)
        ours = [id_of[text] for text in choice.logprobs.tokens]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt_ids + ours[:-1]])).logits[0]
        theirs = logits[len(prompt_ids) - 1 :].argmax(-1).tolist()
        assert ours == theirs, prompt
