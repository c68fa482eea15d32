"""The installed package: import from anywhere, build information, metadata, wrong torch."""

import re
import shutil
from importlib import metadata, resources
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fastrnn
from helpers import run_python


def test_import_from_another_folder(tmp_path: Path) -> None:
    code = "import fastrnn; print(fastrnn.__version__, fastrnn.build_info())"
    result = run_python("-W", "error", "-c", code, cwd=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{fastrnn.__version__} {fastrnn.build_info()}"


def test_compiler_is_not_imported() -> None:
    """It takes as long to import as all else of torch."""
    code = """
import sys, torch
known = set(sys.modules)
import fastrnn
x = torch.ones(4, 3, 5)
for module in (fastrnn.RNN(5, 8), fastrnn.convert(torch.nn.LSTM(5, 8, 2, dropout=0.5))):
    module(x)[0].sum().backward()
    module(torch.nn.utils.rnn.pack_padded_sequence(x, [4, 2, 1]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        module(x)
print({"torch._dynamo", "torch._inductor", "sympy"} & (set(sys.modules) - known))
"""
    result = run_python("-c", code)
    assert (result.returncode, result.stdout.strip()) == (0, "set()"), result.stderr


# As where mock.patch.dict(sys.modules) ends, or Ctrl-C stopped the first import.
def test_import_twice() -> None:
    code = """
import sys, torch
import fastrnn
for name in [n for n in sys.modules if n.split(".")[0] == "fastrnn"]:
    del sys.modules[name]
import fastrnn
module = fastrnn.LSTM(5, 8)
module(torch.ones(4, 3, 5))[0].sum().backward()
torch.compile(module, fullgraph=True, backend="aot_eager")(torch.ones(4, 3, 5))
torch.vmap(module)(torch.ones(2, 4, 3, 5))
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def imported_from(folder: Path, **libraries: str) -> str:
    """Returns how an import of the package's Python files, and of no others, from there ends."""
    package = folder / "fastrnn"
    shutil.copytree(Path(fastrnn.__file__).parent, package, ignore=shutil.ignore_patterns("*.so"))
    for name, suffix in libraries.items():
        (package / f"{name}.{suffix}").touch()
    result = run_python("-c", "import fastrnn", cwd=str(folder))
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_import_of_a_source_tree_that_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "setup.py").touch()
    message = imported_from(tmp_path)
    assert message.startswith(f"ImportError: fastrnn's compiled part is missing from {tmp_path}")
    assert "this is the source tree" in message and "-e ." in message


def test_import_of_an_interrupted_copy(tmp_path: Path) -> None:
    suffix = EXTENSION_SUFFIXES[0].removeprefix(".")
    message = imported_from(tmp_path, _ops=suffix, _build_info=suffix)
    assert message.startswith(f"ImportError: fastrnn's compiled part is missing from {tmp_path}")
    assert "(_direct)" in message and "for this Python" not in message


def test_import_of_a_second_copy(tmp_path: Path) -> None:
    shutil.copytree(Path(fastrnn.__file__).parent, tmp_path / "fastrnn")
    code = f"""
import sys, fastrnn
for name in [n for n in sys.modules if n.split(".")[0] == "fastrnn"]:
    del sys.modules[name]
sys.path.insert(0, {str(tmp_path)!r})
import fastrnn
"""
    result = run_python("-c", code)
    assert result.returncode == 1, result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: another copy of fastrnn is loaded in this process")
    assert str(Path(fastrnn.__file__).parent) in message and str(tmp_path) in message


def test_import_of_a_build_for_another_python(tmp_path: Path) -> None:
    message = imported_from(tmp_path, _ops="cpython-39-x86_64-linux-gnu.so")
    assert "for this Python" in message and "_ops.cpython-39" in message
    assert "--force-reinstall" in message


def test_build_info() -> None:
    info = fastrnn.build_info()
    names = (
        "version",
        "commit",
        "torch",
        "cuda",
        "compiler",
        "cpu_capability",
        "amx",
        "matmul_precisions",
    )
    assert set(info) == set(names)
    assert info["version"] == fastrnn.__version__
    assert info["commit"] is None or re.fullmatch("[0-9a-f]{12,}(-dirty)?", info["commit"])
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cpu_capability"] == torch.ops.fastrnn.cpu_capability()
    assert info["amx"] == tuple(torch.ops.fastrnn.amx_dtypes())
    assert info["matmul_precisions"] == tuple(torch.ops.fastrnn.matmul_precisions())
    assert isinstance(info["compiler"], str) and info["compiler"]


def test_public_names() -> None:
    modules = {"RNN", "LSTM", "RNNCell", "LSTMCell"}
    functions = {"build_info", "convert", "release_memory", "revert"}
    assert modules | functions == set(fastrnn.__all__)
    assert all(hasattr(fastrnn, name) for name in fastrnn.__all__)


def test_is_typed() -> None:
    assert resources.files(fastrnn).joinpath("py.typed").is_file()


def test_metadata() -> None:
    # What is installed: builds for another torch, too, leave an egg-info in the source tree.
    package = next(p for p in metadata.distributions(name="fastrnn") if p.read_text("METADATA"))
    assert package.version == fastrnn.__version__
    requirements = package.requires
    release = ".".join(fastrnn.build_info()["torch"].split("+")[0].split(".")[:2])
    assert f"torch=={release}.*" in requirements
    for name in ("scikit-learn", "matplotlib", "tqdm"):
        assert any(r.startswith(name) and "extra == " in r and "demo" in r for r in requirements)


def import_under(torch_version: str) -> tuple[int, str]:
    """Imports fastrnn where torch says that it is `torch_version`; returns exit code and errors."""
    code = f"import torch; torch.__version__ = {torch_version!r}; import fastrnn"
    result = run_python("-c", code)
    return result.returncode, result.stderr


@pytest.mark.parametrize("version", ["2.99.0", "3.0.0+cu130", "2.12.1", "2.1.0", "2.130.0a0+git"])
def test_import_with_another_torch(version: str) -> None:
    code, errors = import_under(version)
    assert code != 0
    message = errors.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert version in message and fastrnn.build_info()["torch"] in message
    assert "pip install --no-build-isolation --no-cache-dir --force-reinstall" in message


def test_import_with_another_patch_of_torch() -> None:
    major, minor = torch.__version__.split(".")[:2]
    code, errors = import_under(f"{major}.{minor}.9+cpu")
    assert code == 0, errors
