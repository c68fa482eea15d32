"""Gradients of gradients and forward-mode AD against torch.nn's. See README.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

import fastrnn
from fastrnn.bench.arguments import positive, seconds
from fastrnn.bench.check import mismatches
from fastrnn.bench.shapes import Shape
from fastrnn.bench.timing import Spread, alternate, cpu_timer, ratio
from fastrnn.bench.work import REFERENCE, SUBJECT, make_module, make_workload
from report import write_results
from selection import add_out, shape_id

SHAPES = (
    "{kind}-B1-T10-I8-H8",
    "{kind}-B8-T20-I64-H64",
    "{kind}-B8-T20-I64-H64-L2-bi",
    "{kind}-B8-T20-I64-H64-f64",
    "{kind}-B4-T1000-I32-H32",
    "{kind}-B32-T50-I128-H128",
    "{kind}-B32-T20-I256-H256",
)

Results = dict[str, Tensor]
Call = Callable[[], Results]


def penalty(module: nn.Module, x: Tensor) -> Call:
    """A gradient penalty's gradients by the weights: backward through the gradient of x."""
    weights = dict(module.named_parameters())
    leaf = x.clone().requires_grad_()

    def run() -> Results:
        (dx,) = torch.autograd.grad(module(leaf)[0].sum(), leaf, create_graph=True)
        value = (dx.flatten(1).norm(dim=1) - 1).square().mean()
        # A bias of an output does not reach the gradient of x.
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        pairs = zip(weights, found, strict=True)
        return {name: gradient for name, gradient in pairs if gradient is not None}

    return run


def tangent(module: nn.Module, x: Tensor) -> Call:
    """The output and its tangent by that of x."""
    module.requires_grad_(False)

    def run() -> Results:
        results = jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
        return dict(zip(("y", "dy"), results, strict=True))

    return run


def hessian_product(module: nn.Module, x: Tensor) -> Call:
    """The Hessian of a loss by x times a vector: the tangent of a gradient."""
    module.requires_grad_(False)

    def run() -> Results:
        gradient = grad(lambda x: module(x)[0].square().sum())
        return {"product": jvp(gradient, (x,), (torch.ones_like(x),))[1]}

    return run


DERIVATIVES = {"penalty": penalty, "jvp": tangent, "hvp": hessian_product}


@dataclass(frozen=True)
class Row:
    """Seconds of a call by implementation; time of torch.nn over that of fastrnn."""

    derivative: str
    shape: str
    threads: int
    seconds: dict[str, Spread]
    ratio: Spread | None  # None: torch.nn raises


def build(library: ModuleType, name: str, shape: Shape) -> Call:
    """What is timed, of the same weights and inputs for each library."""
    work = make_workload(shape, "training")
    assert isinstance(work.x, Tensor)
    return DERIVATIVES[name](make_module(library, work), work.x)


def measure(name: str, shape: Shape, threads: int, seconds: float) -> Row:
    """Checks and times one derivative of one shape.

    Raises:
        ArithmeticError: the results are not torch.nn's.
    """
    torch.set_num_threads(threads)
    calls = {SUBJECT: build(fastrnn, name, shape), REFERENCE: build(nn, name, shape)}
    try:
        expected = calls[REFERENCE]()
    except NotImplementedError:  # "Trying to use forward AD with mkldnn_rnn_layer ..."
        del calls[REFERENCE]
    else:
        if wrong := mismatches(calls[SUBJECT](), expected):
            raise ArithmeticError(f"{name} {shape.id}: {'; '.join(wrong)}")
    times = alternate({n: cpu_timer(call, threads) for n, call in calls.items()}, seconds)
    return Row(
        name,
        shape.id,
        threads,
        {each: Spread.of(values) for each, values in times.items()},
        ratio(times[REFERENCE], times[SUBJECT]) if REFERENCE in times else None,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/derivatives.py", description="Gradients of gradients, and tangents."
    )
    add = parser.add_argument
    add("--shape", action="append", type=shape_id, metavar="ID", help="any; default a few")
    add("--derivative", action="append", choices=DERIVATIVES, help="default: all")
    add("--threads", type=positive, default=1, help="default 1")
    add("--seconds", type=seconds, default=1.0, metavar="S", help="per row; default 1")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measures and prints; writes derivatives.json."""
    arguments = parse_arguments()
    default = [Shape.parse(each.format(kind=kind)) for kind in ("rnn", "lstm") for each in SHAPES]
    rows = []
    print(f"{'derivative':<12}{'shape':<32}{'threads':>8}{'us':>10}{'torch':>10}")
    for name in arguments.derivative or DERIVATIVES:
        for shape in arguments.shape or default:
            row = measure(name, shape, arguments.threads, arguments.seconds)
            rows.append(row)
            over = f"{row.ratio.median:.2f}" if row.ratio else "raises"
            microseconds = row.seconds[SUBJECT].median * 1e6
            print(f"{name:<12}{shape.id:<32}{row.threads:>8}{microseconds:>10.0f}{over:>10}")
    write_results(arguments.out, "derivatives", rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
