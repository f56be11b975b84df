"""Muon: Polar Express and NorMuon against numpy, the work divided among the devices of a mesh, extreme gradients."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command
from flax import linen as nn

from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.training import muon
from trialgpt_jax.training.metrics import flops_per_token
from trialgpt_jax.training.train_step import init_params

# The table that the paper prints, arXiv 2505.16932, Algorithm 1, without its factor of 1.01.
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def on_singular_values(s):
    """What the five polynomials make of singular values at most 1 / 1.01."""
    for a, b, c in PAPER:
        s = s / 1.01
        s = a * s + b * s**3 + c * s**5
    return s


def polar(matrix):
    """Polar Express of one matrix, in numpy, on the side that is given."""
    x = matrix / (1.01 * np.linalg.norm(matrix))
    for a, b, c in PAPER:
        x = x / 1.01
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def matrices(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 2, 8, 8)])
def test_a_stack_is_orthogonalised_as_each_matrix_alone(shape):
    x = matrices(shape) * 10.0 ** matrices((*shape[:-2], 1, 1), 1)  # of different scales
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(muon.orthogonalise)(jnp.asarray(x)))
    assert ours.dtype == np.float64
    for i in np.ndindex(shape[:-2]):
        np.testing.assert_allclose(ours[i], polar(x[i]), atol=1e-12)


def test_singular_values_become_about_one_and_singular_vectors_stay():
    band = on_singular_values(np.geomspace(1e-3, 1 / 1.01, 100_000))
    assert 0.84 < band.min() < 0.85 and 1.12 < band.max() < 1.13, "the worst of the interval that the paper optimises"
    x = matrices((4, 24, 60)).astype(np.float32)
    ours = np.asarray(jax.jit(muon.orthogonalise)(x))
    values = np.linalg.svd(ours, compute_uv=False)
    assert ours.dtype == np.float32 and band.min() - 1e-4 < values.min() and values.max() < band.max() + 1e-4
    u, s, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s /= 1.01 * np.linalg.norm(s, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, u * on_singular_values(s)[:, None] @ vt, atol=2e-5)


def test_accelerators_use_bfloat16():
    lowered = jax.jit(muon.orthogonalise).trace(jnp.ones((2, 16, 16)))
    for platform, dtype in (("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")):
        products = re.findall(
            r"dot_general.*: .* -> tensor<\S*x(\w+)>", lowered.lower(lowering_platforms=(platform,)).as_text()
        )
        assert len(products) == 15 and set(products) == {dtype}, platform


def test_gradients_of_any_scale_give_an_update_of_the_same_size():
    gradient = matrices((2, 6, 9)).astype(np.float32)
    gradient[0, :, 3] = 0  # a neuron without a gradient
    optimizer = muon.scale_by_muon(0.95)
    state, update = optimizer.init(gradient), jax.jit(optimizer.update)
    expected, _ = update(gradient, state)
    assert not np.asarray(expected)[0, :, 3].any()
    for scale in (0.0, 1e-30, 1e30):
        ours, after = update(gradient * np.float32(scale), state)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
        np.testing.assert_allclose(ours, expected if scale else np.zeros_like(gradient), atol=2e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_equals_numpy(nesterov):
    beta = 0.9
    optimizer = muon.scale_by_muon(beta, nesterov=nesterov)
    shapes = {"tall": (2, 12, 5), "wide": (3, 4, 10)}
    with jax.enable_x64(True):
        state = optimizer.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
        momentum = {name: np.zeros(shape) for name, shape in shapes.items()}
        for step in range(4):
            gradients = {name: matrices(shape, step) for name, shape in shapes.items()}
            ours, state = jax.jit(optimizer.update)(gradients, state)
            for name, gradient in gradients.items():
                momentum[name] = beta * momentum[name] + (1 - beta) * gradient
                ahead = beta * momentum[name] + (1 - beta) * gradient if nesterov else momentum[name]
                for layer, matrix in enumerate(ahead):
                    np.testing.assert_allclose(np.asarray(ours[name][layer]), polar(matrix), atol=1e-12)
        assert jax.tree.leaves(state.momentum)[0].dtype == np.float64


def test_updates_are_scaled_by_the_shape():
    updates = {"wide": np.ones((2, 4, 36)), "tall": np.ones((2, 36, 4))}
    scaled = muon.scale_by_shape(updates)
    np.testing.assert_allclose([scaled["wide"][0, 0, 0], scaled["tall"][0, 0, 0]], [3.0, 1.0])


def test_of_a_step_of_half_a_million_tokens_the_orthogonalisation_is_less_than_half_a_percent():
    gpt = GPTConfig(vocab_size=50304)  # GPT-2 124M
    params = nn.unbox(jax.eval_shape(lambda: init_params(gpt, 0)))
    kernels = [leaf for path, leaf in jax.tree.leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    traced = [jax.jit(muon.orthogonalise).trace(kernel) for kernel in kernels]
    flops = sum(each.lower(lowering_platforms=("tpu",)).cost_analysis()["flops"] for each in traced)
    assert 0.0035 < flops / (flops_per_token(params, gpt) * 480 * 1024) < 0.0045


# Prints, per mesh: the largest difference from one device, FLOPs per device, elements of the largest all-gather.
_MESHES = """
import json, re
import jax, numpy as np
from jax.sharding import NamedSharding
from trialgpt_jax.parallel.sharding import make_mesh, spec
from trialgpt_jax.training import muon

names = {"first": ("layers", "embed", "heads"), "second": ("layers", "heads_in", "hidden")}
rng = np.random.default_rng(0)
gradients = {"first": rng.normal(size=(5, 16, 32)), "second": rng.normal(size=(5, 32, 16))}
gradients = jax.tree.map(np.float32, gradients)
optimizer, results, one = muon.scale_by_muon(0.95), {}, None
for sizes in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)), jax.devices()[: np.prod(sizes)])
    layout = {name: NamedSharding(mesh, spec(*axes)) for name, axes in names.items()}

    def step(gradients):
        return optimizer.update(gradients, optimizer.init(gradients))[0]

    with jax.set_mesh(mesh):
        placed = jax.device_put(gradients, layout)
        compiled = jax.jit(step, out_shardings=layout).lower(placed).compile()
    ours = jax.device_get(compiled(placed))
    one = one or ours
    gathered = re.findall(r"= \\w+\\[([\\d,]+)\\]\\S* all-gather", compiled.as_text())
    results["x".join(map(str, sizes))] = {
        "difference": max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours, one))),
        "flops": compiled.cost_analysis()["flops"],
        "gathered": max([0, *(int(np.prod(list(map(int, dims.split(","))))) for dims in gathered)]),
    }
print(json.dumps(results))
"""


def test_devices_of_a_mesh_divide_the_matrices_and_none_gathers_a_stack():
    """Five layers on eight devices, which do not divide them."""
    _, env = command("train", devices=8)
    script = subprocess.run(
        [sys.executable, "-c", _MESHES], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert script.returncode == 0, script.stderr[-2000:]
    results = json.loads(script.stdout.splitlines()[-1])
    one = results.pop("1x1x1")
    for mesh, result in results.items():
        assert result["difference"] < 1e-5, mesh
        assert result["flops"] < one["flops"] / 3.5, f"{mesh}: one matrix of five per device, and the rest"
        assert result["gathered"] < 5 * 16 * 32, mesh
