"""What is installed from a wheel, somewhere else, is all of sgfx, and nothing of its tests."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sgfx

ROOT = Path(sgfx.__file__).parent.parent
PACKAGES = ("models_zoo", "passes", "sgfx")
LEFT = (".*", "build", "demo", "dist", "docs", "shared", "*.egg-info", "__pycache__")
# Printed are the modules that come from elsewhere: an editable installation would hide what a wheel lacks.
IMPORT_ALL = """
import importlib, sys
place, *modules = sys.argv[1:]
print(*[name for name in modules if not importlib.import_module(name).__file__.startswith(place)])
"""


def run(*command, cwd, **variables):
    environment = {**os.environ, **variables}
    done = subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: what an earlier build left beside the sources would get into it."""
    sources, made = tmp_path_factory.mktemp("sources") / "sgfx", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*LEFT))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(made), ".", cwd=sources)
    return next(made.glob("sgfx-*.whl"))


def sources():
    return sorted(file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def test_a_wheel_has_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {file.as_posix() for file in sources()} | {f"{package}/py.typed" for package in PACKAGES}
    assert files == expected


def test_an_installed_wheel_runs_and_imports_from_an_empty_folder(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(installed))
    run(sys.executable, "-m", "pip", "install", *options, str(wheel), cwd=empty)
    assert run(sys.executable, "-m", "sgfx", "--help", cwd=empty, PYTHONPATH=str(installed)).startswith("usage: sgfx")
    modules = [".".join(file.with_suffix("").parts).removesuffix(".__init__") for file in sources()]
    modules.remove("sgfx.__main__")  # which has just run
    assert len(modules) > 100
    elsewhere = run(*(sys.executable, "-c", IMPORT_ALL, str(installed), *modules), cwd=empty, PYTHONPATH=str(installed))
    assert not elsewhere.split()
    assert not list(empty.iterdir())
