"""Nothing is read past the end of the weights: a page that faults follows each of them."""

import ctypes
import mmap
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import FUSED_DTYPES, run_python

KINDS = ("LSTM", "RNN")

libc = ctypes.CDLL(None, use_errno=True)

# Widths whose last panel of columns is not full, yet has all of its vectors, among others.
# Those past 256 are read in place without being transposed.
SIZES = (1, 7, 15, 31, 50, 63, 113, 127, 256, 263)


def guarded(tensor: Tensor) -> Tensor:
    """Returns a copy that ends where a page begins that may not be touched."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    bits = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=pages * page - size)
    copy = bits.view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def train(kind: str, dtype: torch.dtype) -> None:
    """Takes training steps of all sizes, few rows (weights read in place) and more (packed)."""
    for hidden, (steps, batch) in product(SIZES, ((1, 1), (2, 3), (4, 9))):
        module = getattr(fastrnn, kind)(hidden, hidden, dtype=dtype)
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(guarded(parameter.detach())))
        x = torch.ones(steps, batch, hidden, dtype=dtype, requires_grad=True)
        h0 = torch.ones(1, batch, hidden, dtype=dtype, requires_grad=True)
        output, _ = module(x, (h0, h0) if kind == "LSTM" else h0)
        output.sum().backward()
        assert all(np.isfinite(t.grad.double().numpy()).all() for t in (x, h0))


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_training_reads_no_further_than_the_weights(capability: str) -> None:
    # A level that this CPU has not falls back to the best that it has.
    process = run_python(__file__, ATEN_CPU_CAPABILITY=capability)
    done = process.stdout.split("\n")
    assert process.returncode == 0, f"{process.returncode} in {done[-1]}: {process.stderr}"
    assert len(done) == len(KINDS) * len(FUSED_DTYPES) + 1, done


if __name__ == "__main__":
    for kind, dtype in product(KINDS, FUSED_DTYPES):
        print(kind, dtype, end="", flush=True)  # what ends in a fault is the last
        train(kind, dtype)
        print()
