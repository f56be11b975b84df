"""One builder: a config and devices in; the model, mesh, optimizer, layouts and compiled steps out."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from trialgpt_jax import UserError
from trialgpt_jax.console import say
from trialgpt_jax.data import batches
from trialgpt_jax.data.token_store import Mixture, Split, TokenStore
from trialgpt_jax.data.vocabulary import FILE, FROM
from trialgpt_jax.live_line import task
from trialgpt_jax.model.config import GPTConfig
from trialgpt_jax.parallel import accelerators, processes
from trialgpt_jax.parallel.axes import mesh_sizes
from trialgpt_jax.parallel.host_memory import MEMORY
from trialgpt_jax.parallel.sharding import (
    RULES,
    batch_sharding,
    local_blocks,
    make_mesh,
    put_batch,
    replicated,
    shard_shapes,
)
from trialgpt_jax.training import horizon, hub_model, metrics
from trialgpt_jax.training import train_step as steps
from trialgpt_jax.training.optimizer import always_finite, groups_of, learning_rates, make_optimizer
from trialgpt_jax.training.train_step import TrainState


class Program:
    """What a config becomes on given devices. Layouts and compiled steps are made when first read, and kept.

    Args:
      config: a valid config, see `config.validate`.
      devices: default: all devices. They may belong to a chip that is not attached.
      mesh: default: `config.mesh` over `devices`.

    Attributes:
      config: the config, with numbers of steps in place of what gives them, see `horizon.resolve`.
      gpt, mesh, optimizer: its model, the device mesh and the optax optimizer.
      layout: the TrainState as ShapeDtypeStructs with shardings; nothing is allocated.
      params_layout: the same of the parameters alone.
      train_step: compiled, (state, tokens [batch_size, T + 1]) -> (state, metrics); the state is donated.
      eval_step: compiled, (params, tokens [eval_batch_size, T + 1], valid [eval_batch_size]) -> (nats, tokens).

    Raises:
      UserError: an attention kernel, dtype, remat or mesh that these devices do not support.
    """

    def __init__(self, config: ConfigDict, devices: Sequence[jax.Device] | None = None, mesh: Mesh | None = None):
        if mesh is None:
            devices = jax.devices() if devices is None else devices
            mesh = make_mesh(mesh_sizes(config.mesh, len(devices)), devices)
        self.config = config = _with_steps(config)
        self.mesh, self._first_step = mesh, True
        self.gpt = gpt_config(config, mesh.devices.flat[0].platform)
        accelerators.check_dtype(self.gpt.dtype, mesh.devices.flat[0])
        for field, name in (("train.dtype", self.gpt.dtype), ("train.param_dtype", self.gpt.param_dtype)):
            if jax.dtypes.canonicalize_dtype(name) != jnp.dtype(name):
                raise UserError(f"{field} is {name}; call config.set_precision(config) first, or set JAX_ENABLE_X64=1")
        self.optimizer = make_optimizer(config.optim, config.train.steps)

    @functools.cached_property
    def _boxed_params(self):
        return jax.eval_shape(functools.partial(steps.init_params, self.gpt, 0))

    @functools.cached_property
    def params_layout(self):
        return shard_shapes(self._boxed_params, self.mesh)

    @functools.cached_property
    def layout(self) -> TrainState:
        new = functools.partial(steps.new_state, optimizer=self.optimizer, skip_spikes=self.config.train.skip_spikes)
        return shard_shapes(jax.eval_shape(new, self._boxed_params), self.mesh)

    @property
    def eval_batch_size(self) -> int:
        """Sequences of a microbatch, rounded up to a multiple of the devices that share the batch."""
        train, shards = self.config.train, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return -(-train.batch_size // train.accumulate_steps // shards) * shards

    def init_state(self) -> TrainState:
        """The state before step 0, created on the devices that hold it."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.layout)
        seed, skip_spikes = self.config.seed, self.config.train.skip_spikes
        with self._mesh_in_use():
            init = functools.partial(steps.init_state, self.gpt, self.optimizer, seed, skip_spikes)
            return jax.jit(init, out_shardings=shardings)()

    @functools.cached_property
    def train_step(self) -> jax.stages.Compiled:
        config, train = self.config, self.config.train
        step = functools.partial(
            steps.train_step,
            config=self.gpt,
            optimizer=self.optimizer,
            accumulate_steps=train.accumulate_steps,
            seed=config.seed,
            skip_spikes=train.skip_spikes,
            learning_rates=learning_rates(config.optim, train.steps, groups_of(self.params_layout)),
            check_update=not always_finite(config.optim),
        )
        layout = self.layout
        shardings = jax.tree.map(lambda leaf: leaf.sharding, layout), replicated(self.mesh)
        with self._mesh_in_use():
            jitted = jax.jit(step, donate_argnums=0, out_shardings=shardings)
            return self._compile(jitted.lower(layout, self._tokens(train.batch_size)))

    def step(self, state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        """Runs `train_step`, and on CPU plans the memory that steps reuse."""
        if self._first_step:
            MEMORY.reserve(self.train_step)
            self._first_step = False
        result = self.train_step(state, batch)
        MEMORY.trim()
        return result

    @functools.cached_property
    def eval_step(self) -> jax.stages.Compiled:
        size, params = self.eval_batch_size, self.params_layout
        valid = jax.ShapeDtypeStruct((size,), jnp.bool_, sharding=batch_sharding(self.mesh))
        with self._mesh_in_use():  # in which no layout can be made
            jitted = jax.jit(functools.partial(steps.eval_step, config=self.gpt), out_shardings=replicated(self.mesh))
            return self._compile(jitted.lower(params, self._tokens(size), valid))

    def evaluate(
        self, params, eval_batches: Iterable[tuple[np.ndarray, np.ndarray]], total: int = 0
    ) -> tuple[float, int]:
        """Mean loss over the valid rows of `eval_batches`.

        Args:
          params: the parameters.
          eval_batches: this process's int32 tokens [local_batch, T + 1] and bool valid rows [local_batch].
          total: their number, for the progress; 0 = not known.

        Returns:
          Nats per token and the number of tokens, over all processes.
        """
        sharding = batch_sharding(self.mesh)
        totals, pending = np.zeros(2), None
        step = self.eval_step
        with task("evaluating", total) as shown:
            for tokens, valid in eval_batches:
                sums = step(params, put_batch(tokens, sharding), put_batch(valid, sharding))
                if pending:  # fetched one batch late: the device does not wait, and at most two batches are on it
                    totals += jax.device_get(pending)
                    shown.advance()
                pending = sums
            totals += jax.device_get(pending)
        return float(totals[0] / totals[1]), int(totals[1])

    def train_batches(self, split: Split | Mixture, start_step: int) -> Iterator[np.ndarray]:
        """This process's part of the batches from `start_step` on, see `data.batches.train_batches`."""
        config = self.config
        return batches.train_batches(
            split,
            block_size=self.gpt.block_size,
            batch_size=config.train.batch_size,
            seed=config.seed,
            shuffle=config.data.shuffle,
            start_step=start_step,
            blocks=local_blocks(batch_sharding(self.mesh)),
        )

    def eval_batches(self, split: Split | Mixture, n_batches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This process's part of `n_batches` batches of train.batch_size sequences; 0 = the whole split."""
        return batches.eval_batches(
            split,
            block_size=self.gpt.block_size,
            batch_size=self.eval_batch_size,
            n_batches=-(-n_batches * self.config.train.batch_size // self.eval_batch_size),
            blocks=local_blocks(batch_sharding(self.mesh)),
        )

    def count_eval_batches(self, split: Split | Mixture, n_batches: int) -> int:
        """The number of batches of `eval_batches`."""
        whole = -(-sum(member.n_windows(self.gpt.block_size) for member, _ in split.members) // self.eval_batch_size)
        asked = -(-n_batches * self.config.train.batch_size // self.eval_batch_size)
        return min(whole, asked or whole)

    def _tokens(self, batch_size: int) -> jax.ShapeDtypeStruct:
        shape = (batch_size, self.gpt.block_size + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(self.mesh))

    @contextlib.contextmanager
    def _mesh_in_use(self) -> Iterator[None]:
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(RULES):
            yield

    def _compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        compiled = lowered.compile(accelerators.compiler_options(self.mesh.devices.flat[0].platform))
        processes.meet()
        return compiled


def run_mesh(config: ConfigDict) -> Mesh:
    """The run's mesh over all devices if they suffice for it, otherwise all of them along data."""
    try:
        return make_mesh(mesh_sizes(config.mesh, jax.device_count()))
    except UserError as error:
        say(f"{error}; using mesh.data={jax.device_count()} instead")
        return make_mesh({"data": jax.device_count(), "fsdp": 1, "tensor": 1})


def params_layout(gpt: GPTConfig, mesh: Mesh):
    """The parameters of a model as ShapeDtypeStructs with their shardings on `mesh`."""
    return shard_shapes(jax.eval_shape(functools.partial(steps.init_params, gpt, 0)), mesh)


def gpt_config(config: ConfigDict, platform: str) -> GPTConfig:
    """The model of a config on a platform ("cpu", "gpu" or "tpu"), which decides dtype, attention kernel and unrolling.

    Raises:
      UserError: the platform does not support the attention kernel or the remat that the config names.
    """
    train = config.train
    model = GPTConfig(**config.model)
    dtype = accelerators.compute_dtype(train.dtype, platform)
    kernel = accelerators.attention_kernel(
        train.attention,
        platform,
        dtype=dtype,
        head_dim=model.head_dim,
        block_size=model.block_size,
        dropout=model.dropout,
    )
    if train.remat == "offload" and platform == "cpu":
        raise UserError("train.remat=offload moves activations to host memory, where a CPU has them already; use block")
    # Unrolled layers are faster, but remat needs the loop (docs/performance.md#scan-unroll).
    unrolled = train.remat == "none" and (platform == "gpu" or (platform == "cpu" and model.n_layer <= 12))
    return dataclasses.replace(
        model,
        dtype=dtype,
        param_dtype=train.param_dtype,
        attention=kernel,
        remat=train.remat,
        scan_unroll=train.scan_unroll or (model.n_layer if unrolled else 1),
    )


def resolve(config: ConfigDict, store: TokenStore) -> ConfigDict:
    """The config with vocabulary size and tokenizer of the token store that it trains on, and a number of steps.

    Raises:
      UserError: the store has ids beyond model.vocab_size, or a length of the run that `horizon` refuses.
    """
    config = config.copy_and_resolve_references()
    if config.data.tokenizer != store.tokenizer:  # later commands take the tokenizer's name from the workdir's config
        if not config.data.tokenizer.startswith((FROM, FILE)):  # their real names are in the store
            named = f"data.tokenizer={config.data.tokenizer}"
            say(f"{named}, but {store.folder} was made with {store.tokenizer}; that is used")
        config.data.tokenizer = store.tokenizer
    vocab_size = config.model.vocab_size = config.model.vocab_size or store.vocab_size
    if store.vocab_size > vocab_size:
        right = f"set model.vocab_size={store.vocab_size}, or 0 for the store's"
        if source := config.train.init_from:
            folder = hub_model.local_folder(source, "train.init_from")
            right = f"preprocess the text with that of train.init_from: --config.data.tokenizer=from:{folder}"
        raise UserError(
            f"{store.folder}: tokenizer {store.tokenizer} has {store.vocab_size} ids, beyond "
            f"model.vocab_size={vocab_size}; {right}"
        )
    if store.vocab_size < vocab_size:
        unused = vocab_size - store.vocab_size
        say(
            f"model.vocab_size={vocab_size}, but tokenizer {store.tokenizer} has only {store.vocab_size} ids; "
            f"the other {unused} are unused"
        )
    resolved = _with_steps(config)
    horizon.check(resolved, given=config)
    return resolved


def _with_steps(config: ConfigDict) -> ConfigDict:
    """`horizon.resolve` with the parameters of the config's model."""

    def count_parameters() -> int:
        model = GPTConfig(**config.model)
        return metrics.parameter_count(jax.eval_shape(functools.partial(steps.init_params, model, 0)))

    return horizon.resolve(config, count_parameters)
