"""Where and with what a benchmark ran, for its JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_adamw

ROOT = Path(__file__).parents[1]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _field(file: str, key: str) -> str | None:
    """The first value of a key in a file of /proc, whose lines are `key : value`."""
    path = Path(file)
    lines = path.read_text().splitlines() if path.exists() else []
    values = [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == key]
    return values[0] if values else None


def free_bytes(device: torch.device) -> int | None:
    """Memory that may still be taken on a device; None if that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _field("/proc/meminfo", "MemAvailable")
    if available is None:
        return None
    free = int(available.split()[0]) * 1024
    try:  # a container may have less
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())
        return min(free, most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return free


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory; 64 MiB if that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    kib = [int(size.strip().removesuffix("K")) for size in sizes if size.strip().endswith("K")]
    return max(kib, default=64 << 10) << 10


def cpu_name() -> str:
    """The processor's model."""
    return _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of the device, and its threads if it is a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions, settings and commit."""
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ("--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}")
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", *query),
            "torch_cuda": torch.version.cuda,
        }
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "memory": _field("/proc/meminfo", "MemTotal"),
            "cache_bytes": cache_bytes(device),
            "gpu": gpu,
        },
        "versions": {
            "fused_adamw": fused_adamw.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "triton", "numpy")},
        },
        "engines": fused_adamw.engine_status(),
        "threads": torch.get_num_threads(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_", "PYTORCH_"))
        },
    }
