"""PyTorch takes turns: the other end of the pipe to torch_peer.py."""

import importlib.util
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

APIS = {"torch hook": "hook", "torch parametrization": "parametrization"}


class TorchFailed(Exception):
    """What it says in one line."""


class TorchClient:
    """A started server."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.version = self._receive()

    def seconds(self, step: str, api: str) -> float:
        """Of one step, "forward" or "forward + backward", in its process."""
        seconds = self.ask(step, api)
        # OpenMP's threads spin on for some milliseconds, which whoever is next would pay for.
        time.sleep(0.01)
        return seconds

    def ask(self, *message: Any) -> Any:
        """Raises TorchFailed: it cannot do that, or has ended."""
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
            answer = self._receive()
        except (EOFError, BrokenPipeError) as error:
            raise TorchFailed("its process has ended") from error
        if isinstance(answer, tuple) and answer[0] == "failed":
            raise TorchFailed(answer[1])
        return answer

    def _receive(self) -> Any:
        return pickle.load(self._process.stdout)


@contextmanager
def torch_client() -> Iterator[TorchClient | None]:
    """The client; None, and a line on stderr that says why, where there is no torch.

    The interpreter is that of SN_BENCH_TORCH_PYTHON, or this one.
    """
    python = os.environ.get("SN_BENCH_TORCH_PYTHON")
    if python is None and importlib.util.find_spec("torch"):
        python = sys.executable
    if python is None:
        print("no torch here: its rows are left out (name an interpreter that has it by "
              "SN_BENCH_TORCH_PYTHON)", file=sys.stderr)  # fmt: skip
        yield None
        return
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    command = [python, str(Path(__file__).with_name("torch_peer.py")), device]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as error:
        print(f"torch is left out: {python}: {error.strerror}", file=sys.stderr)
        yield None
        return
    with suppress(BrokenPipeError), process:  # it may have ended with a message unread
        try:
            client = TorchClient(process)
        except EOFError:
            print(f"torch is left out: {python} has none that works", file=sys.stderr)
            client = None
        yield client
