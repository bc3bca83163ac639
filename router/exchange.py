"""One round of messages: a question to each of several groups, and what they answer."""

import select
import time
from collections.abc import Callable, Sequence
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


def exchange(
    batches: Sequence[Batch],
    links: LinkPool,
    y_ND: NDArray[np.float32],
    why_hopeless: Callable[[Batch, float], str | None],
) -> list[tuple[Batch, LinkLost]]:
    """Send every batch, then receive every answer into `y_ND`; return the batches that got none, and why.

    `why_hopeless(batch, waited_s)` is asked now and then while nothing arrives; its answer ends the wait. The
    links of batches without an answer are dropped: nobody may ever take a late answer for another.

    This can't deadlock, however large the frames: a group blocks on no peer, neither to read nor to write, so
    it takes in what we send even while answers to us or to others wait for their readers.
    """
    lost: list[tuple[Batch, LinkLost]] = []
    unanswered: dict[int, tuple[Batch, Link]] = {}  # by file descriptor
    poller = select.poll()
    sent_at = time.monotonic()
    try:
        for batch in batches:
            try:
                link = _send(batch, links)
            except LinkLost as error:
                lost.append((batch, error))
            else:
                unanswered[link.fileno()] = batch, link
                poller.register(link.fileno(), select.POLLIN)
        while unanswered:
            ready = [number for number, _ in poller.poll(_LOOK_S * 1000)]
            waited_s = time.monotonic() - sent_at
            for number in ready or list(unanswered):
                batch, link = unanswered[number]
                try:
                    if not ready and (reason := why_hopeless(batch, waited_s)):
                        raise LinkLost(reason)
                    answer = link.poll() if ready else None
                    if answer is None:
                        continue
                    _take(batch, answer, y_ND)
                except LinkLost as error:
                    lost.append((batch, error))
                poller.unregister(number)
                del unanswered[number]
    finally:
        for batch in [each for each, _ in lost] + [each for each, _ in unanswered.values()]:
            links.drop(batch.group.address)
    return lost


def _send(batch: Batch, links: LinkPool) -> Link:
    link = links.get(batch.group.address)
    if link.peer != batch.group.name:
        raise LinkLost(f"another process answers there: {link.peer!r}")  # it got a dead group's address
    link.send(batch.frame)
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
