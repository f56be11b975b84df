import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trialgpt_jax import UserError
from trialgpt_jax.data import batches, shard_writer, token_store
from trialgpt_jax.storage import json_files


@pytest.fixture
def split(tmp_path):
    """103 windows of block 8, and the id at position p is p."""
    np.arange(8 * 103 + 5, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return token_store.open_store(str(tmp_path)).split("train")


def take(split, count, **changes):
    arguments = {"block_size": 8, "batch_size": 12, "seed": 3} | changes
    return list(itertools.islice(batches.train_batches(split, **arguments), count))


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 2**40))
def test_permute_is_a_permutation_for_every_size_seed_and_epoch(n, seed, epoch):
    out = batches.permute(np.arange(n), np.full(n, epoch), n, seed)
    assert (np.sort(out) == np.arange(n)).all()


def test_permute_works_for_ten_trillion_windows():
    n = 10**13
    places = np.random.default_rng(0).integers(0, n, 1000)
    out = batches.permute(places, np.zeros(1000, np.int64), n, 1)
    assert ((out >= 0) & (out < n)).all() and len(set(out.tolist())) == len(set(places.tolist()))


def test_windows_are_slices_at_stride_block_size_that_share_one_id(split):
    batch = take(split, 1, shuffle=False)[0]
    assert batch.shape == (12, 9) and batch.dtype == np.int32
    assert (batch == np.arange(12)[:, None] * 8 + np.arange(9)).all()


def test_every_window_once_per_epoch_and_batches_may_span_two_epochs(split):
    rows = np.concatenate(take(split, 26))[:, 0] // 8  # 312 rows = 3 epochs of 103 and 3 rows
    epochs = [rows[i * 103 : (i + 1) * 103].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(103)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has its own order"


def test_batch_k_depends_only_on_seed_and_k(split):
    reference = take(split, 40)
    for start in (0, 1, 7, 16, 23):
        for ours, expected in zip(take(split, 40 - start, start_step=start), reference[start:], strict=True):
            np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(take(split, 1, seed=4)[0], reference[0])


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_get_contiguous_rows_of_the_same_global_batches(split, hosts):
    parts = [take(split, 20, blocks=((i,), hosts), start_step=2) for i in range(hosts)]
    for k, expected in enumerate(take(split, 20, start_step=2)):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), expected)


