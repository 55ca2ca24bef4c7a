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


def pytest_configure(config):
    config.addinivalue_line("markers", "float32: run with JAX's default, 64-bit types disabled")
    config.addinivalue_line("markers", "slow: minutes of its own, in make test-slow only")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_enable_x64", True)


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
