"""Spectral normalization for JAX.

A parameter is a linear map: say once how each acts (a view), and normalization, its state and
its gradient follow. Flax users start with ``sn_jax.linen`` or ``sn_jax.nnx``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sn_jax._bounds import rms_bound as rms_bound
from sn_jax._core import Singular as Singular
from sn_jax._core import State as State
from sn_jax._core import calibrate as calibrate
from sn_jax._core import init as init
from sn_jax._core import residuals as residuals
from sn_jax._core import spectral_normalize as spectral_normalize
from sn_jax._core import spectral_norms as spectral_norms
from sn_jax._core import spectral_penalty as spectral_penalty
from sn_jax._power import PowerResult as PowerResult
from sn_jax._power import power_iteration as power_iteration
from sn_jax._rules import Rules as Rules
from sn_jax._views import Conv as Conv
from sn_jax._views import Linear as Linear
from sn_jax._views import Matrix as Matrix
from sn_jax._views import Scaled as Scaled
from sn_jax._views import View as View

if TYPE_CHECKING:  # on first use, by __getattr__
    from sn_jax import convert as convert
    from sn_jax import linen as linen
    from sn_jax import nnx as nnx
    from sn_jax import testing as testing
    from sn_jax import transforms as transforms
    from sn_jax._attack import lipschitz_attack as lipschitz_attack
    from sn_jax._attack import local_lipschitz as local_lipschitz
    from sn_jax._caps import clip_singular_values as clip_singular_values
    from sn_jax._lipschitz import LipschitzBound as LipschitzBound
    from sn_jax._lipschitz import lipschitz_bound as lipschitz_bound
    from sn_jax._lipschitz import register_lipschitz as register_lipschitz
    from sn_jax._margins import certified_radius as certified_radius
    from sn_jax._margins import margin_bounds as margin_bounds
    from sn_jax._norms import Bounds as Bounds
    from sn_jax._norms import GramResult as GramResult
    from sn_jax._norms import gram_iteration as gram_iteration
    from sn_jax._norms import norm_bounds as norm_bounds
    from sn_jax._norms import spectral_norm as spectral_norm
    from sn_jax._spectra import SpectralStats as SpectralStats
    from sn_jax._spectra import flat_scalars as flat_scalars
    from sn_jax._spectra import singular_values as singular_values
    from sn_jax._spectra import spectral_stats as spectral_stats

__version__ = "0.1.0"

__all__ = [
    "Bounds",
    "Conv",
    "GramResult",
    "Linear",
    "LipschitzBound",
    "Matrix",
    "PowerResult",
    "Rules",
    "Scaled",
    "Singular",
    "SpectralStats",
    "State",
    "View",
    "calibrate",
    "certified_radius",
    "clip_singular_values",
    "flat_scalars",
    "gram_iteration",
    "init",
    "lipschitz_attack",
    "lipschitz_bound",
    "local_lipschitz",
    "margin_bounds",
    "norm_bounds",
    "power_iteration",
    "register_lipschitz",
    "residuals",
    "rms_bound",
    "singular_values",
    "spectral_norm",
    "spectral_normalize",
    "spectral_norms",
    "spectral_penalty",
    "spectral_stats",
]

# Loaded when first used, since they import SciPy, Flax or optax.
_MODULES = ("convert", "linen", "nnx", "testing", "transforms")
_LATER = {
    **dict.fromkeys(("lipschitz_attack", "local_lipschitz"), "_attack"),
    "clip_singular_values": "_caps",
    **dict.fromkeys(
        ("SpectralStats", "flat_scalars", "singular_values", "spectral_stats"), "_spectra"
    ),
    **dict.fromkeys(("LipschitzBound", "lipschitz_bound", "register_lipschitz"), "_lipschitz"),
    **dict.fromkeys(("certified_radius", "margin_bounds"), "_margins"),
    **dict.fromkeys(
        ("Bounds", "GramResult", "gram_iteration", "norm_bounds", "spectral_norm"), "_norms"
    ),
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sn_jax.{name}")
    if name in _LATER:
        value = getattr(importlib.import_module(f"sn_jax.{_LATER[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sn_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
