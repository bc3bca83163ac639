import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from cluster.engine.blocks import BlockPool, block_hash, prefix_root
from shards.kv_cache import BLOCK_SIZE

NUM_BLOCKS = 6


def digests_of(token_ids):
    digests = [b""]
    for start in range(0, len(token_ids) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
        digests.append(block_hash(digests[-1], token_ids[start : start + BLOCK_SIZE]))
    return digests[1:]


def hold(pool, request_id, token_ids):
    """Do all that a request does: share what is cached, reserve, compute, publish."""
    digests = digests_of(token_ids)
    prefix = pool.find_prefix(digests[: (len(token_ids) - 1) // BLOCK_SIZE])
    assert pool.reserve(request_id, len(token_ids), prefix)
    pool.publish(request_id, len(prefix), digests[len(prefix) :])
    pool.check()
    return prefix


def tokens(*values):
    """One full block of each value."""
    return [value for value in values for _ in range(BLOCK_SIZE)]


class Pool(RuleBasedStateMachine):
    """Requests whose tokens share prefixes come, compute and go; what a block holds is tracked beside it."""

    requests = Bundle("requests")

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held = {}  # request id -> [its tokens, how many are reserved, how many are computed]
        self.content = {}  # block -> all tokens up to its end, as last computed into it
        self.num_requests = 0

    @rule(
        target=requests,
        blocks=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS),
        extra=st.integers(1, BLOCK_SIZE),
    )
    def admit(self, blocks, extra):
        token_ids = tokens(*blocks)[: (len(blocks) - 1) * BLOCK_SIZE + extra]
        prefix = self.pool.find_prefix(digests_of(token_ids))
        for index, block in enumerate(prefix):
            assert self.content[block] == token_ids[: (index + 1) * BLOCK_SIZE], "a stranger's block"
        num_free = self.pool.num_free
        num_cached = len(prefix) * BLOCK_SIZE
        request_id = f"request-{self.num_requests}"
        self.num_requests += 1
        if not self.pool.reserve(request_id, max(num_cached, 1), prefix):
            assert num_free == self.pool.num_free == 0
            return multiple()
        self.held[request_id] = [token_ids, max(num_cached, 1), num_cached]
        return request_id

    @rule(request_id=requests, num_tokens=st.integers(1, 3 * BLOCK_SIZE))
    def compute(self, request_id, num_tokens):
        token_ids, reserved, computed = self.held[request_id]
        end = min(len(token_ids), computed + num_tokens)
        before, num_free = self.pool.table(request_id), self.pool.num_free
        missing = max(0, -(-end // BLOCK_SIZE) - len(before))
        if not self.pool.reserve(request_id, end):
            assert missing > num_free
            assert (self.pool.table(request_id), self.pool.num_free) == (before, num_free)
            return
        table = self.pool.table(request_id)
        assert table[: len(before)] == before
        assert len(table) == len(before) + missing
        for index in range(computed // BLOCK_SIZE, -(-end // BLOCK_SIZE)):
            self.content[table[index]] = token_ids[: min(end, (index + 1) * BLOCK_SIZE)]
        first, last = computed // BLOCK_SIZE, end // BLOCK_SIZE
        self.pool.publish(request_id, first, digests_of(token_ids)[first:last])
        self.held[request_id] = [token_ids, max(reserved, end), end]

    @rule(blocks=st.lists(st.integers(0, 1), min_size=1, max_size=NUM_BLOCKS))
    def adopt(self, blocks):
        token_ids = tokens(*blocks)
        digests = digests_of(token_ids)
        num_free, prefix = self.pool.num_free, self.pool.find_prefix(digests)
        block = self.pool.adopt(digests)
        assert self.pool.num_free == num_free
        if block is None:
            assert self.pool.find_prefix(digests) == prefix
            return
        assert self.pool.find_prefix(digests) == (*prefix, block)
        assert self.pool.refresh(digests) == len(digests)
        self.content[block] = token_ids

    @rule(request_id=consumes(requests))
    def free(self, request_id):
        self.pool.free(request_id)
        del self.held[request_id]

    @invariant()
    def everything_is_accounted_for(self):
        self.pool.check()
        held = {block for request_id in self.held for block in self.pool.table(request_id)}
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == NUM_BLOCKS - len(held)

    @invariant()
    def what_a_request_computed_is_still_in_its_blocks(self):
        for request_id, (token_ids, _, computed) in self.held.items():
            for index, block in enumerate(self.pool.table(request_id)[: -(-computed // BLOCK_SIZE)]):
                end = min(computed, (index + 1) * BLOCK_SIZE)
                assert self.content[block][:end] == token_ids[:end]


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_hash_depends_on_every_token_and_all_before_it():
    digests = {
        block_hash(b"", tokens(1)),
        block_hash(b"", tokens(2)),
        block_hash(block_hash(b"", tokens(1)), tokens(1)),
        block_hash(block_hash(b"", tokens(2)), tokens(1)),
        block_hash(b"", [*tokens(1)[:-1], 0]),
    }
    assert len(digests) == 5


def test_prefixes_of_different_models_or_salts_have_no_digest_in_common():
    roots = {prefix_root(model, salt) for model in (b"", b"1", b"2") for salt in ("", "a", "b")}
    assert len({block_hash(root, tokens(1)) for root in roots}) == 9


def test_an_equal_prefix_is_shared_while_it_is_held():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2, 3))
    assert hold(pool, "b", tokens(1, 2, 9)) == pool.table("a")[:2]
    assert pool.num_used == 4


def test_a_prefix_stays_cached_after_its_request_is_gone():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2, 3))
    table = pool.table("a")
    pool.free("a")
    assert pool.num_used == 0
    assert hold(pool, "b", tokens(1, 2, 3, 4)) == table


def test_equal_blocks_behind_different_prefixes_are_not_shared():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2, 3))
    assert hold(pool, "b", tokens(9, 2, 3)) == ()


def test_a_block_that_is_not_full_is_not_shared():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2)[:-1])
    assert len(hold(pool, "b", tokens(1, 2, 3))) == 1


