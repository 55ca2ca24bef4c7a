"""Slopes of scalar functions: known constants, sampled quotients, known pitfalls."""

import math
from functools import partial

import fuzz_slopes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# They have no public names: lipschitz_bound is what users call.
from sn_jax import _functions, _jets, _scalar, _slopes

Node, Ref, Unknown = _scalar.Node, _scalar.Ref, _scalar.Unknown
Jump, slopes = _slopes.Jump, _slopes.slopes
inf = math.inf


def translated(fn):
    """The nodes of fn, read off its jaxpr."""
    nodes = [Node("var")]

    def walk(jaxpr, consts, args):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            read = [v.val if hasattr(v, "val") else known[v] for v in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if inner is None:
                read = [a if isinstance(a, Ref) else a.item() if hasattr(a, "item") else a
                        for a in read]  # fmt: skip
                nodes.append(Node(eqn.primitive.name, tuple(read), dict(eqn.params)))
                out = [Ref(len(nodes) - 1)]
            else:
                out = walk(getattr(inner, "jaxpr", inner), getattr(inner, "consts", []), read)
            known.update(zip(eqn.outvars, out, strict=True))
        return [v.val if hasattr(v, "val") else known[v] for v in jaxpr.outvars]

    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(fn)(jnp.float32(0))
    (out,) = walk(closed.jaxpr, closed.consts, [Ref(0)])
    if out != Ref(len(nodes) - 1):
        nodes.append(Node("copy", (out,)))
    return nodes


def of(fn, domain=(-inf, inf)):
    return slopes(translated(fn), domain)


def leaky(x):
    return jax.nn.leaky_relu(x)


GOLDENS = {
    "relu": (jax.nn.relu, 0, 1),
    "relu6": (jax.nn.relu6, 0, 1),
    "leaky_relu": (leaky, np.float32(0.01), 1),
    "elu": (jax.nn.elu, 0, 1),
    "celu": (jax.nn.celu, 0, 1),
    "selu": (jax.nn.selu, 0, 1.75809934),
    "tanh": (jnp.tanh, 0, 1),
    "hard_tanh": (jax.nn.hard_tanh, 0, 1),
    "abs": (jnp.abs, -1, 1),
    "sin": (jnp.sin, -1, 1),
    "cos": (jnp.cos, -1, 1),
    "arctan": (jnp.arctan, 0, 1),
    "softplus": (jax.nn.softplus, 0, 1),
    "log_sigmoid": (jax.nn.log_sigmoid, 0, 1),
    "soft_sign": (jax.nn.soft_sign, 0, 1),
    "squareplus": (jax.nn.squareplus, 0, 1),
    "sparse_plus": (jax.nn.sparse_plus, 0, 1),
    "huber": (lambda x: jnp.where(abs(x) <= 0.3, 0.5 * x * x, 0.3 * (abs(x) - 0.15)),
              -np.float32(0.3), np.float32(0.3)),
    "gelu": (jax.nn.gelu, -0.12899307, 1.12899307),
    "gelu exact": (partial(jax.nn.gelu, approximate=False), -0.12890415, 1.12890415),
    "silu": (jax.nn.silu, -0.09983932, 1.09983932),
    "silu by hand": (lambda x: x / (1 + jnp.exp(-x)), -0.09983932, 1.09983932),
    "softplus by hand": (lambda x: jnp.log(1 + jnp.exp(x)), 0, 1),
    "mish": (jax.nn.mish, -0.11252612, 1.08849816),
    "sigmoid": (jax.nn.sigmoid, 0, 0.25),
    "hard_sigmoid": (jax.nn.hard_sigmoid, 0, 1 / 6),
    "hard_silu": (jax.nn.hard_silu, -0.5, 1.5),
    "tanh by hand": (lambda x: (jnp.exp(2 * x) - 1) / (jnp.exp(2 * x) + 1), 0, 1),
    "tanh by hand, mirrored": (lambda x: (1 - jnp.exp(-x)) / (1 + jnp.exp(-x)), 0, 0.5),
    "log cosh": (lambda x: jnp.log(jnp.cosh(x)), -1, 1),
    "sech": (lambda x: 1 / jnp.cosh(x), -0.5, 0.5),
    "leaky by select": (lambda x: jnp.where(x > 0.25 * x, x, 0.25 * x), 0.25, 1),
    "atan2": (lambda x: jnp.arctan2(x, 2.0), 0, 0.5),
    "erf by hand": (lambda x: 0.5 * x * (1 + jax.lax.erf(x / math.sqrt(2))),
                    -0.12890415, 1.12890415),
    "tanh cubed": (lambda x: jnp.tanh(x) ** 3, 0, 0.75),
    "snake": (lambda x: x + jnp.sin(x) ** 2, 0, 2),
    "gauss": (lambda x: jnp.exp(-x * x), -math.sqrt(2 / math.e), math.sqrt(2 / math.e)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_known_slopes(name):
    fn, low, high = GOLDENS[name]
    found = of(fn)
    assert found.low <= low + 6e-9
    assert found.high >= high - 6e-9
    np.testing.assert_allclose(found[:2], (low, high), rtol=1e-7, atol=1e-7)


def test_what_leading_terms_cancel_is_finite():
    def rational(x):
        return (x**3 + 2 * x) / (1 + x * x)

    # 1 + (1 - x^2) / (1 + x^2)^2: from 1 - 1/8, where x^2 = 3, to 2.
    np.testing.assert_allclose(of(rational)[:2], (0.875, 2), rtol=1e-3)
    root = of(lambda x: x * jax.lax.rsqrt(1 + x * x))
    np.testing.assert_allclose(root, (0, 1, -1, 1), atol=1e-6)


def test_values_are_bounded_too():
    for fn, low, high in [
        (jnp.tanh, -1, 1),
        (jax.nn.sigmoid, 0, 1),
        (jax.nn.relu6, 0, 6),
        (jax.nn.silu, -0.27846454, inf),
        (jax.nn.log_sigmoid, -inf, 0),
        (lambda x: jnp.clip(x, -2, 0.5), -2, 0.5),
    ]:
        np.testing.assert_allclose(of(fn)[2:], (low, high), rtol=1e-6)


def test_domains_beyond_and_on_one_side():
    for domain in [(-inf, -5.0), (-inf, -100.0), (100.0, inf), (2.0**130, inf), (3.0, 3.0)]:
        low, high, value_low, value_high = of(jax.nn.sigmoid, domain)
        ends = np.array([-1e3 if x == -inf else min(x, 1e3) for x in domain])
        exact = np.exp(-np.logaddexp(0, -ends))
        slope = exact * np.exp(-np.logaddexp(0, ends))
        assert low <= slope.min() + 1e-12
        assert slope.max() * (1 - 1e-12) <= high <= max(slope.max() * (1 + 1e-6), 1e-300)
        assert value_low <= exact.min() * (1 + 1e-12)
        assert exact.max() * (1 - 1e-12) <= value_high <= 1
    assert of(lambda x: 1 / x, (1.0, inf))[:2] == pytest.approx((-1, 0), abs=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, "float16", np.float32, "float64"])
def test_pieces_meet_as_exactly_as_the_dtype_can_tell(dtype):
    gap = 4.0 * float(jnp.finfo(dtype).eps)
    for scale, jumps in ((0.5, False), (8.0, True)):
        step = [Node("var"), Node("gt", (Ref(0), 1.0)), Node("add", (Ref(0), gap * scale)),
                Node("select_n", (Ref(1), Ref(0), Ref(2)))]  # fmt: skip
        # Boxes cannot show what float64 could.
        if jumps and dtype != "float64":
            with pytest.raises(Jump):
                slopes(step, dtype=dtype)
        elif not jumps:
            assert slopes(step, dtype=dtype)[:2] == (1, 1)


# What a prototype got wrong ----------------------------------------------------------------------


def test_guards_against_nan_are_not_taken():
    guarded = [Node("var"), Node("ne", (Ref(0), Ref(0))), Node("tanh", (Ref(0),)),
               Node("select_n", (Ref(1), Ref(2), 5.0))]  # fmt: skip
    assert slopes(guarded)[:2] == slopes([Node("var"), Node("tanh", (Ref(0),))])[:2]
    # Equal nodes are one, written twice or not.
    twice = [Node("var"), Node("neg", (Ref(0),)), Node("neg", (Ref(0),)),
             Node("eq", (Ref(1), Ref(2))), Node("select_n", (Ref(3), 5.0, Ref(0)))]  # fmt: skip
    assert slopes(twice)[:2] == (1, 1)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.where(x > 0.3, x + 1, x),
        lambda x: jnp.where(x == 0.3, 5.0, x),
        lambda x: jnp.where(x * x > 2, x, 0.0),
        lambda x: jnp.where(jnp.tanh(x) + x > 0.7, 1.0, x),
        jnp.floor,
        jnp.ceil,
        jnp.round,
        jnp.sign,
        lambda x: x.astype(int).astype(x.dtype),
        lambda x: (x > 2).astype(x.dtype),
        lambda x: jnp.sign(x * x - 2) * x,
    ],
)
def test_jumps_are_errors(fn):
    with pytest.raises(Jump, match="jumps by"):
        of(fn)


