"""What is done to the discriminator's weights: one entry a method, one mechanism each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

import sn_jax

Params = Any  # the discriminator's parameters, a nested dict
MethodState = Any  # whatever the method carries from step to step


class Method(NamedTuple):
    """How a discriminator is normalized. The train step knows nothing else about a method."""

    init: Callable[[Params, Array], MethodState]
    """From the parameters and a key."""

    update: Callable[[Params, MethodState], MethodState]
    """Called once per discriminator step, before and outside the loss."""

    apply: Callable[[Params, MethodState], Params]
    """The weights that the network runs with; differentiable, and leaves the state as it is."""

    norms: Callable[[Params, MethodState], dict[str, Array]]
    """Its own estimates of the layers' spectral norms by path; empty if it makes none."""


# Section 2.1 of the paper: a convolution's kernel is the (h * w * in, out) matrix.
_RULES = {r"Conv_\d+/kernel": sn_jax.Matrix((0, 1, 2), 3), r"Dense_\d+/kernel": sn_jax.Matrix()}

METHODS = {
    "none": Method(
        init=lambda params, key: {},
        update=lambda params, state: state,
        apply=lambda params, state: params,
        norms=lambda params, state: {},
    ),
    # Algorithm 1: one power iteration per step on the raw weights; W / sigma in both losses.
    "sn": Method(
        init=lambda params, key: sn_jax.init(params, key, _RULES),
        update=lambda params, state: sn_jax.spectral_normalize(params, state)[1],
        apply=lambda params, state: sn_jax.spectral_normalize(params, state, n_steps=0)[0],
        norms=sn_jax.spectral_norms,
    ),
}
