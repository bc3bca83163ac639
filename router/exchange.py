"""One round of messages: a question to each of several groups, and what they answer."""

import select
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.links.base import Dtype, Frame, Kind, Link, LinkLost
from router.links.pool import LinkPool
from router.placement import Group

# N rows of a layer   D hidden   S rows of a batch, in the order of sending

_LOOK_S = 0.05  # how soon a change is noticed while nothing arrives


@dataclass(frozen=True)
class Batch:
    """One group's share of a layer's rows."""

    group: Group
    rows_S: NDArray[np.int64]  # which of the layer's N rows, in sending order
    frame: Frame


@dataclass(frozen=True)
class Wait:
    """How long an exchange has lasted, for who decides whether to wait on."""

    waited_s: float  # since the questions were sent
    quiet_s: float  # since the last answer came, or, before the first, since the questions were sent
    owing: Collection[str]  # names of the groups that were asked and gave no answer, the lost ones too


def exchange(
    batches: Sequence[Batch],
    links: LinkPool,
    y_ND: NDArray[np.float32],
    why_hopeless: Callable[[Batch, Wait], str | None],
) -> list[tuple[Batch, LinkLost]]:
    """Send every batch and receive every answer into `y_ND`; return the batches that got none, and why.

    Blocks on connecting to groups without an open link, then on no single group: while one reads nothing, the
    others get their rows and give their answers. `why_hopeless` is asked about each unanswered batch, sent or
    not, every 50 ms; its answer ends the wait. The links of batches without an answer are dropped: nobody may
    ever take a late answer for another, or send what is left of a question.

    This can't deadlock, however large the frames: neither we nor a group block on a peer to read or to write.
    """
    lost: list[tuple[Batch, LinkLost]] = []
    linked: list[tuple[Batch, Link]] = []
    unanswered: dict[int, tuple[Batch, Link]] = {}  # by file descriptor
    owing = {batch.group.name for batch in batches}
    poller = select.poll()
    try:
        for batch in batches:
            try:
                linked.append((batch, _link_to(batch.group, links)))
            except LinkLost as error:
                lost.append((batch, error))
        # Only now: nobody is late because another group took long to connect to.
        sent_at = answered_at = time.monotonic()
        look_at = sent_at + _LOOK_S
        for batch, link in linked:
            try:
                is_sent = link.post(batch.frame)
            except LinkLost as error:
                lost.append((batch, error))
            else:
                unanswered[link.fileno()] = batch, link
                poller.register(link.fileno(), select.POLLIN if is_sent else select.POLLIN | select.POLLOUT)
        while unanswered:
            ready = [number for number, _ in poller.poll(_LOOK_S * 1000)]
            now = time.monotonic()
            is_look = now >= look_at
            if is_look:
                look_at = now + _LOOK_S
            for number in list(unanswered) if is_look else ready:
                batch, link = unanswered[number]
                try:
                    if link.flush():
                        poller.modify(number, select.POLLIN)
                    answer = link.poll()
                    if answer is None:
                        if not is_look:
                            continue
                        reason = why_hopeless(batch, Wait(now - sent_at, now - answered_at, owing))
                        if reason is None:
                            continue
                        raise LinkLost(reason)
                    _take(batch, answer, y_ND)
                    owing.remove(batch.group.name)
                    answered_at = now
                except LinkLost as error:
                    lost.append((batch, error))
                poller.unregister(number)
                del unanswered[number]
    finally:
        for batch in [each for each, _ in lost] + [each for each, _ in unanswered.values()]:
            links.drop(batch.group.address)
    return lost


def _link_to(group: Group, links: LinkPool) -> Link:
    link = links.get(group.address)
    if link.peer != group.name:
        raise LinkLost(f"another process answers there: {link.peer!r}")  # it got a dead group's address
    return link


def _take(batch: Batch, answer: Frame, y_ND: NDArray[np.float32]) -> None:
    """Write an answer to the rows it is for. Raises LinkLost if it doesn't answer `batch`, or by an error."""
    if answer.sequence != batch.frame.sequence:
        raise LinkLost(f"protocol: answer {answer.sequence} to question {batch.frame.sequence}")
    if answer.kind == Kind.ERROR:
        reason = bytes(answer.meta).decode(errors="replace")
        raise LinkLost(f"it reports: {reason}")
    expected = Kind.RESULTS, Dtype.FLOAT32, batch.frame.num_rows, batch.frame.rows.nbytes
    if (answer.kind, answer.dtype, answer.num_rows, answer.rows.nbytes) != expected:
        raise LinkLost(
            f"protocol: {answer.num_rows} rows of {answer.dtype.name}, {answer.rows.nbytes} bytes, in a "
            f"{answer.kind.name} frame answer {batch.frame.num_rows} rows of {batch.frame.rows.nbytes} bytes"
        )
    y_ND[batch.rows_S] = np.frombuffer(answer.rows, np.float32).reshape(len(batch.rows_S), -1)
