"""What must hold of compiled programs on any machine: what they read and write of a kernel's size.

The programs are XLA's for CPUs, read as text.
"""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from helpers import count_compilations

import sn_jax
from sn_jax import Matrix

pytestmark = pytest.mark.float32
KEY = jax.random.key(0)

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\((.*)$")
# Every view whose groups of axes are contiguous, batch first.
VIEWS = {
    "dense": ((512, 384), Matrix()),
    "outputs first": ((384, 512), Matrix(1, 0)),
    "stack": ((3, 64, 48), Matrix(1, 2)),
    "flattened convolution": ((3, 3, 32, 48), Matrix((0, 1, 2), 3)),
    "stack of flattened convolutions": ((2, 3, 3, 16, 48), Matrix((1, 2, 3), 4)),
    "attention query": ((64, 8, 16), Matrix(0, (1, 2))),
    "attention out": ((8, 16, 64), Matrix((0, 1), 2)),
}


def instructions(hlo):
    """(name, number of elements, operation, names of operands) of every line, arrays only."""
    for line in hlo.splitlines():
        if match := INSTRUCTION.match(line):
            name, shape, operation, rest = match.groups()
            size = math.prod(int(n) for n in shape.split(",") if n)
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            yield name, size, operation, operands


def kernel_sized(hlo, size):
    """What a program does with arrays of at least ``size`` elements.

    Returns:
      dots that read one; transpose and copy of one, fused or not; arrays that are written.
    """
    found = list(instructions(hlo))
    sizes = {name: n for name, n, _, _ in found}
    dots = sum(operation == "dot" and any(sizes.get(x, 0) >= size for x in operands)
               for _, _, operation, operands in found)  # fmt: skip
    moves = sum(operation in ("transpose", "copy") and n >= size for _, n, operation, _ in found)
    entry = instructions(hlo[hlo.index("\nENTRY") :])
    free = ("parameter", "bitcast", "get-tuple-element", "tuple")
    written = sum(n >= size and operation not in free for _, n, operation, _ in entry)
    return dots, moves, written


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_kernel_sized_sees_what_it_should():
    w, x = jnp.ones((64, 48)), jnp.ones(48)

    def program(w, x):
        return (w @ x) @ w, w.T, w * 2

    # XLA of jaxlib 0.12, hardly optimizing, gives w.T a layout by a second operation.
    assert kernel_sized(compiled(program, w, x), w.size) in ((2, 1, 2), (2, 2, 3))


def problem(name):
    shape, view = VIEWS[name]
    params = {"w": jax.random.normal(KEY, shape)}
    return params, sn_jax.init(params, KEY, {"w": view}, warmup=1), math.prod(shape)


@pytest.mark.parametrize("name", VIEWS)
def test_forward_reads_the_kernel_twice_and_writes_one(name):
    params, state, size = problem(name)
    dots, moves, written = kernel_sized(compiled(sn_jax.spectral_normalize, params, state), size)
    assert (dots, moves, written) == (2, 0, 1)


@pytest.mark.parametrize("name", VIEWS)
def test_an_update_writes_nothing_of_the_kernels_size(name):
    params, state, size = problem(name)

    def update(params, state):
        return sn_jax.spectral_normalize(params, state)[1]

    assert kernel_sized(compiled(update, params, state), size) == (2, 0, 0)


@pytest.mark.parametrize("name", VIEWS)
def test_gradient_multiplies_no_kernel_and_writes_one_array(name):
    params, state, size = problem(name)

    def step(params, state, cotangent):
        def loss(params):
            normalized, new_state = sn_jax.spectral_normalize(params, state)
            return jnp.vdot(cotangent, normalized["w"]), (normalized, new_state)

        return jax.grad(loss, has_aux=True)(params)

    dots, _, written = kernel_sized(compiled(step, params, state, params["w"]), size)
    assert (dots, written) == (2, 2)  # W_bar and the gradient


@pytest.mark.parametrize("name", VIEWS)
def test_second_call_compiles_nothing(name):
    params, state, _ = problem(name)
    jitted = jax.jit(sn_jax.spectral_normalize)
    for function in (sn_jax.spectral_normalize, jitted):
        _, state = jax.block_until_ready(function(params, state))
        with count_compilations() as compiled:
            jax.block_until_ready(function(params, state))
        assert not compiled
