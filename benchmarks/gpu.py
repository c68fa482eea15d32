"""Times fastrnn on a GPU against torch.nn (cuDNN), both of fastrnn's paths.

    python benchmarks/gpu.py --out gpu.json

Results are compared before they are timed. Times are medians by torch.utils.benchmark, the
implementations one after the other in rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

import fastrnn
from fastrnn.bench.arguments import file

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# (T, N, I, H): one stream, small batches of the published comparisons, and large ones.
SIZES = [
    (100, 1, 64, 64),
    (100, 1, 256, 256),
    (1024, 16, 768, 768),
    (256, 16, 256, 256),
    (256, 64, 512, 512),
    (100, 64, 1024, 1024),
    (100, 256, 512, 512),
]
ROUNDS = 5


def build(package: ModuleType, kind: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> nn.RNNBase:
    """Returns a module on the GPU, of `package`, with the weights of seed 0."""
    torch.manual_seed(0)
    return getattr(package, kind)(sizes[2], sizes[3], dtype=dtype, device="cuda")


def work(module: nn.RNNBase, x: torch.Tensor, mode: str, path: str) -> Callable[[], torch.Tensor]:
    """Returns one call of inference, or one training step."""

    def infer() -> torch.Tensor:
        os.environ["FASTRNN_CUDA_PATH"] = path
        with torch.inference_mode():
            return module(x)[0]

    def train() -> torch.Tensor:
        os.environ["FASTRNN_CUDA_PATH"] = path
        module.zero_grad(set_to_none=True)
        y = module(x)[0]
        y.sum().backward()
        return y

    return infer if mode == "inference" else train


def time_row(kind: str, dtype: str, sizes: tuple[int, ...], mode: str) -> dict[str, Any]:
    """Returns median times of a shape in a mode, in microseconds, and the largest difference."""
    x = torch.randn(*sizes[:3], dtype=DTYPES[dtype], device="cuda")
    ours, theirs = (build(package, kind, DTYPES[dtype], sizes) for package in (fastrnn, nn))
    runs = {
        "torch.nn": work(theirs, x, mode, "auto"),
        "auto": work(ours, x, mode, "auto"),
        "persistent": work(ours, x, mode, "persistent"),
        "stepwise": work(ours, x, mode, "stepwise"),
    }
    expected = runs["torch.nn"]().float()
    differences = [(run().float() - expected).abs().max() for run in runs.values()]
    difference = torch.stack(differences).max().item()  # NaN if any is
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _, (name, run) in itertools.product(range(ROUNDS), runs.items()):
        timer = Timer("run()", globals={"run": run})
        times[name].append(timer.blocked_autorange(min_run_time=0.1).median * 1e6)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "row": f"{kind}-{dtype}-T{sizes[0]}-N{sizes[1]}-H{sizes[3]}-{mode}",
        "us": medians,
        "ratio": medians["torch.nn"] / medians["auto"],
        "difference": difference,
    }


def main() -> int:
    """Runs the grid; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=file, metavar="FILE", help="JSON of all rows and the machine")
    output = parser.parse_args().out
    if not torch.cuda.is_available() or fastrnn.build_info()["cuda"] is None:
        print("there is no GPU, or fastrnn is built without CUDA", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{machine['gpu']}, torch {machine['torch']}; us, and torch.nn / fastrnn")
    rows = []
    grid = itertools.product(("LSTM", "RNN"), DTYPES, SIZES, ("inference", "training"))
    for kind, dtype, sizes, mode in grid:
        row = time_row(kind, dtype, sizes, mode)
        rows.append(row)
        figures = "  ".join(f"{name} {us:.0f}" for name, us in row["us"].items())
        print(f"{row['row']:40} {row['ratio']:5.2f}  {figures}  ({row['difference']:.1e})")
    if output:
        output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
