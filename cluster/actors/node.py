"""What an actor needs to know of the node it woke up on."""

import os
import tempfile
from pathlib import Path

import ray

from router.links.listener import Listener


def node_address() -> str:
    """Return the address that other nodes of the Ray cluster reach this one by."""
    return str(ray.util.get_node_ip_address())


def listen(secret: bytes, name: str) -> Listener:
    """Listen for links at this node's address, and on a Unix socket for its neighbours on the node."""
    directory = Path(tempfile.gettempdir()) / f"tradewind-{os.getuid()}"
    return Listener(secret, name, directory, node_address())
