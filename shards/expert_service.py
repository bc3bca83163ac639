"""The serving loop of one expert group: rows in, rows out, for every engine that has a link to it."""

import logging
import selectors
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of, rows_of
from router.links.stream import StreamLink

# N rows   D hidden

_log = logging.getLogger(__name__)


class Store(Protocol):
    """The weights behind the slots."""

    def run(self, slot: int, x_ND: Tensor, out_ND: Tensor) -> None:
        """Write to row n of `out_ND` what the slot's expert makes of row n of `x_ND`, whatever the others."""


@dataclass
class _Question:
    """A frame whose engine waits for the answer: `runs` are slots, and the rows that go through each."""

    link: StreamLink
    frame: Frame
    runs: list[tuple[int, slice]]
    x_ND: Tensor
    answer_ND: Tensor
    error: str | None = None


class ExpertService:
    """Serves all links of a listener from one thread, and computes in that thread.

    Rows that wait for the same slot at the same moment run together, whoever sent them. The loop blocks on
    no peer: frames are read and written piece by piece as their links allow, so an engine that stalls in the
    middle of a frame, or reads no answers, delays nobody else. An engine asks one question at a time on a
    link; the next one is read when the answer is out.
    """

    def __init__(
        self, store: Store, listener: Listener, slots: Sequence[tuple[int, int]], hidden_size: int
    ) -> None:
        """Serve with `slots[s]` the (layer, expert) that `store` holds in slot s. Call `start`."""
        self._store = store
        self._listener = listener
        self._slots = tuple(slots)
        self._hidden_size = hidden_size
        self._rows_per_slot = [0] * len(self._slots)
        self._links: set[StreamLink] = set()
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="expert service", daemon=True)

    @property
    def num_links(self) -> int:
        """How many engines hold a link."""
        return len(self._links)

    @property
    def rows_per_slot(self) -> tuple[int, ...]:
        """How many rows each slot has run since the start."""
        return tuple(self._rows_per_slot)

    @property
    def is_serving(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the loop's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step that runs, close the listener and every link, and wait for the thread."""
        self._wake.close()
        self._thread.join()

    def _serve(self) -> None:
        try:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._woken, selectors.EVENT_READ)
            while self._step():
                pass
        finally:
            # Also if the loop broke: engines must find nobody here, rather than wait for nobody's answer.
            self._listener.close()
            for link in self._links:
                link.close()
            self._links.clear()
            self._selector.close()
            self._woken.close()

    def _step(self) -> bool:
        """Wait until something can be done, do all of it, and return whether to go on."""
        questions = []
        for key, _ in self._selector.select():
            if key.fileobj is self._woken:
                return False
            if isinstance(key.fileobj, StreamLink):
                question = self._advance(key.fileobj, is_writing=key.events == selectors.EVENT_WRITE)
                if question is not None:
                    questions.append(question)
            else:
                self._admit()
        self._compute(questions)
        for question in questions:
            self._answer(question)
        return True

    def _admit(self) -> None:
        try:
            link = self._listener.accept(timeout_s=0)
        except LinkLost:  # the listener was closed; those who have a link keep it
            self._selector.unregister(self._listener)
            return
        self._links.add(link)
        self._selector.register(link, selectors.EVENT_READ)
        _log.info("link to %r is open", link.peer)

    def _drop(self, link: StreamLink, error: Exception) -> None:
        self._links.remove(link)
        self._selector.unregister(link)
        link.close()
        _log.info("link to %r is closed: %r", link.peer, error)

    def _advance(self, link: StreamLink, is_writing: bool) -> _Question | None:
        """Write what the link takes, or read what has arrived; return a question once it is whole."""
        try:
            if is_writing:
                if link.flush():
                    self._selector.modify(link, selectors.EVENT_READ)
                return None
            frame = link.poll()
        except (LinkLost, MemoryError) as error:  # no memory for a frame: the rest of it can't be told apart
            self._drop(link, error)
            return None
        if frame is None:
            return None
        try:
            return self._question(link, frame)
        except ValueError as error:
            self._send(link, _error(frame, str(error)))
        except Exception as error:  # torch has no memory for the answer, say
            _log.exception("a question of %r failed", link.peer)
            self._send(link, _error(frame, f"the question failed: {error!r}"))
        return None

    def _question(self, link: StreamLink, frame: Frame) -> _Question:
        """Check a frame. Raises ValueError, to be sent back, for what this group can't answer."""
        if frame.kind != Kind.ROWS:
            raise ValueError(f"an expert group answers ROWS frames, not {frame.kind.name}")
        if frame.dtype != Dtype.FLOAT32:
            raise ValueError(f"rows must be FLOAT32, not {frame.dtype.name}")
        x_ND = rows_of(frame, self._hidden_size)
        num_rows = len(x_ND)
        meta = memoryview(frame.meta)
        if meta.nbytes % 8:
            raise ValueError(f"meta must be int32 pairs (slot, number of rows); {meta.nbytes} bytes are not")
        runs, start = [], 0
        for slot, count in np.frombuffer(meta, "<i4").reshape(-1, 2).tolist():
            if not 0 <= slot < len(self._slots):
                raise ValueError(f"slot {slot} does not exist; there are {len(self._slots)}")
            if self._slots[slot][0] != frame.layer:
                raise ValueError(
                    f"slot {slot} is of layer {self._slots[slot][0]}, not of layer {frame.layer}"
                )
            if not 0 <= count <= num_rows - start:
                raise ValueError(f"slot {slot} can't have {count} of {num_rows - start} rows")
            runs.append((slot, slice(start, start + count)))
            start += count
        if start != num_rows:
            raise ValueError(f"meta gives slots to {start} rows, but there are {num_rows}")
        return _Question(link, frame, runs, x_ND, torch.empty_like(x_ND))

    def _compute(self, questions: list[_Question]) -> None:
        """Fill in the answers, slot by slot over all questions."""
        parts_of_slot: dict[int, list[tuple[_Question, slice]]] = {}
        for question in questions:
            for slot, rows in question.runs:
                parts_of_slot.setdefault(slot, []).append((question, rows))
        for slot, parts in parts_of_slot.items():
            try:
                self._run(slot, [(each.x_ND[rows], each.answer_ND[rows]) for each, rows in parts])
            except Exception as error:  # whatever it is: those who asked learn it, and the others are served
                _log.exception("slot %d failed", slot)
                for question, _ in parts:
                    question.error = f"slot {slot} {self._slots[slot]} failed: {error!r}"

    def _run(self, slot: int, parts: list[tuple[Tensor, Tensor]]) -> None:
        if len(parts) == 1:
            x_ND, out_ND = parts[0]
            self._store.run(slot, x_ND, out_ND)
        else:
            x_ND = torch.cat([x for x, _ in parts])
            out_ND = torch.empty_like(x_ND)
            self._store.run(slot, x_ND, out_ND)
            start = 0
            for _, wanted_ND in parts:
                wanted_ND.copy_(out_ND[start : start + len(wanted_ND)])
                start += len(wanted_ND)
        self._rows_per_slot[slot] += x_ND.size(0)

    def _answer(self, question: _Question) -> None:
        frame = question.frame
        if question.error is not None:
            self._send(question.link, _error(frame, question.error))
        else:
            self._send(
                question.link,
                frame_of(Kind.RESULTS, question.answer_ND, sequence=frame.sequence, layer=frame.layer),
            )

    def _send(self, link: StreamLink, frame: Frame) -> None:
        try:
            if not link.post(frame):  # it reads no further question before it has taken this answer
                self._selector.modify(link, selectors.EVENT_WRITE)
        except LinkLost as error:
            self._drop(link, error)


def _error(frame: Frame, text: str) -> Frame:
    return Frame(Kind.ERROR, frame.sequence, frame.layer, text.encode())
