"""Steps a stack one frame at a time, with carried state: latency beside torch.nn's.

    python examples/streaming.py [--frames 2000] [--threads 1]

Prints the median and the 99th percentile of the time of one frame, batch 1, and checks that frame
by frame gives the bits of the whole sequence at once.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.bench.arguments import positive

LAYERS = 2
SIZES = [(16, 32), (64, 128), (64, 256), (128, 512)]  # features of a frame, hidden units
ROUND = 100  # frames in a row, so that each implementation finds its own weights in cache


def stream(module: nn.RNNBase, frames: Tensor, state: object, times: list[float]) -> object:
    """Feeds `frames` (T, 1, I) one by one; appends the seconds that each took to `times`."""
    for frame in frames.split(1):
        start = time.perf_counter()
        _, state = module(frame, state)
        times.append(time.perf_counter() - start)
    return state


def percentiles(times: list[float]) -> str:
    """Returns p50 and p99 in microseconds."""
    p50, p99 = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.99], dtype=torch.float64)
    )
    return f"{p50 * 1e6:9.1f} {p99 * 1e6:9.1f}"


def compare(kind: str, features: int, hidden: int, count: int) -> None:
    """Prints one line of the table."""
    theirs = getattr(nn, kind)(features, hidden, LAYERS).eval()
    ours = fastrnn.convert(theirs)
    frames = torch.randn(count, 1, features)

    few, state, parts = frames[:10], None, []
    for frame in few.split(1):
        y, state = ours(frame, state)
        parts.append(y)
    assert torch.equal(torch.cat(parts), ours(few)[0])

    times: dict[nn.RNNBase, list[float]] = {ours: [], theirs: []}
    states: dict[nn.RNNBase, object] = dict.fromkeys(times)
    for module in times:  # warm up
        stream(module, few, None, [])
    for chunk in frames.split(ROUND):
        for module, taken in times.items():
            states[module] = stream(module, chunk, states[module], taken)
    print(
        f"{kind:4}  {features:4} {hidden:5}  {percentiles(times[ours])}  "
        f"{percentiles(times[theirs])}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=positive, default=2000, help="of each row; default 2000")
    parser.add_argument("--threads", type=positive, default=1, help="threads for torch; default 1")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"us a frame, {LAYERS} layers, batch 1, float32, {options.threads} thread(s)")
    print("                   fastrnn              torch.nn")
    print("kind     I     H        p50       p99        p50       p99")
    with torch.inference_mode():
        for kind in ("RNN", "LSTM"):
            for features, hidden in SIZES:
                compare(kind, features, hidden, options.frames)


if __name__ == "__main__":
    main()
