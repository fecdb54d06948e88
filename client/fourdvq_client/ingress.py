"""What a task must be before anything at the site is touched: its fields against the approved plan, its model against
the plan's architecture. Pure checks; `guard.accept` calls them in order.

K codes, c code dimension.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fourdvq.config import build
from fourdvq.errors import ConfigError, Refused
from fourdvq.plan import Plan
from fourdvq.tensors import Weights, first_nonfinite, form_difference, payload_sha256
from fourdvq.training.update import global_norm
from fourdvq.wire.messages import (
    CodebookInitTask,
    ConformalTask,
    CoxFutureTask,
    EncodeTask,
    OdeTask,
    PlanTask,
    ReconstructionTask,
    ReleaseTask,
    Task,
    TaskEnvelope,
    TrajectoryTask,
    VqganTask,
)
from fourdvq_client.policy import SitePolicy

# Which model a task carries: its weights are held against the last accepted ones of the same stage.
STAGES: dict[type[Task], str] = {
    CodebookInitTask: "vqgan",
    VqganTask: "vqgan",
    EncodeTask: "vqgan",
    ReconstructionTask: "vqgan",
    OdeTask: "ode",
    TrajectoryTask: "ode",
    ConformalTask: "ode",
    CoxFutureTask: "ode",
}
RELEASE_PARTS = ("vqgan.", "codebook.", "ode.")


def check_fields(task: Task, plan: Plan, policy: SitePolicy) -> None:
    """Raise Refused PLAN_MISMATCH where a field differs from what the plan determines, FIELD_OUT_OF_BOUNDS where it
    is more than the site allows to anybody."""
    check = FIELD_CHECKS.get(type(task))
    if check is not None:
        check(task, plan, policy)


def check_parent(task: Task, envelope: TaskEnvelope) -> None:
    """Raise Refused PARENT_MISMATCH unless `parent` is the payload sha256 of the task's weights."""
    weights = getattr(task, "weights", None)
    if weights is not None and payload_sha256(weights) != envelope.parent:
        raise Refused("PARENT_MISMATCH", where=type(task).__name__, found="weights of another sha256")


def check_model(task: Task, plan: Plan | None) -> None:
    """Raise Refused MODEL_REJECTED unless all tensors have the plan's names, shapes and dtypes and are finite.

    Of a release without a known plan only the parts' names and the values are checked: `pull` needs no approved plan.
    """
    if isinstance(task, ReleaseTask):
        _check_release(task, plan)
    elif plan is not None and type(task) in STAGES:
        _check_form(task.weights, plan, task)  # type: ignore[attr-defined]
        if hasattr(task, "codes"):
            _check_codes(task, plan)


def check_change(weights: Weights, last: Weights | None, limit: float) -> None:
    """Raise Refused MODEL_REJECTED if the model moved by more than `limit` of its size since the last accepted one."""
    if last is None:
        return
    common = [name for name in weights if name in last and last[name].shape == weights[name].shape]
    moved = global_norm({n: weights[n].double() - last[n].double() for n in common})
    size = global_norm({n: last[n] for n in common})
    if moved > limit * max(size, 1e-12):
        raise Refused(
            "MODEL_REJECTED",
            where="change since the last accepted model",
            found=f"{moved / max(size, 1e-12):.3g} of its norm",
            wanted=f"at most {limit:g} (policy.yaml: ingress.max_rel_change)",
        )


@lru_cache(maxsize=4)
def vqgan_form(plan: Plan) -> Mapping[str, Tensor]:
    """Names, shapes and dtypes of the shared stage 1 weights, as tensors without storage."""
    from fourdvq.training.vqgan import initial_weights

    return _form_of(initial_weights(plan))


@lru_cache(maxsize=4)
def ode_form(plan: Plan) -> Mapping[str, Tensor]:
    """The same for the latent ODE."""
    from fourdvq.models.latent_ode import LatentODE
    from fourdvq.training.seeds import seeded

    with seeded(plan.seed, "form"):
        return _form_of(LatentODE(plan.temporal, plan.model.code_dim).state_dict())


def _form_of(weights: Weights) -> dict[str, Tensor]:
    return {name: torch.empty_like(t, device="meta") for name, t in weights.items()}


def _check_form(weights: Weights, plan: Plan, task: Task) -> None:
    if STAGES[type(task)] == "ode":
        wanted = ode_form(plan)
    else:
        wanted = vqgan_form(plan)
        if not isinstance(task, VqganTask) and not any(n.startswith("discriminators.") for n in weights):
            # Shared discriminators travel in training rounds only.
            wanted = {n: t for n, t in wanted.items() if not n.startswith("discriminators.")}
    difference = form_difference(weights, wanted)
    if difference:
        name, found, expected = difference
        raise Refused("MODEL_REJECTED", where=f"weights: {name}", found=found, wanted=expected)
    _check_finite(weights)


def _check_finite(weights: Weights) -> None:
    broken = first_nonfinite(weights)
    if broken:
        raise Refused("MODEL_REJECTED", where=f"weights: {broken}", found="NaN or infinity", wanted="finite values")