def test_the_order_is_uniform():
    """Chi-squared tests on (place, window) counts over many seeds and epochs, and on the distances of neighbours."""
    n, trials = 40, 4000
    seeds = [(seed, epoch) for seed in range(200) for epoch in range(20)]
    orders = np.stack([batches.permute(np.arange(n), np.full(n, epoch), n, seed) for seed, epoch in seeds])
    counts = np.zeros((n, n))
    np.add.at(counts, (np.tile(np.arange(n), trials), orders.ravel()), 1)
    cells = ((counts - trials / n) ** 2 / (trials / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(cells - freedom) < 5 * np.sqrt(2 * freedom), f"chi-squared {cells:.0f}, {freedom} degrees of freedom"
    distances = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    expected = distances.sum() / (n - 1)
    chi = ((distances - expected) ** 2 / expected).sum()
    assert abs(chi - (n - 2)) < 5 * np.sqrt(2 * (n - 2)), (
        f"neighbours: chi-squared {chi:.0f}, {n - 2} degrees of freedom"
    )
    ascents = (orders[:, 1:] > orders[:, :-1]).mean()
    assert abs(ascents - 0.5) < 0.01


def test_large_orders_are_uncorrelated_with_the_corpus():
    n = 100_003
    order = batches.permute(np.arange(n), np.zeros(n, np.int64), n, 1337)
    for other in (np.arange(n), batches.permute(np.arange(n), np.ones(n, np.int64), n, 1337), np.roll(order, 1)):
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize(("batch_size", "hosts"), [(10, 1), (12, 2), (103, 1), (200, 4)])
def test_eval_covers_every_window_once_in_order_and_marks_padding(split, batch_size, hosts):
    arguments = {"block_size": 8, "batch_size": batch_size}
    parts = [list(batches.eval_batches(split, blocks=((i,), hosts), **arguments)) for i in range(hosts)]
    count = -(-103 // batch_size)
    assert [len(part) for part in parts] == [count] * hosts
    windows = []
    for k in range(count):
        tokens = np.concatenate([part[k][0] for part in parts])
        valid = np.concatenate([part[k][1] for part in parts])
        assert tokens.shape == (batch_size, 9) and tokens.dtype == np.int32 and valid.dtype == bool
        windows += (tokens[valid][:, 0] // 8).tolist()
    assert windows == list(range(103))


def test_eval_stops_after_n_batches(split):
    assert len(list(batches.eval_batches(split, block_size=8, batch_size=10, n_batches=3))) == 3
    assert len(list(batches.eval_batches(split, block_size=8, batch_size=10, n_batches=300))) == 11


def test_a_split_without_a_window_is_refused(split):
    # follows: give more text
    message = r"training split has 829 tokens, fewer than one window of model.block_size\+1 = 830; give more text and"
    with pytest.raises(UserError, match=message):
        batches.train_batches(split, block_size=829, batch_size=1, seed=0)
    assert len(take(split, 2, block_size=828, batch_size=1)) == 2
    empty = token_store.Split("val", [], 0, None, 300)
    with pytest.raises(UserError, match="validation split has 0 tokens.*raise data.val_fraction"):
        next(batches.eval_batches(empty, block_size=8, batch_size=2))


def test_a_process_may_have_any_blocks_of_rows(split):
    (whole,) = take(split, 1, start_step=3)
    (part,) = take(split, 1, start_step=3, blocks=((0, 2, 5), 6))
    np.testing.assert_array_equal(part, whole[[0, 1, 4, 5, 10, 11]])


def test_a_batch_that_is_not_divisible_by_the_devices_is_refused(split):
    with pytest.raises(UserError, match="batch of 12 sequences is not divisible by the 5 devices"):
        batches.train_batches(split, block_size=8, batch_size=12, seed=0, blocks=((0,), 5))


def test_without_a_manifest_ids_beyond_the_vocabulary_are_refused_when_read(tmp_path):
    np.full(100, 50256, np.uint16).tofile(tmp_path / "train.bin")
    split = token_store.open_store(str(tmp_path)).split("train")
    np.full(100, 50257, np.uint16).tofile(tmp_path / "train.bin")  # after the sample that `open_store` checks
    with pytest.raises(UserError, match="the training split has the token id 50257, but its tokenizer has 50257 ids"):
        take(split, 1)


@pytest.fixture
def mixture(tmp_path):
    """103 and 20 windows of block 8, mixed 3:1; ids of the second member start at 10,000."""
    for name, first, windows in (("a", 0, 103), ("b", 10_000, 20)):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            np.arange(first, first + 8 * windows + 5, dtype=np.uint16).tofile(tmp_path / name / f"{split}.bin")
    return token_store.open_store(f"{tmp_path}/a:3,{tmp_path}/b:1")


def test_a_mixture_keeps_its_weights_and_draws_every_window_of_a_member_once_per_epoch(mixture):
    rows = np.concatenate(take(mixture.split("train"), 512, batch_size=8))[:, 0]  # 4 runs of 1,024
    for run in np.split(rows, 4):
        assert (run >= 10_000).sum() == 256
    first, second = rows[rows < 10_000] // 8, (rows[rows >= 10_000] - 10_000) // 8
    for member, windows in ((first, 103), (second, 20)):
        for epoch in np.split(member[: len(member) // windows * windows], len(member) // windows):
            assert sorted(epoch.tolist()) == list(range(windows))
    gaps = np.diff(np.flatnonzero(rows >= 10_000))
    assert 3.5 < gaps.mean() < 4.5 and 2.5 < gaps.std() < 4.5, "the members should be mixed at random: geometric gaps"


def test_members_of_the_same_size_have_orders_of_their_own(tmp_path):
    for name, first in (("a", 0), ("b", 10_000)):
        (tmp_path / name).mkdir()
        np.arange(first, first + 8 * 103 + 5, dtype=np.uint16).tofile(tmp_path / name / "train.bin")
    split = token_store.open_store(f"{tmp_path}/a:1,{tmp_path}/b:1").split("train")
    rows = np.concatenate(take(split, 128, batch_size=8))[:, 0]
    first, second = rows[rows < 10_000][:103], rows[rows >= 10_000][:103] - 10_000
    assert sorted(first) == sorted(second) and (first == second).mean() < 0.1


@pytest.mark.parametrize("start", [0, 5, 16, 130])
@pytest.mark.parametrize("hosts", [1, 2])
def test_batch_k_of_a_mixture_depends_only_on_seed_and_k(mixture, start, hosts):
    split = mixture.split("train")
    reference = take(split, 140)[start:]
    parts = [take(split, 140 - start, start_step=start, blocks=((i,), hosts)) for i in range(hosts)]
    for k, expected in enumerate(reference):
        np.testing.assert_array_equal(np.concatenate([part[k] for part in parts]), expected)


def test_eval_covers_all_members_of_a_mixture(mixture):
    split, windows = mixture.split("val"), []
    for tokens, valid in batches.eval_batches(split, block_size=8, batch_size=10):
        windows += tokens[valid][:, 0].tolist()
    assert windows == [*range(0, 8 * 103, 8), *range(10_000, 10_000 + 8 * 20, 8)]
    assert split.n_tokens == 829 + 165 and split.n_bytes is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{0}/a:0.7,{0}/b", "is not FOLDER:WEIGHT with a positive weight"),
        ("{0}/a:0.7,{0}/b:-1", "is not FOLDER:WEIGHT with a positive weight"),
        ("{0}/a:0.7,{0}/c:1", "/c does not exist; run"),
        ("{0}/a:1,{0}/other:1", r"was made with tokenizer bpe:300 \(0\), but .*/a with gpt2; .*from:.*/a$"),
    ],
)
def test_invalid_mixtures_are_refused(tmp_path, mixture, text, message):
    (tmp_path / "other").mkdir()
    writer = shard_writer.ShardWriter(str(tmp_path / "other"), "train_00000.bin", "train", np.uint16)
    writer.append(np.array([1, 299]), 1, 5)
    manifest = {"format_version": 1, "tokenizer": {"name": "bpe:300", "hash": "0"}, "vocab_size": 300, "eot_id": 299}
    manifest |= {"dtype": "uint16", "shards": [writer.finish()]}
    json_files.write(str(tmp_path / "other" / "manifest.json"), manifest)
    with pytest.raises(UserError, match=message):
        token_store.open_store(text.format(tmp_path))
