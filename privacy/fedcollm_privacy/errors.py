"""The error tree of the whole project.

::

    FedCollmError
    ├── InvalidValue            a value from outside is not allowed (names field, value, allowed)
    │   └── ConfigError         the same, for the configuration
    ├── DataError               rows of a data file cannot be used (names file, line, count)
    ├── ModelError              a checkpoint does not fit what is asked of it
    ├── BudgetExceeded          a spend would cross a cap; nothing was spent
    ├── KeyFileError            a key file is unreadable, too open, or locked by another passphrase
    ├── KitError                a kit, a request to take part or its grant is incomplete, altered or another party's
    ├── LedgerError             a ledger is unreadable, altered, or used out of order
    ├── PolicyRefused           the site's own policy says no (names the rule)
    ├── PrivacyViolation        the training step would not carry its stated guarantee
    ├── ProtocolError           a message is malformed, foreign, replayed or out of order
    │   ├── OpeningRefused      the decryptor will not open (one text for every cause)
    │   ├── SignatureInvalid    a signature does not fit its message and signer
    │   └── UploadRefused       one site's upload is not sound; the others go on
    ├── SiteFailed              a site could not take part in a round (a code, never a text from data)
    └── RoundLost               a round gave no sum; the state is as before it
"""

from __future__ import annotations

__all__ = [
    "BudgetExceeded",
    "ConfigError",
    "DataError",
    "FedCollmError",
    "InvalidValue",
    "KeyFileError",
    "KitError",
    "LedgerError",
    "ModelError",
    "OpeningRefused",
    "PolicyRefused",
    "PrivacyViolation",
    "ProtocolError",
    "RoundLost",
    "SignatureInvalid",
    "SiteFailed",
    "UploadRefused",
]


class FedCollmError(Exception):
    """Whatever this project refuses to do; the text says what to do next."""


class InvalidValue(FedCollmError, ValueError):
    """A value from outside is not allowed; the text names field, value and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field} = {value!r} is not allowed; allowed: {allowed}")
        self.field = field


class ConfigError(InvalidValue):
    """A configuration field is unknown, missing, ill-typed or out of range."""


class DataError(FedCollmError):
    """Rows of a data file cannot be used."""


class ModelError(FedCollmError):
    """A checkpoint, tokenizer or adapter does not fit what is asked of it."""


class BudgetExceeded(FedCollmError):
    """A spend would cross a cap; nothing was spent."""


class LedgerError(FedCollmError):
    """A ledger is unreadable, altered, or used out of order."""


class KeyFileError(FedCollmError):
    """A private key's file is missing, damaged, readable by others, or locked by another passphrase."""


class KitError(FedCollmError):
    """A kit, a party's request to take part, or the grant that answers it is incomplete, altered or another party's."""


class PrivacyViolation(FedCollmError):
    """The training step would not carry its stated guarantee, so it does not run."""


class ProtocolError(FedCollmError):
    """A message is malformed, foreign, replayed or out of order."""


class OpeningRefused(ProtocolError):
    """The decryptor will not open; the same text for every cause an attacker could provoke."""

    def __init__(self) -> None:
        super().__init__("the decryptor refused to open this sum")


class SignatureInvalid(ProtocolError):
    """A signature does not fit its message, its purpose or its signer."""


class UploadRefused(ProtocolError):
    """One upload stays out of the sum; the round goes on.

    Attributes:
        site: whose upload.
        code: a word of `fedcollm_privacy.aggregator_process.CODES`, or ``crashed_the_aggregator``.
    """

    def __init__(self, site: str, code: str) -> None:
        super().__init__(f"the upload of site {site} is left out: {code}")
        self.site = site
        self.code = code


class SiteFailed(FedCollmError):
    """A site could not take part in a round.

    Attributes:
        site: the site's public name.
        code: one of ``declined``, ``diverged``, ``failed``; never a text that data could have written.
    """

    def __init__(self, site: str, code: str) -> None:
        super().__init__(f"site {site}: {code}")
        self.site = site
        self.code = code


class RoundLost(FedCollmError):
    """A round gave no sum; adapters are as before it, budget already reserved stays spent."""


class PolicyRefused(FedCollmError):
    """The site's own policy says no; the server is told ``declined`` and nothing else.

    Attributes:
        rule: the policy's field that said no.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"the site's policy refuses ({rule}): {reason}")
        self.rule = rule
