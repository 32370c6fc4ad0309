"""What stands in for `fedcollm site` in the engine's tests: the real door, and a handler that moves bytes."""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
import time
from pathlib import Path

from fedcollm_privacy.errors import SiteFailed
from fedcollm_privacy.identity import load_public
from secure_fedcollm.door import SiteDoor
from secure_fedcollm.transport import Handler


def echo_site(name: str, folder: Path) -> Handler:
    """Answers with what the operation says; notes in ``<folder>/calls`` that it was worked on."""

    def handle(operation: str, body: bytes) -> bytes:
        with (folder / "calls").open("a") as file:
            file.write(f"{operation} {hashlib.sha256(body).hexdigest()[:16]}\n")
        if operation == "decline":
            raise SiteFailed(name, "declined")
        if operation == "crash":
            raise RuntimeError(f"SECRET of {name}")
        if operation.startswith("sleep"):
            time.sleep(float(operation[5:]))
        if operation == "take":
            return b"taken"
        if operation == "give":
            return bytes(int(body))
        return body

    return handle


def main(name: str, folder: Path) -> None:
    """Answer at ``<folder>/engine.sock`` until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    server = load_public(folder.parent / "server.pub")
    door = SiteDoor(echo_site(name, folder), name=name, server=server, socket=folder / "engine.sock")
    (folder / "up").write_text("")
    stop.wait()
    door.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
