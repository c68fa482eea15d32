"""What test_fuzz.py runs in a process of its own: `python shapes_worker.py SEED CALLS`.

Inference and training of random shapes, whose working memory has guards (Arena in csrc/arena.h).
"""

import random
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

MOST_WORK = 1e8  # multiply-adds of a call
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw_size(rng: random.Random) -> int:
    """A number of features: any, or one that fills vectors, panels or spans of the kernels."""
    unit, most = rng.choice([(1, 40), (1, 700), (16, 40), (64, 8), (256, 3)])
    return unit * rng.randint(1, most)


def draw_call(rng: random.Random) -> dict:
    """A module, its input, and how it is called."""
    kind = rng.choice(["LSTM", "RNN"])
    hidden = draw_size(rng)
    options = {
        "input_size": draw_size(rng),
        "hidden_size": hidden,
        "num_layers": rng.choice([1, 2, 2, 3]),
        "bidirectional": rng.random() < 0.4,
        "dtype": rng.choice(DTYPES),
    }
    if kind == "LSTM" and hidden > 1 and rng.random() < 0.3:
        options["proj_size"] = rng.randint(1, hidden - 1)
    return {
        "kind": kind,
        "options": options,
        "steps": rng.choice([*range(1, 13), 20, 40]),
        "batch": rng.choice([*range(1, 9), 12, 17, 33, 64]),
        "packed": rng.random() < 0.3,
        "trains": rng.random() < 0.7,
        "wants_dx": rng.random() < 0.5,
        "threads": rng.choice([1, 1, 2, 3]),
        "precision": rng.choice(["highest", "high", "medium"]),
    }


def work(call: dict) -> float:
    """Multiply-adds of a pass, about."""
    options = call["options"]
    width = options["hidden_size"] * (4 if call["kind"] == "LSTM" else 1)
    weights = options["num_layers"] * width * (options["input_size"] + options["hidden_size"])
    return weights * call["steps"] * call["batch"]


def make(rng: random.Random, call: dict) -> None:
    """Makes the call.

    Raises:
        RuntimeError: a kernel wrote past its working memory.
    """
    torch.set_num_threads(call["threads"])
    torch.set_float32_matmul_precision(call["precision"])
    options = call["options"]
    module = getattr(fastrnn, call["kind"])(**options)
    x = torch.randn(call["steps"], call["batch"], options["input_size"], dtype=options["dtype"])
    x.requires_grad_(call["wants_dx"] and call["trains"])
    given = x
    if call["packed"]:
        lengths = [
            call["steps"],
            *(rng.randint(1, call["steps"]) for _ in range(call["batch"] - 1)),
        ]
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.set_grad_enabled(call["trains"]):
        y = module(given)[0]
    y = y.data if call["packed"] else y
    assert y.isfinite().all()
    if not call["trains"]:
        return
    y.float().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in module.parameters())


def main() -> None:
    """Makes CALLS calls, and notes each before, for whoever finds this process dead."""
    seed, calls = sys.argv[1:]
    rng = random.Random(int(seed))
    torch.manual_seed(int(seed))
    done = 0
    while done < int(calls):
        call = draw_call(rng)
        if work(call) > MOST_WORK:
            continue
        Path(f"shapes-{seed}").write_text(f"{call}", encoding="utf-8")
        make(rng, call)
        done += 1


if __name__ == "__main__":
    main()
