"""The documentation against the code: made pages, links, codes, and every command that a page tells one to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from docs_commands import NOTES, applications, help_of, verbs
from docs_pages import DOCS, PAGES
from fourdvq import console
from fourdvq.error_codes import CODES

ROOT = DOCS.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in TEXTS]
APPLICATIONS = applications()
VERBS = {program: dict(verbs(app)) for program, app in APPLICATIONS.items()}
EVERY = [(program, verb) for program, found in VERBS.items() for verb in found]

_LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"\b[EVW]_[A-Z]+(?:_[A-Z]+)*\b")
_COMMAND = re.compile(r"fourdvq-(?:client|server)\b[^`\n&|;>]*")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Program and words of each command in a code block or span; comments and global options are taken off."""
    for found in _COMMAND.findall(text):
        program, _, rest = found.partition(" ")
        yield program, console.split_options(shlex.split(rest, comments=True))[1]


def blocks_of(text: str) -> str:
    """The fenced code blocks of a page."""
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))


def verb_of(program: str, words: list[str]) -> str:
    """The verb that the words begin with; empty if there is none."""
    return next((name for n in (2, 1) if (name := " ".join(words[:n])) in VERBS[program]), "")


def parse(program: str, words: list[str]) -> None:
    """Let the command read its own words, without running it."""
    verb = verb_of(program, words)
    assert verb, f"{program} {' '.join(words)}"
    VERBS[program][verb].make_context(verb, words[len(verb.split()) :])


@pytest.mark.parametrize("page", PAGES)
def test_a_made_page_is_what_the_code_says(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert text == PAGES[page](text), "run: python tests/docs_pages.py"


@pytest.mark.parametrize("program", NOTES)
def test_every_verb_has_an_example_and_no_example_is_left_over(program):
    assert set(NOTES[program]) == set(VERBS[program])


@pytest.mark.parametrize(("program", "verb"), EVERY)
def test_every_verb_its_options_and_its_example_are_explained(program, verb, capsys):
    command = VERBS[program][verb]
    assert (command.help or "").strip()
    assert all(help_of(parameter, command) for parameter in command.params)
    words = console.split_options(shlex.split(NOTES[program][verb].example))[1]
    assert verb_of(program, words) == verb
    parse(program, words)
    assert console.run(_typer(program), [*verb.split(), "--help"], program) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_and_pictures_exist(name):
    missing = []
    for target, anchor in _LINK.findall(text_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            missing.append(f"{target}#{anchor}" if anchor else target)
    assert missing == []


@pytest.mark.parametrize("name", NAMES)
def test_every_code_that_a_page_mentions_exists(name):
    assert [code for code in _CODE.findall(text_of(name)) if code not in CODES] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_command_in_a_code_block_can_be_typed(name):
    for program, words in commands_in(blocks_of(text_of(name))):
        try:
            parse(program, words)
        except click.ClickException as error:
            pytest.fail(f"{program} {' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize("name", NAMES)
def test_a_command_within_a_sentence_names_a_verb(name):
    sentences = re.findall(r"`(fourdvq-(?:client|server) [^`\n]+)`", text_of(name))
    unknown = [s for s in sentences for program, words in commands_in(s) if not _is_known(program, words)]
    assert unknown == []


def test_a_command_in_a_remedy_names_a_verb():
    unknown = [
        f"{code}: {program} {' '.join(words)}"
        for code, text in CODES.items()
        for program, words in commands_in(re.sub(r"[.,)]+(?=\s|$)", ";", text.fix))
        if not _is_known(program, words)
    ]
    assert unknown == []


def test_a_page_that_the_code_refers_to_exists():
    named = {
        (page, path.relative_to(ROOT).as_posix())
        for part in ("fourdvq", "client", "server", "tests")
        for path in (ROOT / part).rglob("*.py")
        for page in re.findall(r"\bdocs/[\w/.-]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert sorted((page, path) for page, path in named if not (ROOT / page).is_file()) == []


def test_the_index_links_every_page():
    index = DOCS / "README.md"
    linked = {(DOCS / target).resolve() for target, _ in _LINK.findall(index.read_text(encoding="utf-8")) if target}
    assert [p.relative_to(DOCS).as_posix() for p in sorted(DOCS.rglob("*.md")) if p not in linked | {index}] == []


def test_decisions_are_numbered_without_a_gap():
    numbers = [int(path.name[:4]) for path in sorted((DOCS / "decisions").glob("0*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def _typer(program: str):
    from fourdvq_client.cli import app as client
    from fourdvq_server.cli import app as server

    return {"fourdvq-client": client, "fourdvq-server": server}[program]


def _is_known(program: str, words: list[str]) -> bool:
    groups = {name.split()[0] for name in VERBS[program] if " " in name}
    return bool(verb_of(program, words)) or not words or words[0] in groups


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
