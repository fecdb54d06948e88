"""Forms of text: every string that may cross the wire has one, so that no field can carry a name, an id or a path.

A form is attached to a field's type as `Annotated[str, Form(...)]` and checked when a message is sent or received.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated

from fourdvq.errors import WireError


@dataclass(frozen=True)
class Form:
    """A regular expression that the whole text must match, and the longest length allowed."""

    name: str
    pattern: str
    longest: int

    def check(self, text: str, where: str) -> None:
        """Raise WireError E_MESSAGE if `text` does not have this form; the text itself is never repeated."""
        if len(text) > self.longest or not re.fullmatch(self.pattern, text, flags=re.DOTALL):
            raise WireError(
                "E_MESSAGE", where=where, found=f"text of {len(text)} characters of another form", wanted=self.name
            )
        if self.name == "json":
            try:
                json.loads(text)
            except ValueError:
                raise WireError("E_MESSAGE", where=where, found="text that is not JSON", wanted="json") from None


Sha256 = Annotated[str, Form("sha256 or empty", r"([0-9a-f]{64})?", 64)]
Nonce = Annotated[str, Form("32 hex digits", r"[0-9a-f]{32}", 32)]
RunId = Annotated[str, Form("run name", r"[a-z0-9][a-z0-9-]{0,47}", 48)]
OptionalRunId = Annotated[str, Form("run name or empty", r"([a-z0-9][a-z0-9-]{0,47})?", 48)]
SiteName = Annotated[str, Form("site name", r"[a-z][a-z0-9-]{0,31}", 32)]
Version = Annotated[str, Form("version", r"[0-9A-Za-z.+-]{1,32}", 32)]
Code = Annotated[str, Form("error code", r"[A-Z][A-Z_]{1,39}", 40)]
RowName = Annotated[str, Form("row name", r"[a-z][a-z0-9_./<>+ -]{0,79}", 80)]
Word = Annotated[str, Form("word", r"[a-z][a-z0-9_]{0,39}", 40)]
Json = Annotated[str, Form("json", r".*", 4_000_000)]
TENSOR_NAME = Form("tensor name", r"[A-Za-z0-9_.]{1,160}", 160)
