"""The checks of test_convert and of FID's network against the torch that is installed:
``make test-torch``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is installed by make test-torch only")

import test_convert as recorded_tests
import test_metrics
import torch
from fixtures import make_inception_fixtures
from fixtures.make_torch_fixtures import APIS, cases, record
from test_convert import CASES, FIXTURES, LAYERS, template_of

from experiments.cli import UserError
from experiments.data import default_data_dir
from experiments.data.fetch import fetch
from experiments.metrics.weights import FILE, SOURCE, inception_params
from sn_jax.convert import from_torch, to_torch

pytestmark = [pytest.mark.float32, pytest.mark.filterwarnings("ignore")]  # torch's deprecations


@pytest.fixture(scope="module", params=APIS)
def records(request):
    return record(request.param, seed=1)


@pytest.mark.parametrize("case", CASES)
def test_eval_outputs_equal_torch(case, records):
    recorded_tests.test_eval_outputs_equal_torch(case, records)


@pytest.mark.parametrize("case", LAYERS)
def test_three_train_steps(case, records):
    recorded_tests.test_three_train_steps_equal_the_hook_and_bracket_the_parametrization(
        case, records
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("api", APIS)
def test_modules_there_and_back(api, dtype):
    """torch's own state_dict in, load_state_dict out, strictly and with the same outputs."""
    views = CASES["network"][2]
    torch.manual_seed(2)
    (source, shape), (target, _) = (cases(APIS[api])["network"] for _ in range(2))
    source, target = source.to(dtype), target.to(dtype)
    params, state = from_torch(source.state_dict(), template_of("network"), views)
    arrays = to_torch(params, state, target.state_dict(), views)
    target.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})
    x = torch.randn(shape).to(dtype)
    with torch.no_grad():
        difference = source.eval()(x) - target.eval()(x)
    assert float(difference.abs().max()) <= (1e-5 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("api", APIS)
def test_training_on_does_not_change_what_was_converted(api):
    source, _ = cases(APIS[api])["network"]
    params, state = from_torch(source.state_dict(), template_of("network"), CASES["network"][2])
    before = jax.tree.map(np.array, (params, state))
    with torch.no_grad():
        for x in (*source.parameters(), *source.buffers()):
            x.fill_(7)
    jax.tree.map(np.testing.assert_array_equal, (params, state), before)


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "extra"), [(1, 0, 0), (2, 1, 1), (3, 2, 0)])
def test_every_padding_of_conv_transpose(stride, padding, extra, dilation, transpose_kernel):
    """padding = r - p, r - p + output_padding, as the docstring of from_torch says."""
    from flax import linen as nn

    layer = torch.nn.ConvTranspose1d(2, 3, 4, stride, padding, extra, dilation=dilation)
    x = torch.randn(1, 2, 6)
    reach = dilation * 3 - padding
    module = nn.ConvTranspose(
        3, (4,), (stride,), ((reach, reach + extra),), (dilation,),
        transpose_kernel=transpose_kernel,
    )  # fmt: skip
    inputs = jnp.asarray(x.numpy().transpose(0, 2, 1))
    template = module.init(jax.random.key(0), inputs)["params"]
    params, _ = from_torch(layer.state_dict(), template)
    ours = module.apply({"params": params}, inputs)
    theirs = layer(x).detach().numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_fixtures_are_what_this_torch_computes():
    with np.load(FIXTURES / "torch_layers.npz") as arrays:
        for api in APIS:
            for case, result in record(api, seed=0).items():
                np.testing.assert_allclose(arrays[f"{api}/{case}/x"], result["x"])
                np.testing.assert_allclose(
                    arrays[f"{api}/{case}/eval"], result["eval"], rtol=1e-4, atol=1e-5
                )


# --- The network of FID -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals():
    """What the original TorchScript network computes, here and now."""
    try:
        fetch(SOURCE, default_data_dir())
    except UserError as error:
        pytest.skip(str(error))
    return make_inception_fixtures.record(default_data_dir() / FILE)


def test_inception_on_random_weights_equals_the_original(originals):
    test_metrics.test_the_network_on_random_weights_equals_the_original(originals)


@pytest.mark.parametrize("i", range(len(make_inception_fixtures.SIZES)), ids=str)
def test_inception_features_equal_the_original(originals, i):
    test_metrics.test_features_equal_the_original(originals, inception_params(), i)


def test_the_recorded_features_are_what_this_torch_computes(originals):
    with np.load(test_metrics.RECORDED) as arrays:
        for name, result in originals.items():
            np.testing.assert_allclose(arrays[name], result, rtol=1e-3, atol=1e-4)
