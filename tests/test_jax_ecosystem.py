"""With the rest of JAX: export, serialization, checkpoints, optax's tools, every platform."""

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from fixtures import make_checkpoint_fixtures as checkpoints
from flax import nnx, serialization
from flax.training.train_state import TrainState
from jax import export

import sn_jax
from sn_jax import Conv, Linear, Matrix
from sn_jax.convert import from_state_dict
from sn_jax.transforms import ProjectSpectralNormState, project_spectral_norm

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def scaled(w, x):
    return w * x


@dataclass(frozen=True)
class Doubled:
    """A view of one's own: twice a matrix."""

    factor: float = 2.0

    def batch_shape(self, shape):
        return ()

    def domain(self, shape):
        return shape[1:]

    def matvec(self, w, x):
        return self.factor * (w @ x)

    def scale(self, w, factor):
        return w * factor


PARAMS = {
    "dense": {"kernel": noise(3, 4), "bias": noise(4)},
    "conv": {"kernel": noise(3, 3, 2, 4)},
    "filter": noise(5),
    "own": noise(4, 3, seed=1),
}
VIEWS = {
    "dense/kernel": Matrix(),
    "conv/kernel": Conv((4, 4), strides=2, padding=((1, 1), (0, 1))),
    "filter": Linear(scaled, 5),
    "own": Doubled(),
}
RULES = {"dense/kernel": Matrix()}


def some_state(seed=0, **kwargs):
    return sn_jax.init(PARAMS, jax.random.key(seed), VIEWS, n_vectors=2, **kwargs)


# jax.export: symbolic sizes.


def symbolic(*shape):
    """A float32 array with the batch symbolic, and others where they are letters."""
    letters = ["b", *dict.fromkeys(n for n in shape if isinstance(n, str))]
    sizes = dict(zip(letters, export.symbolic_shape(",".join(letters)), strict=True))
    return jax.ShapeDtypeStruct((sizes["b"], *(sizes.get(n, n) for n in shape)), jnp.float32)


LINEN = {
    "dense": (nn.Dense(4), {}, (3,)),
    "attention": (nn.MultiHeadDotProductAttention(2), {}, (5, 4)),
    "convolution": (nn.Conv(4, (3, 3)), {}, (8, 8, 3)),
    "operator": (nn.Conv(4, (3, 3)), {"conv": "operator"}, (8, 8, 3)),
    "block": (nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), {}, (3,)),
}


@pytest.mark.parametrize("name", LINEN)
def test_a_symbolic_batch_in_linen(name):
    layer, options, shape = LINEN[name]
    model = sn_jax.linen.SpectralNorm(layer, **options)
    x = noise(7, *shape)
    variables = model.init(KEY, x)

    def train(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    exported = export.export(jax.jit(train))(variables, symbolic(*shape))
    chex.assert_trees_all_close(exported.call(variables, x), train(variables, x), atol=1e-5)


NNX = {
    "linear": (lambda rngs: nnx.Linear(3, 4, rngs=rngs), (3,)),
    "attention": (lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs), (5, 4)),
    "convolution": (lambda rngs: nnx.Conv(3, 4, (3, 3), rngs=rngs), (8, 8, 3)),
}


@pytest.mark.parametrize("name", NNX)
def test_a_symbolic_batch_in_nnx(name):
    make, shape = NNX[name]
    model = sn_jax.nnx.SpectralNorm(make(nnx.Rngs(0)), rngs=nnx.Rngs(1))
    model.eval()
    graphdef, state = nnx.split(model)
    x = noise(7, *shape)
    serve = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    exported = export.export(serve)(state, symbolic(*shape))
    np.testing.assert_allclose(exported.call(state, x), model(x), atol=1e-5)


def test_a_symbolic_image_size_says_why_it_has_no_norm():
    model = sn_jax.linen.SpectralNorm(nn.Conv(4, (3, 3)), conv="operator")
    variables = model.init(KEY, noise(2, 8, 8, 3))
    apply = jax.jit(partial(model.apply, variables))
    with pytest.raises(ValueError, match=r"Conv\(input_shape=\(h, h\)\).*no symbolic one.*reshape"):
        export.export(apply)(symbolic("h", "h", 3))
    flattened = sn_jax.linen.SpectralNorm(nn.Conv(4, (3, 3)))
    exported = export.export(jax.jit(partial(flattened.apply, variables_of(flattened))))
    exported = exported(symbolic("h", "h", 3))
    for size in (5, 9):
        x = noise(2, size, size, 3)
        expected = flattened.apply(variables_of(flattened), x)
        np.testing.assert_allclose(exported.call(x), expected, atol=1e-5)


