"""Every error of the public functions, with a call that raises it.

Together with the tables of test_silence.py (what would otherwise pass) and of test_convert.py: the
last test reads the source, and fails for an error that no table raises.
"""

import ast
import dataclasses
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_silence import (
    IMAGES,
    KEY,
    PARAMS,
    TYPE_ERRORS,
    VALUE_ERRORS,
    X,
    init,
    linen_block,
    linen_wrapper,
    nnx_block,
    normalize,
    ones,
)

import sn_jax
from sn_jax import Conv, Linear, Matrix, Scaled
from sn_jax.transforms import project_spectral_norm

pytestmark = pytest.mark.float32
KERNEL = IMAGES["conv"]["kernel"]  # (3, 3, 2, 4)
BOUND = sn_jax.lipschitz_bound


def domain(view, *shape):
    return view.domain(shape)


def wrapped(layer=None, **options):
    rngs = nnx.Rngs(0)
    layer = nnx.Linear(3, 4, rngs=rngs) if layer is None else layer
    return sn_jax.nnx.SpectralNorm(layer, rngs=rngs, **options)


def applied(model, variables, **options):
    return model.apply(variables, X, **options)


@functools.cache
def of_dense(**options):
    """(wrapper, its variables)"""
    model = sn_jax.linen.SpectralNorm(nn.Dense(2), **options)
    return model, model.init(KEY, X)


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


def loaded(shape=(3, 2), **options):
    """Into a linen wrapper around Dense(2), parameters and a state of another shape."""
    params = {"kernel": ones(*shape), "bias": ones(2)}
    _, variables = of_dense()
    return sn_jax.linen.load_state(variables, params, init(params=params, **options))


def nnx_loaded(shape=(3, 4), views=None):
    params = {"kernel": ones(*shape), "bias": ones(4)}
    return sn_jax.nnx.load_state(wrapped(store_v=True), params, init(views, params))


def certified(view, w):
    return normalize({"w": w}, {"w": view}, mode="certified")[0]["w"]


def on_one_device(function):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"))


def projected(params):
    project = project_spectral_norm({"w": Matrix()}, KEY, exact=True)
    return project.update(params, project.init(params), params)


class Holder(nn.Module):
    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


def running_sums(w, x):
    return w * jnp.cumsum(x)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A view of one's own: ``running_sums`` by each row."""

    def batch_shape(self, shape):
        return shape[:1]

    def domain(self, shape):
        return shape[1:]

    def matvec(self, w, x):
        return jax.vmap(running_sums)(w, x)

    def scale(self, w, factor):
        return w * factor[:, None]


class Diagonal(Matrix):
    """A view that says more of its kernel than it can be asked about."""

    __hash__ = None


