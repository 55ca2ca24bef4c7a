"""The optax projection: true norms by SVD in float64, and optax's own wrappers around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CASES, count_compilations, needs_float16

import sn_jax
from sn_jax.transforms import ProjectSpectralNormState, project_spectral_norm

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
RULES = {".*kernel": sn_jax.Matrix()}


def gaussian(seed, shapes, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


SHAPES = {"dense": {"kernel": (48, 32), "bias": (32,)}, "stack": {"kernel": (3, 16, 16)}}


def norms(x):
    return np.linalg.norm(np.asarray(x, np.float64), 2, (-2, -1))


def largest(params):
    return max(norms(params[name]["kernel"]).max() for name in params)


def run(optimizer, params, grads_of, steps):
    """Largest true norm after each of the updates."""
    worst = []

    @jax.jit
    def step(params, state, i):
        updates, state = optimizer.update(grads_of(params, i), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for i in steps:
        params, state = step(params, state, i)
        worst.append(largest(params))
    return np.array(worst)


def to_targets(targets):
    return lambda params, i: jax.tree.map(jnp.subtract, params, targets)


def noise(params, i):
    keys = jax.random.split(jax.random.fold_in(KEY, i), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    return jax.tree.map(lambda p, key: jax.random.normal(key, p.shape), params, keys)


@pytest.mark.parametrize("exact", [False, True])
def test_projection_tracks_or_keeps_the_ball_under_adam(exact):
    """The number in the docstring: 4 % by default."""
    optimizer = optax.chain(optax.adam(1e-3), project_spectral_norm(RULES, KEY, exact=exact))
    shapes = {"dense": {"kernel": (64, 48)}, "stack": {"kernel": (3, 32, 32)}}
    worst = run(optimizer, gaussian(0, shapes), to_targets(gaussian(1, shapes)), range(150))
    assert worst.max() < (1 + 1e-5 if exact else 1.04)
    assert worst[-50:].min() > 0.999, "pulled outwards, it lies on the sphere"
    if not exact:
        assert worst.max() > 1 + 1e-5, "an estimate"


@pytest.mark.parametrize("exact", [False, True])
def test_projection_tracks_or_keeps_the_ball_at_large_steps(exact):
    """The number in the docstring: up to 2.3 times the bound by default."""
    optimizer = project_spectral_norm(RULES, KEY, exact=exact)

    def updates(params, i):
        scale = 10.0 ** (i // 30 - 1)  # 0.1, 1, 10, 100
        return jax.tree.map(lambda x: scale * x, noise(params, i))

    worst = run(optimizer, gaussian(0, SHAPES), updates, range(120))
    assert worst.max() < (1 + 1e-5 if exact else 2.5)
    if not exact:
        assert worst.max() > 1.5, "exceeds it much less than the docstring says: update that"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_for_every_view_and_batch_element(case):
    """Norms 1 + batch index or random: only what is outside is projected, and onto the sphere."""
    w = jnp.asarray(case.weights(0), jnp.float32)
    bound = 0.75 * float(np.max(case.norms(w)))
    project = project_spectral_norm({"w": case.view}, KEY, bound=bound, exact=True)
    state = project.init({"w": w})
    updates, state = jax.jit(project.update)({"w": 0 * w}, state, {"w": w})
    after = w + updates["w"]
    np.testing.assert_allclose(case.norms(after), np.minimum(case.norms(w), bound), rtol=1e-5)
    np.testing.assert_allclose(state.singular["w"].sigma, case.norms(w), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e3, 1e15])
@pytest.mark.parametrize("start", [1e-20, 1.0, 1e4, 1e12])
def test_exact_survives_cancellation(start, scale):
    """params + (target - params) rounds to the spacing of the larger of them."""
    params, updates = gaussian(0, SHAPES, start), gaussian(1, SHAPES, scale)
    project = project_spectral_norm(RULES, KEY, bound=0.3, exact=True)
    state = project.init(params)
    for _ in range(2):
        new, state = project.update(updates, state, params)
        params = optax.apply_updates(params, new)
        assert largest(params) <= 0.3 * (1 + 1e-5)
    if max(start, scale) < 1e-3:
        assert largest(params) > 0
    elif start <= 1e4 and scale > 1e-3:
        assert largest(params) > 0.29


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=needs_float16)])
def test_exact_in_half_precision(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), gaussian(0, SHAPES))
    project = project_spectral_norm(RULES, KEY, exact=True)
    state, update = project.init(params), jax.jit(project.update)
    updates = jax.tree.map(lambda x: (0.1 * x).astype(dtype), gaussian(1, SHAPES))
    for _ in range(3):
        projected, state = update(updates, state, params)
        params = optax.apply_updates(params, projected)
        assert jax.tree.leaves(params)[0].dtype == dtype
        assert 0.75 < largest(params) <= 1 + 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_puts_every_view_onto_the_sphere(case):
    """mode="divide" scales up, too, and what lies on the sphere stays as it is."""
    w = jnp.asarray(case.weights(0), jnp.float32)
    for bound in (0.1 * float(np.min(case.norms(w))), 3 * float(np.max(case.norms(w)))):
        options = {"bound": bound, "mode": "divide", "exact": True}
        project = project_spectral_norm({"w": case.view}, KEY, **options)
        state, update = project.init({"w": w}), jax.jit(project.update)
        updates, _ = update({"w": 0 * w}, state, {"w": w})
        after = w + updates["w"]
        np.testing.assert_allclose(case.norms(after), bound, rtol=2e-5)
        assert np.all(case.norms(after) <= bound * (1 + 1e-5))
        again, _ = update({"w": 0 * w}, state, {"w": after})
        np.testing.assert_allclose(after + again["w"], after, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_zero_has_no_direction_to_the_sphere(exact):
    """It stays zero, and the first update that moves it puts it onto the sphere."""
    project = project_spectral_norm(RULES, KEY, bound=2.0, mode="divide", exact=exact)
    zero, identity = {"kernel": jnp.zeros((3, 4))}, {"kernel": 1e-3 * jnp.eye(3, 4)}
    updates, state = project.update(zero, project.init(zero), zero)
    np.testing.assert_array_equal(updates["kernel"], 0)
    updates, state = project.update(identity, state, zero)
    np.testing.assert_allclose(norms(updates["kernel"]), 2, rtol=1e-4)
    bad = {"kernel": jnp.full((3, 4), jnp.inf)}
    assert np.isnan(project.update(bad, state, zero)[0]["kernel"]).all(), "never hidden"


def test_on_the_sphere_at_scale_aware_radii_under_muon():
    """The spectral sphere of Muon: the estimate's excess is small, and falls with the steps."""
    shapes = {"up": {"kernel": (32, 128)}, "down": {"kernel": (128, 32)}}
    params = gaussian(0, shapes, 0.1)
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2))
    radius = {"up": 2.0, "down": 0.5}  # sqrt(n_out / n_in)

    def loss(params):
        hidden = jax.nn.relu(x @ params["up"]["kernel"])
        return jnp.mean((hidden @ params["down"]["kernel"] - y) ** 2)

    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=sn_jax.transforms.muon_dimension_numbers(params, RULES)
    )

    @jax.jit
    def run(params, n_steps):
        project = project_spectral_norm(
            RULES, KEY, bound=sn_jax.rms_bound(1.0), mode="divide", n_steps=n_steps
        )
        to_radius = optax.stateless(
            lambda us, _: {k: {"kernel": -0.05 * radius[k] * us[k]["kernel"]} for k in us}
        )
        optimizer = optax.chain(muon, to_radius, project)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 60)[1]

    worst = []
    for n_steps in (1, 2, 4):
        history = run(params, jnp.int32(n_steps))
        ratios = [norms(history[name]["kernel"]) / radius[name] for name in radius]
        assert np.min(ratios) > 1 - 1e-5, "an estimate from below lands above"
        worst.append(np.max(ratios))
    assert worst[2] <= worst[1] <= worst[0] < 1.05
    assert worst[2] < worst[0]