def variables_of(model):
    return model.init(KEY, noise(2, 8, 8, 3))


# jax.export: serialization.


def test_a_step_that_takes_a_state_is_serialized():
    state, other = some_state(), some_state(1)
    stored = export.export(jax.jit(sn_jax.spectral_normalize))(PARAMS, state).serialize()
    again = export.deserialize(stored)
    expected = sn_jax.spectral_normalize(PARAMS, other)
    found = again.call(PARAMS, other)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    assert jax.tree.structure(found) == jax.tree.structure(expected), "the views, too"
    with pytest.raises(ValueError, match=r"pytree|tree structure"):
        again.call(PARAMS, {**other, "filter": other["own"]})


def test_a_stored_program_of_another_version_says_so():
    stored = export.export(jax.jit(sn_jax.spectral_norms))(PARAMS, some_state()).serialize()
    assert stored.count(b'"version": 1') == len(VIEWS)
    with pytest.raises(ValueError, match=r"version 2 of the format, and this release .* version 1"):
        export.deserialize(stored.replace(b'"version": 1', b'"version": 2'))
    name = b"test_jax_ecosystem:scaled"
    with pytest.raises(ValueError, match="needs test_jax_ecosystem:scalee, which is not there"):
        export.deserialize(stored.replace(name, name[:-1] + b"e"))


def test_a_view_without_a_name_says_so():
    views = {"filter": Linear(lambda w, x: w * x, 5)}
    state = sn_jax.init(PARAMS, KEY, views)
    exported = export.export(jax.jit(sn_jax.spectral_norms))(PARAMS, state)
    with pytest.raises(ValueError, match=r"<lambda>.*at module level"):
        exported.serialize()


def test_results_of_ours_are_serialized():
    project = project_spectral_norm(RULES, KEY)
    opt_state = project.init(PARAMS)
    step = jax.jit(lambda grads, state, params: project.update(grads, state, params)[1])
    stored = export.export(step)(PARAMS, opt_state, PARAMS).serialize()
    found = export.deserialize(stored).call(PARAMS, opt_state, PARAMS)
    assert isinstance(found, ProjectSpectralNormState)
    chex.assert_trees_all_close(found, step(PARAMS, opt_state, PARAMS), rtol=1e-6)

    norm = jax.jit(lambda w, x: sn_jax.power_iteration(lambda x: x @ w, x, 20))
    w, x = PARAMS["dense"]["kernel"], jnp.ones(3)
    found = export.deserialize(export.export(norm)(w, x).serialize()).call(w, x)
    assert isinstance(found, sn_jax.PowerResult)
    np.testing.assert_allclose(found.sigma, np.linalg.norm(w, 2), rtol=1e-5)


# jax.export: every platform, without one at hand.

PLATFORMS = ["cpu", "cuda", "tpu"]


def training_of_nnx(state, graphdef, x):
    model = nnx.merge(graphdef, state)
    return model(x), nnx.state(model)


