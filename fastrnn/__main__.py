"""The demo, `python -m fastrnn`: fastrnn beside torch.nn, on small calls and on real data."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrnn
from fastrnn.bench.arguments import file, picture_problem, positive
from fastrnn.bench.timing import alternate, cpu_timer, ratio

EXTRA = {"scikit-learn": "sklearn", "matplotlib": "matplotlib", "tqdm": "tqdm"}

# The calls of a PyTorch tutorial on recurrent networks: class name and options.
TUTORIAL_CALLS = [
    ("RNN", {}),
    ("RNN", {"num_layers": 2}),
    ("RNN", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"num_layers": 2}),
]


def infer(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Runs `module` without grad; returns [y, h_n] of an RNN, [y, h_n, c_n] of an LSTM."""
    with torch.no_grad():
        y, hidden = module(x)
    return [y, *hidden] if isinstance(hidden, tuple) else [y, hidden]


def train(module: nn.Module, x: Tensor) -> None:
    """Runs `module` forward and backward."""
    module(x)[0].sum().backward()


def speed_ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """Returns how many times as fast `ours` is as `theirs`, the two timed in turn."""
    threads = torch.get_num_threads()
    timers = {"ours": cpu_timer(ours, threads), "theirs": cpu_timer(theirs, threads)}
    times = alternate(timers, seconds=0.1)
    return ratio(times["theirs"], times["ours"]).median


def compare_tutorial_calls() -> None:
    """Prints shapes, largest difference and speed ratios of the tutorial's four calls."""
    torch.manual_seed(0)
    x = torch.randn(1, 10, 5)
    print("The tutorial's four calls, each with batch_first=True, on x of shape (1, 10, 5)")
    print("(inference, training: how many times as fast as torch.nn)\n")
    print(f"{'call':<44}{'y':<13}{'h_n':<12}{'difference':<12}{'inference':<11}training")
    for name, options in TUTORIAL_CALLS:
        ours = getattr(fastrnn, name)(5, 8, batch_first=True, **options)
        theirs = getattr(nn, name)(5, 8, batch_first=True, **options)
        theirs.load_state_dict(ours.state_dict())

        results = infer(ours, x)
        pairs = zip(results, infer(theirs, x), strict=True)
        difference = max((a - b).abs().max().item() for a, b in pairs)
        ratios = [speed_ratio(partial(f, ours, x), partial(f, theirs, x)) for f in (infer, train)]

        call = f"{name}(5, 8{''.join(f', {key}={value}' for key, value in options.items())})"
        y_shape, h_shape = (str(tuple(result.shape)) for result in results[:2])
        print(f"{call:<44}{y_shape:<13}{h_shape:<12}{difference:<12.0e}", end="")
        print(f"{f'{ratios[0]:.1f}x':<11}{ratios[1]:.1f}x")


class Classifier(nn.Module):
    """Reads an image row by row with an LSTM and names the digit from its last state."""

    def __init__(self, lstm_class: Callable[..., nn.Module], hidden_size: int = 64) -> None:
        super().__init__()
        self.lstm = lstm_class(8, hidden_size, batch_first=True)
        self.head = nn.Linear(hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (N, 8, 8) to class scores (N, 10)."""
        _, (h_n, _) = self.lstm(images)
        return self.head(h_n[-1])


@dataclass
class Digits:
    """scikit-learn's handwritten digits: images (N, 8, 8) in [0, 1] and labels (N,)."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """What one training run left behind."""

    name: str
    losses: list[float] = field(default_factory=list)  # the mean of each epoch
    seconds: float = 0.0
    accuracy: float = 0.0


def load_data() -> Digits:
    """Returns the 1,797 digits, a quarter of them held out for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        torch.tensor(images / 16, dtype=torch.float32).view(-1, 8, 8),
        torch.tensor(labels),
        test_size=0.25,
        random_state=0,
        stratify=labels,
    )
    return Digits(*parts)


def fit(name: str, lstm_class: Callable[..., nn.Module], digits: Digits, epochs: int) -> Run:
    """Trains a classifier; the seed is fixed, so that each class starts and shuffles alike."""
    from tqdm import tqdm

    torch.manual_seed(0)
    model = Classifier(lstm_class)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    run = Run(name)
    start = time.perf_counter()
    for _ in (progress := tqdm(range(epochs), desc=f"{name:<12}", unit="epoch", ncols=90)):
        total = 0.0
        for batch in torch.randperm(len(digits.train_images)).split(32):
            loss = cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        run.losses.append(total / len(digits.train_images))
        progress.set_postfix(loss=f"{run.losses[-1]:.4f}")
    run.seconds = time.perf_counter() - start
    with torch.no_grad():
        guesses = model(digits.test_images).argmax(dim=1)
    run.accuracy = (guesses == digits.test_labels).float().mean().item()
    return run


def print_runs(runs: list[Run]) -> None:
    """Prints the loss curves side by side, then accuracies and times."""
    epochs = len(runs[0].losses)
    shown = sorted({*range(1, epochs + 1, max(1, epochs // 8)), epochs})
    rows = [("loss at epoch", [str(epoch) for epoch in shown])]
    rows += [(run.name, [f"{run.losses[epoch - 1]:.4f}" for epoch in shown]) for run in runs]
    print()
    for label, cells in rows:
        print(f"{label:<16}" + "".join(f"{cell:>8}" for cell in cells))
    print(f"\n{'':<16}{'test accuracy':>14}{'time':>9}")
    for run in runs:
        print(f"{run.name:<16}{run.accuracy:>14.1%}{run.seconds:>7.1f} s")


def plot_runs(runs: list[Run], out: Path) -> None:
    """Saves the loss curves of `runs` as an image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for run, style in zip(runs, ["-", "--"], strict=True):
        label = f"{run.name}: test accuracy {run.accuracy:.1%}, {run.seconds:.1f} s"
        epochs = range(1, len(run.losses) + 1)
        axes.semilogy(epochs, run.losses, style, marker=".", linewidth=2, label=label)
    axes.set(title="Handwritten digits, read row by row", xlabel="epoch", ylabel="training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(
        prog="python -m fastrnn",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=positive, default=40, help="passes over the digits")
    parser.add_argument(
        "--out", type=file, default=Path("fastrnn_demo.png"), help="where the plot goes"
    )
    parser.add_argument("--threads", type=positive, default=1, help="threads for torch")
    args = parser.parse_args()
    missing = [name for name, module in EXTRA.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"The demo needs more packages: pip install {' '.join(missing)}")
    if problem := picture_problem(args.out):
        parser.error(f"--out {problem}")
    torch.set_num_threads(args.threads)

    capability = fastrnn.build_info()["cpu_capability"]
    print(f"fastrnn {fastrnn.__version__}, torch {torch.__version__}, {capability}, ", end="")
    print(f"{args.threads} thread{'s' if args.threads > 1 else ''}\n")
    compare_tutorial_calls()

    digits = load_data()
    print("\nHandwritten digits, 8 rows of 8 pixels each: ", end="")
    print(f"{len(digits.train_images):,} to train on, {len(digits.test_images):,} to test\n")
    classes = {"nn.LSTM": nn.LSTM, "fastrnn.LSTM": fastrnn.LSTM}
    runs = [fit(name, lstm, digits, args.epochs) for name, lstm in classes.items()]
    print_runs(runs)
    plot_runs(runs, args.out)
    print(f"\nThe loss curves are in {args.out}.")


if __name__ == "__main__":
    main()