@pytest.mark.parametrize("inner", [jnp.tanh, jnp.arcsinh, jnp.arctanh])
@pytest.mark.parametrize("domain", [(0.0, 0.5), (-0.5, 0.5)])
def test_a_jump_that_rounding_hides_is_not_bounded(inner, domain):
    """Beside 0 the sign of what goes in cannot be told; at 0 and further away it can."""
    found = of(lambda x: jnp.sign(inner(x)), domain)
    assert found.low == -np.inf
    assert found.high == np.inf


@pytest.mark.parametrize("outside", [jnp.arctanh, jnp.arccos, jnp.log, jnp.sqrt])
def test_a_comparison_with_what_is_no_number_is_undecided(outside):
    """It is false, whatever the sign's square is where there is a number."""

    def fn(x):
        return jnp.where(jnp.sign(outside(x)) ** 2 > -2, jnp.maximum(x, 0), 2.5)

    try:
        found = of(fn)
    except Jump:
        return
    assert found.low == -np.inf
    assert found.high == np.inf


def test_what_is_guarded_against_no_number_is_bounded():
    """The branch that has none is not taken there, so what compares with the result knows it."""

    def fn(x):
        root = jnp.where(x > 1, jnp.sqrt(x), 1.0)
        return jnp.where(root > 0.5, jnp.tanh(x), 7.0)  # of x and the root, so not by parts

    assert of(fn)[:2] == pytest.approx((0, 1), abs=1e-6)


