"""The machine and the versions a measurement was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

Environment = dict[str, str | int | float]

_PACKAGES = ("torch", "timm", "transformers", "numba")


def describe(device: torch.device | str = "cpu") -> Environment:
    """Processor, cores, threads and versions, in the order in which they are shown.

    Args:
        device: Where the measurement runs.
    """
    from transom import __version__

    device = torch.device(device)
    found: Environment = {
        "device": device_name(device),
        "processor": processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "transom": __version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def device_name(device: torch.device) -> str:
    """The device as its vendor calls it, "cpu" for the processor."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return str(device)


def processor() -> str:
    """Model of the processor; its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _cores() -> int:
    # Where a process is confined to some cores, the others say nothing about its speed.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
