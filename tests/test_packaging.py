"""What surrounds the code: workflows, citation and metadata agree with each other and with the files they name."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import smartreg

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text("utf-8"))


def commands(workflow: Any) -> list[str]:
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_both_workflows_are_there() -> None:
    assert [path.name for path in WORKFLOWS] == ["release.yml", "tests.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_the_shape_of_one(path: Path) -> None:
    workflow = load(path)
    assert workflow.keys() - {"concurrency"} == {"name", True, "permissions", "jobs"}  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        assert "needs" not in job or job["needs"] in workflow["jobs"]
        assert all(len(step.keys() & {"uses", "run"}) == 1 for step in job["steps"])
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step["uses"]) for step in job["steps"] if "uses" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_files_that_a_workflow_runs_exist(path: Path) -> None:
    named = {name for command in commands(load(path)) for name in re.findall(r"\.ci/\w+(?:\.py)?", command)}
    assert named, "no workflow is without one of them"
    assert all((ROOT / name).is_file() for name in named)


def test_only_publishing_may_ask_for_an_identity_and_nothing_holds_a_token() -> None:
    asking = [
        (path.stem, name)
        for path in WORKFLOWS
        for name, job in load(path)["jobs"].items()
        if "id-token" in job.get("permissions", {})
    ]
    assert asking == [("release", "publish")]
    assert not any("secrets." in path.read_text("utf-8") for path in WORKFLOWS)


def test_every_python_version_that_is_promised_is_tested() -> None:
    promised = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT))
    jobs = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    tested = {row["python"] for row in jobs["versions"]["strategy"]["matrix"]["include"]}
    tested |= {
        step["with"]["python-version"]
        for step in jobs["everything"]["steps"]
        if "python-version" in step.get("with", {})
    }
    assert tested == promised
    oldest = min(promised, key=lambda version: int(version[2:]))
    assert f'requires-python = ">={oldest}"' in PYPROJECT
    assert f"3.{sys.version_info.minor}" in promised


def test_the_oldest_versions_that_are_promised_are_tested() -> None:
    first = load(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["versions"]["strategy"]["matrix"]["include"][0]
    for name in ("torch", "transformers"):
        (lowest,) = set(re.findall(rf'"{name}>=([\d.]+)"', PYPROJECT))
        assert first[name] == f"{lowest}.0"


def test_the_citation_names_this_version_and_the_paper() -> None:
    citation = load(ROOT / "CITATION.cff")
    assert citation["version"] == smartreg.__version__
    assert citation["preferred-citation"]["doi"] == "10.18653/v1/2020.acl-main.197"
    assert f"doi {citation['preferred-citation']['doi']}" in (smartreg.SmartLoss.__doc__ or "")
    for work in (citation["preferred-citation"], *citation["references"]):
        assert {"type", "title", "authors", "year", "doi"} <= work.keys()


def test_the_readme_can_be_read_without_the_repository_around_it() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (picture,) = re.findall(r"^!\[[^\]]+\]\((.+)\)$", text, re.MULTILINE)
    assert (ROOT / picture).is_file()
    # What the index gets: the same less the picture, as `.ci/check_dist.py` sees in wheel and sdist.
    (pattern,) = re.findall(r"^pattern = '(.+)'$", PYPROJECT, re.MULTILINE)
    shown = re.sub(pattern, "", text)
    assert len(text) - len(shown) == len(re.search(r"^!\[.+\)\n\n", text, re.MULTILINE).group())  # type: ignore[union-attr]  # found above
    targets = re.findall(r"\]\(([^)]+)\)", shown)
    assert targets
    assert all(target.startswith("https://") for target in targets)


def test_nothing_promises_an_index_that_does_not_have_it() -> None:
    if "[project.urls]" not in PYPROJECT:  # nothing is published yet
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
        assert not [page.name for page in pages if "pip install smartreg" in page.read_text("utf-8")]
