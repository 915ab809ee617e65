"""Lightning's fit with a `PruningCallback`: a checkpoint of any moment goes on to the same weights, bit for bit."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sgfx
from passes.errors import InputError
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging  # noqa: E402

from sgfx.integrations.lightning import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own

BATCHES = 4
OPTIONS = {"groups": 4, "ratio": 0.6, "step": 0.2}  # three steps
STEPS = {"every_steps": [1, 3, 5], "lower_at": 7}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class Module(lightning.LightningModule):
    def __init__(self, kind="sgd"):
        super().__init__()
        self.model, self.kind = network(), kind

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        weights = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": weights, "weight_decay": 1e-2}, {"params": others, "lr": 0.02}]
        if self.kind == "sgd":
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW(groups, lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5), "interval": "step"}]


class Loader:
    """Batches that go on in the middle of an epoch, as Lightning leaves to the loader."""

    def __init__(self):
        random = torch.Generator().manual_seed(1)
        self.images = torch.randn(BATCHES, 4, 3, 8, 8, generator=random)
        self.labels = torch.randint(10, (BATCHES, 4), generator=random)
        self.done = self.start = 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        first, self.start = self.start, 0
        for self.done in range(first + 1, BATCHES + 1):
            yield self.images[self.done - 1], self.labels[self.done - 1]

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"] % BATCHES


def trainer(folder, *callbacks, **options):
    return lightning.Trainer(
        **{"max_epochs": 3, "accelerator": "cpu", "logger": False, **options},
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
    )


def callback(**options):
    when = {} if "every_epochs" in options or "every_steps" in options else STEPS
    return PruningCallback(**{**OPTIONS, **when, **options})


def every_checkpoint(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def run_through(folder, kind="sgd", **options):
    module = Module(kind)
    trainer(folder, callback(), every_checkpoint(folder), **options).fit(module, Loader())
    return module


def assert_same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(("kind", "options"), [("sgd", {}), ("adamw", {"gradient_clip_val": 0.5})])
def test_a_checkpoint_of_any_moment_goes_on_to_the_same_run(tmp_path, kind, options):
    through = run_through(tmp_path, kind, **options)
    assert any(isinstance(layer, Grouped) for layer in through.modules())
    for k in (1, 2, 4, 5, 7, 8, 11):  # before the first step, between steps, at a step's moment, lowered
        assert_same(resumed(tmp_path, k, kind, **options), through)


def resumed(folder, k, kind="sgd", pruning=None, **options):
    module, pruning = Module(kind), callback() if pruning is None else pruning
    path = folder / f"step={k}.ckpt"
    trainer(folder, pruning, **options).fit(module, Loader(), ckpt_path=path, weights_only=True)
    assert pruning.lowered
    return module


def resume_and_save(folder, k):
    """In a process of its own."""
    torch.save(resumed(folder, k).state_dict(), folder / f"weights-{k}.pt")


def test_a_new_process_goes_on_to_the_same_run(tmp_path):
    through = run_through(tmp_path).state_dict()
    program = f"""
import pathlib, sys, torch, warnings
warnings.simplefilter("ignore")
torch.set_num_threads({torch.get_num_threads()})
sys.path.insert(0, {str(Path(__file__).parent)!r})
from {Path(__file__).stem} import resume_and_save
for k in (4,):
    resume_and_save(pathlib.Path({str(tmp_path)!r}), k)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    for k in (4,):
        state = torch.load(tmp_path / f"weights-{k}.pt")
        assert all(torch.equal(value, state[name]) for name, value in through.items())


def test_epochs_accumulation_and_a_part_of_the_module(tmp_path):
    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            layer = pl_module.model[3]
            seen.append("lowered" if isinstance(layer, Grouped) else round(1 - float(layer.mask.float().mean()), 1))

    pruning = callback(every_epochs=1, lower_at=4, module="model")
    options = {"max_epochs": 5, "accumulate_grad_batches": 3}  # 4 batches: epochs end amid an accumulation
    through = Module()
    trainer(tmp_path, pruning, Watch(), every_checkpoint(tmp_path), **options).fit(through, Loader())
    assert seen == [0.2] * 4 + [0.4] * 4 + [0.6] * 8 + ["lowered"] * 4
    for k in (2, 5, 9):
        again = callback(every_epochs=1, lower_at=4, module="model")
        assert_same(resumed(tmp_path, k, pruning=again, **options), through)


