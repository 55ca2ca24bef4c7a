# %% [markdown]
# # Watching singular values
#
# One power iteration a step costs next to nothing, because the vectors of the last step are a
# good start. How good is it? This notebook watches the true norm of what the layers run with, for
# one vector and for four, and the whole spectrum over training. Half a minute on two CPU cores.

# %% tags=["setup", "hide-cell"]
# Does something in Colab only: installs sn_jax beside the JAX that is there.
import importlib.metadata
import subprocess
import sys

if "google.colab" in sys.modules:
    from google.colab import files

    print("Choose the wheel of sn_jax (in a clone: pip wheel --no-deps -w dist .)")
    (source,) = files.upload()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", source]
    subprocess.run(pip, check=True)
    import jax
    from packaging.requirements import Requirement

    needs = map(Requirement, importlib.metadata.requires("sn_jax"))
    for need in (need for need in needs if need.marker is None):  # extras have one
        there = [d.version for d in importlib.metadata.distributions(name=need.name)]
        if not there or there[0] not in need.specifier:
            print(f"sn_jax needs {need}: run  %pip install -U {need.name}  and restart.")
    print(jax.devices())

# %%
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import sn_jax

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3}
data = load_digits()
x, y = jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)
SIZES = (64, 64, 64, 10)


def network(params, x):
    *layers, last = params.values()
    for layer in layers:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def init(key):
    keys = jax.random.split(key, len(SIZES))
    return {
        f"dense{i}": {
            "kernel": jax.random.normal(keys[i], (m, n)) / jnp.sqrt(m),
            "bias": jnp.zeros(n),
        }
        for i, (m, n) in enumerate(itertools.pairwise(SIZES))
    }


# %% [markdown]
# Each run trains the same network on digits. After every step, the largest singular value of each
# *normalized* kernel is measured by an SVD. It would be 1 if the estimate were exact; the
# estimate is from below, so it is 1 or more.


# %%
def run(rate, n_vectors=1, n_steps=1, steps=400, normalized=True):
    params = init(jax.random.key(0))
    state = sn_jax.init(params, jax.random.key(1), n_vectors=n_vectors)
    adam = optax.adam(rate)

    @jax.jit
    def step(params, state, opt_state, i):
        rows = jax.random.choice(jax.random.fold_in(jax.random.key(2), i), len(x), (128,))
        if normalized:
            _, state = sn_jax.spectral_normalize(params, state, n_steps=n_steps)

        def loss(params):
            used = params
            if normalized:
                used, _ = sn_jax.spectral_normalize(params, state, n_steps=0, bound=3.0)
            scores = network(used, x[rows])
            value = optax.softmax_cross_entropy_with_integer_labels(scores, y[rows]).mean()
            return value, (used, sn_jax.residuals(params, state))

        grads, (used, residuals) = jax.grad(loss, has_aux=True)(params)
        spectra = {k: jnp.linalg.svd(v["kernel"], compute_uv=False) for k, v in used.items()}
        updates, opt_state = adam.update(grads, opt_state)
        return optax.apply_updates(params, updates), state, opt_state, spectra, residuals

    opt_state, rows = adam.init(params), []
    for i in range(steps):
        params, state, opt_state, spectra, residuals = step(params, state, opt_state, i)
        rows.append((spectra, residuals))
    spectra, residuals = jax.tree.map(lambda *a: np.stack(a), *rows)
    return spectra, residuals


ways = {"1 vector": {}, "1 vector, 5 steps": {"n_steps": 5}, "4 vectors": {"n_vectors": 4}}
runs = {(rate, way): run(rate, **options) for rate in (1e-3, 1e-2) for way, options in ways.items()}
print("Adam    followed by          true norm / wanted: mean   99 %     most")
for (rate, way), (spectra, _) in runs.items():
    norm = np.concatenate([s[20:, 0] for s in spectra.values()]) / 3
    print(f"{rate:<8}{way:20}{norm.mean():24.4f}{np.quantile(norm, 0.99):9.4f}{norm.max():9.4f}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, rate in zip(axes, (1e-3, 1e-2), strict=True):
    for way in ways:
        ax.plot(runs[rate, way][0]["dense1"][:, 0] / 3, label=way, lw=1)
    ax.set(title=f"Adam at {rate}", xlabel="step")
axes[0].set_ylabel("true norm of W / sigma, 64×64")
axes[1].legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# One vector lags by some per cent, and most where the second singular value is overtaking the
# first: the vector has to turn. Four vectors know the second one already; five steps turn faster,
# at five times the products. How far the estimate lags can be known without an SVD: `residuals`
# says how far the stored vectors are from being singular vectors of the current kernel.

# %%
fig, ax = plt.subplots(figsize=(5, 3))
for way, marker in zip(ways, "os^", strict=True):
    spectra, residuals = runs[1e-2, way]
    excess = spectra["dense1"][20:, 0] / 3 - 1
    ax.loglog(residuals["dense1/kernel"][20:], np.maximum(excess, 1e-7), marker, ms=2, label=way)
ax.set(xlabel="residual (cheap)", ylabel="true norm / wanted - 1 (SVD)", title="Adam at 0.01")
ax.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# ## Spectra over time
#
# What does normalization do to the other singular values? Each line is one singular value of the
# second layer, relative to the largest, with normalization and without.

# %%
plain, _ = run(1e-3, normalized=False)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, spectra, title in zip(
    axes, (plain, runs[1e-3, "4 vectors"][0]), ("no normalization", "W / sigma"), strict=True
):
    s = spectra["dense1"]
    ax.plot(s[:, ::4] / s[:, :1], lw=1, color="tab:blue", alpha=0.6)
    stable_rank = (s[-1] ** 2).sum() / s[-1, 0] ** 2
    ax.set(title=f"{title}: stable rank {stable_rank:.1f} at the end", xlabel="step")
    print(f"{title:17} largest {s[-1, 0]:.2f}, stable rank {stable_rank:.2f}")
axes[0].set_ylabel("singular value / largest")
fig.tight_layout()

# %% [markdown]
# Without it the leading singular value runs away from the rest; divided by its norm, the kernel
# uses many directions (the paper's figure 3). In a real run log `sn_jax.spectral_norms(params,
# state)` and `sn_jax.residuals(params, state)`: flat dicts of scalars, which cost one product
# each and work inside `jit`.
