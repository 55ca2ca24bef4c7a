"""Do the tests notice? ``python tests/mutate.py --sample 100 sn_jax/_power.py ...``.

Changes one thing at a time in a copy of the library (a comparison, an operator, a number, a flag, a
condition, a raise) and runs tests on it until one fails. Prints what survived, and the share that
was noticed. A sample is drawn with a seed, since all changes would take a day.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The quickest to fail come first; then what uses the file, or all that use the library.
FIRST = ("core", "silence", "contract", "testing")
THEN = {
    "_power.py": ("norms", "transforms", "jax_ecosystem"),
    "_views.py": ("conv", "convert", "norms", "sharding"),
    "_operator.py": ("product", "programs", "sharding"),
    "_core.py": ("transforms", "package", "jax_ecosystem", "sharding"),
}
ELSE = ("conv", "transforms", "norms", "nnx", "linen", "package", "sharding")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.RShift: ast.LShift,
}  # fmt: skip


def changed(node):
    """Other nodes for this one, each with words for it."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield replaced(node, ops=[COMPARISONS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield replaced(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        yield replaced(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    if isinstance(node, ast.IfExp):
        yield replaced(node, body=node.orelse, orelse=node.body)
    if isinstance(node, ast.If | ast.While):
        yield replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        yield ast.Constant((not value) if isinstance(value, bool) else value + 1)
    if isinstance(node, ast.Raise):
        yield ast.Pass()


def replaced(node, **fields):
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


class Nth(ast.NodeTransformer):
    """Makes the n-th change there is, in the order of a walk."""

    def __init__(self, n):
        self.left, self.done = n, None

    def visit(self, node):
        if isinstance(node, ast.AnnAssign):  # types are not run
            if node.value:
                node.value = self.visit(node.value)
            return node
        if isinstance(node, ast.arg):
            return node
        if isinstance(node, ast.FunctionDef):
            node.body = [self.visit(child) for child in node.body]
            node.args = self.visit(node.args)
            return node
        for other in changed(node):
            if self.left == 0:
                self.done = node, other
            self.left -= 1
            if self.done:
                return ast.copy_location(other, node)
        return node if self.done else self.generic_visit(node)


def changes(path: Path) -> list[tuple[Path, int, str, str]]:
    """(file, line, what is changed, the whole new source) of all changes in it."""
    found, source = [], path.read_text()
    while True:
        tree, nth = ast.parse(source), Nth(len(found))
        tree = nth.visit(tree)
        if nth.done is None:
            return found
        line = nth.done[0].lineno
        before, after = (ast.unparse(ast.fix_missing_locations(x)).split("\n")[0] for x in nth.done)
        ast.fix_missing_locations(tree)
        found.append((path, line, f"{before}  ->  {after}", ast.unparse(tree)))


def fails(source: str, path: Path, workers: int) -> str:
    """The first test that fails with this file, or "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "sn_jax", Path(folder) / "sn_jax")
        (Path(folder) / "sn_jax" / path.name).write_text(source)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
        for names in (FIRST[:1], FIRST[1:], THEN.get(path.name, ELSE)):
            tests = [str(ROOT / "tests" / f"test_{name}.py") for name in names]
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n",
                       str(workers), "--no-header", "--tb=no", *tests]  # fmt: skip
            try:
                done = subprocess.run(
                    command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1800
                )
            except subprocess.TimeoutExpired:
                return "no end"
            if done.returncode:
                lines = done.stdout.splitlines()
                failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                return failed[0].split(" - ")[0] if failed else f"exit code {done.returncode}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    found = [change for path in options.files for change in changes(path)]
    sample = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    print(f"{len(found)} changes, of which {len(sample)} are tried", flush=True)
    survived = 0
    for i, (path, line, what, source) in enumerate(sample, 1):
        start, test = time.monotonic(), fails(source, path, options.workers)
        survived += not test
        word = f"noticed by {test}" if test else "SURVIVED"
        print(f"{i} {path.name}:{line} {what}\n    {word} ({time.monotonic() - start:.0f} s)",
              flush=True)  # fmt: skip
    print(f"{len(sample) - survived} of {len(sample)} noticed")


if __name__ == "__main__":
    main()