class TestMuon:
    def test_one_spec_gives_the_polar_factor_of_each_head_expert_and_layer(self):
        shapes = {
            "query": {"kernel": (2, 12, 3, 4)},  # layers, features, heads, dim
            "experts": {"kernel": (3, 6, 8)},
            "conv": {"kernel": (3, 3, 2, 5)},
            "table": {"embedding": (7, 4)},
        }
        views = {
            "query/kernel": sn_jax.Matrix(1, 3),
            "experts/kernel": sn_jax.Scaled(sn_jax.Matrix(), 0.5),
            "conv/kernel": sn_jax.Conv((8, 8), strides=2),
            "table/.*": None,
        }
        params, grads = gaussian(0, shapes), gaussian(1, shapes)
        numbers = sn_jax.transforms.muon_dimension_numbers(params, views)
        state = sn_jax.init(params, KEY, views)
        assert numbers == sn_jax.transforms.muon_dimension_numbers(params, state)
        assert numbers["table"]["embedding"] is None
        flat = {**views, "conv/kernel": sn_jax.Matrix((0, 1, 2), 3)}
        assert numbers == sn_jax.transforms.muon_dimension_numbers(params, flat)
        muon = optax.contrib.muon(
            1.0, ns_coeffs=(1.5, -0.5, 0.0), ns_steps=40, nesterov=False, beta=0.0,
            muon_weight_dimension_numbers=numbers,
        )  # fmt: skip
        updates, _ = jax.jit(muon.update)(grads, muon.init(params), params)
        order = {"query": (0, 2, 3, 1), "experts": (0, 2, 1), "conv": (3, 0, 1, 2)}
        for name, axes in order.items():
            update, grad = (np.asarray(tree[name]["kernel"], np.float64).transpose(axes)
                            for tree in (updates, grads))  # fmt: skip
            n_batch = 0 if name == "conv" else len(axes) - 2
            shape = (*grad.shape[:n_batch], grad.shape[n_batch], -1)
            update, grad = update.reshape(shape), grad.reshape(shape)
            u, _, vt = np.linalg.svd(grad, full_matrices=False)
            scale = max(1, update.shape[-2] / update.shape[-1]) ** 0.5  # muon's own
            np.testing.assert_allclose(update, -scale * (u @ vt), atol=2e-4, err_msg=name)

    def test_what_no_axes_express_is_refused(self):
        params = {"w": jnp.ones((3, 3, 1, 4))}
        for view in (
            sn_jax.Conv((8, 8), feature_group_count=4),
            sn_jax.Scaled(sn_jax.Matrix((0, 1, 2), 3), np.ones((3, 3, 1, 4))),
        ):
            with pytest.raises(ValueError, match=r"w of shape .*leave it to Adam by a rule"):
                sn_jax.transforms.muon_dimension_numbers(params, {"w": view})
        with pytest.raises(ValueError, match="No parameter to normalize"):
            sn_jax.transforms.muon_dimension_numbers(params, {"v": sn_jax.Matrix()})


