"""Write the pages of docs/ that are made from the code: `python tests/docs_pages.py`. The tests hold them equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from docs_commands import with_reference
from docs_tables import configuration_page, errors_page, messages_page

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _what_leaves() -> str:
    from fourdvq_client.what_leaves import page

    return page()


# Page to what makes it, given its present text: two pages are made in part, the rest in whole.
PAGES: dict[str, Callable[[str], str]] = {
    "reference/client-cli.md": lambda text: with_reference(text, "fourdvq-client"),
    "reference/server-cli.md": lambda text: with_reference(text, "fourdvq-server"),
    "reference/errors.md": lambda _: errors_page(),
    "reference/configuration.md": lambda _: configuration_page(),
    "reference/messages.md": lambda _: messages_page(),
    "explanation/what-leaves-the-hospital.md": lambda _: _what_leaves(),
}


def write_pages() -> list[str]:
    """Write every page that differs; returns their names."""
    changed = []
    for name, make in PAGES.items():
        path = DOCS / name
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        after = make(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(name)
    return changed


if __name__ == "__main__":
    print("\n".join(write_pages()) or "every page is up to date")
