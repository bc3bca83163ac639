"""The serving loop of one expert group: rows in, rows out for engines, and weights for other groups."""

import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from router.links.base import Dtype, Frame, Kind, LinkLost
from router.links.listener import Listener
from router.links.rows import frame_of, rows_of
from router.links.stream import StreamLink
from shards.expert_store import NotHeld
from shards.layers.mlp import GatedMlp
from shards.weights_wire import expert_of, weights_frames

# N rows   D hidden

_log = logging.getLogger(__name__)


class Store(Protocol):
    """The experts that are here now; others may fill and free slots at any moment."""

    def run(self, layer: int, runs: Sequence[tuple[int, int]], x_ND: Tensor, out_ND: Tensor) -> None:
        """Write to row n of `out_ND` what its expert makes of row n of `x_ND`, whatever the others.

        A run is an expert and how many rows go through it; they lie one after the other. Raises NotHeld, and
        has done nothing then.
        """

    def get(self, layer: int, expert: int) -> GatedMlp:
        """Return the expert's weights, for another group. Raises NotHeld."""


@dataclass
class _Question:
    """A frame whose engine waits for the answer: `runs` are experts, and how many rows go through each."""

    link: StreamLink
    frame: Frame
    runs: list[tuple[int, int]]
    x_ND: Tensor
    answer_ND: Tensor
    error: str | None = None


