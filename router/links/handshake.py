"""Mutual proof that both ends of a new connection know the cluster's secret.

    listener -> connector   hello: magic, version, nonce, name
    connector -> listener   hello, proof
    listener -> connector   proof

A proof is HMAC-SHA256, keyed with the secret, over the prover's role, both nonces and both names. Fresh
nonces make a recorded transcript worthless, the role makes an echoed proof worthless, and the listener
proves nothing to a peer that has not.
"""

import hmac
import secrets
import socket
import struct
import time
from typing import Literal, NamedTuple

from router.links.base import LinkLost
from router.links.wire import VERSION

DEADLINE_S = 5.0  # for the whole handshake
MAX_NAME_BYTES = 255

_HELLO = struct.Struct("<4sH32sB")  # magic, version, nonce, length of the name that follows
_MAGIC = b"TWHS"
_PROOF_BYTES = 32

Role = Literal[b"connector", b"listener"]


class _Hello(NamedTuple):
    nonce: bytes
    name: bytes

    def encode(self) -> bytes:
        return _HELLO.pack(_MAGIC, VERSION, self.nonce, len(self.name)) + self.name


def check_identity(secret: bytes, name: str) -> None:
    """Raise ValueError if a process can't introduce itself with this secret and name."""
    if not secret:
        raise ValueError(
            "the cluster's secret is empty; every process of a cluster needs the same random bytes"
        )
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES:
        raise ValueError(f"name {name!r} must have 1 to {MAX_NAME_BYTES} bytes in UTF-8")


def greet_as_listener(sock: socket.socket, secret: bytes, name: str, deadline_s: float = DEADLINE_S) -> str:
    """Check the connector's proof, then give ours; return the connector's name.

    Blocks for `deadline_s` seconds at most. Raises LinkLost; the socket is then of no more use.
    """
    deadline = time.monotonic() + deadline_s
    ours = _Hello(secrets.token_bytes(32), name.encode())
    _send(sock, ours.encode(), deadline)
    theirs = _receive_hello(sock, deadline)
    _check_proof(sock, _proof(secret, b"connector", ours, theirs), theirs, deadline)
    _send(sock, _proof(secret, b"listener", ours, theirs), deadline)
    return _text(theirs.name)


def greet_as_connector(sock: socket.socket, secret: bytes, name: str, deadline_s: float = DEADLINE_S) -> str:
    """Give our proof, then check the listener's; return the listener's name.

    Blocks for `deadline_s` seconds at most. Raises LinkLost; the socket is then of no more use.
    """
    deadline = time.monotonic() + deadline_s
    theirs = _receive_hello(sock, deadline)
    ours = _Hello(secrets.token_bytes(32), name.encode())
    _send(sock, ours.encode() + _proof(secret, b"connector", theirs, ours), deadline)
    _check_proof(sock, _proof(secret, b"listener", theirs, ours), theirs, deadline)
    return _text(theirs.name)


def _proof(secret: bytes, role: Role, listener: _Hello, connector: _Hello) -> bytes:
    # Every part has a fixed length or carries it, so no two meanings share one message.
    message = b"%d:%s" % (len(role), role) + listener.encode() + connector.encode()
    return hmac.digest(secret, message, "sha256")


def _receive_hello(sock: socket.socket, deadline: float) -> _Hello:
    magic, version, nonce, name_bytes = _HELLO.unpack(_receive(sock, _HELLO.size, deadline))
    if magic != _MAGIC:
        raise LinkLost("handshake: the peer is not a Tradewind process")
    if version != VERSION:
        raise LinkLost(f"handshake: the peer speaks version {version}, we speak version {VERSION}")
    return _Hello(nonce, _receive(sock, name_bytes, deadline))


def _check_proof(sock: socket.socket, expected: bytes, peer: _Hello, deadline: float) -> None:
    if not hmac.compare_digest(_receive(sock, _PROOF_BYTES, deadline), expected):
        raise LinkLost(f"handshake: {_text(peer.name)!r} does not know this cluster's secret")


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _send(sock: socket.socket, data: bytes, deadline: float) -> None:
    try:
        sock.settimeout(_remaining_s(deadline))
        sock.sendall(data)
    except OSError as error:
        raise LinkLost(f"handshake: {error}") from error


def _receive(sock: socket.socket, num_bytes: int, deadline: float) -> bytes:
    data = b""
    while len(data) < num_bytes:
        try:
            sock.settimeout(_remaining_s(deadline))
            piece = sock.recv(num_bytes - len(data))
        except OSError as error:
            raise LinkLost(f"handshake: {error}") from error
        if not piece:
            raise LinkLost("handshake: the peer closed the connection; do both sides have the same secret?")
        data += piece
    return data


def _remaining_s(deadline: float) -> float:
    remaining_s = deadline - time.monotonic()
    if remaining_s <= 0:
        raise TimeoutError("the peer took too long")
    return remaining_s
