"""The newest placement, by epoch, and everyone who waits for a newer one."""

import asyncio
from contextlib import suppress

from router.placement import Group, Placement


class Epochs:
    """Numbers placements and hands them out. For one event loop.

    Epochs outlive the router that counts them: whoever asks says which epoch it has, and the next placement
    is numbered behind the highest that anybody has named. So a router that was killed and made anew needs
    no memory of its own (docs/decisions/0004-epochs-outlive-routers.md).
    """

    def __init__(self) -> None:
        self._changed = asyncio.Event()  # set and replaced at each change
        self._newest = Placement(epoch=0, groups=())
        self._highest = 0  # that any router of this model has published, as far as we were told
        self._failure: str | None = None

    @property
    def newest(self) -> Placement:
        """The placement that was published last; epoch 0 before the first."""
        return self._newest

    @property
    def highest(self) -> int:
        """The highest epoch that was published here, or that anybody has named."""
        return self._highest

    def name(self, epoch: int) -> None:
        """Take note of an epoch that somebody has."""
        self._highest = max(self._highest, epoch)

    def publish(self, groups: tuple[Group, ...]) -> None:
        """Publish these groups under a new epoch, unless they are what everyone has already.

        Takes back what `fail` has said.
        """
        self._failure = None
        if groups == self._newest.groups and self._newest.epoch >= max(self._highest, 1):
            return
        self._highest += 1
        self._newest = Placement(self._highest, groups)
        self._wake()

    def fail(self, reason: str) -> None:
        """Tell everyone who waits that no first placement will come."""
        self._failure = reason
        self._wake()

    async def after(self, epoch: int, timeout_s: float) -> Placement | None:
        """Wait for a placement newer than `epoch`; None if none comes in time. ValueError after `fail`."""
        self.name(epoch)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._failure and self._newest.epoch <= epoch:
                    await self._changed.wait()
        if self._failure:
            raise ValueError(self._failure)
        return self._newest if self._newest.epoch > epoch else None

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
