"""policy: what the site's policy says, in words, and whether it is sound."""

from __future__ import annotations

import typer

from fourdvq.console import GLOBAL_HELP, Result
from fourdvq.errors import EXIT_OK, EXIT_REFUSED
from fourdvq_client.verbs._site import here

app = typer.Typer(
    help="What may leave this site, and whether the policy is sound.", no_args_is_help=True, epilog=GLOBAL_HELP
)


@app.command("show", epilog=GLOBAL_HELP)
def show() -> Result:
    """The policy in words."""
    from fourdvq.config import to_plain
    from fourdvq_client.policy import load_policy
    from fourdvq_client.policy_words import in_words

    workspace, _ = here()
    policy = load_policy(workspace.policy_yaml)
    return Result({"sha256": policy.sha256, "policy": to_plain(policy.rules)}, tuple(in_words(policy.rules)))


@app.command("check", epilog=GLOBAL_HELP)
def check() -> Result:
    """Read the policy strictly, compare it with what is installed, and name what looks wrong."""
    from fourdvq_client.code_identity import installed_code
    from fourdvq_client.policy import load_policy
    from fourdvq_client.policy_words import doubts
    from fourdvq_client.site_folder import code_entries

    workspace, config = here()
    policy = load_policy(workspace.policy_yaml)
    found = doubts(policy.rules, config.site, installed_code())
    entries = code_entries(installed_code())
    lines = [f"policy.yaml is complete, sha256 {policy.sha256}", *(f"{d.level}  {d.text}" for d in found)]
    lines += ["installed code, as entries of allowed_code:", entries]
    wrong = any(d.level == "FAIL" for d in found)
    facts = {
        "sha256": policy.sha256,
        "findings": [{"level": d.level, "text": d.text} for d in found],
        "installed": [vars(c) for c in installed_code()],
    }
    return Result(facts, tuple(lines), EXIT_REFUSED if wrong else EXIT_OK)
