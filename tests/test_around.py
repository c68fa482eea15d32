"""What PyTorch does around a module: devices, parametrizations, optimizers, processes, threads."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.nn.utils.rnn import pack_sequence
from torch.optim import swa_utils
from torch.utils._pytree import tree_structure
from torch.utils.data import DataLoader, Dataset

import fastrnn
from helpers import KINDS, Case, assert_equal, assert_same, build, call, make_inputs, run

CELLS = ["RNNCell", "LSTMCell"]


def make(name: str, package: Any = fastrnn, **options: Any) -> nn.Module:
    """Returns a module of that class name, of 5 inputs and 8 units."""
    torch.manual_seed(0)
    return getattr(package, name)(5, 8, **options)


def first(result: Any) -> Tensor:
    """Returns y, or a cell's state."""
    return result[0] if isinstance(result, tuple) else result


NAMES = ["RNN", "LSTM", *CELLS]


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_and_to_empty(name: str) -> None:
    module, twin = make(name, device="meta"), make(name)
    x = torch.randn(4, 5)
    assert first(module(x.to("meta"))).shape == first(twin(x)).shape
    assert all(p.is_meta for p in module.parameters())
    module.to_empty(device="cpu").load_state_dict(twin.state_dict())
    assert torch.equal(first(module(x)), first(twin(x)))
    with torch.device("meta"):
        assigned = make(name)
    assigned.load_state_dict(twin.state_dict(), assign=True)
    assert torch.equal(first(assigned(x)), first(twin(x)))


@pytest.mark.parametrize("name", NAMES)
def test_results_are_tuples_where_torchs_are(name: str) -> None:
    x = torch.randn(4, 5)
    for inputs in (x,) if name in CELLS else (x, pack_sequence([x, x[:2]])):
        ours, theirs = (tree_structure(make(name, p)(inputs)) for p in (fastrnn, nn))
        assert ours == theirs


def weight_norm(module: nn.Module, name: str) -> None:
    """Parametrizes a weight by direction and length."""
    parametrizations.weight_norm(module, name)


def spectral_norm(module: nn.Module, name: str) -> None:
    """Divides a weight by its largest singular value.

    In evaluation: while training each read takes an iteration, and torch.nn reads more often.
    """
    torch.manual_seed(1)
    parametrizations.spectral_norm(module, name)
    module.eval()


def pruned(module: nn.Module, name: str) -> None:
    """Zeroes half of a weight."""
    prune.l1_unstructured(module, name, 0.5)


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, pruned])
@pytest.mark.parametrize("name", NAMES)
def test_parametrized_weights_train_alike(name: str, change: Callable[..., None]) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for package in (fastrnn, nn):
        module = make(name, package)
        change(module, "weight_hh" if name in CELLS else "weight_hh_l0")
        module.double()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            first(module(x)).square().sum().backward()
            norm = clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
        results.append({"norm": norm, **{n: p.detach() for n, p in module.named_parameters()}})
    assert_same(*results, factor=100)


def all_optimizers() -> list[tuple[str, dict[str, Any]]]:
    """Returns each optimizer of torch.optim that trains dense weights, in each implementation."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, value in vars(torch.optim).items():
        is_optimizer = isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        if not is_optimizer or name in ("Optimizer", "SparseAdam", "LBFGS"):
            continue
        accepted = value.__init__.__code__.co_varnames
        found.append((name, {}))
        found += [(name, {way: True}) for way in ("foreach", "fused") if way in accepted]
    return [*found, ("LBFGS", {"max_iter": 2})]


@pytest.mark.parametrize(
    ("name", "options"), all_optimizers(), ids=lambda v: v if isinstance(v, str) else "_".join(v)
)
@pytest.mark.parametrize("module", ["RNN", "LSTM"])
def test_optimizers(module: str, name: str, options: dict[str, Any]) -> None:
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for package in (fastrnn, nn):
        model = make(module, package, dtype=torch.float64)
        # Muon takes matrices only.
        weights = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
        optimizer = getattr(torch.optim, name)(weights, lr=0.01, **options)

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = model(x)[0].square().sum()
            loss.backward()
            return loss

        losses = torch.stack([optimizer.step(closure).detach() for _ in range(3)])
        results.append({"losses": losses})
    assert results[0]["losses"][-1] != results[0]["losses"][0]
    # Some divide by gradients near zero, which magnifies roundings.
    torch.testing.assert_close(results[0]["losses"], results[1]["losses"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_averaged_model(name: str) -> None:
    module = make(name)
    averaged = swa_utils.AveragedModel(module)
    x = torch.randn(4, 5)
    averaged.update_parameters(module)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3)
    averaged.update_parameters(module)
    twin = make(name)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    torch.testing.assert_close(first(averaged(x)), first(twin(x)))


class Encoded(Dataset):
    """Sequences that a module encodes in the worker that loads them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return first(self.module(x))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_in_forked_workers(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    data = Encoded(make(name).share_memory())
    assert all(p.is_shared() for p in data.module.parameters())
    data[0]  # the parent's own threads are up before the fork
    expected = [data[i] for i in range(8)]
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    loaded = torch.cat(list(loader))
    assert torch.equal(loaded, torch.stack(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_on_one_module(kind: str) -> None:
    case = Case(kind, T=20, N=3, L=2, D=2)
    module = build(fastrnn, case)
    inputs = [make_inputs(case, seed=seed) for seed in range(8)]
    expected = [call(module, each) for each in inputs]
    gradient = run(module, inputs[0])["dx"]
    failures: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(10):
                assert_equal(call(module, inputs[index]), expected[index])
                x = inputs[0].x.clone().requires_grad_()
                outputs = call(module, inputs[0]._replace(x=x))
                generator = torch.Generator().manual_seed(2)
                weights = [torch.randn(t.shape, generator=generator) for t in outputs.values()]
                total = sum((t * w).sum() for t, w in zip(outputs.values(), weights, strict=True))
                assert torch.equal(torch.autograd.grad(total, x)[0], gradient)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
