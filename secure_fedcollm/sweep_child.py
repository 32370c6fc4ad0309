"""One cell of a sweep, in a process of its own: ``fedcollm run resume=<its run>``, begun first where there is none.

It ends when the sweep ends, however that came to pass: the sweep holds the other end of its standard input.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

__all__ = ["main"]


def main(folder: str) -> None:
    """Run or continue the cell in this folder; errors are told as `fedcollm` tells them."""
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    from secure_fedcollm.cli import main as fedcollm
    from secure_fedcollm.folder import RunFolder

    run = Path(folder) / "run"
    if not (run / "run.json").exists():
        # The run's name is the last of what makes a run; without it nothing was begun.
        shutil.rmtree(run, ignore_errors=True)
        config = json.loads((Path(folder) / "cell.json").read_text(encoding="utf-8"))["config"]
        RunFolder.create(str(run), config["name"], config)
    sys.argv = ["fedcollm", "run", "--quiet", f"resume={run}"]
    fedcollm()


def _end_with_the_sweep() -> None:
    # A run withstands being killed at any moment; one that nobody waits for would be in the way of the next sweep.
    if os.read(0, 1) == b"":
        os.kill(os.getpid(), signal.SIGKILL)
