# %% [markdown]
# # The norm of a convolution
#
# Most libraries reshape a convolution's kernel to a matrix, (taps · in, out), and divide by that
# matrix's norm. The layer, though, is another linear map: the operator that slides the kernel
# over an image. This notebook measures how far the two are apart, and proves the numbers. Half a
# minute on two CPU cores.

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
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import sn_jax

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
flattened = sn_jax.Matrix((0, 1, 2), 3)  # as in Miyato et al. (2018)

# %% [markdown]
# A view says how a kernel acts; `spectral_norm` is that map's true norm, converged in float64.
# Four kernels of shape (3, 3, 16, 16): random ones, smooth ones, one that only takes averages,
# one that only takes differences.

# %%
rng = np.random.default_rng(0)
smooth = np.array([1.0, 2.0, 1.0])
edge = np.array([1.0, -2.0, 1.0])
channels = rng.standard_normal((16, 16))
kernels = {
    "random": rng.standard_normal((3, 3, 16, 16)),
    "random, positive": rng.random((3, 3, 16, 16)),
    "smoothing": np.einsum("a,b,io->abio", smooth, smooth, channels),
    "differences": np.einsum("a,b,io->abio", edge, edge, channels),
}
operator = sn_jax.Conv(input_shape=(16, 16))
ratios = {}
for name, kernel in kernels.items():
    ours, theirs = (float(sn_jax.spectral_norm(kernel, view)) for view in (operator, flattened))
    ratios[name] = ours / theirs
    print(f"{name:17} flattened {theirs:7.2f}, operator {ours:7.2f}, ratio {ours / theirs:.2f}")

# %% [markdown]
# After division by the flattened norm, each layer's true Lipschitz constant is the ratio in the
# last column. It is at most √(number of taps) = 3 for a 3×3 kernel with stride 1, and positive
# kernels come close: the all-ones vector adds up over all taps.

# %%
fig, ax = plt.subplots(figsize=(7, 2.8))
ax.barh(list(ratios), list(ratios.values()), color="tab:orange", label="divided by flattened norm")
ax.barh(list(ratios), [1] * 4, color="tab:blue", height=0.4, label="divided by operator norm")
ax.axvline(3, color="k", ls=":", label="most that is possible: √9")
ax.set_xlabel("true norm of the normalized layer")
ax.legend(fontsize=8, loc="lower right")
fig.tight_layout()

# %% [markdown]
# ## It depends on the layer, not on the kernel alone
#
# The same kernel with another image size, padding or stride is another operator. `Conv` knows all
# of flax's options.

# %%
sizes = [3, 4, 6, 8, 12, 16, 24]
kernel = kernels["random, positive"]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
for padding in ["SAME", "VALID", "CIRCULAR"]:
    norms = [sn_jax.spectral_norm(kernel, sn_jax.Conv((n, n), padding=padding)) for n in sizes]
    left.plot(sizes, norms, "o-", label=padding, ms=4)
left.axhline(sn_jax.spectral_norm(kernel, flattened), color="k", ls="--", label="flattened")
left.set(title="norm of one kernel", xlabel="image size", ylim=0)
left.legend(fontsize=8)
for stride in [1, 2, 3]:
    norms = [
        float(sn_jax.spectral_norm(k, sn_jax.Conv((12, 12), strides=stride)))
        / float(sn_jax.spectral_norm(k, flattened))
        for k in kernels.values()
    ]
    right.bar(np.arange(4) + 0.25 * (stride - 2), norms, 0.25, label=f"stride {stride}")
right.axhline(1, color="k", ls="--")
right.set(title="operator / flattened", xticks=range(4))
right.set_xticklabels(list(kernels), fontsize=7)
right.legend(fontsize=8)
fig.tight_layout()

# %% [markdown]
# With stride 3 no pixel is seen twice: a 3×3 kernel then is its flattened matrix, patch by patch,
# and the two norms agree.
#
# ## Proofs
#
# Power iteration gives an estimate, and always from below. `norm_bounds` gives a bracket that
# holds, rounding included: the upper end comes from a Cholesky factorization that ran to its end.
# What one step of power iteration finds, what twenty do, and the bracket:

# %%
params = {"kernel": jnp.asarray(kernels["random"], jnp.float32)}
for view, name in [(flattened, "flattened"), (operator, "operator ")]:
    estimates = [
        float(sn_jax.init(params, jax.random.key(0), {"kernel": view}, warmup=n)["kernel"].sigma)
        for n in (1, 5, 20)
    ]
    lower, upper = sn_jax.norm_bounds(params["kernel"], view)
    assert max(estimates) <= upper
    print(f"{name}: after 1, 5, 20 steps {np.round(estimates, 3)}", end="; ")
    print(f"certified [{lower:.4f}, {upper:.4f}]")

# %% [markdown]
# ## In a network
#
# Three convolutions with `SpectralNorm`, once with the flattened norm (the paper's, the default)
# and once with the operator's. `views(..., conv="operator")` reads strides, padding and sizes off
# the model; the bars are certified norms of what the layers run with.

# %%
import flax.linen as nn

from sn_jax.linen import SpectralNorm


class Net(nn.Module):
    conv: str

    @nn.compact
    def __call__(self, x):
        for features, stride in [(16, 1), (32, 2), (32, 1)]:
            layer = nn.Conv(features, (3, 3), stride, kernel_init=nn.initializers.uniform(0.1))
            x = nn.relu(SpectralNorm(layer, conv=self.conv)(x))
        return x


x = jnp.zeros((1, 16, 16, 3))
true = {}
for conv in ["reshape", "operator"]:
    net = Net(conv)
    variables = net.init(jax.random.key(0), x)
    for _ in range(20):  # as training would: one iteration a step
        _, updates = net.apply(variables, x, mutable=["batch_stats"])
        variables |= updates
    plain = sn_jax.linen.bake(net, variables, x)["params"]
    shapes = [((16, 16), 1), ((16, 16), 2), ((8, 8), 1)]
    true[conv] = [
        float(sn_jax.norm_bounds(plain[f"Conv_{i}"]["kernel"], sn_jax.Conv(n, s)).upper)
        for i, (n, s) in enumerate(shapes)
    ]
    print(f"{conv:9} norms {np.round(true[conv], 3)}, product {np.prod(true[conv]):.3f}")

# %%
fig, ax = plt.subplots(figsize=(6, 2.8))
for i, (conv, label) in enumerate([("reshape", "flattened"), ("operator", "operator")]):
    ax.bar(np.arange(4) + 0.4 * i - 0.2, [*true[conv], np.prod(true[conv])], 0.4, label=label)
ax.axhline(1, color="k", ls="--")
ax.set_xticks(range(4), ["layer 1", "layer 2", "layer 3", "product"])
ax.set(title="certified upper ends, after normalization by", yscale="log")
ax.legend()
fig.tight_layout()

# %% [markdown]
# Which to take? For GANs the paper's flattened norm is the default, and often trains better: the
# true constant is then some fixed factor larger. Where the constant itself is the point
# (certificates, invertible blocks, distance-aware features) take `conv="operator"`.
