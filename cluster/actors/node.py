"""What an actor needs to know of the node it woke up on."""

import ray

from cluster.actors.socket_folder import socket_folder
from router.links.listener import Listener


def node_address() -> str:
    """Return the address that other nodes of the Ray cluster reach this one by."""
    return str(ray.util.get_node_ip_address())


def listen(secret: bytes, name: str) -> Listener:
    """Listen for links at this node's address, and on a Unix socket for its neighbours on the node."""
    return Listener(secret, name, socket_folder(), node_address())
