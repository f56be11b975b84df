"""What only a GPU shows: its kernels against plain formulas, and training, resume and generation against the CPU's.

`scripts/bench/gpu.sh` runs these tests on a machine with a GPU; elsewhere they are skipped.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call, overrides, small_config

from trialgpt_jax.model import layers, norms
from trialgpt_jax.model.attention import causal_attention, reference_attention
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.model.decode import split_layers
from trialgpt_jax.model.generate import generate
from trialgpt_jax.model.gpt import GPT, logits
from trialgpt_jax.model.loss import cross_entropy_sum
from trialgpt_jax.model.sampling import Sampling
from trialgpt_jax.parallel.sharding import batch_sharding, put_batch
from trialgpt_jax.training.checkpoint import Checkpoints
from trialgpt_jax.training.program import Program, params_layout
from trialgpt_jax.training.train_step import init_params

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")]


@pytest.fixture(autouse=True)
def exact_float32():
    """Matmuls of float32 are TF32 on a GPU otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def cpu():
    """The CPU as a device; `JAX_PLATFORMS=cuda,cpu` makes it available beside the GPU."""
    return jax.devices("cpu")[0]


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 12, 64), (6, 6, 128), (8, 2, 64)])
def test_cudnn_attention_and_its_gradients_match_the_formula(heads, kv_heads, width):
    rng = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(rng.normal(size=(2, 256, n, width)), jnp.bfloat16) for n in (heads, kv_heads, kv_heads, heads)
    )

    def run(attention, *qkv):
        y, backward = jax.vjp(attention, *qkv)
        return y, *backward(dy.astype(y.dtype))

    found = jax.jit(functools.partial(run, functools.partial(causal_attention, kernel="cudnn")))(q, k, v)
    expected = jax.jit(functools.partial(run, reference_attention))(*(x.astype(jnp.float32) for x in (q, k, v)))
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) < 0.01  # bfloat16 has 8 bits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("softcap", [0.0, 15.0])
def test_the_loss_and_its_gradients_match_the_cpus(dtype, softcap):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, 128, 256)).astype(np.float32)
    head = rng.normal(size=(1024, 256)).astype(np.float32) / 4
    labels = rng.integers(0, 1000, (4, 128)).astype(np.int32)
    labels[1, 5:] = -1

    def run(hidden, head):
        return cross_entropy_sum(hidden, head, labels, 1000, softcap)

    run = jax.jit(jax.value_and_grad(run, (0, 1)))
    narrow = [jnp.asarray(x, dtype) for x in (hidden, head)]
    loss, gradients = run(*narrow)
    with jax.default_device(cpu()):
        expected_loss, expected = run(*(jax.device_put(x, cpu()).astype(jnp.float32) for x in narrow))
    tolerance = 1e-5 if dtype == "float32" else 0.01
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    for x, y in zip(gradients, expected, strict=True):
        assert relative_error(x, y) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "function",
    [
        layers.gelu,
        functools.partial(norms.norm, scale=None, bias=None, eps=1e-5, centred=True),
        functools.partial(norms.norm, scale=None, bias=None, eps=1e-5, centred=False),
    ],
    ids=["gelu", "layernorm", "rmsnorm"],
)
def test_norms_and_gelu_and_their_gradients_match_the_cpus(function, dtype):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(512, 768)), dtype) for _ in range(2))

    def run(x, dy):
        y, backward = jax.vjp(function, x)
        return y, *backward(dy)

    found = jax.jit(run)(x, dy)
    with jax.default_device(cpu()):
        expected = jax.jit(run)(*(jax.device_put(a, cpu()).astype(jnp.float32) for a in (x, dy)))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < (1e-5 if dtype == "float32" else 0.01)


def losses(config, devices, steps):
    """Losses of the first steps of a run on these devices."""
    program = Program(config, devices=devices)
    state, sharding, found = program.init_state(), batch_sharding(program.mesh), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(0, 50, (config.train.batch_size, config.model.block_size + 1)).astype(np.int32)
        state, metrics = program.step(state, put_batch(tokens, sharding))
        found.append(float(metrics["loss"]))
    return np.array(found)


