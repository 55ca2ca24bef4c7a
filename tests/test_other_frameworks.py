"""Parameters of Haiku and Equinox with the core, and their own spectral normalization beside it.

What the peers do wrong is shown by ``observed``: an upstream fix is noticed, and fails nothing.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sn_jax
from sn_jax import Matrix

pytestmark = [pytest.mark.float32, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)


def observed(defect: bool, what: str):
    """Skips, with a reason that pytest -ra prints, when a peer no longer does ``what``."""
    if not defect:
        pytest.skip(f"fixed upstream, so the README's table can lose a line: {what}")


@pytest.fixture
def hk():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("haiku")


@pytest.fixture
def eqx():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("equinox")


def norm(w, rows=-1):
    """Of a kernel with outputs last, flattened."""
    w = np.asarray(w, np.float64)
    return np.linalg.norm(w.reshape(-1, w.shape[-1]) if rows == -1 else w.reshape(len(w), -1), 2)


# Haiku


HAIKU_RULES = {r".*conv.*/w": Matrix((0, 1, 2), 3), r".*/w": Matrix()}


def haiku_model(hk):
    def forward(x):
        x = jax.nn.relu(hk.Conv2D(4, 3, name="conv")(x))
        return hk.nets.MLP([5, 1])(x.mean((1, 2)))

    return hk.without_apply_rng(hk.transform(forward))


def test_haiku_parameters(hk):
    model = haiku_model(hk)
    params = jax.jit(model.init)(KEY, X)
    state = sn_jax.init(params, KEY, HAIKU_RULES, warmup=100)
    assert sorted(state) == ["conv/w", "mlp/~/linear_0/w", "mlp/~/linear_1/w"]
    normalized, _ = sn_jax.spectral_normalize(params, state, bound=0.5)
    for module in ("conv", "mlp/~/linear_0", "mlp/~/linear_1"):
        np.testing.assert_allclose(norm(normalized[module]["w"]), 0.5, rtol=1e-5)
        assert normalized[module]["b"] is params[module]["b"]

    def loss(params):
        normalized, _ = sn_jax.spectral_normalize(params, state, n_steps=0)
        return jnp.sum(model.apply(normalized, X))

    grads = jax.jit(jax.grad(loss))(params)
    along = np.sum(np.asarray(grads["conv"]["w"]) * params["conv"]["w"])
    np.testing.assert_allclose(along, 0, atol=1e-4)  # the loss does not change with W's length


def test_haiku_recurrent_and_embedding_names_are_weights(hk):
    """w_i and w_h of a GRU, and embeddings, were left out."""

    def forward(x):
        cell = hk.GRU(4)
        y, _ = cell(hk.Embed(5, 3)(x), cell.initial_state(1))
        hk.get_parameter("filters", (2, 6), init=jnp.ones)
        return hk.BatchNorm(True, True, 0.9)(y, is_training=True)

    params, _ = jax.jit(hk.transform_with_state(forward).init)(KEY, jnp.array([1]))
    with pytest.warns(UserWarning, match=r"leaves alone .*: ~/filters \(2, 6\)\. Give rules"):
        state = sn_jax.init(params, KEY)
    assert set(state) == {"gru/w_i", "gru/w_h", "embed/embeddings"}


def haiku_sn(hk, tree, n_steps=1, **kwargs):
    """SNParamsTree, which wants its parameters in a transform: (init, apply)."""
    kwargs = {"ignore_regex": ".*/b$", "eps": 1e-12} | kwargs
    return hk.without_apply_rng(
        hk.transform_with_state(lambda: hk.SNParamsTree(n_steps=n_steps, **kwargs)(tree))
    )


def test_haiku_sn_params_tree_is_spectral_normalize(hk):
    """Its u0 (1, out) is our u; both iterate v, then u, and divide by sigma."""
    params = jax.jit(haiku_model(hk).init)(KEY, X)
    transform = haiku_sn(hk, params)
    _, theirs = transform.init(KEY)
    ours = sn_jax.init(params, KEY, HAIKU_RULES, warmup=0)
    for path, entry in ours.items():
        stored = theirs["sn_params_tree/" + path.replace("/", "__").replace("~", "_tilde")]
        ours[path] = sn_jax.Singular(stored["u0"], entry.v, entry.sigma, entry.view)
    for _ in range(3):
        expected, theirs = jax.jit(transform.apply)({}, theirs)
        normalized, ours = sn_jax.spectral_normalize(params, ours)
        for module, leaves in params.items():
            for name in leaves:
                np.testing.assert_allclose(
                    normalized[module][name], expected[module][name], rtol=1e-4, atol=1e-5
                )


def test_haiku_zero_weight_gives_nan_there_and_zero_here(hk):
    params = {"linear": {"w": jnp.zeros((3, 4))}}
    normalized, state = sn_jax.spectral_normalize(params, sn_jax.init(params, KEY))
    assert not np.any(normalized["linear"]["w"])
    recovered = {"linear": {"w": jnp.eye(3, 4)}}
    assert norm(sn_jax.spectral_normalize(recovered, state)[0]["linear"]["w"]) == pytest.approx(1)
    transform = haiku_sn(hk, params)
    out, _ = transform.apply({}, transform.init(KEY)[1])
    observed(np.any(np.isnan(out["linear"]["w"])), "hk.SNParamsTree: zero weights give NaN")


def test_haiku_biases_raise_there_and_are_left_alone_here(hk):
    params = {"linear": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}}
    normalized, _ = sn_jax.spectral_normalize(params, sn_jax.init(params, KEY))
    assert normalized["linear"]["b"] is params["linear"]["b"]
    try:
        haiku_sn(hk, params, ignore_regex="").init(KEY)
        raised = False
    except ValueError:
        raised = True
    observed(raised, "hk.SNParamsTree raises for biases unless ignore_regex names them")


def test_haiku_epsilon_depends_on_scale_there_and_not_here(hk):
    """eps = 1e-4 under the square root: after many steps the norm is not 1."""
    params = {"linear": {"w": jnp.asarray(0.02 * np.eye(3, 4), jnp.float32)}}
    state = sn_jax.init(params, KEY)
    normalized, _ = sn_jax.spectral_normalize(params, state)
    assert norm(normalized["linear"]["w"]) == pytest.approx(1, rel=1e-5)
    transform = haiku_sn(hk, params, n_steps=30, eps=1e-4)
    out, _ = transform.apply({}, transform.init(KEY)[1])
    observed(abs(norm(out["linear"]["w"]) - 1) > 0.01, "hk.SNParamsTree: eps changes the norm")


# Equinox


def test_equinox_models(eqx):
    """Modules are pytrees; output-first weights are the default rule; static fields pass."""
    keys = jax.random.split(KEY, 2)
    model = (eqx.nn.Conv2d(3, 4, 3, key=keys[0]), eqx.nn.MLP(4, 4, 4, 2, key=keys[1]))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = sn_jax.init(params, KEY, warmup=200)
    assert list(state) == [
        "0/weight", "1/layers/0/weight", "1/layers/1/weight", "1/layers/2/weight",
    ]  # fmt: skip
    normalized, _ = sn_jax.spectral_normalize(params, state)
    assert norm(normalized[0].weight, rows=0) == pytest.approx(1, rel=1e-5)
    for layer in normalized[1].layers:
        assert norm(layer.weight, rows=0) == pytest.approx(1, rel=1e-5)
    conv, mlp = eqx.combine(normalized, static)
    assert mlp(conv(jnp.ones((3, 5, 5))).mean((1, 2))).shape == (4,)
    whole, _ = sn_jax.spectral_normalize(model, state)
    assert jax.tree.structure(whole) == jax.tree.structure(model), "functions among the leaves"


def test_equinox_recurrent_weights_are_weights_and_scales_are_not(eqx):
    """GRUCell's weight_ih and weight_hh were left out, and LayerNorm((8, 8)) was normalized."""
    model = {
        "cell": eqx.nn.GRUCell(3, 4, key=KEY),
        "norms": (eqx.nn.LayerNorm((8, 8)), eqx.nn.RMSNorm((8, 8), use_bias=False),
                  eqx.nn.GroupNorm(2, 8), eqx.nn.LayerNorm((8, 8), use_bias=False)),
        "stack": eqx.filter_vmap(lambda _: eqx.nn.RMSNorm(8, use_bias=False))(jnp.arange(5)),
        "stacked": eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(8))(jnp.arange(5)),
    }  # fmt: skip
    assert list(sn_jax.init(model, KEY)) == ["cell/weight_ih", "cell/weight_hh"]


