"""The site's folder and settings."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import pytest

from fourdvq.errors import ConfigError, FourdvqError, TemporaryStop
from fourdvq_client.site_folder import SiteSettings, create_site
from fourdvq_client.workspace import Workspace, lock_holders, locked, open_workspace, read_profile
from site_cases import TEMPLATES, tiny_profile

GOOD = "site: leuven\nscans: ct\nclinical: clinical.csv\n"


def site(tmp_path, text):
    (tmp_path / "site.yaml").write_text(text)
    return tmp_path


def test_a_folder_without_site_yaml_is_not_a_site(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_workspace(tmp_path)
    assert caught.value.code == "E_NOT_A_SITE"
    assert caught.value.exit_code == 2


def test_relative_paths_count_from_the_site_folder_and_absolute_ones_stay(tmp_path):
    _, config = open_workspace(site(tmp_path, "site: leuven\nscans: ct\nclinical: /data/clinical.csv\n"))
    assert config.scans == tmp_path / "ct"
    assert str(config.clinical) == "/data/clinical.csv"


def test_codes_of_a_table_are_text_whatever_yaml_makes_of_them(tmp_path):
    text = GOOD + "values: {smoking: {0: never, 1: ever}, event: {2: transplant}}\n"
    _, config = open_workspace(site(tmp_path, text))
    assert config.values == {"smoking": {"0": "never", "1": "ever"}, "event": {"2": "transplant"}}


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("scan: ct", "E_KEY", "did you mean 'scans'"),
        ("workers: many", "E_TYPE", ""),
        ("workers: 0", "E_VALUE", ""),
        ("device: gpu", "E_VALUE", ""),
        ("worker: thread", "E_VALUE", ""),
        ("coordinator: off", "E_TYPE", "quote"),
        ("columns: {on: record}", "E_TYPE", "quote"),
        ("coordinator: ${env:HOST}", "E_TYPE", ""),
        ("site: twice", "E_TYPE", ""),
        ("workers: [1", "E_TYPE", ""),
    ],
)
def test_a_wrong_line_of_site_yaml_names_its_place_and_the_remedy(tmp_path, line, code, words):
    with pytest.raises(ConfigError) as caught:
        open_workspace(site(tmp_path, GOOD + line + "\n"))
    assert caught.value.code == code
    assert "site.yaml" in caught.value.where
    assert words in caught.value.fix
    assert caught.value.exit_code == 2


def test_without_a_profile_the_remedy_is_the_invitation(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_profile(Workspace(tmp_path))
    assert caught.value.code == "E_FILE"
    assert "INVITATION" in caught.value.fix


@contextlib.contextmanager
def held_elsewhere(root, lock):
    """Another process that holds `lock` (an expression over the workspace `w`) until the block ends, then is killed."""
    program = (
        "import sys; from pathlib import Path; from fourdvq_client.shards import Shard, preparing\n"
        "from fourdvq_client.workspace import Workspace, locked; w = Workspace(Path(sys.argv[1]))\n"
        f"with {lock}:\n    print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program, str(root)], **pipes) as other:
        try:
            assert other.stdout.readline() == "held\n"
            yield other
        finally:
            other.kill()


def test_another_process_in_the_folder_is_named_with_pid_and_host(tmp_path):
    workspace = Workspace(tmp_path)
    with held_elsewhere(tmp_path, "locked(w)") as other:
        with pytest.raises(TemporaryStop) as caught, locked(workspace):
            pass
        assert caught.value.code == "E_BUSY"
        assert f"process {other.pid} on {os.uname().nodename}" in caught.value.found
        assert caught.value.exit_code == 75
        assert [h["pid"] for h in lock_holders(workspace)] == [other.pid]
    with locked(workspace):  # a dead holder locks nobody out
        assert [h["pid"] for h in lock_holders(workspace)] == [os.getpid()]
    assert lock_holders(workspace) == ()


@pytest.mark.parametrize("before", ["a run that ended", "a run that was killed"])
def test_shards_at_work_are_named_and_nobody_who_held_the_folder_before_them(tmp_path, before):
    workspace = Workspace(tmp_path)
    if before == "a run that ended":
        with locked(workspace):
            pass
    else:
        with held_elsewhere(tmp_path, "locked(w)"):
            pass
    with held_elsewhere(tmp_path, "preparing(w, Shard(1, 2))") as one:
        with held_elsewhere(tmp_path, "preparing(w, Shard(2, 2))") as two:
            assert {h["pid"] for h in lock_holders(workspace)} == {one.pid, two.pid}
        with pytest.raises(TemporaryStop) as caught, locked(workspace):
            pass
        assert caught.value.found == f"process {one.pid} on {os.uname().nodename}"  # the killed shard is not named
    assert lock_holders(workspace) == ()


def test_a_holder_that_is_gone_is_nobody_to_stop(tmp_path):
    """Its lock lives on in a process that it started: the one that must end has another id."""
    workspace = Workspace(tmp_path)
    with locked(workspace):
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        signed = {"pid": gone.pid, "host": os.uname().nodename}
        (workspace.state / "lock").write_text(json.dumps(signed))
        with pytest.raises(TemporaryStop) as caught, locked(workspace):
            pass
        assert caught.value.found == "another process"
        (workspace.state / "lock").write_text(json.dumps({**signed, "host": "another-host"}))
        assert lock_holders(workspace) == ({**signed, "host": "another-host"},)


@pytest.mark.parametrize("name", ["leuven", "southampton", "external", "demo"])
def test_every_template_makes_a_site_whose_secrets_are_for_its_owner(tmp_path, name):
    root = tmp_path / "site"
    create_site(root, SiteSettings(site=name), template=name, profile=tiny_profile())
    workspace, config = open_workspace(root)
    assert config.site == name
    for folder in (workspace.keys, workspace.private):
        assert folder.stat().st_mode & 0o777 == 0o700
    for path in (workspace.secret, workspace.keys / "site.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert len(workspace.secret.read_bytes()) == 32
    assert (TEMPLATES / name / "clinical.csv").read_bytes() == (root / "clinical.example.csv").read_bytes()


def test_two_sites_never_share_a_secret_or_a_key(tmp_path):
    prints = {create_site(tmp_path / n, SiteSettings(site="leuven"), template="demo") for n in ("a", "b")}
    assert len(prints) == 2
    assert len({(tmp_path / n / "private" / "secret").read_bytes() for n in ("a", "b")}) == 2


def test_a_site_is_never_made_over_another(tmp_path):
    create_site(tmp_path, SiteSettings(site="leuven"), template="demo")
    secret = (tmp_path / "private" / "secret").read_bytes()
    with pytest.raises(ConfigError, match="E_EXISTS"):
        create_site(tmp_path, SiteSettings(site="leuven"), template="demo")
    assert (tmp_path / "private" / "secret").read_bytes() == secret


@pytest.mark.parametrize(
    "options", [{"template": "gent"}, {"template": "demo", "site": "Léuven 1"}, {"template": "demo", "role": "boss"}]
)
def test_an_impossible_site_leaves_nothing_behind(tmp_path, options):
    settings = SiteSettings(site=options.get("site", "leuven"), role=options.get("role", ""))
    with pytest.raises(FourdvqError):
        create_site(tmp_path / "new", settings, template=options["template"])
    assert not (tmp_path / "new").exists()


def test_the_real_templates_allow_exactly_the_code_that_was_installed_at_init(tmp_path):
    from fourdvq_client.code_identity import installed_code
    from fourdvq_client.policy import load_policy

    create_site(tmp_path, SiteSettings(site="leuven"), template="leuven")
    allowed = load_policy(tmp_path / "policy.yaml").rules.allowed_code
    assert [(c.package, c.sha256) for c in allowed] == [(c.package, c.sha256) for c in installed_code()]


def test_a_profile_file_that_is_not_json_is_an_error_with_its_name(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.profile_json.write_text("{not json")
    with pytest.raises(ConfigError, match=r"profile\.json"):
        read_profile(workspace)
    workspace.profile_json.write_text(json.dumps({**tiny_profile(), "grids": {}}))
    with pytest.raises(ConfigError, match="E_KEY"):
        read_profile(workspace)