def traced_functions():
    """name -> (function, arguments): all public functions that can be traced."""
    state = some_state()
    one = sn_jax.init(PARAMS, KEY, VIEWS)
    x = jnp.ones((2, 3))
    matrix = sn_jax.init({"w": jnp.ones((3, 4))}, KEY)

    def loss(params):
        return sum(map(jnp.sum, jax.tree.leaves(sn_jax.spectral_normalize(params, state)[0])))

    functions = {
        "init": (partial(sn_jax.init, rules=VIEWS), PARAMS, KEY),
        "init, two vectors": (partial(sn_jax.init, rules=VIEWS, n_vectors=2), PARAMS, KEY),
        "spectral_normalize": (sn_jax.spectral_normalize, PARAMS, one),
        "spectral_normalize, two vectors": (sn_jax.spectral_normalize, PARAMS, state),
        "spectral_normalize, steps": (
            lambda n: sn_jax.spectral_normalize(PARAMS, one, n_steps=n), jnp.int32(2)),
        "spectral_normalize, gradient": (jax.grad(loss), PARAMS),
        "spectral_norms": (sn_jax.spectral_norms, PARAMS, state),
        "spectral_penalty": (jax.grad(sn_jax.spectral_penalty), PARAMS, state),
        "residuals": (sn_jax.residuals, PARAMS, state),
        "calibrate": (sn_jax.calibrate, PARAMS, state),
        "power_iteration": (
            lambda w: sn_jax.power_iteration(lambda x: x @ w, jnp.ones(3), 3), jnp.ones((3, 4))),
        "local_lipschitz": (partial(sn_jax.local_lipschitz, jnp.tanh), jnp.ones(3)),
        "gram_iteration": (sn_jax.gram_iteration, jnp.ones((3, 4))),
        "spectral_stats": (sn_jax.spectral_stats, PARAMS, state),
        "clip_singular_values": (
            lambda w: sn_jax.clip_singular_values({"w": w}, matrix), jnp.ones((3, 4))),
    }  # fmt: skip
    for exact in (False, True):
        project = project_spectral_norm(RULES, KEY, exact=exact)
        opt_state = project.init(PARAMS)
        functions[f"project_spectral_norm, {exact}"] = project.update, PARAMS, opt_state, PARAMS
        functions[f"project_spectral_norm.init, {exact}"] = project.init, PARAMS
    for mutable in (["batch_stats"], []):
        model = sn_jax.linen.SpectralNorm(nn.Sequential([nn.Dense(4), nn.Dense(2)]))
        apply = partial(model.apply, mutable=mutable)
        functions[f"linen {mutable}"] = apply, model.init(KEY, x), x
    functions["linen, init"] = model.init, KEY, x
    layer = sn_jax.nnx.SpectralNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    for mode in (layer.train, layer.eval):
        mode()
        graphdef, variables = nnx.split(layer)
        run = partial(training_of_nnx, graphdef=graphdef, x=x)
        functions[f"nnx, {mode.__name__}"] = run, variables
    return functions


def test_every_traced_function_lowers_for_every_platform_without_float64():
    functions = traced_functions()
    on_host = {"norm_bounds", "spectral_norm", "lipschitz_bound", "register_lipschitz"}
    on_host |= {"singular_values", "margin_bounds", "certified_radius"}
    on_host |= {"lipschitz_attack"}  # whose steps are a loop on the host
    on_host |= {"rms_bound", "flat_scalars"}  # which compute nothing
    public = {name for name in sn_jax.__all__ if name[0].islower()} - on_host
    assert public == {name.partition(",")[0] for name in functions} & public
    for name, (function, *args) in functions.items():
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(*args)
        assert exported.platforms == tuple(PLATFORMS), name
        assert not re.search(r"\bf64\b|xf64\b", exported.mlir_module()), name
    with jax.enable_x64(True):  # the search finds what it looks for
        exported = export.export(jax.jit(sn_jax.gram_iteration))(np.ones((3, 4)))
        assert re.search(r"\bf64\b|xf64\b", exported.mlir_module())


# flax.serialization.


class StateWithNorms(TrainState):
    norms: sn_jax.State


def train_state(seed):
    tx = optax.chain(optax.adam(1e-3), project_spectral_norm(RULES, jax.random.key(seed)))
    state = StateWithNorms.create(apply_fn=None, params=PARAMS, tx=tx, norms=some_state(seed))
    return state.replace(step=seed)


def same_static(state, like):
    """tx and apply_fn are static, and fresh functions in every TrainState."""
    return state.replace(tx=like.tx)


def test_a_train_state_that_holds_a_state_goes_through_flax():
    saved, target = train_state(1), train_state(2)
    data = flax.serialization.to_bytes(saved)
    restored = flax.serialization.from_bytes(target, data)
    chex.assert_trees_all_equal(restored, same_static(saved, target))
    assert restored.norms["filter"].view == VIEWS["filter"]
    sn_jax.spectral_normalize(restored.params, restored.norms)
    plain = flax.serialization.msgpack_restore(data)["norms"]
    assert {path: entry["version"] for path, entry in plain.items()} == dict.fromkeys(VIEWS, 1)