# call -> what the sentence must hold.
TABLE = {
    # init, spectral_normalize, calibrate, states
    "no vectors": (lambda: init(n_vectors=0), ["n_vectors", ">= 1", "0"]),
    "a view that does not fit": (
        lambda: init({"enc/kernel": Matrix(0, 5)}),
        ["enc/kernel", "(3, 2)", "axis 5"],
    ),
    "an unknown mode": (lambda: normalize(mode="cap"), ["'cap'", '"divide"', '"certified"']),
    "a certificate of any linear map": (
        lambda: certified(Linear(jnp.multiply, (2, 2)), ones(2, 2)),
        ["w of shape (2, 2)", "Matrix and Conv alone", "norm_bounds"],
    ),
    "a certificate of a block": (
        lambda: on_one_device(functools.partial(certified, Matrix(split=P("d"))))(ones(2, 2)),
        ["w of shape (2, 2)", "one block", "outside of shard_map"],
    ),
    "a certificate in a wrapper": (
        lambda: of_dense(mode="certified"),
        ["'certified'", '"divide" or "clip"', "sn_jax.spectral_normalize"],
    ),
    "an unknown gradient": (lambda: normalize(gradient="none"), ["'none'", '"stop"']),
    "rtol 0": (lambda: sn_jax.calibrate(PARAMS, init(), rtol=0.0), ["rtol", "> 0", "0.0"]),
    "a state of another model": (
        lambda: sn_jax.spectral_norms({"enc": PARAMS["enc"]}, init()),
        ["'dec/kernel'", "enc/kernel", "sn_jax.init"],
    ),
    "a negative bound": (lambda: normalize(bound=-1.0), ["kernel", "positive", "-1.0"]),
    "half a step": (lambda: normalize(n_steps=0.5), ["n_steps", "integer", "0.5"]),
    "a step back": (lambda: normalize(n_steps=-1), ["n_steps", "at least 0", "-1"]),
    "two parameters of one path": (
        lambda: init(params={"a/b": ones(2, 2), "a": {"b": ones(2, 2)}}),
        ["'a/b'", "rename"],
    ),
    "no regular expression": (lambda: init({"(": Matrix()}), ["'('", "re.escape"]),
    "a string among the parameters": (
        lambda: init({"name": Matrix()}, {"name": "critic"}),
        ["name", "str", "None"],
    ),
    "integers": (
        lambda: init({"w": Matrix()}, {"w": jnp.ones((2, 2), jnp.int32)}),
        ["w of shape (2, 2)", "int32", "convert"],
    ),
    "nothing to normalize": (
        lambda: init(params={"bias": ones(3)}),
        ["No parameter to normalize", "bias"],
    ),
    "a state of other arrays": (
        lambda: sn_jax.convert.from_state_dict(
            {"w": {"u": ones(3), "v": ones(1, 2), "sigma": ones()}}, {"w": Matrix()}
        ),
        ["w is stored", "'u': (3,)", "(*batch, k, *codomain)"],
    ),
    # power_iteration
    "an integer start": (
        lambda: sn_jax.power_iteration(lambda x: x, jnp.arange(3), 1),
        ["v0", "int32"],
    ),
    "more batch axes than axes": (
        lambda: sn_jax.power_iteration(lambda x: x, ones(3), 1, batch_ndim=2),
        ["batch_ndim=2", "(3,)"],
    ),
    # norms
    "no matrix for gram_iteration": (lambda: sn_jax.gram_iteration(ones(3)), ["(3,)", "n_steps"]),
    "no key for a Linear": (
        lambda: sn_jax.norm_bounds(ones(3), Linear(jnp.multiply, 3)),
        ["Linear", "probabilistic", "key=jax.random.key"],
    ),
    "norms inside jit": (lambda: jax.jit(sn_jax.spectral_norm)(ones(2, 2)), ["outside of jit"]),
    "norms to no accuracy": (lambda: sn_jax.norm_bounds(ones(2, 2), rtol=0), ["rtol", "> 0"]),
    "norms of integers": (lambda: sn_jax.norm_bounds(np.ones((2, 2), int)), ["int64"]),
    "norms of NaN": (
        lambda: sn_jax.norm_bounds(np.diag([1.0, np.nan])),
        ["1 of 4 weights", "(2, 2)", "not finite"],
    ),
    "more digits than there are": (
        lambda: sn_jax.spectral_norm(np.ones((3, 3, 4, 4)), Conv((20, 20)), rtol=1e-17),
        ["Conv((20, 20)", "rtol=1e-17", "larger rtol"],
    ),
    "more digits than a view of one's own has": (
        lambda: sn_jax.spectral_norm(np.ones(7), Linear(running_sums, 7), rtol=1e-30),
        ["residual of Linear(", "(7,)", "larger rtol"],
    ),
    "and in a stack": (
        lambda: sn_jax.spectral_norm(np.ones((2, 7)), Rows(), rtol=1e-30),
        ["residual of Rows()", "batch element (0,)", "larger rtol"],
    ),
    "more vectors than fit": (
        lambda: sn_jax.norm_bounds(ones(10**6), Linear(jnp.multiply, 10**6), rtol=1e-9, key=KEY),
        ["rtol=1e-09", "GiB", "larger rtol"],
    ),
    "less than no work": (lambda: sn_jax.norm_bounds(ones(2, 2), work=-1), ["work", ">= 0", "-1"]),
    # views
    "axes by name": (lambda: Matrix("in", 1), ["in_axes=('i', 'n')", "integers"]),
    "an axis twice": (lambda: Matrix((0, 0), 1), ["(0, 0)", "once"]),
    "an axis in and out": (lambda: domain(Matrix(0, -3), 3, 4, 5), ["twice", "3 axes"]),
    "an axis that is not there": (lambda: domain(Matrix(0, 3), 3, 4), ["axis 3", "2 axes"]),
    "a split by a string": (lambda: Matrix(split="fsdp"), ["'fsdp'", "PartitionSpec"]),
    "a split of more axes": (
        lambda: domain(Matrix(split=P(None, None, "tp")), 3, 4),
        ["3 entries", "2 axes"],
    ),
    "a stack where a kernel was": (
        lambda: domain(Matrix(0, 1, rank=2), 5, 3, 4),
        ["2 axes", "this one has 3", "stack"],
    ),
    "no stride": (lambda: Conv((8, 8), strides=0), ["strides=0", ">= 1", "2 dimensions"]),
    "an unknown padding": (lambda: Conv((8, 8), padding="WRAP"), ["'WRAP'", "CIRCULAR"]),
    "a padding of three": (lambda: Conv((8, 8), padding=(1, 1, 1)), ["(1, 1, 1)", "2 dimensions"]),
    "no image size": (lambda: Conv(()), ["()", "one to three"]),
    "a transposed one with groups": (
        lambda: Conv((8, 8), transpose=True, feature_group_count=2),
        ["transpose=True", "groups"],
    ),
    "groups that do not divide": (
        lambda: domain(Conv((8, 8), feature_group_count=3), *KERNEL.shape),
        ["3 groups", "4 output channels", "(3, 3, 2, 4)"],
    ),
    "a kernel larger than the image": (
        lambda: domain(Conv((2, 2), padding="VALID"), *KERNEL.shape),
        ["no output", "(3, 3)", "larger input_shape"],
    ),
    "a dense kernel for a Conv": (lambda: domain(Conv((8, 8)), 3, 4), ["2 axes", "*spatial"]),
    "no function": (lambda: Linear(ones(2, 2), 2), ["fn", "fn(w, x)"]),
    "no shape": (lambda: Linear(jnp.multiply, "3"), ["domain='3'", "shape of x"]),
    "a negative size": (lambda: Linear(jnp.multiply, -1), ["domain=-1", "at least 0"]),
    "a traced factor": (
        lambda: jax.jit(lambda f: Scaled(Matrix(), f).factor)(ones(2, 2)),
        ["traced", "outside of jit"],
    ),
    "a complex factor": (lambda: Scaled(Matrix(), 1j), ["complex", "real"]),
    "a factor that does not fit": (
        lambda: init({"w": Scaled(Matrix(), np.ones((3, 3)))}, {"w": ones(3, 4)}),
        ["broadcast", "(3, 4)"],
    ),
    # a map that is none
    "a view that returns two": (
        lambda: init({"w": Linear(lambda w, x: (x, x), 2)}, {"w": ones(2)}),
        ["w of shape (2,)", "tuple", "one array", "jnp.concatenate"],
    ),
    "a view that is not linear": (
        lambda: init({"w": Linear(lambda w, x: w * x**2, 2)}, {"w": ones(2)}),
        ["w of shape (2,)", "not linear in x"],
    ),
    "a view that adds": (
        lambda: init({"w": Linear(lambda w, x: (w + 1) * x, 2)}, {"w": ones(2)}),
        ["w of shape (2,)", "not linear in w"],
    ),
    # caps and spectra
    "no power": (
        lambda: sn_jax.spectral_penalty(PARAMS, init(), power=0),
        ["power", ">= 1", "0"],
    ),
    "clipped by an unknown method": (
        lambda: sn_jax.clip_singular_values(PARAMS, init(), method="qr"),
        ["'qr'", '"svd"', '"polar"'],
    ),
    "a clipped convolution": (
        lambda: sn_jax.clip_singular_values(
            IMAGES, init({".*": Conv((4, 4), padding="VALID")}, IMAGES)
        ),
        ["conv/kernel", "(3, 3, 2, 4)", 'mode="clip"'],
    ),
    "a maximum that is none": (
        lambda: sn_jax.flat_scalars({"heads": ones(4)}, reduce=jnp.abs),
        ["heads", "(4,)", "jnp.max"],
    ),
    "more singular values than there are": (
        lambda: sn_jax.singular_values(ones(3, 2), k=3),
        ["k", "from 1 to 2", "(3, 2)"],
    ),
    "all singular values of a large map": (
        lambda: sn_jax.singular_values(np.ones(5000), Linear(jnp.multiply, 5000)),
        ["(5000,)", "at most 4096", "give k"],
    ),
    # optax
    "a projection of an unknown mode": (
        lambda: project_spectral_norm(None, KEY, mode="project"),
        ["'project'", '"clip"', '"divide"'],
    ),
    "Muon on a map of no axes": (
        lambda: sn_jax.transforms.muon_dimension_numbers(
            {"w": ones(3)}, {"w": Linear(jnp.multiply, 3)}
        ),
        ["w of shape (3,)", "Linear", "Adam"],
    ),
    "a traced exact": (
        lambda: jax.jit(lambda e: project_spectral_norm(None, KEY, exact=e).init(PARAMS))(True),
        ["exact", "traced"],
    ),
    "no parameters to project": (
        lambda: project_spectral_norm(None, KEY).update(
            PARAMS, project_spectral_norm(None, KEY).init(PARAMS)
        ),
        ["needs the parameters", "opt_state, params"],
    ),
    "too large to be exact": (
        lambda: jax.eval_shape(projected, {"w": jax.ShapeDtypeStruct((20000, 16400), "float32")}),
        ["exact=True", "(20000, 16400)", "exact=False"],
    ),
    # linen
    "views of parameters": (
        lambda: sn_jax.linen.views(linen_block(), {"layers_0": {}}, X),
        ["variables", "'params'"],
    ),
    "views of parameters that are named": (
        lambda: sn_jax.linen.views(nn.Dense(4), {"kernel": ones(3, 4), "bias": ones(4)}, X),
        ["kernel, bias", "{'params': them}"],
    ),
    "bake of parameters": (
        lambda: sn_jax.linen.bake(nn.Dense(4), {"kernel": ones(3, 4)}, X),
        ["bake(model, variables, x)", "'params'", "kernel"],
    ),
    "bake in the wrong order": (
        lambda: sn_jax.linen.bake(nn.Dense(4), X, nn.Dense(4).init(KEY, X)),
        ["bake(model, variables, x)", "ArrayImpl"],
    ),
    "convolutions seen in a way that is none": (
        lambda: sn_jax.linen.views(linen_block(), linen_block().init(KEY, X), X, conv="fft"),
        ["conv", '"reshape"', '"operator"', "'fft'"],
    ),
    "the same where there is no convolution": (
        lambda: linen_wrapper(nn.Dense(2), conv="fft"),
        ["conv", '"reshape"', '"operator"', "'fft'"],
    ),
    "nothing to normalize in a layer": (
        lambda: linen_wrapper(nn.LayerNorm()),
        ["no kernel", "scale"],
    ),
    "bake without a wrapper": (
        lambda: sn_jax.linen.bake(linen_block(), linen_block().init(KEY, X), X),
        ["no sn_jax.linen.SpectralNorm", "Sequential"],
    ),
    "steps that are no number": (
        lambda: linen_wrapper(nn.Dense(2), n_steps="15"),
        ["n_steps must be an integer", "'15'"],
    ),
    "no steps in linen": (lambda: linen_wrapper(nn.Dense(2), n_steps=0), ["n_steps >= 1", "0"]),
    "a number wrapped": (lambda: linen_wrapper(4), ["nn.Dense(4)", "not 4"]),
    "wrapped twice": (
        lambda: linen_wrapper(sn_jax.linen.SpectralNorm(nn.Dense(2))),
        ["inside another SpectralNorm", "once"],
    ),
    "a convolution where it is forbidden": (
        lambda: sn_jax.linen.SpectralNorm(nn.Conv(2, (3, 3)), error_on_non_matrix=True).init(
            KEY, ones(1, 4, 4, 3)
        ),
        ["kernel", "(3, 3, 3, 2)", "error_on_non_matrix"],
    ),
    "an update into an immutable collection": (
        lambda: applied(*of_dense(), update_stats=True),
        ["'batch_stats'", "immutable", "mutable="],
    ),
    "an update without a state": (
        lambda: applied(*of_dense(stateless=True), update_stats=True),
        ["update_stats=True", "stateless"],
    ),
    "params alone": (
        lambda: applied(of_dense()[0], without(of_dense()[1], "batch_stats")),
        ["no 'batch_stats'", "all that init returned"],
    ),
    "params alone, mutable": (
        lambda: applied(of_dense()[0], without(of_dense()[1], "batch_stats"), mutable=True),
        ["no 'batch_stats'", "rngs="],
    ),
    "a state without v": (
        lambda: applied(of_dense(store_v=True)[0], of_dense()[1]),
        ["no v beside it", "store_v"],
    ),
    "no norms in a collection": (
        lambda: sn_jax.linen.spectral_norms(of_dense()[1], "spectral"),
        ["'spectral'", "collection_name"],
    ),
    "a state for another layer": (
        lambda: sn_jax.linen.load_state(of_dense()[1], PARAMS, init()),
        ["normalize kernel", "dec/kernel", "enc/kernel"],
    ),
    "parameters of another shape": (lambda: loaded((5, 2)), ["kernel", "(3, 2)", "(5, 2)"]),
    "a state by another view": (
        lambda: loaded(rules={"kernel": Matrix(1, 0)}),
        ["u of kernel", "(1, 3)", "(1, 2)", "view"],
    ),
    "an attribute that is none": (lambda: of_dense()[0].encode, ["Dense", "'encode'"]),
    "a submodule": (
        lambda: sn_jax.linen.SpectralNorm(Holder(nn.Dense(2))).inner,
        ["inner", "Holder", "layer_instance"],
    ),
    # nnx
    "an unknown kind of convolution": (
        lambda: sn_jax.nnx.views(
            nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), ones(1, 4, 4, 3), conv="fft"
        ),
        ["conv", '"reshape"', '"operator"', "'fft'"],
    ),
    "of a convolution that there is not": (
        lambda: wrapped(conv="fft"),
        ["conv", '"reshape"', '"operator"', "'fft'"],
    ),
    "views of a class": (lambda: sn_jax.nnx.views(nnx.Linear, X), ["nnx.Module", "rngs"]),
    "no steps in nnx": (lambda: wrapped(n_steps=0), ["n_steps >= 1", "0"]),
    "a traced bound": (
        lambda: jax.jit(lambda c: wrapped(bound=c) and c)(1.0),
        ["bound", "static", "spectral_normalize"],
    ),
    "a class wrapped": (lambda: wrapped(nnx.Linear), ["nnx.Linear", "rngs"]),
    "rules in a list": (
        lambda: wrapped(rules=[Matrix()]),
        ["SpectralNorm around Linear", "map paths to views", "[Matrix("],
    ),
    "stateless and store_v": (lambda: wrapped(stateless=True, store_v=True), ["drop one"]),
    "wrapped twice in nnx": (lambda: wrapped(wrapped()), ["SpectralNorm already", "once"]),
    "a convolution forbidden in nnx": (
        lambda: wrapped(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), error_on_non_matrix=True),
        ["kernel", "(3, 3, 3, 4)", "error_on_non_matrix"],
    ),
    "an operator of no size": (
        lambda: wrapped(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)), conv="operator"),
        ['conv="operator"', "kernel", "sn_jax.nnx.views"],
    ),
    "an option changed": (
        lambda: setattr(wrapped(), "n_vectors", 4),
        ["n_vectors", "fixed", "make a new one"],
    ),
    "bake of a plain model": (lambda: sn_jax.nnx.bake(nnx_block()), ["Sequential", "plain"]),
    "norms of a plain model": (lambda: sn_jax.nnx.spectral_norms(nnx_block()), ["plain"]),
    "norms of a stateless one": (
        lambda: sn_jax.nnx.spectral_norms(wrapped(stateless=True)),
        ["stateless", "sn_jax.spectral_norm"],
    ),
    "other parameters in nnx": (
        lambda: sn_jax.nnx.load_state(wrapped(store_v=True), PARAMS, init()),
        ["missing: bias, kernel", "unknown: dec/bias"],
    ),
    "another shape in nnx": (lambda: nnx_loaded((5, 4)), ["kernel", "(5, 4)", "(3, 4)"]),
    "another view in nnx": (lambda: nnx_loaded(views={"kernel": Matrix(1, 0)}), ["kernel", "view"]),
    # Lipschitz constants
    "an attack without a key": (
        lambda: sn_jax.lipschitz_attack(jnp.sin, 0, X),
        ["PRNG key", "an int, 0", "lipschitz_attack(fn, key, x0, steps)"],
    ),
    "a function of integers": (lambda: BOUND(jnp.sin, jnp.arange(3)), ["floating", "int32"]),
    "a function of two arrays": (lambda: BOUND(lambda t: t[0], [X, X]), ["one array", "2"]),
    "an unknown method": (lambda: BOUND(jnp.sin, X, method="best"), ["'best'", "auto"]),
    "no accuracy": (lambda: BOUND(jnp.sin, X, rtol=0), ["rtol", "> 0"]),
    "a jump": (lambda: BOUND(lambda x: x > 0, X), ["jumps", "test_errors.py:"]),
    "a jump that has a place": (
        lambda: BOUND(lambda x: jnp.sign(jnp.maximum(x, 0) - 4), X),
        ["test_errors.py:", "jumps by 2 where 4 enters"],
    ),
    "a jump where rounding steps": (lambda: BOUND(jnp.round, X), ["jumps by 1 where -0.5 enters"]),
    "a model without its variables": (
        lambda: BOUND(nn.Dense(4).apply, X),
        ["called with x alone", f"{X.shape}", "lambda x: model.apply(variables, x)"],
    ),
    "margins of a model without its variables": (
        lambda: sn_jax.margin_bounds(nn.Dense(4).apply, X),
        ["called with x alone", f"{X.shape}", "lambda x: model.apply(variables, x)"],
    ),
    "Python's if": (
        lambda: BOUND(lambda x: x if x.sum() > 0 else -x, X),
        ["test_errors.py:", "if, while", "jnp.where"],
    ),
    "a branch on x": (
        lambda: BOUND(lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), X),
        ["branch", "cond", "test_errors.py:"],
    ),
    "a loop on x": (
        lambda: BOUND(lambda x: jax.lax.while_loop(lambda y: y[0, 0] > 1, jnp.sin, x), X),
        ["loop", "while", "test_errors.py:"],
    ),
    "a rule that is a number": (
        lambda: sn_jax.register_lipschitz("sin", 1.0),
        ["rule", "function", "1.0"],
    ),
    "an attack on integers": (
        lambda: sn_jax.local_lipschitz(jnp.sin, jnp.arange(3)),
        ["floating", "int32"],
    ),
    "an attack on what has no backward pass": (
        lambda: sn_jax.local_lipschitz(
            lambda x: jax.lax.while_loop(lambda y: y[0] > 1, jnp.sin, x), ones(3)
        ),
        ["no backward pass", "while_loop"],
    ),
    "an attack on a class": (
        lambda: sn_jax.local_lipschitz(lambda x: jnp.argmax(x), ones(3)),
        ["fn", "floating", "int32"],
    ),
    "a margin between one output and none": (
        lambda: sn_jax.margin_bounds(jnp.sum, ones(3)),
        ["margins", "1 outputs", "two"],
    ),
    "one logit": (lambda: sn_jax.certified_radius(ones(1), 1.0), ["k >= 2", "(1,)"]),
    "a negative error": (
        lambda: sn_jax.certified_radius(ones(2), 1.0, error=-1.0),
        ["error", ">= 0", "-1.0"],
    ),
    "constants of other logits": (
        lambda: sn_jax.certified_radius(ones(2), np.ones((3, 3))),
        ["pair of the 2 logits", "margin_bounds", "(3, 3)"],
    ),
    # check_view
    "a matrix too large to write out": (
        lambda: sn_jax.testing.check_view(Matrix(), (5000, 5000)),
        ["(5000, 5000)", "smaller"],
    ),
    "a view that cannot be hashed": (
        lambda: sn_jax.testing.check_view(Diagonal(), (3, 4)),
        ["not hashable", "frozen"],
    ),
}


