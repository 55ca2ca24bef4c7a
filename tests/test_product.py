"""Dense layers whose product is scaled instead of their kernel: the same in every derivative."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sn_jax
import sn_jax.linen
import sn_jax.nnx

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 2, 6)).astype(np.float32)  # 4 rows
KERNEL = (3 * RNG.standard_normal((6, 9))).astype(np.float32)
BIAS = RNG.standard_normal(9).astype(np.float32)
U = (RNG.standard_normal((1, 9)) / 3).astype(np.float32)

OPTIONS = [
    {},
    {"mode": "clip", "bound": 5.0},
    {"mode": "clip", "bound": 50.0},
    {"gradient": "stop", "n_steps": 3},
    {"bound": {"kernel": 0.5}, "stateless": True},
]


def by_linen(options):
    wrapper = sn_jax.linen.SpectralNorm(nn.Dense(9), **options)

    def apply(kernel, x):
        variables = {"params": {"layer_instance": {"kernel": kernel, "bias": BIAS}}}
        if not options.get("stateless"):
            stats = {"layer_instance/kernel/u": U, "layer_instance/kernel/sigma": jnp.ones(())}
            variables["batch_stats"] = stats
        y, updates = wrapper.apply(variables, x, mutable=["batch_stats"])
        stats = updates.get("batch_stats", {})
        return y, [stats[name] for name in sorted(stats)]  # sigma, u

    return apply


def by_nnx(options):
    linear = nnx.Linear(6, 9, rngs=nnx.Rngs(0))
    wrapper = sn_jax.nnx.SpectralNorm(linear, rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(wrapper)
    values = {"bias": jnp.asarray(BIAS), "u": jnp.asarray(U), "sigma": jnp.ones(())}

    def apply(kernel, x):
        flat = [(path, v.replace(kernel if path[-1] == "kernel" else values[path[-1]]))
                for path, v in nnx.to_flat_state(state)]  # fmt: skip
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        y = model(x)
        return y, jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, sn_jax.nnx.SpectralStat)))

    return apply


def by_kernel(options):
    """Through the functional API: W_bar, then the plain layer."""
    options = dict(options)
    stateless = options.pop("stateless", False)
    options.setdefault("n_steps", 15 if stateless else 1)

    def apply(kernel, x):
        state = sn_jax.init({"kernel": kernel}, KEY, n_vectors=1, warmup=300 if stateless else 0)
        u = state["kernel"].u if stateless else U
        state = {
            "kernel": sn_jax.Singular(u, state["kernel"].v, jnp.ones(()), state["kernel"].view)
        }
        normalized, new = sn_jax.spectral_normalize({"kernel": kernel}, state, **options)
        return x @ normalized["kernel"] + BIAS, [new["kernel"].sigma, new["kernel"].u]

    return apply


def derivatives(apply):
    dw, dx = (
        np.random.default_rng(1).standard_normal(a.shape).astype(np.float32) for a in (KERNEL, X)
    )

    def loss(kernel, x):
        return jnp.sum(jnp.sin(apply(kernel, x)[0]))

    def penalty(kernel, x):  # second derivatives, as in a gradient penalty
        return jnp.sum(jax.grad(loss, argnums=1)(kernel, x) ** 2)

    return {
        "outputs": jax.jit(apply),
        "reverse": jax.jit(jax.grad(loss, argnums=(0, 1))),
        "forward": jax.jit(lambda k, x: jax.jvp(loss, (k, x), (dw, dx))),
        "reverse over reverse": jax.jit(jax.grad(penalty)),
        "forward over reverse": jax.jit(lambda k, x: jax.jvp(jax.grad(loss), (k, x), (dw, dx))[1]),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("by", [by_linen, by_nnx])
def test_it_equals_the_normalized_kernel(by, options):
    tolerance = {"rtol": 2e-4, "atol": 2e-4}
    for (name, ours), expected in zip(
        derivatives(by(options)).items(), derivatives(by_kernel(options)).values(), strict=True
    ):
        got, wanted = jax.tree.leaves(ours(KERNEL, X)), jax.tree.leaves(expected(KERNEL, X))
        for a, b in zip(got, wanted[: len(got)], strict=True):
            np.testing.assert_allclose(a, b, **tolerance, err_msg=name)


def kernel_sized(function, shape):
    """Primitives that write an array of the kernel's shape that a result depends on."""
    found = []

    def walk(jaxpr, results):
        needed = set(map(id, results))
        for eqn in reversed(jaxpr.eqns):
            outputs = [id(var) in needed for var in eqn.outvars]
            if not any(outputs):
                continue
            needed |= set(map(id, eqn.invars))
            inner = [getattr(p, "jaxpr", p) for p in eqn.params.values()]
            inner = [p for p in inner if hasattr(p, "eqns")]
            for jaxpr in inner:
                same = len(jaxpr.outvars) == len(outputs)
                walk(jaxpr, [v for i, v in enumerate(jaxpr.outvars) if not same or outputs[i]])
            if not inner:
                found.extend(eqn.primitive.name for var in eqn.outvars if var.aval.shape == shape)

    jaxpr = jax.make_jaxpr(function)(KERNEL, X).jaxpr
    walk(jaxpr, jaxpr.outvars)
    return [name for name in found if name not in ("stop_gradient", "copy", "transpose", "reshape")]


