"""How good the samples are: judged by a classifier of the real images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array

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


def train_classifier(images: np.ndarray, labels: np.ndarray, *, epochs: int = 15) -> Judge:
    """Train the classifier, always with the same seed: one judge for every run.

    Args:
      images: (n, h, w, c) in [-1, 1].
      labels: (n,), integers from 0.
      epochs: passes over the images, in batches of 64.

    Returns:
      A function from images to class probabilities (n, n_classes) and features (n, 64).
    """
    classifier = Classifier(int(labels.max()) + 1)
    rng = np.random.default_rng(0)
    batch_size = 64
    n_batches = len(images) // batch_size
    schedule = optax.cosine_decay_schedule(2e-3, epochs * n_batches)
    adam = optax.adam(schedule)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs once
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

    params, opt_state = init(images[:1])
    for _ in range(epochs):
        for rows in rng.permutation(len(images))[: n_batches * batch_size].reshape(n_batches, -1):
            params, opt_state = step(params, opt_state, images[rows], labels[rows])

    @jax.jit
    def judge(x):
        logits, features = classifier.apply({"params": params}, x)
        return jax.nn.softmax(logits), features

    return lambda x: jax.device_get(judge(x))


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
      test: held-out real images, likewise.
      test_labels: (n_test,), integers.
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
