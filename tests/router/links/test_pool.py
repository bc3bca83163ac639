"""The links of one process, some of which are opened in the background."""

import threading
import time

import pytest

from router.links.base import LinkLost
from router.links.pool import LinkPool


class FakeLink:
    """A link of which only the end matters."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Peers:
    """What `connect` reaches: it may be told to wait, or to fail."""

    def __init__(self) -> None:
        self.links: list[FakeLink] = []
        self.may_open = threading.Event()
        self.may_open.set()
        self.refuses = False
        self.num_tries = 0

    def connect(self, address: str) -> FakeLink:
        self.num_tries += 1
        self.may_open.wait(10)
        if self.refuses:
            raise LinkLost("nobody there")
        self.links.append(FakeLink())
        return self.links[-1]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_there_is_one_link_per_address():
    peers = Peers()
    pool = LinkPool(peers.connect)
    assert pool.get("a") is pool.get("a")
    assert pool.get("b") is not pool.get("a")


def test_a_dropped_link_is_closed_and_the_next_is_another():
    peers = Peers()
    pool = LinkPool(peers.connect)
    first = pool.get("a")
    pool.drop("a")
    assert first.is_closed
    assert pool.get("a") is not first


def test_links_that_are_not_retained_are_closed():
    peers = Peers()
    pool = LinkPool(peers.connect)
    kept, closed = pool.get("a"), pool.get("b")
    pool.retain(["a"])
    assert (kept.is_closed, closed.is_closed) == (False, True)


def test_a_prepared_link_is_open_without_waiting():
    peers = Peers()
    pool = LinkPool(peers.connect)
    peers.may_open.clear()
    pool.prepare("a")
    assert not pool.is_open("a")
    peers.may_open.set()
    wait_until(lambda: pool.is_open("a"))
    assert pool.get("a") is peers.links[0]


def test_preparing_twice_opens_once():
    peers = Peers()
    pool = LinkPool(peers.connect)
    pool.prepare("a")
    pool.prepare("a")
    wait_until(lambda: pool.is_open("a"))
    assert peers.num_tries == 1


def test_a_link_that_was_dropped_while_it_was_opened_is_closed():
    peers = Peers()
    pool = LinkPool(peers.connect)
    peers.may_open.clear()
    pool.prepare("a")
    wait_until(lambda: peers.num_tries)
    pool.drop("a")
    peers.may_open.set()
    wait_until(lambda: peers.links and peers.links[0].is_closed)
    assert not pool.is_open("a")


def test_who_can_not_wait_for_the_background_opens_another_and_one_of_them_is_kept():
    peers = Peers()
    pool = LinkPool(peers.connect)
    peers.may_open.clear()
    pool.prepare("a")
    wait_until(lambda: peers.num_tries)
    got: list[FakeLink] = []
    thread = threading.Thread(target=lambda: got.append(pool.get("a")))
    thread.start()
    wait_until(lambda: peers.num_tries == 2)
    peers.may_open.set()
    thread.join(10)
    (link,) = got
    wait_until(lambda: len(peers.links) == 2 and sum(each.is_closed for each in peers.links) == 1)
    assert not link.is_closed
    assert pool.get("a") is link


def test_a_peer_that_refuses_is_not_tried_again_at_once_and_get_says_so():
    peers = Peers()
    pool = LinkPool(peers.connect)
    peers.refuses = True
    pool.prepare("a")
    wait_until(lambda: peers.num_tries)
    pool.prepare("a")
    with pytest.raises(LinkLost, match="nobody there"):
        pool.get("a")
    assert peers.num_tries == 2