def test_parts_that_are_of_constants_alone():
    """Which stand before the part that is looked at."""
    constant = [Node("var"), Node("gt", (Ref(0), Ref(0))), Node("select_n", (Ref(1), 0.0, Ref(0))),
                *(Node("abs", (Ref(i),)) for i in range(2, 6)), Node("add", (Ref(6), Ref(3))),
                Node("abs", (Ref(7),)), Node("log", (Ref(8),))]  # fmt: skip
    found = slopes(constant)
    assert found.low == -np.inf
    assert found.high == np.inf


def test_a_jump_outside_the_domain_is_none():
    assert of(lambda x: jnp.where(x > 0.3, x + 1, x), (0.5, 2.0))[:2] == (1, 1)
    assert of(jnp.floor, (0.25, 0.75)) == (0, 0, 0, 0)
    with pytest.raises(Jump):
        of(jnp.floor, (0.25, 1.25))


def test_pieces_that_meet_do_not_jump():
    assert of(lambda x: jnp.where(x > 0, x, 0.0))[:2] == (0, 1)
    assert of(lambda x: jnp.sign(x) * x)[:2] == (-1, 1)
    # A kink that no float is: both sides are there, and nothing more.
    np.testing.assert_allclose(
        of(lambda x: jnp.where(x * x > 2, x * x - 2, 0.0), (-3.0, 2.0))[:2], (-6, 4), rtol=1e-7
    )
    # Constants rounded to float32 meet as well as float32 can tell.
    assert of(lambda x: jnp.where(x > 1 / 3, 2 * x, x + 1 / 3))[:2] == (1, 2)


def test_kinks_stay_aligned():
    assert of(lambda x: jax.nn.relu(x) - jax.nn.relu(-x))[:2] == (1, 1)
    assert of(lambda x: jax.nn.relu(x - 0.3) - jax.nn.relu(0.3 - x))[:2] == (1, 1)
    assert of(lambda x: jax.nn.relu(3 * x - 1) - jax.nn.relu(1 - 3 * x))[:2] == (3, 3)
    assert of(lambda x: jnp.minimum(x + 3, 0) + jnp.maximum(x + 3, 0))[:2] == (1, 1)
    assert of(lambda x: jax.nn.relu(x) + jax.nn.relu(-x))[:2] == (-1, 1)


