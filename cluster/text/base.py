"""What the gateway asks of any kind of tokenizer."""

from collections.abc import Iterable
from typing import Protocol


class Tokenizer(Protocol):
    """Turns text into token ids and back. Safe to share between threads."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the tokens of `text`; a special token written out in it becomes that token.

        `add_special_tokens` adds what the checkpoint puts around bare text (often `bos`). A rendered chat
        template has them already. Raises ValueError if `text` holds half a surrogate pair.
        """

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to the text, perhaps ending within a character.

        Empty for special tokens and for ids that name no token.
        """

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of the tokens, with U+FFFD for bytes that are not UTF-8."""
