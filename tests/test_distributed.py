"""Two processes over gloo give what one gives: DistributedDataParallel and FSDP2's fully_shard."""

from pathlib import Path

import pytest
import torch

from distributed_worker import make, train
from helpers import assert_same, run_python

WORKER = str(Path(__file__).with_name("distributed_worker.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_processes(wrapper: str, name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "results.pt")
    process = run_python(*TORCHRUN, WORKER, wrapper, name, path, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    assert_same(torch.load(path), train(*make(name)))
