"""The page "What leaves the hospital", made from the message classes themselves, so that it cannot fall behind them.

python -m fourdvq_client.what_leaves > docs/explanation/what-leaves-the-hospital.md
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fourdvq.error_codes import WIRE_CODES
from fourdvq.wire.body import leaf_types
from fourdvq.wire.forms import Form
from fourdvq.wire.messages import PROTOCOL, TASKS, MaskedReply, Refusal, Reply, ReplyEnvelope, RiskReply, reply_types

_HEAD = f"""# What leaves the hospital

This page is made from the message classes (`fourdvq/wire/messages.py`, protocol {PROTOCOL}) by
`python -m fourdvq_client.what_leaves`; a test holds it equal to them. What is not on it cannot be sent: a reply is
built again, field by field, from its declared type before it leaves, and a field of text must match a fixed form that
admits no name, patient id, path or date.

Scans, masks, patient rows, survival times, dates, real ids and pseudonyms never leave. The rules below are the site's
own (`policy.yaml`); no message can change them. Weight updates are not anonymous by themselves: an update of one
patient can be turned back into that patient's scan, which is why the smallest number of patients is the most important
rule. There is no differential privacy guarantee in this version.

A site only answers. Nothing is sent that was not asked for by a task of an approved plan, except that a site says who
it is (`query.hello`) and whether a person has approved the plan (`query.plan`).
"""

_RULES = {
    "site_card": "Counts are rounded up to multiples of `min_cell`; reasons with fewer scans are withheld.",
    "plan_ack": "One word: yes or no.",
    "codebook_stats": (
        "Refused below `min_patients_per_round`; rows seen in fewer than `codebook_min_patients` patients are zeros."
    ),
    "delta": (
        "Refused below `min_patients_per_round` and `min_scans_per_round`; the change is clipped to `max_rel_update` "
        "and rounded to `wire_dtype`; codes seen in fewer than `codebook_min_patients` patients leave as zeros; only "
        "metrics of the policy's list, to `sig_digits`."
    ),
    "cox_stats": (
        "The rules of the policy's `cox` block are applied before anything is summed; arrays may not be longer than "
        "the models that were asked for. From `masking_from` sites on they leave as `MaskedReply` alone."
    ),
    "eval_summary": (
        "Refused below `min_patients_per_summary`; rows of fewer than `min_cell` items are withheld, their number is "
        "rounded to multiples of it, mean and spread to `sig_digits`. Counts of errors leave as they are, one a "
        "patient, over bins that the plan fixes; a horizon of fewer than `min_cell` patients leaves as zeros."
    ),
    "report": "Only what a person put into the outbox with `submit`; refused if it holds an id, a path or a date.",
    "receipt": "The hash must be one that came down with the task; counts are rounded.",
    "refusal": "One code of the list below.",
}


_MASKED = "named tensors: the arrays of the unmasked answer, each value under a mask of its own"


def page() -> str:
    """The whole page as Markdown."""
    parts = [_HEAD, "## Around every reply\n", _table(ReplyEnvelope), "## Instead of any reply\n", _section(Refusal)]
    parts.append("Codes: " + ", ".join(f"`{code}`" for code in WIRE_CODES) + ".\n")
    parts.append("## Replies by message type\n")
    for kind in TASKS:
        asks = "training sites only" if TASKS[kind].trains else "all sites"
        first, *others = reply_types(kind)
        parts.append(f"### `{kind}`\n\nAnswer `{first.__name__}`, {asks}.\n")
        parts.append(_section(first))
        if others:
            names = " or ".join(f"`{other.__name__}`" for other in others)
            parts.append(f"Or {names}, as under *Other answers of the survival analysis*.\n")
    parts.append("## Other answers of the survival analysis\n")
    for reply in (MaskedReply, RiskReply):
        parts.append(f"### `{reply.__name__}`\n\n{_section(reply)}")
    return "\n".join(parts).rstrip() + "\n"


def _section(reply: type[Reply]) -> str:
    return f"Kind of data: `{reply.egress}`. {_RULES[reply.egress]}\n\n{_table(reply)}"


def _table(cls: type[Any]) -> str:
    rows = [f"| `{name}` | {_MASKED if name == 'hidden' else _words(hint)} |" for name, hint in leaf_types(cls)]
    return "\n".join(["| field | what it can hold |", "|---|---|", *rows, ""]) if rows else "No fields.\n"


def _words(hint: Any) -> str:
    return ", ".join(_parts(hint))


def _parts(hint: Any) -> Iterator[str]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        forms = [a for a in args[1:] if isinstance(a, Form)]
        yield f"text of the form: {forms[0].name}" if forms else _words(args[0])
    elif origin is typing.Literal:
        yield "one of " + " ".join(f"`{a}`" for a in args)
    elif hint is np.ndarray or origin is np.ndarray:
        yield "an array of numbers"
    elif origin is tuple:
        yield f"a list: {_words(args[0])}"
    elif len(args) == 2 and args[1] is torch.Tensor:
        yield "named tensors, exactly those of the plan's model"
    elif origin is not None and issubclass(origin, Mapping):
        yield f"words from a fixed list, each with {_words(args[1])}"
    else:
        yield {bool: "yes or no", int: "a whole number", float: "a finite number"}[hint]


if __name__ == "__main__":
    print(page(), end="")
