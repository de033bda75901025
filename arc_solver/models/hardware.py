"""The hardware in hand: which device computes, which number type is fast on it, how much memory it has."""

import math
import os
import platform
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

from ..errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of a config: "auto" is a CUDA GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise UserError(f"run.device='{name}' is no device: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        known = f"there are {count} here, cuda:0 to cuda:{count - 1}" if count else "use run.device=cpu"
        raise UserError(f"run.device={name} asks for a GPU that PyTorch does not find: {known}")
    return torch.device(name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """What weights are held and multiplied in: bfloat16 where the hardware multiplies it, else float32."""
    return torch.bfloat16 if _bf16_by(device) else torch.float32


def describe_precision(device: torch.device) -> str:
    """The number type that `fast_dtype` picks, and why, as text for the user."""
    if unit := _bf16_by(device):
        return f"bf16 ({unit})"
    if device.type == "cuda":
        return "fp32 (the GPU does not multiply bf16, and fp16 overflows in some models)"
    return "fp32 (the CPU has neither AMX nor AVX512_BF16)"


@cache
def _bf16_by(device: torch.device) -> str:
    """What multiplies bfloat16: GPUs from Ampere on, x86 CPUs with AMX or AVX512_BF16. "" = nothing does."""
    if device.type == "cuda":
        return "tensor cores" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    asks = {"AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported"}
    return next((unit for unit, ask in asks.items() if hasattr(torch.cpu, ask) and getattr(torch.cpu, ask)()), "")


def cpu_name() -> str:
    try:
        lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("Model name"))
    except (OSError, subprocess.CalledProcessError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process can have now on the device; of a CPU's an equal share for each of so many processes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limit, used = container_memory()
    return int(min(_meminfo("MemAvailable"), max(0, limit - used))) // processes


def whole_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that the device has, whoever uses them; of a CPU's an equal share."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return int(min(_meminfo("MemTotal"), container_memory()[0])) // processes


def _meminfo(name: str) -> int:
    """What Linux says of a CPU's memory; elsewhere half of all of it."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert found, name
    return int(found[1]) * 1024


def container_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, int]:
    """Bytes that Linux gives the container that this process is in, inf where it sets no limit, and those in use.

    What files have in the cache, and nobody has read lately, counts as free.
    """
    names = ("memory.max", "memory.current", "memory.stat", "inactive_file")
    if not (root / names[0]).is_file():  # the first version of control groups
        root = root / "memory"
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
    try:
        limit, used, stat = ((root / name).read_text() for name in names[:3])
    except OSError:
        return math.inf, 0
    cached = re.search(rf"^{names[3]} (\d+)$", stat, re.MULTILINE)
    return float("inf" if limit.strip() == "max" else limit), int(used) - (int(cached[1]) if cached else 0)


def resident_memory() -> int:
    """Bytes of memory that this process has now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory(torch.device("cpu"))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had, on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage, where there is another way: its maximum outlives exec, so a child inherits its parent's.
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
