"""What a workdir keeps of the data it trains on: a token store that was rebuilt under a run is refused."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from conftest import call, metrics, overrides, refused

from trialgpt_jax.data.token_store import open_store


def rebuild(folder):
    """Changes one id of a store, and its checksum in the manifest, as another corpus of the same size would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    record = next(shard for shard in manifest["shards"] if shard["split"] == "train")
    ids = np.fromfile(folder / record["file"], "<u2")
    ids[0] ^= 1
    ids.tofile(folder / record["file"])
    record["sha256"] = record["sha256"][::-1]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def stores(store, tmp_path):
    """Two copies of the store."""
    return [pathlib.Path(shutil.copytree(store, tmp_path / name)) for name in "ab"]


@pytest.mark.parametrize("mixture", [False, True])
def test_a_store_rebuilt_under_a_run_is_refused_by_name_or_accepted_with_a_word(
    stores, mixture, config, tmp_path, default_file
):
    # follows: restore that one, use another --workdir, or --allow_config_change=data.dir
    # follows: it goes on with them (--allow_config_change=data.dir)
    def train(*arguments):
        flags = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}", *arguments]
        return call("train", *flags)

    config.data.dir = f"{stores[0]}:0.5,{stores[1]}:0.5" if mixture else str(stores[1])
    config.train.update({"steps": 8, "max_seconds": 1e-9})
    config.eval.every_steps = 0
    assert train().returncode == 75
    rebuild(stores[1])
    refused(
        train(),
        f"data.dir: {stores[1]} (sha256 ",
        f"has other tokens than {stores[1]}",
        "--allow_config_change=data.dir",
    )
    refused(train("--dry_run"), f"data.dir: {stores[1]}")
    result = train("--allow_config_change=data.dir")
    assert result.returncode == 75 and f"data.dir: {stores[1]}" in result.stderr, result.stderr
    result = train()  # the new digest is kept
    assert result.returncode == 75 and "sha256" not in result.stderr, result.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert call("evaluate", f"--workdir={tmp_path / 'run'}", f"--config.data.dir={stores[0]}").returncode == 0


def test_digests_follow_the_tokens_and_not_the_folder(stores, tmp_path):
    digest = [open_store(str(folder)).members[0][1] for folder in stores]
    assert digest[0] == digest[1] and len(digest[0]) == 64
    rebuild(stores[1])
    assert open_store(str(stores[1])).members[0][1] != digest[1]
    mixture = open_store(f"{stores[0]}:1,{stores[1]}:2")
    assert [folder for folder, _ in mixture.members] == [str(folder) for folder in stores]
    assert mixture.members == tuple(open_store(str(folder)).members[0] for folder in stores)


@pytest.mark.parametrize("place", ["beginning", "end", "size"])
def test_digests_of_foreign_files_follow_their_beginning_end_and_size(tmp_path, place):
    ids = np.arange(200_000, dtype="<u2") % 50_000
    ids.tofile(tmp_path / "train.bin")
    ids[:1000].tofile(tmp_path / "val.bin")
    before = open_store(str(tmp_path)).members
    assert open_store(str(tmp_path)).members == before
    changed = np.append(ids, ids[-1:]) if place == "size" else ids.copy()
    changed[0 if place == "beginning" else -1] += 1
    changed.tofile(tmp_path / "train.bin")
    assert open_store(str(tmp_path)).members != before


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '{"a": 1}', "[[1]]", "null"])
def test_a_damaged_record_of_the_data_is_refused_by_its_name(config, store, tmp_path, default_file, text):
    (tmp_path / "run").mkdir()
    flags = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "run" / "data.json").write_text(text)
    refused(call("train", *flags), str(tmp_path / "run" / "data.json"))


@pytest.mark.parametrize("mixture", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_relative_store_is_found_from_another_folder_and_after_it_has_moved(
    stores, mixture, config, tmp_path, default_file, monkeypatch
):
    # follows: give the folder it has moved to:
    config.data.dir = "a:0.5,b:0.5" if mixture else "a"
    config.checkpoint.keep_last = 9
    config.train.update({"steps": 8, "max_seconds": 1e-9})
    config.eval.every_steps = 0
    flags = [f"--config={default_file}", *overrides(config), f"--workdir={tmp_path / 'run'}"]
    monkeypatch.chdir(tmp_path)
    assert call("train", *flags).returncode == 75
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    evaluate = "evaluate", f"--workdir={tmp_path / 'run'}", "--batches=1", "--json"
    result = call(*evaluate)
    assert result.returncode == 0, result.stderr
    expected = json.loads(result.stdout)
    for _ in range(2):  # also after a resumed run has written the record again
        assert call("train", *flags).returncode == 75
    refused(call(*evaluate, "--config.data.dir=a"), "data.dir=a does not exist")  # what is given is taken as it is
    assert json.loads((tmp_path / "run" / "data.json").read_text())[0][0] == "a"

    (tmp_path / "a").rename(tmp_path / "moved")
    for command in (evaluate, ("train", *flags)):
        refused(call(*command), "data.dir=a of the run", f"nor {tmp_path}/a", "--config.data.dir=FOLDER")
    given = "--config.data.dir=" + (f"{tmp_path}/moved:0.5,{tmp_path}/b:0.5" if mixture else f"{tmp_path}/moved")
    assert json.loads(call(*evaluate, given, "--checkpoint_step=1").stdout) == expected
    result = call("train", *flags, given)
    assert result.returncode == 75 and "`data.dir` changes" in result.stderr, result.stderr
    if mixture:  # other weights are another run
        refused(call("train", *flags, given.replace("0.5", "0.4")), "data.dir", "--allow_config_change=data.dir")
