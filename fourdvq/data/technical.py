"""What a DICOM header says about the scanner and the breath hold, reduced to a fixed set of words and numbers.

Free text never goes on: a kernel becomes its class, a manufacturer one of the known names. What is not listed in
`TechnicalTags` does not leave the reader of the header.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from fourdvq.data.dicom_file import SliceHeader

KernelClass = Literal["soft", "sharp", "unknown"]
_MAKERS = {
    "siemens": ("siemens",),
    "ge": ("ge ", "ge medical", "general electric"),
    "philips": ("philips", "marconi", "picker"),
    "canon": ("canon", "toshiba"),
    "fujifilm": ("fuji", "hitachi"),
    "united imaging": ("uih", "united imaging"),
    "neusoft": ("neusoft",),
}
# Siemens from 50 up, GE, Canon lung and bone, Philips. What is left of a known name is soft tissue.
_SHARP = re.compile(
    r"(?:B|BR|BL|HR|I|J|U|H)(?:[5-9]\d)|BONE|EDGE|LUNG|CHST|FC[35]\d|FC8\d|Y[A-D]$|(?:^|\W)[DEL]$", re.IGNORECASE
)
# English, Dutch, German and French, also as abbreviations; matched on words without punctuation.
_EXPIRATION = re.compile(r"\b(?:exs?p(?:i(?:r\w*)?)?|espir\w*|uitadem\w*|uitgeademd|ausat\w*|ausgeatmet)\b")
_INSPIRATION = re.compile(r"\b(?:insp(?:ir\w*)?|inspi|inadem\w*|ingeademd|einat\w*|eingeatmet)\b")
_BOTH = re.compile(r"\bin\s*[+/&]\s*exs?p")  # an abbreviation only beside the other: "in exspiration" is one of them


@dataclass(frozen=True)
class TechnicalTags:
    """The whitelist: scanner maker, kernel class, tube voltage in kV, contrast; empty or None where not known."""

    manufacturer: str = ""
    kernel: KernelClass = "unknown"
    kvp: int | None = None
    contrast: bool = False


def technical_tags(s: SliceHeader) -> TechnicalTags:
    """The whitelisted facts of a header."""
    kvp = round(s.kvp) if s.kvp is not None and 20 <= s.kvp <= 200 else None
    return TechnicalTags(maker_of(s.manufacturer), kernel_class(s.kernel), kvp, s.contrast)


def maker_of(text: str) -> str:
    """One of the known makers, `other`, or empty if nothing is said."""
    lowered = f"{text.lower().strip()} "
    if not lowered.strip():
        return ""
    return next((maker for maker, starts in _MAKERS.items() if lowered.startswith(starts)), "other")


def kernel_class(text: str) -> KernelClass:
    """Whether a reconstruction kernel is sharp (lung, bone, edge) or soft."""
    name = text.strip().upper()
    if not name:
        return "unknown"
    return "sharp" if any(_SHARP.match(part) for part in name.split("/")) else "soft"


def breath_of(s: SliceHeader) -> Literal["inspiration", "expiration", "unknown"]:
    """What the names say. The series' own name counts before the protocol's, which may cover both breath holds."""
    for text in (s.description, s.protocol):
        words = re.sub(r"[\W_\d]+", " ", text.lower())
        out = bool(_EXPIRATION.search(words))
        into = bool(_INSPIRATION.search(words) or _BOTH.search(text.lower()))
        if out != into:
            return "expiration" if out else "inspiration"
    return "unknown"


def is_expiratory(s: SliceHeader) -> bool:
    """Whether the names say that the patient had breathed out."""
    return breath_of(s) == "expiration"