@pytest.mark.parametrize("options", [{}, {"optim.name": "muon", "model.position": "rope", "model.qk_norm": True}])
def test_fifty_steps_in_float32_have_the_cpus_losses_and_in_bfloat16_nearly(options):
    config = small_config("")
    config.optim.learning_rate = 5e-3
    for name, value in options.items():
        section, field = name.split(".")
        config[section][field] = value
    config.train.update({"dtype": "float32", "attention": "xla"})
    expected = losses(config, [cpu()], 50)
    assert expected[-1] < expected[0] - 1
    np.testing.assert_allclose(losses(config, jax.devices()[:1], 50), expected, rtol=1e-3)
    config.train.update({"dtype": "bfloat16", "attention": "auto"})
    np.testing.assert_allclose(losses(config, jax.devices()[:1], 50), expected, rtol=0.03)


def test_greedy_tokens_are_the_cpus():
    config = GPTConfig(vocab_size=500, block_size=128, n_layer=2, n_head=4, n_embd=64)
    found = []
    for device in (jax.devices()[0], cpu()):
        with jax.default_device(device):
            params = params_of(config, device)
            pieces = generate(
                split_layers(params, config),
                config,
                [np.arange(7)],
                max_new_tokens=100,
                num_samples=3,
                sampling=Sampling(temperature=0.0),
            )
            found.append(np.concatenate([piece.tokens for piece in pieces], axis=1))
    np.testing.assert_array_equal(*found)
    hidden = GPT(config).apply({"params": params}, found[0][:1])
    assert (logits(params, config, hidden)[0, :-1].argmax(-1) == found[0][0, 1:]).mean() > 0.9  # cached = uncached


def params_of(config, device):
    """Random parameters, equal on all devices."""
    from flax import linen as nn

    with jax.default_device(cpu()):
        params = nn.unbox(jax.jit(init_params, static_argnums=(0, 1))(config, 0))
    return jax.device_put(params, device)


def test_a_run_that_was_stopped_goes_on_from_the_saved_bits(config, tmp_path, default_file):
    # Scatters and cuDNN's attention add in no fixed order on a GPU, so only what is restored is equal to the bit.
    config.model.update({"n_embd": 64, "n_head": 2})
    runs = {}
    for name, stops in (("whole", (20,)), ("resumed", (10, 20))):
        for steps in stops:
            flags = [*overrides(config), f"--config.train.steps={steps}", f"--workdir={tmp_path / name}"]
            result = call(
                "train",
                f"--config={default_file}",
                *flags,
                "--config.optim.schedule=constant",
                "--allow_config_change=train.steps",
            )
            assert result.returncode == 0, result.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        runs[name] = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert "resumed from checkpoint 10" in result.stderr
    assert runs["whole"].keys() == runs["resumed"].keys()
    np.testing.assert_allclose(list(runs["resumed"].values()), list(runs["whole"].values()), rtol=2e-3)


def test_a_checkpoint_restores_the_saved_bits(config, tmp_path):
    program = Program(config, devices=jax.devices()[:1])
    state = program.init_state()
    checkpoints = Checkpoints(str(tmp_path), say=print)
    checkpoints.save(1, state)
    checkpoints.wait()
    restored = checkpoints.restore(1, program.layout)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_plan_of_gpt2_fits_the_card():
    from trialgpt_jax.config import default_config
    from trialgpt_jax.parallel import accelerators

    config = default_config()
    config.train.update({"batch_size": 8, "accumulate_steps": 1})
    program = Program(config, devices=jax.devices()[:1])
    plan = program.train_step.memory_analysis()
    assert plan.temp_size_in_bytes + plan.argument_size_in_bytes < accelerators.memory_bytes(jax.devices()[0])
    assert jax.tree.leaves(params_layout(program.gpt, program.mesh))[0].sharding.device_set == {jax.devices()[0]}
