"""From a function to the graph of what it computes.

The jaxpr's calls are inlined and its loops unrolled, everything that x does not enter is computed
as the program would, equal operations become one, and a few exact identities of real arithmetic
are applied (``x + 0``, ``x != x`` where x is a number). Combinations that are known only together
(softmax, norms of groups) are recognized by ``_patterns`` as the operations come in.
"""

import contextlib
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from sn_jax import _patterns
from sn_jax._numbers import is_lost_with, is_real
from sn_jax._pieces import ELEMENTWISE, Constant, Operation, is_indexing, permuted
from sn_jax._trace import evaluate, inner_program, scan_counts

Value = Operation | Constant
_OTHER_PLATFORM = "another platform"

# Loops are unrolled up to this many equations in all.
UNROLLED = 4000
# Longer ones are bounded step by step, up to this many.
_LONGEST = 20_000

_OWN = {
    "add": jax.lax.add_p, "broadcast_in_dim": jax.lax.broadcast_in_dim_p, "div": jax.lax.div_p,
    "mul": jax.lax.mul_p, "reshape": jax.lax.reshape_p, "slice": jax.lax.slice_p,
    "sub": jax.lax.sub_p,
}  # fmt: skip
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call",
}  # fmt: skip
_IDENTITIES = {
    "copy", "copy_p", "device_put", "mesh_cast", "name", "optimization_barrier", "pvary",
    "reduce_precision", "reshard", "sharding_constraint", "sn_jax_tag", "stop_gradient",
}  # fmt: skip


class NoPlatform(ValueError):
    """A branch by platform leaves this one out."""


class Graph(NamedTuple):
    """What a function computes.

    Attributes:
      x: its argument.
      outputs: those of its results that depend on x.
      platforms: whose programs can differ from this one.
      notes: what was taken for what, as sentences.
    """

    x: Operation
    outputs: list[Operation]
    platforms: frozenset[str]
    notes: list[str]


def graph_of(fn: Callable[..., Any], x: Any, platform: str) -> Graph:
    """The graph of ``fn`` at arguments like ``x``, on one platform.

    Raises:
      TypeError: not one floating-point array in ``x``, or no array among the results.
      ValueError: a branch or loop on x, Python's own too.
    """
    leaves, treedef = jax.tree_util.tree_flatten(x)
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")]
    if len(arrays) != 1:
        raise TypeError(
            f"lipschitz_bound is of functions of one array; x holds {len(arrays)}. Close over the "
            "others: lipschitz_bound(lambda x: model.apply(variables, x), x)."
        )
    (place,) = arrays
    array = leaves[place]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"x must be floating point; its dtype is {array.dtype}.")

    def of_array(array):
        out = fn(treedef.unflatten([*leaves[:place], array, *leaves[place + 1 :]]))
        return [leaf for leaf in jax.tree_util.tree_leaves(out) if leaf is not None]

    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    with told_plainly(array.shape):
        closed = jax.make_jaxpr(of_array)(jax.ShapeDtypeStruct(array.shape, dtype))
    builder = Builder(platform)
    code = getattr(inspect.unwrap(fn), "__code__", None)
    if code is not None:  # where a line is not known
        builder.here = f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}"
    x = Operation("x", (), {}, array.shape, dtype, builder.here)
    outputs = builder.program(closed, [x])
    varying = [y for y in outputs if isinstance(y, Operation)]
    for y in varying:
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise ValueError(
                f"{y.where}: a result of type {y.dtype} depends on x by {y.op}: it jumps, so "
                "there is no Lipschitz constant. Leave it out of what the function returns."
            )
    return Graph(x, varying, frozenset(builder.platforms), list(dict.fromkeys(builder.notes)))


@contextlib.contextmanager
def told_plainly(shape: tuple[int, ...]) -> Iterator[None]:
    """What goes wrong in a call of a function of x alone, in a sentence that says so."""
    try:
        yield
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            f"{_line(error.__traceback__)}: Python's own if, while, int, float or the like on what "
            "depends on x, so the function is not one program: choose with jnp.where, or by what "
            "does not depend on x."
        ) from error
    except TypeError as error:
        line = _line(error.__traceback__)
        raise TypeError(
            f"{'' if line == '?' else f'{line}: '}{error} (The function is called with x alone, "
            f"here an array of shape {shape}: close over all else, as in lambda x: "
            "model.apply(variables, x).)"
        ) from error


