# %% [markdown]
# # Why a discriminator needs a Lipschitz bound
#
# A GAN's generator learns from the slope of the discriminator. What slope does the best
# discriminator have? With nothing that holds it back, one that is unbounded or that vanishes.
# This notebook shows both in the smallest cases there are, and what spectral normalization makes
# of them. Half a minute on two CPU cores.

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

import sn_jax

plt.rcParams |= {"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3}


def network(params, x):
    """Scores f(x) of points x (n, d); D = sigmoid(f)."""
    *layers, last = params.values()
    for layer in layers:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return (x @ last["kernel"] + last["bias"])[:, 0]


def init(key, inputs, width=64):
    sizes = (inputs, width, width, 1)
    return {
        f"dense{i}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, i), (m, n)) / jnp.sqrt(m),
            "bias": 0.5 * jax.random.normal(jax.random.fold_in(key, 9 + i), (n,)),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


# %% [markdown]
# The discriminator's loss is the usual one, half of E softplus(-f(real)) + E softplus(f(fake)).
# With spectral normalization every kernel has norm 1 and the last one norm K, so that f is
# K-Lipschitz: the norms multiply, and ReLU stretches nothing.


# %%
def train(real, fake, K=None, steps=2000, rate=3e-3):
    """A trained discriminator, as a function of points; K is its constant, None for no bound."""
    params = init(jax.random.key(0), real.shape[1])
    state = sn_jax.init(params, jax.random.key(1))
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))
    bound = {"dense0/kernel": 1.0, "dense1/kernel": 1.0, "dense2/kernel": K or 1.0}

    def used(params, state, n_steps):
        if K is None:
            return params, state
        return sn_jax.spectral_normalize(params, state, n_steps=n_steps, bound=bound)

    @jax.jit
    def many_steps(params, state, opt_state):
        def step(carry, _):
            params, state, opt_state = carry
            _, state = used(params, state, 1)

            def loss(params):
                params, _ = used(params, state, 0)
                on_real = jax.nn.softplus(-network(params, real)).mean()
                return (on_real + jax.nn.softplus(network(params, fake)).mean()) / 2

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = adam.update(grads, opt_state)
            return (optax.apply_updates(params, updates), state, opt_state), value

        return jax.lax.scan(step, (params, state, opt_state), None, steps)

    (params, state, _), losses = many_steps(params, state, adam.init(params))
    params, _ = used(params, sn_jax.calibrate(params, state), 0)
    return params, float(losses[-1])


# %% [markdown]
# ## The optimum's slope is unbounded
#
# Real data N(1, 0.6²), a generator that makes N(-1, 0.35²). The best discriminator is known: f* =
# ln p_data - ln p_generator, here a parabola, whose slope grows without end where there is no
# data.

# %%
rng = np.random.default_rng(0)
real = jnp.asarray(1 + 0.6 * rng.standard_normal((512, 1)), jnp.float32)
fake = jnp.asarray(-1 + 0.35 * rng.standard_normal((512, 1)), jnp.float32)
line = jnp.linspace(-4, 4, 401)[:, None]
optimum = -0.5 * ((line - 1) / 0.6) ** 2 + 0.5 * ((line + 1) / 0.35) ** 2 + np.log(0.35 / 0.6)


def slope(params, x):
    grads = jax.vmap(jax.grad(lambda p: network(params, p[None])[0]))(x)
    return jnp.linalg.norm(grads, axis=1)


fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
left.plot(line, optimum, "k:", label="f*, the optimum")
right.plot(line, np.abs(np.gradient(optimum[:, 0], line[:, 0])), "k:")
for K in (None, 1.0, 2.0, 5.0):
    params, loss = train(real, fake, K)
    name = "no bound" if K is None else f"SN, K = {K:g}"
    slopes = slope(params, line)
    left.plot(line, network(params, line), label=f"{name}: loss {loss:.3f}")
    right.plot(line, slopes, label=name)
    print(f"{name:12} loss {loss:.4f}, largest slope {slopes.max():.3f}")
left.hist(np.ravel(real), 30, density=True, alpha=0.3, color="tab:green")
left.hist(np.ravel(fake), 30, density=True, alpha=0.3, color="tab:red")
left.set(ylim=(-12, 15), title="scores (green real, red generated)", xlabel="x")
right.set(ylim=(0, 25), title="slope of the score", xlabel="x")
left.legend(fontsize=7)
fig.tight_layout()

# %% [markdown]
# K is a dial: with a small K the loss is far from its optimum, and the slope never above K; with
# a larger K the optimum comes closer. Nothing else in the network has to be tuned.
#
# ## Disjoint supports: the slope vanishes, or explodes
#
# Real points on one segment, generated ones on a parallel segment at distance 1. Now a perfect
# discriminator exists, and training never stops making it more certain. What reaches the
# generator depends on its loss: with ln(1 - D) the gradient dies, with -ln D it grows with the
# score's slope.

# %%
t = jnp.linspace(-1, 1, 128)[:, None]
segment_real = jnp.concatenate([0.5 + 0 * t, t], 1)
segment_fake = jnp.concatenate([-0.5 + 0 * t, t], 1)


def to_generator(params, loss):
    """Mean length of the gradient of the generator's loss at the generated points."""
    grads = jax.grad(lambda x: loss(network(params, x)).sum())(segment_fake)
    return float(jnp.linalg.norm(grads, axis=1).mean())


losses = {
    "ln(1 - D)": lambda f: -jax.nn.softplus(f),
    "-ln D": lambda f: jax.nn.softplus(-f),
}
plane = jnp.stack(jnp.meshgrid(jnp.linspace(-2, 2, 60), jnp.linspace(-1.5, 1.5, 45)), -1)
fig, axes = plt.subplots(1, 3, figsize=(11, 3))
table = {}
for ax, K in zip(axes, (None, 1.0, 5.0), strict=True):
    params, _ = train(segment_real, segment_fake, K)
    name = "no bound" if K is None else f"SN, K = {K:g}"
    table[name] = {kind: to_generator(params, loss) for kind, loss in losses.items()}
    scores = network(params, plane.reshape(-1, 2)).reshape(45, 60)
    shown = ax.contourf(plane[..., 0], plane[..., 1], scores, 20, cmap="RdBu_r")
    fig.colorbar(shown, ax=ax)
    ax.plot(*segment_real.T, "k", *segment_fake.T, "k--", lw=2)
    ax.set_title(f"scores, {name}")
fig.tight_layout()

print("mean gradient that reaches the generator")
print(f"{'':12}" + "".join(f"{kind:>12}" for kind in losses))
for name, values in table.items():
    print(f"{name:12}" + "".join(f"{values[kind]:12.2e}" for kind in losses))
for K in (1, 5):
    print(f"closed form, K = {K}: ln(1 - D) gives K sigmoid(-K/2) = {K / (1 + np.exp(K / 2)):.3f}")

# %% [markdown]
# With a bound the scores can differ by K over the gap and no more, so the gradient at the
# generated points is what the closed form says, whatever the loss and however long the training:
# neither gone nor exploded. That is the case for a Lipschitz bound; the rest of these notebooks
# is about having one.
