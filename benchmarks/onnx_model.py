"""A shape as an ONNX model, of ONNX's own LSTM and RNN operators, of static sizes.

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

from fastrnn.bench.shapes import Shape

_OPSET, _IR_VERSION = 17, 9
_GATES = (0, 3, 1, 2)  # ONNX's order i, o, f, c, from torch's i, f, g, o


def _onnx_order(weight: Tensor, shape: Shape) -> Tensor:
    """Rows of the gates in ONNX's order."""
    if shape.kind == "rnn":
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

    def add_input(self, name: str, *sizes: int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
        return name

    def add_output(self, name: str, *sizes: int) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
        return name

    def add_node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))


def _add_layer(graph: _Graph, shape: Shape, state: dict[str, Tensor], layer: int, x: str) -> str:
    """Adds one layer, all its directions; returns the name of its (T, D, N, H) output."""
    suffixes = [f"l{layer}{direction}" for direction in ("", "_reverse")[: shape.D]]

    def gather(kind: str) -> list[Tensor]:
        return [_onnx_order(state[f"{kind}_{suffix}"], shape) for suffix in suffixes]

    pairs = zip(gather("bias_ih"), gather("bias_hh"), strict=True)
    inputs = [
        x,
        graph.add_constant(f"W_l{layer}", torch.stack(gather("weight_ih"))),
        graph.add_constant(f"R_l{layer}", torch.stack(gather("weight_hh"))),
        graph.add_constant(f"B_l{layer}", torch.stack([torch.cat(pair) for pair in pairs])),
    ]
    states = ("h", "c") if shape.kind == "lstm" else ("h",)
    if shape.hx:
        inputs.append("")  # sequence_lens: all are T
        inputs += [graph.add_input(f"{s}0_l{layer}", shape.D, shape.N, shape.H) for s in states]
    outputs = [graph.add_output(f"{s}_n_l{layer}", shape.D, shape.N, shape.H) for s in states]
    attributes: dict[str, Any] = {
        "hidden_size": shape.H,
        "direction": "bidirectional" if shape.D == 2 else "forward",
    }
    if shape.kind == "rnn":
        attributes["activations"] = [shape.nonlinearity.capitalize()] * shape.D
    y = f"y_l{layer}"
    graph.add_node(shape.kind.upper(), inputs, [y, *outputs], **attributes)
    return y


def _add_output(graph: _Graph, shape: Shape, y: str) -> None:
    """Adds what makes the last layer's (T, D, N, H) the model's output."""
    joined = (shape.N, shape.T) if shape.batch_first else (shape.T, shape.N)
    if shape.D == 1 and not shape.batch_first:
        graph.nodes[-1].output[0] = graph.add_output("output", shape.T, 1, shape.N, shape.H)
        return
    order = (2, 0, 1, 3) if shape.batch_first else (0, 2, 1, 3)
    output = graph.add_output("output", *joined, shape.D, shape.H)
    graph.add_node("Transpose", [y], [output], perm=order)


def make_model(shape: Shape, state: dict[str, Tensor]) -> ModelProto:
    """Builds a float32 model with the weights of a torch.nn state_dict.

    Args:
        shape: Of any kind, layers, directions and initial state; not packed, without a projection.
        state: The weights.

    Returns:
        The model. Inputs "x", "h0_l0", "c0_l0" ...; outputs "output", "h_n_l0", "c_n_l0" ...
    """
    graph = _Graph()
    leading = (shape.N, shape.T) if shape.batch_first else (shape.T, shape.N)
    x = graph.add_input("x", *leading, shape.I)
    if shape.batch_first:
        graph.add_node("Transpose", [x], ["x_by_time"], perm=(1, 0, 2))
        x = "x_by_time"
    for layer in range(shape.L):
        y = _add_layer(graph, shape, state, layer, x)
        if layer == shape.L - 1:
            _add_output(graph, shape, y)
        else:
            sizes = torch.tensor([shape.T, shape.N, shape.D * shape.H])
            x = f"x_l{layer + 1}"
            if shape.D == 2:
                graph.add_node("Transpose", [y], [f"{y}_by_row"], perm=(0, 2, 1, 3))
                y = f"{y}_by_row"
            graph.add_node("Reshape", [y, graph.add_constant(f"{x}_shape", sizes)], [x])
    proto = helper.make_graph(
        graph.nodes, shape.id, graph.inputs, graph.outputs, initializer=graph.weights
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION)
