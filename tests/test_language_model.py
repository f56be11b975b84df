"""The model as an object: scores and texts against NumPy and one request at a time, packing, bounds on compilation."""

import dataclasses
import functools
import re
import types

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from model_options import random_params, reference_logits

from trialgpt_jax import UserError
from trialgpt_jax.generation.samples import GrowingText, Options
from trialgpt_jax.language_model import LanguageModel
from trialgpt_jax.model import decode, packing, scoring
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.parallel.sharding import single_device

SMALL = {"vocab_size": 131, "block_size": 24, "n_layer": 2, "n_embd": 16}
MODELS = {
    "gpt2": {"n_head": 2},
    "7b": {
        "n_head": 4,
        "n_kv_head": 2,
        "position": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
    "modern": {
        "n_head": 2,
        "position": "rope",
        "qk_norm": True,
        "embed_norm": True,
        "logit_softcap": 1.5,
        "activation": "relu2",
    },
}


class Letters:
    """A tokenizer of the ids 0 ... 130 as characters, with 0 as end-of-text."""

    eot_id, vocab_size = 0, 131

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)

    def token_bytes(self, token_id):
        return chr(token_id).encode()


parameters = functools.cache(random_params)


pytestmark = pytest.mark.usefixtures("compiled_once")


def model(name="gpt2", dtype="float32", **changes):
    config = GPTConfig(**(SMALL | MODELS[name] | changes))
    params = parameters(dataclasses.replace(config, dtype="float64", param_dtype="float64"))
    config = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    params = jax.tree.map(lambda x: jax.device_put(x.astype(dtype)), params)
    made = LanguageModel(params, config, Letters(), single_device())
    made.shows_progress = False
    return made


