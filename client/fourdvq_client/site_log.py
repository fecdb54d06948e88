"""logs/client.jsonl: one JSON object per event, with pseudonyms for patients and `<path>` for absolute paths."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

from fourdvq_client.preparation import real_ids
from fourdvq_client.workspace import Workspace

_PATH = re.compile(r"(?<![\w.<])(?:/[^\s'\":,;()]+){2,}")
_MAX_BYTES = 10_000_000


class JsonLines(logging.Formatter):
    """A record as one line of JSON; known patient ids become pseudonyms, absolute paths `<path>`."""

    def __init__(self, workspace: Workspace) -> None:
        super().__init__()
        self._workspace = workspace

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        utc = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps({"utc": utc, "level": record.levelname, "where": record.name, "text": self.clean(text)})

    def clean(self, text: str) -> str:
        """The text without real ids and paths. Ids are read anew each time: the table grows."""
        for pseudonym, real in sorted(real_ids(self._workspace).items(), key=lambda item: -len(item[1])):
            text = text.replace(real, pseudonym)
        return _PATH.sub("<path>", text)


def site_logger(workspace: Workspace) -> logging.Logger:
    """The logger of one site folder: in a demo several sites share a process, and none may read the others' lines."""
    name = hashlib.sha256(str(workspace.root).encode()).hexdigest()[:12]
    return logging.getLogger(f"fourdvq_client.site.{name}")


def start_log(workspace: Workspace, level: int = logging.INFO) -> logging.Logger:
    """The site's logger, writing to logs/client.jsonl from now on."""
    logger = site_logger(workspace)
    if not logger.handlers:
        workspace.logs.mkdir(parents=True, exist_ok=True)
        path = workspace.logs / "client.jsonl"
        handler = RotatingFileHandler(path, maxBytes=_MAX_BYTES, backupCount=3, encoding="utf-8")
        handler.setFormatter(JsonLines(workspace))
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    return logger
