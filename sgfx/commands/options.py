"""What can be said to `sgfx train`, `compress` and `evaluate`, by flags or in a config file; light to import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


def option(default: Any, text: str) -> Any:
    """A field with a default and its help."""
    if callable(default):
        factory: Callable[[], Any] = default
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def required(text: str, *, positional: bool = False) -> Any:
    """A field without a default."""
    return field(metadata={"help": text, "positional": positional})


@dataclass(frozen=True, kw_only=True)
class Common:
    """The model, the data, and where the run is kept."""

    model: str = required("a name of models_zoo, torchvision or timm, or package.module:function")
    data: str = required("a folder (train/ and val/ or test/; CIFAR; CUB-200; COCO's), or digits or synthetic")
    out: str = required("the folder of the run; the same command goes on with what is in it")
    task: Literal["classification", "detection"] = option("classification", "what the model does")
    model_options: dict[str, Any] = option(dict, "passed to the model's builder, as --model_options.num_classes 100")
    checkpoint: str | None = option(None, "trained weights: a state dict of torch.save, safetensors, or of sgfx.save")
    head: int | None = option(None, "put a new last linear layer for so many classes on the trained weights")
    download: Literal["cifar10", "cifar100"] | None = option(None, "fetch this data set into --data, if it isn't there")
    normalization: str | tuple[list[float], list[float]] | None = option(
        None, "imagenet, cifar10, cifar100, half or [means, deviations]; by default that of the data set"
    )
    image_size: int | None = option(None, "pixels a side; 224 for larger images, small ones as they are")
    batch_size: int | None = option(None, "of a step, over all processes; by default the recipe's")
    workers: int | None = option(None, "processes that read larger images; by default up to 4")
    mixup: float = option(0.0, "parameter of torchvision's MixUp, 0 is without")
    cutmix: float = option(0.0, "parameter of torchvision's CutMix, 0 is without")
    seed: int = option(0, "of everything random")
    progress: bool = option(True, "show progress bars")
    epochs: int | None = option(None, "of the (last) training; the schedule shrinks with it")
    lr: float | None = option(None, "base learning rate")
    schedule: str | list[int] | None = option(None, "constant, cosine, or epochs after which lr is divided by ten")
    iterations: int | None = option(None, "end training after so many batches")
    momentum: float | None = option(None, "of SGD")
    weight_decay: float | None = option(None, "L2 penalty")
    decay_norms: bool = option(True, "whether norms and biases have it too")
    label_smoothing: float = option(0.0, "share of the target that is spread over all classes")
    warmup: int = option(0, "epochs in which lr goes up first")
    accumulate: int = option(1, "batches whose gradients make one step")
    clip_norm: float | None = option(None, "largest norm of a gradient")
    ema: float | None = option(None, "decay of an average of the weights, such as 0.9998")
    patience: int | None = option(None, "end after so many epochs without a better result")
    checkpoint_steps: int | None = option(None, "a checkpoint after every so many steps, too")
    mixed_precision: Literal["bf16", "fp16"] | None = option(None, "of the computation; weights keep their type")
    tracker: Literal["tensorboard"] | None = option(None, "logs for TensorBoard")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Common):
    """`sgfx train`."""

    recipe: str | None = option(None, "where what isn't given comes from: cifar-baseline, or detection-baseline")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What shall remain."""

    macs: float | None = option(None, "share of the MACs that remains, instead of a ratio; needs --calibration")
    params: float | None = option(None, "share of the parameters that remains")


@dataclass(frozen=True, kw_only=True)
class Local:
    """The training after each pruning step."""

    epochs: int | None = option(None, "of training after each pruning step")
    lr: float | None = option(None, "learning rate after each pruning step")
    iterations: int | None = option(None, "batches of training after each pruning step, instead of epochs")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """`sgfx.distill` at the end, without labels."""

    steps: int = option(0, "without a recipe: steps towards the dense model's outputs on the --calibration images")
    lr: float = option(1e-3, "learning rate of these")


@dataclass(frozen=True, kw_only=True)
class CompressOptions(Common):
    """`sgfx compress`."""

    recipe: str | None = option(
        None, "cifar-global, cifar-local-global, imagenet-global, detection-global, …; by default no training"
    )
    groups: int | None = option(None, "groups per layer; by default the recipe's, or 8")
    ratio: float | None = option(None, "share of each layer's connections that is pruned")
    linear_ratio: float | None = option(None, "the same for linear layers")
    budget: Budget = option(Budget, "")
    ignore: list[str] = option(list, "names or patterns of layers to leave alone, as '[fc, *.downsample]'")
    overrides: dict[str, dict[str, float]] = option(dict, "ratio and groups of some layers, by name or pattern")
    criterion: Literal["l1", "l2"] = option("l1", "importance of a connection")
    eliminate: bool = option(False, "remove filters that nobody reads")
    calibration: int = option(0, "so many training images, without labels, to re-solve the kept weights on")
    step: float | None = option(None, "share that a pruning step prunes; by default the recipe's")
    local: Local = option(Local, "")
    teacher: bool = option(False, "train towards the dense model's outputs, in place of labels")
    distill: Distill = option(Distill, "")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """`sgfx evaluate`."""

    run: str = required("the folder of a run", positional=True)
    data: str | None = option(None, "other data than the run's")
    batch_size: int | None = option(None, "images at a time; by default the run's")
    workers: int | None = option(None, "processes that read larger images")
    json: bool = option(False, "print plain data")
