"""From tokens to text while they arrive, never saying what may have to be taken back."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.text.base import Tokenizer


@dataclass(frozen=True)
class TextPiece:
    """Text that is safe to show, and the stop string behind it if one was found."""

    text: str
    stop: str | None = None


class Detokenizer:
    """Follows one answer. The pieces' sum depends on the tokens only, not on how `feed` received them.

    An answer ends where a stop string is first complete; of several that end there, the longest counts.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Begin an answer. Raises ValueError for an empty stop string."""
        if "" in stop_strings:
            raise ValueError("stop holds an empty string; leave it out, or name what the answer shall end at")
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, stop_strings), default=0)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # shown to nobody yet: a stop string may begin with it
        self._stop: str | None = None

    def feed(self, token_ids: Iterable[int]) -> TextPiece:
        """Add tokens and return the text that they settle. Costs time linear in that text.

        Once a stop string was found, every later piece is empty and names it again.
        """
        return self._add(self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, token_ids))))

    def flush(self) -> TextPiece:
        """Return what was held back, because no more tokens will come."""
        piece = self._add(self._utf8.decode(b"", final=True))
        rest, self._held = self._held, ""
        return TextPiece(piece.text + rest, piece.stop)

    def _add(self, text: str) -> TextPiece:
        if self._stop is not None:
            return TextPiece("", self._stop)
        text = self._held + text
        found = [
            (start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0
        ]
        if found:
            _, start, self._stop = min(found)
            self._held = ""
            return TextPiece(text[:start], self._stop)
        safe = len(text) - self._num_held(text)
        self._held = text[safe:]
        return TextPiece(text[:safe])

    def _num_held(self, text: str) -> int:
        """Count the last characters of `text` that may be the beginning of a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0
