"""Spikes of the loss: which steps stand out from the good ones before them, decided inside the compiled step.

A step is a spike when its loss or its gradient norm exceeds mean + k standard deviations over the last 128 good steps. Before
there are as many, none is. Values of skipped steps, finite or not, stay out of the window.
"""

import flax
import jax
import jax.numpy as jnp

WINDOW = 128


@flax.struct.dataclass
class Window:
    """Loss and gradient norm of the last good steps; a part of the training state, so that a resumed run decides alike."""

    values: jax.Array  # float32 [2, WINDOW]: losses and gradient norms, step n of the good ones at n % WINDOW
    good_steps: jax.Array  # int32: so many went in

    @classmethod
    def empty(cls) -> "Window":
        return cls(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def stands_out(window: Window, loss: jax.Array, grad_norm: jax.Array, sigmas: float) -> jax.Array:
    """Whether a finite step is a spike, bool []: beyond mean + `sigmas` population standard deviations of a full window."""
    new = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    mean, deviation = window.values.mean(axis=1), window.values.std(axis=1)
    return (window.good_steps >= WINDOW) & jnp.any(new > mean + sigmas * deviation)


def push(window: Window, loss: jax.Array, grad_norm: jax.Array, good: jax.Array) -> Window:
    """The window with this step in place of its oldest, where the step is `good`."""
    new = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    pushed = window.values.at[:, window.good_steps % WINDOW].set(new)
    return Window(jnp.where(good, pushed, window.values), window.good_steps + good)
