"""Torch checkpoints in and out, and the state as plain arrays.

The fixtures hold what torch 2.13.0 computed (fixtures/make_torch_fixtures.py); test_torch_live
runs the checks of this file against the torch that is installed.
"""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import svd_rtol

import sn_jax
from experiments.gan.networks import ARCHITECTURES
from sn_jax import Conv, Matrix
from sn_jax.convert import from_state_dict, from_torch, to_state_dict, to_torch

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)
FIXTURES = Path(__file__).parent / "fixtures"
APIS = ("hook", "parametrization")


class Network(nn.Module):
    """The flax side of the fixture "network"."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (4, 4), 2, padding=1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.Conv(3, (3, 3), padding=1)(x)
        x = nn.LayerNorm(epsilon=1e-5)(x.mean((1, 2)))
        return nn.Dense(1)(nn.relu(nn.Dense(3)(x)))


# torch: ConvTranspose2d(3, 5, (4, 3), 2, (1, 0), output_padding=(0, 1))
TRANSPOSE = {"kernel_size": (4, 3), "strides": (2, 2), "padding": ((2, 2), (2, 3))}
SQUARE = {"kernel_size": (3, 3), "strides": (2, 2), "padding": ((1, 2), (1, 2)), "use_bias": False}
FLIPPED = {"transpose_kernel": True}
# case -> (flax module, the fixture's name, views)
CASES = {
    "linear": (nn.Dense(4), "linear", None),
    "conv1d": (nn.Conv(4, 3, padding=1), "conv1d", None),
    "conv2d": (nn.Conv(6, (3, 2), 2, padding=1, feature_group_count=2), "conv2d", None),
    "conv2d-square": (
        nn.Conv(3, (3, 3), padding=1),
        "conv2d_square",
        {"kernel": Conv((5, 5))},
    ),
    "conv3d": (nn.Conv(3, (2, 1, 3), padding="VALID"), "conv3d", None),
    "transpose": (nn.ConvTranspose(5, **TRANSPOSE), "transpose", None),
    "transpose-kernel": (nn.ConvTranspose(5, **TRANSPOSE, **FLIPPED), "transpose", None),
    "transpose-square": (
        nn.ConvTranspose(3, **SQUARE),
        "transpose_square",
        {".*": Conv((4, 3), transpose=True)},
    ),
    "transpose-kernel-square": (
        nn.ConvTranspose(3, **SQUARE, **FLIPPED),
        "transpose_square",
        {"kernel": Matrix((0, 1, 3), 2)},
    ),
    "transpose-kernel-square-operator": (
        nn.ConvTranspose(3, **SQUARE, **FLIPPED),
        "transpose_square",
        {"kernel": Conv((4, 3), transpose=True, transpose_kernel=True)},
    ),
    "embedding": (nn.Embed(7, 4), "embedding", None),
    "embedding-tied": (nn.Embed(7, 4), "embedding", {"embedding": Matrix()}),
    "network": (Network(), "network", {"Conv_0/kernel": Matrix((0, 1, 2), 3)}),
}
LAYERS = [name for name in CASES if name != "network"]


def recorded(api):
    """As make_torch_fixtures.record returns it."""
    records = {}
    with np.load(FIXTURES / "torch_layers.npz") as arrays:
        for key in arrays.files:
            if key.startswith(f"{api}/"):
                _, name, what, *rest = key.split("/", 3)
                record = records.setdefault(name, {"state": {}})
                if what == "state":
                    record["state"][rest[0]] = arrays[key]
                else:
                    record[what] = arrays[key]
    return records


@pytest.fixture(scope="module", params=APIS)
def records(request):
    return recorded(request.param)


def channels_last(x):
    return np.moveaxis(x, 1, -1) if x.ndim > 1 and x.dtype.kind == "f" else x


def template_of(case, x=None):
    module, name, _ = CASES[case]
    if x is None:
        x = jnp.asarray(channels_last(recorded("hook")[name]["x"]))
    # Without a compilation; but that sorts the keys, whose order the network needs.
    init = module.init if case == "network" else partial(jax.eval_shape, module.init)
    return init(KEY, x)["params"]


def converted(case, records):
    """(record, outputs of the flax model as a function of its params, params, state)."""
    module, name, views = CASES[case]
    record = records[name]
    if case in record:  # by an earlier test
        return record[case]
    x = jnp.asarray(channels_last(record["x"]))
    template = template_of(case, x)
    params, state = from_torch(record["state"], template, views)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, template)
    stats = {}
    if case == "network":
        mean, var = (record["state"][f"1.running_{name}"] for name in ("mean", "var"))
        stats = {"batch_stats": {"BatchNorm_0": {"mean": mean, "var": var}}}

    def apply(params):
        y = module.apply({"params": params, **stats}, x)
        return y if name == "embedding" else np.moveaxis(y, -1, 1)

    record[case] = record, apply, params, state
    return record[case]


@pytest.mark.parametrize("case", CASES)
def test_eval_outputs_equal_torch(case, records):
    record, apply, params, state = converted(case, records)
    normalized, same = sn_jax.spectral_normalize(params, state, n_steps=0)
    np.testing.assert_allclose(apply(normalized), record["eval"], rtol=1e-5, atol=1e-5)
    assert same is state
    assert np.max(np.abs(apply(params) - record["eval"])) > 1e-2, "raw parameters differ"


@pytest.mark.parametrize("case", LAYERS)
def test_three_train_steps_equal_the_hook_and_bracket_the_parametrization(case, records):
    """The latter iterates u first: its sigma lies between ours of a step and the next."""
    record, apply, params, state = converted(case, records)
    hook = "weight_u" in record["state"]
    tied = case == "embedding-tied"  # its view has u and v the other way round
    sigmas = []
    for output in record["train"]:
        normalized, state = sn_jax.spectral_normalize(params, state, n_steps=1)
        (entry,) = state.values()
        sigmas.append(float(entry.sigma))
        if hook != tied:
            np.testing.assert_allclose(apply(normalized), output, rtol=1e-5, atol=1e-5)
    if hook != tied:
        np.testing.assert_allclose(sigmas, record["sigma"], rtol=1e-5)
    elif not hook:
        _, state = sn_jax.spectral_normalize(params, state, n_steps=1)
        (entry,) = state.values()
        rtol = svd_rtol((entry.u.size, entry.v.size), np.float32)
        for ours, theirs, next_ours in zip(
            sigmas, record["sigma"], [*sigmas[1:], float(entry.sigma)], strict=True
        ):
            assert ours * (1 - rtol) <= theirs <= next_ours * (1 + rtol)


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(case, records):
    record, _, params, state = converted(case, records)
    views = CASES[case][2]
    there = to_torch(params, state, record["state"], views)
    assert list(there) == list(record["state"])
    for key, value in record["state"].items():
        np.testing.assert_array_equal(there[key], value, err_msg=key)
        assert (there[key].dtype, there[key].shape) == (value.dtype, value.shape)
        assert all(stride >= 0 for stride in there[key].strides), "torch.from_numpy needs it"
        assert not np.shares_memory(there[key], value) or "running" in key or "num" in key
    again, again_state = from_torch(there, params, views)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    jax.tree.map(np.testing.assert_array_equal, again_state, state)


def test_from_one_torch_function_to_the_other():
    hook, other = (recorded(api)["network"]["state"] for api in APIS)
    params, state = from_torch(hook, template_of("network"), CASES["network"][2])
    out = to_torch(params, state, other, CASES["network"][2])
    assert list(out) == list(other)
    prefix = "0.parametrizations.weight"
    np.testing.assert_array_equal(out[f"{prefix}.original"], hook["0.weight_orig"])
    np.testing.assert_array_equal(out[f"{prefix}.0._v"], hook["0.weight_v"])


def test_the_state_after_training_goes_back():
    """Vectors that sn_jax iterated, several of them and of sn_jax's own views."""
    torch = recorded("hook")
    for case in ("conv2d", "embedding", "transpose-kernel"):
        name = CASES[case][1]
        params, loaded = from_torch(torch[name]["state"], template_of(case))
        ((path, entry),) = loaded.items()
        view = Matrix() if case == "embedding" else entry.view
        state = sn_jax.init(params, KEY, {path: view}, n_vectors=2)
        _, state = sn_jax.spectral_normalize(params, state, n_steps=30)
        out = to_torch(params, state, torch[name]["state"])
        params, again = from_torch(out, params)
        np.testing.assert_allclose(again[path].sigma, state[path].sigma, rtol=1e-5)
        rtol = svd_rtol((entry.u.size, entry.v.size), np.float32)
        assert again[path].sigma > loaded[path].sigma * (1 - rtol)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "name"),
    [(4, 2, 1, 0, "SAME"), (3, 1, 1, 0, "SAME"), (2, 3, 0, 1, "SAME"), (2, 2, 0, 0, "SAME"),
     (3, 2, 0, 0, "VALID"), (2, 3, 0, 1, "VALID")],
)  # fmt: skip
def test_named_paddings_are_what_the_docstring_says(
    kernel, stride, padding, output_padding, name, transpose_kernel
):
    x = jax.random.normal(KEY, (1, 5, 2))
    reach = kernel - 1 - padding
    explicit, named = (
        nn.ConvTranspose(3, kernel, (stride,), pads, transpose_kernel=transpose_kernel)
        for pads in (((reach, reach + output_padding),), name)
    )
    variables = explicit.init(KEY, x)
    np.testing.assert_allclose(
        named.apply(variables, x), explicit.apply(variables, x), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", ["linear", "conv2d", "transpose"])
def test_checkpoints_of_torch_0_4_have_no_v(case):
    """u alone tells it: what W^T takes u to, normalized."""
    _, name, views = CASES[case]
    state_dict = dict(recorded("hook")[name]["state"])
    del state_dict["weight_v"]
    params, state = from_torch(state_dict, template_of(case), views)
    (entry,) = state.values()
    w, u = state_dict["weight_orig"], state_dict["weight_u"]
    w = np.moveaxis(w, 1, 0) if case == "transpose" else w
    sigma = np.linalg.norm(u @ w.reshape(len(u), -1))
    np.testing.assert_allclose(entry.sigma, sigma, rtol=1e-5)
    kernel = jax.tree.leaves(sn_jax.spectral_normalize(params, state, n_steps=0)[0])[-1]
    np.testing.assert_allclose(np.linalg.norm(kernel), np.linalg.norm(w) / sigma, rtol=1e-5)


def zeros(*shape):
    return np.zeros(shape, np.float32)  # not JAX's: tests run with other types than collection


SQUARE_CONV = {"0.weight": np.zeros((4, 4, 3, 3))}
SQUARE_TEMPLATE = {"up": {"kernel": zeros(3, 3, 4, 4)}}


@pytest.fixture(scope="module")
def cosgrove():
    with np.load(FIXTURES / "cosgrove.npz") as arrays:
        found = dict(arrays)
    d, g = ({k[2:]: x for k, x in found.items() if k.startswith(f"{net}/")} for net in "dg")
    return d, g, found["scores"], found["generated"]


CONVS = {r"Conv_\d+/kernel": Matrix((0, 1, 2), 3)}  # none is a ConvTranspose


def waves(*shape):
    """As in make_cosgrove_fixture.py."""
    return np.cos(np.arange(np.prod(shape), dtype=np.float64) ** 1.5).reshape(shape).astype("f4")


def test_wrappers_of_2018_with_layers_listed_twice(cosgrove):
    """Christian Cosgrove's checkpoints: ``module.weight_bar``, every convolution twice."""
    d, g, scores, generated = cosgrove
    assert np.array_equal(d["model.0.conv1.weight_bar"], d["model.0.model.0.module.weight_bar"])
    critic = ARCHITECTURES["cosgrove"].discriminator(width=4)
    x = jnp.asarray(waves(2, 3, 32, 32).transpose(0, 2, 3, 1))
    template = jax.eval_shape(critic.init, KEY, x)["params"]
    params, state = from_torch(d, template, CONVS)
    assert len(state) == 11
    normalized, _ = jax.jit(sn_jax.spectral_normalize)(params, state)
    result = jax.jit(critic.apply)({"params": normalized}, x)
    np.testing.assert_allclose(result, scores, rtol=1e-4, atol=1e-5)
    back = to_torch(params, state, d, CONVS)
    assert back.keys() == d.keys()
    for name, value in d.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)

    generator = ARCHITECTURES["cosgrove"].generator(32, 3, width=2)
    apply = jax.jit(partial(generator.apply, train=True, mutable=["batch_stats"]))
    variables = jax.eval_shape(partial(generator.init, train=True), KEY, jnp.zeros((1, 16)))
    params, state = from_torch(g, variables["params"], CONVS)
    assert not state
    # Torch's first layer lists channels before pixels.
    params["Dense_0"] = jax.tree.map(
        lambda w: w.reshape(*w.shape[:-1], 4, 16).swapaxes(-1, -2).reshape(w.shape),
        params["Dense_0"],
    )
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["batch_stats"])
    images, _ = apply({"params": params, "batch_stats": stats}, jnp.asarray(waves(3, 16)))
    np.testing.assert_allclose(images[:, ::4, ::4].transpose(0, 3, 1, 2), generated, atol=2e-5)


