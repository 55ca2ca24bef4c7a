"""The package as a whole: layering, lightness, documentation."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from flax import linen as nn

import sn_jax

ROOT = Path(__file__).parent.parent
MODULES = sorted(path.stem for path in (ROOT / "sn_jax").glob("*.py"))
# The rooms, from the ground up: each imports from lower floors only.
FLOORS = [
    {"_mesh", "_intervals", "_numbers", "_readers"},
    {"_views", "_functions", "_scalar"},
    {"_operator", "_serial", "_symbols", "_trace", "_nnx", "_jets"},
    {"_rules", "_power", "_banded", "_matrix_free", "_ellipsoid", "_fronts", "_slopes"},
    {"_bounds", "_certified", "_norms", "_pieces", "_tight", "_cuts"},
    {"_core", "_patterns", "_balls", "_operation_norms", "_convolutions"},
    {"_sources", "_caps", "_spectra"},
    {"_flax", "_inspect", "transforms", "convert", "testing", "_graph", "_torus"},
    {"_linen_layers", "_nnx_layers", "_lipschitz", "_regions"},
    {"_attack", "_margins"},
    {"linen", "nnx"},
    {"__init__", "__main__"},
]
PUBLIC_MODULES = ["sn_jax", *(f"sn_jax.{name}" for name in MODULES if not name.startswith("_"))]


def public_things():
    """Dotted name -> class, function, method or property, by ``__all__`` of the public modules.

    Type aliases have no docstring. Methods that a view implements are documented on ``View``.
    """
    things = {}
    for module in PUBLIC_MODULES:
        namespace = importlib.import_module(module)
        for name in namespace.__all__:
            thing = getattr(namespace, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            things[f"{module}.{name}"] = thing
            for key, member in vars(thing).items() if inspect.isclass(thing) else ():
                if key.startswith("_") and key != "__call__":
                    continue
                if key in vars(sn_jax.View) and thing is not sn_jax.View:
                    continue
                if inspect.isfunction(member) or isinstance(member, property):
                    things[f"{module}.{name}.{key}"] = member
    return things


PUBLIC = public_things()


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_layers(module):
    (floor,) = (i for i, rooms in enumerate(FLOORS) if module in rooms)
    ours = {name.split(".")[1] for name in imports(ROOT / "sn_jax" / f"{module}.py")
            if name.startswith("sn_jax.")}  # fmt: skip
    assert ours & {*MODULES} <= set().union(*FLOORS[:floor])


def test_the_functional_api_knows_no_mesh():
    code = ast.unparse(ast.parse((ROOT / "sn_jax" / "_core.py").read_text()))
    without_docstrings = re.sub(r'""".*?"""', "", code, flags=re.DOTALL)
    assert not re.search("shard|mesh[.]|explicit|vma|psum|pcast", without_docstrings)


# Rooms with no public name of their own, and the test of each.
ROOMS_TESTED_ALONE = {
    "fuzz_slopes.py": {"_scalar", "_slopes"},
    "test_certified.py": {"_certified"},
    "test_convolutions.py": {"_graph", "_lipschitz"},
    "test_lipschitz.py": {"_graph", "_lipschitz", "_matrix_free"},
    "test_numbers.py": {"_graph"},
    "test_pieces.py": {"_graph", "_pieces"},
    "test_slopes.py": {"_functions", "_jets", "_scalar", "_slopes"},
    "test_torus.py": {"_fronts", "_graph", "_lipschitz", "_torus"},
}


def test_experiments_and_tests_use_public_names_only():
    for folder in ("experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            private = {
                name for name in imports(path) if re.search(r"sn_jax\.(\w+\.)*_(?!_main__)", name)
            }
            private -= {f"sn_jax.{room}" for room in ROOMS_TESTED_ALONE.get(path.name, ())}
            assert not private, f"{path}: {private}"


HEAVY = ("scipy", "chex", "flax", "optax", "torch", "jax.extend")


def loaded_by(*steps: str) -> list[list[str]]:
    """Which heavy modules are there after each piece of code, all in one new process."""
    look = f"print([m for m in {HEAVY} if m in sys.modules])"
    code = "\n".join(["import sys, sn_jax", *(f"{step}\n{look}" for step in steps)])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [ast.literal_eval(line) for line in result.stdout.splitlines()]


def test_import_loads_no_framework():
    """Each step from what the one before has loaded, which the check itself sees."""
    plain, convert, norms, linen = loaded_by(
        "dir(sn_jax); sn_jax.init, sn_jax.Conv((2, 2))",
        "sn_jax.convert.from_torch",
        "sn_jax.norm_bounds",
        "sn_jax.linen.SpectralNorm",
    )
    assert (plain, convert, norms) == ([], [], ["scipy"])
    assert "flax" in linen
    # Submodules resolve by name in either order.
    optax, nnx = loaded_by("sn_jax.transforms.project_spectral_norm", "sn_jax.nnx.SpectralNorm")
    assert "optax" in optax
    assert "flax" not in optax
    assert "flax" in nnx


def test_a_module_may_be_the_first_to_use_it():
    """sn_jax.linen is imported on first use, which may be inside a module that is being made."""
    code = """
