"""``python -m experiments.gan``: train an SN-GAN on real images, and measure its samples."""

import dataclasses
import shlex
import sys

from experiments import processes
from experiments.cli import UserError, parse
from experiments.gan import fid
from experiments.gan.loop import Paused
from experiments.gan.run import open_folder, real_images, report, run
from experiments.gan.train import PRESETS, Config


def main(args: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can put right, 130 after Ctrl-C."""
    args = sys.argv[1:] if args is None else args
    resume = [] if "--resume" in args else ["--resume"]
    again = shlex.join(["python", "-m", "experiments.gan", *args, *resume])
    try:
        config = options(args)
        processes.start()
        processes.agree(config.identity() | {"mesh": config.mesh, "out": str(config.out)})
        # Before a folder is made: what is wrong with them leaves none.
        fid.check(config, real_images(config).train)
        # One opens it, and the others find it opened.
        summary = open_folder(config) if processes.is_first() else None
        if not processes.anywhere(summary is not None):
            summary = run(config)
        if processes.is_first():
            print(report(config, summary))
        return 0
    except UserError as error:
        if processes.is_first():
            print(f"error: {error}", file=sys.stderr)
        return processes.leave(2)
    except Paused as pause:
        print(f"Paused: {pause}; continue with: {again}")
        return 0
    except KeyboardInterrupt as interrupt:
        what = str(interrupt) or "what was saved is kept"
        print(f"Interrupted: {what}; continue with: {again}", file=sys.stderr)
        return 130


def options(args: list[str]) -> Config:
    """What is given, on top of the preset that is given, if any."""
    prog = "python -m experiments.gan"
    given = parse(Config, prog, args)
    if given.preset == "demo":
        return given
    preset = dataclasses.replace(Config(), **PRESETS[given.preset])
    return parse(Config, prog, args, default=preset)


if __name__ == "__main__":
    sys.exit(main())