SAID = {}


def said(name, call):
    """What a call of a table raises, once."""
    if name not in SAID:
        with pytest.raises((ValueError, TypeError, AttributeError, AssertionError)) as error:
            call()
        SAID[name] = str(error.value)
    return SAID[name]


@pytest.mark.parametrize("name", TABLE)
def test_each_error_names_thing_place_and_way_out(name):
    call, parts = TABLE[name]
    message = said(name, call)
    for part in parts:
        assert part in message
    assert re.search(r"[.)]$", message), "a sentence"
    assert len(message) < 700


# Those that need a mesh, a checkpoint or a model of their own: words of the message, the file that
# raises it, and its words there where they are others.
ELSEWHERE = {
    "no result of sn_jax.convert.to_state_dict": ("test_convert.py", "no result of"),
    "only the stored state has": ("test_convert.py", "only the stored state has"),
    "no symbolic one": ("test_jax_ecosystem.py", "no symbolic one"),
    "which the layer holds no longer": ("test_nnx_wrapper.py", "which the layer holds no longer"),
    "is a stack made by nnx.vmap": ("test_nnx.py", "stack made by nnx.vmap"),
    "kernel + a b of LoRA": ("test_effective.py", "merge the adapter"),
    "with the arguments of a call": ("test_effective.py", r"bake\(model, x\)"),
    "this call does not use": ("test_nnx_wrapper.py", "call does not use"),
    'scale_init="sigma" needs the kernels': ("test_nnx.py", r"scale_init=\"sigma\" needs"),
    "is one block of a kernel": ("on_eight_devices.py", "is one block"),
    "exact=True needs the whole": ("on_eight_devices.py", "exact=True needs the whole"),
}
# Not reached by any call that was found.
UNREACHED = ("Lanczos iteration did not converge", "has no state for")
ROOMS = (
    "_attack", "_bounds", "_caps", "_core", "_margins", "_norms", "_power", "_rules", "_spectra",
    "_views", "linen", "nnx", "transforms",
)  # fmt: skip


def pattern_of(node):
    """A regular expression of the messages that an expression makes; None if it is a name."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(pattern_of(part) or ".*" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (pattern_of(node.left) or ".*") + (pattern_of(node.right) or ".*")
    return ".*" if isinstance(node, ast.IfExp) else None


def test_every_error_is_in_a_table():
    for name, (call, _) in (TABLE | VALUE_ERRORS | TYPE_ERRORS).items():
        said(name, call)
    silent = []
    for room in ROOMS:
        source = Path(sn_jax.__file__).with_name(f"{room}.py").read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                pattern = pattern_of(node.exc.args[0])
                if pattern and not any(re.search(pattern, text, re.S) for text in SAID.values()):
                    silent.append(f"{room}.py:{node.lineno}: {ast.unparse(node.exc)}")
    known = (*ELSEWHERE, *UNREACHED)
    assert not [text for text in silent if not any(words in text for words in known)]
    for file, words in ELSEWHERE.values():
        assert words in Path(__file__).with_name(file).read_text()
