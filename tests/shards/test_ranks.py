"""Several ranks compute what one does (close), and do not depend on the batch (bit for bit)."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from router.dispatch import Dispatcher, ExpertUnavailable
from router.links.address import Address
from router.links.listener import Listener
from router.links.pool import LinkPool
from router.links.stream import connect
from router.placement import Group, Placement
from shards.expert_service import ExpertService
from shards.expert_store import ExpertStore
from shards.kv_cache import BLOCK_SIZE
from shards.layers.moe import Experts
from shards.step import StepBatch
from tests.router.served_experts import even
from tests.shards.ranks import Ranks, ranks_of
from tests.shards.tiny_models import TinyModel, chunks_of, run_alone

BLOCKS = (3, 9, 4, 1)
# Two ranks divide 2 KV heads, or 3 unevenly, and 97 tokens unevenly; three ranks 80 inner values, too.
LAYOUTS = [
    ("llama", 2),
    ("llama-uneven", 2),
    ("llama-uneven", 3),
    ("llama-tied-mha", 3),
    ("mixtral", 2),
    ("mixtral-uneven", 2),
    ("mixtral-uneven", 3),
    ("mixtral-tied-window", 2),
]


@pytest.mark.parametrize(("name", "size"), LAYOUTS)
def test_ranks_compute_what_one_process_does(tiny_model, name, size):
    model = tiny_model(name)
    chunks = chunks_of(model.tokens(50), [20, 1, 28, 1], BLOCKS)
    expected = run_alone(model.shard(), chunks)
    with ranks_of(model, size) as ranks:
        check_close(run_alone(ranks, chunks), expected)


@pytest.mark.parametrize(("name", "size"), LAYOUTS)
def test_chunks_and_company_change_no_bit(tiny_model, name, size):
    model = tiny_model(name, torch.bfloat16)
    with ranks_of(model, size) as ranks:
        check_rows_are_alone(model, ranks)


def test_a_second_run_gives_the_same_bits(tiny_model):
    model = tiny_model("mixtral-uneven", torch.bfloat16)
    chunks = chunks_of(model.tokens(50), [30, 20], BLOCKS)
    logits = []
    for _ in range(2):
        with ranks_of(model, 2) as ranks:
            logits.append(run_alone(ranks, chunks))
    assert torch.equal(*logits)


def test_each_rank_caches_its_own_heads_only(tiny_model):
    with ranks_of(tiny_model("llama-uneven"), 2) as ranks:
        heads = [shard.cache.keys_BGHS[0].size(1) for shard in ranks.shards]
    assert heads == [2, 1]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_divide_the_rows_for_expert_groups(tiny_model, tmp_path, size):
    model = tiny_model("mixtral-uneven")
    chunks = chunks_of(model.tokens(50), [20, 1, 28, 1], BLOCKS)
    expected = run_alone(model.shard(), chunks)
    with expert_groups(model, tmp_path, size) as dispatchers, ranks_of(model, size, dispatchers.get) as ranks:
        check_close(run_alone(ranks, chunks), expected)
        num_rows = [int(dispatcher.take_load().sum()) for dispatcher in dispatchers.values()]
    per_token = model.config.num_layers * model.config.experts_per_token
    # Of 20, 1, 28 and 1 tokens; rank 0 has the single ones.
    assert sum(num_rows) == 50 * per_token
    assert num_rows[0] == (26 if size == 2 else 19) * per_token


def test_with_expert_groups_chunks_and_company_change_no_bit(tiny_model, tmp_path):
    model = tiny_model("mixtral-uneven", torch.bfloat16)
    with expert_groups(model, tmp_path, 2) as dispatchers, ranks_of(model, 2, dispatchers.get) as ranks:
        check_rows_are_alone(model, ranks)


@pytest.mark.parametrize("loser", [0, 1])
def test_an_expert_that_one_rank_misses_fails_the_step_on_all(tiny_model, tmp_path, loser):
    model = tiny_model("mixtral-uneven")

    with expert_groups(model, tmp_path, 2) as dispatchers:
        experts = [Losing(dispatcher, rank == loser) for rank, dispatcher in dispatchers.items()]
        with ranks_of(model, 2, experts.__getitem__) as ranks:
            step = StepBatch(tuple(chunks_of(model.tokens(20), [20], BLOCKS)))
            with pytest.raises(ExpertUnavailable, match=r"expert 3 of layer 1 .* within 7 s"):
                ranks.run(step)
            # And the next step, when the expert is back, finds all ranks in step.
            for each in experts:
                each.is_losing = False
            check_close(ranks.run(step), model.shard().run(step))


class Losing:
    """Experts of which one can't be had."""

    def __init__(self, experts: Experts, is_losing: bool) -> None:
        self._experts = experts
        self.is_losing = is_losing

    def __call__(self, layer: int, x_TD: Tensor, expert_TK: Tensor) -> Tensor:
        if self.is_losing and layer == 1:
            raise ExpertUnavailable(layer, 3, 7.0)
        return self._experts(layer, x_TD, expert_TK)


