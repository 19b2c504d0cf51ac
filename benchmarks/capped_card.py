"""A 4 GB card's budget on a larger GPU: a full-size W4A8 SDXL UNet in ComfyUI, three images without offload, and its peak VRAM.

    COMFYUI_PATH=<a ComfyUI checkout> python capped_card.py [--out results.jsonl] [--card 4] [--steps 8] [--activations token static]
        [--flags classic default] [--accelerations auto fused]

For each kind of activations it writes a file of random codes (capped_file.py), and a process whose card is emulated opens it and
samples three images of 1024x1024 with CFG (capped_session.py, which says how). Emulated is memory only, not speed. Exit code 1 if
a limit is missed. With torch's own allocator PYTORCH_CUDA_ALLOC_CONF is passed on, and recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capped_file import unet_shapes, write_random
from capped_session import BUDGETS, IMAGES
from comfyui_session import GIB, start_comfyui

# torch gives cuBLAS 32 MiB per stream on Hopper, and this much on every card of 4 GB.
CUBLAS_WORKSPACE = ":4096:2:16:8"
# Issue 6's limits.
FILE_LIMIT_GIB, PEAK_LIMIT_GIB = 1.45, 1.9
# Opening a file may take its own size in RAM, and this for ComfyUI's modules and the tensors that stay 16 bit.
LOAD_RAM_MARGIN_GIB = 0.4
FOLDER = Path(__file__).parent


def limits(record: Mapping[str, Any], cpu: bool) -> dict[str, bool]:
    """What must hold, and whether it does. Memory is what other programs cannot have: under default flags only the driver knows."""
    kind = "driver" if record["flags"] == "default" else "reserved"
    checks: dict[str, Callable[[], bool]] = {
        f"file at most {FILE_LIMIT_GIB} GiB": lambda: record["file GiB"] <= FILE_LIMIT_GIB,
        "opened in the file's size of RAM": lambda: record["load peak RAM GiB"] <= record["file GiB"] + LOAD_RAM_MARGIN_GIB,
        f"{IMAGES} images": lambda: record["images"] == IMAGES,
        "no offload": lambda: not record["offloaded"],
        f"{kind} peak at most {PEAK_LIMIT_GIB} GiB": lambda: cpu or record[f"{kind} peak GiB"] <= PEAK_LIMIT_GIB,
    }
    return {name: check() for name, check in checks.items()}


def measured(path: Path, activations: str, flags: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of one process; one without figures and with its last words if it failed."""
    command = [sys.executable, str(FOLDER / "capped_session.py"), str(path), "--card", str(arguments.card), "--steps", str(arguments.steps)]
    command += ["--flags", flags, "--accelerations", *arguments.accelerations]
    command += [flag for flag, given in (("--tiny", arguments.tiny), ("--cpu", arguments.cpu)) if given]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER, env=environment_of_child(), check=False)
    facts = {"activations": activations, "flags": flags, "file GiB": path.stat().st_size / GIB, "card GB": arguments.card}
    records = [facts | json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    return records if not answer.returncode else [*records, facts | {"error": (answer.stdout + answer.stderr)[-2000:]}]


def environment_of_child() -> dict[str, str]:
    return {"CUBLAS_WORKSPACE_CONFIG": CUBLAS_WORKSPACE, **os.environ}


def report(record: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Print and keep a record. Returns whether all limits hold."""
    checks = {"the images are made": False} if "error" in record else limits(record, arguments.cpu)
    lines = [", ".join(f"{key} {_shown(value)}" for key, value in record.items() if not isinstance(value, dict | list))]
    for phase, peaks in record.get("phases", {}).items():
        lines.append(f"  {phase:15} " + ", ".join(f"{kind} {value:.3f}" for kind, value in peaks.items()) + " GiB")
    lines += [f"  {name}: {text} MiB" for name, text in record.get("reserved for", {}).items()]
    lines += [f"  at the peak: {line}" for line in record.get("live at the peak", ())]
    lines += [f"  {'ok  ' if holds else 'FAIL'} {name}" for name, holds in checks.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
    if arguments.out is not None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"kind": "capped card", "checks": checks}) + "\n")
    return all(checks.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--card", type=int, choices=BUDGETS, default=4, help="GB of the card that is emulated")
    parser.add_argument("--steps", type=int, default=8, help="of each image")
    parser.add_argument("--activations", nargs="+", choices=("token", "static"), default=["token", "static"])
    parser.add_argument("--flags", nargs="+", choices=("classic", "default"), default=["classic"], help="of ComfyUI")
    parser.add_argument("--accelerations", nargs="+", choices=("auto", "fused"), default=["auto", "fused"])
    parser.add_argument("--tiny", action="store_true", help="the tests' small model")
    parser.add_argument("--cpu", action="store_true", help="no GPU: nothing is emulated, and no VRAM measured")
    arguments = parser.parse_args()
    start_comfyui(dynamic=False, cpu=True)
    shapes, holds = unet_shapes(arguments.tiny), True
    for activations in arguments.activations:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"sdxl-w4a8-{activations}.safetensors"
            write_random(path, shapes, activations == "static")
            for flags in arguments.flags:
                holds &= all([report(record, arguments) for record in measured(path, activations, flags, arguments)])
    return 0 if holds else 1


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
