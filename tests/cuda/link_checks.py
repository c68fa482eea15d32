"""What a build with CUDA shows where there is no GPU; link_gate.py runs it."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn

OPS = ["recurrent", "recurrent_forward", "recurrent_backward", "output_again"]


def check_build_info() -> None:
    """The build says which CUDA it is for."""
    cuda = fastrnn.build_info()["cuda"]
    assert cuda and cuda.split(".")[0] == torch.version.cuda.split(".")[0], cuda


def check_kernels() -> None:
    """Every op has a kernel for the CUDA key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert all(has_kernel(f"fastrnn::{op}", "CUDA") for op in OPS)
    # A cell is composed of the others.
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fastrnn::cell", "CUDA")


def check_fakes() -> None:
    """Modules on a device "cuda" reach the ops, and shapes come out right, with no GPU."""
    with FakeTensorMode(), torch.no_grad():
        lstm = fastrnn.LSTM(5, 8, num_layers=2, bidirectional=True, device="cuda")
        x = torch.empty(7, 3, 5, device="cuda")
        with torch.profiler.profile() as profile:
            y, (h_n, c_n) = lstm(x)
        assert any(event.name == "fastrnn::recurrent" for event in profile.events())
        assert (y.shape, h_n.shape, c_n.shape) == ((7, 3, 16), (4, 3, 8), (4, 3, 8))
        assert y.is_cuda and h_n.is_cuda and c_n.is_cuda
        weights = lstm._flat_weights
        options = (2, True, True, False, None, 0.0)
        _, _, _, reserve = torch.ops.fastrnn.recurrent_forward(
            "LSTM", x, None, h_n, c_n, weights, *options
        )
        gradients = torch.ops.fastrnn.recurrent_backward(
            "LSTM", y, None, None, x, None, h_n, c_n, weights, y, reserve, *options,
            [True] * (3 + len(weights)),
        )  # fmt: skip
        shapes = [gradient.shape for gradient in gradients]
        assert shapes == [x.shape, h_n.shape, c_n.shape, *(w.shape for w in weights)]


def check_error() -> None:
    """A call that needs the GPU says that there is no driver."""
    if torch.cuda.is_available():
        return
    try:
        fastrnn.LSTM(5, 8).cuda()
    except RuntimeError as error:
        assert "NVIDIA driver" in str(error), error
    else:
        raise AssertionError("a module moved to a GPU that is not there")


def check_cpu() -> None:
    """The CPU kernels are there as ever."""
    x = torch.randn(4, 2, 5)
    ours, theirs = fastrnn.LSTM(5, 8), torch.nn.LSTM(5, 8)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=0, atol=1e-6)


if __name__ == "__main__":
    for check in [check_build_info, check_kernels, check_fakes, check_error, check_cpu]:
        check()
        print(f"ok: {check.__doc__}")