class ExpertService:
    """Serves all links of a listener from one thread, and computes in that thread.

    Rows that wait for the same expert at the same moment run together, whoever sent them. The loop blocks on
    no peer: frames are read and written piece by piece as their links allow, so a peer that stalls in the
    middle of a frame, or reads no answers, delays nobody else. A peer asks one question at a time on a link;
    the next one is read when the answer is out. Weights go out one frame at a time, after all rows that are
    here by then, straight from the store's memory, which they keep alive until the last has left.
    """

    def __init__(self, store: Store, listener: Listener, hidden_size: int) -> None:
        """Serve what `store` holds at each moment. Call `start`."""
        self._store = store
        self._listener = listener
        self._hidden_size = hidden_size
        self._rows_per_expert: dict[tuple[int, int], int] = {}
        self._busy_s = 0.0
        self._links: set[StreamLink] = set()
        self._weights: dict[StreamLink, Iterator[Frame]] = {}  # what is still to be sent, by whom it is for
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="expert service", daemon=True)

    @property
    def num_links(self) -> int:
        """How many engines and groups hold a link."""
        return len(self._links)

    @property
    def rows_per_expert(self) -> dict[tuple[int, int], int]:
        """How many rows each (layer, expert) has run since the start, also of those that were freed."""
        return dict(self._rows_per_expert)

    @property
    def busy_s(self) -> float:
        """How many seconds were spent on computing since the start."""
        return self._busy_s

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
            self._weights.clear()
            self._selector.close()
            self._woken.close()

    def _step(self) -> bool:
        """Wait until something can be done, do all of it, and return whether to go on."""
        questions, fetching = [], []
        for key, _ in self._selector.select():
            if key.fileobj is self._woken:
                return False
            if not isinstance(key.fileobj, StreamLink):
                self._admit()
            elif key.fileobj in self._weights:
                fetching.append(key.fileobj)
            elif key.events == selectors.EVENT_WRITE:
                self._write(key.fileobj)
            elif question := self._read(key.fileobj):
                questions.append(question)
        self._compute(questions)
        for question in questions:
            self._answer(question)
        for link in fetching:
            self._write(link)
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
        self._weights.pop(link, None)
        link.close()
        _log.info("link to %r is closed: %r", link.peer, error)

    def _write(self, link: StreamLink) -> None:
        """Write what the link takes of the frame that is under way, or the next frame of weights."""
        try:
            if not link.flush():
                return
            frame = next(self._weights.get(link, iter(())), None)
            if frame is not None:
                link.post(frame)
            else:
                self._weights.pop(link, None)
                self._selector.modify(link, selectors.EVENT_READ)
        except LinkLost as error:
            self._drop(link, error)

    def _read(self, link: StreamLink) -> _Question | None:
        """Read what has arrived; return a question once it is whole, if it is one of rows."""
        try:
            frame = link.poll()
        except LinkLost as error:
            self._drop(link, error)
            return None
        if frame is None:
            return None
        try:
            if frame.kind == Kind.FETCH:
                self._start_weights(link, frame)
                return None
            return self._question(link, frame)
        except ValueError as error:
            self._send(link, _error(frame, str(error)))
        except Exception as error:  # torch has no memory for the answer, say
            _log.exception("a question of %r failed", link.peer)
            self._send(link, _error(frame, f"the question failed: {error!r}"))
        return None

    def _start_weights(self, link: StreamLink, frame: Frame) -> None:
        """Have the weights sent that a FETCH asks for. Raises ValueError, to be sent back."""
        mlp = self._store.get(frame.layer, expert_of(frame))
        self._weights[link] = weights_frames(mlp, frame.layer, frame.sequence, link.carries_files)
        self._selector.modify(link, selectors.EVENT_WRITE)

    def _question(self, link: StreamLink, frame: Frame) -> _Question:
        """Check a frame. Raises ValueError, to be sent back, for what this group can't answer."""
        if frame.kind != Kind.ROWS:
            raise ValueError(f"an expert group answers ROWS and FETCH frames, not {frame.kind.name}")
        if frame.dtype != Dtype.FLOAT32:
            raise ValueError(f"rows must be FLOAT32, not {frame.dtype.name}")
        x_ND = rows_of(frame, self._hidden_size)
        num_rows = len(x_ND)
        meta = memoryview(frame.meta)
        if meta.nbytes % 8:
            raise ValueError(f"meta must be int32 pairs (expert, rows); {meta.nbytes} bytes are not")
        runs, left = [], num_rows
        for expert, count in np.frombuffer(meta, "<i4").reshape(-1, 2).tolist():
            if not 0 <= count <= left:
                raise ValueError(f"expert {expert} can't have {count} of {left} rows")
            runs.append((expert, count))
            left -= count
        if left:
            raise ValueError(f"meta gives experts to {num_rows - left} rows, but there are {num_rows}")
        return _Question(link, frame, runs, x_ND, torch.empty_like(x_ND))

    def _compute(self, questions: list[_Question]) -> None:
        """Fill in the answers, those of a layer together."""
        started_s = time.perf_counter()
        by_layer: dict[int, list[_Question]] = {}
        for question in questions:
            by_layer.setdefault(question.frame.layer, []).append(question)
        for layer, asked in by_layer.items():
            left = asked
            while left:
                try:
                    self._run(layer, left)
                    break
                except NotHeld as error:
                    left = _fail(left, error)
                except Exception as error:  # whatever it is: those who asked learn it, and we serve on
                    _log.exception("layer %d failed", layer)
                    for question in left:
                        question.error = f"layer {layer} failed: {error!r}"
                    break
        if questions:
            self._busy_s += time.perf_counter() - started_s

    def _run(self, layer: int, questions: list[_Question]) -> None:
        """Answer questions about one layer. Raises NotHeld, and has answered none then."""
        if len(questions) == 1:
            (question,) = questions
            runs = question.runs
            self._store.run(layer, runs, question.x_ND, question.answer_ND)
        else:
            parts: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by expert: rows, and where their answers go
            for question in questions:
                counts = [count for _, count in question.runs]
                x_parts = torch.split(question.x_ND, counts)
                answers = torch.split(question.answer_ND, counts)
                for (expert, _), x_ND, answer_ND in zip(question.runs, x_parts, answers, strict=True):
                    parts.setdefault(expert, []).append((x_ND, answer_ND))
            runs = [(expert, sum(len(x_ND) for x_ND, _ in its)) for expert, its in parts.items()]
            x_ND = torch.cat([x_ND for its in parts.values() for x_ND, _ in its])
            out_ND = torch.empty_like(x_ND)
            self._store.run(layer, runs, x_ND, out_ND)
            wanted = [answer_ND for its in parts.values() for _, answer_ND in its]
            results = torch.split(out_ND, [len(answer_ND) for answer_ND in wanted])
            for answer_ND, result_ND in zip(wanted, results, strict=True):
                answer_ND.copy_(result_ND)
        for expert, count in runs:
            key = layer, expert
            self._rows_per_expert[key] = self._rows_per_expert.get(key, 0) + count

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


def _fail(questions: list[_Question], error: NotHeld) -> list[_Question]:
    """Let the questions for an expert that is not held fail; return the others."""
    left = []
    for question in questions:
        if any(expert == error.expert for expert, _ in question.runs):
            question.error = str(error)
        else:
            left.append(question)
    return left


def _error(frame: Frame, text: str) -> Frame:
    return Frame(Kind.ERROR, frame.sequence, frame.layer, text.encode())
