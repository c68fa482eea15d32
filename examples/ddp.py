"""Trains in two processes: torchrun --nproc-per-node 2 examples/ddp.py."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastrnn

if "RANK" not in os.environ:
    sys.exit("run it by torchrun --nproc-per-node 2 examples/ddp.py")
dist.init_process_group("gloo")
torch.manual_seed(0)
lstm = DistributedDataParallel(fastrnn.LSTM(5, 8, batch_first=True))
optimizer = torch.optim.Adam(lstm.parameters(), lr=0.01)
generator = torch.Generator().manual_seed(dist.get_rank())  # each process has its own data
for step in range(20):
    x = torch.randn(16, 10, 5, generator=generator)
    y, _ = lstm(x)
    loss = nn.functional.mse_loss(y[..., :5], x)
    optimizer.zero_grad()
    loss.backward()  # averages the gradients over the processes
    optimizer.step()
    if step % 5 == 0 and dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.3f}")
dist.barrier()
# Leaves without the group's destructor, in which gloo (torch 2.13) may wait for a thread that waits
# for Python's lock; with other backends call dist.destroy_process_group() instead.
sys.stdout.flush()
os._exit(0)