def check_close(logits: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def check_rows_are_alone(model: TinyModel, ranks: Ranks) -> None:
    """Compare three sequences, cut into chunks that share steps, with each whole and alone."""
    sequences = [model.tokens(length, seed=length) for length in (50, 7, 33)]
    blocks = [tuple(range(8 * n, 8 * n + 50 // BLOCK_SIZE + 1)) for n in range(3)]
    steps = ([20, 29, 1], [3, 3, 1], [1, 1, 31])
    alone = [
        run_alone(ranks, chunks_of(tokens, [len(tokens)], its_blocks))
        for tokens, its_blocks in zip(sequences, blocks, strict=True)
    ]
    chunks = [chunks_of(*each) for each in zip(sequences, steps, blocks, strict=True)]
    for step in range(3):
        together = ranks.run(StepBatch(tuple(mine[step] for mine in chunks)))
    assert torch.equal(together, torch.cat(alone))


@contextmanager
def expert_groups(model: TinyModel, directory: Path, num_ranks: int) -> Iterator[dict[int, Dispatcher]]:
    """Serve the model's experts from two groups; yield each rank's dispatcher, with links of its own."""
    config, groups = model.config, []
    with ExitStack() as stack:
        for index, slots in enumerate(even(config.num_layers, config.num_experts, 2)):
            store = ExpertStore.load(model.checkpoint, config, slots, lambda done, total: None)
            listener = Listener(b"ranks", f"group-{index}", directory, "127.0.0.1")
            service = ExpertService(store, listener, config.hidden_size)
            service.start()
            stack.callback(service.stop)
            groups.append(Group(f"group-{index}", str(listener.address), slots))
        dispatchers = {}
        for rank in range(num_ranks):
            links = LinkPool(lambda address: connect(Address.parse(address), b"ranks", "rank"))
            dispatchers[rank] = Dispatcher(
                FixedPlacement(tuple(groups)), links, config.num_layers, config.num_experts
            )
            stack.callback(dispatchers[rank].close)
        yield dispatchers


class FixedPlacement:
    """A placement that never changes."""

    def __init__(self, groups: tuple[Group, ...]) -> None:
        self._placement = Placement(1, groups)

    def current(self) -> Placement:
        return self._placement

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        return self._placement


@pytest.mark.parametrize("name", ["llama-uneven", "mixtral"])
def test_blocks_that_all_ranks_have_filled_go_on_in_other_ranks(tiny_model, name):
    model = tiny_model(name)
    token_ids = model.tokens(2 * BLOCK_SIZE + 3)
    with ranks_of(model, 2) as ranks, ranks_of(model, 2) as others:
        whole = run_alone(ranks, chunks_of(token_ids, [len(token_ids)], BLOCKS))
        reads = [ranks.pool.submit(shard.read_blocks, BLOCKS[:2]) for shard in ranks.shards]
        rows_BN, *same = (read.result() for read in reads)
        assert all(torch.equal(rows_BN, each) for each in same)
        sizes = ranks.shards[0].block_sizes
        for shard, part_BN in zip(others.shards, rows_BN.split(sizes, dim=1), strict=True):
            shard.write_blocks((5, 2), part_BN)
        (*_, rest) = chunks_of(token_ids, [2 * BLOCK_SIZE, 3], (5, 2, 8))
        assert torch.equal(others.run(StepBatch((rest,))), whole[-1:])
