"""The page on training loops works as it is written, section by section."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgfx

PAGE = Path(sgfx.__file__).parent.parent / "docs" / "integrations.md"
NEEDS = {"accelerate": "accelerate", "Lightning": "lightning", "Hugging Face's Trainer": "transformers"}
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def sections():
    """The blocks of each section, by its title, with the number of the line that each begins at."""
    text = PAGE.read_text(encoding="utf-8")
    found, title = {"": []}, ""
    for match in re.finditer(r"^## ([^\n]*)$|^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] is not None:
            title = match[1]
            found[title] = []
        else:
            found[title].append((text[: match.start(2)].count("\n"), match[2]))
    return found


def run(title):
    names = {"__name__": "page"}
    for before, block in sections()[""] + sections()[title]:
        exec(compile("\n" * before + block, str(PAGE), "exec"), names)
    return names


@pytest.fixture(autouse=True)
def others_accelerators():
    """accelerate keeps the settings of the first accelerator of a process: the page's is none of other tests'."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("title", [title for title in sections() if title not in ("", "DDP")])
def test_a_section_runs(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    run(title)


def test_two_processes_train_to_the_same_weights(tmp_path):
    (script := tmp_path / "script.py").write_text(
        "\n".join(block for _, block in sections()[""] + sections()["DDP"]).replace("images, labels =", SEED)
        + "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert "running" in name or torch.equal(value, second[name]), name  # norms count their own images
    names = run("DDP")
    small = sgfx.load(tmp_path / "rank0.pt", into=names["dense"]())
    assert torch.equal(small[3].weight, first["module.3.weight"])


SEED = "torch.manual_seed(1)\nimages, labels ="
