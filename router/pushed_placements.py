"""The newest placement that somebody has pushed, for dispatchers to follow."""

import threading

from router.placement import Placement


class PushedPlacements:
    """Implements the dispatcher's `Placements`. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._newest = Placement(epoch=0, groups=())

    def current(self) -> Placement:
        """Return the newest placement that has come; epoch 0 and no groups before the first."""
        return self._newest

    def wait_newer(self, epoch: int, timeout_s: float) -> Placement:
        """Wait until there is a placement newer than `epoch`; return the newest, also when time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest.epoch > epoch, timeout_s)
            return self._newest

    def push(self, placement: Placement) -> None:
        """Take in a placement, unless it is overtaken by a newer one."""
        with self._changed:
            if placement.epoch > self._newest.epoch:
                self._newest = placement
                self._changed.notify_all()
