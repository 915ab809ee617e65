"""`PruningCallback` for the Trainer of Hugging Face's transformers: the local + global scheme inside one ``train``."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from passes.errors import InputError
from sgfx.integrations.callback import ScheduledPruning

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "sgfx.integrations.transformers needs transformers: pip install 'sgfx[integrations]' (or transformers alone)"
    ) from error


class PruningCallback(ScheduledPruning, TrainerCallback):
    """Prunes the model of a ``Trainer.train`` in place, step by step, lowers it, and goes on; see `ScheduledPruning`.

    ::

        callback = PruningCallback(ratio=0.8, step=0.1, every_steps=500, example_inputs={"pixel_values": images})
        transformers.Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    Steps are those of ``state.global_step``. Any checkpoint of the run goes on as ever, with
    ``train(resume_from_checkpoint=…)`` on a fresh dense model and the same callback. The optimizer and its scheduler
    stay: at lowering, the new weights take the places of the old.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **held: Any) -> None:
        """Put masked layers into the model, before a checkpoint is loaded and the optimizer is made.

        Raises:
            InputError: the model, an option or the arguments do not allow it; says why.
        """
        problems = {
            "DeepSpeed": bool(args.deepspeed),
            "FSDP": bool(args.fsdp),
            "several processes": args.world_size > 1,
            "several GPUs in one process": args.n_gpu > 1,
        }
        for what, given in problems.items():
            if given:
                raise InputError(
                    f"PruningCallback can't work with {what}: the wrapper keeps the parameters that it found at the "
                    "start, and lowering makes new ones. Use one device, or prune in a loop of your own"
                )
        if args.torch_compile:
            raise InputError("PruningCallback can't work with torch_compile: prune first, compile the lowered model")
        self._attach(held["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say so where the run is too short."""
        self._begin(state.max_steps if self._when.unit == "steps" else state.num_train_epochs)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **held: Any) -> None:
        """Prune and lower where it is due."""
        now = state.global_step if self._when.unit == "steps" else int(state.epoch)
        raw: Optimizer = getattr(held["optimizer"], "optimizer", held["optimizer"])  # accelerate wraps it
        self._continue(now, [raw])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Warn where pruning is not complete."""
        self._finish()