def test_inside_the_ball_updates_pass_bit_for_bit():
    params, updates = gaussian(0, SHAPES, 1e-3), gaussian(1, SHAPES, 1e-3)
    for exact in (False, True):
        project = project_spectral_norm(RULES, KEY, exact=exact)
        new, _ = project.update(updates, project.init(params), params)
        for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(updates), strict=True):
            np.testing.assert_array_equal(x, y)


def test_unmatched_leaves_keep_their_updates():
    params, updates = gaussian(0, SHAPES), gaussian(1, SHAPES)
    project = project_spectral_norm({"dense/kernel": sn_jax.Matrix()}, KEY, bound=0.5, exact=True)
    new, state = project.update(updates, project.init(params), params)
    assert isinstance(state, ProjectSpectralNormState)
    assert list(state.singular) == ["dense/kernel"]
    assert new["dense"]["bias"] is updates["dense"]["bias"]
    assert new["stack"]["kernel"] is updates["stack"]["kernel"]
    assert norms(params["dense"]["kernel"] + new["dense"]["kernel"]) < 0.501


@pytest.mark.parametrize("exact", [False, True])
def test_zero_tiny_and_non_finite(exact):
    project = project_spectral_norm({"w": sn_jax.Matrix()}, KEY, exact=exact)
    zero, identity = {"w": jnp.zeros((3, 4))}, {"w": 100 * jnp.eye(3, 4)}
    state = project.init(zero)
    updates, state = project.update(zero, state, zero)
    assert not np.any(updates["w"])
    updates, state = project.update(identity, state, zero)
    assert norms(updates["w"]) <= 1 + 1e-5, "recovers from zero"
    updates, bad = project.update({"w": jnp.full((3, 4), jnp.nan)}, state, zero)
    assert np.all(np.isnan(updates["w"])), "never hidden"
    updates, _ = project.update(identity, bad, zero)
    assert norms(updates["w"]) <= 1 + 1e-5, "the vectors survive it"
    empty = {"w": jnp.zeros((0, 4))}
    updates, _ = project.update(empty, project.init(empty), empty)
    assert updates["w"].shape == (0, 4)


