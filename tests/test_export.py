"""torch.export keeps a stack as one node, and what is exported runs where only the op is loaded."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from helpers import HAS_ONEDNN_BF16, Case, build, cases, make_inputs, run_python

N, T = Dim("N", min=1, max=512), Dim("T", min=1, max=4096)


class Tagger(nn.Module):
    """A stack and a linear layer over it, on batch-first input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rnn = build(fastrnn, case)
        self.head = nn.Linear(case.D * (case.P or case.H), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


TAGGED = cases(N=[3], H=[9], L=[2], D=[2], P=[0, 3], batch_first=[True])


def export_tagger(case: Case) -> tuple[Tagger, ExportedProgram]:
    """Returns a model and its program, with T and N left open."""
    model = Tagger(case).eval()
    example = make_inputs(case).x
    return model, export(model, (example,), dynamic_shapes={"x": {0: N, 1: T}})


def stacks(program: ExportedProgram) -> int:
    """Returns the number of fused nodes; of anything else that steps through time there is none."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert len(targets) < 12
    return targets.count(torch.ops.fastrnn.recurrent.default)


def other_inputs() -> list[Tensor]:
    """Returns inputs of other sizes than the example."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, t, 5, generator=generator) for n, t in ((1, 1), (2, 11), (17, 40))]


@pytest.mark.parametrize("case", TAGGED, ids=str)
def test_program(case: Case, tmp_path: Path) -> None:
    model, program = export_tagger(case)
    decomposed = program.run_decompositions()
    assert stacks(program) == stacks(decomposed) == 1
    torch.export.save(decomposed, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for x in other_inputs():
        for each in (program, decomposed, loaded):
            torch.testing.assert_close(each.module()(x), model(x), rtol=0, atol=1e-6)


RUN_PACKAGE = """
import sys, torch
import torch._inductor.codecache  # which torch 2.10 does not import by itself
package, library, inputs, results = sys.argv[1:]
torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in torch.load(inputs)], results)
assert "fastrnn" not in sys.modules
"""


class Taggers(nn.Module):
    """Several in one model: a package takes seconds to compile."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.taggers = nn.ModuleList(map(Tagger, cases))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [tagger(x) for tagger in self.taggers]


def test_package_runs_without_the_module_code(tmp_path: Path) -> None:
    model = Taggers(TAGGED[1:3]).eval()
    program = export(model, (make_inputs(TAGGED[1]).x,), dynamic_shapes={"x": {0: N, 1: T}})
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    torch.save(other_inputs(), tmp_path / "inputs.pt")
    (library,) = Path(fastrnn.__file__).parent.glob("_ops*.so")
    paths = [package, str(library), str(tmp_path / "inputs.pt"), str(tmp_path / "results.pt")]
    process = run_python("-c", RUN_PACKAGE, *paths, cwd=str(tmp_path))
    assert process.returncode == 0, process.stderr
    results = torch.load(tmp_path / "results.pt")
    for x, result in zip(other_inputs(), results, strict=True):
        torch.testing.assert_close(list(result), model(x), rtol=0, atol=1e-6)


class OfPacked(nn.Module):
    """A stack on the parts of a packed sequence, so that their sizes can be left open."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.rnn = build(fastrnn, case)

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
        y, hidden = self.rnn(PackedSequence(data, batch_sizes))
        return y.data, hidden[0] if isinstance(hidden, tuple) else hidden


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("case", cases(H=[9], L=[2], D=[2], P=[0, 3]), ids=str)
def test_packed_sequence(case: Case, strict: bool) -> None:
    model, x = OfPacked(case).eval(), make_inputs(case).x
    example = pack_padded_sequence(x, [7, 3, 1])
    shapes = ({0: Dim("rows")}, {0: Dim("steps")})
    program = export(model, tuple(example[:2]), dynamic_shapes=shapes, strict=strict)
    assert stacks(program) == 1
    for n, lengths in enumerate([[7, 3, 1], [5], [4, 2]]):
        packed = pack_padded_sequence(x[:, : len(lengths)] + n, lengths)
        for got, want in zip(program.module()(*packed[:2]), model(*packed[:2]), strict=True):
            assert torch.equal(got, want)


def test_packed_sequence_of_one_shape() -> None:
    case = Case(H=9, L=2)
    module = build(fastrnn, case).eval()
    packed = pack_padded_sequence(make_inputs(case).x, [7, 3, 1])
    program = export(module, (packed,))
    assert stacks(program) == 1
    assert torch.equal(program.module()(packed)[0].data, module(packed)[0].data)


class Packing(nn.Module):
    """Packs inside, which torch's fakes give wrong sizes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.module = getattr(fastrnn, name)(5, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.module(pack_padded_sequence(x, lengths))[0].data


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_packing_inside_says_how_to_write_it(name: str) -> None:
    arguments = (torch.randn(4, 3, 5), torch.tensor([4, 3, 2]))
    with pytest.raises(RuntimeError, match="make the PackedSequence of them inside"):
        torch.export.export(Packing(name), arguments, strict=False)


@pytest.mark.parametrize("library", [nn, fastrnn], ids=["torch.nn", "fastrnn"])
def test_autocast_is_exported_from_within(library: ModuleType) -> None:
    """As docs/compile_and_export.md says, of torch.nn's modules too."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = library.LSTM(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.lstm(x)[0]

    if library is nn and not HAS_ONEDNN_BF16:
        pytest.skip("torch.nn raises on this processor")
    x = torch.randn(3, 2, 5)
    program = export(Inside(), (x,))
    assert program.module()(x).dtype == torch.bfloat16
    assert program.run_decompositions().module()(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = export(library.LSTM(5, 8), (x,))
    assert program.module()(x)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["LSTM", "RNN"])
def test_input_of_another_dtype(name: str) -> None:
    raised = []
    for package in (fastrnn, nn):
        module = getattr(package, name)(5, 8)
        with pytest.raises(ValueError, match="dtype") as error:
            export(module, (torch.randn(3, 5, dtype=torch.float64),), strict=False)
        raised.append(str(error.value).splitlines()[0])
    assert raised[0] == raised[1]


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_states_of_other_dtypes(name: str) -> None:
    """Which torch.nn takes, and so computes, in what is exported too."""
    module = getattr(fastrnn, name)(5, 8).double()
    x, h = torch.randn(3, 5).double(), torch.ones(1, 8).double()
    h, c = (h, h.float()) if name == "LSTM" else (h.expand(3, 8), h.expand(3, 8).float())
    program = export(module, (x, (h, c)), strict=False).module()
    torch.testing.assert_close(program(x, (h, c)), module(x, (h, c)))
