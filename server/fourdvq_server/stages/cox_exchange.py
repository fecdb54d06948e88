"""One survival analysis over several sites: its requests go out, masked answers come back, and only totals are read.

The mathematics is a `CoxRun`, which asks and listens. Two or more sites first exchange public keys through the
coordinator and mask what they send; the masks cancel in the sum. The keys are not signed: this hides the parts from
whoever follows the protocol or reads its records later, not from a coordinator that puts its own keys in between
(docs/reference/survival.md says how sites find that out). A site that is lost or refuses in any step ends the analysis,
because sums over a changed cohort are wrong. Every step is journaled: an interrupted coordinator makes the run again
and feeds it the recorded sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from fourdvq.errors import WireError
from fourdvq.survival.masking import unmask_total
from fourdvq.survival.messages import MESSAGES, HelloRequest, Message, Sums, answer_type, combine
from fourdvq.survival.run import CoxRun
from fourdvq.wire.masked import KEY_BYTES, masked_sums, peers_sha256
from fourdvq.wire.messages import COX_TASKS, CoxKey, CoxKeysTask, CoxPeersTask, CoxReply, MaskedReply, Receipt, Reply
from fourdvq_server.stages.context import StageContext
from fourdvq_server.store import StageStore

KIND_OF: dict[type[Message], str] = {request: f"query.{action}" for action, (request, _) in MESSAGES.items()}
MASKED_FROM = 2  # sites; with one there is nobody to hide among


@dataclass
class Analysis:
    """One attempt over `sites`: how many steps it took, and what ended it before its time, by site."""

    number: int
    sites: list[str]
    messages: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def masked(self) -> bool:
        return len(self.sites) >= MASKED_FROM


@dataclass(frozen=True)
class Exchange:
    """Carries the requests of analyses that share a stage and a tokenizer."""

    context: StageContext
    stage: StageStore
    tokenizer: str

    def converse(self, analysis: Analysis, run: CoxRun[Any]) -> bool:
        """Whether the run came to its end; if not, `analysis.failed` says which sites ended it, and people are told."""
        finished = (not analysis.masked or self._introduced(analysis)) and self._answered(analysis, run)
        if not finished:
            ended = ", ".join(f"{site} {code}" for site, code in analysis.failed.items())
            self.context.notify(f"survival analysis {analysis.number} ended: {ended}")
        return finished

    def _introduced(self, analysis: Analysis) -> bool:
        """Collect a public key from every site and give all of them to every site."""
        keys = self._ask(analysis, "keys", CoxKeysTask(analysis.number, self.tokenizer))
        for site, body in keys.items():
            if not isinstance(body, CoxKey) or body.public_key.shape != (KEY_BYTES,):
                analysis.failed[site] = "E_MESSAGE"
        if analysis.failed:
            return False
        sites = tuple(sorted(analysis.sites))
        public = np.stack([cast(CoxKey, keys[site]).public_key for site in sites])
        seen = peers_sha256(sites, public)
        receipts = self._ask(analysis, "peers", CoxPeersTask(analysis.number, self.tokenizer, sites, public))
        for site, body in receipts.items():
            if not isinstance(body, Receipt) or body.sha256 != seen:
                analysis.failed[site] = "E_PAYLOAD"
        return not analysis.failed

    def _answered(self, analysis: Analysis, run: CoxRun[Any]) -> bool:
        baseline = "site"
        while (request := run.request()) is not None:
            if isinstance(request, HelloRequest):
                baseline = request.baseline
            kind = KIND_OF[type(request)]
            task = COX_TASKS[kind](analysis.number, self.tokenizer, request)
            bodies = self._ask(analysis, f"step-{analysis.messages + 1:03d}", task)
            self.context.progress(self.stage.folder.name, analysis.messages + 1, 0, kind.removeprefix("query.cox_"))
            total = None if analysis.failed else self._total(analysis, bodies, answer_type(request, baseline))
            if total is None:
                return False
            analysis.messages += 1
            run.update(total)
        return True

    def _ask(self, analysis: Analysis, step: str, task: Any) -> dict[str, Reply]:
        exchange = f"analysis-{analysis.number}-{step}"
        replies = self.context.ask(self.stage, exchange, task, analysis.sites, quorum=0)
        analysis.failed = dict(replies.failed)
        return replies.bodies()

    def _total(self, analysis: Analysis, bodies: dict[str, Reply], kind: type[Sums]) -> Sums | None:
        """The sum of all answers; None, with `failed` filled in, if one is not what was asked for."""
        parts: list[Any] = []
        for site, body in bodies.items():
            try:
                parts.append(_part(analysis, body, kind))
            except WireError as error:
                analysis.failed[site] = error.code
        if analysis.failed:
            return None
        total: Sums = unmask_total(parts) if analysis.masked else combine(parts)
        counted = getattr(total, "sites", None)
        if counted is not None and int(counted[0]) != len(analysis.sites):
            # Masks that do not cancel leave noise, and nobody can tell whose masks were wrong.
            analysis.failed = dict.fromkeys(analysis.sites, "E_MESSAGE")
            return None
        return total


@dataclass
class Desk:
    """Numbers the analyses of one part of a run from `first` on, and keeps what ended those that did not finish."""

    exchange: Exchange
    first: int
    attempts: list[Analysis] = field(default_factory=list)
    ended: list[dict[str, Any]] = field(default_factory=list)

    def over(self, sites: list[str], purpose: str, run: CoxRun[Any]) -> Analysis | None:
        """The finished analysis of these sites, or None with what ended it on record."""
        analysis = Analysis(self.first + len(self.attempts), sites)
        self.attempts.append(analysis)
        if self.exchange.converse(analysis, run):
            return analysis
        self.ended.append({"purpose": purpose, "sites": sites, "ended_by": analysis.failed})
        return None


def _part(analysis: Analysis, body: Reply, kind: type[Sums]) -> Any:
    """One site's answer in the form in which parts are added. Raises WireError if it is not an answer to this step."""
    if analysis.masked:
        if isinstance(body, MaskedReply) and body.counter == analysis.messages and body.parties == len(analysis.sites):
            return masked_sums(body, kind)
    elif isinstance(body, CoxReply) and type(body.sums) is kind:
        return body.sums
    raise WireError("E_MESSAGE", where=kind.__name__, found="another answer", wanted="the answer to this step")
