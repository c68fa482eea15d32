"""The ops `recurrent` and `cell` for plain calls, and masks of dropout: see csrc/direct.cpp.

The weights are given as a module's `_parameters`, and the names of those that are wanted. Returns
NotImplemented where the call is to go through torch.ops, and under torch.compile cannot be traced.
"""

from collections.abc import Mapping
from types import NotImplementedType

from torch import Tensor

def recurrent(
    mode: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    parameters: Mapping[str, Tensor | None],
    names: list[str],
    num_layers: int,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
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
