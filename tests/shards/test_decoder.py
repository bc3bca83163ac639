"""The decoder against Hugging Face (close), and against itself (bit for bit)."""

import pytest
import torch

from shards.step import Chunk, StepBatch
from tests.shards.tiny_models import MODELS, chunks_of, run_alone

BLOCKS = (3, 9, 4, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_hugging_face_at_every_position(tiny_model, name):
    model = tiny_model(name)
    tokens = model.tokens(50)
    logits = run_alone(model.shard(), chunks_of(tokens, [1] * 50, BLOCKS))
    torch.testing.assert_close(logits, model.oracle_logits(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights_compute_what_hugging_face_computes_in_fp32(tiny_model, name):
    model = tiny_model(name, torch.bfloat16)
    tokens = model.tokens(40)
    logits = run_alone(model.shard(), chunks_of(tokens, [40], BLOCKS))
    torch.testing.assert_close(logits, model.oracle_logits(tokens)[-1:], atol=1e-4, rtol=0)


def test_fp16_weights_compute_what_hugging_face_computes_in_fp32(tiny_model):
    model = tiny_model("mixtral", torch.float16)
    tokens = model.tokens(40)
    logits = run_alone(model.shard(), chunks_of(tokens, [40], BLOCKS))
    torch.testing.assert_close(logits, model.oracle_logits(tokens)[-1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_greedy_answer_equals_hugging_faces(tiny_model, name):
    model = tiny_model(name)
    shard, prompt = model.shard(), model.tokens(20)
    answer = []
    logits = run_alone(shard, chunks_of(prompt, [20], BLOCKS))
    while len(answer) < 20:
        answer.append(int(logits.argmax()))
        start = 20 + len(answer) - 1
        logits = shard.run(StepBatch((Chunk((answer[-1],), start, BLOCKS, True),)))
    expected = model.oracle().generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answer == expected[0, 20:].tolist()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunking_changes_no_bit(tiny_model, name, dtype):
    model = tiny_model(name, dtype)
    tokens = model.tokens(50)
    one_by_one = run_alone(model.shard(), chunks_of(tokens, [1] * 50, BLOCKS))
    for sizes in ([50], [17, 33], [16, 16, 18], [1, 2, 3, 5, 7, 31, 1]):
        logits = run_alone(model.shard(), chunks_of(tokens, sizes, BLOCKS))
        ends = torch.tensor(sizes).cumsum(0) - 1
        assert torch.equal(logits, one_by_one[ends]), sizes


@pytest.mark.parametrize("name", MODELS)
def test_company_in_the_batch_changes_no_bit(tiny_model, name):
    model = tiny_model(name, torch.bfloat16)
    sequences = [model.tokens(length, seed=length) for length in (50, 1, 33, 16, 7, 48)]
    steps = ([20, 1, 1, 27, 1], [1], [1, 32], [15, 1], [3, 3, 1], [1, 1, 1, 1, 44])
    blocks = [tuple(range(8 * n, 8 * n + 4)) for n in range(len(sequences))]
    chunks = [chunks_of(*each) for each in zip(sequences, steps, blocks, strict=True)]
    alone = [run_alone(model.shard(), mine) for mine in chunks]

    shard = model.shard()
    for step in range(5):
        here = [n for n, mine in enumerate(chunks) if step < len(mine)]
        logits = shard.run(StepBatch(tuple(chunks[n][step] for n in here)))
        assert torch.equal(logits, torch.stack([alone[n][step] for n in here]))


def test_the_choice_of_blocks_changes_no_bit(tiny_model):
    model = tiny_model("mixtral", torch.bfloat16)
    tokens = model.tokens(50)
    logits = run_alone(model.shard(), chunks_of(tokens, [20, 30], (3, 9, 4, 1)))
    moved = run_alone(model.shard(), chunks_of(tokens, [20, 30], (62, 0, 63, 31)))
    assert torch.equal(logits, moved)


def test_what_a_block_held_before_changes_no_bit(tiny_model):
    model = tiny_model("mixtral-tied-window", torch.bfloat16)
    shard, tokens = model.shard(), model.tokens(50)
    fresh = run_alone(shard, chunks_of(tokens, [20, 30], BLOCKS))
    for cached in (*shard.cache.keys_BGHS, *shard.cache.values_BGSH):
        cached.fill_(float("nan"))
    assert torch.equal(run_alone(shard, chunks_of(tokens, [20, 30], BLOCKS)), fresh)


def test_only_chunks_that_want_logits_get_a_row(tiny_model):
    shard = tiny_model("llama").shard()
    chunks = tuple(Chunk((5, 6 + n), 0, (n,), wants_logits=n in (1, 2)) for n in range(4))
    assert torch.equal(shard.run(StepBatch(chunks)), run_alone(shard, list(chunks[1:3])))


def test_a_step_may_want_no_logits_at_all(tiny_model):
    model = tiny_model("mixtral")
    logits = model.shard().run(StepBatch((Chunk((5, 6, 7), 0, (0,), wants_logits=False),)))
    assert logits.shape == (0, model.config.vocab_size)


def test_a_chunk_with_too_few_blocks_is_refused(tiny_model):
    shard = tiny_model("llama").shard()
    whole, short = Chunk((5,) * 20, 0, (2, 3), True), Chunk((5,) * 20, 0, (4,), True)
    with pytest.raises(ValueError, match="the blocks of chunk 1"):
        shard.run(StepBatch((whole, short)))


def test_a_position_past_the_context_is_refused(tiny_model):
    model = tiny_model("llama")
    end = model.config.context_length
    with pytest.raises(ValueError, match=f"position {end} "):
        model.shard().run(StepBatch((Chunk((5,), end, tuple(range(end // 16 + 1)), True),)))
