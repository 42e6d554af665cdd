"""Set-up: import time, environment files, and the commands that the README shows."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement


def _requirements(root: Path) -> dict[str, list[Requirement]]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {name: [Requirement(line) for line in lines] for name, lines in groups.items()}


def test_import_is_cheap_and_takes_no_torch() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import gatebook; "
        "assert time.perf_counter() - start < 1.0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_environment_yml_installs_this_package_with_the_extras_that_make_uses(root: Path) -> None:
    environment = yaml.safe_load((root / "environment.yml").read_text())
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    extras = re.search(r"'\.\[([\w,]+)\]'", (root / "Makefile").read_text())[1]
    assert pip == ["-c constraints.txt", f"-e .[{extras}]"]
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"python{wanted}" in environment["dependencies"]


def test_constraints_pin_every_dependency_to_a_version_that_it_allows(root: Path) -> None:
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    for group in ("", "book", "test"):
        for requirement in _requirements(root)[group]:
            version = pins[requirement.name.lower()]
            assert requirement.specifier.contains(version), requirement


def test_no_torchvision_or_timm(root: Path) -> None:
    names = {item.name for group in _requirements(root).values() for item in group}
    assert not names & {"torchvision", "timm"}


def test_the_environment_satisfies_the_requirements(root: Path) -> None:
    for group in ("", "book", "test"):
        for requirement in _requirements(root)[group]:
            if requirement.marker is None or requirement.marker.evaluate():
                installed = metadata.version(requirement.name)
                assert requirement.specifier.contains(installed), requirement


def test_the_readme_shows_targets_and_files_that_exist(root: Path) -> None:
    text = (root / "README.md").read_text() + (root / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"^(?:\$ )?make (?:-s )?([a-z-]+)", text, re.MULTILINE))
    assert {"book", "test"} <= shown <= targets
    for name in re.findall(r"^(?:\$ )?papermill (\S+)", text, re.MULTILINE):
        assert (root / name).is_file()


def test_the_ci_script_calls_the_readmes_test_command(root: Path) -> None:
    assert re.search(r"^make test$", (root / ".ci/run").read_text(), re.MULTILINE)
