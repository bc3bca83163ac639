"""The endpoint's greedy answers against transformers in fp32, on the very checkpoints that are served."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    client = deployment.client()
    response = client.completions.create(model=MODEL, prompt=PROMPTS, temperature=0, max_tokens=NUM_TOKENS)
    ours = [choice.text for choice in response.choices]
    assert response.usage.completion_tokens > 10 * NUM_TOKENS

    theirs = []
    tokenizer = AutoTokenizer.from_pretrained(sparse_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(sparse_checkpoint, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            answer = model.generate(**ids, max_new_tokens=NUM_TOKENS, do_sample=False)
        theirs.append(tokenizer.decode(answer[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
    assert ours == theirs
