"""``python -m experiments.gan``: train an SN-GAN on real images, and measure its samples."""

import dataclasses
import shlex
import sys

from experiments import processes
from experiments.cli import UserError, command, parse
from experiments.gan import fid
from experiments.gan.loop import Paused
from experiments.gan.run import open_folder, real_images, report, run
from experiments.gan.train import PRESETS, Config

PROG = "python -m experiments.gan"


def main(args: list[str] | None = None) -> int:
    """Returns the exit code of ``cli.command``."""
    args = sys.argv[1:] if args is None else args
    resume = [] if "--resume" in args else ["--resume"]
    again = f"continue with: {shlex.join([*PROG.split(), *args, *resume])}"

    def together(config: Config) -> None:
        try:
            processes.start()
            train(config)
        except UserError:
            if not processes.is_first():  # all find the same, and the first one says it
                processes.leave(2)
            raise
        except Paused as pause:
            print(f"Paused: {pause}; {again}")
        except KeyboardInterrupt as interrupt:
            what = str(interrupt) or "what was saved is kept"
            raise KeyboardInterrupt(f"{what}; {again}") from None

    code = command(options, PROG, args, together)
    return processes.leave(code) if code == 2 else code


def train(config: Config) -> None:
    """The run that these options ask for, unless it is there already, and what it comes to."""
    processes.agree(config.identity() | {"mesh": config.mesh, "out": str(config.out)})
    # Before a folder is made: what is wrong with them leaves none.
    fid.check(config, real_images(config).train)
    # One opens it, and the others find it opened.
    summary = open_folder(config) if processes.is_first() else None
    if not processes.anywhere(summary is not None):
        summary = run(config)
    if processes.is_first():
        print(report(config, summary))


def options(args: list[str]) -> Config:
    """What is given, on top of the preset that is given, if any."""
    given = parse(Config, PROG, args)
    if given.preset == "demo":
        return given
    preset = dataclasses.replace(Config(), **PRESETS[given.preset])
    return parse(Config, PROG, args, default=preset)


if __name__ == "__main__":
    sys.exit(main())
