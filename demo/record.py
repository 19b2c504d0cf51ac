"""A quality result as a JSON record with fixed fields, and where and when it was made. Measures nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from ..hosts.diffusers.fidelity import Fidelity
from ..version import VERSION

PACKAGE_DIR = Path(__file__).resolve().parent.parent


def quality_record(kind: str, model: str, mode: str, fidelity: Fidelity | None, size_bytes: int, command: str) -> dict[str, object]:
    """One format's figures.

    Args:
        kind: what was run: "demo" or "acceptance".
        mode: the format, for example "w8a8-token".
        fidelity: None for the reference, whose figures are null.
        size_bytes: of the UNet's file.
    """
    known = fidelity is not None
    return {
        "kind": kind,
        "model": model,
        "mode": mode,
        "sqnr_db": fidelity.sqnr_db if known else None,
        "sqnr_worst_db": fidelity.sqnr_worst_db if known else None,
        "latent_sqnr_db": fidelity.latent_sqnr_db if known else None,
        "psnr_db": fidelity.mean_psnr_db if known else None,
        # Prompt adherence needs judges and a thousand pictures: another benchmark fills these.
        "adherence_diff": None,
        "ci_low": None,
        "ci_high": None,
        "integer_mac_share": fidelity.integer_share if known else None,
        "size_bytes": size_bytes,
        "commit": _commit(),
        "command": command,
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def environment() -> dict[str, object]:
    """Versions and machine, as far as they can change a figure or a time."""
    return {
        "stepquant": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def command_line() -> str:
    """The command as typed, without the folders of the machine it ran on."""
    return " ".join([Path(part).name if Path(part).is_absolute() else part for part in sys.argv])


def _commit() -> str | None:
    """The commit of the checkout this runs from; None where it was installed without one."""
    if not (PACKAGE_DIR / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE_DIR, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
