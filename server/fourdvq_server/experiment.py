"""An experiment out of Hydra groups: composed once, made plain, built into frozen objects. Nothing below sees a tree.

`plan_defaults` in configs/config.yaml is the defaults of fourdvq/plan.py, so that every number stands once, there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fourdvq.config import build, to_plain
from fourdvq.errors import ConfigError
from fourdvq.plan import Plan, plan_from
from fourdvq.preprocessing.profile import Profile, profile_from, profile_to_plain

CONFIG_MODULE = "fourdvq_configs"
_DEFAULTS = "plan_defaults"
_DERIVED = ("profile_sha256", "window_hu")  # of the plan, from the profile


@dataclass(frozen=True)
class TrackingSpec:
    """Where metrics go beside the run folder; no part of the plan."""

    store: Literal["sqlite", "none"] = "sqlite"
    experiment: str = "fourdvq"


@dataclass(frozen=True)
class Experiment:
    """The plan with the whole profile it names by hash, the tracking, and the overrides that a person typed."""

    plan: Plan
    profile: Profile
    tracking: TrackingSpec = field(default_factory=TrackingSpec)
    overrides: tuple[str, ...] = ()

    @property
    def profile_plain(self) -> dict[str, Any]:
        """The profile as JSON-able data: what travels in `query.plan` and invitations."""
        return profile_to_plain(self.profile)


def compose(overrides: Sequence[str] = ()) -> Experiment:
    """The experiment for command line overrides such as `experiment=tiny federation.rounds=3`.

    Raises ConfigError E_VALUE for what Hydra cannot compose (with its own text, which lists the choices), E_KEY for an
    unknown key, E_TYPE for a value of another type.
    """
    plain = compose_plain(overrides)
    profile = profile_from(plain.pop("preprocessing"))
    tracking = build(TrackingSpec, plain.pop("tracking"), where="tracking")
    derived = {"profile_sha256": profile.sha256, "window_hu": list(profile.window_hu)}
    grid = profile.grid.size
    plan = plan_from({**plain, **derived})
    if plan.model.size != grid:
        raise ConfigError(
            "E_VALUE",
            where="model.size",
            found=str(list(plan.model.size)),
            wanted=f"{list(grid)}, the grid of preprocessing profile {profile.name}",
            fix="choose a model and a profile of one size",
        )
    return Experiment(plan, profile, tracking, tuple(overrides))


def compose_plain(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The composed configuration as plain data, before it is typed."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _store_defaults()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            tree = hydra_compose("config", overrides=list(overrides))
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            "E_VALUE",
            where=" ".join(overrides) or "configs",
            found=_readable(str(error)),
            fix="`fourdvq-server experiments` lists the presets, `show-config` all keys",
        ) from None
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}


def presets() -> list[tuple[str, str]]:
    """Name and first comment line of every experiment file, by name."""
    folder = config_folder() / "experiment"
    found = []
    for path in sorted(folder.glob("*.yaml")):
        comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        text = next((line.lstrip("# ") for line in comments if "@package" not in line), "")
        found.append((path.stem, text))
    return found


def config_folder() -> Path:
    """Where the installed Hydra groups lie."""
    import importlib

    module = importlib.import_module(CONFIG_MODULE)
    return Path(str(module.__file__)).parent


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested plain data as dotted keys and text values, for MLflow's parameters and `show-config`."""
    if isinstance(value, Mapping):
        flat: dict[str, str] = {}
        for key, item in value.items():
            flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(value)}


def _store_defaults() -> None:
    from hydra.core.config_store import ConfigStore

    defaults = to_plain(Plan(name="", profile_sha256=""))
    for key in _DERIVED:
        del defaults[key]
    ConfigStore.instance().store(name=_DEFAULTS, node=defaults)


def _readable(text: str) -> str:
    """Hydra's text on one line, without its help address."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Set the env")]
    return re.sub(r"See https?://\S+.*", "", " ".join(lines))[:500].strip()
