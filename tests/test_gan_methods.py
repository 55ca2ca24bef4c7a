"""The methods that the paper compares: each trains, and does what it promises."""

from functools import lru_cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax

import sn_jax
import sn_jax.linen
from experiments.data import load
from experiments.gan.methods import METHODS, Batch
from experiments.gan.networks import (
    ARCHITECTURES,
    Discriminator,
    ResNetDiscriminator,
    ResNetGenerator,
    Standardize,
    deconvolution,
    fit,
    fitting_size,
)
from experiments.gan.train import Config, Data, compiled, make_training

pytestmark = [pytest.mark.float32, pytest.mark.xdist_group("gan methods")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Half of the methods' programs are the same program: it is compiled once."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("cache")))
    jax.config.update(names[1], 0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def data():
    images, labels = load("digits", "train")
    return Data(jnp.asarray(images[:, 2:6, 2:6]), jnp.asarray(labels))


# --- Every method in the step -----------------------------------------------------------------


def matrices(params):
    kernels = {k: w for k, w in flatten_dict(params, sep="/").items() if w.ndim > 1}
    return {k: np.asarray(w).reshape(-1, w.shape[-1]) for k, w in kernels.items()}


def no_promise(before, after, config):
    pass


def in_the_box(before, after, config):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(after.d_params))
    assert largest == np.float32(config.strength)  # reached, biases included


def unit_columns(before, after, config):
    used = METHODS["wn"].apply(after.d_params, {})
    for name, w in matrices(used).items():
        np.testing.assert_allclose(np.linalg.norm(w, axis=0), 1, rtol=1e-5, err_msg=name)
    for name, w in matrices(after.d_params).items():
        assert np.abs(np.linalg.norm(w, axis=0) - 1).max() > 1e-3, f"{name}: raw weights are free"


def unit_norms(before, after, config):
    used = METHODS[config.normalization].apply(after.d_params, after.d_method)
    used = flatten_dict(used, sep="/")
    for path, singular in after.d_method.items():
        # The estimate is from below, and one iteration a step lags where singular values cross.
        norm = float(sn_jax.spectral_norm(used[path], singular.view))
        assert 0.999 < norm < 1.2, path
    kinds = {type(singular.view) for singular in after.d_method.values()}
    assert (sn_jax.Conv in kinds) == (config.normalization == "sn-operator")


def in_the_ball(before, after, config):
    norms = [np.linalg.norm(w, 2) for w in matrices(after.d_params).values()]
    assert 0.9 * config.strength < max(norms) < 1.04 * config.strength


def falls(before, after, config):
    """What is penalized, strongly, is less than half of what it was."""
    penalty = METHODS[config.normalization].penalty
    old, new = (penalty(state.d_params, state.d_method, None) for state in (before, after))
    assert float(new) < float(old) / 2


PROMISES = {
    "none": (no_promise, None),
    "clip": (in_the_box, 0.02),
    "gp": (no_promise, None),  # test_gradient_penalty_of_a_linear_critic
    "wn": (unit_columns, None),
    "bn": (no_promise, None),  # test_standardized_outputs
    "ln": (no_promise, None),
    "orthonormal": (falls, 10.0),
    "l2": (falls, 100.0),
    "lasso": (falls, 100.0),
    "sn-regularization": (falls, 100.0),
    "sn": (unit_norms, None),
    "sn-operator": (unit_norms, None),
    "sn-gp": (unit_norms, None),
    "projection": (in_the_ball, 0.5),
}


def test_every_method_has_a_promise():
    assert set(PROMISES) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_keeps_its_promise(name, data):
    promise, strength = PROMISES[name]
    config = Config(
        normalization=name, strength=strength, width=2, batch_size=8,
        # Fast enough for a penalty to show; slow enough for one power iteration a step to follow.
        learning_rate=1e-3 if name.startswith("sn") and strength is None else 0.02,
        loss="wasserstein" if "gp" in name else "non-saturating",
    )  # fmt: skip
    training = make_training(config, (4, 4, 1))
    state = training.init(jax.random.key(0))
    if name == "orthonormal":  # it begins with no penalty at all
        used = [w for w in matrices(state.d_params).values() if 1 not in w.shape]
        for w in used:
            gram = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
        state = state._replace(d_params=jax.tree.map(lambda w: 1.5 * w, state.d_params))
    before = jax.tree.map(np.array, state)
    for _ in range(50):
        state, losses = training.step(state, data)
        assert all(np.isfinite(loss) for loss in losses.values())
    after = jax.device_get(state)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    promise(before, after, config)


def test_settings_and_strengths_share_one_program(data):
    config = Config(normalization="clip", width=2, batch_size=8, loss="non-saturating")
    functions = compiled(config.program(), (4, 4, 1), 1)
    for options in ({"setting": "A"}, {"setting": "F", "strength": 0.5, "schedule": "linear"}):
        config = Config(normalization="clip", width=2, batch_size=8, loss="non-saturating",
                        **options)  # fmt: skip
        training = make_training(config, (4, 4, 1))
        state, _ = training.step(training.init(jax.random.key(0)), data)
        assert int(state.d_opt.count) == 5
        assert max(np.abs(x).max() for x in jax.tree.leaves(state.d_params)) <= np.float32(
            config.strength or 0.01
        )
    assert functions.discriminator_step._cache_size() == 1
    assert functions.last_step._cache_size() == 1


def test_gradient_penalty_of_a_linear_critic():
    direction = np.random.default_rng(0).standard_normal((2, 2, 3)).astype(np.float32)
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 2, 2, 3)), jnp.float32)
    batch = Batch(lambda x: jnp.sum(x * direction, (1, 2, 3)), *images, jax.random.key(0))
    value = METHODS["gp"].penalty({}, {}, batch)
    assert float(value) == pytest.approx((np.linalg.norm(direction) - 1) ** 2, rel=1e-5)
    # Between real and generated images: this one's gradient at x is x.
    batch = Batch(lambda x: jnp.sum(x**2, (1, 2, 3)) / 2, jnp.ones((64, 1, 1, 1)),
                  jnp.full((64, 1, 1, 1), 3.0), jax.random.key(0))  # fmt: skip
    assert 0 < float(METHODS["gp"].penalty({}, {}, batch)) < 4
    assert float(METHODS["gp"].penalty({}, {}, batch)) == pytest.approx(4 / 3, rel=0.3)
    # No gradient at all: still a finite one of the penalty.
    flat = lambda a: Batch(lambda x: a * jnp.sum(x, (1, 2, 3)), *images, batch.key)  # noqa: E731
    assert np.isfinite(jax.grad(lambda a: METHODS["gp"].penalty({}, {}, flat(a)))(0.0))