def test_flax_restores_no_state_of_another_shape_or_version():
    plain = flax.serialization.to_state_dict(some_state())
    fewer = sn_jax.init(PARAMS, KEY, VIEWS)
    with pytest.raises(ValueError, match=r"u of .*conv/kernel is stored with shape \(2, 2, 2, 4\)"):
        flax.serialization.from_state_dict(fewer, plain)
    plain["filter"] = {**plain["filter"], "version": 2}
    with pytest.raises(ValueError, match="written in version 2"):
        flax.serialization.from_state_dict(some_state(), plain)


def test_flax_may_be_imported_after_sn_jax():
    code = """if True:
        import sn_jax, jax, jax.numpy as jnp, sys
        assert "flax" not in sys.modules
        import flax.serialization as serialization
        state = sn_jax.init({"w": jnp.ones((3, 2))}, jax.random.key(0))
        again = serialization.from_bytes(state, serialization.to_bytes(state))
        assert jax.tree.structure(again) == jax.tree.structure(state)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# orbax.


@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_a_state_that_orbax_read_without_a_template_is_a_state_again(tmp_path):
    state = some_state()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "state")
    again = from_state_dict(plain, VIEWS)
    chex.assert_trees_all_equal(again, state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(from_state_dict(plain, some_state(1)), state)
    with pytest.raises(ValueError, match=r"only the stored state has: filter"):
        from_state_dict(plain, {path: view for path, view in VIEWS.items() if path != "filter"})
    with pytest.raises(ValueError, match=r"own is stored with the shapes"):
        from_state_dict({**plain, "own": {**plain["own"], "u": np.ones((3, 4))}}, VIEWS)
    with pytest.raises(TypeError, match=r"A state is what .*Views alone"):
        from_state_dict(plain, {**VIEWS, "own": Doubled})
    # Views of another model are found when its parameters come.
    wrong = from_state_dict(plain, {**VIEWS, "dense/kernel": Matrix(1, 0)})
    with pytest.raises(ValueError, match="dense/kernel has shape"):
        sn_jax.spectral_norms(PARAMS, wrong)


# Checkpoints of both Flaxes, as they were written: the files must load for ever.

FIXTURES = Path(checkpoints.__file__).parent


def read(name):
    return flax.serialization.msgpack_restore((FIXTURES / name).read_bytes())


def normalized(kernel, scale=1.0):
    """By the exact norm of the kernel of a convolution, or of a dense layer with outputs last."""
    rows = kernel.shape[0] if kernel.ndim < 4 else kernel[..., 0].size
    return scale * kernel / np.linalg.norm(kernel.reshape(rows, -1).astype(np.float64), 2)


def test_a_linen_checkpoint_of_version_1_loads():
    variables = read("linen_v1.msgpack")
    model, x = checkpoints.LinenModel(), checkpoints.X
    fresh = jax.tree.map(jnp.shape, model.init(KEY, x))
    assert jax.tree.map(jnp.shape, variables) == fresh
    scale = variables["params"].pop("SpectralNorm_1")["Sequential_0/layers_0/kernel/scale"]
    assert scale != 1
    plain = {
        name: leaves | {"kernel": normalized(leaves["kernel"], scale if "General" in name else 1)}
        for name, leaves in variables["params"].items()
    }
    expected = checkpoints.LinenModel(wrapped=False).apply({"params": plain}, x)
    variables = read("linen_v1.msgpack")
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    trained, _ = model.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-5)


def test_an_nnx_checkpoint_of_version_1_loads():
    pure = read("nnx_v1.msgpack")
    model, plain, x = checkpoints.NNXModel(), checkpoints.NNXModel(wrapped=False), checkpoints.X
    state = nnx.state(model)
    assert jax.tree.map(jnp.shape, pure) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(model, state)
    scale = pure["dense"]["scales"]["kernel"]["scale"]
    assert scale != 1
    for name, layer in (("conv", plain.conv), ("dense", plain.dense), ("head", plain.head)):
        leaves = pure[name]["layer_instance"]
        kernel = normalized(leaves["kernel"], scale if name == "dense" else 1)
        layer.kernel[...] = jnp.asarray(kernel, jnp.float32)
        layer.bias[...] = jnp.asarray(leaves["bias"])
    model.eval()
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)


# optax.


def test_tree_map_params_goes_through_the_projection():
    specs = jax.tree.map(lambda _: "kernel's", PARAMS)
    project = project_spectral_norm(RULES, KEY)
    injected = optax.inject_hyperparams(project_spectral_norm)(RULES, KEY, bound=1.0)
    for tx, inner in (
        (optax.chain(optax.adam(1e-3), project), lambda state: state[1]),
        (optax.chain(optax.adam(1e-3), injected), lambda state: state[1].inner_state),
    ):
        state = tx.init(PARAMS)
        mapped = optax.tree_map_params(
            tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "replicated"
        )
        assert mapped[0][0].mu == specs
        assert inner(mapped) == ProjectSpectralNormState("replicated")
        untouched = optax.tree_map_params(tx, lambda x: x, state)
        chex.assert_trees_all_equal(inner(untouched), inner(state))
        assert jax.tree.structure(untouched) == jax.tree.structure(state)


# chex.


def test_a_train_step_is_traced_once():
    step = jax.jit(chex.assert_max_traces(sn_jax.spectral_normalize, n=1))
    params, state = PARAMS, some_state()
    for _ in range(3):
        params, state = step(params, state)
    chex.assert_tree_all_finite((params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)


# Out of the door: baked models in programs that know neither Flax nor sn_jax.


def served(make_layer):
    return nn.Sequential(
        [make_layer(nn.Conv(8, (3, 3), strides=2)), nn.relu, lambda x: x.sum((1, 2)),
         make_layer(nn.Dense(5))]
    )  # fmt: skip


WITHOUT = """
import sys
for name in ("sn_jax", "flax", "optax"):
    sys.modules[name] = None
