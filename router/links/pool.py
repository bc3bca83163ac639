"""The links of one process to its peers, opened when first needed."""

from collections.abc import Callable, Collection

from router.links.base import Link


class LinkPool:
    """At most one link per peer, each opened by `connect`, which gets an address and may raise LinkLost."""

    def __init__(self, connect: Callable[[str], Link]) -> None:
        self._connect = connect
        self._links: dict[str, Link] = {}  # by address

    def get(self, address: str) -> Link:
        """Return the link to the listener at `address`, opening it if need be. Raises LinkLost."""
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = self._connect(address)
        return link

    def drop(self, address: str) -> None:
        """Close the link to `address`, if there is one; the next `get` opens another."""
        if link := self._links.pop(address, None):
            link.close()

    def retain(self, addresses: Collection[str]) -> None:
        """Close every link but those to `addresses`, so that other peers know we need them no more."""
        for address in self._links.keys() - set(addresses):
            self.drop(address)

    def close(self) -> None:
        """Close every link."""
        self.retain(())
