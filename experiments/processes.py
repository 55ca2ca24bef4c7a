"""Several processes that train as one: ``python -m experiments.processes 4 experiments.gan ...``.

It starts them on this machine, and stops all when one ends badly; on a cluster the scheduler does
that: one that JAX knows (SLURM, Open MPI, Kubernetes, TPU), or any that sets the same three
variables for each. JAX's collectives join them.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.cli import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_MOST = 1 << 16  # bytes of options that are compared


def start() -> None:
    """Join the other processes, if the environment names any; before anything runs on a device.

    Raises:
      UserError: a variable is missing or no number, or they cannot be reached.
    """
    address, here = os.environ.get(ADDRESS), {}
    try:
        if address:
            here = {"num_processes": int(os.environ[COUNT]), "process_id": int(os.environ[INDEX])}
        jax.distributed.initialize(address, **here)
    except (KeyError, ValueError) as error:
        if not address:
            return  # no scheduler that JAX knows
        raise UserError(
            f"{ADDRESS} is set, but {COUNT} and {INDEX} are not both numbers ({error}): give all "
            "three, or none."
        ) from error
    except RuntimeError as error:
        if not address and "before any JAX" in str(error):
            return  # called by a program that already runs, alone
        who = f"Process {here['process_id']} of {here['num_processes']}" if here else "This process"
        where = f" at {address}" if address else ""
        raise UserError(
            f"{who} cannot join the others{where} ({str(error).splitlines()[0]}): start all of "
            "them, with one address."
        ) from error
    # Two programs under way at once could meet their collectives in different orders.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sys.excepthook = _leave_with


def _leave_with(kind, error, trace) -> None:
    traceback.print_exception(kind, error, trace)
    leave(1)


def leave(code: int) -> int:
    """The exit code; one of several processes ends here: at its end it would wait for others that
    may wait for it."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def is_first() -> bool:
    """Whether this is the process that writes files and talks."""
    return jax.process_index() == 0


def agree(options: dict[str, Any]) -> None:
    """Check that all processes were started with the same options.

    Raises:
      UserError: in every process; names the options and the processes.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(options, sort_keys=True, default=str).encode()
    if len(text) > _MOST:
        raise ValueError(f"{len(text)} bytes of options; at most {_MOST} are compared.")
    padded = np.frombuffer(text.ljust(_MOST), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    first, *others = (json.loads(bytes(row)) for row in np.asarray(rows))
    differing = [
        f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {i}"
        for i, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if differing:
        raise UserError(
            f"The processes were started with different options ({'; '.join(differing)}): give "
            "all of them the same."
        )


def anywhere(flag: bool) -> bool:
    """Whether it is raised in any process; all must ask at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def wait(name: str) -> None:
    """For all processes to come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def spawn(commands: Sequence[Sequence[str]], errors: Sequence[Any]) -> list[subprocess.Popen]:
    """Start one process for each command, to join on the loopback interface; ``errors`` is where
    the standard error of each goes, and only the first one's output is shown."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for i, (command, error) in enumerate(zip(commands, errors, strict=True)):
        env = os.environ | {ADDRESS: address, COUNT: str(len(commands)), INDEX: str(i)}
        output = None if i == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=error))
    return processes


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """End those that still run: without one, the others wait for ever."""
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def main(args: list[str] | None = None) -> int:
    """Returns the first exit code that is not 0; 2 for what the user can put right."""
    args = sys.argv[1:] if args is None else args
    if len(args) < 2 or not args[0].isdigit() or args[0] == "0":
        usage = "python -m experiments.processes 4 experiments.gan --out runs/gan"
        print(f"error: give a number of processes and a module: {usage}", file=sys.stderr)
        return 2
    count = int(args[0])
    commands = [[sys.executable, "-m", *args[1:]]] * count
    with tempfile.TemporaryFile("w+") as errors:
        processes = spawn(commands, [None, *[errors] * (count - 1)])
        # Ctrl-C reaches them too: they save and end, and this one waits for that.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            # The first process has most to do, and the last word.
            while processes[0].poll() is None and not any(p.poll() for p in processes):
                time.sleep(0.05)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not any(p.poll() for p in processes):
                if all(p.poll() is not None for p in processes):
                    break
                time.sleep(0.05)
            if any(p.poll() == 2 for p in processes):  # all find the same; the first one says it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    processes[0].wait(5)
        finally:
            ended = [(i, p.poll()) for i, p in enumerate(processes)]
            stop(processes)
            signal.signal(signal.SIGINT, before)
        bad = [(i, code) for i, code in ended if code]
        for i, code in bad[:1]:
            if i and code != 2:
                errors.seek(0)
                sys.stderr.write(errors.read()[-4000:])
            if code < 0:
                print(
                    f"error: process {i} was ended by signal {-code}; the other {count - 1} were "
                    "stopped. The same command with --resume continues.",
                    file=sys.stderr,
                )
        return next((code if code > 0 else 1 for _, code in bad), 0)


if __name__ == "__main__":
    sys.exit(main())
