"""``python -m experiments.accelerator``: what some minutes of an accelerator are best spent on."""

import sys

from experiments.accelerator import packages


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a stage has failed, 2 for what the user can put right, 130
    after Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    packages.use(args)
    try:
        from experiments.accelerator import command
    except ModuleNotFoundError as error:
        print(
            f"error: the package {error.name} is not installed here: install it, or put "
            f"{packages.NAME}, which --pack writes elsewhere, into --data-dir.",
            file=sys.stderr,
        )
        return 2
    return command.main(args)


if __name__ == "__main__":
    sys.exit(main())
