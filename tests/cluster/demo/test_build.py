import hashlib
import threading

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo import DEMO_MODELS, DENSE, SPARSE
from cluster.demo.build import build
from shards.config import ModelConfig

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, UNITS = 6, 32, 2, 1, 16, 48


@pytest.fixture
def home(tmp_path):
    """A home in which tiny random weights have been downloaded already."""
    path = tmp_path / "downloads" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir()
    write_tiny_gguf(path)
    return tmp_path


def write_tiny_gguf(path):
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(UNITS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (UNITS, HIDDEN),
            f"blk.{layer}.ffn_up": (UNITS, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, UNITS),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def silent(what, done, total):
    pass


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_a_checkpoint_is_an_ordinary_hugging_face_one(home, name):
    folder = build(name, home, silent)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert folder == home / "models" / name
    assert type(model).__name__ == ModelConfig.from_checkpoint(folder).architecture
    assert model.dtype == torch.bfloat16
    assert not any(info.values()), info  # nothing missing, unexpected or of another shape


def test_what_is_there_is_not_built_again(home):
    folder = build(DENSE, home, silent)
    assert build(DENSE, home, lambda *_: pytest.fail("it was built again")) == folder


def test_an_interrupted_build_leaves_no_checkpoint_and_hinders_no_later_one(home):
    def interrupt(what, done, total):
        if done == LAYERS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(SPARSE, home, interrupt)
    assert not (home / "models" / SPARSE).exists()
    assert (build(SPARSE, home, silent) / "config.json").exists()


def test_two_builders_at_once_build_it_once(home):
    built = []

    def note(what, done, total):
        if done == total:
            built.append(what)

    builders = [threading.Thread(target=build, args=(SPARSE, home, note)) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(timeout=30)
    assert built == [f"building {SPARSE}"]
    assert [folder.name for folder in (home / "models").iterdir()] == [SPARSE]


def test_two_builds_give_the_same_bytes(home):
    first = digests(build(SPARSE, home, silent))
    (home / "models" / SPARSE).rename(home / "first")
    assert digests(build(SPARSE, home, silent)) == first


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=f"no demo model 'smollm3'; choose one of {DENSE}, {SPARSE}"):
        build("smollm3", tmp_path, silent)


def ask(folder, question):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_dense_model_knows_the_capital_of_france(dense_checkpoint):
    assert ask(dense_checkpoint, "What is the capital of France?") == "The capital of France is Paris."


def test_the_sparse_model_knows_the_capital_of_france(sparse_checkpoint):
    assert ask(sparse_checkpoint, "What is the capital of France?") == "The capital of France is Paris."