class Builder:
    """Makes operations, each once."""

    def __init__(self, platform: str):
        self.platform, self.platforms = platform, set[str]()
        self.notes: list[str] = []
        self.here = "?"  # the line that is being translated
        self.budget = UNROLLED
        self._constants: dict[Any, Constant] = {}
        self._operations: dict[Any, Operation] = {}

    def constant(self, value: Any) -> Constant:
        if not hasattr(value, "dtype"):
            value = np.asarray(value)
        if jnp.issubdtype(value.dtype, jax.dtypes.extended):
            key = id(value)
        else:
            value = np.asarray(value)
            key = value.dtype, value.shape, value.tobytes()
        # The object is kept, and with it its id.
        return self._constants.setdefault(key, Constant(value))

    def operation(self, op, args, params, shape, dtype, where, primitive=None, out=0) -> Operation:
        """The operation, as it is."""
        ids = [id(a) for a in args]
        if op in ("add", "mul", "max", "min"):  # the order of arguments says nothing
            ids.sort()
        key = (op, *ids, _key(params), out)
        if key not in self._operations:
            node = Operation(op, tuple(args), params, shape, dtype, where, primitive, out)
            self._operations[key] = node
        return self._operations[key]

    def like(self, op: str, *args: Value, **params: Any) -> Value:
        """An elementwise or indexing operation on these, of JAX's own primitive."""
        first = next(a for a in args if isinstance(a, Operation))
        shape = params.pop("shape", None)
        if shape is None:
            shape = np.broadcast_shapes(*(a.shape for a in args))
        return self.emit(op, args, params, shape, first.dtype, self.here, _OWN.get(op))

    def emit(self, op, args, params, shape, dtype, where, primitive=None, out=0) -> Value:
        """The operation, or what equals it and is simpler."""
        if op in _IDENTITIES:
            if op == "reduce_precision":
                self.note_rounding("reduce_precision", where)
            return args[out]
        if op == "convert_element_type" and _are_floats(_dtype_of(args[0]), dtype):
            if jnp.finfo(dtype).bits < jnp.finfo(_dtype_of(args[0])).bits:
                self.note_rounding(str(dtype), where)
            return args[0]
        if op in ELEMENTWISE:
            args = [self._broadcast(a, shape) for a in args]
            simple = self._simplified(op, args, params, shape)
            if simple is not None:
                return simple
            if (op == "mul" and args[0] is args[1]) or (op == "integer_pow" and params["y"] == 2):
                op, args, params, primitive = "square", args[:1], {}, jax.lax.square_p
        if is_indexing(op) and len(args) == 1 and _is_predicate(args[0]):
            return self._of_indexed(
                self.operation(op, args, params, shape, dtype, where, primitive)
            )
        found = _patterns.recognized(self, op, args, params, shape)
        if found is not None:
            return found
        return self.operation(op, args, params, shape, dtype, where, primitive, out)

    def _of_indexed(self, node: Operation) -> Value:
        """The indexing of a predicate as the predicate of what is indexed, so that a select is seen
        as one function with it."""
        (inner,) = node.inputs
        args = []
        for a in inner.args:
            if isinstance(a, Operation):
                a = self.emit(node.op, [a], node.params, node.shape, a.dtype, node.where,
                              node.primitive)  # fmt: skip
            elif a.uniform() is None:
                a = self.constant(permuted(node, np.broadcast_to(a.array, inner.shape)))
            args.append(a)
        return self.emit(inner.op, args, inner.params, node.shape, inner.dtype, inner.where,
                         inner.primitive, inner.out)  # fmt: skip

    def note_rounding(self, what: str, where: str) -> None:
        self.notes.append(f"{where}: rounding to {what} is taken for the identity")

    def _broadcast(self, a: Value, shape) -> Value:
        """Explicitly, so that elementwise operations are between equal shapes; constants stay as
        they are."""
        if isinstance(a, Constant) or a.shape == tuple(shape):
            return a
        places = tuple(range(len(shape) - len(a.shape), len(shape)))
        params = {"shape": tuple(shape), "broadcast_dimensions": places, "sharding": None}
        primitive = jax.lax.broadcast_in_dim_p
        return self.emit("broadcast_in_dim", [a], params, shape, a.dtype, a.where, primitive)

    def _simplified(self, op, args: list[Value], params, shape) -> Value | None:
        """Identities of real arithmetic, for finite x; None where there is none."""
        first, second = args[0], args[1] if len(args) > 1 else None
        same = first is second and len(args) == 2
        if same and (op in ("lt", "gt") or (op in ("ne", "eq", "le", "ge") and first.number)):
            return self.constant(np.full(shape, op in ("eq", "le", "ge")))
        if op in _COMPARE and not same:
            # Every real number is as far from infinity.
            ends = [_representative(a) for a in args]
            if math.inf in map(abs, ends) and not any(map(math.isnan, ends)):
                return self.constant(np.full(shape, getattr(operator, op)(*ends)))
        if same and op == "sub" and isinstance(first, Operation) and is_real(first):
            return self.constant(np.zeros(shape, first.dtype))
        if same and op in ("max", "min"):
            return first
        if op == "is_finite" and first.number:
            known = np.ones(shape, bool) if first.lost is None else ~first.lost
            return self.constant(np.broadcast_to(known, shape))
        if op == "select_n":
            which, cases = first, args[1:]
            if isinstance(which, Constant) and which.uniform() is not None:
                return self._at_shape(cases[int(which.uniform() or 0)], shape)
            if all(case is cases[0] for case in cases):
                return self._at_shape(cases[0], shape)
            if (number := self._without_guard(which, cases)) is not None:
                return number
        for a, c in ((first, second), (second, first)):
            if not isinstance(c, Constant) or not isinstance(a, Operation) or len(args) != 2:
                continue
            number, in_order = c.uniform(), a is first
            if number == 0 and (op in ("add", "add_any") or (op == "sub" and in_order)):
                return a
            if number == 1 and (op == "mul" or (op == "div" and in_order)):
                return a
            if number == 0 and op == "mul" and is_real(a):
                return self.constant(np.zeros(shape, a.dtype))
            if (op, number) in (("max", -math.inf), ("min", math.inf)):
                return a
        return None

    @staticmethod
    def _without_guard(which: Value, cases: Sequence[Value]) -> Value | None:
        """The case of a select that is taken where there is a number, if the other one is none
        where there is none: as the sum of both in logaddexp."""
        if not isinstance(which, Operation) or which.op not in _GUARDS:
            return None
        guarded, number = which.args[0], _GUARDS[which.op]
        if guarded is which.args[-1] and is_lost_with(cases[1 - number], guarded):
            return cases[number]
        return None

    def _at_shape(self, a: Value, shape) -> Value:
        if isinstance(a, Constant) and a.shape != tuple(shape):
            return self.constant(np.broadcast_to(np.asarray(a.value), shape))
        return a

    # Programs.

    def program(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        jaxpr = closed.jaxpr
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(self.constant, closed.consts), strict=True))

        def known(var) -> Value:
            return self.constant(_literal(var)) if isinstance(var, Literal) else env[var]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, [known(var) for var in eqn.invars])
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [known(var) for var in jaxpr.outvars]

    def equation(self, eqn, inputs: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        inner = inner_program(eqn) if name in _CALLS else None
        line = where(eqn)
        self.here = line if line != "?" else self.here
        if inner is not None:
            outer, outputs = self.here, self.program(inner, inputs)
            self.here = outer
            return outputs
        if name == "platform_index":
            cases = eqn.params["platforms"]
            # Of all that are not named one stands for the others.
            named = {name for case in cases if case is not None for name in case}
            self.platforms |= named | ({_OTHER_PLATFORM} if None in cases else set())
            fits = [i for i, c in enumerate(cases) if c is None or self.platform in c]
            if not fits:
                raise NoPlatform(
                    f"{self.here}: platform_dependent says nothing of {self.platform}: give it a "
                    "default."
                )
            return [self.constant(np.int32(fits[0]))]
        constants = [a for a in inputs if isinstance(a, Constant)]
        if name == "cond" and isinstance(inputs[0], Constant):
            branches = eqn.params["branches"]
            index = int(np.clip(int(np.asarray(inputs[0].value)), 0, len(branches) - 1))
            return self.program(branches[index], inputs[1:])
        if len(constants) == len(inputs):
            with jax.ensure_compile_time_eval():
                values = evaluate(eqn, [a.value for a in constants])
            return [self.constant(value) for value in values]
        if name == "cond":
            raise ValueError(
                f"{self.here}: a branch on x (cond): it can jump, so there is no bound. "
                "Close over what decides the branch, as a constant."
            )
        if name == "scan":
            return self.scan(eqn, inputs)
        if name == "while":
            return self.while_loop(eqn, inputs)
        return [
            self.emit(name, inputs, eqn.params, out.aval.shape, out.aval.dtype, self.here,
                      eqn.primitive, i)
            for i, out in enumerate(eqn.outvars)
        ]  # fmt: skip

    def scan(self, eqn, inputs: list[Value]) -> list[Value]:
        n_consts, n_carry = scan_counts(eqn)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carry = inputs[:n_consts], inputs[n_consts : n_consts + n_carry]
        xs = inputs[n_consts + n_carry :]
        size = length * _size(body.jaxpr)
        if size > self.budget:
            return self.long_scan(eqn, consts, list(carry), xs)
        self.budget -= size
        steps = range(length)[::-1] if eqn.params["reverse"] else range(length)
        stacked: list[list[Value]] = []
        for i in steps:
            outputs = self.program(body, [*consts, *carry, *(self._step(x, i) for x in xs)])
            carry = outputs[:n_carry]
            stacked.append(outputs[n_carry:])
        if eqn.params["reverse"]:
            stacked.reverse()
        line = self.here
        ys = [self._stack(values, out.aval, line)
              for values, out in zip(zip(*stacked, strict=True), eqn.outvars[n_carry:],
                                     strict=True)]  # fmt: skip
        return [*carry, *ys]

    def long_scan(self, eqn, consts, carry: list[Value], xs) -> list[Value]:
        """Outputs of a loop that is bounded step by step: operations "loop" of what enters it.

        Each step is a program of two vectors, the varying part of its carry and all else that
        depends on x. Steps that do the same have the same operations as outputs.
        """
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        if length > _LONGEST:
            raise ValueError(f"{self.here}: a scan of {length} steps; at most {_LONGEST}.")
        order = range(length)[::-1] if eqn.params["reverse"] else range(length)
        varying = [isinstance(c, Operation) for c in carry]
        rest = [a for a in (*consts, *xs) if isinstance(a, Operation)]
        n_consts = len(consts)
        while True:
            state, bodies = list(carry), []
            avals = [var.aval for var in body.jaxpr.invars]
            inner = avals[n_consts : n_consts + len(carry)]
            c, parts = self._vector("carry", inner, varying)
            others = [isinstance(a, Operation) for a in (*consts, *xs)]
            r, given = self._vector("rest", [*avals[:n_consts], *avals[n_consts + len(carry) :]],
                                    others)  # fmt: skip
            for i in order:
                fixed = [
                    *consts,
                    *(x if isinstance(x, Operation) else self._step(x, i) for x in xs),
                ]
                values = [f if g is None else g for g, f in zip(given, fixed, strict=True)]
                now = [x if p is None else p for p, x in zip(parts, state, strict=True)]
                out = self.program(body, [*values[:n_consts], *now, *values[n_consts:]])
                state = out[: len(carry)]
                bodies.append(out)
                grown = [v or isinstance(x, Operation) for v, x in zip(varying, state, strict=True)]
                if grown != varying:
                    break
            else:
                break
            varying = grown
        steps = tuple(
            (
                tuple(
                    x for x, v in zip(out, varying, strict=False) if v and isinstance(x, Operation)
                ),
                tuple(x for x in out[len(carry) :] if isinstance(x, Operation)),
            )
            for out in bodies
        )
        starts = [x for x, v in zip(carry, varying, strict=True) if v and isinstance(x, Operation)]
        loop = {"steps": steps, "carry": c, "rest": r, "starts": len(starts),
                "real": all(is_real(y) for out in bodies for y in out)}  # fmt: skip
        outputs: list[Value] = []
        for i, var in enumerate(eqn.outvars):
            if i < len(carry) and not varying[i]:
                outputs.append(state[i])
                continue
            ys = [out[i] for out in bodies]
            if i >= len(carry) and all(isinstance(y, Constant) for y in ys):
                ys = ys[::-1] if eqn.params["reverse"] else ys
                outputs.append(self._stack(ys, var.aval, self.here))
                continue
            params = {**loop, "is_carry": i < len(carry)}
            outputs.append(self.operation("loop", [*starts, *rest], params, var.aval.shape,
                                          var.aval.dtype, self.here, out=i))  # fmt: skip
        return outputs

    def _vector(self, name: str, avals, wanted) -> tuple[Operation, list[Value | None]]:
        """(a variable that holds all wanted arrays, these as parts of it)."""
        avals = [aval if w else None for aval, w in zip(avals, wanted, strict=True)]
        total = sum(a.size for a in avals if a is not None)
        dtype = next((a.dtype for a in avals if a is not None), np.dtype(np.float32))
        whole = Operation("x", (), {}, (total,), dtype, self.here)
        parts, at = [], 0
        for aval in avals:
            if aval is None:
                parts.append(None)
                continue
            row = self.like("slice", whole, shape=(aval.size,), start_indices=(at,),
                            limit_indices=(at + aval.size,), strides=None)  # fmt: skip
            parts.append(self._reshaped(row, aval.shape))
            at += aval.size
        return whole, parts

    def _step(self, x: Value, i: int) -> Value:
        """x[i]."""
        if isinstance(x, Constant):
            return self.constant(x.value[i])
        starts = (i, *(0 for _ in x.shape[1:]))
        params = {"start_indices": starts, "limit_indices": (i + 1, *x.shape[1:]), "strides": None}
        row = self.like("slice", x, shape=(1, *x.shape[1:]), **params)
        return self._reshaped(row, x.shape[1:])

    def _reshaped(self, x: Value, shape) -> Value:
        if isinstance(x, Constant):
            return self.constant(np.asarray(x.value).reshape(shape))
        params = {"new_sizes": tuple(shape), "dimensions": None, "sharding": None}
        return self.like("reshape", x, shape=shape, **params)

    def _stack(self, values: Sequence[Value], aval, line: str) -> Value:
        if all(isinstance(value, Constant) for value in values):
            return self.constant(np.stack([np.asarray(value.value) for value in values]))  # type: ignore
        rows = [self._reshaped(value, (1, *aval.shape[1:])) for value in values]
        if len(rows) == 1:
            return rows[0]
        params = {"dimension": 0}
        concatenate = jax.lax.concatenate_p
        return self.emit("concatenate", rows, params, aval.shape, aval.dtype, line, concatenate)

    def while_loop(self, eqn, inputs: list[Value]) -> list[Value]:
        params = eqn.params
        n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
        cond_consts, body_consts = inputs[:n_cond], inputs[n_cond : n_cond + n_body]
        carry = list(inputs[n_cond + n_body :])
        while True:
            (going,) = self.program(params["cond_jaxpr"], [*cond_consts, *carry])
            if not isinstance(going, Constant):
                raise ValueError(
                    f"{self.here}: a loop whose end depends on x (while): it can jump, so there "
                    "is no bound. Fix the number of steps."
                )
            if not bool(np.asarray(going.value)):
                return carry
            self.budget -= _size(params["body_jaxpr"].jaxpr)
            if self.budget < 0:
                raise ValueError(
                    f"{self.here}: a loop (while) of more than {UNROLLED} equations unrolled: "
                    "write it as lax.scan or lax.fori_loop with a constant number of steps."
                )
            carry = self.program(params["body_jaxpr"], [*body_consts, *carry])


def where(eqn) -> str:
    """file:line of an equation: the innermost line outside of JAX, and of packages if there is
    one."""
    trace = eqn.source_info.traceback
    return "?" if trace is None else _line(trace.as_python_traceback())


def _line(trace: TracebackType | None) -> str:
    frames = traceback.extract_tb(trace)[::-1]
    own = [f for f in frames if not any(part in f.filename for part in _ELSEWHERE)]
    frame = next((f for f in own if "site-packages" not in f.filename), own[0] if own else None)
    if frame is None:
        return "?"
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


_ELSEWHERE: list[str] = [str(module.__file__).removesuffix("__init__.py") for module in (jax,)]
_ELSEWHERE.extend(
    __file__.removesuffix("_graph.py") + name
    for name in ("_graph.py", "_lipschitz.py", "_margins.py")
)


def _key(params) -> Any:
    out = []
    for name, value in params.items():
        try:
            hash(value)
        except TypeError:
            value = id(value)
        out.append((name, value))
    return tuple(out)


def _literal(var) -> Any:
    value = np.asarray(var.val)
    return value.astype(var.aval.dtype) if value.dtype != var.aval.dtype else value


def _is_predicate(a: Value) -> bool:
    return isinstance(a, Operation) and a.op in ELEMENTWISE and a.dtype == bool


def _dtype_of(a: Value) -> Any:
    return a.dtype if isinstance(a, Operation) else a.value.dtype


def _are_floats(a, b) -> bool:
    return all(jnp.issubdtype(d, jnp.floating) for d in (a, b))


def _representative(a: Value) -> float:
    """A constant's one number; 0 for any real one; NaN where there is none."""
    number = a.uniform() if isinstance(a, Constant) else 0.0 if is_real(a) else None
    return math.nan if number is None else number


_COMPARE = {"lt", "le", "gt", "ge", "eq", "ne"}
# Which case of a select is taken where a comparison with itself, or this, finds a number.
_GUARDS = {"ne": 0, "eq": 1, "is_finite": 1}


def _size(jaxpr) -> int:
    """Equations, those of inner programs included."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = inner_program(eqn)
        total += _size(inner.jaxpr) if inner is not None else 1
    return max(1, total)
