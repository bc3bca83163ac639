import random
import socket
from pathlib import Path

import pytest

from cluster.local_ray import check_port_is_free, free_port


def test_a_free_port_is_free_and_stays_so():
    port = free_port()
    check_port_is_free("127.0.0.1", port)
    check_port_is_free("127.0.0.1", port)


def test_a_port_that_somebody_listens_on_is_not_free(monkeypatch):
    with socket.socket() as taken, socket.socket() as free:
        for sock in (taken, free):
            sock.bind(("", 0))
        taken.listen()
        choices = iter([taken.getsockname()[1], (left := free.getsockname()[1])])
        free.close()
        monkeypatch.setattr(random, "choice", lambda ports: next(choices))
        assert free_port() == left


EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not EPHEMERAL.exists(), reason="only Linux says which ports it gives to whoever asks")
def test_a_free_port_is_none_that_a_connection_may_take_meanwhile():
    first, last = map(int, EPHEMERAL.read_text().split())
    assert not any(first <= free_port() <= last for _ in range(200))


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on_is_refused_with_what_to_change(listens_on):
    with socket.create_server((listens_on, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=r"already in use\); choose another with --port") as refused:
            check_port_is_free("127.0.0.1", port)
    assert str(refused.value).startswith(f"cannot listen on 127.0.0.1 port {port} (")


def test_a_host_that_is_not_this_machine_is_refused():
    host = "203.0.113.7"  # nobody's: RFC 5737 keeps it for documentation
    with pytest.raises(ValueError, match=f"cannot listen on {host} port 8000"):
        check_port_is_free(host, 8000)
