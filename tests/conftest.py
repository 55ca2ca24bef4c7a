import gc
import os

from flags import quick_flags

# Both before NumPy and JAX are imported.
# One BLAS thread per test process: two that spin for two cores were 100 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", quick_flags())
# Here, so that all workers have one.
os.environ.setdefault("KILL_SEED", str(int.from_bytes(os.urandom(4))))

import jax
import pytest

# Groups that take longest go first, by their CPU seconds; those that wait for others before all.
FIRST = ("processes", "gan", "sharding", "effective", "gan_methods", "contract", "linen_models",
         "lipschitz", "nnx_wrapper", "transformer", "slopes", "accelerator")  # fmt: skip
# Their tests share nothing: given out one by one, at the end, they let the processes end together.
SPLIT = ("sharding", "theory", "certify", "package", "jax_ecosystem", "norms")


def pytest_configure(config):
    config.addinivalue_line("markers", "float32: run with JAX's default, 64-bit types disabled")
    config.addinivalue_line("markers", "slow: minutes of its own, in make test-slow only")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_enable_x64", True)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """Tests of a file run in one process, which traces and compiles once what they share."""

    def name(item):
        return item.path.stem.removeprefix("test_")

    for item in items:
        if name(item) not in SPLIT and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(name(item)))
    rest = sorted({name(item) for item in items} - {*FIRST, *SPLIT})
    order = {file: i for i, file in enumerate(dict.fromkeys((*FIRST, *rest, *SPLIT)))}
    items.sort(key=lambda item: order[name(item)])


def settle():
    """What is there by now stays, and is not searched for garbage over and over: with the large
    heaps of traced programs that was a tenth of the time or more."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    settle()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _settled():
    yield
    settle()


def pytest_report_header():
    return f"what is killed at random can be repeated with KILL_SEED={os.environ['KILL_SEED']}"


@pytest.fixture(autouse=True)
def _jax_defaults(request):
    """Tests marked float32 run as users' programs do: no float64, default promotion."""
    if request.node.get_closest_marker("float32") is None:
        yield
        return
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
