"""The Trainer of transformers with a `PruningCallback`: a checkpoint of any moment goes on to the same weights."""

from types import SimpleNamespace

import pytest
import torch

import sgfx
from passes.errors import InputError
from passes.layers.grouped import Grouped
from passes.layers.masked import Masked

transformers = pytest.importorskip("transformers")

from sgfx.integrations.transformers import PruningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

OPTIONS = {"groups": 4, "ratio": 0.6, "step": 0.2}  # three steps
STEPS = {"every_steps": [1, 3, 5], "lower_at": 7}
BATCHES = 4
IMAGES = torch.randn(8 * BATCHES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(10, (8 * BATCHES,), generator=torch.Generator().manual_seed(2))
DATA = [{"pixel_values": image, "labels": int(label)} for image, label in zip(IMAGES, LABELS, strict=True)]


def network():
    torch.manual_seed(0)
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
        )
    )


def arguments(folder, **options):
    return transformers.TrainingArguments(
        **{"max_steps": 10, "save_steps": 1, "save_strategy": "steps", "per_device_train_batch_size": 8, **options},
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        weight_decay=1e-2,
        learning_rate=1e-2,
        logging_strategy="no",
    )


def callback(**options):
    when = {} if "every_epochs" in options or "every_steps" in options else STEPS
    inputs = {"pixel_values": IMAGES[:2]}
    return PruningCallback(**{**OPTIONS, **when, "example_inputs": inputs, **options})


def trainer(folder, *callbacks, model=None, **options):
    model = network() if model is None else model
    return transformers.Trainer(model, arguments(folder, **options), train_dataset=DATA, callbacks=list(callbacks))


def assert_same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_a_checkpoint_of_any_moment_goes_on_to_the_same_run(tmp_path):
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
    }
    through = trainer(tmp_path, callback(), **options)
    through.train()
    assert any(isinstance(layer, Grouped) for layer in through.model.modules())
    for k in (1, 4, 5, 8):  # before the first step, between steps, at a step's moment, lowered
        pruning = callback()
        resumed = trainer(tmp_path, pruning, save_strategy="no", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{k}"))
        assert pruning.lowered
        assert_same(resumed.model, through.model)


def test_epochs_mixed_precision_and_a_part_of_the_model(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 4, "bf16": True}
    pruning = callback(every_epochs=1, module="resnet")
    through = trainer(tmp_path, pruning, **options)
    through.train()
    assert pruning.lowered
    again = callback(every_epochs=1, module="resnet")
    resumed = trainer(tmp_path, again, save_strategy="no", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same(resumed.model, through.model)


def test_the_whole_model_in_mixed_precision(tmp_path):
    pruning = callback()
    run = trainer(tmp_path, pruning, bf16=True, save_strategy="no")
    run.train()
    assert pruning.lowered
    fresh = network()
    sgfx.save(run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False), tmp_path / "small.safetensors")
    assert_same(sgfx.load(tmp_path / "small.safetensors", into=fresh), run.model)


def test_a_run_that_is_too_short_says_so_at_its_start_and_at_its_end(tmp_path):
    with pytest.warns(UserWarning, match=r"the run ends after 4 steps, before the pruning is complete.*step 0 of 3"):
        trainer(tmp_path, callback(), max_steps=4, save_strategy="no").train()
    with pytest.warns(UserWarning, match=r"the run is over, before the pruning is complete.*step 2 of 3"):
        trainer(tmp_path, callback(), max_steps=4, save_strategy="no").train()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("deepspeed", {"zero_optimization": {}}, "can't work with DeepSpeed"),
        ("fsdp", "full_shard", "can't work with FSDP"),
        ("world_size", 2, "can't work with several processes"),
        ("n_gpu", 2, "can't work with several GPUs in one process"),
        ("torch_compile", True, "torch_compile"),
    ],
)
def test_what_keeps_parameters_of_its_own_is_refused(name, value, message):
    given = {"deepspeed": None, "fsdp": [], "world_size": 1, "n_gpu": 0, "torch_compile": False}
    model = network()
    with pytest.raises(InputError, match=message):
        callback().on_init_end(SimpleNamespace(**{**given, name: value}), None, None, model=model)
    assert not any(isinstance(layer, Masked) for layer in model.modules())


def test_a_callback_that_comes_too_late_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.add_callback(callback())
    with pytest.raises(InputError, match="give it to the trainer when that is made"):
        run.train()


def test_other_moments_and_checkpoints_without_the_callback_are_refused(tmp_path):
    trainer(tmp_path / "with", callback(), max_steps=4).train()
    with pytest.raises(InputError, match=r"goes on at 4 steps with a model of pruning step 2, where .* make step 1"):
        trainer(tmp_path / "with", callback(every_steps=[1, 5, 7])).train(resume_from_checkpoint=True)
    trainer(tmp_path / "without", max_steps=2).train()
    with pytest.raises(InputError, match="saved without PruningCallback"):
        trainer(tmp_path / "without", callback()).train(resume_from_checkpoint=True)
