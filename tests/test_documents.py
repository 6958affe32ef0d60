"""The texts of the project: links lead somewhere, versions agree, the first page stays short."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from processes import REPOSITORY

import common

PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for pattern in ("*.md", "docs/*.md", "common/assets/*.md")
    for path in REPOSITORY.glob(pattern)
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "quantization|pruning|pipeline|runtime|training|common|benchmarks|tests"
CODE_PATH = re.compile(rf"`((?:{FOLDERS})/[\w./]*)`")


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = REPOSITORY / page
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match("https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {name.partition("#")[0] for name in LINK.findall(index)}
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_folders_exist(page):
    for named in CODE_PATH.findall((REPOSITORY / page).read_text(encoding="utf-8")):
        assert (REPOSITORY / named).exists(), named


def test_every_folder_of_code_is_described():
    described = CODE_PATH.findall((REPOSITORY / "docs" / "code.md").read_text(encoding="utf-8"))
    folders = {Path(path).parent if path.endswith(".py") else Path(path) for path in described}
    for path in REPOSITORY.glob("[a-z]*/**/*.py"):
        folder = path.parent.relative_to(REPOSITORY)
        if re.match(f"({FOLDERS})(/|$)", folder.as_posix()):
            assert folder in folders


def test_the_first_page_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_versions_agree():
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {common.__version__}\n" in citation
    assert re.search(r"^## \[([\d.]+)\]", changes, re.MULTILINE)[1] == common.__version__


def requirements(name: str) -> list[Requirement]:
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r "))]


def test_constraints_hold_a_version_of_each_requirement():
    pinned = {
        one.name: next(iter(one.specifier)).version for one in requirements("constraints.txt")
    }
    for name in ("requirements.txt", "requirements-dev.txt"):
        for one in requirements(name):
            assert one.specifier.contains(pinned[one.name]), one


@pytest.mark.parametrize("place", ["", "quantization/", "some/where/"])
def test_git_ignores_weights_in_any_folder(place):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("no git repository")
    path = f"{place}resnet18_cifar10.pth"
    subprocess.run(["git", "check-ignore", "-q", path], cwd=REPOSITORY, check=True)


def test_the_package_is_found_from_anywhere_by_pythonpath(tmp_path):
    code = "import quantization; print(quantization.__path__[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(done.stdout.strip()) == REPOSITORY / "quantization"


def test_the_script_says_where_the_package_is():
    done = subprocess.run(
        [sys.executable, "-c", "from quantization import load_int8"],
        cwd=REPOSITORY / "quantization", env={}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr.endswith(f"for the package set PYTHONPATH={REPOSITORY}\n")


@pytest.mark.full
def test_pip_installs_the_packages(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("an older setuptools")
    source, installed = tmp_path / "source", tmp_path / "installed"
    unneeded = shutil.ignore_patterns(".git", ".venv", "data", "results", "tests", "docs", ".*")
    shutil.copytree(REPOSITORY, source, ignore=unneeded)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", installed]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, source], check=True)
    environment = os.environ | {"PYTHONPATH": str(installed), "COLUMNS": "200"}
    for module in ("quantization.quantization", "pruning.pruning", "pipeline.pipeline"):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"(default: {tmp_path}/results/{module.split('.')[0]})" in done.stdout
    packed = {path.name for path in (installed / "common" / "assets").iterdir()}
    assert {path.name for path in (REPOSITORY / "common/assets").glob("*.tar.xz")} < packed
    assert (installed / "common" / "report" / "page.html").exists()