@pytest.mark.parametrize("name", ["bn", "ln"])
def test_standardized_outputs(name):
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (6, 4, 4, 3))
    y, _ = Standardize(METHODS[name].axes, jnp.float32).init_with_output(jax.random.key(0), x)
    axes = METHODS[name].axes
    np.testing.assert_allclose(jnp.mean(y, axes), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.var(y, axes), 1, rtol=1e-3)
    # In the network: the scale of a kernel that it follows does not matter.
    critic = Discriminator(2, axes=axes)
    apply, variables = jax.jit(critic.apply), jax.jit(critic.init)(jax.random.key(0), x)
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, w: 7 * w if path[-2].key == "Conv_2" else w, variables
    )
    # A little: its epsilon is there.
    np.testing.assert_allclose(apply(scaled, x), apply(variables, x), atol=1e-2)
    alone = jnp.concatenate([apply(variables, x[i : i + 1]) for i in range(6)])
    differ = jnp.abs(alone - apply(variables, x)).max()
    assert (differ > 1e-2) == (name == "bn")


# --- Networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 2, 2, 5), (2, 4, 6, 3)])
def test_deconvolution_is_xlas(shape):
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in
                 enumerate([shape, (4, 4, shape[-1], 2)]))  # fmt: skip
    xlas = partial(lax.conv_transpose, strides=(2, 2), padding="SAME")
    values = []
    for f in (deconvolution, xlas):
        y, vjp = jax.vjp(f, x, kernel)
        values.append([y, *vjp(jnp.cos(jnp.arange(y.size).reshape(y.shape)))])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *values)


