"""``federation.yaml``: who is to take part, where the server is reached, and what holds in every run of theirs.

A name has to satisfy two rules: ours for public names, and NVIDIA FLARE's for the same party, which are stricter in
places. Both are checked here, before a key is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedcollm_privacy import _validate
from fedcollm_privacy.errors import ConfigError, InvalidValue
from secure_fedcollm.strict_build import build, check

__all__ = ["GOVERNANCE", "MAX_SITES", "FederationFile", "ServerAddress", "parse_yaml", "require_site_name"]

GOVERNANCE = "governance"
"""The public name of the governance's key."""
MIN_SITES, MAX_SITES = 3, 100
MAX_DAYS = 3650
_SITE = re.compile("[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HOST_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_HOST_LABEL}\.)*{_HOST_LABEL}")
_ORG = re.compile("[A-Za-z0-9_]{1,64}")
_LONGEST_HOST = 64  # of a certificate's common name
_LONGEST_FILE = 2**18
# The engine calls its own server so.
_TAKEN = frozenset({"server", GOVERNANCE})


def require_site_name(field: str, name: str) -> None:
    """Return if ``name`` can be a site's for us and for NVIDIA FLARE; ConfigError names ``field`` otherwise."""
    check(
        _SITE.fullmatch(name) is not None and name.lower() not in _TAKEN,
        field,
        name,
        "1-64 ASCII letters, digits, '_', '-', first a letter or digit, and not "
        f"{' or '.join(sorted(_TAKEN))}: the engine allows no '.' in a site's name, although other names may have it",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerAddress:
    """The server.

    Attributes:
        name: its public name, as in the roster.
        host: DNS name or IPv4 address under which every site reaches it; it stands in its certificate.
        port: TCP port, the only one that is open.
    """

    name: str
    host: str
    port: int

    def __post_init__(self) -> None:
        _public_name("server.name", self.name)
        check(self.name.lower() != GOVERNANCE, "server.name", self.name, f"another name than {GOVERNANCE}")
        check(
            len(self.host) <= _LONGEST_HOST and _HOST.fullmatch(self.host) is not None,
            "server.host",
            self.host,
            f"a DNS name or an IPv4 address of at most {_LONGEST_HOST} characters, without scheme and port",
        )
        check(1 <= self.port <= 65535, "server.port", self.port, "an integer from 1 to 65535")


@dataclass(frozen=True, slots=True, kw_only=True)
class FederationFile:
    """What the coordinator writes; every field is required.

    Attributes:
        name: the federation's public name.
        org: the organisation in every certificate: letters, digits, ``_``.
        contact: whom an administrator calls when something is wrong, one line.
        server: its name and address.
        sites: 3 to 100 names.
        min_contributors: fewest sites in an opened sum.
        max_colluding: how many sites may work with the server against the others.
        valid_days: how long a signed roster holds.
        certificate_days: how long a TLS certificate holds.

    Raises:
        ConfigError: a field is not allowed; the text names field, value and what is allowed.
    """

    name: str
    org: str
    contact: str
    server: ServerAddress
    sites: tuple[str, ...]
    min_contributors: int
    max_colluding: int
    valid_days: int
    certificate_days: int

    def __post_init__(self) -> None:
        _public_name("name", self.name)
        check(_ORG.fullmatch(self.org) is not None, "org", self.org, "1-64 ASCII letters, digits, '_'")
        check(
            len(self.contact.strip()) > 0 and len(self.contact) <= 200 and self.contact.isprintable(),
            "contact",
            self.contact,
            "one line of at most 200 characters: a name and a telephone number",
        )
        check(
            MIN_SITES <= len(self.sites) <= MAX_SITES,
            "number of sites",
            len(self.sites),
            f"{MIN_SITES} to {MAX_SITES}: a sum of fewer sites hides nobody",
        )
        seen: set[str] = set()
        # Without regard to case: host names have none, and neither have all file systems.
        others = {self.server.name.lower(): "the server's name", self.server.host.lower(): "the server's host"}
        for place, site in enumerate(self.sites):
            field = f"sites[{place}]"
            require_site_name(field, site)
            check(site.lower() not in seen, field, site, "names that differ in more than upper and lower case")
            taken = others.get(site.lower())
            # A site's certificate names the site as a host; it must never pass for the server's.
            check(taken is None, field, site, f"another name than {taken}")
            seen.add(site.lower())
        least = max(3, self.max_colluding + 2)
        check(self.max_colluding >= 0, "max_colluding", self.max_colluding, "an integer >= 0")
        check(
            least <= self.min_contributors <= len(self.sites),
            "min_contributors",
            self.min_contributors,
            f"from max(3, max_colluding + 2) = {least} to the number of sites, {len(self.sites)}",
        )
        for field in ("valid_days", "certificate_days"):
            days = getattr(self, field)
            check(1 <= days <= MAX_DAYS, field, days, f"an integer from 1 to {MAX_DAYS}")

    @property
    def parties(self) -> tuple[str, ...]:
        """The server's name, then the sites' in the order of the file."""
        return (self.server.name, *self.sites)

    @staticmethod
    def read(path: Path) -> FederationFile:
        """The federation in a YAML file.

        Raises:
            ConfigError: the file cannot be read, is no such YAML, or a field is unknown, missing or not allowed.
        """
        return build(FederationFile, parse_yaml(path))


def parse_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file; a key that stands twice, an interpolation or another kind of document is refused.

    Raises:
        ConfigError: as said, or the file cannot be read or is longer than 256 KiB.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_LONGEST_FILE + 1)
    except OSError as error:
        raise ConfigError("file", str(path), f"a readable file ({error.strerror})") from error
    try:
        check(len(text) <= _LONGEST_FILE and b"${" not in text, "file", str(path), "a short file without ${...}")
        plain = OmegaConf.to_container(OmegaConf.create(text.decode()), resolve=False)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError, RecursionError) as error:
        if isinstance(error, InvalidValue):
            raise
        raise ConfigError("file", str(path), f"YAML with each field once ({' '.join(str(error).split())})") from None
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ConfigError("file", str(path), "a YAML mapping: lines of the form `field: value`")
    return {str(key): value for key, value in plain.items()}


def _public_name(field: str, name: str) -> None:
    try:
        _validate.public_name(**{field: name})
    except InvalidValue as error:
        raise ConfigError(field, name, str(error).split("allowed: ", 1)[-1]) from None