def test_more_than_two_axes_of_weight_are_output_first_in_equinox_convolutions_only(eqx):
    for n, layer in enumerate((eqx.nn.Conv1d, eqx.nn.Conv2d, eqx.nn.ConvTranspose3d), 1):
        (state,) = sn_jax.init({"a": [layer(3, 4, 3, key=KEY)]}, KEY).values()
        assert state.view == Matrix(tuple(range(1, n + 2)), 0)
    weight = eqx.nn.Conv2d(3, 4, 3, key=KEY).weight
    ensemble = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 4, key=key))(jax.random.split(KEY, 5))
    for params, shape in (({"weight": weight}, r"\(4, 3, 3, 3\)"), (ensemble, r"\(5, 4, 3\)")):
        with pytest.raises(ValueError, match=rf"weight of shape {shape}.*PyTorch"):
            sn_jax.init(params, KEY)
    state = sn_jax.init(ensemble, KEY, {"weight": Matrix()}, warmup=200)
    np.testing.assert_allclose(
        state["weight"].sigma, np.linalg.norm(ensemble.weight, 2, (1, 2)), rtol=1e-5
    )


def equinox_sn(eqx, layer, key=KEY):
    return eqx.nn.make_with_state(eqx.nn.SpectralNorm)(layer, "weight", key=key)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_equinox_spectral_norm_is_spectral_normalize_of_the_transposed_map(eqx, kind):
    """It iterates u first, as torch's parametrization: on W^T, our v, then u, is its u, then v."""
    if kind == "linear":
        layer, x = eqx.nn.Linear(5, 4, key=KEY), jnp.asarray(X[0, 0, :5, 0])
        view = Matrix(0, 1)
    else:
        layer, x = eqx.nn.Conv2d(3, 4, 3, key=KEY), jnp.asarray(X[0].transpose(2, 0, 1))
        view = Matrix(0, (1, 2, 3))
    wrapped, theirs = equinox_sn(eqx, layer)
    u, v = theirs.get(wrapped.uv_index)
    shape = layer.weight.shape
    entry = sn_jax.Singular(v.reshape(1, *shape[1:]), u[None], jnp.zeros(()), view)
    ours, rules = {"weight": entry}, {"weight": view}
    assert sn_jax.init(layer, KEY, rules)["weight"].u.shape == entry.u.shape

    evaluated, _ = wrapped(x, theirs, inference=True)
    normalized, _ = sn_jax.spectral_normalize(layer, ours, n_steps=0)
    np.testing.assert_allclose(normalized(x), evaluated, rtol=1e-4, atol=1e-5)
    for _ in range(3):
        trained, theirs = wrapped(x, theirs)
        normalized, ours = sn_jax.spectral_normalize(layer, ours)
        np.testing.assert_allclose(normalized(x), trained, rtol=1e-4, atol=1e-5)


