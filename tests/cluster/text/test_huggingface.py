import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from cluster.text.huggingface import HuggingFaceTokenizer

ODD_TEXTS = [
    "",
    "Hello, world!",
    "12345 1,000.50 0x1F ２３",
    "def f(x):\n\treturn  {'a': x ** 2}   # 平方\r\n\n\n",
    "naïve café — “quotes” … ﬁ",
    "你好，世界。こんにちは 안녕하세요",
    "🦙👩‍👩‍👧‍👦🇫🇷 👍🏽",
    "مرحبا עברית हिन्दी",
    "   leading and trailing   ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "e\u0301\u200b\ufeff\u00a0\x00\x7f",
]


@pytest.fixture(scope="module")
def tokenizer(dense_checkpoint):
    return HuggingFaceTokenizer.from_checkpoint(dense_checkpoint)


@pytest.fixture(scope="module")
def oracle(dense_checkpoint):
    return AutoTokenizer.from_pretrained(dense_checkpoint)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_ids_are_those_of_transformers(tokenizer, oracle, text):
    assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", [text for text in ODD_TEXTS if "<|" not in text])
def test_odd_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(ids=st.lists(st.integers(0, 49151), max_size=50))
def test_any_ids_decode_as_the_tokenizers_package_decodes_them(tokenizer, oracle, ids):
    assert tokenizer.decode(ids) == oracle.backend_tokenizer.decode(ids, skip_special_tokens=True)


def test_digits_are_tokens_of_their_own(tokenizer):
    assert len(tokenizer.encode("2026")) == 4


def test_special_tokens_are_one_token_and_no_text(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.encode("<|im_start|>") == [1]
    assert [tokenizer.token_bytes(id) for id in range(18)] == [b""] * 17 + [b"!"]


def test_an_id_that_names_no_token_has_no_text(tokenizer):
    assert tokenizer.vocab_size == 49152
    assert tokenizer.token_bytes(49152) == b""


def test_special_tokens_are_added_only_on_request():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "a": 1}, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = HuggingFaceTokenizer(inner)
    assert (tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=True)) == ([1], [0, 1])


def test_an_added_token_that_is_not_special_is_text():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_tokens(["<tool> €"])
    tokenizer = HuggingFaceTokenizer(inner)
    assert tokenizer.decode(tokenizer.encode("a<tool> €")) == "a<tool> €"


def test_every_byte_has_its_character():
    vocab = {character: id for id, character in enumerate(ByteLevel.alphabet())}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = HuggingFaceTokenizer(inner)
    assert {tokenizer.token_bytes(id) for id in range(256)} == {bytes([byte]) for byte in range(256)}


def test_half_a_surrogate_pair_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        tokenizer.encode("\ud83d")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        HuggingFaceTokenizer.from_checkpoint(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        HuggingFaceTokenizer.from_checkpoint(tmp_path)


def test_another_decoder_is_refused():
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    inner.decoder = tokenizers.decoders.Metaspace()
    with pytest.raises(ValueError, match=r"the decoder in tokenizer\.json is Metaspace; only ByteLevel"):
        HuggingFaceTokenizer(inner)
