"""Reference pages made from the code: error codes, settings, messages. Plain Markdown, without dates."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fourdvq.error_codes import CODES, WIRE_CODES
from fourdvq.plan import Plan
from fourdvq.preprocessing.profile import Profile
from fourdvq.wire.messages import PROTOCOL, TASKS, reply_types
from fourdvq_client.policy import SitePolicy
from fourdvq_client.workspace import SiteConfig
from fourdvq_server.settings import ServerSettings

_MADE = "This page is made by `python tests/docs_pages.py`; a test holds it equal to the code.\n"


def errors_page() -> str:
    """Every code with its meaning, reason, expectation and remedy."""
    groups = {
        "Codes that may leave a site": ("The coordinator learns one of these and nothing else.", list(WIRE_CODES)),
        "What blocks": ("With `--json` an error is one object with these parts.", _starting("E_")),
        "What a person must look at": ("A scan waits for a decision: `fourdvq-client qc`.", _starting("V_")),
        "Warnings": ("Told, and nothing stops.", _starting("W_")),
    }
    parts = ["# Error codes\n", _MADE]
    parts.append(
        "At the terminal: `fourdvq-client explain CODE` or `fourdvq-server explain CODE`. An error also names the "
        "place, what was found there and the next step. The last column is all that the coordinator learns of it.\n"
    )
    for title, (text, codes) in groups.items():
        rows = [(f"`{c}`", CODES[c].title, CODES[c].why, CODES[c].wanted, CODES[c].fix, _outside(c)) for c in codes]
        columns = ("code", "meaning", "why", "wanted", "what to do", "leaves as")
        parts += [f"## {title}\n\n{text}\n", _table(columns, rows)]
    return "\n".join(parts).rstrip() + "\n"


def configuration_page() -> str:
    """Every setting of the plan, the preprocessing profile, site.yaml, policy.yaml and server.yaml."""
    parts = ["# Settings\n", _MADE]
    sections: dict[str, tuple[type, str]] = {
        "The plan": (
            Plan,
            "What both sides agree on; its sha256 is its identity. Change it with `key=value` after "
            "`fourdvq-server run` or `fourdvq-server plan`; `fourdvq-server show-config experiment=NAME` prints the "
            'values of a preset. "Paper" and "code" are the publication and its released code, see '
            "[model.md](model.md) and [survival.md](survival.md).",
        ),
        "The preprocessing profile": (
            Profile,
            "Everything that changes a voxel: one file of `configs/preprocessing/`, the same at every site. See "
            "[data.md](data.md).",
        ),
        "site.yaml": (SiteConfig, "A site's own paths and machine; `fourdvq-client show-config` prints them."),
        "policy.yaml": (
            SitePolicy,
            "What may be asked of a site and what may leave it. Every key is needed; the templates of "
            "`site_templates/` hold values and comments. `cox` takes the fields of "
            "[survival.md](survival.md#what-a-site-refuses).",
        ),
        "server.yaml": (ServerSettings, "The coordinator's address and ports, written by `fourdvq-server init`."),
    }
    for title, (cls, text) in sections.items():
        parts += [f"## {title}\n\n{text}\n", _table(("key", "type", "default", "remark"), list(_settings(cls)))]
    return "\n".join(parts).rstrip() + "\n"


def messages_page() -> str:
    """Every message type: what goes down, what may come up, which kind of data that is, and whether it adds up."""
    parts = ["# Messages\n", _MADE]
    parts.append(
        f"Protocol {PROTOCOL}. A site only answers. `down` is what a task holds beside its envelope, `up` the class of "
        "the answer; its fields, and the rules that it must pass, are in "
        "[what leaves the hospital](../explanation/what-leaves-the-hospital.md). A refusal (`Refusal`, one code) may "
        "take the place of any answer. Where the answer adds up, the sum of the sites' answers is the answer of the "
        "union of their patients; masked answers add up to the total only. Classes: `fourdvq/wire/messages.py`; the "
        "requests and sums of the survival analysis: `fourdvq/survival/messages.py`.\n"
    )
    rows = []
    for kind, task in TASKS.items():
        answers = reply_types(kind)
        down = ", ".join(f"`{field.name}`" for field in dataclasses.fields(typing.cast(Any, task))) or "-"
        up = " or ".join(f"`{a.__name__}`" for a in answers)
        egress = ", ".join(dict.fromkeys(f"`{a.egress}`" for a in answers))
        adds = "yes" if hasattr(answers[0], "__add__") else "no"
        rows.append((f"`{kind}`", "train" if task.trains else "all", down, up, egress, adds))
    parts.append(_table(("type", "sites", "down", "up", "kind of data", "adds up"), rows))
    return "\n".join(parts).rstrip() + "\n"


def _starting(prefix: str) -> list[str]:
    return [code for code in CODES if code.startswith(prefix)]


def _outside(code: str) -> str:
    return "" if code in WIRE_CODES or code.startswith("W_") else f"`{CODES[code].wire}`"


def _settings(cls: type, before: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Rows of (dotted key, type, default, remark) of a dataclass and of the dataclasses inside it, in their order."""
    remarks = field_remarks(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        key, hint = before + field.name, hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield f"`{key}`", "", "", (inspect.getdoc(hint) or "").split("\n\n")[0].replace("\n", " ")
            yield from _settings(typing.cast(type, hint), f"{key}.")
        else:
            yield f"`{key}`", _type_name(hint), _default(field), remarks.get(field.name, "")


def field_remarks(cls: type) -> dict[str, str]:
    """The comment at the end of each field's line, read from the source: it names the number's origin."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    lines = {ast.unparse(node.target): node.end_lineno for node in fields}
    return {name: comments[line] for name, line in lines.items() if line in comments}


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{_plain(field.default)}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_plain(field.default_factory())}`"
    return "required"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    words = {None: "null", True: "true", False: "false", "": '""'}
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _type_name(hint: Any) -> str:
    """The type in a reader's words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any"}
    if hint in plain:
        return plain[hint]
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return " or ".join(f"`{_plain(a)}`" for a in args)
    if origin is tuple:
        return f"list of {_type_name(args[0])}" if args[1:] == (...,) else f"{len(args)} x {_type_name(args[0])}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return f"names, each with {_type_name(args[1])}"
    if args:
        return " or ".join(_type_name(a) for a in args)
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(f.name for f in dataclasses.fields(hint)) + "}"
    return "path" if getattr(hint, "__name__", "") == "Path" else str(getattr(hint, "__name__", hint))


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(columns)
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