def test_a_reserved_block_is_not_shared_before_it_is_computed():
    pool = BlockPool(8)
    pool.reserve("a", 2 * BLOCK_SIZE)
    pool.free("a")
    assert pool.find_prefix(digests_of(tokens(1, 2))) == ()


def test_two_copies_of_one_prefix_do_no_harm():
    pool = BlockPool(8)
    digests = digests_of(tokens(1, 2))
    for request_id in ("a", "b"):
        pool.reserve(request_id, 2 * BLOCK_SIZE)
    for request_id in ("a", "b"):
        pool.publish(request_id, 0, digests)
        pool.check()
    assert pool.find_prefix(digests) == pool.table("a")
    pool.free("a")
    pool.free("b")
    pool.check()


def test_blocks_without_content_are_taken_before_cached_ones():
    pool = BlockPool(4)
    hold(pool, "a", tokens(1, 2))
    pool.free("a")
    pool.reserve("b", 2 * BLOCK_SIZE)
    assert len(pool.find_prefix(digests_of(tokens(1, 2)))) == 2


def test_the_least_recently_freed_prefix_is_evicted_first():
    pool = BlockPool(4)
    hold(pool, "a", tokens(1, 2))
    hold(pool, "b", tokens(3, 4))
    pool.free("a")
    pool.free("b")
    pool.reserve("c", 2 * BLOCK_SIZE)
    assert pool.find_prefix(digests_of(tokens(1, 2))) == ()
    assert len(pool.find_prefix(digests_of(tokens(3, 4)))) == 2


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = BlockPool(3)
    hold(pool, "a", tokens(1, 2, 3))
    pool.free("a")
    pool.reserve("b", BLOCK_SIZE)
    assert len(pool.find_prefix(digests_of(tokens(1, 2, 3)))) == 2


