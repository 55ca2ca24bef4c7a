"""Names that JAX and Flax do not promise: each that is used, with its reason; a new one fails.

Found in the source: imports from inside of packages, attributes with an underscore, modules that
JAX calls unstable, and names on ``INTERNAL``, attributes without an underscore that only the
frameworks' own code reads.
"""

import ast
import importlib.util
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "sn_jax"

# Whose names, directly below them, are public.
PUBLIC = {
    "chex", "flax", "flax.core", "flax.linen", "flax.linen.initializers", "flax.nnx",
    "flax.serialization", "flax.traverse_util", "jax", "jax.dtypes", "jax.export", "jax.lax",
    "jax.lax.linalg", "jax.nn", "jax.numpy", "jax.numpy.linalg", "jax.random", "jax.sharding",
    "jax.tree", "jax.tree_util", "optax", "optax.contrib",
}  # fmt: skip
INTERNAL = {"scope", "trace_level", "vma", "manual_axis_type", "eqns", "invars", "outvars",
            "constvars", "primitive"}  # fmt: skip

REASONS = {
    # JAX, documented, but without its promise of stability (jax.extend, jax.interpreters,
    # jax.core).
    "jax.core.Tracer": "whether a number can be looked at now, or comes with the compiled program",
    "jax.errors.TracerArrayConversionError": "a center of a ball that is traced has no values yet",
    "jax.errors.ConcretizationTypeError": "Python's own if on x, told in words of its user",
    "jax.core.eval_jaxpr": "runs the program that power_iteration traced",
    "jax.extend.core.ClosedJaxpr": "programs inside a program: of jit, scan and others",
    "jax.extend.core.Jaxpr": "the program of a model, walked to see how it uses its parameters",
    "jax.extend.core.Literal": "constants in a program: no parameter, and compared by value",
    "jax.extend.core.Primitive": "the tag at each kernel, with a batching rule of its own",
    "jax.interpreters.ad": "rules of the tag",
    "jax.interpreters.batching": "rules of the tag",
    "jax.interpreters.mlir": "rules of the tag",
    "jax.interpreters.ad.primitive_jvps": "the tag's derivative is that of an identity",
    "jax.interpreters.batching.primitive_batchers": "the tag notes the axes that vmap adds",
    "jax.interpreters.mlir.register_lowering": "the tag may stay in a program that jit caches",
    ".eqns": "the equations of a program, in the two walks over one",
    ".invars": "inputs of a program and of its equations",
    ".outvars": "outputs of these",
    ".constvars": "what power_iteration's function closes over",
    ".primitive": "what an equation does",
    # JAX, by version.
    ".vma": "the mesh axes along which a value inside shard_map varies: its name in JAX 0.9",
    ".manual_axis_type": "its name from JAX 0.10 on",
    # Flax.
    "flax.core.meta": "Flax's metadata around arrays; nn.meta is the same module",
    "flax.core.meta.AxisMetadata": "boxes of partitioned parameters",
    "flax.core.meta.unbox": "the arrays in them",
    "flax.linen.linear.ConvLocal": "has no view, and nn.ConvLocal may be shadowed",
    "flax.linen.recurrent.DenseParams": "the input kernels of OptimizedLSTMCell",
    "flax.linen.dtypes.promote_dtype": "whether a layer promotes as Flax does: our hook goes there",
    "flax.nnx.nn.dtypes.promote_dtype": "the same",
    "flax.linen.module": "the two stacks below",
    "flax.linen.module._global_interceptor_stack": "users' interceptors see each layer once",
    "flax.linen.module._context": "and so do captured intermediates",
    "._global_interceptor_stack": "as above",
    "._context": "as above",
    "flax.nnx.graph.register_pytree_node_type": "our state loads that of flax.nnx.SpectralNorm",
    ".scope": "the layer's own scope: its trace level, its random streams",
    ".trace_level": "whether a layer runs inside another trace, where an array from outside leaks",
}


def dotted(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """``jnp.linalg.norm`` -> ``jax.numpy.linalg.norm``; None where the root is no import."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute):
        root = dotted(node.value, aliases)
        return root and f"{root}.{node.attr}"
    return None


def is_promised(name: str) -> bool:
    """Whether it is public: directly below a module of PUBLIC, and no other module itself."""
    parts = name.split(".")
    if parts[0] not in PUBLIC:
        return True
    prefixes = [".".join(parts[: n + 1]) for n in range(len(parts))]
    below = next((prefix for prefix in prefixes if prefix not in PUBLIC), None)
    if any(part.startswith("_") for part in parts):
        return False
    return below is None or find_spec(below) is None


def find_spec(name: str):
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # below a class or function
        return None


def is_private(attribute: str) -> bool:
    public = attribute.endswith("__") or attribute in ("_replace", "_asdict", "_fields")
    return attribute.startswith("_") and not public


def names_in(tree: ast.AST) -> set[str]:
    """Dotted names of imports and of what is used of them; other attributes after a dot."""
    names, aliases = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name if alias.asname else alias.name.partition(".")[0]
                aliases[alias.asname or root] = root
                names.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                names.add(f"{node.module}.{alias.name}")
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node, aliases)
            if name and id(node) not in inner:
                names.add(name)
            names.add(f".{node.attr}")
    return names


def own_names(tree: ast.AST) -> set[str]:
    """Of functions, classes, variables and attributes that are defined here."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def without_promise(sources: dict[str, str]) -> set[str]:
    """Of module name -> source."""
    trees = {name: ast.parse(text) for name, text in sources.items()}
    own = set(trees).union(*map(own_names, trees.values()))
    names = set().union(*map(names_in, trees.values()))
    attributes = {name[1:] for name in names if name.startswith(".")}
    private = {name for name in attributes if is_private(name) and name not in own}
    found = {name for name in names if not name.startswith(".") and not is_promised(name)}
    return found | {f".{name}" for name in private | (attributes & INTERNAL)}


def test_every_private_name_has_a_reason():
    names = without_promise({path.stem: path.read_text() for path in SOURCE.glob("*.py")})
    new = sorted(names - REASONS.keys())
    assert not new, f"not promised by JAX or Flax: do without, or say in REASONS why: {new}"
    gone = sorted(REASONS.keys() - names)
    assert not gone, f"no longer used: {gone}"


def test_new_ones_are_seen():
    text = """
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.module import _context
from jax._src import core
def f(layer): return jnp.linalg.norm(layer.scope), layer._state, nn.module.x, jax.core.trace, self.x
"""
    assert without_promise({"new": text}) == {
        "flax.linen.module._context", "jax._src.core", ".scope", "._state", "flax.linen.module.x",
        "jax.core.trace",
    }  # fmt: skip
