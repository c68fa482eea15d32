"""Builds fastrnn's extension modules. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

if sys.platform != "linux":
    raise SystemExit("fastrnn builds on Linux only")

try:
    import pybind11
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    if not isinstance(error, ModuleNotFoundError):
        raise SystemExit(
            f"fastrnn compiles against torch, which does not import: {error}"
        ) from None
    raise SystemExit(
        f"fastrnn compiles against the torch that you use, and {error.name} is missing: install it "
        "with `pip install torch ninja pybind11 'setuptools>=77'`, then run "
        "`pip install --no-build-isolation .`"
    ) from None

# What a build runs with: torch's C++ ABI is the same within a minor release only.
TORCH_RELEASE = ".".join(torch.__version__.split("+")[0].split(".")[:2])
if tuple(map(int, TORCH_RELEASE.split("."))) < (2, 10):
    raise SystemExit(
        f"fastrnn needs torch 2.10 or newer, and torch {torch.__version__} is installed"
    )

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
).group(1)

X86 = platform.machine() == "x86_64"
# One object of each kernel source for each instruction set; which one runs is chosen at load.
# -march: CFLAGS, or the compiler's default, may ask for more than every processor has.
ISA_FLAGS: dict[str, list[str]] = {"baseline": ["-march=x86-64"] if X86 else []}
if X86:
    ISA_FLAGS["avx2"] = [*ISA_FLAGS["baseline"], "-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
    ISA_FLAGS["amx_fp16"] = [*ISA_FLAGS["amx"], "-DFASTRNN_AMX_FP16"]  # GCC 12 knows no -mamx-fp16
KERNELS = [
    f"csrc/cpu/{name}.cpp"
    for name in ("product", "forward", "backward", "outer_product", "row_product", "pack", "table")
]
OPS = [
    *("arguments", "autocast", "autograd", "call_memory", "cell", "contention", "derivatives"),
    *("distance", "isa", "ops", "plan", "reference", "reference_ops", "reference_strand"),
    *("run_backward", "run_forward", "vmap"),
]
CUDA_OPS = ["cuda_ops", "gpu_backward", "gpu_forward", "gpu_plan", "gpu_tensors"]
CUDA_KERNELS = ["persistent_backward", "persistent_forward", "pointwise", "rows"]
# Tensor cores take bfloat16, and cooperative launches reach far enough, from here on.
LOWEST_CUDA_ARCH = 8.0
# Code of each runs on its later minor revisions too; for other GPUs the driver compiles the PTX,
# and their first calls wait for that.
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
BLACKWELL_ARCHS, BLACKWELL_TOOLKIT = ";10.0;12.0", (12, 8)

# Messages name the source that they come from: as torch/include/... and csrc/..., not by where
# these lie on the machine that builds.
TORCH = Path(torch.__file__).parents[1]
FOLDERS = [f"{folder}/" for path in (ROOT, TORCH) for folder in {path.absolute(), path.resolve()}]
COMMON_FLAGS = [
    *("-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"),
    "-DNDEBUG",  # Python's own flags have it, but CFLAGS in the environment replaces those
    *(f"-ffile-prefix-map={folder}=" for folder in FOLDERS),
]
# No contraction: every multiply-add is written as one, so that all instruction sets that have it
# give the same bits.
KERNEL_FLAGS = ["-std=c++17", *COMMON_FLAGS, "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"]
# torch's thread pool is OpenMP, behind inline functions; the runtime is the one that torch loads.
OPS_FLAGS = [*COMMON_FLAGS, "-fopenmp", "-Wno-unused-parameter"]
# -lineinfo: a profiler shows source lines; it costs no speed.
NVCC_FLAGS = ["-O3", "-std=c++17", "-lineinfo"]


def find_commit() -> str | None:
    """Returns the commit that is built, with "-dirty" if files differ; None outside a checkout."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    # A .git of its own: sources unpacked within another repository are not that one's commit.
    if not (ROOT / ".git").exists():
        return None
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or one that distrusts the folder
        return None


def find_cuda_headers() -> Path | None:
    """Returns the folder of the toolkit's headers; conda's toolkits have one for each platform."""
    home = Path(CUDA_HOME or "")
    folders = [home / "include", *sorted(home.glob("targets/*/include"))]
    has_headers = (folder for folder in folders if (folder / "cuda_runtime.h").exists())
    return next(has_headers, None) if (home / "bin" / "nvcc").exists() else None


def choose_cuda_archs(toolkit: str) -> None:
    """Gives TORCH_CUDA_ARCH_LIST a default, or takes off it what is too old for the kernels.

    Containers come with a list for all GPUs; on the old ones torch.nn computes.
    """
    knows_blackwell = tuple(map(int, toolkit.split("."))) >= BLACKWELL_TOOLKIT
    default = DEFAULT_CUDA_ARCHS + (BLACKWELL_ARCHS if knows_blackwell else "")
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;") or default
    found = {name: numbers_of(name) for name in re.split(r"[ ;]+", archs)}
    kept = [name for name, numbers in found.items() if min(numbers) >= LOWEST_CUDA_ARCH]
    if not kept:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST is {archs}, but fastrnn's CUDA kernels need compute capability "
            f"{LOWEST_CUDA_ARCH} (A100) or later; FASTRNN_CUDA=0 builds for the CPU alone"
        )
    if left_out := [name for name in found if name not in kept]:
        print(f"fastrnn: no CUDA kernels for {', '.join(left_out)}, where torch.nn computes")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(kept)


