"""Slopes of scalar functions: known constants, sampled quotients, and what a prototype got wrong."""

import importlib
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# The module has no public name: lipschitz_bound is what users call.
_slopes = importlib.import_module("sn_jax._slopes")
Node, Ref, Jump, Unknown = _slopes.Node, _slopes.Ref, _slopes.Jump, _slopes.Unknown
slopes = _slopes.slopes
inf = math.inf


def translated(fn):
    """The nodes of fn, read off its jaxpr."""
    nodes = [Node("var")]

    def walk(jaxpr, consts, args):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        for eqn in jaxpr.eqns:
            read = [v.val if hasattr(v, "val") else known[v] for v in eqn.invars]
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if inner is None:
                read = [a if isinstance(a, Ref) else a.item() if hasattr(a, "item") else a
                        for a in read]  # fmt: skip
                nodes.append(Node(eqn.primitive.name, tuple(read), dict(eqn.params)))
                out = [Ref(len(nodes) - 1)]
            else:
                out = walk(getattr(inner, "jaxpr", inner), getattr(inner, "consts", []), read)
            known.update(zip(eqn.outvars, out, strict=True))
        return [v.val if hasattr(v, "val") else known[v] for v in jaxpr.outvars]

    with jax.numpy_dtype_promotion("standard"):
        closed = jax.make_jaxpr(fn)(jnp.float32(0))
    (out,) = walk(closed.jaxpr, closed.consts, [Ref(0)])
    if out != Ref(len(nodes) - 1):
        nodes.append(Node("copy", (out,)))
    return nodes


def of(fn, domain=(-inf, inf)):
    return slopes(translated(fn), domain)