def test_equinox_zero_weight_gives_nan_there_and_zero_here(eqx):
    layer = eqx.nn.Linear(3, 4, key=KEY)
    layer = eqx.tree_at(lambda layer: layer.weight, layer, jnp.zeros((4, 3)))
    normalized, _ = sn_jax.spectral_normalize(layer, sn_jax.init(layer, KEY))
    assert not np.any(normalized.weight)
    wrapped, state = equinox_sn(eqx, layer)
    y, _ = wrapped(jnp.ones(3), state)
    observed(np.any(np.isnan(y)), "eqx.nn.SpectralNorm: zero weights give NaN")


def test_equinox_state_used_twice_raises_there_and_is_plain_data_here(eqx):
    layer = eqx.nn.Linear(3, 4, key=KEY)
    state = sn_jax.init(layer, KEY)
    first, _ = sn_jax.spectral_normalize(layer, state)
    second, _ = sn_jax.spectral_normalize(layer, state)
    np.testing.assert_array_equal(first.weight, second.weight)
    wrapped, theirs = equinox_sn(eqx, layer)
    wrapped(jnp.ones(3), theirs)
    try:
        wrapped(jnp.ones(3), theirs)
        raised = False
    except ValueError:
        raised = True
    observed(raised, "eqx.nn.SpectralNorm: an old State cannot be used again")