def numbers_of(arch: str) -> list[float]:
    """Returns the compute capabilities of a name in TORCH_CUDA_ARCH_LIST: "9.0+PTX", "Hopper"."""
    os.environ["TORCH_CUDA_ARCH_LIST"] = arch
    try:
        flags = " ".join(cpp_extension._get_cuda_arch_flags())
    except (ValueError, IndexError) as error:  # IndexError: "native", where there is no GPU
        raise SystemExit(
            f"torch does not understand TORCH_CUDA_ARCH_LIST={arch}: {error}"
        ) from None
    return [int(number) / 10 for number in re.findall(r"compute_(\d+)", flags)]


def find_cuda() -> str | None:
    """Returns the release of CUDA to build for, or None for a CPU build.

    FASTRNN_CUDA decides: 0 never, 1 always (or stop), auto where torch and a toolkit have it; one
    that does not fit torch is an error. No GPU is needed to build. TORCH_CUDA_ARCH_LIST is torch's
    own; here it has a default, and GPUs too old for the kernels are left out.
    """
    wish = os.environ.get("FASTRNN_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"FASTRNN_CUDA must be 0, 1 or auto, got {wish!r}")
    missing = None
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif not find_cuda_headers():
        missing = (
            f"no CUDA toolkit was found: CUDA_HOME is {CUDA_HOME}, and must be a folder with "
            "bin/nvcc and include/cuda_runtime.h"
        )
    if wish == "0":
        return None
    if missing and wish == "auto":
        print(f"fastrnn: building for the CPU alone: {missing}")
        return None
    if missing:
        raise SystemExit(f"FASTRNN_CUDA=1, but {missing}")
    nvcc = [f"{CUDA_HOME}/bin/nvcc", "--version"]
    report = subprocess.run(nvcc, capture_output=True, text=True, check=True).stdout
    toolkit = re.search(r"release (\d+\.\d+)", report).group(1)
    if toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise SystemExit(
            f"the CUDA toolkit in {CUDA_HOME} is release {toolkit}, but torch {torch.__version__} "
            f"is built for CUDA {torch.version.cuda}: set CUDA_HOME to a toolkit of the same major "
            "release, or FASTRNN_CUDA=0 to build for the CPU alone"
        )
    choose_cuda_archs(toolkit)
    return toolkit


class BuildKernels(BuildExtension):
    """Compiles the kernels once for each instruction set, and the rest as torch does."""

    def initialize_options(self) -> None:
        """Keeps objects in one place, so that the next build compiles only what changed."""
        super().initialize_options()
        self.build_temp = str(ROOT / "build" / f"temp.torch-{torch.__version__}")

    def finalize_options(self) -> None:
        """Links anew each time: setuptools alone does not see that a kernel has changed."""
        super().finalize_options()
        self.force = True

    def build_extensions(self) -> None:
        """Stops where the compiler is not g++, or too old for the kernels' instructions."""
        compiler = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
        try:
            done = subprocess.run(compiler, capture_output=True, text=True, check=False)
        except OSError as error:
            raise SystemExit(f"fastrnn needs g++ (set CXX): {error}") from None
        if "clang" in done.stdout:
            raise SystemExit(
                "fastrnn needs g++ (set CXX): clang would link an OpenMP runtime of its own beside "
                f"torch's. {' '.join(compiler)} says: {done.stdout.splitlines()[0]}"
            )
        found = re.search(r"\) (\d+)\.", done.stdout)  # g++ (Debian 12.2.0-14) 12.2.0
        if found and int(found[1]) < 11:
            raise SystemExit(
                "fastrnn needs g++ 11 or newer (set CXX): "
                f"{' '.join(compiler)} says: {done.stdout.splitlines()[0]}"
            )
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Adds the kernels' objects to the ops."""
        if ext.name == "fastrnn._ops":
            for isa, flags in ISA_FLAGS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(ROOT / source) for source in KERNELS],
                    output_dir=os.path.join(self.build_temp, isa),
                    extra_postargs=[*KERNEL_FLAGS, f'-DFASTRNN_SET="{isa}"', *flags],
                )
        super().build_extension(ext)


CUDA = find_cuda()
COMMIT = find_commit()
SOURCES = ["csrc/cpu/dispatch.cpp", *(f"csrc/{name}.cpp" for name in OPS)]
if CUDA:
    SOURCES += [f"csrc/{name}.cpp" for name in CUDA_OPS]
    SOURCES += [f"csrc/cuda/{name}.cu" for name in CUDA_KERNELS]

setup(
    version=VERSION,
    install_requires=[f"torch=={TORCH_RELEASE}.*"],
    ext_modules=[
        Extension(
            "fastrnn._build_info",
            ["csrc/build_info.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[
                ("FASTRNN_VERSION", VERSION),
                ("FASTRNN_TORCH_VERSION", torch.__version__),
                *([("FASTRNN_COMMIT", COMMIT)] if COMMIT else []),
                *([("FASTRNN_CUDA_VERSION", CUDA)] if CUDA else []),
            ],
            extra_compile_args=["-std=c++17", *COMMON_FLAGS],
            language="c++",
        ),
        (CUDAExtension if CUDA else CppExtension)(
            "fastrnn._ops",
            SOURCES,
            include_dirs=[
                str(ROOT.resolve() / "csrc/torch_json"),
                *([str(find_cuda_headers())] if CUDA else []),
            ],
            define_macros=[("FASTRNN_X86", None)] if X86 else [],
            extra_compile_args={"cxx": OPS_FLAGS, "nvcc": NVCC_FLAGS},
        ),
        CppExtension("fastrnn._direct", ["csrc/direct.cpp"], extra_compile_args=OPS_FLAGS),
    ],
    cmdclass={"build_ext": BuildKernels},
)
