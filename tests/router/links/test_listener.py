"""Listening and connecting, with the strangers that come along."""

import contextlib
import dataclasses
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.actors.rank import CONNECT_TIMEOUT_S
from router.links.address import Address
from router.links.base import Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.stream import StreamLink, connect

SECRET = b"one cluster's secret"


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(SECRET, "group 0", tmp_path / "sockets", "127.0.0.1", handshake_deadline_s=2)
    yield listener
    listener.close()


def elsewhere(address: Address) -> Address:
    """Return the address as another host would see it."""
    return dataclasses.replace(address, host_id="another host")


def family(link: StreamLink) -> socket.AddressFamily:
    with socket.socket(fileno=os.dup(link.fileno())) as sock:
        return sock.family


@pytest.mark.parametrize(
    ("seen_from", "expected"),
    [(lambda address: address, socket.AF_UNIX), (elsewhere, socket.AF_INET)],
    ids=["same host", "another host"],
)
def test_a_link_joins_the_two_by_the_fitting_transport(listener: Listener, seen_from, expected):
    ours = connect(seen_from(listener.address), SECRET, "engine 1")
    theirs = listener.accept(5)
    assert (ours.peer, theirs.peer) == ("group 0", "engine 1")
    assert family(ours) == family(theirs) == expected
    ours.send(Frame(Kind.TOKENS, meta=b"there"))
    theirs.send(Frame(Kind.TOKENS, meta=b"back"))
    assert (theirs.receive(5).meta, ours.receive(5).meta) == (b"there", b"back")


def test_without_the_socket_file_a_link_goes_over_tcp(listener: Listener):
    address = dataclasses.replace(listener.address, unix_path="/nowhere/at.all")
    link = connect(address, SECRET, "engine")
    assert family(link) == socket.AF_INET


def test_an_address_survives_its_journey_as_text(listener: Listener):
    assert connect(Address.parse(str(listener.address)), SECRET, "engine").peer == "group 0"


def test_a_wrong_secret_is_refused_and_logged_and_disturbs_nobody(listener: Listener, caplog):
    before = connect(listener.address, SECRET, "early")
    early = listener.accept(5)
    with pytest.raises(LinkLost, match="secret"):
        connect(listener.address, b"wrong", "mallory")
    connect(listener.address, SECRET, "late")
    assert listener.accept(5).peer == "late"
    before.send(Frame(Kind.TOKENS))
    assert early.receive(5).kind == Kind.TOKENS
    assert "'mallory' does not know this cluster's secret" in caplog.text


def test_silent_strangers_do_not_keep_others_waiting(listener: Listener):
    address = (listener.address.tcp_host, listener.address.tcp_port)
    strangers = [socket.create_connection(address) for _ in range(20)]
    connect(elsewhere(listener.address), SECRET, "engine", timeout_s=1.5)
    assert listener.accept(1).peer == "engine"
    for stranger in strangers:
        stranger.close()


def test_a_silent_stranger_is_closed_at_the_deadline(tmp_path: Path):
    listener = Listener(SECRET, "group", tmp_path, "127.0.0.1", handshake_deadline_s=0.05)
    with socket.create_connection((listener.address.tcp_host, listener.address.tcp_port), 5) as stranger:
        while stranger.recv(100):
            pass
    listener.close()


@contextlib.contextmanager
def flood_of_strangers(listener: Listener) -> Iterator[None]:
    """Have more idle connections on TCP than there are handshakes at once."""
    address = (listener.address.tcp_host, listener.address.tcp_port)
    with contextlib.ExitStack() as strangers:
        for _ in range(180):
            strangers.enter_context(socket.create_connection(address))
        yield


def test_an_engine_on_another_host_gets_its_link_in_time_in_a_flood_of_strangers(tmp_path: Path):
    with (
        contextlib.closing(Listener(SECRET, "group", tmp_path, "127.0.0.1")) as listener,
        flood_of_strangers(listener),
    ):
        assert connect(elsewhere(listener.address), SECRET, "engine", CONNECT_TIMEOUT_S).peer == "group"


def test_a_flood_of_strangers_delays_no_engine_on_this_host(tmp_path: Path):
    with (
        contextlib.closing(
            Listener(SECRET, "group", tmp_path, "127.0.0.1", handshake_deadline_s=3600)
        ) as listener,
        flood_of_strangers(listener),
    ):
        assert connect(listener.address, SECRET, "engine", CONNECT_TIMEOUT_S).peer == "group"