import flax.linen as nn, jax, jax.numpy as jnp, sn_jax

class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return sn_jax.linen.SpectralNorm(nn.Dense(2))(x, update_stats=False)

x = jnp.ones((1, 3))
variables = Model().init(jax.random.key(0), x)
assert [*variables["params"]] == ["Dense_0"], variables
Model().apply(variables, x)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_all_is_what_the_package_exports():
    """Type checkers see each name, those that come on first use, too."""
    tree = ast.parse((ROOT / "sn_jax" / "__init__.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                and node.module.startswith("sn_jax")]  # fmt: skip
    exported = {alias.asname for node in imported for alias in node.names}
    assert exported == {*sn_jax.__all__, "convert", "linen", "nnx", "testing", "transforms"}
    assert exported <= {*dir(sn_jax)}
    assert all(hasattr(sn_jax, name) for name in exported)
    assert not hasattr(sn_jax, "norm_bound")


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = PUBLIC[name]
    doc = thing.__doc__
    assert doc, "no docstring"
    doc = inspect.cleandoc(doc)
    first = doc.split("\n")[0]
    assert first.endswith("."), f"one full sentence first: {first!r}"
    if isinstance(thing, property):
        return
    for parameter in own_parameters(thing):
        described = rf"(?m)^ +.*\b{parameter}\b.*:|``[^`]*\b{parameter}\b[^`]*``"
        assert re.search(described, doc), f"{parameter} is not described"
    if "." in thing.__qualname__:  # a method
        return
    sections = {"Example:"}
    if inspect.isfunction(thing):
        sections |= {"Args:", "Raises:"}
        sections |= set() if inspect.signature(thing).return_annotation is None else {"Returns:"}
    missing = {section for section in sections if section not in doc}
    assert not missing


def own_parameters(thing) -> list[str]:
    """Of a function, a method, or the constructor of a class that has one of its own."""
    others = {"self", "_cls"}
    if inspect.isclass(thing):
        made_by = [name for name in ("__new__", "__init__") if name in vars(thing)]
        if not made_by or thing is sn_jax.View:
            return []
        others |= {"parent", "name"} if issubclass(thing, nn.Module) else set()  # Flax's
        thing = getattr(thing, made_by[0])
    return [name for name in inspect.signature(thing).parameters if name not in others]


def test_public_modules_say_what_is_public():
    for module in PUBLIC_MODULES:
        namespace = importlib.import_module(module)
        own = {name for name, thing in vars(namespace).items() if not name.startswith("_")
               and getattr(thing, "__module__", None) == module}  # fmt: skip
        assert own <= {*namespace.__all__}, f"{module}: neither private nor in __all__"


@pytest.mark.float32
@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    module = importlib.import_module("sn_jax" if module == "__init__" else f"sn_jax.{module}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


ATTACKING = ("README.md", "docs/lipschitz.md")
DOCUMENTS = [
    path
    for path in sorted((ROOT / "docs").glob("*.md"))
    # That guide needs eight devices: test_sharding.py runs it.
    if "```python" in path.read_text() and path.name not in ("scale.md", "lipschitz.md")
]


def blocks_of(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


@pytest.mark.float32
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_of_the_documents_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(document)
    assert blocks
    for block in blocks:
        exec(compile(block, str(document), "exec"), {})


def test_documents_as_users_compile_them():
    """They attack networks for seconds, or for a minute as the tests compile."""
    blocks = [block for name in ATTACKING for block in blocks_of(ROOT / name)]
    script = "".join(f"exec({block!r}, {{}})\n" for block in blocks)
    env = os.environ | {"XLA_FLAGS": ""}
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, env=env,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_wheel_contains_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    result = subprocess.run([*build, "-w", str(tmp_path), "."], cwd=source,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = [n for n in ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert "sn_jax/py.typed" in names
    assert all(name.startswith("sn_jax/") for name in names), names
    assert {n for n in names if n.endswith(".py")} == {
        f"sn_jax/{path.name}" for path in (source / "sn_jax").glob("*.py")
    }
