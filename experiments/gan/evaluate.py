"""How good the samples are: judged by a classifier of the real images."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.gan.train import LATENT, State, Training, runs_once, scaled
from experiments.metrics.distances import frechet_distance

N_SAMPLES = 2000

Judge = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Classifier(nn.Module):
    """Images (n, h, w, c) in [-1, 1] to logits (n, n_classes) and features (n, 64)."""

    n_classes: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.relu(nn.Conv(64, (3, 3), (2, 2))(x))
        features = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(self.n_classes)(features), features


def train_classifier(images: np.ndarray, labels: np.ndarray) -> Judge:
    """Train the classifier, always with the same seed: one judge for every run.

    Fifteen passes over the images, uint8 (n, h, w, c), in batches of 64, but at most a thousand
    batches. The judge makes class probabilities (n, n_classes) and features (n, 64) of images.
    """
    classifier = Classifier(int(labels.max()) + 1)
    rng = np.random.default_rng(0)
    batch_size = min(64, len(images))
    n_batches = len(images) // batch_size
    passes = (rng.permutation(len(images))[: n_batches * batch_size] for _ in range(15))
    batches = (rows for order in passes for rows in order.reshape(n_batches, -1))
    n_steps = min(15 * n_batches, 1000)
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, n_steps))

    @partial(jax.jit, compiler_options=runs_once())
    def init(x):
        params = classifier.init(jax.random.key(0), x)["params"]
        return params, adam.init(params)

    @jax.jit
    def step(params, opt_state, x, y):
        def objective(params):
            logits, _ = classifier.apply({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, opt_state = adam.update(jax.grad(objective)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = init(scaled(images[:1]))
    for rows in islice(batches, n_steps):
        params, opt_state = step(params, opt_state, scaled(images[rows]), labels[rows])

    @jax.jit
    def judge(x):
        logits, features = classifier.apply({"params": params}, x)
        return jax.nn.softmax(logits), features

    def in_parts(x):
        parts = [jax.device_get(judge(x[i : i + 500])) for i in range(0, len(x), 500)]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    return in_parts


def generated(training: Training, state: State, n: int, n_classes: int) -> Iterator[np.ndarray]:
    """n samples in batches (100, h, w, c) in [-1, 1], of random classes; the last may be smaller.

    Their randomness follows from the state, and no training step has used it.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    z_key, label_key = jax.random.split(key)
    latents = jax.random.normal(z_key, (-(-n // 100), 100, LATENT), np.float32)
    labels = jax.random.randint(label_key, latents.shape[:2], 0, n_classes)
    for i, batch in enumerate(zip(latents, labels, strict=True)):
        yield np.asarray(training.sample(state, *batch))[: n - 100 * i]


def quality(
    judge: Judge, fake: np.ndarray, train: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, Any]:
    """What the judge says of generated images, beside what it says of held-out real ones.

    The Fréchet distance of n generated images to the n held-out ones stands beside that of n
    training images to them: what perfect samples would get.

    Args:
      judge: from ``train_classifier``.
      fake: generated images, (n_fake, h, w, c) in [-1, 1].
      train: real images that the judge and the generator were trained on, likewise.
      test, test_labels: held-out real images, likewise, and their classes (n_test,).
    """
    n = min(len(fake), len(train), len(test))
    fake_probabilities, fake_features = judge(fake)
    real_probabilities, real_features = judge(test)
    _, train_features = judge(train[:n])
    classes = fake_probabilities.argmax(-1)
    counts = np.bincount(classes, minlength=fake_probabilities.shape[-1])
    return {
        "classifier_accuracy": float(np.mean(real_probabilities.argmax(-1) == test_labels)),
        "n_samples": len(fake),
        "class_fractions": [float(count / len(fake)) for count in counts],
        "confidence_fake": float(fake_probabilities.max(-1).mean()),
        "confidence_real": float(real_probabilities.max(-1).mean()),
        "n_fake": n,
        "n_real": n,
        "frechet_fake": frechet_distance(fake_features[:n], real_features[:n]),
        "frechet_real": frechet_distance(train_features, real_features[:n]),
    }