import jax, numpy as np
from pathlib import Path
from jax import export
program = export.deserialize(bytearray(Path("program").read_bytes()))
for n in (1, 5):
    np.save(f"{n}.npy", program.call(np.load("x.npy")[:n]))
"""
PLAIN = """
import sys
sys.modules["sn_jax"] = None
import flax.linen as nn, numpy as np
from flax import serialization
from pathlib import Path
model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nn.relu, lambda x: x.sum((1, 2)),
                       nn.Dense(5)])
variables = serialization.msgpack_restore(Path("baked").read_bytes())
np.save("plain.npy", model.apply(variables, np.load("x.npy")))
"""


def test_a_baked_linen_model_is_served_without_sn_jax(tmp_path):
    """By jax.export with a symbolic batch, as large as the plain model's program; and by Flax."""
    x = noise(5, 6, 6, 3)
    model, plain = served(sn_jax.linen.SpectralNorm), served(lambda layer: layer)
    variables = model.init(KEY, x)
    expected = model.apply(variables, x)
    baked = sn_jax.linen.bake(model, variables, x)
    program, of_plain = (
        export.export(jax.jit(partial(plain.apply, v)))(symbolic(6, 6, 3)).serialize()
        for v in (baked, plain.init(KEY, x))
    )
    kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(baked))
    assert abs(len(program) - len(of_plain)) < 0.02 * len(of_plain)
    assert kernels < len(program) < 3 * kernels + 20_000
    (tmp_path / "program").write_bytes(program)
    (tmp_path / "baked").write_bytes(serialization.to_bytes(baked))
    np.save(tmp_path / "x.npy", x)
    for code in (WITHOUT, PLAIN):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    for n in (1, 5):
        np.testing.assert_allclose(np.load(tmp_path / f"{n}.npy"), expected[:n], atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "plain.npy"), expected, atol=1e-5)


def test_a_baked_nnx_model_is_exported_and_loads_in_the_plain_one():
    rngs, x = nnx.Rngs(0), noise(5, 3)
    layers = [nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)]
    wrapped = [sn_jax.nnx.SpectralNorm(layer, rngs=rngs) for layer in layers]
    model = nnx.Sequential(wrapped[0], nnx.relu, wrapped[1])
    model.eval()
    baked = sn_jax.nnx.bake(model)
    stored = export.export(jax.jit(lambda x: baked(x)))(symbolic(3)).serialize()
    program = export.deserialize(stored)
    for n in (1, 5):
        np.testing.assert_allclose(program.call(x[:n]), model(x[:n]), atol=1e-6)
    plain = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
    nnx.update(plain, serialization.from_bytes(
        nnx.to_pure_dict(nnx.state(plain)),
        serialization.to_bytes(nnx.to_pure_dict(nnx.state(baked))),
    ))  # fmt: skip
    np.testing.assert_allclose(plain(x), model(x), atol=1e-6)
