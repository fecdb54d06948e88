"""The site's ClientApp: a standard Flower object with one handler per message type. It runs the same over the network
and inside one process; all it does is carry records between Flower and the guard.
"""

from __future__ import annotations

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fourdvq.wire.messages import TASKS
from fourdvq_client.guard import NO_ENVELOPE, Guard
from fourdvq_client.runtime import Site
from fourdvq_client.site_log import site_logger
from fourdvq_client.tasks import handle


def make_client_app(site: Site) -> ClientApp:
    """A ClientApp that answers every message type; what it cannot do it refuses with a code."""
    app = ClientApp()
    for kind in TASKS:
        category, _, action = kind.partition(".")
        register = {"query": app.query, "train": app.train, "evaluate": app.evaluate}[category]
        register(action)(_handler(kind, site))
    return app


def answer(kind: str, records: RecordDict, site: Site) -> RecordDict:
    """One task in, one reply out, through both doors. Any error leaves as its code, through the same door."""
    guard: Guard = site.guard
    envelope = NO_ENVELOPE
    try:
        envelope, task = guard.accept(kind, records)
        outcome = handle(task, envelope, site)
        return guard.release(outcome, envelope, kind, task)
    except Exception as error:
        # The words stay here, in the site's own log.
        site_logger(site.workspace).exception("%s of run %s, round %s", kind, envelope.run, envelope.round)
        return guard.refusal(error, guard.envelope_of(records, envelope), kind)


def _handler(kind: str, site: Site):  # type: ignore[no-untyped-def]  # Flower's own alias is not exported
    def handler(message: Message, context: Context) -> Message:
        del context
        return Message(answer(kind, message.content, site), reply_to=message)

    return handler
