"""Builds fastrnn's extension modules. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from setuptools import Extension, setup

try:
    import pybind11
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"fastrnn compiles against the torch that you use, and {error.name} is missing: install it "
        "with `pip install torch ninja pybind11 setuptools`, then run "
        "`pip install --no-build-isolation .`"
    ) from None

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M
).group(1)

X86 = platform.machine() in ("x86_64", "AMD64")
# One object of each kernel source for each instruction set; which one runs is chosen at load.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
KERNELS = [
    f"csrc/cpu/{name}.cpp" for name in ("product", "forward", "backward", "gradients", "pack")
]
OPS = [
    *("arguments", "autocast", "autograd", "cell", "ops", "plan", "reference"),
    *("run_backward", "run_forward"),
]

# Messages name the source that they come from: as torch/include/... and csrc/..., not by where
# these lie on the machine that builds.
FOLDERS = [f"{ROOT.resolve()}/", f"{Path(torch.__file__).resolve().parents[1]}/"]
COMMON_FLAGS = [
    *("-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden"),
    *(f"-ffile-prefix-map={folder}=" for folder in FOLDERS),
]
# No contraction: every multiply-add is written as one, so that all instruction sets that have it
# give the same bits.
KERNEL_FLAGS = ["-std=c++17", *COMMON_FLAGS, "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"]
# torch's thread pool is OpenMP, behind inline functions; the runtime is the one that torch loads.
OPS_FLAGS = [*COMMON_FLAGS, "-fopenmp", "-Wno-unused-parameter"]


# What a build runs with: torch's C++ ABI is the same within a minor release only.
TORCH_RELEASE = ".".join(torch.__version__.split("+")[0].split(".")[:2])


class BuildKernels(BuildExtension):
    """Compiles the kernels once for each instruction set, and the rest as torch does."""

    def finalize_options(self) -> None:
        """Keeps objects in one place, so that the next build compiles only what changed."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / f"temp.torch-{torch.__version__}")

    def build_extension(self, ext: Extension) -> None:
        """Adds the kernels' objects to the ops."""
        if ext.name == "fastrnn._ops":
            for isa, flags in ISA_FLAGS.items():
                ext.extra_objects += self.compiler.compile(
                    [str(ROOT / source) for source in KERNELS],
                    output_dir=os.path.join(self.build_temp, isa),
                    extra_postargs=[*KERNEL_FLAGS, *flags],
                )
        super().build_extension(ext)


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
            ],
            extra_compile_args=["-std=c++17", *COMMON_FLAGS],
            language="c++",
        ),
        CppExtension(
            "fastrnn._ops",
            ["csrc/cpu/dispatch.cpp", *(f"csrc/{name}.cpp" for name in OPS)],
            define_macros=[("FASTRNN_X86", None)] if X86 else [],
            extra_compile_args=OPS_FLAGS,
        ),
    ],
    cmdclass={"build_ext": BuildKernels},
)
