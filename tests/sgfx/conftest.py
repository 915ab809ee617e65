"""What the tests of several files start from."""

import numpy as np
import pytest
from PIL import Image

import sgfx


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    """The numbers of the trainer's tests are those of the CPU, on machines with a GPU too."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


@pytest.fixture
def file(tmp_path):
    """A small net, compiled and saved."""
    from tests.sgfx.test_files import small_net

    path = tmp_path / "small.safetensors"
    sgfx.save(small_net(), path)
    return path


@pytest.fixture
def make_folder(tmp_path):
    """Write images: `counts` of each class by part, each of one value that tells it apart."""

    def make(counts, classes=("ant", "bee", "cat"), size=(32, 32), suffix="png", name="images"):
        root = tmp_path / name
        for part, count in counts.items():
            for label, kind in enumerate(classes):
                (root / part / kind).mkdir(parents=True)
                for number in range(count):
                    pixels = np.full((size[1], size[0], 3), (40 * label + number) % 256, dtype=np.uint8)
                    Image.fromarray(pixels).save(root / part / kind / f"{number}.{suffix}", lossless=True)
        return root

    return make
