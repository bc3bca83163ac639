"""Which request holds which blocks of the KV cache, and which blocks can be shared."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from shards.kv_cache import BLOCK_SIZE

DIGEST_BYTES = 32


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Digest a full block together with all that stands before it; `parent` of the first is `prefix_root`.

    A cached block is trusted by its digest alone, so the digest must resist collisions: Python's `hash`
    would, sooner or later, hand one user the keys and values of another's prompt.
    """
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def prefix_root(model: bytes, cache_salt: str) -> bytes:
    """Return what stands before the first block of all that may share it: a digest.

    `model` is what keys and values depend on beside tokens, in up to 64 bytes: they travel between engines.
    """
    return blake2b(cache_salt.encode(), digest_size=DIGEST_BYTES, key=model, person=b"root").digest()


class BlockPool:
    """Hands out blocks by number, lets equal prefixes share them, and evicts the least recently used first.

    A block is either held by `num_refs` requests, or free. A published block (one with a digest) can be
    shared while it is held, and stays in the prefix cache when it becomes free, until its memory is needed.
    """

    def __init__(self, num_blocks: int, prefix_caching: bool = True):
        if num_blocks < 1:
            raise ValueError(f"num_blocks is {num_blocks}; the KV cache needs at least 1 block")
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._tables: dict[str, list[int]] = {}  # request id -> its blocks, in the order of its tokens
        self._num_refs = [0] * num_blocks
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # The first is taken next: blocks that hold nothing useful, then the least recently freed.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def table(self, request_id: str) -> tuple[int, ...]:
        """Return the blocks that the request holds, in the order of its tokens."""
        return tuple(self._tables[request_id])

    def find_prefix(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """Return the cached blocks of the longest known prefix. `digests` is read up to the first miss."""
        found: list[int] = []
        if self.prefix_caching:
            for digest in digests:
                block = self._block_of.get(digest)
                if block is None:
                    break
                found.append(block)
        return tuple(found)

    def reserve(self, request_id: str, num_tokens: int, prefix: Sequence[int] = ()) -> bool:
        """Let the request hold blocks for its first `num_tokens` tokens; change nothing if too few are free.

        `prefix`, straight from `find_prefix`, is shared by a request that holds nothing yet.
        """
        table = self._tables.get(request_id)
        assert table is None or not prefix
        num_missing = -(-num_tokens // BLOCK_SIZE) - len(prefix if table is None else table)
        num_revived = sum(self._num_refs[block] == 0 for block in prefix)
        if num_missing > len(self._free) - num_revived:
            return False

        if table is None:
            table = self._tables[request_id] = list(prefix)
            for block in prefix:
                self._free.pop(block, None)
                self._num_refs[block] += 1
        for _ in range(num_missing):
            table.append(self._take_free())
        return True

    def publish(self, request_id: str, first: int, digests: Iterable[bytes]) -> None:
        """Let others share blocks `first`, `first + 1`, ... of the request, which are full and computed."""
        if not self.prefix_caching:
            return
        for block, digest in zip(self._tables[request_id][first:], digests, strict=False):
            # Two requests may compute one prefix side by side; the second copy stays private.
            if digest not in self._block_of:
                assert block not in self._digest_of
                self._block_of[digest] = block
                self._digest_of[block] = digest

    def refresh(self, digests: Sequence[bytes]) -> int:
        """Evict these blocks of a prefix later than all others, its end first; return how many are here.

        Counts from the first on, up to one that is not here.
        """
        found = self.find_prefix(digests)
        for block in reversed(found):
            if self._num_refs[block] == 0:
                self._free.move_to_end(block)
        return len(found)

    def adopt(self, digests: Sequence[bytes]) -> int | None:
        """Take a block into the prefix cache that an equal engine has computed.

        `digests` are of the end of a prefix: of this block, of the one before it unless this is the first,
        and of any before that. Returns the number of the block that its keys and values must be written to
        before anything else is asked of this pool. None if it is not wanted: it is here already, the one
        before it is not, or nothing can be evicted but blocks of `digests`.
        """
        *prefix, digest = digests
        if not self.prefix_caching or digest in self._block_of or not self._free:
            return None
        gives_way = next(iter(self._free))
        if prefix and (prefix[-1] not in self._block_of or self._digest_of.get(gives_way) in prefix):
            return None
        block = self._take_free()
        self._num_refs[block] = 0
        self._digest_of[block], self._block_of[digest] = digest, block
        self._free[block] = None
        return block

    def free(self, request_id: str) -> None:
        """Take back what the request holds, if anything; published blocks stay in the prefix cache."""
        # Last block first: a prefix is worth more than what follows it, so it must be evicted later.
        for block in reversed(self._tables.pop(request_id, [])):
            self._num_refs[block] -= 1
            if self._num_refs[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._digest_of)

    def check(self) -> None:
        """Raise AssertionError unless every block is accounted for exactly once. For tests."""
        num_refs = [0] * self.num_blocks
        for request_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"{request_id} holds a block twice: {table}"
            for block in table:
                num_refs[block] += 1
        assert num_refs == self._num_refs, "a reference was lost or invented"
        assert {block for block, refs in enumerate(num_refs) if refs == 0} == set(self._free)
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of
        published = [block in self._digest_of for block in self._free]
        assert published == sorted(published), "a cached block would be evicted before an empty one"
        assert all(refs <= 1 for block, refs in enumerate(num_refs) if block not in self._digest_of)
        assert self.prefix_caching or not self._digest_of

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._num_refs[block] = 1
        return block
