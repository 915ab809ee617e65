"""The page on training loops works as it is written, section by section."""

import subprocess
import sys

import pytest
import torch

import sgfx
from tests.tools.pages import run, sections
from tests.tools.yolo import prepare_yolo

PAGE = "integrations.md"
NEEDS = {
    "accelerate": "accelerate",
    "Lightning": "lightning",
    "Hugging Face's Trainer": "transformers",
    (YOLO := "ultralytics' YOLO"): "ultralytics",
}
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def blocks(title):
    found = sections(PAGE)
    return found[""] + found[title]


@pytest.fixture(autouse=True)
def others_accelerators():
    """accelerate keeps the settings of the first accelerator of a process: the page's is none of other tests'."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("title", [title for title in sections(PAGE) if title not in ("", "DDP")])
def test_a_section_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if title == YOLO:
        prepare_yolo(tmp_path, monkeypatch)
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    names = run(PAGE, blocks(title))
    if title == YOLO:
        assert_yolo_went_on(names)


def assert_yolo_went_on(names):
    """What was exported is the network of the first run, with which the second began."""
    import onnxruntime

    first, second = names["YOLO"](names["best"]).model.eval(), names["yolo"].model.eval()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        found = onnxruntime.InferenceSession(names["file"]).run(None, {"images": x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), first(x)[0], rtol=1e-4, atol=1e-3)  # pixels, of 64
    weights = [model.model[1].conv.weight for model in (first, second)]
    assert type(first.model[1].conv).__name__ == "GroupedConv2d"
    assert weights[0].shape == weights[1].shape
    assert not torch.equal(*weights)


def test_two_processes_train_to_the_same_weights(tmp_path):
    (script := tmp_path / "script.py").write_text(
        "\n".join(block for _, block in blocks("DDP")).replace("images, labels =", SEED) + "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert "running" in name or torch.equal(value, second[name]), name  # norms count their own images
    names = run(PAGE, blocks("DDP"))
    small = sgfx.load(tmp_path / "rank0.pt", into=names["dense"]())
    assert torch.equal(small[3].weight, first["module.3.weight"])


SEED = "torch.manual_seed(1)\nimages, labels ="
