"""Which errors are the outside world's: each becomes one line and status 2, in every command.

Outside are disks, networks and limits of the system (`OSError` with one of the numbers below, `MemoryError`, no new
thread), JAX's environment variables, memory and drivers of devices (JAX's runtime error with one of the texts below),
and the encoding of file names. Every other exception is a mistake in this program and keeps its traceback, with
status 1.

Imports no JAX: its exception is recognised by the name of its class.
"""

import errno
import os
import re
import sys
from types import TracebackType

from trialgpt_jax import console

_NUMBERS = frozenset(
    # disks and mounts
    ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENODEV", "ENXIO", "EUCLEAN", "EBADMSG", "EBUSY")
    # what a file system cannot do, or names that it does not take
    + ("ENOLCK", "ENOSYS", "EOPNOTSUPP", "ENAMETOOLONG", "ELOOP", "ENOTDIR", "EISDIR", "ETXTBSY", "EILSEQ")
    # limits of the process and the machine
    + ("EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EADDRINUSE", "EADDRNOTAVAIL")
    # networks
    + ("ESTALE", "ENOTCONN", "EREMOTEIO", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ESHUTDOWN")
    + ("ETIMEDOUT", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET")
)
_HINTS = {
    "EMFILE": "raise the limit of open files (ulimit -n)",
    "ENOMEM": "raise the limit of memory (ulimit -v, or that of the container)",
    "EAGAIN": "the limit of processes and threads is too low (ulimit -u)",
}
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY|bad_alloc|failed to allocate", re.IGNORECASE)
_DRIVER = re.compile(
    r"CUDA driver version|CUDA_ERROR_(NO_DEVICE|DEVICE_UNAVAILABLE|SYSTEM_\w+|ECC_\w+|COMPAT_\w+|INSUFFICIENT_DRIVER)|"
    r"no supported devices found|Unable to initialize backend|libcudnn|CUDNN_STATUS_NOT_INITIALIZED"
)
# JAX reads its variables while it is imported.
_VARIABLE = re.compile(r"invalid truth value .* for environment '(JAX_\w+)'|Invalid value .* for JAX flag (jax_\w+)")
_NOT_LOADED = re.compile(r"failed to map segment|Cannot allocate memory|Too many open files")
_PROGRAM = (os.path.dirname(os.path.abspath(__file__)), os.path.abspath(sys.prefix), os.path.abspath(sys.base_prefix))
LEVERS = "raise train.accumulate_steps, set train.remat=block, or split the state over devices with mesh.fsdp=-1"


def explain(error: BaseException) -> str | None:
    """One line about an error of the outside world; None for a mistake in this program."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return f"this process has too little memory{f': {text}' if text else ''}; {_HINTS['ENOMEM']}, or {LEVERS}"
    if isinstance(error, OSError):
        return _os_error(error, text)
    if isinstance(error, UnicodeEncodeError) and error.encoding in ("ascii", sys.getfilesystemencoding()):
        characters = error.object[error.start : error.end]
        return f"a name with {characters!a} cannot be written in {error.encoding}; set PYTHONUTF8=1"
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError"):
        if _NO_MEMORY.search(text):
            return f"out of memory: {text}; {LEVERS}; for `infer`, lower --num_samples"
        if _DRIVER.search(text):
            return f"the device cannot be used: {text}"
    if isinstance(error, ValueError) and (variable := _VARIABLE.search(text)):
        return f"the environment is wrong: {text}; correct or unset {(variable[1] or variable[2]).upper()}"
    if isinstance(error, ImportError) and _NOT_LOADED.search(text):
        return f"{text}; the limit of memory (ulimit -v) or of open files (ulimit -n) is too low"
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return f"{text}; {_HINTS['EAGAIN']}"
    return None


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a command: what `explain` explains is one line and status 2 while libraries are imported too;
    `cli.run` begins only afterwards."""
    if line := explain(error):
        console.say_always(f"error: {line}")
        os._exit(2)
    sys.__excepthook__(kind, error, trace)


def _os_error(error: OSError, text: str) -> str | None:
    name, file = errno.errorcode.get(error.errno), error.filename
    if name == "ENOENT":
        if isinstance(file, str) and os.path.abspath(file).startswith(_PROGRAM):
            return None
    elif name not in _NUMBERS and type(error).__module__ != "socket":
        return None
    what = f"{os.fsdecode(file)}: " if isinstance(file, (str, bytes)) else ""
    hint = f"; {_HINTS[name]}" if name in _HINTS else ""
    return f"{what}{error.strerror or text}{hint}"
