"""Averages of weights, as the world makes them: an average of equal models is the model."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

import sgfx
from passes.layers.structured import Structured

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DECAYS = [0.9, 0.99, 0.9995, 0.9999, 0.99998]
UPDATES = 5


def dense():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )
    return model.eval()


def compiled():
    return sgfx.compile(dense(), groups=4, ratio=0.6)


def pruner():
    return sgfx.Pruner(dense(), groups=4, ratio=0.6, step=0.2)


def masked():
    each = pruner()
    for step in each:
        if step.index == 2:
            break
    return each.model


@pytest.fixture(params=[compiled, masked])
def model(request):
    return request.param()


@torch.no_grad()
def assert_is(average, model, bound):
    """The structure bit for bit, values and outputs up to the rounding of the average itself."""
    layers = [[m for m in each.modules() if isinstance(m, Structured)] for each in (average, model)]
    for mine, theirs in zip(*layers, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in theirs.TABLES)
        assert torch.equal(mine.get_extra_state(), theirs.get_extra_state())
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        assert float((mine - theirs).abs().max()) <= bound * float(theirs.abs().max())
    expected = model(IMAGES)
    assert float((average.eval()(IMAGES) - expected).abs().max()) <= 10 * bound * float(expected.abs().max())
    twin = copy.deepcopy(model)
    twin.load_state_dict(average.state_dict())
    assert float((twin(IMAGES) - expected).abs().max()) <= 10 * bound * float(expected.abs().max())


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
def test_averages_of_torch_by_many_and_by_one(model, decay, use_buffers):
    many = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers)
    one = AveragedModel(model, avg_fn=get_ema_avg_fn(decay), use_buffers=use_buffers)
    for _ in range(UPDATES):
        many.update_parameters(model)
        one.update_parameters(model)
    assert_is(many.module, model, 0)
    assert_is(one.module, model, 1e-6)


@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("options", [{}, {"avg_fn": get_swa_avg_fn()}])
def test_plain_averages_of_torch(model, options, use_buffers):
    average = AveragedModel(model, use_buffers=use_buffers, **options)
    for _ in range(UPDATES):
        average.update_parameters(model)
    assert_is(average.module, model, 0)
    update_bn([IMAGES], average)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_averages_of_timm(model, name, decay):
    utils = pytest.importorskip("timm.utils")
    average = getattr(utils, name)(model, decay=decay)
    for _ in range(UPDATES):
        average.update(model)
    assert_is(average.ema if name == "ModelEma" else average.module, model, 0 if name == "ModelEmaV3" else 1e-6)
    if name != "ModelEma":
        average.set(model)
        assert_is(average.module, model, 0)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_averages_of_lightning(model, decay, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean() * 0

        def validation_step(self, batch, _):
            seen.append(self.model(batch[0]).detach())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    seen = []
    before, expected = copy.deepcopy(model), model(IMAGES)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(IMAGES), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[averaging.EMAWeightAveraging(decay=decay)],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model[1].requires_grad_(False).eval()
    trainer.fit(Module(), data, data)
    assert seen
    for output in seen:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert_is(model.eval(), before, 1e-6)


def test_an_average_of_models_in_training_is_that_of_their_weights():
    model = compiled()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    average.update_parameters(model)
    first = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    average.update_parameters(model)
    for mine, theirs in zip(average.module.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs + 0.125)


def test_the_state_of_an_average_with_stale_masks_is_refused_and_a_new_average_is_not():
    each = pruner()
    steps = iter(each)
    next(steps)
    average = AveragedModel(each.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    next(steps)
    average.update_parameters(each.model)
    before = copy.deepcopy(each.model.state_dict())
    with pytest.raises(RuntimeError, match=r"mask differs: .*make copies and averages of its model anew"):
        each.model.load_state_dict(average.module.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in each.model.state_dict().items() if "3." in name)
    average = AveragedModel(each.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(each.model)
    each.model.load_state_dict(average.module.state_dict())


def test_an_average_from_before_lowering_is_refused_after_it():
    each = pruner()
    for _ in each:
        average = AveragedModel(each.model)
    small = each.lower()
    with pytest.raises(RuntimeError, match="size"):
        small.load_state_dict(average.module.state_dict())


def test_data_parallel_training_in_one_process_and_its_state(tmp_path):
    from torch import distributed

    model = compiled().train()
    expected = copy.deepcopy(model)(IMAGES)
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        output = parallel(IMAGES)
        output.square().sum().backward()
        state = {name.removeprefix("module."): value for name, value in parallel.state_dict().items()}
    finally:
        distributed.destroy_process_group()
    assert torch.equal(output, expected)
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    assert all(parameter.grad is not None for parameter in parallel.parameters())