def shapes(module, x, **kwargs):
    init = partial(module.init, **kwargs)
    return jax.eval_shape(init, jax.random.key(0), x)["params"]


def size_of(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def conv_shapes(params):
    """In the order of the calls."""
    names = sorted((n for n in params if n.startswith("Conv")), key=lambda n: int(n.split("_")[1]))
    return [params[name]["kernel"].shape for name in names]


def test_resnet_at_32_is_the_papers():
    params = shapes(ResNetDiscriminator(), jnp.zeros((1, 32, 32, 3)))
    first = [(3, 3, 3, 128), (3, 3, 128, 128), (1, 1, 3, 128)]
    second = [(3, 3, 128, 128), (3, 3, 128, 128), (1, 1, 128, 128)]
    assert conv_shapes(params) == [*first, *second, *(4 * [(3, 3, 128, 128)])]
    assert params["Dense_0"]["kernel"].shape == (128, 1)
    assert round(size_of(params) / 1e6, 2) == 1.05
    params = shapes(ResNetGenerator(32, 3), jnp.zeros((1, 128)), train=True)
    block = [(1, 1, 256, 256), (3, 3, 256, 256), (3, 3, 256, 256)]
    assert sorted(conv_shapes(params)) == sorted(3 * block + [(3, 3, 256, 3)])
    assert params["Dense_0"]["kernel"].shape == (128, 4 * 4 * 256)
    assert round(size_of(params) / 1e6, 2) == 4.28


@pytest.mark.parametrize(
    ("size", "generator", "discriminator"),
    [
        (48, (6 * 6 * 512, [256, 128, 64]), [64, 128, 256, 512, 1024]),
        (128, (4 * 4 * 1024, [1024, 512, 256, 128, 64]), [64, 128, 256, 512, 1024, 1024]),
    ],
)
def test_larger_resnets_are_the_papers(size, generator, discriminator):
    params = shapes(ResNetGenerator(size, 3), jnp.zeros((1, 128)), train=True)
    assert params["Dense_0"]["kernel"].shape == (128, generator[0])
    ones = [shape for shape in conv_shapes(params) if shape[0] == 1]
    assert [shape[-1] for shape in ones] == generator[1]
    params = shapes(ResNetDiscriminator(), jnp.zeros((1, size, size, 3)))
    ones = [shape for shape in conv_shapes(params) if shape[0] == 1]
    shortcuts = [shape[-1] for shape in ones]
    # The last block of 128x128 leaves both the grid and the channels as they are.
    assert shortcuts == list(dict.fromkeys(discriminator))
    assert params["Dense_0"]["kernel"].shape == (discriminator[-1], 1)


def test_the_authors_cnn_is_wider_before():
    critic = ARCHITECTURES["cnn-authors"].discriminator()
    params = shapes(critic, jnp.zeros((1, 32, 32, 3)))
    assert [s[-1] for s in conv_shapes(params)] == [64, 128, 128, 256, 256, 512, 512]
    variables = critic.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert float(jnp.std(variables["params"]["Conv_2"]["kernel"])) == pytest.approx(0.02, rel=0.02)


def test_the_authors_resnet_starts_otherwise():
    critic = ARCHITECTURES["resnet-authors"].discriminator(width=16)
    params = critic.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    glorot = 2 / (9 * 32 + 9 * 32)
    # Of the residual branch, and of the shortcut.
    for name, gain, fan in [("Conv_3", 2, glorot), ("Conv_5", 1, 2 / (32 + 32))]:
        kernel = params[name]["kernel"]
        assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(gain * fan), rel=0.05), name
        assert float(jnp.abs(kernel).max()) <= np.sqrt(3 * gain * fan)  # uniform


