"""Schedules, clipping, groups of weights and their optimizers against torch and numpy, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_config
from model_options import random_params

from trialgpt_jax import UserError
from trialgpt_jax.config import default_config, validate
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel.sharding import single_device
from trialgpt_jax.training import muon, train_step
from trialgpt_jax.training.optimizer import always_finite, learning_rates, make_optimizer, schedule
from trialgpt_jax.training.program import Program

# Every kind of parameter: an untied head, biases, two norms per layer and one on the embeddings.
CONFIG = GPTConfig(
    vocab_size=5,
    block_size=3,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=8,
    tie_embeddings=False,
    embed_norm=True,
    activation="swiglu",
    dtype="float64",
    param_dtype="float64",
)
STEPS = 12


def optim(**changes):
    config = default_config().optim
    config.update({"learning_rate": 0.1, "warmup_steps": 3, "weight_decay": 0.2, "clip_norm": 0.0} | changes)
    return config


def named(tree):
    """{"blocks/mlp/c_fc/kernel": array, ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def gradients(params, scale=1.0):
    """Gradients of STEPS steps, trees of numpy arrays of very different magnitudes."""
    rng = np.random.default_rng(7)

    def draw(p):
        return rng.normal(0, scale * 10.0 ** rng.uniform(-2, 1), p.shape)

    return [jax.tree.map(draw, params) for _ in range(STEPS)]


def run(config, params, all_gradients):
    """The parameters after each step of `make_optimizer(config)`."""
    optimizer = make_optimizer(config, STEPS)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)

        @jax.jit
        def step(params, state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        state, out = optimizer.init(params), []
        for gradient in all_gradients:
            params, state = step(params, state, gradient)
            out.append(named(params))
    return out


def rate(config, peak, n):
    """The learning rate of update n, counted from 0."""
    if n < config.warmup_steps:
        return peak * (n + 1) / (config.warmup_steps + 1)
    low, done = config.min_lr_ratio, (n - config.warmup_steps) / (STEPS - config.warmup_steps)
    if config.schedule == "cosine":
        return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))
    if config.schedule == "linear":
        return peak * (1 - done * (1 - low))
    if config.schedule == "wsd":
        length = min(round(config.decay_fraction * STEPS), STEPS - config.warmup_steps)
        return peak * (1 - max(0.0, (n - (STEPS - length)) / length) * (1 - low))
    return peak


def assert_close(ours, expected, tolerance=1e-12):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == np.float64
        assert np.abs(value - expected[name]).max() < tolerance * max(1, np.abs(expected[name]).max()), name


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("low", [0.0, 0.1, 1.0])
def test_schedules_equal_their_formulas(kind, warmup, low):
    config = optim(schedule=kind, warmup_steps=warmup, min_lr_ratio=low, decay_fraction=0.25)
    with jax.enable_x64(True):
        ours = [float(schedule(config, STEPS, 0.3)(jnp.int32(n))) for n in range(STEPS + 1)]
    np.testing.assert_allclose(ours, [rate(config, 0.3, n) for n in range(STEPS + 1)], rtol=1e-12, atol=1e-15)
    assert ours[0] > 0, "the first update has a rate of zero"
    assert kind == "constant" or ours[STEPS] == pytest.approx(0.3 * low, abs=1e-15)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_wsd_decays_over_at_least_one_step_and_at_most_all_after_the_warmup(fraction):
    config = optim(schedule="wsd", warmup_steps=4, min_lr_ratio=0.0, decay_fraction=fraction)
    rates = [float(schedule(config, STEPS, 1.0)(n)) for n in range(STEPS + 1)]
    first = {0.0: STEPS - 1, 1.0: 4}[fraction]
    np.testing.assert_allclose(
        rates[4:], [1 - max(0, n - first) / (STEPS - first) for n in range(4, STEPS + 1)], atol=1e-6
    )


# Rates, decays and betas that differ in every group, and values that are inherited.
GROUPS = {
    "matrices": {"learning_rate": 0.03, "weight_decay": 0.4},
    "embedding": {"learning_rate": 0.3, "weight_decay": 0.0, "b1": 0.8},
    "head": {"b2": 0.9, "eps": 1e-4},
    "vectors": {"learning_rate": 0.01, "weight_decay": 0.1, "b1": 0.0, "b2": 0.5},
}


