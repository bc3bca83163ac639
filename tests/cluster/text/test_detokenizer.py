import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.detokenizer import Detokenizer, TextPiece
from cluster.text.huggingface import HuggingFaceTokenizer


class Bytes:
    """A tokenizer whose ids are bytes; ids from 256 on are special."""

    vocab_size = 300

    def encode(self, text, add_special_tokens=False):
        return list(text.encode())

    def token_bytes(self, token_id):
        return bytes([token_id]) if token_id < 256 else b""

    def decode(self, token_ids):
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")


@pytest.fixture(scope="module")
def smollm(dense_checkpoint):
    return HuggingFaceTokenizer.from_checkpoint(dense_checkpoint)


def pieces(detokenizer, chunks):
    return [*map(detokenizer.feed, chunks), detokenizer.flush()]


def text_of(detokenizer, chunks):
    return "".join(piece.text for piece in pieces(detokenizer, chunks))


def cut(text, stop_strings):
    """The obvious way: look at every prefix of the whole text, shortest first."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


chunks_of = st.lists(st.lists(st.integers(0, 49151), max_size=5), max_size=12)


@given(chunks=chunks_of)
def test_the_pieces_of_any_tokens_make_their_text(smollm, chunks):
    assert text_of(Detokenizer(smollm), chunks) == smollm.decode(itertools.chain(*chunks))


@given(text=st.text())
def test_the_pieces_of_any_text_are_whole_characters(text):
    tokens = list(text.encode())
    shown = [piece.text for piece in pieces(Detokenizer(Bytes()), [[token] for token in tokens])]
    assert "".join(shown) == text
    assert all("\ufffd" not in piece for piece in shown) or "\ufffd" in text


@given(
    text=st.text("abcé", max_size=30),
    stop_strings=st.lists(st.text("abcé", min_size=1, max_size=5), max_size=4),
    data=st.data(),
)
def test_stop_strings_cut_as_if_the_whole_text_were_there(text, stop_strings, data):
    tokens = list(text.encode())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=8)))
    chunks = [tokens[a:b] for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
    got = pieces(Detokenizer(Bytes(), stop_strings), chunks)
    assert ("".join(piece.text for piece in got), got[-1].stop) == cut(text, stop_strings)


@given(text=st.text("abc", max_size=30), stop=st.text("abc", min_size=1, max_size=5))
def test_nothing_is_held_back_that_cannot_become_the_stop_string(text, stop):
    detokenizer, seen = Detokenizer(Bytes(), [stop]), ""
    for end, token in enumerate(text.encode(), 1):
        piece = detokenizer.feed([token])
        if piece.stop:
            break
        seen += piece.text
        held = text[len(seen) : end]
        assert stop.startswith(held)
        assert len(held) < len(stop)


def test_a_character_is_held_back_until_its_last_byte():
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.feed([byte]).text for byte in "🦙".encode()] == ["", "", "", "🦙"]


def test_half_a_character_at_the_end_is_shown_as_a_replacement():
    assert text_of(Detokenizer(Bytes()), [list("a🦙".encode())[:-1]]) == "a\ufffd"


def test_special_tokens_are_not_shown():
    assert text_of(Detokenizer(Bytes()), [[256, 97, 257, 98, 258]]) == "ab"


def test_a_stop_string_is_found_across_tokens():
    detokenizer = Detokenizer(Bytes(), ["stop"])
    assert detokenizer.feed(b"go st") == TextPiece("go ")
    assert detokenizer.feed(b"op it") == TextPiece("", "stop")


def test_what_only_began_like_a_stop_string_is_shown_later():
    detokenizer = Detokenizer(Bytes(), ["stop"])
    assert [
        detokenizer.feed(b"sto"),
        detokenizer.feed(b"ne"),
        detokenizer.feed(b" s"),
        detokenizer.flush(),
    ] == [
        TextPiece(""),
        TextPiece("stone"),
        TextPiece(" "),
        TextPiece("s"),
    ]


def test_behind_a_stop_string_nothing_more_is_shown():
    detokenizer = Detokenizer(Bytes(), ["."])
    detokenizer.feed(b"a.")
    assert [detokenizer.feed(b"b"), detokenizer.flush()] == [TextPiece("", "."), TextPiece("", ".")]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="stop holds an empty string"):
        Detokenizer(Bytes(), [""])


def test_the_text_side_imports_neither_torch_nor_ray():
    modules = "cluster.text.huggingface, cluster.text.templates, cluster.text.detokenizer"
    heavy = {"torch", "ray", "numpy", "transformers"}
    program = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"