def _check_codes(task: Any, plan: Plan) -> None:
    k, c = plan.model.n_codes, plan.model.code_dim
    forms = {"codes": ((k, c), "float32"), "code_counts": ((k,), "float64"), "code_sums": ((k, c), "float64")}
    for name, (shape, dtype) in forms.items():
        array: np.ndarray = getattr(task, name)
        if array.shape != shape or array.dtype.name != dtype:
            raise Refused(
                "MODEL_REJECTED", where=name, found=f"{array.dtype}{list(array.shape)}", wanted=f"{dtype}{list(shape)}"
            )
        if not np.isfinite(array).all() or (name == "code_counts" and (array < 0).any()):
            raise Refused("MODEL_REJECTED", where=name, found="a value that is not finite or not a count")


def _check_release(task: ReleaseTask, plan: Plan | None) -> None:
    for name in task.weights:
        if not name.startswith(RELEASE_PARTS):
            raise Refused("MODEL_REJECTED", where="release", found="another name", wanted=", ".join(RELEASE_PARTS))
    _check_finite(task.weights)
    if plan is None:
        return
    for prefix, form in (("vqgan.", vqgan_form(plan)), ("ode.", ode_form(plan))):
        part = {n.removeprefix(prefix): t for n, t in task.weights.items() if n.startswith(prefix)}
        wanted = {n: t for n, t in form.items() if not n.startswith("discriminators.")}
        difference = form_difference(part, wanted) if part else None
        if difference:
            raise Refused("MODEL_REJECTED", where=prefix + difference[0], found=difference[1], wanted=difference[2])


def _equal(name: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise Refused("PLAN_MISMATCH", where=name, found=str(found), wanted=str(wanted))


def _steps(found: int, planned: int, policy: SitePolicy) -> None:
    if not 1 <= found <= policy.cohort.max_local_steps:
        raise Refused(
            "FIELD_OUT_OF_BOUNDS", where="steps", found=str(found), wanted=f"1 to {policy.cohort.max_local_steps}"
        )
    if found > planned:
        raise Refused("PLAN_MISMATCH", where="steps", found=str(found), wanted=f"at most {planned}")


def _vqgan(task: VqganTask, plan: Plan, policy: SitePolicy) -> None:
    _steps(task.steps, plan.federation.local_steps, policy)
    last = plan.federation.rounds * plan.federation.local_steps
    if not 0 <= task.global_step <= last - task.steps:
        raise Refused(
            "PLAN_MISMATCH", where="global_step", found=str(task.global_step), wanted=f"0 to {last - task.steps}"
        )
    _equal("discriminator", task.discriminator, discriminator_on(plan, task.global_step, task.steps))


def discriminator_on(plan: Plan, global_step: int, steps: int) -> bool:
    """Whether the discriminators take part in a round: from `gan.start_step` on, which may lie within the round."""
    return plan.gan.loss != "none" and global_step + steps > plan.gan.start_step


def _ode(task: OdeTask, plan: Plan, policy: SitePolicy) -> None:
    _steps(task.steps, plan.federation.ode_local_steps, policy)


def _codebook_init(task: CodebookInitTask, plan: Plan, _policy: SitePolicy) -> None:
    _equal("n_codes", task.n_codes, plan.model.n_codes)
    _equal("code_dim", task.code_dim, plan.model.code_dim)


def _trajectory(task: TrajectoryTask, plan: Plan, _policy: SitePolicy) -> None:
    if task.mode not in plan.evaluation.modes:
        raise Refused("PLAN_MISMATCH", where="mode", found=task.mode, wanted=" or ".join(plan.evaluation.modes))


def _conformal(_task: ConformalTask, plan: Plan, _policy: SitePolicy) -> None:
    if not plan.evaluation.conformal:
        raise Refused("PLAN_MISMATCH", where="evaluation.conformal", found="asked for", wanted="a plan that has it on")


FIELD_CHECKS: dict[type[Task], Callable[[Any, Plan, SitePolicy], None]] = {
    VqganTask: _vqgan,
    OdeTask: _ode,
    CodebookInitTask: _codebook_init,
    TrajectoryTask: _trajectory,
    ConformalTask: _conformal,
}


def read_plan(task: PlanTask, envelope: TaskEnvelope) -> tuple[Plan, Any]:
    """The plan and profile that a PlanTask carries, typed. Raises Refused PLAN_MISMATCH if their hashes differ from
    the envelope's, or if this version does not know a field."""
    from fourdvq.plan import plan_from
    from fourdvq.preprocessing.profile import Profile

    try:
        plan = plan_from(json.loads(task.plan_json))
        profile = build(Profile, json.loads(task.profile_json), where="profile")
    except ConfigError as error:
        raise Refused("PLAN_MISMATCH", where=error.where, found=error.found, wanted=error.wanted) from None
    if plan.hash != envelope.plan:
        raise Refused("PLAN_MISMATCH", where="plan", found=plan.hash, wanted=envelope.plan)
    if profile.sha256 != plan.profile_sha256:
        raise Refused("PLAN_MISMATCH", where="profile", found=profile.sha256, wanted=plan.profile_sha256)
    return plan, profile
