"""The package as a whole: light to import, data flowing one way, the API as it was promised."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import models_zoo
import sgfx

ROOT = Path(sgfx.__file__).parent.parent
HEAVY = {"torch", "torchvision", "sklearn", "numba", "fvcore", "accelerate", "matplotlib", "networkx"}


def loaded_after(statement):
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_sgfx_is_light():
    assert not loaded_after("import sgfx") & HEAVY


def test_heavy_parts_are_imported_where_they_are_first_needed():
    assert not loaded_after("import sgfx; sgfx.compile; sgfx.report; sgfx.Trainer") & {
        "fvcore",
        "accelerate",
        "matplotlib",
    }


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("passes", {"sgfx", "models_zoo"}),
        ("models_zoo", {"sgfx", "passes"}),
        ("sgfx", {"tests", "benchmarks", "examples"}),
    ],
)
def test_imports_go_one_way(folder, forbidden):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, file


def test_every_public_name_is_there():
    assert dir(sgfx) == sorted(sgfx.__all__)
    assert all(getattr(sgfx, name) is not None for name in sgfx.__all__)
    with pytest.raises(AttributeError, match="module 'sgfx' has no attribute 'prune'"):
        _ = sgfx.prune


SIGNATURES = {
    sgfx.compile: {
        "groups": 8, "ratio": None, "budget": None, "linear_ratio": None, "ignore": (), "overrides": None,
        "criterion": "l1", "example_inputs": None, "seed": 0, "inplace": False, "step": None, "finetune": None,
        "eliminate": False, "leaf_modules": (), "calibration": None,
    },
    sgfx.Pruner: {
        "groups": 8, "ratio": ..., "step": ..., "linear_ratio": None, "ignore": (), "overrides": None,
        "criterion": "l1", "example_inputs": None, "seed": 0, "leaf_modules": (),
    },
}  # fmt: skip


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_the_api_is_word_for_word(function):
    model, *rest = inspect.signature(function).parameters.values()
    assert model.name == "model"
    assert {parameter.kind for parameter in rest} == {inspect.Parameter.KEYWORD_ONLY}
    given = {p.name: ... if p.default is p.empty else p.default for p in rest}
    assert given == SIGNATURES[function]


@pytest.mark.parametrize(
    ("function", "promised"),
    [
        (sgfx.plans, "(model)"),
        (sgfx.report, "(dense, small, example_inputs)"),
        (sgfx.verify, "(dense, small, example_inputs)"),
        (sgfx.save, "(small, path)"),
        (sgfx.load, "(path, *, into)"),
        (
            sgfx.export,
            "(small, path, example_inputs, *, form=None, opset=None, input_names=None, output_names=None, "
            "dynamic_shapes=None)",
        ),
        (sgfx.freeze, "(model, example_inputs, *, strategy=None, decisions=None, progress=True)"),
        (sgfx.calibrate, "(dense, small, data, *, progress=True)"),
        (sgfx.distill, "(dense, small, data, *, steps=400, lr=0.001, progress=True)"),
        (
            sgfx.Trainer,
            "(model, train_data, val_data=None, *, epochs, lr, teacher=None, task='classification', "
            "schedule='constant', folder=None, resume=False, ema=None, progress=True, ",
        ),
        (sgfx.recipe, "(name)"),
        (models_zoo.list, "()"),
        (models_zoo.create, "(name, **options)"),
        (models_zoo.load_checkpoint, "(model, path)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_all_else_takes_what_it_promises(function, promised):
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)).startswith(promised)
