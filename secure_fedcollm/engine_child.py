"""Become another program that the kernel ends when the process that started it ends.

``python -m secure_fedcollm.engine_child PARENT PROGRAM ...``. A program of its own, because between fork and exec of a
process with threads nothing may be run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Replace this process by the program; end at once if the parent is gone already."""
    parent, program = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        raise SystemExit(1)
    os.execv(program[0], program)  # noqa: S606 the program is given by our own process


if __name__ == "__main__":
    main(sys.argv[1:])
