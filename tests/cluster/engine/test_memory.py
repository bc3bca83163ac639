import psutil
import pytest

from cluster.engine.memory import free_bytes, num_kv_blocks
from shards.config import ModelConfig
from shards.kv_cache import BLOCK_SIZE, block_bytes

GIB = 2**30

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=128,
    context_length=1000,
    rope_theta=10_000.0,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
)


def blocks(context_length=1000, max_running=4, kv_cache_tokens=None, fraction=0.5, free=GIB):
    return num_kv_blocks(CONFIG, context_length, max_running, kv_cache_tokens, fraction, free)


@pytest.fixture
def cgroup(tmp_path):
    """Return a function that writes a cgroup's files; its memory is free but for what is named."""

    def write(limit="max", used=0, **stat):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
        return tmp_path

    return write


def test_a_limit_leaves_what_is_not_used(cgroup):
    assert free_bytes(cgroup(2**20, used=2**18)) == 2**20 - 2**18


def test_page_cache_counts_as_free(cgroup):
    assert free_bytes(cgroup(2**20, used=2**19, anon=2**18, file=2**18)) == 2**20 - 2**18


def test_shared_memory_is_page_cache_that_does_not_count_as_free(cgroup):
    assert free_bytes(cgroup(2**20, used=2**19, anon=2**17, file=2**18, shmem=2**17)) == 2**19 + 2**17


def test_a_cgroup_above_its_limit_has_nothing_free(cgroup):
    assert free_bytes(cgroup(2**20, used=2**21)) == 0


@pytest.mark.parametrize("limit", ["max", 2**62])
def test_a_limit_above_the_machine_leaves_what_the_machine_has(cgroup, limit):
    assert 0 < free_bytes(cgroup(limit)) <= psutil.virtual_memory().total


def test_without_cgroup_files_the_machine_decides(tmp_path):
    assert 0 < free_bytes(tmp_path) <= psutil.virtual_memory().total


def test_a_block_of_keys_and_values_is_fp32_over_all_layers():
    assert block_bytes(CONFIG) == 2 * 2 * 2 * 16 * BLOCK_SIZE * 4  # layers, K and V, heads, dim, tokens, fp32


def test_the_cache_takes_its_fraction_of_the_free_memory():
    assert blocks(context_length=10, max_running=64, free=100 * block_bytes(CONFIG), fraction=0.25) == 25


def test_the_cache_takes_more_than_its_fraction_if_one_context_needs_more():
    assert blocks(context_length=10 * BLOCK_SIZE, free=10 * block_bytes(CONFIG), fraction=0.25) == 10


def test_the_cache_is_no_larger_than_all_requests_at_full_length():
    assert blocks(context_length=17, max_running=3) == 3 * 2


def test_kv_cache_tokens_decide_whatever_is_free():
    assert blocks(kv_cache_tokens=100 * BLOCK_SIZE + 1, free=0) == 100


def test_a_context_that_does_not_fit_the_free_memory_is_refused_and_never_shortened():
    with pytest.raises(ValueError, match=rf"context_length of 1000,.*\({9 * BLOCK_SIZE} would fit\)"):
        blocks(context_length=1000, free=10 * block_bytes(CONFIG) - 1)


def test_a_context_that_does_not_fit_kv_cache_tokens_is_refused_with_what_to_change():
    with pytest.raises(ValueError, match=r"raise kv_cache_tokens to 1008, or lower context_length to 992"):
        blocks(context_length=1000, kv_cache_tokens=999)
