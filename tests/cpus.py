"""Runs tests as other processors compute: ``python tests/cpus.py [arguments of pytest]``.

OpenBLAS and XLA are told to take the kernels and instructions of others, one after the other, and
a result may differ in its last digits. What this processor cannot run is said and left out.
"""

import os
import re
import signal
import subprocess
import sys

from flags import quick_flags

SETTINGS = [
    *(("OPENBLAS_CORETYPE", core) for core in ("Haswell", "SkylakeX", "Zen", "Prescott")),
    *(("XLA_FLAGS", f"--xla_cpu_max_isa={isa}") for isa in ("SSE4_2", "AVX2")),
]
# NumPy says which kernels OpenBLAS took, and runs some of them.
PROBE = "import numpy; numpy.linalg.svd(numpy.random.default_rng(0).standard_normal((200, 150)))"


def main(arguments: list[str]) -> int:
    done, failed = {}, []
    for name, value in SETTINGS:
        setting = f"{name}={value}"
        if name == "XLA_FLAGS":
            value = f"{os.environ.get(name, quick_flags())} {value}"
        env = os.environ | {name: value}
        probe = subprocess.run(
            [sys.executable, "-c", PROBE], env=env | {"OPENBLAS_VERBOSE": "2"},
            capture_output=True, text=True,
        )  # fmt: skip
        kernels = " ".join(re.findall("^Core: (.*)", probe.stderr, re.M)) or "unknown"
        if probe.returncode:
            say(f"{setting}: NOT RUN, this processor cannot: {reason(probe)}.")
        elif name == "OPENBLAS_CORETYPE" and kernels in done:
            say(f"{setting}: not run again, its kernels are those of {done[kernels]} here.")
        else:
            say(f"{setting} (OpenBLAS: {kernels})")
            done.setdefault(kernels, setting)
            command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadgroup"]
            if subprocess.run([*command, *arguments], env=env).returncode:
                failed.append(setting)
    say(f"Failed: {', '.join(failed) or 'none'}.")
    return bool(failed)


def reason(probe: subprocess.CompletedProcess) -> str:
    if probe.returncode < 0:
        return signal.Signals(-probe.returncode).name
    return (probe.stderr.splitlines() or ["no reason given"])[-1]


def say(line: str) -> None:
    print(f"== {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
