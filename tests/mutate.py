"""Do the tests notice? ``python tests/mutate.py --sample 100 sn_jax/_power.py ...``.

Changes one thing at a time in a copy of the library (a comparison, an operator, a number, a flag, a
condition, a raise) and runs tests on it until one fails: first those that run the changed line.
Prints what survived, and the share that was noticed. A sample is drawn with a seed, since all
changes would take hours; ``--quick`` leaves it at the tests that run the line, so that what
survives may be noticed by others. Needs ``pip install coverage``.
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

import coverage

ROOT = Path(__file__).parent.parent
# Which of their tests run a line is found out once, by coverage.
TESTS = ("core", "silence", "contract", "testing", "conv", "transforms", "programs", "norms")
# What no single test has noticed is given to all of these.
ALL = (*TESTS, "nnx", "linen", "package", "sharding")
FEW = 40
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


def ran(files: list[Path], keep: Path) -> dict[Path, dict[int, list[str]]]:
    """For every line of the files the tests that ran it, as pytest names them.

    Args:
      files: of the library.
      keep: coverage's data file, used again if it is there.
    """
    if not keep.exists():
        settings = keep.with_suffix(".rc")
        settings.write_text("[run]\ndynamic_context = test_function\n")
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}",
                   f"--data-file={keep}", f"--include={ROOT / 'sn_jax'}/*", "-m", "pytest", "-q",
                   "-p", "no:cacheprovider", *map(test_file, TESTS)]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True)
    data = coverage.CoverageData(str(keep))
    data.read()
    return {
        path: {
            line: sorted(filter(None, map(node, contexts)))
            for line, contexts in data.contexts_by_lineno(str(path.resolve())).items()
        }
        for path in files
    }


def test_file(name: str) -> str:
    return str(ROOT / "tests" / f"test_{name}.py")


def node(context: str) -> str | None:
    """ "test_core.TestX.test_y", as coverage says it, in pytest's words."""
    module, *names = context.split(".")
    file = ROOT / "tests" / f"{module}.py"
    return "::".join([str(file), *names]) if names and file.exists() else None


def fails(source: str, path: Path, tests: list[str], workers: int = 0) -> str:
    """The first test that fails with this file, or "" if none does."""
    if not tests:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "sn_jax", Path(folder) / "sn_jax")
        (Path(folder) / "sn_jax" / path.name).write_text(source)
        env = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(ROOT)])}
        # -P: else the unchanged library in the working directory would be imported.
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                   "-n", str(workers), "--no-header", "--tb=no", *tests]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=3600
            )
        except subprocess.TimeoutExpired:
            return "no end"
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit code {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--coverage", type=Path, default=Path(tempfile.gettempdir(), "sn-mutate"))
    options = parser.parse_args()
    found = [change for path in options.files for change in changes(path)]
    sample = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    print(f"{len(found)} changes, of which {len(sample)} are tried", flush=True)
    lines = ran(options.files, options.coverage)
    survived = 0
    for i, (path, line, what, source) in enumerate(sample, 1):
        start = time.monotonic()
        # A statement of several lines may be known by its first.
        near = [lines[path].get(line - back, []) for back in range(6)]
        few = next(filter(None, near), [])[:FEW]
        noticed = fails(source, path, few)
        if not noticed and not options.quick:
            noticed = fails(source, path, [*map(test_file, ALL)], options.workers)
        survived += not noticed
        word = f"noticed by {noticed}" if noticed else "SURVIVED"
        print(f"{i} {path.name}:{line} {what}\n    {word} ({time.monotonic() - start:.0f} s)",
              flush=True)  # fmt: skip
    print(f"{len(sample) - survived} of {len(sample)} noticed")


if __name__ == "__main__":
    main()
