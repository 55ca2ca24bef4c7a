"""Runs on_eight_devices.py where there are eight: a process's number of devices is fixed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def run_on_devices(command: list[str], devices: int = 8, **kwargs) -> subprocess.CompletedProcess:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("part", ["functional", "not functional"])
def test_on_eight_devices(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", part]
    result = run_on_devices([*command, str(HERE / "on_eight_devices.py")], cwd=HERE.parent)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_guide():
    """The Python blocks of docs/scale.md, one after the other."""
    script = (
        "import re, sys; from pathlib import Path\n"
        "for block in re.findall(r'```python\\n(.*?)```', Path(sys.argv[1]).read_text(), re.S):\n"
        "    exec(compile(block, sys.argv[1], 'exec'), globals())\n"
    )
    guide = HERE.parent / "docs" / "scale.md"
    result = run_on_devices([sys.executable, "-W", "error", "-c", script, str(guide)])
    assert result.returncode == 0, result.stderr
    assert "float32[1,256@tp]" in result.stdout
    assert "differs along the mesh axes ['fsdp', 'tp']" in result.stdout
