"""The ops `recurrent` and `cell` for plain calls, and masks of dropout: see csrc/direct.cpp.

A module is given as its `__dict__`; a cell's weights as its `_parameters`, and the names of those
that are wanted. Returns NotImplemented where the call is to go through torch.ops, and under
torch.compile cannot be traced.
"""

from collections.abc import Mapping
from types import NotImplementedType
from typing import Any

from torch import Tensor

def forward(
    module: dict[str, Any],
    input: Any,  # noqa: A002
    hx: Any,
    /,
) -> Any: ...
def recurrent(
    module: dict[str, Any],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    masks: Tensor | None,
    dropout: float,
    /,
) -> tuple[Tensor, Tensor, Tensor] | NotImplementedType: ...
def draw_masks(
    x: Tensor,
    batch_first: bool,
    count: int,
    width: int,
    dropout: float,
    /,
) -> Tensor | NotImplementedType: ...
def cell(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Mapping[str, Tensor | None],
    names: list[str],
    has_biases: bool,
    /,
) -> tuple[Tensor, Tensor] | NotImplementedType: ...
