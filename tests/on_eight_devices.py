"""Kernels spread over eight devices; run by test_sharding.py in a process that has so many."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import matrix_case
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sn_jax
import sn_jax.linen
import sn_jax.nnx
import sn_jax.transforms
from experiments.bench.comm import collectives
from sn_jax import Conv, Matrix

assert jax.device_count() == 8
KEY = jax.random.key(0)
MESHES = {
    kind: jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(getattr(AxisType, kind),) * 2)
    for kind in ("Auto", "Explicit")
}
on_meshes = pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
# name, view, kernel shape, its spec, what that implies for u and v (after batch and k).
CASES = [
    ("both", Matrix(), (16, 24), P("fsdp", "tp"), ["tp"], ["fsdp"]),
    ("input, pair of axes", Matrix(), (16, 24), P(("fsdp", "tp")), [None], [("fsdp", "tp")]),
    ("output", Matrix(), (16, 24), P(None, "tp"), ["tp"], [None]),
    ("heads", Matrix((0, 1), 2), (8, 6, 16), P("tp", None, "fsdp"), ["fsdp"], ["tp", None]),
    ("experts", Matrix(1, 2), (8, 6, 16), P("fsdp", None, "tp"), ["tp"], [None]),
    ("flattened", Matrix((0, 1, 2), 3), (3, 3, 4, 8), P(None, None, "fsdp", "tp"), ["tp"],
     [None, None, "fsdp"]),
    ("operator", Conv((6, 5)), (3, 3, 4, 8), P(None, None, "fsdp", "tp"), [None, None, "tp"],
     [None, None, "fsdp"]),
]  # fmt: skip
on_cases = pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
PARTS = ("u", "v", "sigma", "normalized", "gradient", "calibrated", "norms", "stale", "rank", "rms")


def everything(w, key, view, total=lambda x: x, n_vectors=1):
    """All of the functional API on one kernel; ``total`` sums a loss over devices."""
    params = {"w": w}
    start = sn_jax.init(params, key, {"w": view}, n_vectors=n_vectors)
    normalized, state = sn_jax.spectral_normalize(params, start)

    def loss(params):
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        return total(jnp.sum(jnp.sin(normalized["w"])))

    gradient = jax.grad(loss)(params)["w"]
    calibrated = sn_jax.calibrate(params, start)["w"].sigma
    norms = sn_jax.spectral_norms(params, state)["w"]
    stale = sn_jax.residuals(params, state)["w"]
    rank = sn_jax.spectral_stats(params, state)["w"].stable_rank
    by_size, _ = sn_jax.spectral_normalize(params, state, bound=sn_jax.rms_bound(0.5), n_steps=0)
    rms = sn_jax.spectral_norms(by_size, state)["w"]
    first = state["w"].u, state["w"].v, state["w"].sigma, normalized["w"], gradient
    return *first, calibrated, norms, stale, rank, rms


@cache
def alone(view, shape, n_vectors=1):
    """``everything`` on one device."""
    return jax.jit(partial(everything, view=view, n_vectors=n_vectors))(kernel(shape), KEY)


def run_and_look(run, *args):
    """(results, elements of each array sent) of a jitted function, compiled once."""
    compiled = run.lower(*args).compile()
    return compiled(*args), collectives(compiled.as_text())


def assert_same(found, expected, tolerance=1e-9):
    for part, a, b in zip(PARTS, found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=part)


def largest_vector(view, shape, n_vectors=1):
    batch, domain = view.batch_shape(shape), view.domain(shape)
    codomain = jax.eval_shape(view.matvec, jnp.ones(shape), jnp.ones((*batch, *domain))).shape
    return n_vectors * max(math.prod((*batch, *domain)), math.prod(codomain))


def kernel(shape, dtype=np.float64):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def put(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


@on_meshes
@on_cases
def test_functional_api(case, mesh):
    _, view, shape, spec, u_spec, v_spec = case
    run = jax.jit(partial(everything, view=view))
    batch = [entry for entry, _ in zip(spec, view.batch_shape(shape), strict=False)]
    with jax.set_mesh(mesh):
        found, sent = run_and_look(run, put(kernel(shape), mesh, spec), KEY)
    assert_same(found, alone(view, shape))
    implied = [P(*batch, None, *u_spec), P(*batch, None, *v_spec), P(*batch), spec, spec]
    for part, x, wanted in zip(PARTS, found, implied, strict=False):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, wanted), x.ndim), part
    assert 0 < max(sent) <= largest_vector(view, shape)


@on_meshes
def test_several_vectors(mesh):
    view, shape = Matrix(), (16, 24)
    run = jax.jit(partial(everything, view=view, n_vectors=2))
    with jax.set_mesh(mesh):
        found, sent = run_and_look(run, put(kernel(shape), mesh, P("fsdp", "tp")), KEY)
    # The second vectors' signs are rounding's.
    for a, b in zip(found[-5:], alone(view, shape, 2)[-5:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    assert max(sent) <= largest_vector(view, shape, 2)


# Every option that may be an array: steps, relative residual, bounds.
NUMBERS = (2, 0.3, 0.5)
ARRAYS = (np.int64(2), np.float64(0.3), np.full(8, 0.5))


def by_options(params, state, steps, rtol, bound):
    """Everything of the functional API that iterates, and the projection."""
    rules = {"w": Matrix(1, 2)}
    normalize = partial(sn_jax.spectral_normalize, state=state, n_steps=steps, bound=bound)
    product = partial(jnp.einsum, "eio,ei->eo", out_sharding=jax.typeof(state["w"].sigma).sharding)

    def project(exact):
        options = {"bound": bound, "exact": exact} | ({} if exact else {"n_steps": steps})
        optimizer = sn_jax.transforms.project_spectral_norm(rules, KEY, **options)
        return optimizer.update(params, optimizer.init(params), params)

    return {
        "normalize": normalize(params),
        "gradient": jax.grad(lambda params: jnp.sum(jnp.sin(normalize(params)[0]["w"])))(params),
        "calibrate": sn_jax.calibrate(params, state, rtol=rtol, max_steps=1000),
        "max_steps": sn_jax.calibrate(params, state, rtol=1e-9, max_steps=steps),
        "residuals": sn_jax.residuals(params, state),
        "project": project(exact=False),
        "exact": project(exact=True),
        "power_iteration": sn_jax.power_iteration(
            jax.tree_util.Partial(product, params["w"]), state["w"].v[:, 0], steps, batch_ndim=1
        ),
    }


@cache
def by_options_alone():
    params = {"w": kernel((8, 6, 16))}
    state = sn_jax.init(params, KEY, {"w": Matrix(1, 2)}, warmup=0)
    return jax.jit(by_options)(params, state, *NUMBERS)


@pytest.mark.parametrize("kind", ["numbers", "arrays", "device", "traced"])
def test_options_may_be_arrays_on_explicit_axes(kind):
    mesh = MESHES["Explicit"]
    run = jax.jit(by_options) if kind == "traced" else by_options
    with jax.set_mesh(mesh):
        params = {"w": put(kernel((8, 6, 16)), mesh, P("fsdp", None, "tp"))}
        state = sn_jax.init(params, KEY, {"w": Matrix(1, 2)}, warmup=0)
        options = NUMBERS if kind == "numbers" else ARRAYS
        if kind in ("device", "traced"):
            options = tuple(map(jnp.asarray, options))  # here, so that their types tell the mesh
        # Two steps do not suffice: said where the numbers are known.
        told = pytest.warns(UserWarning, match="calibrate took 2 steps")
        with nullcontext() if kind == "traced" else told:
            found = run(params, state, *options)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(by_options_alone()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@on_cases
def test_inside_shard_map(case):
    _, view, shape, spec, *_ = case
    mesh = MESHES["Auto"]
    view = replace(view, split=spec)
    names = tuple(name for entry in view.split for name in entry)
    batch = P(
        *(entry or None for entry, _ in zip(view.split, view.batch_shape(shape), strict=False))
    )
    run = partial(everything, view=view, total=lambda loss: jax.lax.psum(loss, names))
    out = (batch, batch, batch, spec, spec, *[batch] * 5)
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, P()), out_specs=out))
    found, sent = run_and_look(run, kernel(shape), KEY)
    assert_same(found, alone(case[1], shape))
    assert 0 < max(sent) <= largest_vector(view, shape)


def test_float32():
    view, shape, mesh = Matrix(), (16, 24), MESHES["Explicit"]
    run = jax.jit(partial(everything, view=view))
    expected = run(kernel(shape, np.float32), KEY)
    with jax.set_mesh(mesh):
        found = run(put(kernel(shape, np.float32), mesh, P("fsdp", "tp")), KEY)
    assert_same(found, expected, 1e-5)


def test_a_jit_told_by_in_shardings_alone_gathers_no_kernel():
    # Several axes are flattened only where they cannot be split: here nothing but jit knows.
    view, shape = Matrix((0, 1), 2), (8, 6, 16)
    sharding = NamedSharding(MESHES["Auto"], P(None, "tp", "fsdp"))
    run = jax.jit(partial(everything, view=view), in_shardings=(sharding, None))
    sent = collectives(run.lower(kernel(shape), KEY).compile().as_text())
    assert max(sent) <= largest_vector(view, shape)


def test_conv_stacks_stay_apart_in_shard_map():
    # Elsewhere XLA makes one grouped convolution of them, and gathers its kernel.
    view, shape, spec = Conv((4, 4), split=P("fsdp")), (4, 3, 3, 2, 3), P("fsdp")
    run = partial(everything, view=view, total=lambda loss: jax.lax.psum(loss, "fsdp"))
    out = (spec,) * len(PARTS)
    mesh = MESHES["Auto"]
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, P()), out_specs=out))
    found, sent = run_and_look(run, kernel(shape), KEY)
    assert_same(found, alone(view, shape))
    assert max(sent) == 1


@pytest.mark.parametrize(
    ("view", "kwargs", "message"),
    [
        (Matrix(), {}, r"w of shape \(4, 12\).*differs along the mesh axes \['fsdp', 'tp'\]"),
        (Matrix(split=P("fsdp")), {}, r"differs along the mesh axes \['tp'\]"),
        (Matrix(split=P("fsdp", "tp")), {"check_vma": False}, "leave check_vma on"),
    ],
)
def test_a_block_taken_for_the_whole_raises(view, kwargs, message):
    def norm(w):
        return sn_jax.init({"w": w}, KEY, {"w": view})["w"].sigma

    run = jax.shard_map(
        norm, mesh=MESHES["Auto"], in_specs=P("fsdp", "tp"), out_specs=P(), **kwargs
    )
    with pytest.raises(ValueError, match=message):
        run(kernel((16, 24)))


def test_groups_and_exact_projection_need_whole_kernels():
    def init(w):
        return sn_jax.init({"w": w}, KEY, {"w": view})["w"].sigma

    view = Conv((4, 4), feature_group_count=2, split=P(None, None, None, "tp"))
    run = jax.shard_map(
        init, mesh=MESHES["Auto"], in_specs=P(None, None, None, "tp"), out_specs=P()
    )
    with pytest.raises(ValueError, match="cannot be split along axis 3"):
        run(kernel((3, 3, 2, 4)))

    project = sn_jax.transforms.project_spectral_norm(
        {"w": Matrix(split=P("fsdp"))}, KEY, exact=True
    )

    def step(w):
        return project.update({"w": w}, project.init({"w": w}), {"w": w})[0]["w"]

    run = jax.shard_map(step, mesh=MESHES["Auto"], in_specs=P("fsdp"), out_specs=P("fsdp"))
    with pytest.raises(ValueError, match="exact=True needs the whole"):
        run(kernel((16, 24)))


# The Flax wrappers, and the projection. float32, as Flax's parameters are.


def linen_step(model, variables, x):
    def loss(params):
        y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.mean(jnp.sin(y)), updates["batch_stats"]

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


def nnx_step(graphdef, params, stats, x):
    model = nnx.merge(graphdef, params, stats)
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(jnp.sin(model(x))))(model)
    return loss, grads, nnx.state(model, nnx.BatchStat)


def assert_trees_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def put_kernels(tree, mesh, spec):
    """Kernels as spec says; the others replicated."""
    return jax.tree.map(lambda x: put(x, mesh, spec if x.ndim == len(spec) else P()), tree)


@pytest.mark.float32
@on_meshes
@pytest.mark.parametrize(
    ("layer", "spec"),
    [(nn.Dense(24), P(None, "tp")), (nn.DenseGeneral((4, 6)), P(None, "tp", None))],
    ids=["product", "kernel"],
)
def test_linen_wrapper(layer, spec, mesh):
    model, x = sn_jax.linen.SpectralNorm(layer), kernel((8, 16), np.float32)
    variables = model.init(KEY, x)
    step = jax.jit(partial(linen_step, model))
    expected = step(variables, x)
    with jax.set_mesh(mesh):
        params = put_kernels(variables["params"], mesh, spec)
        stats = put_kernels(variables["batch_stats"], mesh, P())
        found = step({"params": params, "batch_stats": stats}, put(x, mesh, P("fsdp")))
    assert_trees_close(found, expected)


@pytest.mark.float32
@on_meshes
@pytest.mark.parametrize("dtype", [None, jnp.float32], ids=["product", "kernel"])
def test_nnx_wrapper(dtype, mesh):
    x, spec = kernel((8, 16), np.float32), P(None, "tp")
    layer = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
    model = sn_jax.nnx.SpectralNorm(layer, dtype=dtype, rngs=nnx.Rngs(1))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    step = jax.jit(partial(nnx_step, graphdef))
    expected = step(params, stats, x)
    with jax.set_mesh(mesh):
        layer = nnx.merge(graphdef, put_kernels(params, mesh, spec), stats).layer_instance
        model = sn_jax.nnx.SpectralNorm(layer, dtype=dtype, rngs=nnx.Rngs(1))
        _, params, stats = nnx.split(model, nnx.Param, ...)
        assert model.batch_stats["kernel"]["u"][...].sharding.spec == P(None, "tp")
        found = step(params, put_kernels(stats, mesh, P()), put(x, mesh, P("fsdp")))
    assert_trees_close(found, expected)


@pytest.mark.float32
def test_flax_raises_on_explicit_axes():
    model, x = nn.SpectralNorm(nn.Dense(24)), kernel((8, 16), np.float32)
    variables = model.init(KEY, x, update_stats=False)
    with jax.set_mesh(MESHES["Explicit"]):
        params = put_kernels(variables["params"], MESHES["Explicit"], P(None, "tp"))
        with pytest.raises(Exception, match="Please specify"):
            model.apply({**variables, "params": params}, x, update_stats=False)


@pytest.mark.float32
def test_linen_wrapper_data_parallel_in_shard_map():
    model, x = sn_jax.linen.SpectralNorm(nn.Dense(6)), kernel((16, 4), np.float32)
    variables = model.init(KEY, x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(variables, x):
        (loss, stats), grads = linen_step(model, variables, x)
        # The parameters do not differ, so their gradient is a sum over devices already.
        return jax.lax.pmean(loss, "data"), stats, jax.tree.map(lambda g: g / 8, grads)

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    (loss, stats), grads = jax.jit(partial(linen_step, model))(variables, x)
    assert_trees_close(run(variables, x), (loss, stats, grads))


@pytest.mark.float32
@on_meshes
@pytest.mark.parametrize("exact", [False, True])
def test_projection(exact, mesh):
    shape = (8, 6, 4)
    project = sn_jax.transforms.project_spectral_norm({"w": Matrix(1, 2)}, KEY, exact=exact)
    optimizer = optax.chain(optax.adam(1e-2), project)

    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, grads = {"w": kernel(shape, np.float32)}, {"w": kernel(shape, np.float32)[::-1]}
    expected = jax.jit(step)(params, grads, optimizer.init(params))
    with jax.set_mesh(mesh):
        params, grads = put_kernels((params, grads), mesh, P("fsdp", None, "tp"))
        state = jax.jit(optimizer.init)(params)
        run = jax.jit(step)
        found, sent = run_and_look(run, params, grads, state)
    assert_trees_close(found, expected)
    case = matrix_case("experts", 1, 2, shape)
    assert np.all(case.norms(found[0]["w"]) <= 1.001)
    assert max(sent) <= 8 * 6


@pytest.mark.float32
@on_meshes
def test_clipped_singular_values(mesh):
    """As alone; XLA gathers what an SVD needs. Of blocks in shard_map it says so."""
    shape, spec = (8, 6, 4), P("fsdp", None, "tp")
    w = kernel(shape, np.float32)
    state = sn_jax.init({"w": w}, KEY, {"w": Matrix(1, 2)}, warmup=0)
    clip = jax.jit(partial(sn_jax.clip_singular_values, bound=0.8))
    expected = clip({"w": w}, state)["w"]
    with jax.set_mesh(mesh):
        found = clip({"w": put(w, mesh, spec)}, state)["w"]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    view = Matrix(1, 2, split=spec)

    def block(w):
        state = sn_jax.init({"w": w}, KEY, {"w": view}, warmup=0)
        return sn_jax.clip_singular_values({"w": w}, state)["w"]

    with pytest.raises(ValueError, match=r"w of shape \(2, 6, 2\) is one block"):
        jax.shard_map(block, mesh=MESHES["Auto"], in_specs=spec, out_specs=spec)(w)


def test_a_layer_of_an_ensemble_on_a_mesh_of_its_own():
    # vmap over kernels that are split along the vmapped axis.
    mesh, shape = MESHES["Explicit"], (4, 6, 8)

    def norm(w):
        return sn_jax.init({"w": w}, KEY, {"w": Matrix()})["w"].sigma

    expected = jax.vmap(norm)(jnp.asarray(kernel(shape)))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.vmap(norm))(put(kernel(shape), mesh, P("fsdp", None, "tp")))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