@pytest.mark.parametrize("by", [by_linen, by_nnx])
def test_it_writes_no_kernel_forward_and_one_backward(by):
    apply = by({})
    assert kernel_sized(apply, KERNEL.shape) == []
    backward = kernel_sized(jax.grad(lambda k, x: apply(k, x)[0].sum()), KERNEL.shape)
    # Products only, of x and the output's gradient and of v and u, and their sum.
    assert set(backward) <= {"dot_general", "add_any"}
    # Where it does not pay (many more rows than inputs) or is not the same, the kernel is scaled.
    many = lambda k, x: apply(k, jnp.tile(x, (5, 1, 1)))  # noqa: E731
    assert "mul" in kernel_sized(many, KERNEL.shape)
    half = lambda k, x: apply(k.astype(jnp.bfloat16), x)  # noqa: E731
    assert "mul" in kernel_sized(half, KERNEL.shape)


@pytest.mark.parametrize("by", [by_linen, by_nnx])
def test_zero_and_non_finite_kernels(by):
    apply = by({})
    np.testing.assert_array_equal(apply(0 * KERNEL, X)[0], np.broadcast_to(BIAS, (2, 2, 9)))
    grad = jax.grad(lambda k: apply(k, X)[0].sum())(0 * KERNEL)
    assert np.all(np.isfinite(grad))
    assert np.any(grad)
    assert np.isnan(apply(KERNEL * np.nan, X)[0]).all()


def attention_by_linen(kernels, x):
    layer = nn.MultiHeadDotProductAttention(2)
    variables = sn_jax.linen.SpectralNorm(layer).init(KEY, x)
    params = {"layer_instance": with_kernels(variables["params"]["layer_instance"], kernels)}
    wrapped = sn_jax.linen.SpectralNorm(layer)
    return wrapped.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]


def attention_by_nnx(kernels, x):
    layer = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    nnx.update(layer, with_kernels(nnx.to_pure_dict(state), kernels))
    return sn_jax.nnx.SpectralNorm(layer, rngs=nnx.Rngs(0))(x)


def with_kernels(params, kernels):
    return {
        name: {**leaves, "kernel": kernels[name].reshape(leaves["kernel"].shape)}
        for name, leaves in params.items()
    }


@pytest.mark.parametrize("attention", [attention_by_linen, attention_by_nnx])
def test_projections_of_attention_scale_their_products(attention):
    rng = np.random.default_rng(2)
    kernels = {
        name: rng.standard_normal((6, 6)).astype(np.float32)
        for name in ("query", "key", "value", "out")
    }
    # Tokens many times over give the same outputs; of so many, kernels are scaled.
    many = np.tile(X, (1, 10, 1))
    assert kernel_sized(lambda _, x: attention(kernels, x), (6, 2, 3)) == []
    assert "mul" in kernel_sized(
        lambda _, x: attention(kernels, jnp.tile(x, (1, 10, 1))), (6, 2, 3)
    )

    @jax.jit
    @jax.value_and_grad
    def loss(kernels, x):
        return jnp.mean(jnp.sin(attention(kernels, x)))

    (value, grads), (expected, expected_grads) = loss(kernels, X), loss(kernels, many)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in kernels:
        np.testing.assert_allclose(grads[name], expected_grads[name], rtol=1e-3, atol=1e-5)
