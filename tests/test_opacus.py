"""Opacus's GradSampleModule, in functorch mode, on a model that holds fastrnn's modules."""

import pytest
import torch
from torch import Tensor, nn

import fastrnn
from helpers import assert_same

pytest.importorskip("opacus")
from opacus.grad_sample import GradSampleModule, GradSampleModuleExpandedWeights


class LSTM(fastrnn.LSTM):
    """An LSTM of one output, which is what Opacus takes of a layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input)[0]


class RNN(fastrnn.RNN):
    """Likewise an RNN."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input)[0]


class Classifier(nn.Module):
    """Reads a sequence with a stack of two layers in both directions."""

    def __init__(self, rnn: type[fastrnn.LSTM | fastrnn.RNN]) -> None:
        super().__init__()
        self.rnn = rnn(5, 9, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x).mean(dim=1))


@pytest.mark.parametrize("rnn", [LSTM, RNN])
def test_per_sample_gradients(rnn: type[fastrnn.LSTM | fastrnn.RNN]) -> None:
    torch.manual_seed(0)
    model, x, labels = Classifier(rnn), torch.randn(6, 7, 5), torch.arange(6) % 3
    expected = []
    for sample, label in zip(x, labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(sample[None]), label[None]).backward()
        expected.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()

    private = GradSampleModule(model, force_functorch=True, loss_reduction="sum")
    nn.functional.cross_entropy(private(x), labels, reduction="sum").backward()
    names = [name for name, _ in model.named_parameters()]
    assert_same(
        {name: p.grad_sample for name, p in model.named_parameters()},
        dict(zip(names, map(torch.stack, zip(*expected, strict=True)), strict=True)),
        factor=4,
    )


def test_what_opacus_does_not_take() -> None:
    """As docs/transforms.md says: layers of several outputs, and its mode "ew"."""
    model = nn.Sequential(fastrnn.LSTM(5, 8, batch_first=True))
    y, _ = GradSampleModule(model, force_functorch=True)(torch.randn(6, 10, 5))
    with pytest.raises(TypeError, match="only integer tensors of a single element"):
        y.sum().backward()
    private = GradSampleModuleExpandedWeights(nn.Sequential(LSTM(5, 8, batch_first=True)))
    with pytest.raises(RuntimeError, match="Expanded Weights"):
        private(torch.randn(6, 10, 5))
