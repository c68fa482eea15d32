"""One of two processes that train a model together; test_distributed.py starts them by torchrun."""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastrnn

STEPS = 3


class Model(nn.Module):
    """A stack with everything, and a head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        options = {"proj_size": 4} if name == "LSTM" else {}
        self.rnn = getattr(fastrnn, name)(
            5, 9, num_layers=2, bidirectional=True, batch_first=True, **options
        )
        self.head = nn.Linear(8 if name == "LSTM" else 18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def make(name: str) -> tuple[Model, Tensor]:
    """Returns the model, the same in each process, and the whole batch."""
    torch.manual_seed(0)
    return Model(name), torch.randn(STEPS, 4, 7, 5)


def full(tensor: Tensor) -> Tensor:
    """Returns all of a tensor of which this process may hold a shard."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def train(model: nn.Module, batches: Tensor, wrapped: nn.Module | None = None) -> dict[str, Tensor]:
    """Takes STEPS steps of `model`; returns the last gradients and the weights of what it wraps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    results = {}
    for name, p in (wrapped or model).named_parameters():
        results[f"d{name}"], results[name] = full(p.grad), full(p.detach())
    return results


def main(wrapper: str, name: str, path: str) -> None:
    """Trains on this process's half of the batch; the first process writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, batches = make(name)
    trained: nn.Module
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.rnn, mesh=mesh)
        trained = fully_shard(model, mesh=mesh)
        assert isinstance(model.rnn, FSDPModule)
    results = train(trained, batches[:, rank::2], model)
    if rank == 0:
        torch.save(results, path)
    dist.barrier()
    # Without the group's destructor, which (torch 2.13) can wait for a thread of gloo's while it
    # holds the lock that this thread wants, Python's.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