def test_cosgroves_networks():
    """The numbers of parameters are those of the PyTorch code of 2018."""
    networks = ARCHITECTURES["cosgrove"]
    params = shapes(networks.discriminator(), jnp.zeros((1, 32, 32, 3)))
    assert size_of(params) == 1_053_825
    params = shapes(networks.generator(32, 3), jnp.zeros((1, 128)), train=True)
    assert size_of(params) == 1_154_947
    assert {shape[:2] for shape in conv_shapes(params)} == {(3, 3)}  # shortcuts have none
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    critic = networks.discriminator(width=16)
    variables = jax.jit(critic.init)(jax.random.key(0), x)
    for name, gain, fan in [("Conv_3", 1, 1 / (9 * 32)), ("Conv_5", 2, 1 / 32)]:
        kernel = variables["params"][name]["kernel"]
        assert float(jnp.std(kernel)) == pytest.approx(np.sqrt(gain * fan), rel=0.05), name
    # The mean over the last 2x2 pixels, where the paper's has their sum; biases are zero.
    scores = (jax.jit(net.apply)(variables, x) for net in (critic, ResNetDiscriminator(16)))
    np.testing.assert_allclose(4 * next(scores), next(scores), rtol=1e-4)


@pytest.mark.parametrize("size", [8, 12, 16, 24, 32, 40, 64])
def test_resnets_of_any_size(size):
    generate = partial(ResNetGenerator(size, 2, 1).init_with_output, train=True)
    images, _ = jax.eval_shape(generate, jax.random.key(0), jnp.zeros((5, 128)))
    scores, _ = jax.eval_shape(ResNetDiscriminator(1).init_with_output, jax.random.key(0), images)
    assert (images.shape, scores.shape) == ((5, size, size, 2), (5,))


def test_a_conditional_discriminator_is_a_projection():
    critic = ResNetDiscriminator(2, n_classes=3)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    apply, variables = jax.jit(critic.apply), jax.jit(critic.init)(jax.random.key(1), x, labels)
    without = jax.tree.map(jnp.copy, variables)
    without["params"]["Embed_0"]["embedding"] *= 0
    params = variables["params"]
    scores, plain = (apply(v, x, labels) for v in (variables, without))
    # With the label's vector in the place of the dense layer's, the rest is left.
    dense = jax.tree.map(jnp.zeros_like, params["Dense_0"])
    for label in range(3):
        kernel = params["Embed_0"]["embedding"][label][:, None]
        swapped = {"params": without["params"] | {"Dense_0": dense | {"kernel": kernel}}}
        rows = labels == label
        np.testing.assert_allclose(
            (scores - plain)[rows], apply(swapped, x, labels)[rows], rtol=1e-4, atol=1e-5
        )
    views = sn_jax.linen.views(critic, variables, x, labels)
    assert isinstance(views["Embed_0/embedding"], sn_jax.Matrix)


def test_conditional_batch_norm_starts_as_a_plain_one():
    generator = ResNetGenerator(8, 1, 1, n_classes=3)
    z = jax.random.normal(jax.random.key(0), (4, 128))
    init = jax.jit(partial(generator.init, train=True))
    variables = init(jax.random.key(0), z, jnp.arange(4) % 3)
    sample = jax.jit(partial(generator.apply, mutable=["batch_stats"], train=True))
    one, two = (
        sample(variables, z, labels)[0] for labels in (jnp.zeros(4, int), jnp.arange(4) % 3)
    )
    np.testing.assert_array_equal(one, two)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, w: w.at[1].add(1.0) if path[-2].key == "offset" else w, variables
    )
    other = sample(moved, z, jnp.array([0, 1, 2, 2]))[0]
    assert jnp.abs(other - one)[1].max() > 1e-3


# --- Options of the engine ----------------------------------------------------------------------


@lru_cache  # a fixture of the module would run outside of the tests' settings of JAX
def everything():
    """One program with every option on: it trains three steps."""
    config = Config(
        architecture="resnet", conditional=True, width=1, batch_size=4, g_batch_size=6, steps=3,
        schedule="linear", ema=0.9, flip=True, dtype="bfloat16", normalization="sn", n_dis=2,
    )  # fmt: skip
    images, labels = load("digits", "train")
    training, data = make_training(config, (8, 8, 1), 10), Data(images, labels)
    states = [training.init(jax.random.key(0))]
    for _ in range(4):
        state, losses = training.step(jax.tree.map(jnp.copy, states[-1]), data)
        assert all(np.isfinite(loss) for loss in losses.values())
        states.append(state)
    return training, [jax.device_get(state) for state in states]


