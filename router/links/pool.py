"""The links of one process to its peers, opened when first needed."""

import logging
import threading
import time
from collections.abc import Callable, Collection

from router.links.base import Link, LinkLost

_log = logging.getLogger(__name__)

_RETRY_S = 1.0  # before an address is tried again in the background


class LinkPool:
    """At most one link per peer, each opened by `connect`, which gets an address and may raise LinkLost.

    For one thread; only opening may go on in the background.
    """

    def __init__(self, connect: Callable[[str], Link]) -> None:
        self._connect = connect
        self._lock = threading.Lock()  # of the two below
        self._links: dict[str, Link] = {}  # by address
        self._tried_at: dict[str, float] = {}  # in the background; by address

    def get(self, address: str) -> Link:
        """Return the link to the listener at `address`, opening it if need be. Raises LinkLost."""
        link = self._links.get(address)
        if link is None:
            link = self._connect(address)
            with self._lock:
                spare, self._links[address] = self._links.get(address), link
            if spare:  # the background was faster; ours is as good
                spare.close()
        return link

    def is_open(self, address: str) -> bool:
        """Say whether `get` would return at once."""
        return address in self._links

    def prepare(self, address: str) -> None:
        """Start to open a link in the background, unless that was tried a moment ago."""
        now = time.monotonic()
        with self._lock:
            if address in self._links or now - self._tried_at.get(address, -_RETRY_S) < _RETRY_S:
                return
            self._tried_at[address] = now
        threading.Thread(target=self._open, args=(address, now), name="open-link", daemon=True).start()

    def drop(self, address: str) -> None:
        """Close the link to `address`, if there is one; the next `get` opens another."""
        with self._lock:
            link = self._links.pop(address, None)
            self._tried_at.pop(address, None)
        if link:
            link.close()

    def retain(self, addresses: Collection[str]) -> None:
        """Close every link but those to `addresses`, so that other peers know we need them no more."""
        for address in (self._links.keys() | self._tried_at.keys()) - set(addresses):
            self.drop(address)

    def close(self) -> None:
        """Close every link."""
        self.retain(())

    def _open(self, address: str, tried_at: float) -> None:
        try:
            link = self._connect(address)
        except LinkLost as error:
            _log.info("no link yet: %s", error)
            return
        with self._lock:
            # Dropped meanwhile, or opened by somebody who could not wait: this one is of no use.
            is_wanted = self._tried_at.get(address) == tried_at and address not in self._links
            if is_wanted:
                self._links[address] = link
        if not is_wanted:
            link.close()
