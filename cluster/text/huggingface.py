"""Hugging Face's tokenizer.json, as far as its decoder is byte-level (NeMo, Llama 3, SmolLM2)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel


class HuggingFaceTokenizer:
    """A checkpoint's tokenizer.json; implements `cluster.text.base.Tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Wrap `tokenizer`. Raises ValueError if a token's bytes can't be told from the token alone."""
        if not isinstance(tokenizer.decoder, ByteLevel):
            kind = type(tokenizer.decoder).__name__
            raise ValueError(f"the decoder in tokenizer.json is {kind}; only ByteLevel is supported")
        self._tokenizer = tokenizer
        self._special_ids = {
            id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def from_checkpoint(cls, directory: Path) -> "HuggingFaceTokenizer":
        """Read tokenizer.json. Raises ValueError, naming the file, if it is missing or not supported."""
        path = directory / "tokenizer.json"
        if not path.exists():
            raise ValueError(f"{path} does not exist; the checkpoint needs it")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the package raises bare Exception for what it can't read
            raise ValueError(f"{path}: {error}") from error

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what the package makes of a str that UTF-8 can't hold
            raise ValueError("the text holds half a surrogate pair, which is no character") from None
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token is written as it reads
            return token.encode()

    def decode(self, token_ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """Return tokenizer_config.json, or {} if there is none. Raises ValueError if it is not a JSON object."""
    path = directory / "tokenizer_config.json"
    try:
        fields = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return fields


def special_tokens(directory: Path) -> dict[str, str]:
    """Return the tokens that tokenizer_config.json names: {"bos_token": "<s>", ...}."""
    found = {}
    for name, value in read_tokenizer_config(directory).items():
        if name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found[name] = content
    return found


def _bytes_by_character() -> dict[str, int]:
    """Invert the alphabet of byte-level BPE (`bytes_to_unicode` of GPT-2's encoder.py).

    Bytes that print stand for themselves; the others are numbered from U+0100 on, in their order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # Latin-1, but for blanks
    others = [byte for byte in range(256) if byte not in printing]
    characters = {chr(byte): byte for byte in printing}
    return characters | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _bytes_by_character()
