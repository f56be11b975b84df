"""Continuations as text, and files of prompts that a killed command continues with the same bytes."""

import errno
import io
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trialgpt_jax import UserError
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.char_tokenizer import CharTokenizer
from trialgpt_jax.generation import prompts as prompt_files
from trialgpt_jax.generation.samples import GrowingText, Options, Sample, batches, encode_prompt, prompt_ids

GPT2 = tokenizer_lib.load("gpt2")
END = "<|endoftext|>"


@given(st.text("aé€😀\n", min_size=1, max_size=12), st.text("aé€😀\n", min_size=1, max_size=3), st.integers(1, 5))
def test_stop_strings_are_found_across_tokens_and_within_characters_of_several_tokens(text, stop, size):
    """One token per byte, so that a stop string begins and ends within characters as far as tokens go."""
    single = {GPT2.token_bytes(i): i for i in range(256)}
    ids = [single[bytes([byte])] for byte in text.encode()]
    growing, printed = GrowingText(GPT2, Options(len(ids), stop=(stop,))), ""
    for start in range(0, len(ids), size):
        growing.push(ids[start : start + size], [-1.0] * len(ids[start : start + size]))
        printed += growing.take()
    sample = growing.sample()
    assert growing.done and sample.text == printed == text.partition(stop)[0]
    assert sample.tokens == ids[: len(sample.text.encode())]


def test_tokens_of_a_sample_are_the_fewest_whose_text_begins_with_its_text():
    ids = GPT2.encode(" United States of America")
    growing = GrowingText(GPT2, Options(20, stop=("tes o",), logprobs=True))
    growing.push(ids, [-0.5, -1.0, -2.0, -4.0])
    assert growing.sample() == Sample(" United Sta", ids[:2], [-0.5, -1.0])
    unfinished = GrowingText(GPT2, Options(1))
    unfinished.push(GPT2.encode("😀")[:1], [0.0])  # a part of its four bytes
    assert unfinished.sample().text == "\ufffd" and len(unfinished.sample().tokens) == 1


def test_end_of_text_in_a_prompt_is_its_id_only_when_asked():
    prompt = f"{END}one{END}{END} two"
    ids = encode_prompt(GPT2, prompt, special_tokens=True)
    assert ids == [50256, *GPT2.encode("one"), 50256, 50256, *GPT2.encode(" two")]
    assert 50256 not in encode_prompt(GPT2, prompt) and GPT2.decode(encode_prompt(GPT2, prompt)) == prompt
    assert encode_prompt(GPT2, [1, 2], special_tokens=True) == [1, 2] and encode_prompt(GPT2, "") == []


def test_a_prompt_that_cannot_be_encoded_is_named_by_its_number():
    letters = CharTokenizer(list("abc"))
    with pytest.raises(UserError, match=r"^prompt 7: character 'x' \(U\+0078\) at position 1"):
        prompt_ids(letters, ["a", "ax"], 0, 8, Options(), first=5)
    with pytest.raises(UserError, match="special_tokens: the tokenizer char has no end-of-text"):
        prompt_ids(letters, ["a"], 0, 8, Options(special_tokens=True))


def test_batches_have_prompts_of_similar_lengths_and_all_of_them_once():
    lengths = [5, 200, 7, 180, 6, 190, 8]
    assert batches(lengths, Options(batch_size=3)) == [[1, 5, 3], [6, 2, 4], [0]]
    assert batches(lengths, Options(batch_size=7, num_samples=3)) == [[1, 5], [3, 6], [2, 4], [0]]


OPTIONS = Options(batch_size=2)  # blocks of 16 prompts
PROMPTS = [f"prompt {i}" for i in range(40)]


class Continued:
    """Stands for the model: the samples of a block depend on all of its prompts, as rounding may."""

    def __init__(self, dies_at=None):
        self.blocks, self.dies_at = [], dies_at

    def __call__(self, block, first):
        if first == self.dies_at:
            raise KeyboardInterrupt
        self.blocks.append(first)
        return [[Sample(f"{prompt} of {len(block)} é", [first, i], None)] for i, prompt in enumerate(block)]


