"""The row of stages of one experiment. A new stage is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fourdvq.errors import ConfigError
from fourdvq_server.stages import (
    approval,
    codebook_init,
    encode,
    freeze,
    hello,
    longitudinal,
    ode,
    release,
    survival,
    validate,
    vqgan,
)
from fourdvq_server.stages.context import StageContext


@dataclass(frozen=True)
class Stage:
    """`run` returns the stage's facts. `always`: asked again on resume, because sites come and go."""

    name: str
    run: Callable[[StageContext], dict[str, Any]]
    always: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("hello", hello.run, always=True),
    Stage("plan", approval.run, always=True),
    Stage(codebook_init.NAME, codebook_init.run),
    Stage(vqgan.NAME, vqgan.run),
    Stage(freeze.NAME, freeze.run),
    Stage(encode.NAME, encode.run),
    Stage(ode.NAME, ode.run),
    Stage(survival.NAME, survival.run),
    Stage(validate.NAME, validate.run),
    Stage(longitudinal.NAME, longitudinal.run),
    Stage(release.NAME, release.run),
)


def stages_until(name: str) -> tuple[Stage, ...]:
    """The row up to and including the stage `name`. Raises ConfigError E_VALUE for a name that is not there."""
    names = [stage.name for stage in STAGES]
    if name not in names:
        raise ConfigError("E_VALUE", where="stage", found=name, wanted=", ".join(names))
    return STAGES[: names.index(name) + 1]