def test_a_reservation_does_not_evict_the_prefix_it_stands_on():
    pool = BlockPool(3)
    hold(pool, "a", tokens(1, 2, 3))
    pool.free("a")
    prefix = pool.find_prefix(digests_of(tokens(1, 2)))
    assert not pool.reserve("b", 4 * BLOCK_SIZE, prefix)
    pool.check()
    assert pool.reserve("b", 3 * BLOCK_SIZE, prefix)
    assert pool.table("b")[:2] == prefix
    pool.check()


def test_a_reservation_that_fails_changes_nothing():
    pool = BlockPool(2)
    pool.reserve("a", 1)
    assert not pool.reserve("a", 2 * BLOCK_SIZE + 1)
    assert len(pool.table("a")) == 1
    assert pool.num_free == 1


def test_without_prefix_caching_nothing_is_shared():
    pool = BlockPool(8, prefix_caching=False)
    hold(pool, "a", tokens(1, 2, 3))
    assert hold(pool, "b", tokens(1, 2, 3)) == ()


def adopted(pool, *values):
    """Adopt the blocks of a prefix, one after the other."""
    digests = digests_of(tokens(*values))
    blocks = [pool.adopt(digests[max(0, index - 1) : index + 1]) for index in range(len(digests))]
    pool.refresh(digests)
    pool.check()
    return blocks


def test_adopted_blocks_are_found_like_computed_ones():
    pool = BlockPool(8)
    table = adopted(pool, 1, 2, 3)
    assert pool.num_used == 0
    assert hold(pool, "a", tokens(1, 2, 3, 4)) == tuple(table)


def test_a_block_that_is_here_already_is_not_adopted():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2))
    assert adopted(pool, 1, 2, 3)[:2] == [None, None]
    assert len(pool.find_prefix(digests_of(tokens(1, 2, 3)))) == 3


def test_a_block_without_the_one_before_it_is_not_adopted():
    assert BlockPool(8).adopt(digests_of(tokens(1, 2))) is None


def test_nothing_is_adopted_where_all_blocks_are_in_use():
    pool = BlockPool(2)
    hold(pool, "a", tokens(1, 2))
    assert adopted(pool, 9) == [None]


def test_an_adopted_block_does_not_evict_the_prefix_it_stands_on():
    pool = BlockPool(3)
    hold(pool, "a", tokens(5))
    adopted(pool, 1, 2)
    assert pool.adopt(digests_of(tokens(1, 2, 3))) is None
    assert pool.refresh(digests_of(tokens(1, 2, 3))) == 2


def test_adopted_blocks_give_way_from_their_end_and_later_than_what_was_freed_before():
    pool = BlockPool(4)
    hold(pool, "a", tokens(7))
    pool.free("a")
    adopted(pool, 1, 2, 3)
    for request_id, num_left in (("b", 3), ("c", 2), ("d", 1)):
        pool.reserve(request_id, 1)
        assert len(pool.find_prefix(digests_of(tokens(1, 2, 3)))) == num_left


def test_a_prefix_is_known_as_far_as_its_blocks_are_here():
    pool = BlockPool(8)
    hold(pool, "a", tokens(1, 2))
    assert [pool.refresh(digests_of(tokens(*values))) for values in ((1, 2, 3), (1, 3), (3,))] == [2, 1, 0]


def test_without_prefix_caching_nothing_is_adopted():
    assert BlockPool(8, prefix_caching=False).adopt(digests_of(tokens(1))) is None


def test_a_lookup_asks_for_no_digest_behind_the_first_miss():
    def digests():
        yield block_hash(b"", tokens(1))
        raise AssertionError("asked too far")

    assert BlockPool(2).find_prefix(digests()) == ()


def test_freeing_an_unknown_request_does_nothing():
    pool = BlockPool(2)
    pool.free("nobody")
    pool.check()


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ValueError, match="num_blocks is 0"):
        BlockPool(0)
