"""Starts a real ComfyUI in this process on a GPU, and keeps the record of a run's checks. For benchmarks; measures no model."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone

GIB = 2**30


def start_comfyui(dynamic: bool, cpu: bool = False, default_allocator: bool = False) -> bool:
    """What ComfyUI's main.py does before its server starts. Returns whether dynamic VRAM is on.

    Args: default_allocator: with the allocator that ComfyUI chooses (cudaMallocAsync), which is torch's own otherwise;
        only before torch is imported.
    """
    root = os.path.abspath(os.environ["COMFYUI_PATH"])
    sys.path.insert(0, root)
    os.chdir(root)
    sys.argv = ["main.py", *(["--cpu"] if cpu else []), *([] if dynamic else ["--disable-dynamic-vram"])]
    import comfy.options

    comfy.options.enable_args_parsing()
    if default_allocator:
        import cuda_malloc  # noqa: F401 - it sets the environment variable that torch reads
    if not dynamic:
        return False
    import comfy_aimdo.control

    try:
        comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
    except TypeError:
        comfy_aimdo.control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    devices = comfy.model_management.get_all_torch_devices()
    try:
        started = comfy_aimdo.control.init_devices((device.index, 0) for device in devices)
    except TypeError:
        started = comfy_aimdo.control.init_devices(device.index for device in devices)
    if started:
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return bool(started)


class PeakMemory:
    """Most GPU memory and RAM in use while the block runs, over what was in use before it; sampled every 5 ms.

    GPU memory is the driver's figure: dynamic VRAM does not allocate through torch.
    """

    def __enter__(self) -> PeakMemory:
        self._gpu_before, self._ram_before = gpu_used(), ram_used()
        self.gpu_gib = self.ram_gib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.gpu_gib = max(self.gpu_gib, (gpu_used() - self._gpu_before) / GIB)
            self.ram_gib = max(self.ram_gib, (ram_used() - self._ram_before) / GIB)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def gpu_used() -> int:
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def ram_used() -> int:
    """Resident bytes of this process that are not file pages: a mapped checkpoint is the system's to drop."""
    with open("/proc/self/statm", encoding="ascii") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Report:
    """Runs the checks, prints each as one line, keeps them as a record. A failed check does not stop the others."""

    def __init__(self, seconds: float) -> None:
        self.record: dict[str, object] = {}
        self.failed: list[str] = []
        self._deadline = time.time() + seconds

    def check(self, name: str, measure: Callable[[], dict], holds: Callable[[dict], bool] = lambda _: True, needs: str = "") -> None:
        if time.time() > self._deadline:
            print(f"  left out, time is up: {name}", flush=True)  # noqa: T201
            return
        start = time.time()
        try:
            values = measure()
            good = holds(values)
        except Exception as error:  # the next check may still say something
            traceback.print_exc(limit=-6)
            values, good = {"error": f"{type(error).__name__}: {error}"[:300]}, False
        self.record[name] = values
        if not good:
            self.failed.append(name)
        shown = ", ".join(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
        wanted = f" (must be {needs})" if needs else ""
        memory = f"GPU {gpu_used() / GIB:.2f} GiB"
        print(f"{'ok  ' if good else 'FAIL'} {name}: {shown}{wanted}  [{time.time() - start:.1f} s, {memory}]", flush=True)  # noqa: T201


def unload() -> None:
    import comfy.model_management
    import torch

    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
    gc.collect()
    torch.cuda.empty_cache()


def environment(dynamic: bool) -> dict:
    import comfy_kitchen
    import comfyui_version
    import torch

    from stepquant.kernels.dispatch import choose_backend
    from stepquant.version import VERSION

    choice = choose_backend("cuda")
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "comfyui": comfyui_version.__version__,
        "comfy_kitchen": getattr(comfy_kitchen, "__version__", "unknown"),
        "stepquant": VERSION,
        "dynamic_vram": dynamic,
        "backend": choice.backend.value,
        "reason": choice.reason,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
