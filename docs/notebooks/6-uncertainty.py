# %% [markdown]
# # Knowing what it does not know
#
# SNGP (Liu et al. 2020): a residual network whose blocks are kept from stretching distances too
# much, and a Gaussian process, approximated by random features, on what it computes. The variance
# should then grow with the distance from the training data. This notebook measures that on
# scikit-learn's two moons, beside a softmax, with and without spectral normalization, and then on
# digits. About a minute on two CPU cores.

# %% tags=["setup"]
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

    for needed in map(Requirement, importlib.metadata.requires("sn_jax")):
        if needed.marker is None and importlib.metadata.version(needed.name) not in needed.specifier:
            print(f"sn_jax needs {needed}: run  %pip install -U {needed.name}  and restart.")
    print(jax.devices())

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.stats import spearmanr
from sklearn.datasets import load_digits, make_moons
from sklearn.metrics import roc_auc_score

import sn_jax

plt.rcParams |= {"figure.dpi": 80}
WIDTH, FEATURES = 128, 512


def hidden(blocks, x, scale=1.0):
    """Residual blocks behind a fixed embedding; each is x + f(x) with |f| at most its norm."""
    embedding = jax.random.normal(jax.random.key(5), (x.shape[-1], WIDTH)) / jnp.sqrt(x.shape[-1])
    h = scale * x @ embedding
    for block in blocks:
        h = h + jax.nn.relu(h @ block["kernel"] + block["bias"])
    return h


def random_features(h):
    """Features of a Gaussian kernel (Rahimi & Recht 2007): cos of random projections."""
    keys = jax.random.split(jax.random.key(6))
    w = jax.random.normal(keys[0], (WIDTH, FEATURES)) / jnp.sqrt(WIDTH)
    b = jax.random.uniform(keys[1], (FEATURES,), maxval=2 * jnp.pi)
    return jnp.sqrt(2 / FEATURES) * jnp.cos(h @ w + b)


# %% [markdown]
# The normalization is three arguments: `bound=0.95`, `mode="clip"` (a kernel whose norm is smaller
# stays as it is), `gradient="stop"` (the norm is a constant for the gradient). `init` is told which
# kernels: those of the blocks.


# %%
@partial(jax.jit, static_argnames=("c", "steps", "classes"))
def fit(key, x, y, depth_blocks, c=None, steps=600, classes=2):
    blocks = depth_blocks
    params = {"blocks": blocks, "out": jnp.zeros((FEATURES, classes))}
    state = sn_jax.init(blocks, jax.random.key(1))
    adam = optax.adam(1e-2)

    def normalize(blocks, state, n_steps):
        if c is None:
            return blocks, state
        return sn_jax.spectral_normalize(
            blocks, state, n_steps=n_steps, bound=c, mode="clip", gradient="stop"
        )

    def step(carry, key):
        params, state, opt_state = carry
        rows = jax.random.choice(key, len(x), (128,))
        _, state = normalize(params["blocks"], state, 1)

        def loss(params):
            blocks, _ = normalize(params["blocks"], state, 0)
            scores = random_features(hidden(blocks, x[rows])) @ params["out"]
            fit = optax.softmax_cross_entropy_with_integer_labels(scores, y[rows]).mean()
            return fit + 0.5 * jnp.sum(params["out"] ** 2) / len(x)  # the Gaussian prior

        updates, opt_state = adam.update(jax.grad(loss)(params), opt_state)
        return (optax.apply_updates(params, updates), state, opt_state), None

    carry = (params, state, adam.init(params))
    (params, state, _), _ = jax.lax.scan(step, carry, jax.random.split(key, steps))
    blocks, _ = normalize(params["blocks"], state, 0)
    # Laplace: the precision of the last layer, one for all classes.
    phi = random_features(hidden(blocks, x))
    p = jax.nn.softmax(phi @ params["out"]).max(1)
    precision = jnp.eye(FEATURES) + (phi * (p * (1 - p))[:, None]).T @ phi
    return blocks, params["out"], jnp.linalg.inv(precision)


def blocks_of(key, depth):
    kernel = jax.nn.initializers.he_normal()
    return [
        {"kernel": kernel(k, (WIDTH, WIDTH)), "bias": jnp.zeros(WIDTH)}
        for k in jax.random.split(key, depth)
    ]


@jax.jit
def predict(model, x):
    """(probabilities, variance of the scores) at each x."""
    blocks, out, covariance = model
    phi = random_features(hidden(blocks, x))
    return jax.nn.softmax(phi @ out), jnp.einsum("ij,jk,ik->i", phi, covariance, phi)


# %%
x, y = make_moons(1000, noise=0.1, random_state=0)
x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)
side = jnp.linspace(-3, 4, 60)
grid = jnp.stack(jnp.meshgrid(side, side - 0.25), -1).reshape(-1, 2)
distance = jnp.sqrt(((grid[:, None] - x) ** 2).sum(-1)).min(1)
far = jax.random.normal(jax.random.key(3), (200, 2)) * 0.3 + jnp.array([-2.5, 2.0])

rows = []
models = {}
for depth in [5, 10, 20]:
    for c in [0.95, None]:
        start = blocks_of(jax.random.key(0), depth)
        models[depth, c] = model = fit(jax.random.key(2), x, y, start, c)
        variance = predict(model, grid)[1]
        accuracy = float((predict(model, x)[0].argmax(1) == y).mean())
        inside, outside = predict(model, x)[1], predict(model, far)[1]
        labels = np.r_[np.zeros(len(x)), np.ones(len(far))]
        auroc = roc_auc_score(labels, np.r_[inside, outside])
        confidence = np.r_[predict(model, x)[0].max(1), predict(model, far)[0].max(1)]
        rows.append((depth, c, accuracy, spearmanr(variance, distance)[0], auroc,
                     roc_auc_score(labels, -confidence)))  # fmt: skip

print("blocks  c     accuracy  rank corr. with distance  AUROC: variance  softmax")
for depth, c, *numbers in rows:
    print(f"{depth:6}  {c or 'none':5}" + "{:9.3f}{:26.2f}{:17.3f}{:9.3f}".format(*numbers))

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.3))
depth = 10
pictures = {
    "softmax: 1 - confidence, no SN": 1 - predict(models[depth, None], grid)[0].max(1),
    "GP variance, no SN": predict(models[depth, None], grid)[1],
    "GP variance, SN (c = 0.95)": predict(models[depth, 0.95], grid)[1],
}
for ax, (title, values) in zip(axes, pictures.items(), strict=True):
    shape = (len(side), len(side))
    shown = ax.contourf(side, side - 0.25, np.asarray(values).reshape(shape), 20, cmap="viridis")
    ax.scatter(*x.T, c=y, s=2, cmap="coolwarm")
    ax.set(title=title, xticks=[], yticks=[])
    ax.title.set_fontsize(10)
    fig.colorbar(shown, ax=ax)
fig.tight_layout()

# %% [markdown]
# **Read it soberly.** The softmax is sure of itself far away from all data; the variance is not, and
# tells the far cluster apart perfectly, *with and without* spectral normalization: random features
# alone do that here.
