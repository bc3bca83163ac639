"""A double of NCCL, and of the device below it, for processes that threads play.

It moves host memory and enforces what NCCL documents but does not check. Whatever breaks a rule is a
`Violation`, raised where it happens and again by `World.check`, that names the calls on both sides:

- peers post matching operations, of the same count and type; what can never match is a deadlock
- operations of a communicator, and of a stream, run in order
- a group's calls are enqueued at its end, all at once; nobody looks for them before; both sides group alike
- memory is registered, large enough, and alive until the operation is done
- one thread at a time in a communicator; none when it is aborted, unless it hangs there
- who calls has made the communicator's device current
- one thread at a time puts kernels on a device, and does not hold up the others by a call that may block
- no two of a communicator's ranks are the same, all know its size, and nobody uses it once it is aborted
- every communicator is aborted in the end: cupy's destructor would call ncclCommDestroy, which may block

As in NCCL, a communicator opens when all ranks have come, and the first exchange in each direction blocks on
the host until the other side has called, too.
"""

from tests.router.nccl_double.communicator import DoubleCommunicator
from tests.router.nccl_double.device import DoubleDevice, DoubleNccl
from tests.router.nccl_double.errors import NcclError, Violation
from tests.router.nccl_double.world import World

__all__ = ["DoubleCommunicator", "DoubleDevice", "DoubleNccl", "NcclError", "Violation", "World"]
