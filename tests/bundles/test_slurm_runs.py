"""Two machines of a SLURM job, stood in for by two processes: SLURM's variables on each, and loopback."""

import importlib.util
import socket
from pathlib import Path

import pytest

from tests.bundles.conftest import TINY, assert_same_weights

pytestmark = pytest.mark.two_ranks

# what sbatch sets for its script, which runs on the first machine
BATCH = {
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "localhost",
}
BATCH |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN = """
import os, runpy, sys

tasks = []
for task in range(2):
    tasks.append(os.fork())
    if tasks[-1] == 0:
        os.environ |= {"SLURM_PROCID": str(task), "SLURM_STEP_NUM_TASKS": "2"}
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        sys.exit(0)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(task, 0)[1]) for task in tasks))
"""


def free_port(first: int, last: int) -> int:
    """Return a port of a range that nobody listens on."""
    for port in range(first, last):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")


@pytest.fixture(scope="module")
def folder_of(training_runs, python_m, tmp_path_factory):
    """Return the folder of a tiny run that words before its command and variables start."""
    runs = training_runs("dale_ct_2s", TINY | {"max_steps": 4, "warmup_steps": 1})

    def run(*launcher: str, batch_size: int, job: str = "70000") -> Path:
        folder = tmp_path_factory.mktemp("run")
        (folder / "srun.py").write_text(SRUN)
        module, *words = runs.command(folder / "out", batch_size=batch_size)
        if "torch.distributed.run" in launcher:  # whose ranks are forks as well
            launcher = (*launcher, "--start-method=fork", "--run-path")
            module = importlib.util.find_spec(f"{module}.__main__").origin
        result = python_m([*launcher, module, *words], folder, **BATCH, SLURM_JOB_ID=job)
        assert result.returncode == 0, result.stderr[-3000:]
        return folder / "out"

    return run


@pytest.fixture(scope="module")
def alone(folder_of) -> Path:
    """One process in a batch script, which waits for no other."""
    return folder_of(batch_size=4)


def test_srun_starts_a_torchrun_on_each_machine(folder_of, alone):
    port = free_port(29500, 30000)
    where = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{port}", "--local_addr", "localhost")
    nodes = ("--nnodes", "2", "--nproc_per_node", "2", *where)
    assert_same_weights(
        folder_of("srun", "torch.distributed.run", *nodes, batch_size=1), alone, rtol=1e-3, atol=2e-5
    )


def test_srun_starts_the_ranks_themselves(folder_of, alone):
    port = free_port(15001, 25000)  # Ignite makes it of the job's number
    assert_same_weights(
        folder_of("srun", batch_size=2, job=f"7{port - 15000:04d}"), alone, rtol=1e-3, atol=2e-5
    )