def test_a_listener_outlives_that_the_system_has_no_thread_for_a_handshake(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog
):
    start, refused = threading.Thread.start, []

    def start_later(thread: threading.Thread) -> None:
        if thread.name.startswith("handshake") and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_later)
    with pytest.raises(LinkLost):
        connect(listener.address, SECRET, "early")
    connect(listener.address, SECRET, "late")
    assert listener.accept(5).peer == "late"
    assert "listener 'group 0' cannot accept a connection: can't start new thread" in caplog.text


def test_a_selector_sees_that_a_link_waits(listener: Listener):
    assert select.select([listener], [], [], 0)[0] == []
    connect(listener.address, SECRET, "engine")
    assert select.select([listener], [], [], 5)[0] == [listener]
    assert listener.accept(0).peer == "engine"
    assert select.select([listener], [], [], 0)[0] == []


@pytest.mark.parametrize("timeout_s", [0, 0.01])
def test_accept_gives_up_in_time(listener: Listener, timeout_s: float):
    with pytest.raises(TimeoutError, match="group 0"):
        listener.accept(timeout_s)


def test_closing_removes_the_socket_file_and_refuses_new_links(listener: Listener):
    listener.close()
    listener.close()
    assert not Path(listener.address.unix_path).exists()
    with pytest.raises(LinkLost, match="no listener at"):
        connect(listener.address, SECRET, "engine")


def test_closing_wakes_who_waits_for_a_link(listener: Listener):
    reasons: list[str] = []

    def wait() -> None:
        try:
            listener.accept()
        except LinkLost as error:
            reasons.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    listener.close()
    thread.join(5)
    assert reasons == ["listener 'group 0' is closed"]


def test_closing_ends_links_that_nobody_accepted_but_no_others(listener: Listener):
    ours = connect(listener.address, SECRET, "accepted")
    theirs = listener.accept(5)
    orphan = connect(listener.address, SECRET, "orphan")
    assert select.select([listener], [], [], 5)[0]
    listener.close()
    with pytest.raises(LinkLost):
        orphan.receive(5)
    ours.send(Frame(Kind.TOKENS))
    assert theirs.receive(5).kind == Kind.TOKENS


def test_a_listener_bounds_the_frames_of_its_links(tmp_path: Path):
    listener = Listener(SECRET, "group", tmp_path, "127.0.0.1", max_frame_bytes=100)
    ours, theirs = connect(listener.address, SECRET, "engine"), listener.accept(5)
    ours.send(Frame(Kind.TOKENS, meta=bytes(101)))
    with pytest.raises(LinkLost, match="at most 100"):
        theirs.receive(5)
    listener.close()


def test_a_directory_too_long_for_a_unix_socket_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(ValueError, match="too long for Unix sockets: at most 85 bytes"):
        Listener(SECRET, "group", tmp_path / ("x" * 100), "127.0.0.1")


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o777])
def test_a_directory_that_others_may_enter_is_a_users_mistake(tmp_path: Path, mode: int):
    tmp_path.chmod(mode)
    with pytest.raises(ValueError, match=r"closed to all others; run chmod 700 on it"):
        Listener(SECRET, "group", tmp_path, "127.0.0.1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_directory_of_another_user_is_a_users_mistake(tmp_path: Path):
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(ValueError, match=r"\(owner 12345, mode drwx------\) must be a folder of user 0"):
        Listener(SECRET, "group", tmp_path, "127.0.0.1")


def test_a_directory_behind_a_symbolic_link_is_a_users_mistake(tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="mode lrwxrwxrwx"):
        Listener(SECRET, "group", link, "127.0.0.1")


def test_a_new_listener_removes_the_sockets_of_killed_processes_and_nothing_else(tmp_path: Path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    (tmp_path / "file.sock").touch()
    with socket.socket(socket.AF_UNIX) as starting:  # it does not listen yet
        starting.bind(str(tmp_path / "starting.sock"))
        listener = Listener(SECRET, "group", tmp_path, "127.0.0.1")
        own = Path(listener.address.unix_path).name
        assert {path.name for path in tmp_path.iterdir()} == {"file.sock", "starting.sock", own}
    listener.close()


def test_a_new_listener_disturbs_no_older_one_in_its_directory(listener: Listener, caplog):
    Listener(SECRET, "new", Path(listener.address.unix_path).parent, "127.0.0.1").close()
    assert family(connect(listener.address, SECRET, "engine")) == socket.AF_UNIX
    assert listener.accept(5).peer == "engine"
    assert caplog.text == ""


def test_the_socket_directory_is_for_its_owner_only(listener: Listener):
    assert Path(listener.address.unix_path).parent.stat().st_mode & 0o077 == 0
