"""A tensor-parallel group over NCCL, for processes that compute on GPUs.

T tokens   C columns of one rank   R ranks
"""

from torch import Tensor

from router.communicator import Communicator, CommunicatorLost
from router.device import Device
from router.groups.base import GroupLost
from router.groups.ordered import OrderedGroup


class NcclGroup(OrderedGroup):
    """Implements `TensorGroup`; for one thread.

    Every rank gathers all tensors and adds them up in the order of the ranks. NCCL's own all_reduce chooses
    its order by the size of the tensor, the channels and the topology, so a row of it would depend on the
    batch. The price: each rank receives R - 1 tensors, where a ring passes 2 (R - 1) / R on. That is the same
    for two ranks, twice as much for four and four times for eight, though in one exchange instead of two. A
    faster way that breaks the promise is not offered.

    Every call waits on the host until its result is there, so that a loss can't go unnoticed.
    """

    def __init__(
        self,
        device: Device,
        unique_id: bytes,
        rank: int,
        size: int,
        *,
        timeout_s: float = 10.0,
        meet_timeout_s: float = 60.0,
    ) -> None:
        """Wait until all ranks are there. `unique_id` is rank 0's `device.nccl.get_unique_id()`.

        Later calls take `timeout_s` seconds at most, up to a quarter more if ranks are missing. Raises
        GroupLost if not all ranks came within `meet_timeout_s`.
        """
        assert 0 <= rank < size
        assert size > 1, "SingleRank is the group of one"
        self._device = device
        self._buffer = device.empty(size)  # grows to the largest result seen
        try:
            self._communicator = Communicator(
                device,
                unique_id,
                rank,
                size,
                lambda communicator: communicator.all_gather(self._buffer),
                open_timeout_s=meet_timeout_s,
                timeout_s=timeout_s,
            )
        except CommunicatorLost as error:
            raise GroupLost(f"the group of {size} ranks did not form: {error}") from error

    @property
    def rank(self) -> int:
        return self._communicator.rank

    @property
    def size(self) -> int:
        return self._communicator.size

    def close(self) -> None:
        """Leave the group; the other ranks' next call raises GroupLost. Closing twice does no harm."""
        self._communicator.close()

    def _exchange(self, x_TC: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks, in order; valid until the next exchange."""
        try:
            self._communicator.check()
            if not x_TC.numel():
                return [x_TC] * self.size
            if self.size * x_TC.nbytes > self._buffer.nbytes:
                self._buffer = self._device.empty(self.size * x_TC.nbytes)
            flat = self._buffer[: self.size * x_TC.nbytes]
            parts = list(flat.view(x_TC.dtype).view(self.size, *x_TC.shape))
            parts[self.rank].copy_(x_TC)
            self._communicator.all_gather(flat)
            self._communicator.wait()
        except CommunicatorLost as error:
            self.close()
            raise GroupLost(f"rank {self.rank} of {self.size} has lost the group: {error}") from error
        return parts
