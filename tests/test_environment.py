"""An environment that JAX cannot work in is refused in one line; the cache folder is never made in the wrong place."""

import os
import subprocess

import pytest
from conftest import command, refused

from trialgpt_jax.parallel.environment import cache_folder


def run(arguments, **variables):
    argv, env = command("train", *arguments)
    env |= variables
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"XLA_FLAGS": "--xla_nonsense=1"}, ("XLA_FLAGS=--xla_nonsense=1", "Unknown flag")),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=0"}, ("device_count is 0", "at least 1")),
        ({"JAX_ENABLE_X64": "maybe"}, ("'maybe'", "unset JAX_ENABLE_X64")),
        ({"JAX_LOGGING_LEVEL": "loud"}, ('"loud"', "unset JAX_LOGGING_LEVEL")),
        ({"JAX_NUM_CPU_DEVICES": "0"}, ("cannot start on the CPU", "unset JAX_NUM_CPU_DEVICES")),
        ({"JAX_DISABLE_JIT": "1"}, ("unset JAX_DISABLE_JIT",)),
        ({"JAX_PLATFORMS": "nonsense"}, ("JAX_PLATFORMS=nonsense", "installed for cpu", "JAX_PLATFORMS=cpu")),
        ({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}, ("JAX_PLATFORMS=cuda", "JAX_PLATFORMS=cpu")),
    ],
)
def test_devices_and_flags_that_do_not_exist_are_refused(default_file, tmp_path, variables, words):
    # follows: JAX_PLATFORMS to take what there is, or set JAX_PLATFORMS=cpu
    arguments = [f"--config={default_file}", f"--workdir={tmp_path}/run", f"--config.data.dir={tmp_path}/none"]
    refused(run(arguments, **variables), *words)
    if "XLA_FLAGS" in variables:  # what the messages propose; it gets as far as the missing store
        refused(run(arguments, JAX_PLATFORMS="cpu", XLA_FLAGS=""), "does not exist")


def test_the_cache_folder_is_that_of_the_environment_or_of_the_home_folder(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    assert cache_folder({"HOME": str(home)}) == str(home / ".cache" / "trialgpt_jax" / "xla")
    assert os.path.isdir(home / ".cache" / "trialgpt_jax" / "xla")
    assert cache_folder({"HOME": str(home), "XDG_CACHE_HOME": "relative"}).startswith(str(home))
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path / "x")}) == str(tmp_path / "x" / "trialgpt_jax" / "xla")
    assert cache_folder({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "j")}) == str(tmp_path / "j")
    assert cache_folder({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"}) == "gs://bucket/cache"


def test_a_cache_in_an_unknown_kind_of_store_is_not_used():
    assert cache_folder({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/xla"}) == "gs://bucket/xla"
    assert cache_folder({"JAX_COMPILATION_CACHE_DIR": "foo://bucket/xla"}) is None


def test_without_a_home_folder_there_is_no_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    (tmp_path / "file").write_text("")
    for env in ({}, {"HOME": ""}, {"HOME": str(tmp_path / "none")}, {"HOME": str(tmp_path / "file")}, {"HOME": "~"}):
        assert cache_folder(env) is None
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path / "file" / "x")}) is None
    assert os.listdir(tmp_path) == ["file"]


def test_jax_compilation_cache_dir_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder({"JAX_COMPILATION_CACHE_DIR": "~/c", "HOME": str(tmp_path)}) == str(tmp_path / "c")
