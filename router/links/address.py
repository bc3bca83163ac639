"""Where a listener can be reached."""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Address:
    """A Unix socket for processes of the same host, and a TCP port for the others.

    Its string form is `host_id@tcp_host:tcp_port/unix/path`.
    """

    host_id: str
    unix_path: str  # absolute
    tcp_host: str
    tcp_port: int

    def __str__(self) -> str:
        return f"{self.host_id}@{self.tcp_host}:{self.tcp_port}{self.unix_path}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read the string form back. Raises ValueError naming the text."""
        host_id, _, rest = text.partition("@")
        tcp, slash, path = rest.partition("/")
        tcp_host, _, port = tcp.rpartition(":")  # the last colon: an IPv6 host has colons of its own
        if not (host_id and tcp_host and port.isascii() and port.isdigit() and int(port) < 1 << 16 and path):
            raise ValueError(f"address {text!r} is not of the form host_id@tcp_host:tcp_port/unix/path")
        return cls(host_id, slash + path, tcp_host, int(port))


@cache
def this_host_id() -> str:
    """Name the set of processes that share this one's kernel and network namespace.

    Containers and network namespaces of one machine count as hosts of their own: they may share a boot id,
    and even a path, without sharing the socket behind it.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot_id}-{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux
        return socket.gethostname()
