"""What the tests of several files start from."""

import pytest

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
