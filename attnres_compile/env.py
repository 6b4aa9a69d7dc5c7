"""The facts of an installation that a bug report needs."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import attnres_compile

_LIBRARIES = ("torch", "triton", "transformers", "networkx", "sympy", "safetensors", "numpy")
_TRITON_BUILDS = ("triton", "pytorch-triton", "pytorch-triton-rocm")


def report() -> dict[str, Any]:
    """Versions, devices and whether torch finds the backend, as plain JSON types. None stands for what is not there."""
    facts: dict[str, Any] = {
        "attnres_compile": attnres_compile.__version__,
        "location": str(Path(attnres_compile.__file__).parent),
        "backend": _registered_backend(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpus": os.cpu_count(),
        "c++": shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"),
    }
    for name in _LIBRARIES:
        facts[name] = _version(*(_TRITON_BUILDS if name == "triton" else (name,)))
    facts["cuda"] = torch.version.cuda
    facts["hip"] = torch.version.hip
    facts["devices"] = _devices()
    return facts


def format_report(facts: dict[str, Any]) -> str:
    """``facts`` as aligned lines to paste into a bug report."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in facts.items())


def _format(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(*distributions: str) -> str | None:
    """Version of the first of ``distributions`` that is installed, from its metadata: nothing is imported."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _registered_backend() -> str | None:
    """What ``torch.compile(backend="attnres")`` will load."""
    found = metadata.entry_points(group="torch_dynamo_backends", name="attnres")
    return next((entry.value for entry in found), None)


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        devices.append(f"{properties.name} (sm_{properties.major}{properties.minor}, {memory:.0f} GiB)")
    return devices
