"""Device, threads: the only module that asks what hardware exists."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loratools.errors import OptionError

_DEVICE = re.compile(r"cpu(:0)?|mps(:0)?|cuda(:[0-9]{1,4})?")


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how wide to compute.

    Attributes:
        device: a torch device string (``cpu``, ``cuda:0``, ``mps``).
        workers: how many blocks are read, folded and written at a time, one thread each.
    """

    device: str = "cpu"
    workers: int = 1


def resolve_compute(device: str = "cpu", workers: int | None = None) -> Compute:
    """Turn what the user asked for into a Compute that exists here.

    ``auto`` takes a GPU if there is one. Raises OptionError for an unknown or absent device.
    """
    chosen = _best_device() if device == "auto" else device
    _check_device(chosen)
    if not chosen.startswith("cuda"):
        # There is one of each, so the number says nothing.
        chosen = chosen.removesuffix(":0")
    return Compute(chosen, workers if workers is not None else max(2, min(8, available_cores())))


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    if not _DEVICE.fullmatch(device):
        raise OptionError(
            f"unknown device {device!r}", hint="use auto, cpu, cuda, cuda:N or mps with --device"
        )
    present: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if not present[kind]():
        raise OptionError(
            f"no {kind} device is available to this installation of torch",
            hint="use --device cpu, or install a torch build for your accelerator",
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise OptionError(
            f"device {device!r} does not exist: torch sees {torch.cuda.device_count()}",
            hint="count devices from 0",
        )


@contextmanager
def one_thread_kernels() -> Iterator[None]:
    """Let every torch kernel run on its caller's thread alone, and restore the setting after.

    Blocks are folded by several threads at once; kernels that also split their work would
    contend for the cores, and their sums would depend on how many there are.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
