"""Writes a shard of a token store: it appears under its name only when it is complete and durable."""

import hashlib
import os

import numpy as np

from trialgpt_jax.storage import files


class ShardWriter:
    """Writes one shard under a temporary name; `finish` syncs it and renames it to `file`."""

    def __init__(self, folder: str, file: str, split: str, dtype: np.dtype):
        self._folder, self._dtype = folder, np.dtype(dtype).newbyteorder("<")
        self.record = {"file": file, "split": split, "tokens": 0, "documents": 0, "bytes": 0, "max_id": 0, "sha256": ""}
        self._part = files.part_name(os.path.join(folder, file))
        self._digest = hashlib.sha256()
        self._file = open(self._part, "wb", buffering=0)  # noqa: SIM115, closed by finish or abort

    def append(self, ids: np.ndarray, documents: int, n_bytes: int) -> None:
        """Appends whole documents: their ids with every end-of-text, [n], their number and their size in UTF-8."""
        data = np.ascontiguousarray(ids, self._dtype)
        view = memoryview(data.tobytes() if not len(data) else data).cast("B")
        self._digest.update(view)
        while len(view):  # an unbuffered write may be partial
            view = view[self._file.write(view) :]
        self.record["tokens"] += len(ids)
        self.record["documents"] += documents
        self.record["bytes"] += n_bytes
        self.record["max_id"] = max(self.record["max_id"], int(ids.max(initial=0)))

    def finish(self) -> dict:
        """Syncs and renames the file; returns the shard's record for the manifest."""
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._part, os.path.join(self._folder, self.record["file"]))
        files.sync_folder(self._folder)
        self.record["sha256"] = self._digest.hexdigest()
        return self.record

    def abort(self) -> None:
        """Closes and removes the unfinished file."""
        self._file.close()
        files.remove(self._part)