def lines_of(path, prompts=PROMPTS, settings=(("seed", 0),), continued=None):
    continued = continued or Continued()
    with prompt_files.open_output(str(path), dict(settings)) as output:
        assert prompt_files.continue_all(prompts, output, OPTIONS, continued) == len(prompts)
    return path.read_bytes(), continued.blocks


def test_a_command_that_was_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    whole, blocks = lines_of(tmp_path / "whole.jsonl")
    assert blocks == [0, 16, 32]
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert lines[17] == {"prompt": "prompt 17", "samples": [{"text": "prompt 17 of 16 é", "tokens": [16, 1]}]}
    for size, todo in ((0, [0, 16, 32]), (100, [0, 16, 32]), (len(whole) // 2, [16, 32]), (len(whole) - 1, [32])):
        path = tmp_path / f"cut{size}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            lines_of(path, continued=Continued(dies_at=0))
        path.write_bytes(whole[:size])
        assert lines_of(path) == (whole, todo)
    assert lines_of(tmp_path / "whole.jsonl") == (whole, [])


def test_a_file_has_one_writer_and_no_lock_remains(tmp_path):
    path = tmp_path / "out.jsonl"
    message = f"--out={path} is in use by host .*, pid {os.getpid()}; stop it or choose another --out"
    with prompt_files.open_output(str(path), {"seed": 0}), pytest.raises(UserError, match=message):
        lines_of(path)
    lines_of(path)
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.settings.json"]


def test_a_link_is_followed_a_folder_refused_and_a_full_disk_named(tmp_path, monkeypatch):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    whole, _ = lines_of(tmp_path / "link.jsonl")
    assert (tmp_path / "link.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_bytes() == whole
    with pytest.raises(UserError, match="is a folder, not a file"):
        lines_of(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trialgpt_jax.storage.files.write", full)
    with pytest.raises(UserError, match="real.jsonl cannot be written because the disk is full"):
        lines_of(tmp_path / "link.jsonl")


def test_a_file_of_other_prompts_or_settings_is_refused(tmp_path):
    # follows: choose another --out
    # follows: remove the file
    path = tmp_path / "out.jsonl"
    whole, _ = lines_of(path)
    with pytest.raises(UserError, match="begun with seed=0, and this command has 1; choose another --out or remove"):
        lines_of(path, settings=[("seed", 1)])
    with pytest.raises(UserError, match="line 3 is of another prompt"):
        lines_of(path, [*PROMPTS[:2], "x", *PROMPTS[3:]])
    with pytest.raises(UserError, match="has 40 lines, but there are 30 prompts"):
        lines_of(path, PROMPTS[:30])
    path.write_bytes(whole[:200] + b"\n" + whole[200:])
    with pytest.raises(UserError, match="line 3 is not one of this command; remove the file"):
        lines_of(path)
    path.unlink()
    assert lines_of(path)[0] == whole == lines_of(tmp_path / "other.jsonl")[0]
    (tmp_path / "out.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="settings.json, which says how it was made, does not exist"):
        lines_of(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", 'has no prompts; write lines such as {"prompt": "The people"}'),
        (b'\n{"prompt": "a"}\nThe people\n', "line 3 is not JSON; a line is"),
        (b'{"prompt": 3}\n', "line 1 prompt: Expected str, got int; a line is"),
        (b'{"text": "a"}\n', "line 1 it: Object missing required field prompt; a line is"),
        (b'"a"\n', "line 1 it: Expected object, got str"),
        (b'{"prompt": "\xff"}\n', "line 1 is not JSON"),
        (b"[" * 100_000, "line 1 nested too deeply"),
    ],
)
def test_lines_that_are_no_prompts_are_named(tmp_path, text, message, monkeypatch):
    # follows: write lines such as
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(text)
    with pytest.raises(UserError) as error:
        list(prompt_files.read(str(path)))
    assert message in str(error.value)
    path.write_text('{"prompt": "The people"}')
    assert list(prompt_files.read(str(path))) == ["The people"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a", "id": 3}\n\n{"prompt": ""}')))
    assert list(prompt_files.read("-")) == ["a", ""]