def test_unbounded_slopes_are_infinite():
    assert of(lambda x: x * x) == (-inf, inf, 0, inf)
    assert of(jnp.exp)[:2] == (0, inf)
    assert of(lambda x: x**3)[1] == inf
    assert of(lambda x: jnp.log1p(x * x) * x)[1] == inf
    assert of(lambda x: jnp.sqrt(jax.nn.relu(x)))[1] == inf
    assert of(lambda x: 1 / x)[:2] == (-inf, inf)
    assert of(lambda x: x * x, (-1.0, 3.0))[:2] == (-2, 6)


MANY_KINKS = {
    "leaky of sin": (lambda x: jax.nn.leaky_relu(jnp.sin(x)), -1, 1),
    "elu of sin": (lambda x: jax.nn.elu(jnp.sin(x)), -1, 1),
    "relu of gelu": (lambda x: jax.nn.relu(jax.nn.gelu(x)), -0.12899308, 1.12899308),
    "mish of squareplus": (lambda x: jax.nn.mish(jax.nn.squareplus(x)), -0.11252613, 1.08849817),
    "with a skip": (lambda x: jax.nn.leaky_relu(jnp.sin(x)) - x / 2, -1.5, 0.5),
    "of a shifted argument": (lambda x: jax.nn.relu(jnp.cos(2 * x + 1)), -2, 2),
}


@pytest.mark.parametrize("name", MANY_KINKS)
def test_what_has_kinks_without_end_is_bounded_by_its_parts(name):
    fn, low, high = MANY_KINKS[name]
    found = of(fn)
    x = jnp.linspace(-9.0, 9.0, 4001)
    with jax.numpy_dtype_promotion("standard"):
        slope = jax.vmap(jax.grad(fn))(x)
    assert found.low <= slope.min()
    assert slope.max() <= found.high
    assert low * (1 + 1e-7) - 1e-7 <= found.low
    assert found.high <= high * (1 + 1e-7) + 1e-7


def test_parts_that_are_unbounded_or_jump_help_nobody():
    assert of(lambda x: jax.nn.leaky_relu(jnp.sin(x)) * x).high == inf
    with pytest.raises(Jump):
        of(lambda x: jnp.where(jnp.sin(x) > 0, 1.0, 2.0))


def test_common_subexpressions_share_their_range():
    def twice(x):
        return (3 * x + 1) * jax.nn.sigmoid(3 * x + 1)

    np.testing.assert_allclose(of(twice)[:2], np.multiply(3, (-0.09983932, 1.09983932)), rtol=1e-7)


def test_an_affine_map_before_does_not_matter():
    assert of(lambda x: jax.nn.softplus(x - 0.3))[:2] == (0, 1)
    shifted = of(lambda x: jax.nn.softplus(-2 * (x - 0.3)))
    assert shifted[:2] == (-2, 0)
    assert of(lambda x: 4 - 2 * x, (0.0, 1.0)) == (-2, -2, 2, 4)


def test_stop_gradient_is_the_identity_for_the_function():
    assert of(lambda x: x + jax.lax.stop_gradient(x))[:2] == (2, 2)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.where((x > -1) & (x < 1), x, jnp.sign(x)),
        lambda x: jnp.where((x <= -1) | (x >= 1), jnp.sign(x), x),
        lambda x: jnp.where(~(abs(x) >= 1), x, jnp.sign(x)),
        lambda x: jnp.where((x > -1) ^ (x >= 1), x, jnp.sign(x)),
        lambda x: jnp.where((x > -1) == (x < 1), x, jnp.sign(x)),
        lambda x: jnp.where(jnp.where(x > 0, x < 1, x > -1), x, jnp.sign(x)),
        lambda x: jax.lax.clamp(jnp.float32(-1), x, jnp.float32(1)),
        lambda x: jnp.minimum(jnp.maximum(jnp.nan_to_num(x), -1), 1),
        lambda x: jnp.clip(x, -1, 1) * jnp.isfinite(x) + 0 * (x > 3),
    ],
)
def test_predicates_combine(fn):
    assert of(fn) == (0, 1, -1, 1)


def test_constants_and_shared_structure():
    assert slopes([Node("var"), Node("mul", (Ref(0), 0.0))]) == (0, 0, 0, 0)
    assert of(lambda x: x - x + 2.5)[:2] == (0, 0)
    of(lambda x: jnp.tanh(x) * jax.nn.sigmoid(x))
    before = _slopes._bounded.cache_info()
    # An affine map before it is the same function of another variable.
    of(lambda x: jnp.tanh(3 * x + 1) * jax.nn.sigmoid(3 * x + 1))
    after = _slopes._bounded.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)