def test_pruning_steps_are_those_of_a_pruner(tmp_path):
    pruner = sgfx.Pruner(network(), **OPTIONS)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=0.0)
    for _ in pruner:
        optimizer.step()
    expected = pruner.lower()

    class Still(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module = Still()
    module.model[1].momentum = 0.0
    trainer(tmp_path, callback()).fit(module, Loader())
    for mine, theirs in zip(module.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_run_that_is_too_short_says_so_at_its_start_and_at_its_end(tmp_path):
    with pytest.warns(UserWarning, match=r"the run ends after 4 steps, before the pruning is complete.*step 0 of 3"):
        trainer(tmp_path, callback(), max_epochs=1).fit(Module(), Loader())
    with pytest.warns(UserWarning, match=r"the run ends after 2 epochs, before .*lowered at 2 epochs"):
        trainer(tmp_path, callback(every_epochs=1), max_epochs=2).fit(Module(), Loader())
    with pytest.warns(UserWarning, match=r"the run is over, before .*step 2 of 3"):
        trainer(tmp_path, callback(every_epochs=1), max_epochs=-1, max_steps=8).fit(Module(), Loader())


def test_a_checkpoint_of_other_moments_is_refused(tmp_path):
    run_through(tmp_path)
    for options, k, message in (
        ({"every_steps": [1, 5, 7]}, 4, r"goes on at 4 steps with a model of pruning step 2, where .* make step 1"),
        ({"every_steps": [1, 3, 5], "lower_at": 9}, 8, r"goes on at 8 steps with a model of pruning step 3, lowered"),
        ({"every_steps": [1, 3, 5]}, 6, r"goes on at 6 steps with a model of pruning step 3, where"),
        ({"ratio": 0.7, "every_steps": [1, 3, 5, 7]}, 8, "another ratio, step or overrides|moments"),
    ):
        with pytest.raises(InputError, match=message):
            resumed(tmp_path, k, pruning=callback(**options))


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    trainer(tmp_path, every_checkpoint(tmp_path), max_epochs=1).fit(Module(), Loader())
    with pytest.raises(InputError, match=r"saved without PruningCallback"):
        resumed(tmp_path, 2)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([EMAWeightAveraging()], {}, "EMAWeightAveraging averages a copy .* average in a second fit"),
        ([StochasticWeightAveraging(0.1)], {}, "StochasticWeightAveraging averages a copy"),
        ([], {"strategy": "ddp"}, "can't work under DDPStrategy"),
    ],
)
def test_what_keeps_parameters_of_its_own_is_refused(tmp_path, callbacks, options, message):
    module = Module()
    run = trainer(tmp_path, callback(), *callbacks)
    if options:
        run.strategy.__class__ = lightning.strategies.DDPStrategy  # no process is started
    with pytest.raises(InputError, match=message):
        callback().setup(run, module, "fit")
    assert not any(isinstance(layer, Masked) for layer in module.modules())


def test_models_that_are_compiled_already_are_refused(tmp_path):
    with pytest.raises(InputError, match="compiled by torch"):
        trainer(tmp_path, callback()).fit(torch.compile(Module()), Loader())
    module = Module()
    module.model.compile()
    with pytest.raises(InputError, match="compiled by torch"):
        trainer(tmp_path, callback(module="model")).fit(module, Loader())
    module = Module()
    module.model = sgfx.compile(network(), groups=4, ratio=0.5)
    with pytest.raises(InputError):
        trainer(tmp_path, callback()).fit(module, Loader())
    with pytest.raises(InputError, match="Module has no module 'backbone'"):
        trainer(tmp_path, callback(module="backbone")).fit(Module(), Loader())


def test_a_second_fit_goes_on_with_the_same_model(tmp_path):
    pruning, module = callback(), Module()
    trainer(tmp_path, pruning).fit(module, Loader())
    before = copy.deepcopy(module.state_dict())
    trainer(tmp_path, pruning).fit(module, Loader())
    assert module.state_dict().keys() == before.keys()
    sgfx.save(module.model, tmp_path / "small.safetensors")
    assert_same(sgfx.load(tmp_path / "small.safetensors", into=network()), module.model)
