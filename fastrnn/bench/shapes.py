"""A shape to measure: a kind of module with its sizes and options, as its id says.

An id reads `lstm-B32-T100-I256-H256-L2-bi-packed60-bf16`: kind (`rnn`, `rnn-relu` or `lstm`),
batch N (written B), time steps T, input size I, hidden size H, then what is not the default:
`L2` layers, `bi` both directions, `proj64` projection size, `packed60` a PackedSequence at 60%
fill, `batchfirst`, `hx` a given initial state, and the dtype `f64`, `bf16` or `f16`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch

_ID = re.compile(
    r"(?P<kind>rnn|lstm)(?P<relu>-relu)?"
    r"-B(?P<N>[1-9]\d*)-T(?P<T>[1-9]\d*)-I(?P<I>[1-9]\d*)-H(?P<H>[1-9]\d*)"
    r"(-L(?P<L>[1-9]\d*))?(?P<bi>-bi)?(-proj(?P<P>[1-9]\d*))?(-packed(?P<fill>[1-9]\d?))?"
    r"(?P<batch_first>-batchfirst)?(?P<hx>-hx)?(-(?P<dtype>f64|bf16|f16))?"
)
_DTYPES = {
    None: torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        kind: "rnn" or "lstm".
        T, N, I, H, L, D: Time steps, batch, input size, hidden size, layers, directions.
        P: Projection size, 0 for none.
        fill: Percentage of the N x T steps that are real; under 100 the input is packed.
        hx: Whether an initial state is given.
    """

    id: str
    kind: str
    nonlinearity: str
    T: int
    N: int
    I: int  # noqa: E741
    H: int
    L: int
    D: int
    P: int
    fill: int
    batch_first: bool
    hx: bool
    dtype: torch.dtype

    @staticmethod
    def parse(text: str) -> Shape:
        """Reads an id.

        Raises:
            ValueError: the id is not of the form in this file's first lines.
        """
        match = _ID.fullmatch(text)
        if match is None or (match["kind"] == "lstm" and match["relu"]):
            raise ValueError(f"not a shape id: {text!r}")
        if match["P"] and (match["kind"] == "rnn" or int(match["P"]) >= int(match["H"])):
            raise ValueError(f"a projection needs an LSTM and a size below H: {text!r}")
        return Shape(
            id=text,
            kind=match["kind"],
            nonlinearity="relu" if match["relu"] else "tanh",
            T=int(match["T"]),
            N=int(match["N"]),
            I=int(match["I"]),
            H=int(match["H"]),
            L=int(match["L"] or 1),
            D=2 if match["bi"] else 1,
            P=int(match["P"] or 0),
            fill=int(match["fill"] or 100),
            batch_first=bool(match["batch_first"]),
            hx=bool(match["hx"]),
            dtype=_DTYPES[match["dtype"]],
        )

    @property
    def lengths(self) -> list[int]:
        """Length of each sequence: from 2 * fill - 100 percent of T up to T, evenly, shuffled."""
        if self.fill == 100:
            return [self.T] * self.N
        low = max(1.0, (2 * self.fill / 100 - 1) * self.T)
        span = self.T - low
        lengths = [round(self.T - span * n / max(1, self.N - 1)) for n in range(self.N)]
        random.Random(0).shuffle(lengths)
        return lengths

    @property
    def steps(self) -> int:
        """Real steps over all sequences: T * N unless packed."""
        return sum(self.lengths)

    @property
    def out(self) -> int:
        """Size of one direction's output: P with a projection, else H."""
        return self.P or self.H

    @property
    def compute_bound(self) -> bool:
        """Whether products bound its time: N >= 32, H >= 256, float32."""
        return self.N >= 32 and self.H >= 256 and self.dtype == torch.float32

    def flops(self, mode: str) -> int:
        """Floating-point operations of the matrix products; backward counts twice forward."""
        gate_rows = 4 * self.H if self.kind == "lstm" else self.H
        inputs = [self.I] + [self.D * self.out] * (self.L - 1)
        macs = sum(gate_rows * (size + self.out) + self.H * self.P for size in inputs)
        return 2 * self.steps * self.D * macs * (3 if mode == "training" else 1)
