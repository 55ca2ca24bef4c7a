"""``python -m sn_jax inspect FILE_OR_FOLDER``: the spectra of any checkpoint, from the shell."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from sn_jax import _inspect
from sn_jax._readers import CheckpointError, Leaf, opened


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2 for what the user can put right; 130 after Ctrl-C."""
    options = _parser().parse_args(args)
    try:
        rules = _inspect.parsed_rules(options.view)
        with opened(options.checkpoint) as (kind, leaves):
            weights, totals = _inspect.looked_at(
                leaves, rules, certify=options.certify, largest_side=options.largest_side,
                progress=_bar if options.progress else lambda x: x,
            )  # fmt: skip
        weights = _inspect.sorted_weights(weights, options.sort)
        show = _inspect.as_json if options.json else _inspect.table
        print(show(weights, totals, kind))
        if options.plot:
            _inspect.save_picture(options.plot, weights)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m sn_jax", description="Tools of sn_jax.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="norms and spectra of all weights in a checkpoint",
        description="Norms and spectra of all weights in a checkpoint: orbax, msgpack of Flax, "
        "safetensors, torch (weights alone), npz. Nothing in it is executed.",
    )
    add = inspect.add_argument
    add("checkpoint", type=Path, help="a file, or a folder of orbax or of shards")
    add(
        "--view", action="append", default=[], metavar="REGEX=VIEW",
        help="how weights act whose names do not say it, or None to leave them out; first match "
        "wins: '.*conv.*=Matrix((1, 2, 3), 0)'",
    )  # fmt: skip
    add("--certify", action="store_true", help="a bracket of every norm that is proved")
    add(
        "--largest-side", type=int, default=2048, metavar="N",
        help="no more than N singular values are found at once; of larger matrices the norm and "
        "the stable rank alone (default: %(default)s)",
    )  # fmt: skip
    add("--sort", choices=_inspect.COLUMNS, default="path", help="numbers: the largest first")
    add("--json", action="store_true", help="for programs, with all singular values")
    add("--plot", type=Path, metavar="FILE", help="a picture of the spectra")
    add("--no-progress", dest="progress", action="store_false", help="no progress bar")
    return parser


def _bar(leaves: Iterable[Leaf]) -> Iterable[Leaf]:
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return leaves
    return tqdm(leaves, "inspect", unit="array")


if __name__ == "__main__":
    sys.exit(main())
