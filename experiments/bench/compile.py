"""What spectral normalization adds to the time to trace and compile a step, and to its program."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from experiments.bench import models, ways
from experiments.bench.timing import Row, interleaved, median_ratio

# name -> model of a size (blocks), its batch, targets for (sn_jax.linen, sn_jax). Layers of the
# transformer share two shapes, so that what is traced once per shape is traced hardly at all.
CASES = {
    "{}-block ViT": (models.VisionTransformer, (2, 16, 192), (0.7, 0.4)),
    "ResNet D": (lambda _: models.ResNetDiscriminator(width=32), (2, 32, 32, 3), (0.7, 0.7)),
}
OURS = ("sn_jax.linen", "sn_jax")


def rows(quick: bool) -> Iterator[list[Row]]:
    """Seconds and instructions that sn_jax and flax.linen add to forward + backward."""
    blocks = 4 if quick else 24
    for name, (make, shape, targets) in list(CASES.items())[: 1 if quick else None]:
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        found = ways.contenders(make(blocks), x)
        programs = {}
        # Every call is as cold as the first.
        seconds = interleaved(
            {way: partial(_compile, programs, way, step, x) for way, step in found.items()},
            rounds=1 if quick else 3,
        )
        check(programs, found, x)
        instructions = {
            way: count_instructions(program.as_text()) for way, program in programs.items()
        }
        yield [
            row
            for ours, target in zip(OURS, targets, strict=True)
            for row in added(name.format(blocks), ours, target, seconds, instructions)
        ]


def _compile(programs, way, step, x):
    jax.clear_caches()
    lowered = jax.jit(step.gradients).lower(step.params, step.state, x)
    programs[way] = lowered.compile()


def check(programs: dict, found: dict[str, ways.Step], x: jax.Array) -> None:
    """Asserts that the programs that were timed give the same gradients in all three ways of SN."""
    grads = {}
    for way in ("flax.linen", *OURS):
        result, _ = programs[way](found[way].params, found[way].state, x)
        grads[way] = np.asarray(ravel_pytree(result)[0])
        theirs = grads["flax.linen"]
        error = np.linalg.norm(grads[way] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-3, f"{way}: gradients are off by {error:.1e}"


def count_instructions(hlo: str) -> int:
    """Of a program's text, ``compiled.as_text()``, in all of its computations."""
    return sum(" = " in line for line in hlo.splitlines())


def added(
    case: str,
    ours: str,
    target: float,
    seconds: dict[str, np.ndarray],
    instructions: dict[str, int],
) -> list[Row]:
    """Two rows: what one of our ways adds to "without", over what flax.linen adds, of the times of
    the rounds and of the sizes of the programs by way."""
    extra = {way: seconds[way] - seconds["without"] for way in (ours, "flax.linen")}
    ratio, spread = median_ratio(extra[ours], extra["flax.linen"])
    more = {way: instructions[way] - instructions["without"] for way in (ours, "flax.linen")}
    case = f"{case}, {ours}"
    return [
        Row("compile", case, "s added", float(np.median(extra[ours])),
            float(np.median(extra["flax.linen"])), "flax.linen", ratio, spread, target),
        Row("compile", case, "HLO instructions added", more[ours], more["flax.linen"],
            "flax.linen", more[ours] / more["flax.linen"], target=target),
    ]  # fmt: skip