def group_of(name):
    """The group of a weight by its name, for the tests."""
    if name.startswith("lm_head"):
        return "head"
    if "embedding" in name:
        return "embedding"
    return "matrices" if name.endswith("kernel") else "vectors"


def group_settings(config, group):
    """Its values, and those of `optim` where it has none; vectors do not decay."""
    inherited = {key: config[key] for key in ("learning_rate", "weight_decay", "b1", "b2", "eps")}
    own = {key: value for key, value in config.groups[group].items() if key != "optimizer" and value != -1}
    return inherited | own


@pytest.mark.parametrize("groups", [{}, GROUPS])
def test_adamw_of_every_group_equals_torchs(groups):
    torch = pytest.importorskip("torch")
    params = random_params(CONFIG)
    config = optim(eps=1e-6, groups=groups)
    tensors = {name: torch.from_numpy(value.copy()) for name, value in named(params).items()}
    # rank within a layer: a norm's scale, stacked over layers, has two dimensions but is a vector
    rank = {name: t.dim() - name.startswith("blocks") for name, t in tensors.items()}
    assert [sum(r >= 2 for r in rank.values()), sum(r < 2 for r in rank.values())] == [3 + 7, 4 * 2 + 7]
    theirs = {}
    for name, tensor in tensors.items():
        s = group_settings(config, group_of(name))
        assert groups or s["weight_decay"] == (config.weight_decay if rank[name] >= 2 else 0.0), "nanoGPT's groups"
        theirs[name] = torch.optim.AdamW([tensor], 1.0, (s["b1"], s["b2"]), s["eps"], s["weight_decay"])
    all_gradients = gradients(params)
    for n, ours in enumerate(run(config, params, all_gradients)):
        for name, gradient in named(all_gradients[n]).items():
            peak = group_settings(config, group_of(name))["learning_rate"]
            theirs[name].param_groups[0]["lr"] = rate(config, peak, n)
            tensors[name].grad = torch.from_numpy(gradient)
            theirs[name].step()
        assert_close(ours, {name: t.numpy() for name, t in tensors.items()})


def test_a_weight_of_no_group_is_refused():
    params = random_params(CONFIG) | {"gates": {"lambda": np.ones(3)}}
    with pytest.raises(UserError, match="weight gates/lambda belongs to no group of optim.groups"):
        make_optimizer(optim(), STEPS).init(params)


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        (
            "head",
            {"learning_rate": -2.0},
            "`optim.groups.head.learning_rate` is -2.0, but must be at least 0 and finite, or -1",
        ),
        (
            "vectors",
            {"b1": 1.0},
            r"`optim.groups.vectors.b1` is 1.0, but must be in \[0, 1\), or -1, which is 0.9 here",
        ),
        ("matrices", {"weight_decay": float("nan")}, "`optim.groups.matrices.weight_decay` is nan, but must be at"),
        ("embedding", {"optimizer": "muon"}, "`optim.groups.embedding.optimizer` is 'muon', but only the group matr"),
        ("matrices", {"optimizer": "muon", "eps": 1e-9}, "`optim.groups.matrices.eps` is 1e-09, but muon has no eps"),
        ("matrices", {"optimizer": "muon", "b2": 0.8}, "`optim.groups.matrices.b2` is 0.8, but muon has no b2"),
        ("head", {"optimizer": "adam"}, "`optim.groups.head.optimizer` is 'adam', not one of .*mean `adamw`"),
    ],
)
def test_wrong_settings_of_a_group_are_refused(group, values, message):
    config = default_config()
    config.model.tie_embeddings = False
    config.optim.groups[group].update(values)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_settings_of_a_group_without_weights_are_refused():
    config = default_config()
    config.optim.groups.head.learning_rate = 0.01
    with pytest.raises(UserError, match="optim.groups.head.learning_rate` is 0.01, but with model.tie_embeddings=True"):
        validate(config)
    config.model.tie_embeddings = False
    validate(config)


