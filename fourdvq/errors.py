"""The error tree: everything that can go wrong on purpose, with a code, place, found, wanted, and a remedy.

    FourdvqError                 exit 1
      ConfigError                exit 2   a key, type or value of a configuration, plan, profile or command line
      DataError                  exit 3   a scan, a table row or a derived file
        VolumeError                       one volume
        CohortError                       tables, patients, splits
        RegistrationError                 a pair of scans
      ModelError                 exit 1   weights, architecture, numerics
      SurvivalError              exit 2   an input of the survival analysis; also a ValueError
      ConnectionFailed           exit 4   the other side cannot be reached
      Refused                    exit 5   policy, authentication, protocol or version
        WireError                         a message that does not have its declared form
      TemporaryStop              exit 75  the same command resumes

Details (path, row, value) are for the person at the site. What may reach the coordinator is `wire_code(error)` alone.
The long text of a code is in `fourdvq.error_codes`.
"""

from __future__ import annotations

from typing import Any, Final

from fourdvq.error_codes import CODES, WIRE_CODES, Explanation, wire_code_of

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_SOME_REFUSED: Final = 3
EXIT_UNREACHABLE: Final = 4
EXIT_REFUSED: Final = 5
EXIT_TEMPORARY: Final = 75
EXIT_INTERRUPTED: Final = 130


class FourdvqError(Exception):
    """An error that a person can act on.

    `code` must be a key of `fourdvq.error_codes.CODES`; `where` names the place (file, row, field), `found` and
    `wanted` the facts, `fix` the next step. What is left out is filled from the code's explanation.
    """

    exit_code: int = EXIT_FAILED

    def __init__(self, code: str, *, where: str = "", found: str = "", wanted: str = "", fix: str = "") -> None:
        explanation = explain(code)
        self.code = code
        self.where = where
        self.found = found
        self.wanted = wanted or explanation.wanted
        self.why = explanation.why
        self.fix = fix or explanation.fix
        self.title = explanation.title
        parts = [f"{code}: {self.title}"]
        parts += [
            f"{label} {text}" for label, text in (("at", where), ("found", found), ("wanted", self.wanted)) if text
        ]
        super().__init__("; ".join(parts))

    def as_dict(self) -> dict[str, Any]:
        """The form that `--json` prints."""
        return {
            "ok": False,
            "code": self.code,
            "title": self.title,
            "where": self.where,
            "found": self.found,
            "wanted": self.wanted,
            "why": self.why,
            "fix": self.fix,
        }


class ConfigError(FourdvqError):
    """A key, type or value of a configuration, plan, profile or command line is not what it must be."""

    exit_code = EXIT_USAGE


class DataError(FourdvqError):
    """A scan, a table row or a derived file cannot be used."""

    exit_code = EXIT_SOME_REFUSED


class VolumeError(DataError):
    """One volume cannot be read or does not have the geometry or intensities that it must have."""


class CohortError(DataError):
    """Tables, patients or splits do not fit together."""


class RegistrationError(DataError):
    """A follow-up could not be aligned with its baseline."""


class ModelError(FourdvqError):
    """Weights, architecture or numerics of a model are wrong."""


class SurvivalError(FourdvqError, ValueError):
    """An input of the survival analysis breaks a rule; names column and rule, never a value."""

    exit_code = EXIT_USAGE


class ConnectionFailed(FourdvqError):
    """The other side cannot be reached."""

    exit_code = EXIT_UNREACHABLE


class Refused(FourdvqError):
    """Policy, authentication, protocol or version forbids it."""

    exit_code = EXIT_REFUSED


class WireError(Refused):
    """A message does not have its declared form."""


class TemporaryStop(FourdvqError):
    """Stopped for a temporary reason; the same command resumes."""

    exit_code = EXIT_TEMPORARY


def explain(code: str) -> Explanation:
    """The title, reason, expectation and remedy of a code. Raises KeyError for a code that nobody declared."""
    return CODES[code]


def wire_code(error: BaseException) -> str:
    """The only thing about an error that may leave a site: one of `WIRE_CODES`, INTERNAL for the unforeseen."""
    if isinstance(error, FourdvqError):
        return wire_code_of(error.code)
    if isinstance(error, MemoryError):
        return "OUT_OF_MEMORY"
    return "INTERNAL"


__all__ = [
    "CODES",
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_OK",
    "EXIT_REFUSED",
    "EXIT_SOME_REFUSED",
    "EXIT_TEMPORARY",
    "EXIT_UNREACHABLE",
    "EXIT_USAGE",
    "WIRE_CODES",
    "CohortError",
    "ConfigError",
    "ConnectionFailed",
    "DataError",
    "Explanation",
    "FourdvqError",
    "ModelError",
    "Refused",
    "RegistrationError",
    "SurvivalError",
    "TemporaryStop",
    "VolumeError",
    "WireError",
    "explain",
    "wire_code",
]
