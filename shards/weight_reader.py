"""How weights come from a checkpoint into the form that the kernels want."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from shards.checkpoint import Checkpoint, Part, Shape
from shards.kernels import huge_pages
from shards.kernels.cpu import PackedWeight, pack

Progress = Callable[[int, int], None]  # bytes read, bytes to read


class WeightReader:
    """Reads one process's part of a checkpoint, tensor by tensor, and tells how far it is.

    What was read is packed and dropped before the next is read, so loading needs little more memory than
    the packed weights do.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        expected: Mapping[str, Shape],
        progress: Progress,
        pack: Callable[[Tensor], PackedWeight] = pack,
        parts: Mapping[str, Part] = MappingProxyType({}),
    ) -> None:
        """Of the tensors in `parts`, only those are read.

        Raises BrokenCheckpoint, before anything is read, if an `expected` tensor is missing or differs.
        """
        checkpoint.verify(expected)
        self._checkpoint = checkpoint
        self._progress = progress
        self._pack = pack
        self._parts = parts
        self._done_bytes = 0
        self._total_bytes = sum(self._num_bytes(name) for name in expected)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor, or the part of it that is wanted, as it is on disk."""
        tensor = self._checkpoint.tensor(name, self._parts.get(name))
        self._done_bytes += self._num_bytes(name)
        self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def vector(self, name: str) -> Tensor:
        """Read a norm's weight, as fp32."""
        return self.tensor(name).float()

    def packed(self, *names: str) -> PackedWeight:
        """Read matrices of equal width, and pack them one below the other: one product serves them all."""
        matrices = [self.tensor(name) for name in names]
        if len(matrices) == 1:
            return self._pack(matrices[0])
        rows = sum(matrix.size(0) for matrix in matrices)
        joined = huge_pages.empty((rows, matrices[0].size(1)), matrices[0].dtype)
        return self._pack(torch.cat(matrices, out=joined))

    def _num_bytes(self, name: str) -> int:
        stored, part = self._checkpoint.tensors[name], self._parts.get(name)
        if part is None:
            return stored.num_bytes
        return stored.num_bytes // stored.shape[part.axis] * (part.stop - part.start)
