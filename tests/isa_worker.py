"""Run by test_isa.py under each ATEN_CPU_CAPABILITY: checks odd sizes, saves the outputs."""

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
    *cases(N=[None, 0], H=[9], batch_first=[True], bias=[False], dtype=DTYPES),
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    capability, path = sys.argv[1:]
    assert torch.ops.fastrnn.cpu_capability() == capability
    assert fastrnn.build_info()["cpu_capability"] == capability
    outputs = {}
    for case in CASES:
        ours, inputs = build(fastrnn, case), make_inputs(case)
        assert_same(run(ours, inputs), run(build(nn, case), inputs))
        with torch.no_grad():
            outputs[str(case)] = call(ours, inputs)
    torch.save(outputs, path)
