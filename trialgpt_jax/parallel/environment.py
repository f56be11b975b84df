"""Environment variables that JAX reads, checked before it does: XLA_FLAGS, JAX_PLATFORMS, the cache folder."""

import logging
import os
import re
import warnings

import jax
from jax._src import xla_bridge  # whether JAX has started has no public name
from jax._src.lib import xla_client

from trialgpt_jax import UserError
from trialgpt_jax.console import say

_MOST_DEVICES = 1024  # of a CPU; JAX takes minutes to start 100,000


def check_xla_flags() -> None:
    """Refuses XLA_FLAGS that XLA does not know: it would end the process from C++, with a core dump.

    A forked process reads them first, which takes milliseconds. Nothing happens where JAX has started already.

    Raises:
      UserError: names the flag.
    """
    value = os.environ.get("XLA_FLAGS", "").strip()
    if not value or xla_bridge.backends_are_initialized():
        return
    count = re.search(r"--(xla_force_host_platform_device_count)=(-?\d+)(?:\s|$)", value)
    if count and not 1 <= int(count[2]) <= _MOST_DEVICES:
        raise UserError(f"XLA_FLAGS: {count[1]} is {count[2]}, but must be at least 1 and at most {_MOST_DEVICES}")
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python and JAX warn of threads; this child only parses a string
        child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        xla_client.CompileOptions()
        os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as file:
        output = file.read(1 << 20)
    if os.waitpid(child, 0)[1] == 0:
        return
    reason = re.search(r"(Unknown flags? in XLA_FLAGS: .*|Could not open file .*? to read flags|Couldn't .*)", output)
    why = reason[1] if reason else next((line for line in output.splitlines() if line.strip()), "XLA refuses them")
    raise UserError(f"XLA_FLAGS={value}: {' '.join(why.split())[:200]}; correct it, or unset XLA_FLAGS")


def check_devices() -> None:
    """Starts JAX's devices. A package of JAX that does not work here is a line of the log.

    Raises:
      UserError: there is none of those that JAX_PLATFORMS asks for (names what there is), or JAX_DISABLE_JIT is set.
    """
    if jax.config.jax_disable_jit:
        raise UserError("JAX_DISABLE_JIT is set, but steps are compiled before they run; unset JAX_DISABLE_JIT")
    wanted, broken = jax.config.jax_platforms, _BrokenPlugins()
    log = logging.getLogger(xla_bridge.__name__)
    log.addFilter(broken)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a platform that is known and not installed
        why = " ".join(str(error).split(" (set ")[0].split()) or "no such package of JAX works here"
        if not wanted:
            raise UserError(f"JAX finds no device ({why[:200]})") from None
        if wanted == "cpu":
            raise UserError(f"JAX cannot start on the CPU{why}; unset JAX_NUM_CPU_DEVICES and XLA_FLAGS") from None
        there = ", ".join(sorted(set(xla_bridge._backend_factories) - set(wanted.split(","))))
        raise UserError(
            f"JAX_PLATFORMS={wanted}, but JAX finds no such device here ({why[:200]}); JAX is installed for {there}; "
            "unset JAX_PLATFORMS to take what there is, or set JAX_PLATFORMS=cpu"
        ) from None
    finally:
        log.removeFilter(broken)


class _BrokenPlugins(logging.Filter):
    """Makes one line of the traceback that JAX logs for a package that does not work on this machine."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            say(f"warning: {record.getMessage()}: {' '.join(str(record.exc_info[1]).split())[:200]}")
            return False
        return True


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk between runs, see `cache_folder`; without such a folder they are not kept."""
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = cache_folder(os.environ)
    if given and folder is None:
        say(f"JAX_COMPILATION_CACHE_DIR={given} cannot be written; compiled programs are not kept")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def cache_folder(env) -> str | None:
    """JAX_COMPILATION_CACHE_DIR, or a folder in XDG_CACHE_HOME or in `.cache` of HOME; created if it does not exist.

    Returns:
      None if it cannot be written, is in a store other than gs:// and s3://, or if there is no home folder: it is never
        made in the current folder.
    """
    given = env.get("JAX_COMPILATION_CACHE_DIR", "")
    if "://" in given:
        return given if given.startswith(("gs://", "s3://")) else None
    folder, home = os.path.expanduser(given), env.get("HOME", "")
    if not folder:
        cache = os.path.expanduser(env.get("XDG_CACHE_HOME", ""))
        if not os.path.isabs(cache):  # a relative one is to be ignored, says the XDG specification
            if not (os.path.isabs(home) and os.path.isdir(home)):
                return None
            cache = os.path.join(home, ".cache")
        folder = os.path.join(cache, "trialgpt_jax", "xla")
    if folder.startswith("~"):
        return None
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None
