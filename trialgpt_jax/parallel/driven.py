"""Objects whose methods process 0 calls and the other processes repeat, because each call is a collective."""

import base64
import itertools
import json
import zlib
from collections.abc import Callable
from typing import TypeVar

import jax

from trialgpt_jax.parallel import processes

T = TypeVar("T")

_PIECE = 2**20  # characters; gRPC refuses messages of 4 MiB
_broadcasts = itertools.count()


class Driven:
    """Base of a class whose methods call `_repeat` first. Their arguments are JSON values, or
    sequences such as `array.array`, which the other processes get as lists."""

    _driving = False

    def drive(self, run: Callable[[], T]) -> T | None:
        """Calls `run` in process 0, while the other processes repeat the calls that it makes of this object's methods.

        Returns:
          What `run` returns in process 0, None in the others.
        """
        if jax.process_count() == 1:
            return run()
        if jax.process_index() == 0:
            self._driving = True
            try:
                result = run()
            finally:
                self._driving = False
            broadcast(None)
            return result
        while (call := broadcast(None)) is not None:
            method, arguments, options = call
            getattr(self, method)(*arguments, **options)
        return None

    def _repeat(self, method: str, *arguments, **options) -> None:
        """Inside `drive`, makes the other processes call `method` with these arguments."""
        if self._driving:
            broadcast([method, arguments, options])


def broadcast(value):
    """Returns in every process the JSON value that process 0 has, of any size; what the others pass is ignored.

    Arrays in it become lists.
    """
    state = processes.distributed.global_state
    if state.num_processes == 1:
        return value
    key, pieces = f"trialgpt_jax/broadcast/{next(_broadcasts)}/", []
    if state.process_id == 0:
        packed = base64.b85encode(zlib.compress(json.dumps(value, default=list).encode(), 1)).decode()
        pieces = [packed[start : start + _PIECE] for start in range(0, len(packed), _PIECE)]
    for i, piece in enumerate(pieces):
        state.client.key_value_set(f"{key}{i}", piece)
    n = processes.from_first(lambda: len(pieces))
    pieces = pieces or [processes.wait_for(f"{key}{i}") for i in range(n)]
    processes.meet()  # all have read them
    if state.process_id == 0:
        state.client.key_value_delete(key)
    return json.loads(zlib.decompress(base64.b85decode("".join(pieces))))
