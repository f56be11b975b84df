"""What `storage.files` leaves on a disk: whole files, durable names, no leftovers. Object stores: test_storage.py."""

import errno
import json
import logging
import os
import stat

import numpy as np
import pytest
from conftest import call, refused

from trialgpt_jax.data.shard_writer import ShardWriter
from trialgpt_jax.model import hf
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.storage import files, json_files


class Disk:
    """The order in which writes become durable.

    `events` are ("fsync", path), ("rename", from, to) and ("mkdir", path).
    """

    def __init__(self, monkeypatch):
        self.events = []
        real = {name: getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir")}

        def fsync(handle):
            self.events.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
            real["fsync"](handle)

        def recorded(kind, name):
            def call(*paths):
                real[name](*paths)
                self.events.append((kind, *map(str, paths)))

            return call

        monkeypatch.setattr(os, "fsync", fsync)
        for kind, name in (("rename", "replace"), ("rename", "rename"), ("mkdir", "mkdir")):
            monkeypatch.setattr(os, name, recorded(kind, name))

    def assert_durable(self):
        """Every file was synced before it got its name, and its folder afterwards; returns the renamed files."""
        events, renamed = self.events, []
        for i, (kind, *paths) in enumerate(events):
            if kind != "fsync":
                *source, path = paths
                assert all(("fsync", each) in events[:i] for each in source), (
                    f"{events[i]}: without a sync of the contents"
                )
                folder = ("fsync", os.path.dirname(path))
                assert folder in events[i:], f"{events[i]}: without a sync of the folder"
                renamed += source and [path]
        return renamed


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_write_syncs_the_contents_then_renames_then_syncs_the_folder(tmp_path, disk):
    path = str(tmp_path / "a.json")
    json_files.write(path, {"a": 1})
    (_, part), (_, source, target), (_, folder) = disk.events
    assert [kind for kind, *_ in disk.events] == ["fsync", "rename", "fsync"]
    assert (source, target, folder) == (part, path, str(tmp_path))
    assert os.listdir(tmp_path) == ["a.json"] and json_files.read(path) == {"a": 1}


def test_a_shard_is_synced_before_and_its_folder_after_it_gets_its_name(tmp_path, disk):
    writer = ShardWriter(str(tmp_path), "train_00000_0000.bin", "train", np.dtype("u2"))
    writer.append(np.arange(9), 1, 30)
    assert not (tmp_path / "train_00000_0000.bin").exists()
    writer.finish()
    (_, part), (_, source, target), (_, folder) = disk.events
    assert (source, target, folder) == (part, str(tmp_path / "train_00000_0000.bin"), str(tmp_path))


def test_a_folder_is_made_durable_with_all_its_new_parents(tmp_path, disk):
    files.make_folder(str(tmp_path / "a" / "b" / "c"))
    new = [("mkdir", str(tmp_path / "a")), ("mkdir", str(tmp_path / "a/b")), ("mkdir", str(tmp_path / "a/b/c"))]
    assert [event for event in disk.events if event[0] == "mkdir"] == new
    disk.assert_durable()
    disk.events.clear()
    files.make_folder(str(tmp_path / "a" / "b" / "c"))  # a process that was killed may have made it without a sync
    assert disk.events == [("fsync", str(tmp_path / "a" / "b"))]
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(OSError, match="File exists|Not a directory"):
            files.make_folder(str(tmp_path / path))


def test_sync_tree_syncs_every_file_and_folder_and_the_folder_above(tmp_path, disk):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").mkdir()
    for name in ("x", "b/y", "b/c/z"):
        (tmp_path / "a" / name).write_text(name)
    os.mkfifo(tmp_path / "a" / "fifo")  # would block
    (tmp_path / "a" / "link").symlink_to("/nowhere")
    disk.events.clear()
    files.sync_tree(str(tmp_path / "a"))
    expected = {tmp_path / name for name in ("", "a", "a/x", "a/b", "a/b/y", "a/b/c", "a/b/c/z")}
    assert {path for _, path in disk.events} == {str(path) for path in expected}
    with pytest.raises(FileNotFoundError):
        files.sync_tree(str(tmp_path / "nothing"))
    files.sync_tree("gs://bucket/folder")


def test_folders_are_renamed_and_removed_durably(tmp_path, disk):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "a").mkdir()
    disk.events.clear()
    files.rename_folder(str(tmp_path / "here" / "a"), str(tmp_path / "there" / "b"))
    assert {path for _, path in disk.events[1:]} == {str(tmp_path / "here"), str(tmp_path / "there")}
    disk.events.clear()
    files.remove_tree(str(tmp_path / "there"))
    assert disk.events == [("fsync", str(tmp_path))]
    files.remove_tree(str(tmp_path / "there"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_sync_folders_is_used_without(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.make_folder(str(tmp_path / "a"))
    files.write(str(tmp_path / "a" / "x"), "x")
    assert (tmp_path / "a" / "x").read_text() == "x"


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(tmp_path, monkeypatch, name, error):
    files.write(str(tmp_path / "x"), "before")

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(type(error)):
            files.write(str(tmp_path / "x"), "after")
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "before"


def test_processes_with_the_same_pid_do_not_share_unfinished_files(tmp_path, monkeypatch):
    """Containers on one machine share pids, and folders that are mounted into them."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = str(tmp_path / "x")
    with files.replacing(path) as first, open(first, "w") as file:
        file.write("first")
        with files.replacing(path) as second, open(second, "w") as other:
            other.write("second")
        assert (tmp_path / "x").read_text() == "second" and os.path.exists(first)
    assert (tmp_path / "x").read_text() == "first"
    shards = [ShardWriter(str(tmp_path), "train_00000_0000.bin", "train", np.dtype("u2")) for _ in range(2)]
    for value, shard in enumerate(shards):
        shard.append(np.full(3, value), 1, 3)
    for value, shard in enumerate(shards):
        shard.finish()
        assert np.fromfile(tmp_path / "train_00000_0000.bin", "u2").tolist() == [value] * 3
    assert sorted(os.listdir(tmp_path)) == ["train_00000_0000.bin", "x"]


def test_only_unfinished_files_of_this_program_are_removed_and_only_those_asked_for(tmp_path):
    mine = [os.path.basename(files.part_name("config.json")), "x.bin.123.part"]
    others = ["film.mkv.part", "x.part", ".0123456789abcdef.part", "config.json"]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / mine[0]).touch()  # may be the workdir of another run
    files.remove_parts(str(tmp_path), lambda name: name == "x.bin")
    assert sorted(os.listdir(tmp_path)) == sorted([mine[0], *others, "sub"])
    files.remove_parts(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "sub"]) and os.listdir(tmp_path / "sub") == mine[:1]
    files.remove_parts(str(tmp_path / "nothing"))
    files.remove_parts("gs://bucket/folder")


def test_an_export_is_durable_and_its_config_comes_last(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(hf, "to_hf", lambda params, config: {"wte.weight": np.zeros((2, 2), np.float32)})
    (tmp_path / "tokenizer.json").write_text("{}")  # of another writer
    config = GPTConfig(n_layer=1, n_head=1, n_embd=2, block_size=2, vocab_size=2, dropout=0.0)
    hf.write(str(tmp_path), {}, config, 1)
    renamed = [os.path.basename(path) for path in disk.assert_durable()]
    assert renamed == ["model.safetensors", "generation_config.json", "config.json"]
    assert ("fsync", str(tmp_path / "tokenizer.json")) in disk.events
    assert sorted(os.listdir(tmp_path)) == sorted([*renamed, "tokenizer.json"])
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 2


def test_a_bucket_that_cannot_be_reached_is_not_logged_with_a_traceback_for_each_request():
    pytest.importorskip("gcsfs")
    files._store.cache_clear()
    files.resolve("gs://bucket/run")
    assert not logging.getLogger("gcsfs").isEnabledFor(logging.ERROR)


def test_a_pipe_in_place_of_a_file_is_an_error_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(OSError, match="a pipe, not a file"):
        json_files.read(str(tmp_path / "config.json"))
    refused(call("evaluate", f"--workdir={tmp_path}"), "config.json", "a pipe, not a file")
