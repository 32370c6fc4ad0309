"""The deployment of tests/test_deployment.py with every party in a network namespace of its own: ``make namespaces``.

Needs root, iproute2 and nftables. The server has 10.77.0.1, sites 10.77.0.11 and on; a site's firewall drops every
connection that did not begin at the site. Two private rounds, then it is looked at who listens where.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .deployment import SERVER, Deployment
from .tiny_deployment import small_run, tiny_deployment

SITES = ("s00", "s01", "s02")
BRIDGE, NET = "fcbr", "10.77.0"
# Whatever did not begin at the site itself is dropped.
FIREWALL = (
    "add table inet site",
    "add chain inet site input { type filter hook input priority 0; policy drop; }",
    "add rule inet site input iifname lo accept",
    "add rule inet site input ct state established accept",
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def address_of(name: str) -> str:
    return f"{NET}.1" if name == SERVER else f"{NET}.{11 + SITES.index(name)}"


def make() -> None:
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "set", BRIDGE, "up")
    for index, name in enumerate((SERVER, *SITES)):
        space = f"fc-{name}"
        ip("netns", "add", space)
        ip("link", "add", f"fcv{index}", "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", f"fcv{index}", "master", BRIDGE, "up")
        for words in (
            ("addr", "add", f"{address_of(name)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", space, *words)
        if name != SERVER:
            for rule in FIREWALL:
                subprocess.run(["ip", "netns", "exec", space, "nft", rule], check=True)


def clear() -> None:
    for name in (SERVER, *SITES):
        subprocess.run(["ip", "netns", "del", f"fc-{name}"], capture_output=True)
    subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)


def listening(name: str) -> list[str]:
    """Addresses that something listens on in a party's namespace, loopback left out."""
    command = ["ip", "netns", "exec", f"fc-{name}", "ss", "-ltnH"]
    rows = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return sorted(row.split()[3] for row in rows if not row.split()[3].startswith(("127.", "[::1]")))


def reached(source: str, target: str, port: int) -> bool:
    code = f"import socket; socket.create_connection(('{address_of(target)}', {port}), 3)"
    command = ["ip", "netns", "exec", f"fc-{source}", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    clear()
    make()
    prefix = {name: ("ip", "netns", "exec", f"fc-{name}") for name in (SERVER, *SITES)}
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            tiny_deployment(Path(folder), SITES, host=address_of(SERVER), prefix=prefix) as deployment,
        ):
            check(deployment)
    finally:
        clear()


def check(deployment: Deployment) -> None:
    deployment.ceremony()
    for site in SITES:
        deployment.start(site)
    for site in SITES:
        deployment.wait(lambda site=site: deployment.ready(site), 180, f"{site} is ready")
    deployment.start(SERVER, *small_run(deployment))
    deployment.wait(lambda: deployment.status(SERVER)["opened"] >= 1, 300, "a round")
    found = {name: listening(name) for name in (SERVER, *SITES)}
    deployment.wait(deployment.ended, 300, "the run's end")
    rows = [json.loads(line) for line in (deployment.run_folder() / "metrics.jsonl").open()][1:]
    outcomes = [(row["outcome"], row["cohort"]) for row in rows]
    if outcomes != [("opened", list(SITES))] * 2:
        raise SystemExit(f"rounds: {outcomes}\n{deployment.tails()}")
    if any(found[site] for site in SITES) or len(found[SERVER]) != 1:
        raise SystemExit(f"listening: {found}")
    # The firewall is what it is taken for: a listener at a site is reached by itself and by nobody else.
    code = "import socket, time; s = socket.create_server(('0.0.0.0', 9)); time.sleep(30)"
    listener = subprocess.Popen([*deployment.prefix["s00"], sys.executable, "-c", code])
    try:
        deployment.wait(lambda: listening("s00") == ["0.0.0.0:9"], 10, "the listener")
        if reached(SERVER, "s00", 9) or reached("s01", "s00", 9):
            raise SystemExit("a site's firewall lets connections in")
    finally:
        listener.kill()
    print(f"two rounds between {len(SITES) + 1} namespaces; only the server listens: {found[SERVER][0]}")


if __name__ == "__main__":
    main()
