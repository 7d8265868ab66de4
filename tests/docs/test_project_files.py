"""Files for other tools agree with the project's own."""

import re
import tomllib

import yaml
from places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pinned(name):
    return re.search(rf"^{name}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]


def test_pre_commit_has_the_pinned_ruff():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo for repo in repos if repo["repo"].endswith("ruff-pre-commit")]

    assert ruff["rev"] == f"v{pinned('ruff')}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-check", "ruff-format"]


def test_continuous_integration_runs_what_is_run_here():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()

    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12"]
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_the_image_has_all_that_it_copies():
    copied = [
        name
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ")
        for name in line.split()[1:-1]
    ]
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert sorted(kept) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_the_source_archive_has_files_that_are_there():
    include = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]

    assert [name for name in include if not (ROOT / name.lstrip("/")).exists()] == []
