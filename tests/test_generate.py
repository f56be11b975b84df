"""Cached decoding matches the uncached forward pass; greedy decoding, sampling, top-k and top-p match numpy."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_options import configs, random_params, reference_logits

from trialgpt_jax import UserError
from trialgpt_jax.model import decode
from trialgpt_jax.model import generate as generate_lib
from trialgpt_jax.model import sampling as sampling_lib
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import compile_decode, keep_ids, split_layers
from trialgpt_jax.model.generate import generate
from trialgpt_jax.model.gpt import GPT, logits
from trialgpt_jax.model.sampling import Draw, Sampling
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training.program import params_layout

CONFIG = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(scope="module")
def params():
    return split_layers(random_params(CONFIG), CONFIG)


def produce(params, config=CONFIG, prompt=(3, 1, 4), **options):
    """All new tokens, int32 [num_samples, n]."""
    pieces = generate(params, config, [prompt], **({"max_new_tokens": 10} | options))
    return np.concatenate([piece.tokens for piece in pieces], axis=1)


@pytest.mark.parametrize("tied", [True, False])
def test_ids_beyond_those_of_the_tokenizer_are_not_drawn(tied):
    config = dataclasses.replace(CONFIG, vocab_size=300, tie_embeddings=tied)
    whole = random_params(config)
    kept, narrow = keep_ids(whole, config, 61)
    drawn = produce(split_layers(kept, narrow), narrow, num_samples=4, sampling=Sampling(temperature=100.0))
    assert drawn.max() < 61
    tokens = np.array([[3, 1, 4]])
    np.testing.assert_allclose(uncached(kept, narrow, tokens), uncached(whole, config, tokens)[..., :61], rtol=1e-5)
    assert keep_ids(whole, config, 300) == (whole, config)


@functools.partial(jax.jit, static_argnums=1)
def uncached(params, config, tokens_BxT):
    """Logits of the whole sequence from parameters in the layout for training."""
    return logits(params, config, GPT(config).apply({"params": params}, tokens_BxT))


@settings(max_examples=7)
@given(configs(), st.integers(0, 1000), st.data())
def test_every_combination_matches_the_numpy_model_and_cached_logits_match_uncached_ones(config, seed, data):
    """At all positions: a prefill of random length, padded on the right, then one token at a time."""
    T = config.block_size
    prefill = data.draw(st.integers(1, T - 1), label="prefill")
    params = random_params(config, seed)
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, T))
    with jax.enable_x64(True):
        expected = np.asarray(uncached(params, config, ids))
        layers = split_layers(params, config)
        padded = np.where(np.arange(T) < prefill, ids, config.vocab_size - 1).astype(np.int32)
        first, caches = decode.prefill(layers, config, padded, jnp.int32(0), np.array([prefill]), None, T)
        out = [np.asarray(first)]

        @jax.jit
        def one(caches, token_1x1, position):
            hidden, caches = decode._forward(layers, config, token_1x1, position[None], caches)
            return logits(layers, config, hidden)[:, 0], caches

        for t in range(prefill, T):
            row, caches = one(caches, ids[:, t : t + 1], jnp.int32(t))
            out.append(np.asarray(row))
    assert np.abs(np.stack(out, 1) - expected[:, prefill - 1 :]).max() < 1e-12
    assert np.abs(expected - reference_logits(params, config, ids)).max() < 1e-10


def argmaxes(raw, config, prompt, n):
    """The n likeliest next tokens one after the other: what `generate` promises beyond block_size, in plain NumPy."""
    T, keep = config.block_size, config.block_size // 2
    text, begin = list(prompt), 0
    for _ in range(n):
        if config.position == "rope":  # a token attends to the last T tokens, in every layer
            row = reference_logits(raw, config, np.array([text]), window=T)[0, -1]
        else:  # the model reads the text from `begin` on, which jumps when that would be more than T tokens
            if len(text) - begin > T:
                begin = len(text) - 1 - keep
            row = reference_logits(raw, config, np.array([text[begin:]]))[0, -1]
        text.append(int(row.argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("position", "chunk", "T", "lengths"),
    [
        pytest.param("learned", 5, 16, [15], marks=pytest.mark.slow),
        ("learned", 16, 15, [15, 1, 8, 14]),
        pytest.param("learned", 16, 1, [1, 1], marks=pytest.mark.slow),
        pytest.param("rope", 5, 16, [16], marks=pytest.mark.slow),
        ("rope", 5, 15, [15, 1, 8]),
    ],
)
def test_beyond_block_size_rope_slides_over_block_size_tokens_and_learned_positions_read_half_again(
    position, chunk, T, lengths, monkeypatch
):
    """Greedy, from 1 ... block_size tokens on, of single prompts and of several that differ in length."""
    if len(lengths) > 2:  # the prompts are read in pieces, the last of which overlaps with the one before
        monkeypatch.setattr(generate_lib, "piece_length", lambda *_: 4)
    config = dataclasses.replace(CONFIG, position=position, tie_embeddings=False, block_size=T, dtype="float64")
    config = dataclasses.replace(config, param_dtype="float64")
    rng = np.random.default_rng(2)
    raw, prompts = random_params(config, scale=0.6), [rng.integers(0, 61, n) for n in lengths]
    n_samples = 2 if len(lengths) == 1 else 1
    options = {"max_new_tokens": 40, "sampling": Sampling(0.0), "chunk": chunk, "num_samples": n_samples}
    with jax.enable_x64(True):
        pieces = list(generate(split_layers(raw, config), config, prompts, **options))
    ours = np.concatenate([piece.tokens for piece in pieces], axis=1)
    expected = [argmaxes(raw, config, prompt, 40) for prompt in prompts]
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, np.repeat(expected, n_samples, axis=0))
    assert T == 1 or min(len(set(row)) for row in expected) >= 3, "not a trivial loop"


@pytest.mark.slow
def test_a_token_beyond_block_size_takes_no_forward_pass_over_the_window(params, monkeypatch):
    """Of 60 tokens with learned positions, six half windows are read again; with rope none."""
    calls = []
    monkeypatch.setattr(
        generate_lib, "read_again", lambda *args: (calls.append(args[3].shape), decode.read_again(*args))[1]
    )
    produce(params, max_new_tokens=60)
    assert calls == [(1, 8)] * 6
    rope = dataclasses.replace(CONFIG, position="rope")
    produce(split_layers(random_params(rope), rope), rope, max_new_tokens=60)
    assert len(calls) == 6


def test_pieces_have_at_most_chunk_tokens_and_add_up_to_max_new_tokens(params):
    for count in (1, 7, 30):
        pieces = list(generate(params, CONFIG, [[1]], max_new_tokens=count, num_samples=3, chunk=4))
        assert all(piece.tokens.shape[0] == 3 and 1 <= piece.tokens.shape[1] <= 4 for piece in pieces)
        assert sum(piece.tokens.shape[1] for piece in pieces) == count


@pytest.mark.parametrize("options", [{"max_new_tokens": 30}, {"max_new_tokens": 12, "stop_id": 7, "num_samples": 2}])
def test_an_accelerator_computes_the_next_chunk_while_one_is_fetched(params, monkeypatch, options):
    events = []

    def noted(name, function):
        return lambda *arguments: (events.append(name), function(*arguments))[1]

    here = list(generate(params, CONFIG, [[1, 2]], chunk=4, **options))
    monkeypatch.setattr(accelerators, "dispatches_ahead", lambda platform: True)
    monkeypatch.setattr(generate_lib._Chunk, "fetch", noted("fetch", generate_lib._Chunk.fetch))
    monkeypatch.setattr(generate_lib, "decode", noted("dispatch", generate_lib.decode))
    ahead = list(generate(params, CONFIG, [[1, 2]], chunk=4, **options))
    assert [piece.tokens.tolist() for piece in ahead] == [piece.tokens.tolist() for piece in here]
    assert events[:5] == ["dispatch", "fetch", "dispatch", "fetch", "dispatch"]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("seconds", "low", "high"), [(1e-9, 64, 64), (0.002, 20, 25), (0.3, 1, 1)])
def test_watched_pieces_take_a_twentieth_of_a_second(params, monkeypatch, seconds, low, high, ahead):
    clock, lengths = [0.0], []

    def decode(params, config, state, before_first, n, chunk, drawing):
        clock[0] += seconds * int(n) + 1e-9
        lengths.append(int(n))
        return state, np.zeros((1, chunk), np.int32), np.zeros((1, chunk), np.float32)

    monkeypatch.setattr(generate_lib, "decode", decode)
    monkeypatch.setattr(generate_lib.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(accelerators, "dispatches_ahead", lambda platform: ahead)
    rope = dataclasses.replace(CONFIG, position="rope")
    rope_params = split_layers(random_params(rope), rope)
    for watched in (True, False):
        pieces = list(generate(rope_params, rope, [[1]], max_new_tokens=601, watched=watched, chunk=64))
        assert sum(piece.tokens.shape[1] for piece in pieces) == 601
        if not watched:
            assert set(lengths[:-1]) == {64}
        else:
            assert lengths[0] == 16 and all(low <= n <= high for n in lengths[5:-1]), lengths
            assert all(b <= 2 * a for a, b in itertools.pairwise(lengths))
        lengths.clear()


def test_a_sample_depends_only_on_the_seed_and_its_number(params):
    many = produce(params, num_samples=4, seed=11, max_new_tokens=20)
    np.testing.assert_array_equal(produce(params, num_samples=1, seed=11, max_new_tokens=20), many[:1])
    np.testing.assert_array_equal(produce(params, num_samples=3, seed=11, max_new_tokens=8, chunk=5), many[:3, :8])
    assert len({tuple(row) for row in many.tolist()}) == 4
    assert not np.array_equal(produce(params, num_samples=4, seed=12, max_new_tokens=20), many)


def test_every_position_has_random_numbers_of_its_own(params):
    """With zeros for parameters every id is equally likely at every position."""
    drawn = produce(jax.tree.map(jnp.zeros_like, params), num_samples=8, max_new_tokens=24)  # beyond block_size too
    assert min(len(set(row)) for row in drawn.tolist()) > 10
    assert min(len(set(column)) for column in drawn.T.tolist()) > 3


def test_the_stop_id_ends_a_sample_and_fills_its_row(params):
    free = produce(params, num_samples=4, max_new_tokens=30)
    stop = int(free[0, 4])
    ended = produce(params, num_samples=4, max_new_tokens=30, stop_id=stop)
    for row, other in zip(ended, free):
        hits = np.flatnonzero(other == stop)
        end = hits[0] if len(hits) else 30
        np.testing.assert_array_equal(row[: end + 1], other[: min(end + 1, len(row))])
        assert (row[end:] == stop).all()
    alone = produce(params, max_new_tokens=30, stop_id=stop)
    assert alone.shape[1] < 30, "generation must stop with the chunk in which all samples end"


limit = jax.jit(sampling_lib.limit)


def kept_by_numpy(row, temperature, top_k, top_p):
    """Id -> probability of the ids that may be drawn: temperature, then top-k, then top-p."""
    scaled = row.astype(np.float64) / temperature
    order = np.argsort(-scaled)
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    count = int(np.searchsorted(np.cumsum(weights), top_p) + 1) if top_p < 1 else len(order)
    return dict(zip(order[:count].tolist(), (weights[:count] / weights[:count].sum()).tolist()))


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(2, 40),
    st.floats(0.2, 3.0),
    st.integers(0, 45),
    st.floats(0.01, 0.999) | st.just(1.0),
)
def test_top_k_and_top_p_match_numpy(seed, n_ids, temperature, top_k, top_p):
    row = np.random.default_rng(seed).normal(0, 2, n_ids).astype(np.float32)
    expected = kept_by_numpy(row, np.float32(temperature), top_k, np.float32(top_p))
    padded = np.full((1, 40), -np.inf, np.float32)  # one shape, so one program; -inf is never kept
    padded[0, :n_ids] = row
    draw = Draw.of(Sampling(1.0, top_k, top_p))
    limited = np.asarray(limit(padded / np.float32(temperature), draw))[0]
    assert set(np.flatnonzero(limited > -np.inf).tolist()) == set(expected)
    np.testing.assert_allclose(limited[list(expected)], row[list(expected)] / np.float32(temperature), rtol=1e-6)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, 20, 0.6)]
)
def test_samples_have_the_probabilities_of_the_model(params, sampling):
    n = 4000
    row = np.asarray(uncached(random_params(CONFIG), CONFIG, np.array([[3, 1, 4]])))[0, -1]
    expected = kept_by_numpy(row, *sampling[:3])
    drawn = produce(params, num_samples=n, max_new_tokens=1, sampling=sampling, seed=3)[:, 0]
    counts = np.bincount(drawn, minlength=61)
    assert set(np.flatnonzero(counts)) <= set(expected)
    wanted = n * np.array([expected.get(i, 0.0) for i in range(61)])
    seen = wanted > 0
    chi = ((counts - wanted)[seen] ** 2 / wanted[seen]).sum()
    freedom = seen.sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * max(freedom, 1)), (chi, freedom)


def test_padding_ids_are_never_drawn():
    config = dataclasses.replace(CONFIG, vocab_size=3)
    raw = random_params(config)
    raw["wte"]["embedding"][3:] = 50.0  # 125 padding rows whose logits would be the largest
    options = {"prompt": [0], "num_samples": 200, "max_new_tokens": 8, "sampling": Sampling(5.0)}
    drawn = produce(split_layers(raw, config), config, **options)
    assert set(drawn.ravel().tolist()) == {0, 1, 2}


def test_bfloat16_decoding_casts_the_matrices_and_keeps_the_norms(params):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    layers = split_layers(random_params(config), config)
    assert layers["blocks_1"]["mlp"]["c_fc"]["kernel"].dtype == jnp.bfloat16 == layers["wte"]["embedding"].dtype
    assert layers["ln_f"]["scale"].dtype == jnp.float32
    assert {name for name in layers if name.startswith("blocks")} == {"blocks_0", "blocks_1"}
    assert produce(layers, config, max_new_tokens=8).shape == (1, 8)


@pytest.mark.parametrize("samples", [1, 8])
def test_a_token_reads_each_weight_once_and_copies_neither_weights_nor_cache(samples):
    """In the compiled program only in-place updates produce arrays of their shapes, and each kernel has one reader."""
    config = GPTConfig(vocab_size=700, block_size=64, n_layer=3, n_head=3, n_embd=96)
    mesh = single_device()
    layout, lengths = params_layout(config, mesh), {"prompt_length": 5, "max_new_tokens": 40}
    text = compile_decode(config, mesh, layout, num_samples=samples, **lengths).as_text()
    kernels = ("96,96", "384,96", "96,384")  # [out, in]
    shapes = "|".join((*kernels, "768,96", f"{3 * samples},64,32"))  # kernels, head, cache
    made = re.findall(rf"%(\S+) = f32\[(?:{shapes})\]\S* ([\w-]+)\(", text)
    in_place = ("parameter", "get-tuple-element", "bitcast", "dynamic-update-slice")
    assert [name for name, kind in made if kind not in in_place and "dynamic-update-slice" not in name] == []
    (body,) = (part for part in re.split(r"\n(?=%|ENTRY)", text) if " dot(" in part and "ROOT %tuple" in part)
    lines = [line for line in body.splitlines() if " tuple(" not in line]  # without the carry to the next token
    readers = [
        sum(re.search(rf"%{re.escape(name)}[,)]", line) is not None for line in lines)
        for name, shape in re.findall(r"%(\S+) = f32\[([\d,]+)\]\S* get-tuple-element\(", body)
        if shape in kernels
    ]
    assert readers == [1] * (6 * config.n_layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 17}, "the prompt has 17 tokens, more than model.block_size=16"),
        ({"prompt": [1, 61]}, r"the prompt has id 61, but the model has ids 0 ... 60"),
        ({"prompt": [1, -1, 5]}, r"the prompt has id -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ({"num_samples": 0}, "num_samples is 0, but must be at least 1"),
        ({"sampling": Sampling(-1.0)}, "temperature is -1.0, but must be at least 0"),
        ({"sampling": Sampling(float("nan"))}, "temperature is nan"),
        ({"sampling": Sampling(float("inf"))}, "temperature is inf"),
        ({"sampling": Sampling(1.0, top_k=-2)}, "top_k is -2"),
        ({"sampling": Sampling(1.0, top_p=0.0)}, r"top_p is 0.0, outside \(0, 1\]"),
        ({"sampling": Sampling(1.0, top_p=1.1)}, "top_p is 1.1"),
        ({"sampling": Sampling(1.0, top_p=float("nan"))}, "top_p is nan"),
        ({"sampling": Sampling(1.0, min_p=1.5)}, r"min_p is 1.5, outside \[0, 1\]"),
        ({"sampling": Sampling(1.0, repetition_penalty=0.0)}, "repetition_penalty is 0.0, but must be above 0"),
    ],
)
def test_impossible_requests_are_refused(params, options, message):
    with pytest.raises(UserError, match=message):
        produce(params, **options)


def test_the_cache_of_many_rows_is_rounded_up_by_less():
    config = GPTConfig(block_size=1024)
    lengths = [decode.cache_length_of(config, rows, 200, 64) for rows in (1, 7, 8, 32)]
    assert lengths == [512, 512, 320, 320]
    assert [decode.cache_length_of(config, rows, 1000, 64) for rows in (1, 8)] == [1024, 1024]
    assert [decode.cache_length_of(config, rows, 3, 8) for rows in (1, 8)] == [64, 64]
