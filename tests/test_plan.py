"""A run that cannot work is refused before it starts: memory, Weights & Biases; and what its plan says."""

import sys
import types
from unittest import mock

import pytest
from conftest import small_config

from trialgpt_jax import UserError
from trialgpt_jax.data.token_store import open_store
from trialgpt_jax.parallel import accelerators
from trialgpt_jax.training import compile_times, plan
from trialgpt_jax.training.program import Program


@pytest.fixture
def program(store):
    return Program(small_config(store))


def memory(monkeypatch, n_bytes):
    monkeypatch.setattr(accelerators, "memory_bytes", lambda device: n_bytes)


def test_a_state_beyond_the_memory_of_a_device_is_refused_from_its_shapes(program, monkeypatch):
    def compiled(self):
        raise AssertionError

    monkeypatch.setattr(Program, "train_step", property(compiled))
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in plan.jax.tree.leaves(program.layout))
    memory(monkeypatch, needed)
    plan.check_state(program)
    memory(monkeypatch, None)  # a chip that is not listed
    plan.check_state(program)
    memory(monkeypatch, needed - 1)
    # follows: over more devices with mesh.fsdp=-1, or make the model smaller
    with pytest.raises(UserError, match=r"per device, but it has .*model\.n_layer"):
        plan.check_state(program)
    program.config.model.n_layer = 1
    plan.check_state(Program(program.config))


def test_claimed_sizes_are_refused_without_taking_memory(store, monkeypatch):
    config = small_config(store)
    config.model.update({"vocab_size": 2**24, "n_embd": 65536, "n_layer": 1})  # 4 TiB of embeddings
    with pytest.raises(UserError, match="parameters and optimizer state take"):
        plan.check_state(Program(config))
    monkeypatch.setattr(accelerators, "host_bytes", lambda: 1000)
    config = small_config(store)
    memory(monkeypatch, None)
    # follows: lower train.batch_size
    with pytest.raises(UserError, match=r"token ids of a batch.*lower train\.batch_size"):
        plan.check_state(Program(config))
    config.train.batch_size = 4
    plan.check_state(Program(config))


def test_a_plan_that_does_not_fit_is_refused_on_an_accelerator_and_by_a_dry_run(program, monkeypatch):
    sizes = {"argument_size_in_bytes": 100, "temp_size_in_bytes": 50, "output_size_in_bytes": 90}
    compiled = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**sizes, alias_size_in_bytes=80))
    monkeypatch.setattr(Program, "train_step", compiled)
    memory(monkeypatch, 160)
    assert "fit" not in plan.check_memory(program, strict=True)
    memory(monkeypatch, 159)
    assert plan.check_memory(program, strict=False).startswith("warning: memory per device")
    with pytest.raises(UserError, match=r"which does not fit; raise train\.accumulate_steps"):
        plan.check_memory(program, strict=True)
    gpu = types.SimpleNamespace(platform="gpu")
    program.mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=[gpu]))
    with pytest.raises(UserError, match="which does not fit"):
        plan.check_memory(program, strict=False)


def test_the_usual_time_is_that_of_the_last_compilation_without_the_cache(program, monkeypatch):
    kept, clock = {}, [0.0]
    monkeypatch.setattr(compile_times, "read", lambda: dict(kept))
    monkeypatch.setattr(compile_times, "write", kept.update)
    monkeypatch.setattr(plan.time, "monotonic", lambda: clock[0])
    for seconds, expected in ((20, 20), (90, 90), (1, 90), (50, 50)):  # disturbed, from JAX's cache, without it

        def check_memory(*_, seconds=seconds):
            clock[0] += seconds
            return ""

        monkeypatch.setattr(plan, "check_memory", check_memory)
        program.config.eval.every_steps = 0
        plan.compile_steps(program, strict=False)
        assert list(kept.values()) == [expected]


def test_the_plan_says_epochs_shares_and_disk(store, program):
    split = open_store(str(store)).split("train")
    text = plan.describe(program, open_store(str(store)))
    assert f"{20 * 8 * 32 / split.n_tokens:.2g} epochs of {split.n_tokens:,} tokens" in text
    assert "a checkpoint takes" in text and "the run keeps at most 3" in text and "warning" not in text
    program.config.checkpoint.keep_last = 10**9  # "keep all": 20 steps save 4
    assert "the run keeps at most 4" in plan.describe(program, open_store(str(store)))
    program.config.train.steps = 2_000_000
    # follows: tokens; give more text, or make the run shorter
    epochs = 2_000_000 * 8 * 32 / split.n_tokens
    assert f"warning: {epochs:,.0f} epochs of {split.n_tokens:,} tokens" in plan.describe(
        program, open_store(str(store))
    )
    text = plan.describe(program, open_store(f"{store}:3,{store}:1"))
    assert f"  75.0% from {store}: " in text and f"  25.0% from {store}: " in text


def test_the_memory_of_a_cgroup_and_of_the_process_counts(tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text("0::/job/part\n")
    (tmp_path / "job" / "part").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("123456\n")
    (tmp_path / "job" / "part" / "memory.max").write_text("max\n")
    assert accelerators._cgroup_limits(str(tmp_path / "cgroup"), str(tmp_path)) == [123456]
    (tmp_path / "memory" / "a").mkdir(parents=True)
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text("999\n")
    (tmp_path / "cgroup").write_text("5:cpu:/a\n9:memory:/a\n")
    assert accelerators._cgroup_limits(str(tmp_path / "cgroup"), str(tmp_path)) == [999]
    assert accelerators._cgroup_limits(str(tmp_path / "none"), str(tmp_path)) == []
    monkeypatch.setattr(accelerators, "_cgroup_limits", lambda: [4096])
    assert accelerators.host_bytes() == 4096


def test_wandb_without_its_package_or_a_key_is_refused_before_anything_is_compiled(config, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    plan.check_wandb(config.log)
    config.log.wandb = "project"
    monkeypatch.setitem(sys.modules, "wandb", None)
    # follows: log.wandb is set, but wandb is not installed; `pip install wandb`
    with pytest.raises(UserError, match="pip install wandb"):
        plan.check_wandb(config.log)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    # follows: run `wandb login`, set WANDB_API_KEY, or set
    with pytest.raises(UserError, match=r"no key.*`wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"):
        plan.check_wandb(config.log)
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            plan.check_wandb(config.log)
    monkeypatch.setenv("WANDB_API_KEY", "x")
    for answer, why in ((False, ""), (OSError("no route to host"), r" \(OSError: no route to host\)")):
        library = types.ModuleType("wandb")
        library.login = mock.Mock(side_effect=[answer])
        monkeypatch.setitem(sys.modules, "wandb", library)
        # follows: run `wandb login`, set WANDB_API_KEY, or set
        with pytest.raises(UserError, match=f"does not take the key{why}; run `wandb login`"):
            plan.check_wandb(config.log)
    library.login = mock.Mock(return_value=True)
    plan.check_wandb(config.log)
    library.login.assert_called_once_with(anonymous="never", timeout=30, verify=True)
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")  # as `wandb login` leaves it
    (tmp_path / ".netrc").chmod(0o600)
    plan.check_wandb(config.log)
