"""Bytes that spectral normalization adds to a compiled step, and what it keeps for gradients."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import models, ways
from experiments.bench.timing import Row

WIDTH, BATCH = 1024, 64


def rows(quick: bool) -> Iterator[list[Row]]:
    """Four dense layers: the forward pass, the gradients, and the residuals in between; nothing is
    run, so all is ``quick``."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((BATCH, WIDTH)), jnp.float32)
    found = ways.contenders(models.DenseNet(WIDTH), x)
    kernels = sum(w.nbytes for w in jax.tree.leaves(found["without"].params) if w.ndim == 2)
    for kind in ("forward", "gradients"):
        used = {way: peak_bytes(getattr(step, kind), step, x) for way, step in found.items()}
        yield [
            row
            for ours in ("sn_jax.linen", "sn_jax")
            # A wrapper can have its layer take W / sigma unmaterialized; a function that
            # returns W / sigma leaves that to the compiler.
            for row in extra(f"{kind}, {ours}", used, ours, kernels,
                             0.05 if (kind, ours) == ("forward", "sn_jax.linen") else None)
        ]  # fmt: skip
    kept = {way: count_residuals(step, x) for way, step in found.items()}
    yield [
        Row("memory", f"residuals, {ours}", "kernel-sized arrays kept", kept[ours], kept[peer],
            peer, kept[ours] / kept[peer], target=1.0)
        for ours in ("sn_jax.linen", "sn_jax")
        for peer in ("without", "flax.linen")
    ]  # fmt: skip


def peak_bytes(function, step: ways.Step, x: jax.Array) -> int:
    """Temporaries and outputs of a compiled function of a step; its arguments are there anyway."""
    analysis = jax.jit(function).lower(step.params, step.state, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def extra(
    case: str, used: dict[str, int], ours: str, kernels: int, target: float | None
) -> list[Row]:
    """What one of our ways adds, as a share of all kernels (whose target is ``target``), and beside
    what flax.linen's adds; all in bytes."""
    more, theirs = (used[way] - used["without"] for way in (ours, "flax.linen"))
    return [
        Row("memory", case, "MB added", more / 1e6, kernels / 1e6, "all kernels",
            more / kernels, target=target),
        Row("memory", case, "MB added", more / 1e6, theirs / 1e6, "flax.linen",
            more / max(theirs, 1), target=1.0),
    ]  # fmt: skip


def count_residuals(step: ways.Step, x: jax.Array) -> int:
    """Different arrays of a kernel's size that the backward pass keeps, the kernels included; the
    batch x is smaller than one."""
    sizes = [w.size for w in jax.tree.leaves(step.params) if w.ndim == 2]

    def residuals(params):
        _, backward, _ = jax.vjp(lambda params: step.loss(params, step.state, x), params,
                                 has_aux=True)  # fmt: skip
        return jax.tree.leaves(backward)

    jaxpr = jax.make_jaxpr(residuals)(step.params).jaxpr
    return len({id(v) for v in jaxpr.outvars if np.prod(v.aval.shape) >= min(sizes)})