def test_all_learning_rates_are_logged():
    config = optim(name="muon", groups={"head": {"learning_rate": 0.004}})
    with jax.enable_x64(True):
        logged = {name: float(each(5)) for name, each in learning_rates(config, STEPS).items()}
    peaks = {"lr": 0.1, "lr/matrices": 0.02, "lr/embedding": 0.1, "lr/head": 0.004, "lr/vectors": 0.1}
    assert logged == pytest.approx({name: rate(config, peak, 5) for name, peak in peaks.items()}, rel=1e-12)
    assert list(learning_rates(optim(), STEPS)) == ["lr"], "one rate for all"
    assert list(learning_rates(config, STEPS, ("embedding", "vectors"))) == ["lr"]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_without_eps_a_gradient_of_zero_or_nearly_zero_gives_a_bounded_update(name, dtype):
    """1e-30 has a square of 0 in float32. A zero is what padding rows get, and ids that no batch has."""
    params = {"wte": {"embedding": np.ones((3, 2), dtype)}, "blocks": {"c_fc": {"kernel": np.ones((2, 4, 4), dtype)}}}
    small = np.array([[0.0, 1e-30], [1e-20, -1e-19], [1e-18, 1.0]], dtype)
    kernel = np.zeros((2, 4, 4), dtype)
    kernel[1, 0] = [0.0, 1e-30, 1e-20, 1.0]
    changes = {"name": name, "eps": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "schedule": "constant"}
    optimizer = make_optimizer(optim(**changes), STEPS)
    with jax.enable_x64(dtype == np.float64):
        gradient = {"wte": {"embedding": jnp.asarray(small)}, "blocks": {"c_fc": {"kernel": jnp.asarray(kernel)}}}
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(gradient, state, params)
            for path, update in named(updates).items():
                assert update.dtype == dtype and np.abs(update).max() < 0.11, path  # the learning rate is 0.1
        assert updates["wte"]["embedding"][0, 0] == 0 and not np.asarray(updates["blocks"]["c_fc"]["kernel"][0]).any()
        np.testing.assert_allclose(updates["wte"]["embedding"][2], [-0.1, -0.1], rtol=0.2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    params = random_params(CONFIG)
    config = optim(name=name, warmup_steps=0, schedule="constant", muon_learning_rate=0.05)
    after = run(config, params, [jax.tree.map(np.zeros_like, params)])[0]
    for path, before in named(params).items():
        factor = 1.0
        if path.endswith(("kernel", "embedding")):
            hidden = path.startswith("blocks") and name == "muon"
            factor -= 0.2 * (0.05 if hidden else 0.1)
        np.testing.assert_allclose(after[path], before * factor, rtol=1e-13, err_msg=path)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_gradients_are_clipped_by_the_global_norm(limit):
    torch = pytest.importorskip("torch")
    params = random_params(CONFIG)
    all_gradients = gradients(params)
    scaled = []
    for gradient in all_gradients:
        leaves = named(gradient)
        norm = math.sqrt(sum((leaf**2).sum() for leaf in leaves.values()))
        assert 0.5 < norm < 1e6
        scaled.append(jax.tree.map(lambda g, norm=norm: g * min(1.0, limit / norm), gradient))
        tensors = [torch.zeros(leaf.shape, dtype=torch.float64) for leaf in leaves.values()]
        for tensor, leaf in zip(tensors, leaves.values(), strict=True):
            tensor.grad = torch.from_numpy(leaf.copy())
        torch.nn.utils.clip_grad_norm_(tensors, limit)
        for tensor, ours in zip(tensors, jax.tree.leaves(scaled[-1]), strict=True):  # torch adds 1e-6 to the norm
            np.testing.assert_allclose(tensor.grad.numpy(), ours, rtol=2e-6)
    # a large eps, because with a small one AdamW's update does not depend on the gradients' scale
    clipped = run(optim(clip_norm=limit, eps=0.1), params, all_gradients)
    for ours, expected in zip(clipped, run(optim(eps=0.1), params, scaled), strict=True):
        assert_close(ours, expected)


def test_muon_updates_the_matrices_of_each_layer_and_adamw_the_rest():
    params = random_params(CONFIG)
    config = optim(name="muon", muon_learning_rate=0.05, muon_momentum=0.9)
    all_gradients = gradients(params)
    by_muon, by_adamw = (run(c, params, all_gradients) for c in (config, optim()))
    direction = muon.scale_by_muon(0.9)  # see test_muon.py

    def matrices(tree):
        return {path: leaf for path, leaf in named(tree).items() if group_of(path) == "matrices"}

    expected = matrices(params)
    with jax.enable_x64(True):
        state = direction.init(jax.tree.map(jnp.asarray, expected))
        for n, ours in enumerate(by_muon):
            updates, state = direction.update(matrices(all_gradients[n]), state)
            for path, update in updates.items():
                scaled = np.asarray(update) * math.sqrt(max(1, update.shape[2] / update.shape[1]))
                expected[path] = expected[path] - rate(config, 0.05, n) * (scaled + 0.2 * expected[path])
            # Newton-Schulz multiplies rounding errors of small singular values by up to 1,000 a step
            assert_close(ours, by_adamw[n] | expected, 1e-7)


def test_muon_updates_are_nearly_orthogonal():
    params = random_params(CONFIG)
    config = optim(name="muon", muon_learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0)
    before, after = named(params), run(config, params, gradients(params)[:1])[0]
    for name in before:
        if name.startswith("blocks") and name.endswith("kernel"):
            for update in before[name] - after[name]:
                values = np.linalg.svd(update, compute_uv=False) / math.sqrt(max(1, update.shape[1] / update.shape[0]))
                assert 0.3 < values.min() and values.max() < 1.3, (name, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "adam"},
            "config field `optim.name` is 'adam', not one of adamw, muon; did you mean `adamw`",
        ),
        (
            {"schedule": "cosin"},
            "config field `optim.schedule` is 'cosin', not one of cosine, .*; did you mean `cosine`",
        ),
        ({"name": "muon", "schedule": "step"}, "config field `optim.schedule` is 'step', not one of cosine, "),
    ],
)
def test_unknown_names_are_refused_also_for_library_callers(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(optim(**changes), STEPS)


def test_updates_need_no_check_only_where_they_are_bounded():
    assert always_finite(optim(name="adamw")) and always_finite(optim(name="muon"))
    assert always_finite(default_config().optim)
    assert always_finite(optim(name="adamw", muon_learning_rate=1e30)), "a rate that is not used"
    for changes in (
        {"learning_rate": 1.1},
        {"name": "muon", "muon_learning_rate": 1e30},
        {"groups": {"embedding": {"learning_rate": 1.1}}},
        {"groups": {"vectors": {"b1": 0.99, "b2": 0.98}}},
        {"weight_decay": 1e3, "learning_rate": 0.01},
        {"b1": 0.99, "b2": 0.98},  # the second moment forgets faster than the first
        {"b2": 1.0 - 1e-7},  # 1 in float32
        {"b1": 1.0 - 1e-7},
        {"name": "lion"},
    ):
        assert not always_finite(optim(**changes)), changes


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5), (0.97, 0.95)])
def test_adamws_update_has_the_bound_on_which_that_relies(b1, b2):
    """The gradients of the worst case: each smaller than the one before by b1 / b2."""
    bound = (1 - b1) / np.sqrt((1 - b2) * (1 - b1**2 / b2))
    optimizer = make_optimizer(
        optim(b1=b1, b2=b2, eps=0.0, weight_decay=0.0, warmup_steps=0, schedule="constant", learning_rate=1.0), STEPS
    )
    largest = 0.0
    with jax.enable_x64(True):
        params = {"wte": {"embedding": np.zeros((1, 1))}}
        for ratio in (b1 / b2 or 0.1, 0.5, 1.0, 1.5):
            state, update = optimizer.init(params), jax.jit(optimizer.update)
            for i in range(60):
                updates, state = update({"wte": {"embedding": jnp.full((1, 1), ratio**-i)}}, state, params)
                largest = max(largest, float(jnp.abs(updates["wte"]["embedding"]).max()))
    assert largest <= max(1.0, bound) * (1 + 1e-6)
    assert largest > 0.2 * bound  # less than 1 because of the bias corrections


@pytest.mark.parametrize(("learning_rate", "checked"), [(3e-3, False), (2.0, True)])
def test_the_step_looks_at_its_update_only_where_that_is_needed(learning_rate, checked, monkeypatch):
    config, calls = small_config("unused"), []
    config.optim.learning_rate = learning_rate
    config.model.n_layer = 1
    monkeypatch.setattr(train_step, "all_finite", lambda tree: calls.append(tree) or jnp.array(True))
    Program(config, mesh=single_device()).train_step  # noqa: B018 - compiles
    assert bool(calls) == checked
