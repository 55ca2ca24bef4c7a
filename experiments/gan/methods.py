"""What is done to the discriminator: one entry a method, one mechanism each.

The paper (Miyato et al. 2018, https://arxiv.org/abs/1802.05957) compares most of them in section 4;
its equations are referred to by number.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

import sn_jax

Params = Any  # the discriminator's parameters, a nested dict
MethodState = Any  # whatever the method carries from step to step
Views = Callable[[str], sn_jax.Rules]  # "reshape" or "operator" -> how every kernel acts


class Batch(NamedTuple):
    """What a penalty may look at besides the weights."""

    critic: Callable[[Array], Array]
    """The discriminator as it runs now: images (n, h, w, c) to scores (n,)."""
    real: Array
    fake: Array
    key: Array


class Method(NamedTuple):
    """How a discriminator is constrained. The train step knows nothing else about a method."""

    init: Callable[[Params, Array, Views], MethodState] = lambda params, key, views: {}
    """From the parameters, a key, and how the kernels act."""
    update: Callable[[Params, MethodState], MethodState] = lambda params, state: state
    """Called once per discriminator step, before and outside the loss."""
    apply: Callable[[Params, MethodState], Params] = lambda params, state: params
    """The weights that the network runs with; differentiable, and leaves the state as it is."""
    penalty: Callable[[Params, MethodState, Batch], Array | float] = lambda *_: 0.0
    """Added to the discriminator's loss, times ``strength``."""
    project: Callable[[Params, MethodState, Array], tuple[Params, MethodState]] = (
        lambda params, state, strength: (params, state)
    )
    """Called after initialization and after every update, with ``strength``."""
    norms: Callable[[Params, MethodState], dict[str, Array]] = lambda params, state: {}
    """Its own estimates of the layers' spectral norms by path; empty if it makes none."""
    strength: float | None = None
    """The method's one number, if it has one; ``--strength`` replaces it."""
    axes: tuple[int, ...] = ()
    """Axes of the hidden layers' outputs (n, h, w, c) that are standardized over."""
    kernel_init: Callable[..., Array] | None = None
    """Initializer of the kernels, instead of the network's own."""


# --- Regularizers: on the weights, or on the gradient at the images ----------------------------


def _kernels(params: Params) -> list[Array]:
    """Kernels as (k, features) matrices: the paper's view of a convolution (section 2.1)."""
    return [w.reshape(-1, w.shape[-1]) for w in jax.tree.leaves(params) if w.ndim > 1]


def _gradient_penalty(params: Params, state: MethodState, batch: Batch) -> Array:
    """``E (|grad D(x)| - 1)^2``, x uniform between a real and a generated image.

    Gulrajani et al. (2017), https://arxiv.org/abs/1704.00028, equation 3.
    """
    position = jax.random.uniform(batch.key, (len(batch.real), 1, 1, 1))
    between = batch.real + position * (batch.fake - batch.real)
    gradients = jax.grad(lambda x: jnp.sum(batch.critic(x)))(between)
    norms = optax.safe_norm(gradients.reshape(len(gradients), -1), 1e-12, axis=1)
    return jnp.mean((norms - 1) ** 2)


def _orthonormality(params: Params, state: MethodState, batch: Batch) -> Array:
    """``sum |W^T W - I|_F^2``, transposed where W has more columns than rows.

    Brock et al. (2017), https://arxiv.org/abs/1609.07093, as the paper compares it.
    """

    def distance(w):
        gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
        return jnp.sum((gram - jnp.eye(len(gram), dtype=gram.dtype)) ** 2)

    return sum(map(distance, _kernels(params)))


# --- Weights that are functions of the parameters -----------------------------------------------


def _unit_columns(params: Params, state: MethodState) -> Params:
    """``v / |v|`` for what leads to each output: weight normalization without its scale.

    Salimans & Kingma (2016), https://arxiv.org/abs/1602.07868, equation 2.
    """

    def normalize(w):
        if w.ndim < 2:
            return w
        columns = w.reshape(-1, w.shape[-1])
        return (columns / optax.safe_norm(columns, 1e-30, axis=0)).reshape(w.shape)

    return jax.tree.map(normalize, params)


def _spectral(conv: str) -> Method:
    """Algorithm 1: one power iteration per step on the raw weights; W / sigma in both losses."""
    return Method(
        init=lambda params, key, views: sn_jax.init(params, key, views(conv)),
        update=lambda params, state: sn_jax.spectral_normalize(params, state)[1],
        apply=lambda params, state: sn_jax.spectral_normalize(params, state, n_steps=0)[0],
        norms=sn_jax.spectral_norms,
    )


_NONE = Method()
_SN = _spectral("reshape")  # section 2.1: a convolution's kernel is the (h * w * in, out) matrix

METHODS = {
    "none": _NONE,
    # Arjovsky et al. (2017), https://arxiv.org/abs/1701.07875, algorithm 1.
    "clip": Method(
        project=lambda params, state, c: (jax.tree.map(lambda w: w.clip(-c, c), params), state),
        strength=0.01,
    ),
    # With --loss wasserstein it is WGAN-GP, with --loss non-saturating what the paper calls GAN-GP.
    "gp": Method(penalty=_gradient_penalty, strength=10.0),
    "wn": Method(apply=_unit_columns),
    "bn": Method(axes=(0, 1, 2)),
    "ln": Method(axes=(1, 2, 3)),
    "orthonormal": Method(
        penalty=_orthonormality, strength=0.01, kernel_init=nn.initializers.orthogonal()
    ),
    "l2": Method(
        penalty=lambda params, *_: sum(jnp.sum(w**2) / 2 for w in _kernels(params)), strength=1e-3
    ),
    "lasso": Method(
        penalty=lambda params, *_: sum(jnp.sum(jnp.abs(w)) for w in _kernels(params)),
        strength=1e-4,
    ),
    # Yoshida & Miyato (2017), https://arxiv.org/abs/1705.10941, equation 5.
    "sn-regularization": _SN._replace(
        apply=_NONE.apply,
        penalty=lambda params, state, batch: sn_jax.spectral_penalty(params, state),
        strength=0.01,
    ),
    "sn": _SN,
    # The convolutions as the operators that they are, strides and padding included.
    "sn-operator": _spectral("operator"),
    "sn-gp": _SN._replace(penalty=_gradient_penalty, strength=10.0),
    # W min(1, c / sigma) after every update, by one power iteration.
    "projection": _SN._replace(
        update=_NONE.update,
        apply=_NONE.apply,
        project=lambda params, state, c: sn_jax.spectral_normalize(
            params, state, bound=c, mode="clip"
        ),
        strength=1.0,
    ),
}
