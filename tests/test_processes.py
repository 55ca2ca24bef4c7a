"""A GAN trained data-parallel by several processes on this machine, and what can befall them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from gan_processes import images, options
from kills import KILL_SEED, moments

from experiments import processes
from experiments.cli import UserError
from experiments.gan import loop
from experiments.gan.place import Place
from experiments.gan.train import Config

WORKER = Path(__file__).parent / "gan_processes.py"
LAST = 14  # saved at every second step
pytestmark = pytest.mark.xdist_group("processes")


def start(monkeypatch, out, count, mesh="-", seeds=None, steps=LAST):
    """Processes, and the files of what they say."""
    seeds = seeds or [0] * count
    root = WORKER.parent.parent
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("JAX_ENABLE_X64", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        # What one run has compiled, the next ones find.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(out.parent / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        commands = [
            [sys.executable, str(WORKER), str(out), mesh, str(seed), str(steps)] for seed in seeds
        ]
        paths = [out.parent / f"{out.name}.{i}" for i in range(count)]
        with ExitStack() as files:
            said = [files.enter_context(path.open("w")) for path in paths]
            return processes.spawn(commands, said), paths


def finish(started):
    """Exit codes, and what each said."""
    running, paths = started
    try:
        codes = [process.wait(timeout=3000) for process in running]
    finally:
        processes.stop(running)
    return codes, [path.read_text() for path in paths]


def succeed(started):
    codes, texts = finish(started)
    assert not any(codes), "\n".join(texts)


def saved(out, step=LAST):
    folder = (out / "checkpoints" / str(step) / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return jax.tree_util.tree_leaves_with_path(checkpointer.restore(folder, args=args))


def differences(a, b):
    """Path -> largest difference of two checkpoints' leaves."""
    assert [path for path, _ in a] == [path for path, _ in b]
    return {
        jax.tree_util.keystr(path): float(np.max(np.abs(np.asarray(x, np.float64) - y), initial=0))
        for (path, x), (_, y) in zip(a, b, strict=True)
    }


SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
         "SLURM_LOCALID": "0"}  # fmt: skip


def test_a_scheduler_that_jax_knows_names_the_processes(monkeypatch):
    """Here by the variables that SLURM sets for each task."""
    program = "from experiments import processes; processes.start(); processes.wait('here'); " \
              "import jax; print(jax.process_index(), jax.process_count())"  # fmt: skip
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(WORKER.parent.parent))
    started = []
    for index in range(2):
        monkeypatch.setenv("SLURM_PROCID", str(index))
        command = [sys.executable, "-c", program]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[0].splitlines()[-1] for process in started]
    assert said == ["0 2", "1 2"]


def alone(out):
    """The same training in this process."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loop.train(options(out, steps=LAST), images(), 10)


def continued(runs, out, step, of):
    shutil.copytree(runs / of / "checkpoints" / str(step), out / "checkpoints" / str(step))


def kill_one(monkeypatch, out):
    """Two processes of which one is killed; returns the step of their earliest checkpoint."""
    rng = moments("processes")
    last, delay = rng.choice([4, 6]), rng.uniform(0, 0.25)  # within a step, or while it saves
    running, paths = start(monkeypatch, out, 2)
    deadline = time.monotonic() + 3000
    while not (out / "checkpoints" / str(last)).exists() and time.monotonic() < deadline:
        said = "\n".join(path.read_text() for path in paths)
        assert all(process.poll() is None for process in running), said
        time.sleep(0.01)
    time.sleep(delay)
    running[1].kill()
    # The other one waits for it, or dies of it; the launcher would stop it.
    processes.stop(running)
    steps = sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())
    assert steps[-1] < LAST, f"killed too late, after {last} (KILL_SEED={KILL_SEED})"
    return steps[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One by two processes that nothing befalls, one of which one is killed, gone on with by two,
    and one that was begun by two, gone on with by one. A minute and a half of CPU time."""
    folder = tmp_path_factory.mktemp("runs")
    monkeypatch = pytest.MonkeyPatch()
    step = kill_one(monkeypatch, folder / "killed")
    continued(folder, folder / "begun", step, "killed")
    continued(folder, folder / "one", step, "killed")
    for name in ("killed", "two"):
        succeed(start(monkeypatch, folder / name, 2))
    alone(folder / "one")
    return folder


@pytest.mark.slow
def test_two_processes_are_one(runs):
    worst = differences(saved(runs / "one"), saved(runs / "two"))
    assert max(worst.values()) < 1e-8, (KILL_SEED, worst)
    # float64 indeed, and trained: the checkpoint before differs.
    assert max(differences(saved(runs / "two"), saved(runs / "two", LAST - 2)).values()) > 1e-4
    rows = [json.loads(line) for line in (runs / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, LAST]  # written once


@pytest.mark.slow
def test_a_killed_process_and_a_restart_change_nothing(runs):
    worst = differences(saved(runs / "killed"), saved(runs / "two"))
    assert max(worst.values()) == 0, (KILL_SEED, worst)


@pytest.mark.slow
def test_four_processes_on_another_mesh_go_on_from_two(runs, monkeypatch):
    out = runs / "four"
    continued(runs, out, LAST - 2, "two")
    succeed(start(monkeypatch, out, 4, mesh="data=2,model=2"))
    worst = differences(saved(out), saved(runs / "one"))
    assert max(worst.values()) < 1e-8, worst


@pytest.mark.slow
def test_a_checkpoint_without_one_of_its_files(runs, tmp_path):
    out = tmp_path / "missing"
    shutil.copytree(runs / "begun", out)
    (folder,) = (out / "checkpoints").iterdir()
    shard = max((folder / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    shard.unlink()
    with pytest.raises(UserError, match=re.escape(f"{shard.name} is damaged: move {folder} ")):
        alone(out)


def test_processes_that_disagree(tmp_path, monkeypatch):
    codes, texts = finish(start(monkeypatch, tmp_path / "out", 2, seeds=[0, 1]))
    assert codes == [1, 1]
    for text in texts:
        assert "different options (seed is 0 in process 0 and 1 in process 1)" in text
    assert not (tmp_path / "out").exists()


def test_the_launcher_ends_what_others_wait_for(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, signal, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-m", "experiments.processes", "3", "dies"]
    env = os.environ | {"PYTHONPATH": f"{WORKER.parent.parent}{os.pathsep}{tmp_path}"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "process 1 was ended by signal 9; the other 2 were stopped" in result.stderr


def test_usage(capsys, monkeypatch):
    assert processes.main(["experiments.gan"]) == 2
    assert "give a number of processes and a module" in capsys.readouterr().err
    monkeypatch.setenv(processes.ADDRESS, "127.0.0.1:1")
    monkeypatch.delenv(processes.INDEX, raising=False)
    with pytest.raises(UserError, match="give all three, or none"):
        processes.start()


def test_a_batch_that_the_mesh_does_not_divide(monkeypatch):
    class Mesh:
        shape = {"data": 3, "model": 1}  # noqa: RUF012

    monkeypatch.setattr("experiments.gan.place.make_mesh", lambda *_: Mesh())
    with pytest.raises(UserError, match="splits a batch of 64 into 3, which does not divide it"):
        Place(Config(mesh="data=3"))
