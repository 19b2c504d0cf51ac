"""`python -m stepquant <command>`. Says in one sentence what to install if the command line's packages are missing."""

from __future__ import annotations

import os
import sys

# Set before torch or a library is imported; what the user has set stands.
ENVIRONMENT = {
    # Threads that spin a little while they wait, then sleep: asleep at once, waking them took most of an idle machine's time
    # (2 cores: three times slower in all); spinning as long as libgomp does by itself, a busy machine's (2.6 times).
    "GOMP_SPINCOUNT": "20000",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


def main() -> int:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from .cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.stderr.write(f'Error: {error.name} is not installed. Run: pip install "stepquant[demo]"\n')
        return 1
    app(prog_name="stepquant")
    return 0


if __name__ == "__main__":
    sys.exit(main())
