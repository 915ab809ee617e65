"""The main job on real input: compress a small residual network that reads handwritten digits (scikit-learn's, 8×8).

Trains the network, prunes it in steps with a little training after each (the paper's local scheme), lowers it,
fine-tunes the small network (the global scheme), prints one table and saves two pictures under ``demo/``.

Run it with ``make demo``, or ``python -m examples.digits``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import PercentFormatter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import models_zoo
import sgfx
from passes.layers.grouped import GroupedConv2d

RATIO, STEP, GROUPS = 0.75, 0.05, 8
DECAY = 1e-3  # 1,437 images are few: without it the pruned network learns them by heart
PICTURED = "layer3.1.conv2"
OUT = Path("demo")
EXAMPLE = torch.zeros(1, 1, 8, 8)

Batches = DataLoader[tuple[Tensor, ...]]


def main() -> None:
    """Train, prune step by step, lower, fine-tune; print the table and save the pictures."""
    torch.manual_seed(0)
    train, test = digits()
    model = models_zoo.create("resnet20", in_channels=1)

    print("Training the dense network")
    sgfx.Trainer(model, train, test, epochs=12, lr=0.1, schedule=(6, 10)).fit()
    accuracies = [(0.0, top1(model, test))]

    pruner = sgfx.Pruner(model, groups=GROUPS, ratio=RATIO, step=STEP)
    for step in (bar := tqdm(pruner, desc="Pruning, with local fine-tuning", unit="step")):
        sgfx.Trainer(pruner.model, train, epochs=1, lr=0.05, weight_decay=DECAY, progress=False).fit()
        accuracies.append((step.achieved_ratio, top1(pruner.model, test)))
        bar.set_postfix(pruned=f"{step.achieved_ratio:.0%}", top1=f"{accuracies[-1][1]:.1%}")
    masked = sgfx.report(model, pruner.model, EXAMPLE)
    small = pruner.lower()
    lowered, lowered_top1 = sgfx.report(model, small, EXAMPLE), top1(small, test)
    print("Fine-tuning the small network")
    sgfx.Trainer(small, train, test, epochs=16, lr=0.1, schedule="cosine", weight_decay=DECAY).fit()
    final = top1(small, test)

    ratios = lowered.connections_removed
    rows = [
        line("dense", accuracies[0][1], masked.params_dense, masked.macs_dense),
        line("masked", accuracies[-1][1], masked.params, masked.macs, ratios),
        line("lowered", lowered_top1, lowered.params, lowered.macs, ratios),
        line("fine-tuned", final, lowered.params, lowered.macs, ratios),
    ]
    head = ["network", "top-1", "parameters", "MACs", "asked to prune", "pruned"]
    print("\n" + tabulate(rows, head, colalign=["left"] + ["right"] * 5, disable_numparse=True))
    OUT.mkdir(exist_ok=True)
    picture_groups(small, OUT / "groups.png")
    picture_accuracy(accuracies, final, OUT / "accuracy.png")
    print(f"\nPictures: {OUT / 'groups.png'} (what {PICTURED} learned), {OUT / 'accuracy.png'}")


def digits() -> tuple[Batches, Batches]:
    """Scikit-learn's 1,797 digits in batches of images ``[N, 1, 8, 8]`` and labels: a fifth of them to test."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(inputs, torch.tensor(labels), test_size=0.2, random_state=0, stratify=labels)
    train, test = TensorDataset(parts[0], parts[2]), TensorDataset(parts[1], parts[3])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=len(test))


@torch.no_grad()
def top1(model: nn.Module, batches: Batches) -> float:
    """Share of images whose label gets the highest score."""
    model.eval()
    device = next(model.parameters()).device
    hits = [model(images.to(device)).argmax(1).cpu() == labels for images, labels in batches]
    model.train()
    return float(torch.cat(hits).float().mean())


def line(name: str, accuracy: float, parameters: int, macs: int, ratios: sgfx.Share | None = None) -> list[str]:
    """A line of the table: what the network holds and computes, and what was asked for and pruned."""
    shares = [f"{ratios.requested:.1%}", f"{ratios.achieved:.1%}"] if ratios else ["", ""]
    return [name, f"{accuracy:.1%}", f"{parameters:,}", f"{macs:,}", *shares]


def picture_groups(small: nn.Module, path: Path) -> None:
    """One layer's connections in the dense numbering, and regrouped: the block diagonal of the paper's Fig. 3 (d)."""
    layer, plan = small.get_submodule(PICTURED), sgfx.plans(small)[PICTURED]
    assert isinstance(layer, GroupedConv2d)
    filters, inputs = layer.filters, layer.inputs
    palette = torch.tensor(matplotlib.colormaps["tab10"](range(10)))[:, :3]
    colours = torch.empty(len(filters), 3, dtype=palette.dtype)
    colours[filters] = torch.cat([palette[g % 10].expand(size, 3) for g, (size, _) in enumerate(plan.block_sizes)])
    # White where pruned, the group's colour where strong.
    strength = layer.dense_weight().detach().abs().sum((2, 3))
    shown = 1 - (strength / strength.max()).sqrt()[..., None] * (1 - colours[:, None])

    blocks = torch.ones(len(filters), len(inputs), 3)
    row = column = 0
    for height, width in plan.block_sizes:
        rows, columns = filters[row : row + height], inputs[column : column + width]
        blocks[row : row + height, column : column + width] = shown[rows][:, columns]
        row, column = row + height, column + width

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(1, 2), layout="constrained")
    left.imshow(shown, aspect="auto", interpolation="nearest")
    left.set(title="Dense numbering", xlabel="input channel", ylabel="filter")
    right.imshow(blocks, aspect="auto", interpolation="nearest")
    right.set(title=f"Regrouped: {plan.groups} blocks", xlabel="inputs, group after group", ylabel="filters by group")
    figure.suptitle(f"{PICTURED}: {plan.achieved_ratio:.0%} of its connections pruned, colour = group")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def picture_accuracy(points: list[tuple[float, float]], final: float, path: Path) -> None:
    """Accuracy over the pruning steps, and after fine-tuning the small network."""
    pruned, accuracy = zip(*points, strict=True)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(pruned, accuracy, "o-", label="masked, after one epoch of local fine-tuning")
    axes.plot(pruned[-1], final, "*", markersize=14, label="lowered, after global fine-tuning")
    axes.axhline(accuracy[0], color="grey", linestyle=":", label="dense")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set(title="Digits: accuracy over pruning steps", xlabel="connections pruned", ylabel="top-1, test images")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
