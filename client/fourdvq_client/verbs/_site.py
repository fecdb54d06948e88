"""What most verbs begin with: the site folder that `--workdir` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fourdvq import console

if TYPE_CHECKING:
    from fourdvq_client.workspace import SiteConfig, Workspace


def here() -> tuple[Workspace, SiteConfig]:
    """The site in the working folder. Raises ConfigError E_NOT_A_SITE."""
    from fourdvq_client.workspace import open_workspace

    return open_workspace(console.options().workdir)


def user_name() -> str:
    """Who sits at the keyboard, for decisions that carry a name."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"