def test_unknown_primitives_are_named():
    with pytest.raises(Unknown, match="lgamma") as error:
        of(jax.lax.lgamma)
    assert error.value.op == "lgamma"
    with pytest.raises(ValueError, match="low <= high"):
        of(jnp.tanh, (1.0, 0.0))


# Primitives ---------------------------------------------------------------------------------------

INNER = {"softplus": jax.nn.softplus, "log_cosh": lambda x: jnp.log(jnp.cosh(x))}


@pytest.mark.parametrize("op", sorted(_functions.UNARY))
def test_jets_hold_the_derivatives(op):
    """f, f' and f'' as JAX has them, inside of the intervals of boxes wide and narrow."""
    fn = INNER.get(op) or getattr(jax.lax, f"{op}_p").bind
    if op in ("tan", "exp2", "logistic", "cbrt", "rsqrt", "sqrt", "exp", "log", "log1p", "tanh",
              "sin", "cos", "expm1"):  # fmt: skip
        fn = getattr(jax.lax, op)
    rule = _functions.UNARY[op]
    rng = np.random.default_rng(0)
    low, high = max(rule.low, -30.0), min(rule.high, 30.0)
    x = np.concatenate([rng.uniform(low, high, 200), np.clip(rng.normal(size=200), low, high)])
    x = x[(x > low) & (x < high)]
    width = 10.0 ** rng.uniform(-12, 1, x.size)
    boxes = np.array([np.maximum(x - width, low), np.minimum(x + rng.random(x.size) * width, high)])
    with np.errstate(all="ignore"):
        jet = _jets.Evaluation(boxes).run((("var", (), None), (op, (Ref(0),), None)))[-1]
    first = jax.grad(fn)
    for part, exact in zip(jet[:3], (fn, first, jax.grad(first)), strict=True):
        y = np.asarray(jax.vmap(exact)(x))
        slack = 1e-9 * np.abs(y) + 1e-11
        assert np.all((part.low <= y + slack) & (y - slack <= part.high))
        # And they are not merely infinite: narrow boxes are narrow.
        narrow = (width < 1e-9) & (np.abs(y) < 1e3) & (np.abs(x) > 1e-3)
        assert np.all((part.high - part.low)[narrow] < 1e-2)


# Random programs ---------------------------------------------------------------------------------

UNARY = {
    "neg": np.negative, "abs": np.abs, "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
    "exp": np.exp, "expm1": np.expm1, "log1p": np.log1p, "log": np.log, "atan": np.arctan,
    "asinh": np.arcsinh, "sinh": np.sinh, "cosh": np.cosh, "sqrt": np.sqrt, "cbrt": np.cbrt,
    "rsqrt": lambda x: 1 / np.sqrt(x), "square": np.square, "exp2": np.exp2,
    "asin": np.arcsin, "acos": np.arccos, "atanh": np.arctanh, "acosh": np.arccosh, "tan": np.tan,
    "logistic": lambda x: 0.5 * (1 + np.tanh(0.5 * x)), "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc), "sign": np.sign, "floor": np.floor,
}  # fmt: skip
BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
    "min": np.minimum, "gt": np.greater, "le": np.less_equal,
}  # fmt: skip
CONSTANTS = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 3.0, 0.3, -1.7, 20.0]) | st.floats(-3, 3)


@st.composite
def programs(draw):
    nodes, numbers = [Node("var")], [Ref(0)]
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.integers(0, 9))
        # Mostly the newest value, so that programs are deep.
        old = draw(st.sampled_from(numbers)) if draw(st.booleans()) else numbers[-1]
        if kind < 4:
            nodes.append(Node(draw(st.sampled_from(sorted(UNARY))), (old,)))
        elif kind == 4:
            nodes.append(Node("integer_pow", (old,), {"y": draw(st.integers(-2, 4))}))
        elif kind == 5:
            nodes.append(Node("pow", (old, draw(st.sampled_from([0.5, 1.5, -0.5, 2.0])))))
        elif kind == 6:
            other = draw(st.sampled_from(numbers))
            nodes.append(Node("gt", (old, draw(CONSTANTS | st.sampled_from(numbers)))))
            nodes.append(Node("select_n", (Ref(len(nodes) - 1), draw(CONSTANTS), other)))
        elif kind == 7:
            # Continuous wherever its argument is.
            nodes.append(Node("gt", (old, 0.0)))
            nodes.append(Node("mul", (old, draw(CONSTANTS))))
            nodes.append(Node("select_n", (Ref(len(nodes) - 2), Ref(len(nodes) - 1), old)))
        else:
            other = draw(CONSTANTS | st.sampled_from(numbers))
            pair = draw(st.permutations([old, other]))
            op = draw(st.sampled_from(["add", "sub", "mul", "div", "max", "min"]))
            nodes.append(Node(op, tuple(pair)))
        numbers.append(Ref(len(nodes) - 1))
    return nodes


