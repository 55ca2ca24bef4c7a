"""A train step of SNGP-like residual networks, clipped below one, beside hand-written peers.

Blocks ``x + f(x)`` whose layers have norms of at most ``BOUND`` (Liu et al. 2020, section 3.1,
https://arxiv.org/abs/2006.10108); convolutions by the operator's norm, with zeros at the border.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import sn_jax.linen
from experiments.bench.models import Wrap, plain
from experiments.bench.step import train_step
from experiments.bench.timing import Elsewhere, Row, compare, interleaved
from experiments.bench.torch_client import TorchFailed, torch_client

BOUND = 0.95
# Twice a layer's initial scale, so that all norms are above the bound and the clip is at work.
SCALE = 2.0
# Steps before the losses are compared, and how far they may be apart: the vectors of each start
# elsewhere, and one iteration a step has not brought all of them to the end by then.
WARM, AGREE = 40, 0.1


def rows(quick: bool) -> Iterator[list[Row]]:
    """Six dense blocks, and a block of a wide residual network."""
    key = jax.random.key(1)
    dense = jax.random.normal(key, (32, 32) if quick else (128, 128))
    images = jax.random.normal(key, (4, 8, 8, 8) if quick else (64, 16, 16, 64))
    with torch_client() as torch:
        yield case(f"residual MLP, width {dense.shape[1]}, batch {len(dense)}", dense, 6, torch)
        name = f"WRN block, {'x'.join(map(str, images.shape[1:]))}, batch {len(images)}"
        yield case(name, images, 2, torch)


def case(name: str, x: jax.Array, layers: int, torch: Any) -> list[Row]:
    """Time a step of Adam by each; x is (n, width) or (n, height, width, channels)."""
    model = partial(Blocks, layers=layers)
    clip = partial(
        sn_jax.linen.SpectralNorm, bound=BOUND, mode="clip", gradient="stop", conv="operator"
    )
    calls: dict[str, Any] = {
        "sn_jax": train_step(model(wrap=clip), x),
        "no SN": train_step(model(), x),
        "equinox by hand": equinox_step(x, layers),
    }
    losses = {key: _loss_after_warm(call) for key, call in calls.items()}
    if torch is not None:
        try:
            kernels = [np.asarray(w) for w in kernels_of(x, layers)]
            torch.ask("sngp", "torch by hand", kernels, np.asarray(x), BOUND)
            torch.ask("train", "torch by hand", WARM)
            losses["torch by hand"] = float(torch.ask("results", "torch by hand")[0])
            calls["torch by hand"] = Elsewhere(partial(torch.ask, "train", "torch by hand", 1))
        except TorchFailed as error:
            print(f"torch by hand is left out: {error}", file=sys.stderr)
    for peer, loss in losses.items():
        if peer != "no SN" and abs(loss - losses["sn_jax"]) > AGREE * abs(loss):
            raise AssertionError(f"{name}: the loss is {losses['sn_jax']}, and {loss} by {peer}")
    start = np.median(interleaved({"no SN": calls["no SN"]}, rounds=2)["no SN"])
    rounds = int(np.clip(20 / start / len(calls), 5, 200))
    return compare("sngp", name, interleaved(calls, rounds=rounds))


def _loss_after_warm(call: Callable[[], jax.Array]) -> float:
    for _ in range(WARM - 1):
        call()
    return float(call())


def _init(shape: tuple[int, ...]) -> jax.Array:
    """Of a kernel, the same for all: of unit scale for outputs of unit scale, times ``SCALE``."""
    fan_in = np.prod(shape[:-1])
    return SCALE * jax.random.normal(jax.random.key(len(shape)), shape) / jnp.sqrt(fan_in)


def kernels_of(x: jax.Array, layers: int) -> list[jax.Array]:
    """Of every layer: dense (in, out), or taps 3x3 (3, 3, in, out)."""
    width = x.shape[-1]
    shape = (width, width) if x.ndim == 2 else (3, 3, width, width)
    return [_init(shape) for _ in range(layers)]  # no buffer twice, for they are donated


class Blocks(nn.Module):
    """``x + relu(dense(x))`` in turn; of images one block ``x + conv(relu(conv(relu(x))))``."""

    layers: int
    wrap: Wrap = plain

    @nn.compact
    def __call__(self, x):
        def init(_, shape, dtype):
            return _init(shape).astype(dtype)

        if x.ndim == 2:
            for _ in range(self.layers):
                x = x + nn.relu(self.wrap(nn.Dense(x.shape[-1], kernel_init=init))(x))
            return x
        y = x
        for _ in range(self.layers):
            y = self.wrap(nn.Conv(x.shape[-1], (3, 3), kernel_init=init))(nn.relu(y))
        return x + y


# As one would write it without a library for it.


class _Layer(eqx.Module):
    weight: jax.Array
    bias: jax.Array

    def linear(self, x):
        if x.ndim == 2:
            return x @ self.weight
        return jax.lax.conv_general_dilated(
            x, self.weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def __call__(self, x, u):
        fixed = jax.lax.stop_gradient(self)
        out, transpose = jax.vjp(fixed.linear, u)
        (u,) = transpose(out)
        u = jax.lax.stop_gradient(u / jnp.linalg.norm(u))
        sigma = jnp.linalg.norm(fixed.linear(u))
        return self.linear(x) / jnp.maximum(1, sigma / BOUND) + self.bias, u


def equinox_step(x: jax.Array, layers: int) -> Callable[[], jax.Array]:
    """A compiled step of Adam with everything donated; returns its loss."""
    model = [_Layer(w, jnp.zeros(x.shape[-1])) for w in kernels_of(x, layers)]
    us = [jax.random.normal(jax.random.key(i), (1, *x.shape[1:])) for i in range(layers)]
    optimizer = optax.adam(1e-4)
    state: list[Any] = [model, us, optimizer.init(eqx.filter(model, eqx.is_array))]

    def forward(model, us, x):
        y, new = x, []
        for layer, u in zip(model, us, strict=True):
            if x.ndim == 2:
                h, u = layer(y, u)
                y = y + jax.nn.relu(h)
            else:
                y, u = layer(jax.nn.relu(y), u)
            new.append(u)
        y = y if x.ndim == 2 else x + y
        return jnp.mean(jnp.square(y - 1)), new

    @eqx.filter_jit(donate="all-except-first")
    def step(x, model, us, opt_state):
        (loss, us), grads = eqx.filter_value_and_grad(forward, has_aux=True)(model, us, x)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return eqx.apply_updates(model, updates), us, opt_state, loss

    def call():
        *state[:], loss = step(x, *state)
        return loss

    return call
