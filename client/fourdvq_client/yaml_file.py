"""YAML that people at a site write, read strictly: numbers as YAML 1.2 has them, no duplicate keys, no interpolation.

The one file of the client that imports omegaconf, whose reader takes 3e-4 as a number and a date as text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fourdvq.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that the file holds. Raises ConfigError E_FILE, or E_TYPE with the line for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("E_FILE", where=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            "E_FILE", where=str(path), found=type(error).__name__, wanted="a readable text file"
        ) from None
    return parse_yaml(text, where=path.name)


def parse_yaml(text: str, *, where: str) -> dict[str, Any]:
    """The mapping in `text`; `where` names its origin in errors."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for number, line in enumerate(text.splitlines(), start=1):
        if "${" in line.partition("#")[0]:
            raise ConfigError(
                "E_TYPE",
                where=f"{where} line {number}",
                found="${",
                wanted="plain values",
                fix="write the value itself",
            )
    try:
        plain = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError("E_TYPE", where=where, found=_one_line(error), wanted="YAML") from None
    if not isinstance(plain, dict):
        raise ConfigError("E_TYPE", where=where, found=type(plain).__name__, wanted="a mapping of keys to values")
    return {_key(key, where): _checked(value, f"{where}: {key!s}") for key, value in plain.items()}


def _checked(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {_key(key, where): _checked(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_checked(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value


def _key(key: Any, where: str) -> str:
    """Keys are text; whole numbers are codes of a table; a word that YAML reads as a boolean is refused."""
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise ConfigError(
            "E_TYPE",
            where=where,
            found=f"the key {key!r}",
            wanted="text",
            fix='quote the key: "on", "off", "yes" and "no" are read as true and false without quotes',
        )
    return str(key)


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f" at line {mark.line + 1}" if mark is not None else ""
    return (getattr(error, "problem", None) or str(error).splitlines()[0]) + line
