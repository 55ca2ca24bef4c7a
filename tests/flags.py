"""How XLA compiles for the tests. No JAX here: it is to be set before that is imported."""

from mmap import ACCESS_READ, mmap
from pathlib import Path

import jaxlib


def quick_flags() -> str:
    """XLA_FLAGS for compiling small programs, most of the suite's time, several times faster."""
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    # The older emitters: half of the gain. Only where XLA has both: it ends at an unknown flag. The
    # zeros are those of a flag's name; names of fields that were removed are there without.
    name = "xla_cpu_use_fusion_emitters"
    for library in Path(jaxlib.__file__).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as code:
            if code.find(f"\0{name}\0".encode()) >= 0:
                flags.append(f"--{name}=false")
    return " ".join(flags)
