"""What every benchmark prints first: the machine, and the versions."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def describe_machine() -> str:
    """One line: processor, threads, torch."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(cpuinfo) if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
