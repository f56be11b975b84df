"""JSON files: what is read has the shape that was asked for, or the error says where it has not."""

import json
from typing import NotRequired, TypedDict

import pytest

from trialgpt_jax.storage import json_files


class _Shard(TypedDict):
    file: str
    tokens: json_files.Count


class _Manifest(TypedDict):
    shards: list[_Shard]
    size: NotRequired[json_files.Size]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"shards": [{"file": "a", "tokens": 1, "more": 2}], "size": 5}', None),
        ('{"shards": [{"file": "a", "tokens": 1.0}]}', "shards[0].tokens: Expected int, got float"),
        ('{"shards": [{"file": "a", "tokens": true}]}', "shards[0].tokens: Expected int, got bool"),
        ('{"shards": [{"file": "a", "tokens": -1}]}', "shards[0].tokens: Expected int >= 0"),
        ('{"shards": [{"file": "a"}]}', "shards[0]: Object missing required field tokens"),
        ('{"shards": [], "size": 1e9}', "size: Expected int, got float"),
        ('{"shards": [], "size": 4294967296}', "size: Expected int <= 2147483647"),
        ('{"shards": [], "size": 1%s}' % ("0" * 40), "size: Expected int <= 2147483647"),
        ('{"shards": {}}', "shards: Expected array, got object"),
        ("[]", "it: Expected object, got array"),
        ("{", "line 1 column 2"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"shards": "\xff"}', "codec can't decode byte 0xff"),
    ],
)
def test_what_is_read_has_the_shape_or_the_error_says_where_not(tmp_path, text, error):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if error is None:
        assert json_files.read(str(path), _Manifest) == json.loads(text)  # unknown keys are kept
    else:
        with pytest.raises(ValueError, match=r".") as caught:
            json_files.read(str(path), _Manifest)
        assert error in str(caught.value)


def test_a_name_that_is_not_utf8_survives_and_the_file_is_utf8(tmp_path):
    path, name = str(tmp_path / "x.json"), b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    json_files.write(path, {"file": name, "text": "é"})
    assert json.loads((tmp_path / "x.json").read_bytes().decode("utf-8")) == {"file": name, "text": "é"}