def reference(model, context, continuation):
    """Sum of the log-probabilities, and whether all are the likeliest, from float64 logits of the one request."""
    ids = np.array([*context, *continuation])[-(model.block_size + 1) :]
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), model.params)
    config = dataclasses.replace(model.config, dtype="float64", param_dtype="float64")
    logits = reference_logits(params, config, ids[None, :-1])[0][-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = ids[-len(continuation) :]
    return log_probs[np.arange(len(targets)), targets].sum(), bool((logits.argmax(-1) == targets).all())


def some_requests(seed=0):
    """Multiple-choice questions, single requests of all lengths, and some that are longer than the model's context."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(0, 131, n).tolist()

    questions = [(context, draw(k)) for context in (draw(9), draw(15), draw(5)) for k in (1, 2, 4, 2)]
    return questions + [(draw(n), draw(k)) for n, k in ((1, 1), (1, 23), (20, 4), (3, 24), (60, 5), (24, 24))]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_numpy(name):
    with jax.enable_x64(True):
        lm = model(name, dtype="float64")
        requests = some_requests()
        # the likeliest continuation of a context, so that one of the answers is "greedy"
        requests += [([5, 6, 7], [int(lm.logits([5, 6, 7])[-1].argmax())])]
        got = lm.score_tokens(requests)
        want = [reference(lm, *request) for request in requests]
    np.testing.assert_allclose([score.log_prob for score in got], [w[0] for w in want], rtol=1e-10)
    assert [score.is_greedy for score in got] == [w[1] for w in want]
    assert got[-1].is_greedy and not all(score.is_greedy for score in got)


def test_float32_scores_do_not_depend_on_what_they_are_packed_with():
    lm = model()
    requests = some_requests()
    together = [score.log_prob for score in lm.score_tokens(requests)]
    alone = [lm.score_tokens([request])[0].log_prob for request in requests]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    np.testing.assert_allclose(together, [reference(lm, *r)[0] for r in requests], rtol=1e-5)


@st.composite
def request_lists(draw):
    """Requests with and without common beginnings."""
    ids = st.integers(0, 3)
    beginnings = draw(st.lists(st.lists(ids, max_size=12), min_size=1, max_size=3))
    found = []
    for _ in range(draw(st.integers(1, 12))):
        own = draw(st.lists(ids, min_size=2, max_size=10))
        whole = np.array(draw(st.sampled_from(beginnings)) + own, np.int32)
        found.append(packing.Request(whole, draw(st.integers(1, len(own) - 1))))
    return found


@settings(max_examples=200)
@given(request_lists())
def test_every_scored_id_sees_exactly_its_own_request(requests):
    """What `packed_attention` makes visible, read back from the arrays."""
    rows = packing.make_rows(requests, (8, 16, 32))
    assert [row.length for row in rows] == sorted((row.length for row in rows), reverse=True)
    seen = set()
    while rows:
        same = [row for row in rows if row.length == rows[0].length]
        batch, places = packing.fill(requests, same, len(same) + 1)
        assert batch["tokens"].shape == (len(same) + 1, same[0].length)
        assert (batch["targets"] >= 0).sum() == sum(requests[place.request].n_scored for place in places)
        for i, r, start, stop in places:
            ids, n = requests[i]
            seen.add(i)
            assert stop - start == n and batch["targets"][r, start:stop].tolist() == ids[-n:].tolist()
            for column in range(start, stop):
                tree, branch = batch["tree"][r], batch["branch"][r]
                visible = (tree == tree[column]) & ((branch == 0) | (branch == branch[column]))
                visible &= np.arange(len(tree)) <= column
                before = ids[: len(ids) - (stop - column)]
                assert batch["tokens"][r, visible].tolist() == before.tolist()
                assert batch["positions"][r, visible].tolist() == list(range(len(before)))
        rows = rows[len(same) :]
    assert seen == set(range(len(requests)))


def test_the_choices_of_a_question_compute_its_context_once():
    rng = np.random.default_rng(0)
    questions = [
        packing.Request(np.concatenate([context, rng.integers(0, 9, 21)]).astype(np.int32), 20)
        for context in rng.integers(0, 9, (50, 80))
        for _ in range(4)
    ]
    rows = packing.make_rows(questions, packing.row_lengths(1024))
    trees = [tree for row in rows for tree in row.trees]
    assert sum(tree.size for tree in trees) == 50 * (80 + 4 * 20)
    assert sum(row.length for row in rows) < 1.15 * 50 * (80 + 4 * 20)


def test_any_number_of_requests_of_any_length_takes_at_most_six_programs():
    lm = model(block_size=1024, n_layer=1)
    rng = np.random.default_rng(0)
    for count in (1, 3, 12):
        requests = [(rng.integers(0, 131, n).tolist(), [1]) for n in rng.integers(1, 1100, count)]
        lm.score_tokens(requests)
        lm.score_tokens([(context[:9], [1, 2]) for context, _ in requests])
    assert 3 <= len(lm._scorer._programs) <= 6


@pytest.mark.slow
def test_prompts_of_any_length_take_at_most_eight_programs():
    lm = model(block_size=64, n_layer=1)
    before = decode.prefill._cache_size() + decode.decode._cache_size()
    for count in (1, 2, 20):
        lm.generate(["x" * (1 + i * 61 % 70) for i in range(count)], max_new_tokens=2)
    assert 3 <= decode.prefill._cache_size() + decode.decode._cache_size() - before <= 8


def test_logits_are_computed_for_the_scored_positions_alone():
    lm = model(vocab_size=50_000)
    lm.score_tokens([([1, 2], [3]), ([4, 5], [6])])
    (program,) = lm._scorer._programs.values()
    widest = max(int(n) for n in re.findall(r"f32\[(\d+),50048\]", program.as_text()))
    assert widest == scoring.CHUNK


@pytest.mark.parametrize(
    "request_, why",
    [
        (([], [1]), "a context without tokens"),
        (([1], []), "a continuation without tokens"),
        (([1], [2] * 25), "a continuation has 25 tokens, more than model.block_size=24"),
        (([1], [131]), "ids 1 ... 131 are not all of the model's 0 ... 130"),
    ],
)
def test_requests_that_cannot_be_scored(request_, why):
    with pytest.raises(UserError, match=re.escape(why)):
        model().score_tokens([([1], [2]), request_])


def test_texts_are_split_as_lm_eval_splits_them():
    from lm_eval.api.model import TemplateLM

    lm = model()
    stub = types.SimpleNamespace(tok_encode=lm.encode, backend="causal")
    for context, continuation in (("ab c", " d"), ("ab ", "cd"), ("ab  ", " cd")):
        assert lm._encode_pair(context, continuation) == TemplateLM._encode_pair(stub, context, continuation)
    assert lm._encode_pair("", "ab") == ([0], [97, 98])
    assert lm._encode_pair("", "\0ab") == ([0], [97, 98])


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 48, 49, 100])
def test_rolling_log_probabilities_are_those_of_lm_evals_windows(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    lm = model()
    text = "".join(chr(97 + (i * i) % 26) for i in range(length))
    windows = get_rolling_token_windows(lm.encode(text), prefix_token=0, max_seq_len=24, context_len=1)
    want = sum(reference(lm, *make_disjoint_window(window))[0] for window in windows)
    np.testing.assert_allclose(lm.rolling([text, "b"])[0], want, rtol=1e-5)
    if length:
        found = lm.evaluate(text + "\x80\x80")  # the bytes of a character are counted, not its code point
        want = sum(lm.rolling([text + "\x80\x80"]))
        assert found.tokens == length + 2
        np.testing.assert_allclose(
            found, [-want / (length + 2), -want / np.log(2) / (length + 4), length + 2], rtol=1e-6
        )
        assert lm.evaluate([text, "b"]).loss == pytest.approx(-sum(lm.rolling([text, "b"])) / (length + 1))


def test_a_text_without_tokens_has_no_loss():
    with pytest.raises(UserError, match="a text without tokens has no loss"):
        model().evaluate("")


PROMPTS = ["a", "hello", "\x7f" * 7, "prompt"]  # two lengths of compiled prefills


@pytest.mark.parametrize(
    "name, sampling", [pytest.param("7b", Sampling(0.0), marks=pytest.mark.slow), ("gpt2", Sampling(0.9, top_k=40))]
)
def test_a_batch_of_prompts_continues_each_as_if_it_were_alone(name, sampling):
    lm = model(name)
    got = lm.generate(PROMPTS, max_new_tokens=12, sampling=sampling, seed=3)
    for i, prompt in enumerate(PROMPTS):
        options = Options(12, 2, sampling, seed=3)
        (samples,) = lm.samples([prompt], options, first=i)
        assert got[i] == samples[0].text == lm.tokenizer.decode(samples[0].tokens)
        assert (samples[0] != samples[1]) == (sampling.temperature > 0)


def test_a_continuation_ends_before_the_first_stop_string_and_at_end_of_text():
    lm = model()
    (whole,) = lm.generate(["hello"], max_new_tokens=12)
    assert len(whole) == 12
    assert lm.generate(["hello"], max_new_tokens=12, stop=["", whole[7:9], whole[4:6]]) == [
        whole[: whole.find(whole[4:6])]
    ]
    assert lm.generate(["hello"], max_new_tokens=12, stop=f"{whole[2]}\x01") == [whole]  # one string, not two
    lm.tokenizer.eot_id = ord(whole[3])
    (short,) = lm.generate(["hello"], max_new_tokens=12)
    assert short == whole[: whole.index(whole[3])] and len(short) < 12


STOPS = st.lists(st.text("ab:\n", max_size=3), max_size=3)


@given(st.lists(st.text("ab:\n", min_size=12, max_size=12), min_size=1, max_size=3), STOPS, st.integers(1, 12))
@example(["a\nb:aaaaaaaa"], ["b:", "\nb:"], 12)
@example(["a\nb:aaaaaaaa"], ["\nb:", "b:"], 12)
@example(["abbbbbbbbbbb"], ["abb", "b"], 12)
def test_stop_strings_are_cut_as_lm_eval_cuts_the_text_that_ends_with_the_first_of_them(texts, until, size):
    """Whatever the size of the pieces, and what is printed on the way is never taken back."""
    from lm_eval.models.utils import postprocess_generated_text

    def first_end(text):
        """The number of characters after which the text has a stop string."""
        return next((n for n in range(13) if any(stop and stop in text[:n] for stop in until)), 12)

    for text in texts:
        growing, printed = GrowingText(Letters(), Options(12, stop=until)), ""
        for start in range(0, 12, size):
            piece = text[start : start + size]
            growing.push([ord(c) for c in piece], [0.0] * len(piece))
            printed += growing.take()
            assert growing.done == (start + size >= first_end(text))
        assert growing.sample().text == printed == postprocess_generated_text(text[: first_end(text)], until, None)
        assert growing.sample().tokens == [ord(c) for c in printed]


def test_of_a_long_prompt_the_end_is_used_which_is_said_and_strict_refuses_it(capsys):
    lm = model()
    end = "x" * 12 + "hello world!"
    assert lm.generate(["x" * 50 + "hello world!"], max_new_tokens=12) == lm.generate([end], max_new_tokens=12)
    assert "the prompt has 62 tokens, more than model.block_size=24: the last 24 are used" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"2 of 3 prompts have up to 30 tokens, more than model.block_size=24"):
        lm.samples(["x" * 30, "y", "z" * 25], Options(3, strict=True))
    assert lm.generate([], max_new_tokens=3) == []
    assert len(lm.generate([""], max_new_tokens=3)) == 1


def test_a_text_streams_in_pieces_that_add_up_and_one_text_gives_one_text():
    lm = model()
    whole = lm.generate("hello", max_new_tokens=40)  # past block_size
    pieces = list(lm.generate("hello", max_new_tokens=40, stream=True))
    with pytest.raises(UserError, match="stream=True takes one text"):
        lm.generate(["hello"], stream=True)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        lm.generate("hello", max_new_tokens=0, stream=True)
    assert isinstance(whole, str) and [whole] == lm.generate(["hello"], max_new_tokens=40)
    assert "".join(pieces) == whole and len(pieces) >= 3
    stop = whole[20:22]
    assert "".join(lm.generate("hello", max_new_tokens=40, stop=stop, stream=True)) == whole[: whole.index(stop)]


def test_log_probabilities_are_those_of_score_whatever_decides_the_draw():
    lm = model()
    sampling = Sampling(0.7, top_k=9, repetition_penalty=1.3)
    ((sample,),) = lm.samples(["hello"], Options(12, sampling=sampling, logprobs=True))
    total = lm.score_tokens([(lm.encode("hello"), sample.tokens)])[0].log_prob
    np.testing.assert_allclose(sum(sample.logprobs), total, rtol=1e-5)
    assert len(sample.logprobs) == len(sample.tokens) and max(sample.logprobs) < 0
    assert lm.samples(["hello"], Options(12, sampling=sampling))[0][0] == sample._replace(logprobs=None)


def test_options_and_ids_may_be_numpys_and_mistakes_are_told():
    lm = model("modern")
    expected = lm.samples(["hello"], Options(12))
    assert lm.samples(["hello"], Options(np.int64(12), np.int32(1), seed=np.uint8(0))) == expected
    assert lm.samples([np.array(lm.encode("hello"), np.uint16)], Options(12)) == expected
    stop = expected[0][0].text[3:5]
    assert lm.samples(["hello"], Options(12, stop=stop)) == lm.samples(["hello"], Options(12, stop=[stop]))
    for prompts, options, message in (
        ("hello", Options(2), "prompts is one text"),
        (["hello"], Options(2.5), "max_new_tokens is 2.5, but must be a whole number"),
        (["hello"], Options(2, seed=2**32), "seed is 4294967296"),
        (["hello"], Options(2, sampling=Sampling(1.0, top_k=2**31)), "top_k is 2147483648"),
        (["hello"], Options(2, sampling=Sampling(1e39)), "temperature is 1e\\+39"),
        ([[1, 2**32]], Options(2), "the prompt has id 4294967296, which no model has"),
        ([[1.5]], Options(2), "a prompt is a text or a list of ids"),
        ([3], Options(2), "a prompt is a text or a list of ids"),
    ):
        with pytest.raises(UserError, match=message):
            lm.samples(prompts, options)
    with pytest.raises(UserError, match="are not all of the model's"):
        lm.score_tokens([([2**32], [5])])


def test_logits_are_those_of_numpy():
    lm = model("modern")
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), lm.params)
    config = dataclasses.replace(lm.config, dtype="float64", param_dtype="float64")
    got = lm.logits([1, 2, 3])
    assert got.shape == (3, 131) and got.dtype == np.float32
    np.testing.assert_allclose(got, reference_logits(params, config, np.array([[1, 2, 3]]))[0], atol=1e-5)
    with pytest.raises(UserError, match="logits of 25 ids: there must be 1 to model.block_size=24"):
        lm.logits(list(range(25)))
    for unknown in (-1, 131, 99999):
        with pytest.raises(UserError, match=f"logits: id {unknown} is not one of the model's, 0 ... 130"):
            lm.logits([1, unknown])
