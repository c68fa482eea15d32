"""The benchmark grid: the shapes that a run measures unless told otherwise."""

from __future__ import annotations

import re

from fastrnn.bench.shapes import Shape


def _words(text: str) -> list[str]:
    """The words of text, but for lines that start with #."""
    return [word for line in text.splitlines() if line[:1] != "#" for word in line.split()]


# Shapes both kinds are measured on, by what they are there to show.
_SIZES = _words("""
# The tutorial's.
B1-T10-I5-H8 B1-T10-I5-H8-L2 B1-T10-I5-H8-L2-bi
# One step.
B1-T1-I64-H64 B1-T1-I256-H256 B1-T1-I1024-H1024 B1-T1-I256-H256-hx B16-T1-I200-H200
B256-T1-I512-H512
# One row: latency, then bandwidth of the recurrent weights.
B1-T10-I16-H16 B1-T100-I64-H64 B1-T50-I13-H50 B1-T200-I128-H128 B1-T100-I256-H256
B1-T50-I300-H300 B1-T100-I512-H512 B1-T20-I1024-H1024
# Few rows.
B2-T100-I32-H32 B3-T50-I100-H100 B4-T35-I128-H650 B8-T100-I128-H128 B8-T20-I512-H512
B8-T200-I16-H33 B16-T50-I40-H130
# Many rows; compute-bound from B32 and H256 up.
B32-T28-I28-H100 B32-T50-I128-H128 B32-T100-I256-H256 B48-T20-I300-H300 B64-T20-I512-H512
B32-T5-I1024-H1024 B100-T10-I64-H20 B128-T28-I28-H128 B256-T50-I8-H8 B256-T20-I128-H128
B256-T10-I256-H256
# Layers and directions.
B1-T100-I64-H64-L2 B1-T100-I128-H128-bi B1-T50-I256-H256-L3 B8-T50-I128-H128-L3
B16-T50-I64-H64-bi B32-T30-I100-H200-L2-bi
# Packed and batch-first, each beside its plain shape above.
B8-T100-I128-H128-packed60 B32-T50-I128-H128-packed60 B64-T20-I512-H512-packed60
B32-T30-I100-H200-L2-bi-packed60 B8-T100-I128-H128-batchfirst B32-T50-I128-H128-batchfirst
# Other dtypes.
B1-T100-I64-H64-f64 B32-T50-I128-H128-f64 B1-T100-I256-H256-bf16 B32-T50-I128-H128-bf16
B1-T100-I64-H64-f16 B32-T50-I128-H128-f16
""")

_RNN_ONLY = _words("""
rnn-relu-B1-T10-I5-H8 rnn-relu-B1-T100-I64-H64 rnn-relu-B8-T100-I128-H128
rnn-relu-B32-T50-I128-H128 rnn-relu-B32-T100-I256-H256 rnn-relu-B32-T50-I128-H128-packed60
""")

_LSTM_ONLY = _words("""
lstm-B1-T20-I64-H128-proj32 lstm-B8-T50-I80-H256-proj64 lstm-B32-T20-I128-H512-proj128
lstm-B8-T50-I80-H128-L2-bi-proj64
""")

_QUICK_SIZES = _words("""
B1-T10-I5-H8 B1-T10-I5-H8-L2-bi B1-T1-I64-H64 B1-T1-I256-H256 B1-T100-I64-H64 B1-T100-I256-H256
B3-T50-I100-H100 B8-T100-I128-H128 B32-T50-I128-H128 B64-T20-I512-H512 B256-T50-I8-H8
B16-T50-I64-H64-bi B32-T50-I128-H128-packed60 B1-T100-I64-H64-f64
""")

GRID: tuple[str, ...] = (
    *(f"rnn-{sizes}" for sizes in _SIZES),
    *_RNN_ONLY,
    *(f"lstm-{sizes}" for sizes in _SIZES),
    *_LSTM_ONLY,
)
QUICK: frozenset[str] = frozenset(
    [f"{kind}-{sizes}" for kind in ("rnn", "lstm") for sizes in _QUICK_SIZES]
    + ["rnn-relu-B8-T100-I128-H128", "lstm-B8-T50-I80-H256-proj64"]
)


def select(pattern: str = "", quick: bool = False) -> list[Shape]:
    """The grid's shapes whose id contains a match of pattern, in the grid's order."""
    names = [name for name in GRID if not quick or name in QUICK]
    return [Shape.parse(name) for name in names if re.search(pattern, name)]