def test_ema_is_the_average():
    _, states = everything()
    for t, (old, new) in enumerate(pairwise(states)):
        decay = min(0.9, (1 + t) / (10 + t))
        mean = lambda a, b, d=decay: d * a + (1 - d) * b  # noqa: E731
        expected = jax.tree.map(mean, old.g_ema, (new.g_params, new.g_stats))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), new.g_ema, expected)


def test_samples_are_of_the_average():
    training, states = everything()
    z, labels = jnp.ones((2, 128)), jnp.arange(2)
    last = states[3]
    averaged = last._replace(g_params=last.g_ema[0], g_stats=last.g_ema[1])
    samples = training.sample(last, z, labels)
    assert samples.dtype == jnp.float32
    np.testing.assert_array_equal(samples, training.sample(averaged, z, labels))


def test_the_learning_rate_goes_to_zero():
    _, states = everything()
    moved = [
        max(np.abs(a - b).max() for a, b in zip(
            jax.tree.leaves(old.g_params), jax.tree.leaves(new.g_params), strict=True))
        for old, new in pairwise(states)
    ]  # fmt: skip
    assert moved[0] <= 1.01 * 2e-4  # Adam's first step
    assert moved[0] > 0
    assert moved[3] == 0  # the fourth step of three


def test_bfloat16_leaves_weights_and_norms_in_float32():
    _, states = everything()
    floats = [x for x in jax.tree.leaves(states[1]) if not np.issubdtype(x.dtype, np.integer)]
    assert {str(x.dtype) for x in floats} == {"float32"}


def test_flips_mirror_from_left_to_right(monkeypatch):
    """The one image is black on its left: seen mirrored by some, never turned over."""
    seen = []

    def look(params, state, batch):
        jax.debug.callback(lambda real: seen.append(np.asarray(real)), batch.real)
        return 0.0

    monkeypatch.setitem(METHODS, "none", METHODS["none"]._replace(penalty=look))
    config = Config(width=1, batch_size=16, flip=True, normalization="none")
    image = np.zeros((1, 4, 4, 1), np.uint8)
    image[0, 0, :2] = 255
    training = make_training(config, (4, 4, 1))
    training.step(training.init(jax.random.key(0)), Data(image, np.zeros(1, np.int32)))
    jax.effects_barrier()
    (real,) = seen
    mirrored = [not np.array_equal(x, real[0]) for x in real]
    assert 0 < sum(mirrored) < 16
    assert (real[:, 0].max((1, 2)) == 1).all()
    assert (real[:, 1:] == -1).all()
    np.testing.assert_array_equal(real[mirrored.index(True)], real[0][:, ::-1])


# --- Images that do not fit ---------------------------------------------------------------------


def test_small_images_are_padded():
    images = np.full((2, 28, 26, 1), 200, np.uint8)
    assert fitting_size("cnn", 28) == 32
    assert fitting_size("resnet", 48) == 48
    assert fitting_size("resnet", 3) == 8
    fitted = fit(images, 32)
    assert fitted.shape == (2, 32, 32, 1)
    np.testing.assert_array_equal(fitted[:, 2:30, 3:29], images)
    assert int(fitted.sum()) == int(images.sum(dtype=int))


def test_large_images_are_resized():
    images = np.zeros((3, 40, 80, 3), np.uint8)
    images[..., 1] = 100
    fitted = np.asarray(fit(images, 16))
    assert fitted.shape == (3, 16, 16, 3)
    assert fitted.dtype == np.uint8
    np.testing.assert_array_equal(fitted[:, 4:12, :, 1], 100)
    assert fitted[:, :4].max() == fitted[:, 12:].max() == fitted[..., 0].max() == 0
