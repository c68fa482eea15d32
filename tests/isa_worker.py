"""Run by test_isa.py under each ATEN_CPU_CAPABILITY: checks odd sizes, saves the results."""

import sys

import torch
from torch import nn

import fastrnn
from helpers import DTYPES, assert_same, build, call, cases, make_inputs, run

CASES = [
    *cases(T=[3], N=[1, 7], I=[1, 7], H=[1, 16, 17, 33], hx=[True], dtype=DTYPES),
    *cases(T=[3], N=[33], I=[17], H=[15, 64, 130], dtype=DTYPES),
    *cases(["LSTM"], T=[3], N=[5], H=[17, 33], P=[1, 9], L=[2], D=[2], dtype=DTYPES),
    *cases(T=[7], N=[3], H=[33], L=[2], D=[2], lengths=[(2, 7, 3)], hx=[True], dtype=DTYPES),
    *cases(T=[1, 3], N=[1, 6, 9], I=[259, 520], H=[275], hx=[True], dtype=DTYPES),
    *cases(N=[None, 0], H=[9], batch_first=[True], bias=[False], dtype=DTYPES),
]


def check_half_denormals() -> None:
    """float16's denormals are normal numbers of float, of which no mode makes zeros."""
    module = fastrnn.RNN(3, 3, nonlinearity="relu", bias=False, dtype=torch.float16)
    with torch.no_grad():
        module.weight_ih_l0.copy_(512 * torch.eye(3))
        module.weight_hh_l0.zero_()
        x = torch.tensor([[3e-5, 6e-8, 2e-6]], dtype=torch.float16)
        assert torch.set_flush_denormal(True)
        y, _ = module(x)
        small, _ = module(x / 512)
        torch.set_flush_denormal(False)
        assert torch.equal(y, 512 * x)
        assert torch.equal(small, 512 * (x / 512))


if __name__ == "__main__":
    torch.set_num_threads(1)
    check_half_denormals()
    capability, path = sys.argv[1:]
    assert torch.ops.fastrnn.cpu_capability() == capability
    assert fastrnn.build_info()["cpu_capability"] == capability
    results = {}
    for case in CASES:
        ours, inputs = build(fastrnn, case), make_inputs(case)
        results[str(case)] = run(ours, inputs)
        assert_same(results[str(case)], run(build(nn, case), inputs))
        with torch.no_grad():
            results[f"{case}, inference"] = call(ours, inputs)
    torch.save(results, path)
