"""The project as a whole: environment files, launcher, profiles, docstrings, examples, links."""

import ast
import doctest
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from soundscapes_utils import pipeline, store

ROOT = store.project_root(Path(__file__).parent)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
MODULES = sorted(path.stem for path in (ROOT / "soundscapes_utils").glob("[a-z]*.py"))
# audiocraft names it and never imports it on the way to AudioGen; it has no release for this torch
LEFT_OUT = {"torchtext"}


def locked():
    """Names and versions of the lock that hold on this machine."""
    requirements = [Requirement(line) for line in LOCK_LINES if line.strip()]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


# --- one environment in three files --------------------------------------------------------------


@pytest.mark.parametrize("line", PROJECT["project"]["dependencies"])
def test_lock_holds_every_direct_dependency_in_its_range(line):
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate():
        pytest.skip(f"not for this platform: {requirement.marker}")
    name = canonicalize_name(requirement.name)
    assert requirement.specifier.contains(locked()[name], prereleases=True)
    assert importlib.metadata.version(name) == locked()[name], "installed is not what is locked"


def test_lock_is_closed():
    versions, missing = locked(), set()
    for name in versions:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(requirement.name)} - versions.keys()
    assert missing <= LEFT_OUT


def test_conda_users_get_the_same_lock_and_python():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    plain = [entry for entry in conda if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in conda if isinstance(entry, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    (python,) = [entry.partition("=")[2] for entry in plain if entry.startswith("python")]
    assert SpecifierSet(PROJECT["project"]["requires-python"]).contains(python)
    assert "ffmpeg" in plain and "pip" in plain


def test_no_file_ties_the_environment_to_an_index():
    for line in LOCK_LINES:
        assert re.fullmatch(r"[\w.-]+==[\w.+!]+( ; .+)?", line), line
    for name in ("pyproject.toml", "environment.yml", "run_all.sh"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|\[\[tool\.uv\.index", text), name


# --- the package ---------------------------------------------------------------------------------


def test_import_is_light():
    code = (
        "import sys, time; begin = time.process_time(); "
        "import soundscapes_utils, soundscapes_utils.pipeline, soundscapes_utils.__main__; "
        "heavy = {'torch', 'diffusers', 'transformers', 'librosa', 'matplotlib', 'pandas'}; "
        "print(time.process_time() - begin, *(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, *heavy = done.stdout.split()
    assert not heavy and float(seconds) < 0.5


def public_definitions(module):
    """Public functions and classes of a module, and public methods of these classes."""
    tree = ast.parse((ROOT / f"soundscapes_utils/{module}.py").read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            for inner in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield inner


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    assert ast.get_docstring(
        ast.parse((ROOT / f"soundscapes_utils/{module}.py").read_text(encoding="utf-8"))
    )
    for node in public_definitions(module):
        text = ast.get_docstring(node) or ""
        assert len(text) > 20, f"{module}.{node.name} has no docstring"
        arguments = getattr(node, "args", None)
        names = [a.arg for a in arguments.args + arguments.kwonlyargs] if arguments else []
        for name in set(names) - {"self", "cls"}:
            if "Parameters\n" in text:
                assert re.search(rf"^[\w, *]*\b{name}\b", text, re.M), f"{node.name}: {name}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = importlib.import_module(f"soundscapes_utils.{module}")
    result = doctest.testmod(loaded, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


def test_arrows_run_one_way():
    from soundscapes_utils.pipeline import _imported

    for module in MODULES:
        source = (ROOT / f"soundscapes_utils/{module}.py").read_text(encoding="utf-8")
        if module not in ("pipeline", "report", "environment"):
            assert not _imported(source) & {"pipeline", "report", "environment"}, module
        if module in ("audio", "stats"):
            assert not _imported(source), module


# --- launcher and profiles -----------------------------------------------------------------------


def run_script(*arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_needs_no_environment_and_names_every_profile(tmp_path):
    done = run_script("--help")
    assert done.returncode == 0
    for name in pipeline.profiles(ROOT):
        assert f"\n  {name} " in done.stdout
    for word in ("-p name value", "--only", "--fresh", "Resuming", "report", "setup", "test"):
        assert word in done.stdout


def test_without_a_fitting_python_the_launcher_says_what_to_do(tmp_path):
    clone, tools = tmp_path / "clone", tmp_path / "tools"
    clone.mkdir()
    tools.mkdir()
    (clone / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for tool in ("bash", "dirname", "cat", "head", "sed", "basename"):
        (tools / tool).symlink_to(
            next(f"/{d}/{tool}" for d in ("usr/bin", "bin") if Path(f"/{d}/{tool}").exists())
        )
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [tools / "bash", clone / "run_all.sh", "setup"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tools)},
    )
    assert done.returncode == 1
    assert "no Python 3.11 or 3.12 found" in done.stderr and "Python 3.8.1" in done.stderr
    assert not (clone / ".venv").exists()


def test_continuous_integration_calls_the_documented_test_command():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "./run_all.sh test"
    assert "./run_all.sh test" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pipeline.profiles(ROOT))
def test_profile_fits_the_notebooks_and_says_what_it_takes(name):
    assert pipeline.resolve_parameters(name, root=ROOT)
    profile = pipeline.read_profile(name, ROOT)
    assert all(profile[key] for key in pipeline.ABOUT)
    assert name in (ROOT / "README.md").read_text(encoding="utf-8")


def test_commit_hooks_run_the_lint_step_of_the_tests():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [f"{hook['entry']} {' '.join(hook['args'])}" for hook in hooks["repos"][0]["hooks"]]
    script = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    steps = re.findall(r'"\$python" (-m ruff .+)', script)
    assert [entry.removeprefix(".venv/bin/python ") for entry in entries] == steps


# --- texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md"])
def test_links_between_files_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(link).exists(), link


def test_every_module_has_its_place_on_the_map():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in MODULES:
        assert f"{module}.py" in text, module


def test_examples_exist_in_stage_modules():
    for module in set(MODULES) - {"plots"}:
        loaded = importlib.import_module(f"soundscapes_utils.{module}")
        assert ">>>" in inspect.getsource(loaded), module