def evaluated(nodes, x):
    """The output, and the largest magnitude on the way to it."""
    done, largest = [x], np.abs(x)
    with np.errstate(all="ignore"):
        for node in nodes[1:]:
            args = [done[a] if isinstance(a, Ref) else a for a in node.args]
            if node.op == "integer_pow":
                y = np.power(args[0], float(node.params["y"]))
            elif node.op == "pow":
                y = np.power(*args)
            elif node.op == "select_n":
                y = np.where(args[0], args[2], args[1])
            else:
                y = (UNARY.get(node.op) or BINARY[node.op])(*args)
            done.append(y)
            if y.dtype != bool:
                largest = np.fmax(largest, np.abs(y))
    return done[-1], largest


def check_quotients(nodes, domain, seed):
    try:
        bound = slopes(nodes, domain, "float64")
    except Jump:
        return False
    rng = np.random.default_rng(seed)
    low, high = max(domain[0], -1e3), min(domain[1], 1e3)
    near = np.clip(rng.normal(size=300) * 10.0 ** rng.integers(-2, 3, 300), low, high)
    a = np.concatenate([near, rng.uniform(low, high, 300), [low, high]])
    b = np.clip(a + rng.normal(size=a.size) * 10.0 ** rng.integers(-4, 1, a.size), low, high)
    (f, size_f), (g, size_g) = evaluated(nodes, a), evaluated(nodes, b)
    size = np.fmax(size_f, size_g)
    use = np.isfinite(f) & np.isfinite(g) & (a != b) & (size < 1e100)
    a, b, f, g, size = (np.broadcast_to(v, use.shape)[use] for v in (a, b, f, g, size))
    # Rounding on the way grows with what it passes; a quotient divides it by a - b.
    noise = 1e-13 * (1 + size) ** 2
    assert np.all(f >= bound.value_low - noise)
    assert np.all(f <= bound.value_high + noise)
    quotient = (f - g) / (a - b)
    slack = 2 * noise / np.abs(a - b) + 1e-9 * np.abs(quotient)
    assert np.all(quotient >= bound.low - slack)
    assert np.all(quotient <= bound.high + slack)
    return math.isfinite(bound.low) and math.isfinite(bound.high)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["tanh", "exp", "atan", "asinh", "square", "cos", "logistic", "cbrt"]),
    st.sampled_from(["gt", "ge", "lt", "le", "eq", "ne"]),
    st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3),
    st.floats(0.01, 3),
    st.booleans(),
)
def test_no_jump_is_missed(op, compare, at, size, finite):
    """Wherever a predicate turns, two pieces that differ by more than rounding are noticed."""
    level = float(UNARY[op](np.float64(at)))
    nodes = [Node("var"), Node(op, (Ref(0),)), Node(compare, (Ref(1), level)),
             Node("tanh", (Ref(0),)), Node("add", (Ref(3), size)),
             Node("select_n", (Ref(2), Ref(3), Ref(4)))]  # fmt: skip
    domain = (at - 1.0, at + 1.5) if finite else (-inf, inf)
    try:
        found = slopes(nodes, domain)
    except Jump:
        return
    # A single point may be beyond telling: then nothing is claimed.
    assert found[:2] == (-inf, inf)


DOMAINS = st.just((-inf, inf)) | st.tuples(
    st.floats(-5, 5) | st.just(0.0), st.floats(0.01, 10)
).map(lambda x: (x[0], x[0] + x[1]))


@settings(max_examples=40, deadline=None)
@given(programs(), DOMAINS, st.integers(0, 1000))
def test_no_quotient_is_outside(nodes, domain, seed):
    check_quotients(nodes, domain, seed)


@pytest.mark.parametrize("index", range(40))
def test_slopes_against_many_digits(index):
    """The first programs of ``python tests/fuzz_slopes.py``."""
    rng = np.random.default_rng([0, index])
    nodes, domain = fuzz_slopes.random_nodes(rng), fuzz_slopes.random_domain(rng)
    assert fuzz_slopes.violations(nodes, domain, rng) == []
