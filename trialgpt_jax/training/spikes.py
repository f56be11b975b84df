"""Loss spikes, detected inside the compiled step.

A step is a spike if its loss or gradient norm exceeds mean + k standard deviations of the last 128 good steps. No step
is a spike before there are 128. Values of skipped steps do not enter the window.
"""

import flax
import jax
import jax.numpy as jnp

WINDOW = 128


@flax.struct.dataclass
class Window:
    """Loss and gradient norm of the last good steps. In the training state, so that a resumed run decides equally."""

    values: jax.Array  # float32 [2, WINDOW]: losses and gradient norms; good step n is at n % WINDOW
    good_steps: jax.Array  # int32: number of good steps so far

    @classmethod
    def empty(cls) -> "Window":
        return cls(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(window: Window, loss: jax.Array, grad_norm: jax.Array, sigmas: float) -> jax.Array:
    """Whether a finite step exceeds mean + `sigmas` population standard deviations of a full window, bool []."""
    new = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    mean, deviation = window.values.mean(axis=1), window.values.std(axis=1)
    return (window.good_steps >= WINDOW) & jnp.any(new > mean + sigmas * deviation)


def push(window: Window, loss: jax.Array, grad_norm: jax.Array, good: jax.Array) -> Window:
    """The window in which this step replaces the oldest one, if the step is `good`."""
    new = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    pushed = window.values.at[:, window.good_steps % WINDOW].set(new)
    return Window(jnp.where(good, pushed, window.values), window.good_steps + good)
