"""A cell as an ONNX model, of ONNX's own LSTM and RNN operators, with static shapes.

Layer k takes its initial state as "h0_lk" (and "c0_lk") and returns its final one as "h_n_lk"
(and "c_n_lk"), (D, N, H) each, so that no state is copied to be stacked. The output is (T, N, D*H)
or, with one direction, (T, 1, N, H): the same numbers in the same places, without a node to say so.
With batch_first, which neither runtime does inside the operator, x and the output are transposed
by nodes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor

from fastrnn.bench.cells import Cell

_OPSET, _IR_VERSION = 17, 9
_GATES = (0, 3, 1, 2)  # ONNX's order i, o, f, c, from torch's i, f, g, o


def _onnx_order(weight: Tensor, cell: Cell) -> Tensor:
    """Rows of the gates in ONNX's order."""
    if cell.kind == "rnn":
        return weight
    gates = weight.chunk(4)
    return torch.cat([gates[gate] for gate in _GATES])


class _Graph:
    """Nodes, weights, inputs and outputs, as they are added."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def add_constant(self, name: str, value: Tensor) -> str:
        self.weights.append(numpy_helper.from_array(value.numpy(), name))
        return name

    def add_input(self, name: str, *shape: int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add_output(self, name: str, *shape: int) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add_node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))


def _add_layer(graph: _Graph, cell: Cell, state: dict[str, Tensor], layer: int, x: str) -> str:
    """Adds one layer, all its directions; returns the name of its (T, D, N, H) output."""
    suffixes = [f"l{layer}{direction}" for direction in ("", "_reverse")[: cell.D]]

    def gather(kind: str) -> list[Tensor]:
        return [_onnx_order(state[f"{kind}_{suffix}"], cell) for suffix in suffixes]

    pairs = zip(gather("bias_ih"), gather("bias_hh"), strict=True)
    inputs = [
        x,
        graph.add_constant(f"W_l{layer}", torch.stack(gather("weight_ih"))),
        graph.add_constant(f"R_l{layer}", torch.stack(gather("weight_hh"))),
        graph.add_constant(f"B_l{layer}", torch.stack([torch.cat(pair) for pair in pairs])),
    ]
    states = ("h", "c") if cell.kind == "lstm" else ("h",)
    if cell.hx:
        inputs.append("")  # sequence_lens: all are T
        inputs += [graph.add_input(f"{s}0_l{layer}", cell.D, cell.N, cell.H) for s in states]
    outputs = [graph.add_output(f"{s}_n_l{layer}", cell.D, cell.N, cell.H) for s in states]
    attributes: dict[str, Any] = {
        "hidden_size": cell.H,
        "direction": "bidirectional" if cell.D == 2 else "forward",
    }
    if cell.kind == "rnn":
        attributes["activations"] = [cell.nonlinearity.capitalize()] * cell.D
    y = f"y_l{layer}"
    graph.add_node(cell.kind.upper(), inputs, [y, *outputs], **attributes)
    return y


def _add_output(graph: _Graph, cell: Cell, y: str) -> None:
    """Adds what makes the last layer's (T, D, N, H) the model's output."""
    joined = (cell.N, cell.T) if cell.batch_first else (cell.T, cell.N)
    if cell.D == 1 and not cell.batch_first:
        graph.nodes[-1].output[0] = graph.add_output("output", cell.T, 1, cell.N, cell.H)
        return
    order = (2, 0, 1, 3) if cell.batch_first else (0, 2, 1, 3)
    output = graph.add_output("output", *joined, cell.D, cell.H)
    graph.add_node("Transpose", [y], [output], perm=order)


def make_model(cell: Cell, state: dict[str, Tensor]) -> ModelProto:
    """Builds a float32 model with the weights of a torch.nn state_dict.

    Args:
        cell: Of any kind, layers, directions and initial state; not packed, without a projection.
        state: The weights.

    Returns:
        The model. Inputs "x", "h0_l0", "c0_l0" ...; outputs "output", "h_n_l0", "c_n_l0" ...
    """
    graph = _Graph()
    leading = (cell.N, cell.T) if cell.batch_first else (cell.T, cell.N)
    x = graph.add_input("x", *leading, cell.I)
    if cell.batch_first:
        graph.add_node("Transpose", [x], ["x_by_time"], perm=(1, 0, 2))
        x = "x_by_time"
    for layer in range(cell.L):
        y = _add_layer(graph, cell, state, layer, x)
        if layer == cell.L - 1:
            _add_output(graph, cell, y)
        else:
            shape = torch.tensor([cell.T, cell.N, cell.D * cell.H])
            x = f"x_l{layer + 1}"
            if cell.D == 2:
                graph.add_node("Transpose", [y], [f"{y}_by_row"], perm=(0, 2, 1, 3))
                y = f"{y}_by_row"
            graph.add_node("Reshape", [y, graph.add_constant(f"{x}_shape", shape)], [x])
    proto = helper.make_graph(
        graph.nodes, cell.id, graph.inputs, graph.outputs, initializer=graph.weights
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION)