def test_wrappers_of_2018_under_their_own_names_alone(cosgrove):
    d = {name: x for name, x in cosgrove[0].items() if ".module." in name}
    critic = ARCHITECTURES["cosgrove"].discriminator(width=4)
    template = jax.eval_shape(critic.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    ours, theirs = (from_torch(torch, template, CONVS) for torch in (d, cosgrove[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_equal_layers_are_one_only_where_the_template_has_one():
    weight = np.arange(6.0).reshape(2, 3)
    torch = {"a.weight": weight, "b.weight": weight.copy()}
    dense = {"kernel": jnp.zeros((3, 2))}
    params, _ = from_torch(torch, {"a": dense, "b": dense})
    np.testing.assert_array_equal(params["b"]["kernel"], weight.T)
    for names in (None, {"b": "c"}):
        params, state = from_torch(torch, {"c": dense}, names=names)
        np.testing.assert_array_equal(params["c"]["kernel"], weight.T)
        back = to_torch({"c": {"kernel": 2 * params["c"]["kernel"]}}, state, torch, names=names)
        np.testing.assert_array_equal(back["a.weight"], 2 * weight)
        np.testing.assert_array_equal(back["b.weight"], 2 * weight)
    # Other numbers, or numbers that say nothing: two layers.
    for other in (weight + 1, np.ones((2, 3))):
        with pytest.raises(ValueError, match="2 modules with parameters"):
            from_torch({"a.weight": np.ones((2, 3)), "b.weight": other}, {"c": dense})


def test_names_in_one_sequence_go_by_its_order():
    dense = {"kernel": jnp.zeros((2, 2))}
    names = ["net.0.lin.weight", "net.0.out.weight", "net.2.weight", "net.10.weight"]
    torch = {name: np.full((2, 2), float(i)) for i, name in enumerate(names)}
    template = {f"Dense_{i}": dense for i in range(3)}
    del torch["net.0.out.weight"]
    params, _ = from_torch(torch, template)
    assert [float(params[f"Dense_{i}"]["kernel"][0, 0]) for i in range(3)] == [0, 2, 3]
    torch["net.0.out.weight"] = torch.pop("net.10.weight")  # beside net.0.lin: by name alone
    with pytest.raises(ValueError, match="neither names nor numbers"):
        from_torch(torch, template)


def test_a_square_kernel_needs_a_view():
    with pytest.raises(ValueError, match=r"up/kernel.*'0'.*Conv or of a ConvTranspose.*views="):
        from_torch(SQUARE_CONV, SQUARE_TEMPLATE)
    w = np.random.default_rng(0).standard_normal((4, 4, 3, 3))
    results = {}
    for kind, view in {
        "conv": Conv((8, 8)),
        "transpose": Conv((8, 8), transpose=True),
        "kernel": Conv((8, 8), transpose=True, transpose_kernel=True),
    }.items():
        params, _ = from_torch({"0.weight": w}, SQUARE_TEMPLATE, {"up/kernel": view})
        results[kind] = params["up"]["kernel"]
    np.testing.assert_allclose(results["conv"], w.transpose(2, 3, 1, 0), rtol=1e-6)
    np.testing.assert_array_equal(results["kernel"], results["conv"])
    np.testing.assert_allclose(results["transpose"], w.transpose(2, 3, 0, 1)[::-1, ::-1], rtol=1e-6)
    # The flattened matrix that linen.views gives for both says nothing, but flax's name does.
    flattened = {".*": Matrix((0, 1, 2), -1)}
    params, _ = from_torch({"0.weight": w}, {"Conv_0": SQUARE_TEMPLATE["up"]}, flattened)
    np.testing.assert_array_equal(params["Conv_0"]["kernel"], results["conv"])
    for name in ("ConvTranspose_0", "up", "MyConv_0"):
        with pytest.raises(ValueError, match=rf"{name}/kernel.*views="):
            from_torch(SQUARE_CONV, {name: SQUARE_TEMPLATE["up"]}, flattened)
    # Without spatial axes there is nothing to confuse.
    from_torch({"0.weight": np.zeros((4, 4))}, {"up": {"kernel": zeros(4, 4)}})


def dense(shape=(2, 3), bias=True):
    leaves = {"kernel": zeros(*shape)}
    return leaves | ({"bias": zeros(shape[-1])} if bias else {})


def linear(name, shape=(2, 3), bias=True):
    leaves = {f"{name}.weight": np.full(shape[::-1], float(len(name)))}
    return leaves | ({f"{name}.bias": np.zeros(shape[-1])} if bias else {})


def test_numbers_and_names():
    torch = linear("1") | linear("22") | linear("333", bias=False)
    template = {"Dense_0": dense(), "Dense_1": dense(), "Dense_2": dense(bias=False)}
    params, state = from_torch(torch, template)
    assert state == {}
    assert [float(params[k]["kernel"][0, 0]) for k in params] == [1, 2, 3]
    params, _ = from_torch(torch, template, names={"1": "Dense_1"})
    assert [float(params[k]["kernel"][0, 0]) for k in params] == [2, 1, 3]
    frozen, _ = from_torch(torch, flax.core.freeze(template))
    assert isinstance(frozen, flax.core.FrozenDict)


def test_what_neither_names_nor_shapes_tell_apart_asks_for_names():
    torch = linear("1") | linear("22") | linear("333", bias=False)
    nested = {"enc": {"b": dense(), "a": {"x": dense(bias=False)}}, "head": dense()}
    with pytest.raises(ValueError, match=r"Torch's 1, 22 and the template's enc/b, head fit.*'1'"):
        from_torch(torch, nested)
    params, _ = from_torch(torch, nested, names={"22": "head"})
    assert float(params["head"]["kernel"][0, 0]) == 2
    assert float(params["enc"]["a"]["x"]["kernel"][0, 0]) == 3
    assert list(params["enc"]) == ["b", "a"], "the order of the template is kept"
    # The same order of appearance, and two kinds of names on one side alone.
    with pytest.raises(ValueError, match=r"Torch's up, down and the template's Dense_0, Dense_1"):
        from_torch(linear("up") | linear("down"), {"Dense_0": dense(), "Dense_1": dense()})
    # Of two that fit one place, and one that fits two.
    torch = {"a.weight": np.zeros((4, 4, 3)), "b.weight": np.zeros((4, 4, 3))}
    template = {"x": {"kernel": zeros(3, 4, 4)}, "y": {"kernel": zeros(3, 4, 4)}}
    with pytest.raises(ValueError, match="names="):
        from_torch(torch, template)


def test_equal_words_are_partners_whatever_their_order():
    torch, names = {}, ("q", "kk", "vvv")
    for i in range(2):
        for name in names:
            torch |= linear(f"layers.{i}.attn.{name}")
            torch[f"layers.{i}.attn.{name}.weight"] += 100 * i
    block = {name: dense() for name in reversed(names)}
    params, _ = from_torch(torch, {"block_1": block, "block_0": block})
    for i in range(2):
        for name in names:
            sent = torch[f"layers.{i}.attn.{name}.weight"][0, 0]
            assert float(params[f"block_{i}"][name]["kernel"][0, 0]) == sent
    torch = linear("up") | linear("down.a")
    params, _ = from_torch(torch, {"down": {"a": dense()}, "up": dense()})
    assert float(params["down"]["a"]["kernel"][0, 0]) == len("down.a")


def test_numbered_modules_are_matched_by_number_also_after_jit():
    torch, template = {}, {}
    for i in range(12):
        torch |= linear(str(10**i))
        template[f"Dense_{i}"] = dense()
    template = jax.tree.map(jnp.asarray, template)
    assert list(template)[2] == "Dense_10", "jax.tree.map sorts keys"
    params, _ = from_torch(torch, template)
    for i in range(12):
        assert float(params[f"Dense_{i}"]["kernel"][0, 0]) == i + 1


def test_dtypes_are_the_templates():
    torch = recorded("hook")["linear"]["state"]
    template = {"kernel": jax.ShapeDtypeStruct((5, 4), jnp.bfloat16),
                "bias": jax.ShapeDtypeStruct((4,), jnp.float32)}  # fmt: skip
    params, state = from_torch(torch, template)
    assert params["kernel"].dtype == jnp.bfloat16
    assert params["bias"].dtype == state["kernel"].u.dtype == jnp.float32
    norm = np.linalg.norm(np.asarray(params["kernel"], np.float64), 2)
    assert state["kernel"].sigma <= norm * (1 + svd_rtol((5, 4), np.float32))
    back = to_torch(params, state, torch)
    assert back["weight_orig"].dtype == np.float32


class Tensor:
    """As much of a torch tensor as the converter may use; bfloat16 has no NumPy type there."""

    def __init__(self, x, dtype):
        self.x, self.dtype = x, dtype

    def detach(self):
        return self

    cpu = detach

    def float(self):
        return Tensor(self.x.astype(np.float32), "torch.float32")

    def numpy(self):
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.x


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_tensors_are_read_by_their_own_methods(dtype):
    torch = {key: Tensor(x, dtype) for key, x in recorded("hook")["linear"]["state"].items()}
    params, state = from_torch(torch, template_of("linear"))
    assert list(state) == ["kernel"]
    back = to_torch(params, state, torch)
    np.testing.assert_array_equal(back["weight_v"], torch["weight_v"].x)


def test_spectral_norm_along_another_dimension():
    """torch's argument dim: u is as long as that axis."""
    w = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    matrix = w.transpose(1, 0, 2, 3).reshape(3, -1)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    torch = {"0.weight_orig": w, "0.weight_u": u[:, 0], "0.weight_v": vt[0]}
    template = {"Conv_0": {"kernel": zeros(2, 2, 3, 4)}}
    _, state = from_torch(torch, template)
    np.testing.assert_allclose(state["Conv_0/kernel"].sigma, s[0], rtol=1e-5)
    assert state["Conv_0/kernel"].view == Matrix((0, 1, 3), 2)


SN = {"0.weight_orig": np.eye(3), "0.weight_u": np.eye(3)[0], "0.weight_v": np.eye(3)[0]}


@pytest.mark.parametrize(
    ("torch", "template", "options", "message"),
    [
        (linear("a"), {"x": dense((5, 3))}, {}, r"'a' \(weight \(3, 2\), bias \(3,\)\) does not "
         r"fit the template's 'x' \(kernel \(5, 3\), bias \(3,\)\).*names="),
        (linear("a"), {"x": dense(bias=False)}, {}, r"'a'.*does not fit.*'x'"),
        (linear("a"), {"x": {"bias": zeros(3)}}, {}, r"'a'.*does not fit.*'x'"),
        (linear("a"), {"x": {"kernel": zeros(2, 3, 1), "bias": zeros(3)}}, {},
         r"'a'.*does not fit.*'x'"),
        (linear("a"), {"x": dense(), "y": dense()}, {}, r"1 modules .*\(a\).* 2 \(x, y\)"),
        (linear("a"), {"x": dense()}, {"names": {"b": "x"}}, r"names has b for torch's .* are: a"),
        (linear("a"), {"x": dense()}, {"names": {"a": "z"}}, r"names has z for the template.*: x"),
        (linear("a") | linear("b"), {"x": dense(), "y": dense()},
         {"names": {"a": "x", "b": "x"}}, r"names a module twice"),
        ({"attn.in_proj_weight": np.eye(3)}, {"x": dense()}, {}, r"'attn.in_proj_weight'.*not "
         r"understood.*by hand"),
        ({"0.parametrizations.weight.original0": np.eye(3)}, {"x": dense()}, {}, "not understood"),
        ({"0.parametrizations.weight.original": np.eye(3)}, {"x": dense()}, {},
         r"'0' has only.*remove_parametrizations"),
        ({"0.weight_orig": np.eye(3), "0.weight_v": np.ones(3)}, {"x": dense()}, {}, "has only"),
        (SN | {"0.weight": np.eye(3)}, {"x": dense()}, {}, r"'0.weight_orig' and '0.weight' are "
         r"both the weight"),
        (SN | {"0.weight_u": np.ones(4)}, {"x": dense((3, 3), False)}, {},
         r"'0' has a weight of shape \(3, 3\), but u of 4"),
        (SN, {"x": dense((3, 3), False)}, {"views": {"x/kernel": Matrix((0,), (1, 2))}}, "axis 2"),
        (SN, {"x": {"kernel": zeros(3, 3)}}, {"views": {".*": sn_jax.Matrix(-1, -1)}}, "ax"),
        (SN, [zeros(3)], {}, "nested dicts"),
        (SN, {"x": {"kernel": nn.Partitioned(zeros(3, 3), (None, None))}}, {},
         r"x/kernel .* Partitioned, not an array.*unbox"),
        ({"0.weight": np.zeros((4, 2, 3, 3))}, {"x": {"kernel": zeros(3, 3, 2, 4)}},
         {"views": {"x/kernel": Conv((8, 8), transpose=True)}}, r"x/kernel is a ConvTranspose by"),
        (linear("a"), {"x": dense()}, {"views": {"(": Matrix()}}, "regular expression"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(torch, template, options, message):
    with pytest.raises(ValueError, match=message):
        from_torch(torch, template, **options)


def test_a_view_of_another_norm_is_refused():
    """Torch's vectors are not those of each head, nor of the operator."""
    torch = recorded("hook")["conv2d"]["state"]
    with pytest.raises(ValueError, match=r"kernel of shape .* torch keeps the vectors of .*init"):
        from_torch(torch, template_of("conv2d"), {"kernel": Matrix(2, 3)})
    params, _ = from_torch(torch, template_of("conv2d"))
    operator = sn_jax.init(params, KEY, {"kernel": Conv((6, 5), 2, 1, feature_group_count=2)})
    with pytest.raises(ValueError, match=r"is seen as Conv\(.*use that view"):
        to_torch(params, operator, torch)


def test_to_torch_needs_the_same_weights_normalized():
    params, torch = {"x": dense((3, 3), False)}, {"0.weight": np.zeros((3, 3))}
    state = sn_jax.init(params, KEY)
    with pytest.raises(ValueError, match="entries that the torch model does not normalize: x/ker"):
        to_torch(params, state, torch)
    with pytest.raises(ValueError, match="normalizes '0', but the state has no entry 'x/kernel'"):
        to_torch(params, {}, SN)
    with pytest.raises(TypeError, match=r"what sn_jax.init returned"):
        to_torch(params, params, SN)


def aligned(x):
    """As torch's memory is, which JAX on the CPU would share."""
    buffer = np.empty(x.nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    copy = buffer[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def test_the_result_is_a_copy():
    """Training the torch model on changed u, biases and embeddings."""
    rng = np.random.default_rng(0)
    names = {"0.weight_orig": (64, 32), "0.bias": (64,), "0.weight_u": (64,), "0.weight_v": (32,),
             "1.weight": (64, 32), "2.running_mean": (64,), "2.weight": (64,)}  # fmt: skip
    torch = {name: aligned(rng.standard_normal(shape).astype(np.float32))
             for name, shape in names.items()}  # fmt: skip
    shared = jnp.asarray(torch["0.bias"], jnp.float32)
    assert shared.unsafe_buffer_pointer() == torch["0.bias"].ctypes.data, "JAX would share it"
    template = {
        "Dense_0": {"kernel": jnp.zeros((32, 64)), "bias": jnp.zeros(64)},
        "Embed_0": {"embedding": jnp.zeros((64, 32))},
        "Norm_0": {"scale": jnp.zeros(64)},
    }
    params, state = from_torch(torch, template)
    back = to_torch(params, state, torch)
    plain = {path: {name: aligned(np.asarray(getattr(entry, name))) for name in ("u", "v", "sigma")}
             for path, entry in state.items()}  # fmt: skip
    again = from_state_dict({"version": 1, "state": plain}, state)
    before = jax.tree.map(np.array, (params, state, back, again))
    for x in (*torch.values(), *jax.tree.leaves(plain)):
        x[...] = 7
    jax.tree.map(np.testing.assert_array_equal, (params, state, back, again), before)


def test_importing_it_loads_no_framework():
    code = (
        "import sys, sn_jax.convert; "
        "print([m for m in ('flax', 'optax', 'torch', 'haiku') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# The state as plain arrays.


def example_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "Conv_0": {"kernel": jnp.asarray(rng.standard_normal((3, 3, 2, 4)), jnp.float32)},
        "heads": {"kernel": jnp.asarray(rng.standard_normal((5, 2, 3)), jnp.float32)},
    }


EXAMPLE_RULES = {"Conv_0/kernel": Matrix((0, 1, 2), 3), "heads/kernel": Matrix(0, 2)}


def example_state(seed=0, **kwargs):
    return sn_jax.init(example_params(seed), jax.random.key(seed), EXAMPLE_RULES, **kwargs)


def assert_same_state(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def through_orbax(tree, path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "state")


@pytest.mark.filterwarnings("ignore")  # orbax's and tensorstore's own
@pytest.mark.parametrize(
    "through",
    [
        lambda tree, path: tree,
        lambda tree, path: pickle.loads(pickle.dumps(tree)),
        lambda tree, path: flax.serialization.msgpack_restore(
            flax.serialization.msgpack_serialize(tree)
        ),
        lambda tree, path: flax.serialization.from_bytes(
            to_state_dict(example_state(1)), flax.serialization.to_bytes(tree)
        ),
        through_orbax,
        lambda tree, path: jax.tree.map(jnp.asarray, tree),
    ],
    ids=["itself", "pickle", "msgpack", "from_bytes", "orbax", "jax"],
)
def test_state_goes_through(through, tmp_path):
    state = example_state(n_vectors=2)
    plain = to_state_dict(state)
    assert plain["version"] == 1
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(plain["state"]))
    template = jax.eval_shape(lambda: example_state(1, n_vectors=2))
    assert_same_state(from_state_dict(through(plain, tmp_path), template), state)
    assert_same_state(pickle.loads(pickle.dumps(state)), state)


def test_the_fixture_of_version_1_stays_loadable():
    """tests/fixtures/state_v1.msgpack, written by make_state_fixture.py; never overwrite it."""
    data = (FIXTURES / "state_v1.msgpack").read_bytes()
    assert len(data) < 10_000
    state = from_state_dict(flax.serialization.msgpack_restore(data), example_state(1))
    assert jax.tree.structure(state) == jax.tree.structure(example_state())
    params = example_params()
    conv = np.reshape(params["Conv_0"]["kernel"], (18, 4))
    heads = np.moveaxis(params["heads"]["kernel"], 1, 0)
    norms = sn_jax.spectral_norms(params, state)
    np.testing.assert_allclose(norms["Conv_0/kernel"], np.linalg.norm(conv, 2), rtol=1e-5)
    np.testing.assert_allclose(norms["heads/kernel"], np.linalg.norm(heads, 2, (1, 2)), rtol=1e-5)


def changed(**changes):
    plain = to_state_dict(example_state())
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("d", "message"),
    [
        (changed(version=2), "written in version 2 .* reads version 1"),
        ({"Conv_0/kernel": {}}, r"no result of .*to_state_dict.*\['Conv_0/kernel'\]"),
        (None, "NoneType"),
        (changed(state={"a/kernel": {}}), r"Only the template has: Conv_0/kernel, heads/kernel; "
         "only the stored state has: a/kernel"),
        (to_state_dict(example_state(n_vectors=2)), r"u of Conv_0/kernel is stored with shape "
         r"\(2, 4\), but the template's is \(1, 4\)"),
        (changed(state={path: {"u": np.ones((1, 4))} for path in EXAMPLE_RULES}),
         "v of Conv_0/kernel is stored with shape nothing"),
    ],
)  # fmt: skip
def test_a_state_from_elsewhere_is_refused(d, message):
    with pytest.raises(ValueError, match=message):
        from_state_dict(d, example_state(1))


def test_what_is_no_state_is_refused():
    with pytest.raises(TypeError, match="A state is what"):
        to_state_dict(example_params())
    with pytest.raises(TypeError, match="A state is what"):
        from_state_dict(changed(), changed())
