"""What the ranks of a tensor-parallel engine do together."""

from typing import Protocol

from torch import Tensor

# T tokens   C columns of one rank   R ranks


class GroupLost(ConnectionError):
    """A rank is gone, or did not come in time; this group is closed and will not come back."""


class TensorGroup(Protocol):
    """R processes that each hold a part of every layer. All ranks make the same calls in the same order.

    A row of a result depends on the ranks' same row and on nothing else, bit for bit: not on the rows beside
    it, nor on how the transport cuts a tensor into pieces. Every call is bounded in time. They raise
    GroupLost.
    """

    @property
    def rank(self) -> int:
        """Which of the `size` processes this is, from 0."""

    @property
    def size(self) -> int:
        """How many processes there are."""

    def all_reduce(self, x_TC: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, of equal shape, added up in the order of the ranks."""

    def all_gather(self, x_TC: Tensor) -> Tensor:
        """Return the ranks' tensors, of equal shape, side by side in the order of the ranks: [T, R * C]."""

    def close(self) -> None:
        """Leave the group; the other ranks' next call raises GroupLost. Closing twice does no harm."""
