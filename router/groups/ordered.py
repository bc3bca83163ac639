"""What keeps the ranks' results the same, whatever carries them."""

from abc import ABC, abstractmethod
from functools import reduce

import torch
from torch import Tensor


class OrderedGroup(ABC):
    """The sums of a `TensorGroup`: every rank gets every part, and adds them up in the order of the ranks.

    So a row of a sum depends on no other row. What a transport adds up on the way, it cuts by size.
    """

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, of equal shape, added up in the order of the ranks.

        Blocks until all ranks have sent theirs. Raises GroupLost.
        """
        return reduce(torch.add, self._exchange(x_TC))

    def all_gather(self, x_TC: Tensor) -> Tensor:
        """Return the ranks' tensors, of equal shape, side by side in the order of the ranks: [T, R * C].

        Blocks until all ranks have sent theirs. Raises GroupLost.
        """
        return torch.cat(self._exchange(x_TC), dim=-1)

    @abstractmethod
    def _exchange(self, x_TC: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in order; valid until the next exchange. Raises GroupLost."""
