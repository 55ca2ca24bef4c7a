# %% [markdown]
# # Spectral normalization in your GAN
#
# A small GAN on scikit-learn's real handwritten digits, first in Flax linen, then in Flax NNX. In
# both the change is one import line. On two CPU cores this notebook takes about a minute.

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

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import sn_jax
from sn_jax.linen import SpectralNorm  # was: from flax.linen import SpectralNorm

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3}
images = jnp.asarray(load_digits().images[..., None] / 8 - 1, jnp.float32)  # (1797, 8, 8, 1)
print(images.shape)

# %% [markdown]
# ## Linen
#
# Every layer of the discriminator is wrapped. The generator is an ordinary one: spectral
# normalization belongs in the discriminator, whose Lipschitz constant it bounds.


# %%
class Discriminator(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (16, 32):
            x = SpectralNorm(nn.Conv(features, (4, 4), strides=2))(x)
            x = nn.leaky_relu(x, 0.1)
        return SpectralNorm(nn.Dense(1))(x.reshape(len(x), -1))[:, 0]


def normal(x):
    """ReLU behind batch normalization, always with the statistics of the batch at hand."""
    axes = tuple(range(x.ndim - 1))
    return nn.relu((x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + 1e-5))


class Generator(nn.Module):
    @nn.compact
    def __call__(self, z):
        x = normal(nn.Dense(256)(normal(nn.Dense(256)(z))))
        return nn.tanh(nn.Dense(64)(x)).reshape(-1, 8, 8, 1)


d, g = Discriminator(), Generator()
keys = jax.random.split(jax.random.key(0), 3)
z_size, batch = 32, 64
d_variables = d.init(keys[0], images[:1])
g_params = g.init(keys[1], jnp.ones((1, z_size)))["params"]
print(jax.tree.map(jnp.shape, d_variables["batch_stats"]))

# %% [markdown]
# One step updates both networks. The discriminator sees real and generated images **in one call**
# with `mutable=["batch_stats"]`: so there is one power iteration a step. The generator's loss
# calls it without: the stored vectors are used, and nothing changes.

# %%
adam = optax.adam(5e-4, b1=0.5, b2=0.999)


@jax.jit
def step(carry, real, key):
    d_params, stats, g_params, d_opt, g_opt = carry
    fake = g.apply({"params": g_params}, jax.random.normal(key, (batch, z_size)))

    def d_loss(d_params):
        variables = {"params": d_params, "batch_stats": stats}
        scores, updates = d.apply(variables, jnp.concatenate([real, fake]), mutable=["batch_stats"])
        hinge = nn.relu(1 - scores[:batch]).mean() + nn.relu(1 + scores[batch:]).mean()
        return hinge, updates["batch_stats"]

    def g_loss(g_params):
        fake = g.apply({"params": g_params}, jax.random.normal(key, (batch, z_size)))
        return -d.apply({"params": d_params, "batch_stats": new_stats}, fake).mean()

    (d_value, new_stats), grads = jax.value_and_grad(d_loss, has_aux=True)(d_params)
    updates, d_opt = adam.update(grads, d_opt)
    d_params = optax.apply_updates(d_params, updates)
    g_value, grads = jax.value_and_grad(g_loss)(g_params)
    updates, g_opt = adam.update(grads, g_opt)
    g_params = optax.apply_updates(g_params, updates)
    return (d_params, new_stats, g_params, d_opt, g_opt), (d_value, g_value)


def batches(seed):
    rng = np.random.default_rng(seed)
    while True:
        yield images[rng.choice(len(images), batch, replace=False)]


carry = (
    d_variables["params"],
    d_variables["batch_stats"],
    g_params,
    adam.init(d_variables["params"]),
    adam.init(g_params),
)
sigmas, losses = [], []
for i, real in enumerate(itertools.islice(batches(0), 1500)):
    carry, values = step(carry, real, jax.random.fold_in(keys[2], i))
    if i % 100 == 0:
        now = {"params": carry[0], "batch_stats": carry[1]}
        sigmas.append(sn_jax.linen.spectral_norms(now))  # a flat dict, for any logger
        losses.append(values)

# %%
samples = g.apply({"params": carry[2]}, jax.random.normal(jax.random.key(9), (40, z_size)))


def show(*rows):
    _, axes = plt.subplots(len(rows), 1, figsize=(8, 1.2 * len(rows)))
    for ax, (title, x) in zip(np.atleast_1d(axes), rows, strict=True):
        grid = np.asarray(x)[:40].reshape(2, 20, 8, 8).transpose(0, 2, 1, 3).reshape(16, 160)
        ax.imshow(grid, cmap="gray_r")
        ax.set(title=title, xticks=[], yticks=[])
        ax.grid(False)


show(("real", images), ("generated, after 1,500 steps", samples))

# %% [markdown]
# The raw kernels' norms go where the optimizer drives them; the layers run on `W / sigma`, so the
# network does not see that.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
steps = 100 * np.arange(len(sigmas))
for path in sigmas[0]:
    left.plot(steps, [s[path] for s in sigmas], label=path)
left.set(title="sigma of each raw kernel", xlabel="step")
left.legend(fontsize=7)
right.plot(steps, losses, label=["discriminator (hinge)", "generator"])
right.set(title="losses", xlabel="step")
right.legend(fontsize=7)
fig.tight_layout()

# %% [markdown]
# **Stop and go on.** All there is to keep are pytrees of arrays: `carry` is the whole run. Here
# with Flax's own msgpack; orbax, or pickle, do as well. What goes on is what would have gone on.

# %%
from flax import serialization

saved = serialization.to_bytes(carry)
restored = serialization.from_bytes(carry, saved)
real, key = next(batches(1)), jax.random.key(7)
on, again = step(carry, real, key)[0], step(restored, real, key)[0]
same = jax.tree.map(lambda a, b: bool((a == b).all()), on, again)
print(f"{len(saved) // 1000} kB; bit for bit the same: {all(jax.tree.leaves(same))}")

# %% [markdown]
# **For serving**, `bake` puts `W / sigma` into the variables of the same network without
# wrappers.
#
# ## NNX
#
# The same change, the same networks. In training mode a call of the discriminator takes one power
# iteration; under `eval()` none is stored. The raw kernels are never overwritten.

# %%
from sn_jax import nnx as sn  # was: from flax.nnx import SpectralNorm


class NNXDiscriminator(nnx.Module):
    def __init__(self, rngs):
        conv1 = nnx.Conv(1, 16, (4, 4), strides=2, rngs=rngs)
        conv2 = nnx.Conv(16, 32, (4, 4), strides=2, rngs=rngs)
        self.conv1 = sn.SpectralNorm(conv1, rngs=rngs)
        self.conv2 = sn.SpectralNorm(conv2, rngs=rngs)
        self.head = sn.SpectralNorm(nnx.Linear(128, 1, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        x = nnx.leaky_relu(self.conv2(nnx.leaky_relu(self.conv1(x), 0.1)), 0.1)
        return self.head(x.reshape(len(x), -1))[:, 0]


class NNXGenerator(nnx.Module):
    def __init__(self, rngs):
        self.dense1 = nnx.Linear(z_size, 256, rngs=rngs)
        self.dense2 = nnx.Linear(256, 256, rngs=rngs)
        self.out = nnx.Linear(256, 64, rngs=rngs)

    def __call__(self, z):
        x = normal(self.dense2(normal(self.dense1(z))))
        return nnx.tanh(self.out(x)).reshape(-1, 8, 8, 1)


D, G = NNXDiscriminator(nnx.Rngs(0)), NNXGenerator(nnx.Rngs(1))
d_opt = nnx.Optimizer(D, adam, wrt=nnx.Param)
g_opt = nnx.Optimizer(G, adam, wrt=nnx.Param)


@nnx.jit
def nnx_step(D, G, d_opt, g_opt, real, z):
    def d_loss(D, fake):
        scores = D(jnp.concatenate([real, fake]))  # training mode: one iteration
        return nnx.relu(1 - scores[:batch]).mean() + nnx.relu(1 + scores[batch:]).mean()

    def g_loss(G, D):
        return -D(G(z)).mean()

    d_value, grads = nnx.value_and_grad(d_loss)(D, G(z))
    d_opt.update(D, grads)
    frozen = nnx.view(D, use_running_average=True)  # the same parameters, in eval mode
    g_value, grads = nnx.value_and_grad(g_loss)(G, frozen)
    g_opt.update(G, grads)
    return d_value, g_value


for i, real in enumerate(itertools.islice(batches(2), 600)):
    z = jax.random.normal(jax.random.fold_in(keys[2], i), (batch, z_size))
    values = nnx_step(D, G, d_opt, g_opt, real, z)
print({path: round(float(sigma), 2) for path, sigma in sn.spectral_norms(D).items()})
show(("NNX, after 600 steps", G(jax.random.normal(jax.random.key(9), (40, z_size)))))

# %% [markdown]
# More of it: `python -m experiments.gan` in the repository trains the paper's networks at every
# size, with every method that they are compared with, and measures the samples.