class TestComposition:
    params = gaussian(0, SHAPES)
    updates = gaussian(1, SHAPES, 10)

    def apply(self, optimizer, steps=1):
        params, state = self.params, optimizer.init(self.params)
        for _ in range(steps):
            updates, state = jax.jit(optimizer.update)(self.updates, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def test_masked(self):
        mask = {"dense": {"kernel": True, "bias": False}, "stack": {"kernel": False}}
        inner = project_spectral_norm(RULES, KEY, n_steps=30)
        params, state = self.apply(optax.masked(inner, mask))
        assert list(state.inner_state.singular) == ["dense/kernel"]
        assert norms(params["dense"]["kernel"]) < 1.01
        np.testing.assert_array_equal(
            params["stack"]["kernel"],
            self.params["stack"]["kernel"] + self.updates["stack"]["kernel"],
        )

    def test_partition_of_optimizers(self):
        project = project_spectral_norm({"stack/kernel": sn_jax.Matrix()}, KEY, exact=True)
        labels = {"dense": "free", "stack": "ball"}
        optimizer = optax.partition({"free": optax.sgd(1.0), "ball": project}, labels)
        params, _ = self.apply(optimizer)
        assert norms(params["stack"]["kernel"]).max() < 1 + 1e-5
        assert norms(params["dense"]["kernel"]) > 5

    def test_multi_steps(self):
        chain = optax.chain(optax.sgd(0.1), project_spectral_norm(RULES, KEY, exact=True))
        optimizer = optax.MultiSteps(chain, every_k_schedule=3)
        _, state = self.apply(optimizer, steps=2)
        assert state.mini_step == 2
        updates, _ = jax.jit(optimizer.update)(self.updates, state, self.params)
        assert largest(optax.apply_updates(self.params, updates)) < 1 + 1e-5

    @pytest.mark.parametrize("exact", [False, True])
    def test_inject_hyperparams(self, exact):
        """bound as a schedule and by hand; n_steps and the key become traced, too."""
        factory = optax.inject_hyperparams(project_spectral_norm)
        optimizer = factory(RULES, KEY, bound=lambda i: 1.0 + i, exact=exact, n_steps=30)
        for steps, bound in ((1, 1.0), (2, 2.0)):
            params, _ = self.apply(optimizer, steps=steps)
            np.testing.assert_allclose(largest(params), bound, rtol=1e-5 if exact else 0.01)
        optimizer = factory(RULES, KEY, bound=sn_jax.rms_bound(0.5), exact=exact, n_steps=30)
        params, _ = self.apply(optimizer)
        limit = 0.5 * (32 / 48) ** 0.5
        assert norms(params["dense"]["kernel"]) < limit * (1 + (1e-5 if exact else 0.01))
        optimizer = factory(RULES, KEY, bound=1.0, exact=exact)
        state = optimizer.init(self.params)
        state.hyperparams["bound"] = jnp.array(0.25)
        updates, _ = optimizer.update(self.updates, state, self.params)
        assert largest(optax.apply_updates(self.params, updates)) < (0.250003 if exact else 0.5)

    @pytest.mark.parametrize("exact", [False, True])
    def test_state_keeps_its_structure_and_nothing_compiles_twice(self, exact):
        optimizer = project_spectral_norm(RULES, KEY, exact=exact)
        state = optimizer.init(self.params)
        step = jax.jit(optimizer.update)
        _, new = step(self.updates, state, self.params)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        with count_compilations() as compiled:
            step(self.updates, new, self.params)
        assert not compiled

    def test_leaks_nothing(self):
        with jax.checking_leaks():
            for exact in (False, True):
                optimizer = project_spectral_norm(RULES, KEY, exact=exact)
                state = optimizer.init(self.params)
                jax.eval_shape(optimizer.update, self.updates, state, self.params)


def test_bound_by_path():
    params = gaussian(0, SHAPES)
    bound = {"dense/kernel": 0.5, "stack/kernel": 2.0}
    project = project_spectral_norm(RULES, KEY, bound=bound, exact=True)
    updates, _ = project.update(jax.tree.map(jnp.zeros_like, params), project.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(norms(after["dense"]["kernel"]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(norms(after["stack"]["kernel"]), 2, rtol=1e-5)


def test_errors_say_what_to_do():
    params = {"dense": {"kernel": jnp.ones((3, 4))}}
    project = project_spectral_norm(RULES, KEY)
    state = project.init(params)
    with pytest.raises(ValueError, match=r"needs the parameters.*update\(grads, opt_state, params"):
        project.update(params, state)
    with pytest.raises(ValueError, match=r"No parameter to normalize.*dense/kernel"):
        project_spectral_norm({"w": sn_jax.Matrix()}, KEY).init(params)
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="bound for dense/kernel must be a positive"):
            project_spectral_norm(RULES, KEY, bound=bound).init(params)
    with pytest.raises(ValueError, match=r"bound as a mapping.*missing: dense/kernel"):
        project_spectral_norm(RULES, KEY, bound={}, exact=True).init(params)
    with pytest.raises(ValueError, match="n_steps must be at least 0"):
        project_spectral_norm(RULES, KEY, n_steps=-1).init(params)
    with pytest.raises(ValueError, match='mode must be "clip" or "divide"'):
        project_spectral_norm(RULES, KEY, mode="sphere")
    with pytest.raises(ValueError, match="c of the rms_bound as bound for dense/kernel must"):
        project_spectral_norm(RULES, KEY, bound=sn_jax.rms_bound(-1)).init(params)
    with pytest.raises(TypeError, match="exact must be True or False"):
        project_spectral_norm(RULES, KEY, exact=jnp.array(True))
    with pytest.raises(ValueError, match=r"bound for dense/kernel"):
        jax.eval_shape(project_spectral_norm(None, KEY, bound=-1).init, params)


def test_a_matrix_too_large_for_exact_says_so():
    w = jax.ShapeDtypeStruct((20_000, 20_000), jnp.float32)
    project = project_spectral_norm({"w": sn_jax.Matrix()}, KEY, exact=True)
    state = jax.eval_shape(project.init, {"w": w})
    with pytest.raises(ValueError, match=r"20000 x 20000 entries; use exact=False"):
        jax.eval_shape(project.update, {"w": w}, state, {"w": w})
