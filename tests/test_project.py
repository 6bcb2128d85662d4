"""The project as a whole: size, environment, commands, launcher, profiles, docstrings, links."""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from soundscapes_utils import pipeline, store

ROOT = store.project_root(Path(__file__).parent)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
CORE, EXTRAS = (PROJECT["project"][key] for key in ("dependencies", "optional-dependencies"))
DIRECT = sum(EXTRAS.values(), CORE)
MODULES = sorted(path.stem for path in (ROOT / "soundscapes_utils").glob("[a-z]*.py"))
# audiocraft names torchtext and never imports it on the way to AudioGen; it has no release for this
# torch. Of xformers and sphn there are no wheels for every platform.
LEFT_OUT = {"torchtext", "xformers", "sphn"}
# what `setup --cpu` left out, where this environment was made so
CUDA_LINES = Path(sys.prefix) / "left-out"
CUDA_LINES = CUDA_LINES.read_text(encoding="utf-8").splitlines() if CUDA_LINES.is_file() else []


def locked():
    """Names and versions of the lock that hold on this machine."""
    requirements = [Requirement(line) for line in LOCK_LINES if line not in CUDA_LINES]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate()
    }


def closure(lines):
    """Names of all packages that requirements lead to, by what the installed ones say of themselves."""
    names, waiting = set(), [(line, "") for line in lines]
    seen = set()
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if (line, extra) in seen or not (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            continue
        seen.add((line, extra))
        names.add(name := canonicalize_name(requirement.name))
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            further = importlib.metadata.requires(name) or []
            waiting += [(one, extra) for one in further for extra in ("", *requirement.extras)]
    return names


# --- one environment in three files --------------------------------------------------------------


@pytest.mark.parametrize("line", DIRECT)
def test_lock_holds_every_direct_dependency_in_its_range(line):
    requirement = Requirement(line)
    if requirement.marker is not None and not requirement.marker.evaluate():
        pytest.skip(f"not for this platform: {requirement.marker}")
    name = canonicalize_name(requirement.name)
    if name not in locked() and CUDA_LINES:
        pytest.skip("not for an environment without CUDA")
    assert requirement.specifier.contains(locked()[name], prereleases=True)
    installed = importlib.metadata.version(name).partition("+")[0]  # 2.10.0+cpu is the same release
    assert installed == locked()[name], "installed is not what is locked"


def test_lock_holds_the_core_and_every_extra_and_what_they_lead_to():
    assert closure(DIRECT) - locked().keys() <= LEFT_OUT
    assert locked().keys() <= closure(DIRECT), "in the lock, and asked for by nothing"
    names = [canonicalize_name(Requirement(line).name) for line in DIRECT]
    assert len(names) == len(set(names)), "each has one place"


def holds(line, system, machine):
    """Whether a requirement is for a platform: "linux" or "darwin", and the kind of processor."""
    names = {"os_name": "posix", "sys_platform": system, "platform_system": system.capitalize()}
    marker = Requirement(line).marker
    return marker is None or marker.evaluate(names | {"platform_machine": machine})


@pytest.mark.parametrize("system, machine", [("linux", "aarch64"), ("darwin", "arm64")])
def test_other_platforms_are_not_asked_for_what_has_no_wheel_there(system, machine):
    overrides = (ROOT / "requirements.overrides.txt").read_text(encoding="utf-8").splitlines()
    for lines in (DIRECT, LOCK_LINES, [line for line in overrides if not line.startswith("#")]):
        assert any(holds(line, "linux", "x86_64") for line in lines if line.startswith("xformers"))
        for line in lines:
            if re.match("(xformers|nvidia|cuda|triton)", line):
                assert not holds(line, system, machine), line


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


def test_overrides_serve_compiling_the_lock_alone():
    # uv reads them from the project that it is started in, and they would override the lock too
    assert "uv" not in PROJECT["tool"]
    assert (ROOT / "requirements.overrides.txt").is_file()
    for name in ("pyproject.toml", "environment.yml", "run_all.sh", ".ci/run"):
        assert "overrides.txt" not in (ROOT / name).read_text(encoding="utf-8"), name
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if "requirements.overrides.txt" in line]
    assert any(line.startswith("uv pip compile ") for line in lines)


# --- the size of the house -----------------------------------------------------------------------

LIMITS = {"package code": 7_500, "package lines": 11_500, "file": 600, "function": 40, "parameters": 8}
# What others build on, whoever uses it here; and what data/README.md names.
PROMISED = """
load_audio save_audio log_mel load_esc50 load_urbansound8k load_tau load_folder load_builtin
plan_mixes render_mixes write_audiocaps check_leaks get_backend generate_clips load_pipeline finetune
get_embedding frechet_distance kernel_distance fad_infinity precision_recall_density_coverage
noise_floor run_study bootstrap_ci paired_test run download_dataset
"""
FILES = ["__init__", "__main__", *MODULES]
SOURCES = {m: (ROOT / f"soundscapes_utils/{m}.py").read_text(encoding="utf-8") for m in FILES}
TREES = {module: ast.parse(source) for module, source in SOURCES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(module):
    """Numbers of the lines that are neither blank, comment nor docstring."""
    lines = enumerate(SOURCES[module].splitlines(), 1)
    code = {i for i, line in lines if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node):
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return code


def test_the_package_stays_small():
    assert sum(len(code_lines(module)) for module in FILES) <= LIMITS["package code"]
    lines = sum(len(source.splitlines()) for source in SOURCES.values())
    assert lines <= LIMITS["package lines"]


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_stay_short(module):
    code = code_lines(module)
    if module != "procedural":  # content more than code
        assert len(code) <= LIMITS["file"]
    for node in ast.walk(TREES[module]):
        if isinstance(node, FUNCTIONS):
            length = len(code & set(range(node.lineno, node.end_lineno + 1)))
            assert length <= LIMITS["function"], f"{node.name}: {length} code lines"
            names = {a.arg for a in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]}
            n = len(names - {"self", "cls"})
            assert n <= LIMITS["parameters"] or node.name == "__init__", f"{node.name}: {n}"


def imported(tree):
    """Names of the package's modules that a module imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "soundscapes_utils":
            names |= {alias.name for alias in node.names}
    return names & set(MODULES)


def test_imports_run_one_way():
    waiting, done = {module: imported(tree) for module, tree in TREES.items()}, set()
    while free := {module for module, needs in waiting.items() if needs <= done}:
        done |= free
        waiting = {module: needs for module, needs in waiting.items() if module not in free}
    assert not waiting, f"in or behind a circle: {waiting}"
    assert not imported(TREES["store"]) and imported(TREES["audio"]) == {"store"}
    users = {module for module, tree in TREES.items() if imported(tree) & {"pipeline", "report"}}
    assert users <= {"report", "__main__"}


def test_every_public_function_is_used():
    """By a notebook, a command, another module or the template; tests and benchmarks do not count."""
    cells = []
    for path in sorted((ROOT / "notebooks").glob("**/*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cells += ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    unused = []
    for module, tree in TREES.items():
        others = "\n".join([*cells, *(text for name, text in SOURCES.items() if name != module)])
        names = {n.name for n in tree.body if isinstance(n, FUNCTIONS) and n.name[0] != "_"}
        unused += [f"{module}.{name}" for name in sorted(names - set(PROMISED.split()))
                   if not re.search(rf"\b{name}\b", others)]  # fmt: skip
    assert set(unused) <= {"__main__.main"}


def test_tests_use_public_names_only():
    for path in sorted((ROOT / "tests").glob("**/test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.asname or alias.name for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and node.module == "soundscapes_utils"
                 for alias in node.names}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("soundscapes_"):
                assert not [
                    a.name for a in node.names if a.name.startswith("_") and a.name != "__main__"
                ]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (private and node.value.id in names), f"{path.name}: {node.attr}"


def test_an_installed_package_brings_its_tables_and_templates():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["soundscapes_utils"]
    package = ROOT / "soundscapes_utils"
    brought = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in package.glob("[!.]*.*") if path.suffix not in (".py", ".pyc")} == brought


# --- the package ---------------------------------------------------------------------------------


def in_a_fresh_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


HEAVY = "torch diffusers transformers audiocraft laion_clap msclap dask"

CORE_AT_WORK = """
import runpy, sys
from pathlib import Path
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())

from soundscapes_utils import captions, datasets, embeddings, fad, metadata, mixing, plots, report
events = datasets.load_builtin("data", clips_per_class=5)
events, scenes = datasets.load_scenes("builtin", events, data_dir="data", scenes_per_class=5)
plan = mixing.plan_mixes(events, scenes, 12, duration_s=0.5)
mixes = mixing.render_mixes(plan, Path("mixes").resolve(), 16_000, workers=1)
print(metadata.write_metadata(mixes, "metadata", "mixes").is_file())
vectors = embeddings.get_embedding("logmel-stats").embed(mixes["path"].tolist())
print(fad.frechet_distance(vectors[:6], vectors[6:]) > 0)
print(report.listening_page("listen", mixes).is_file())
sys.argv = ["soundscapes_utils", "--help"]
runpy.run_module("soundscapes_utils", run_name="__main__", alter_sys=True)
"""


def test_core_works_where_nothing_else_is_installed(tmp_path):
    core = closure(CORE)
    places = importlib.metadata.packages_distributions()
    others = {top for top, names in places.items() if not {*map(canonicalize_name, names)} & core}
    others -= {"soundscapes_utils"}
    assert {*HEAVY.split(), "IPython", "jupyterlab", "papermill", "pytest", "wandb"} <= others
    code = CORE_AT_WORK.replace("BLOCKED", repr(others))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True\nTrue\nTrue\nusage: ")


def test_imports_are_light():
    code = "import sys\n{}\nprint(*(set('" + HEAVY + "'.split()) & set(sys.modules)))"
    for line in ("import soundscapes_utils", "from soundscapes_utils import mixing, fad",
                 "from soundscapes_utils import pipeline, report, __main__"):  # fmt: skip
        assert not in_a_fresh_python(code.format(line)), line


COMMANDS = ["run", "report", "listen", "profiles", "publish", "plan-mixes", "mix", "generate"]
COMMANDS += ["score", "finetune", "train-mini"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_comes_at_once(command):
    code = (
        "import resource, subprocess, sys\n"
        f"words = [sys.executable, '-m', 'soundscapes_utils', *{command.split()}, '--help']\n"
        "subprocess.run(words, check=True, stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"
    )
    seconds, megabytes = map(float, in_a_fresh_python(code))
    assert seconds < 1.0 and megabytes < 150


def test_the_console_command_knows_its_version():
    done = subprocess.run(
        [Path(sys.executable).with_name("soundscapes"), "--version"], capture_output=True
    )
    assert done.stdout.decode().strip() == importlib.metadata.version("soundscapes-utils")


def test_wrong_calls_end_in_one_line(capsys, tmp_path):
    from soundscapes_utils.__main__ import main

    for words, message, code in (
        (["run", "qick"], "no profile 'qick'; nearest: quick", 2),
        (["generate", str(tmp_path)], "give a plan, or --prompt TEXT, or --prompts FILE", 2),
        (["generate", "plan.csv", str(tmp_path), "--prompt", "a dog"], "give a plan, or --prompt", 2),
        (["score", str(tmp_path)], "no recordings", 1),
        (["report", str(tmp_path)], "holds no run", 1),
        (["mix", str(tmp_path / "plan.csv"), str(tmp_path)], "plan.csv: no such file", 1),
        (["finetune", str(tmp_path / "config.yaml")], "config.yaml", 1),
    ):
        assert main(words) == code
        assert re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err), words


@pytest.mark.parametrize(
    "words",
    [
        ["finetune", "none.yaml"],
        ["finetune", "."],
        ["mix", "none.csv", "out"],
        ["mix", ".", "out"],
        ["generate", "none.csv", "out"],
        ["report", "none"],
        ["publish", "none"],
        ["listen", "none"],
        ["listen", "none.csv"],
        ["plan-mixes", "none", "none", "plan.csv"],
        ["score", "none", "none"],
        ["score", ".", "none"],
        ["score", ".", "."],
        ["listen", "."],
        ["plan-mixes", ".", "none", "plan.csv"],
        ["score", "none", "--official", "dcase2024-task7"],
        ["generate", "out", "--prompts", "none.txt"],
        ["generate", "out", "--prompt", " "],
        ["run", "quick", "-p", "test_folds", "[1, 2"],
        ["run", "quick", "-p", "seed", "x\ny"],
    ],
)
def test_no_error_text_of_python_reaches_the_user(words, capsys, tmp_path, monkeypatch):
    from soundscapes_utils.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(words) == (2 if words[0] == "run" else 1)
    said = capsys.readouterr().err
    assert re.fullmatch("error: .*\n", said)
    assert not re.search(r"Errno|Traceback|[a-z]Error|sounds_root", said), said
    # what is not there is named once, as it was given
    given = next((word for word in words if word.startswith("none")), "")
    assert said.count(given) == 1 and str(ROOT) not in said if given else True, said


WITHOUT = """
import sys
from soundscapes_utils.__main__ import main
sys.modules["{library}"] = None  # as where it is not installed
print(main({words}))
"""


@pytest.mark.parametrize(
    ("library", "words", "remedy"),
    [
        ("torch", ["finetune", "config.yaml"], "[models]'"),
        ("torch", ["generate", "clips", "--prompt", "a dog"], "[models]'"),
        ("torch", ["run", "quick", "--name", "none-here"], "[models]'"),
        ("diffusers", ["generate", "clips", "--prompt", "a dog"], "[models]'"),
        ("nbformat", ["publish", "."], "notebooks]'"),
    ],
)
def test_a_missing_library_is_one_line_that_names_its_extra(library, words, remedy, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = [sys.executable, "-c", WITHOUT.format(library=library, words=words)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split()[-1] == "1" and not list(tmp_path.iterdir())
    (said,) = done.stderr.splitlines()
    assert library in said and remedy in said and "./run_all.sh setup" in said


def test_libraries_of_the_lock_alone_are_not_asked_of_pip(tmp_path, monkeypatch, capsys):
    from soundscapes_utils import __main__, generation

    monkeypatch.chdir(tmp_path)

    def without(*_, **__):
        raise ModuleNotFoundError("No module named 'audiocraft'", name="audiocraft.models")

    monkeypatch.setattr(generation, "get_backend", without)
    assert __main__.main(["generate", "clips", "--prompt", "a dog"]) == 1
    said = capsys.readouterr().err
    assert "./run_all.sh setup" in said and "pip" not in said and said.count("\n") == 1


def test_paths_and_pages_outside_of_a_clone(tmp_path, monkeypatch):
    from soundscapes_utils import audio, report

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(store, "__file__", str(tmp_path / "site-packages/soundscapes_utils/store.py"))
        with pytest.raises(FileNotFoundError, match=r"no copy of the project .*change into the clone"):
            store.project_root()
        assert store.project_path("new") == tmp_path / "new"
    monkeypatch.setattr(store, "project_root", lambda start=None: 1 / 0)  # a page asks for none
    audio.save_audio(tmp_path / "sounds/dog/a.wav", np.full(800, 0.1), 8000)
    assert report.page_of("sounds").is_file()


def test_wandb_without_a_key_is_refused_before_training(tmp_path, capsys, monkeypatch):
    import wandb

    from soundscapes_utils.__main__ import main

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text(
        "{checkpoint: builtin, dataset_root: set.csv, out_dir: out, wandb_project: mine}\n"
    )
    wandb.teardown()  # its settings are read once a process
    assert main(["finetune", str(config)]) == 1
    assert "wandb login" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["mix {} out", "generate {} out", "finetune {}"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_every_command_that_is_stopped_says_one_line(command, how, tmp_path):
    os.mkfifo(tmp_path / "endless.csv")  # what is read from it never comes
    words = [sys.executable, "-m", "soundscapes_utils", *command.format("endless.csv").split()]
    process = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    time.sleep(2)  # while libraries are loaded, or the table is waited for
    os.killpg(process.pid, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "interrupted: the same command again goes on from here"


def test_workers_of_a_stopped_command_end_without_a_word(tmp_path):
    from soundscapes_utils import datasets, mixing

    data = tmp_path / "data"
    events = datasets.load_builtin(data, clips_per_class=5)
    events, scenes = datasets.load_scenes("builtin", events, data_dir=data, scenes_per_class=5)
    store.write_table(mixing.plan_mixes(events, scenes, 3000, duration_s=10.0), tmp_path / "plan.csv")
    words = [sys.executable, "-m", "soundscapes_utils", "mix", "plan.csv", "mixes", "--workers", "2"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    one = psutil.Process(process.pid)
    while len(children := one.children(recursive=True)) < 3:  # workers that still load their libraries
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and not psutil.wait_procs(children, timeout=10)[1]
    assert said.strip() == "interrupted: the same command again goes on from here"


def test_mix_command_renders_a_plan_in_parts(capsys, tmp_path):
    from soundscapes_utils import datasets, mixing
    from soundscapes_utils.__main__ import main

    events = datasets.load_builtin(tmp_path / "data", clips_per_class=5)
    events, scenes = datasets.load_scenes(
        "builtin", events, data_dir=tmp_path / "data", scenes_per_class=5
    )
    plan = mixing.plan_mixes(events, scenes, 6, duration_s=1.0)
    store.write_table(plan, tmp_path / "plan.csv")
    words = ["mix", str(tmp_path / "plan.csv"), str(tmp_path / "mixes")]
    for part in ("1/2", "2/2"):
        assert not (tmp_path / "mixes/mixes.csv").exists()
        assert main([*words, "--shard", part]) == 0
    in_parts = (tmp_path / "mixes/mixes.csv").read_bytes()
    assert main(words) == 0
    assert (tmp_path / "mixes/mixes.csv").read_bytes() == in_parts
    assert "6 mixes are in" in capsys.readouterr().out
    # the folder can be moved: paths are relative to the table
    (tmp_path / "mixes").rename(tmp_path / "moved")
    mixes = store.read_table(tmp_path / "moved/mixes.csv")
    assert mixes["clip_id"].tolist() == plan["clip_id"].tolist()
    assert all((tmp_path / "moved" / path).is_file() for path in mixes["path"])
    # another plan under the same names is not taken for this one
    store.write_table(plan.assign(seed=plan["seed"] + 1), tmp_path / "plan.csv")
    assert main([*words, "--shard", "1/2"]) == 0
    assert not (tmp_path / "mixes/mixes.csv").exists()


def test_two_folders_are_planned_mixed_scored_and_listened_to(capsys, tmp_path, monkeypatch):
    from soundscapes_utils import audio, fad, metadata
    from soundscapes_utils.__main__ import main

    rng = np.random.default_rng(0)
    for place in ("events/dog", "events/cat", "scenes/park"):
        for i in range(15):  # one word each, no counter: recordings of their own
            y = rng.normal(0, 0.1, 16_000).clip(-0.9, 0.9)
            audio.save_audio(tmp_path / place / f"take{'abcdefghijklmno'[i]}.wav", y, 16_000)
    monkeypatch.chdir(tmp_path)
    assert main(["plan-mixes", "events", "scenes", "plan.csv", "-n", "20", "--snr", "0", "6",
                 "-o", "duration_s", "1", "-o", "fade_s", "[0.01, 0.1]"]) == 0  # fmt: skip
    plan = store.read_table(tmp_path / "plan.csv")
    assert len(plan) == 20 and plan["snr_db"].between(0, 6).all() and plan["fade_s"].nunique() > 1
    assert main(["mix", "plan.csv", "mixes"]) == 0
    assert len(metadata.read_audiocaps(tmp_path / "mixes/metadata/dataset_root.json")) == 20
    assert main(["listen", "mixes"]) == 0 and (tmp_path / "mixes/listen/index.html").is_file()
    capsys.readouterr()
    assert main(["score", "events", "mixes", "--embedding", "logmel-stats", "--out", "s.csv"]) == 0
    assert "logmel-stats" in capsys.readouterr().out
    scores = store.read_table(tmp_path / "s.csv")
    assert list(scores) == fad.SCORE_COLUMNS and set(scores["metric"]) == {"FAD", "KAD"}
    assert (scores["n_reference"] == 30).all() and (scores["n_candidate"] == 20).all()


def test_profile_command_shows_every_parameter(capsys):
    from soundscapes_utils.__main__ import main

    assert main(["profiles", "test"]) == 0
    shown = capsys.readouterr().out
    for stem, values in pipeline.resolve_parameters("test", root=ROOT).items():
        assert stem in shown and all(f"  {name} = {v!r}\n" in shown for name, v in values.items())


def public_definitions(module):
    """Public functions and classes of a module, and public methods of these classes."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in TREES[module].body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            for inner in getattr(node, "body", []) if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield inner


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    assert ast.get_docstring(TREES[module])
    for node in public_definitions(module):
        text = ast.get_docstring(node) or ""
        assert len(text) > 15, f"{module}.{node.name} has no docstring"
        if isinstance(node, FUNCTIONS) and node.args.kwarg is None and "Parameters\n---" in text:
            section = text.split("Parameters\n")[1].split("\n\n")[0]
            documented = re.findall(r"^(\w[\w, ]*?)(?: :|$)", section, re.M)
            names = {name for names in documented for name in names.split(", ")}
            arguments = {a.arg for a in node.args.args + node.args.kwonlyargs}
            assert names <= arguments, f"{module}.{node.name}: {names - arguments}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, monkeypatch):
    monkeypatch.chdir(ROOT)
    loaded = importlib.import_module(f"soundscapes_utils.{module}")
    result = doctest.testmod(loaded, optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0


# --- launcher and profiles -----------------------------------------------------------------------


def run_script(*arguments, script=ROOT / "run_all.sh", **environment):
    return subprocess.run(
        ["bash", str(script), *arguments],
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
    for word in ("-p name value", "--only", "--fresh", "Resuming", "report", "setup [--cpu]", "test"):
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


@pytest.fixture
def set_up(tmp_path):
    """A clone whose environment has the packages of this one, and whose installer installs nothing.

    The installer leaves what it was asked for beside the environment: ``asked`` and ``lock``. Torch is
    there in the build for CPUs.
    """
    clone, tools, build = tmp_path / "clone", tmp_path / "bin", tmp_path / "build"
    for folder in (clone, tools, build / "torch-2.10.0+cpu.dist-info"):
        folder.mkdir(parents=True)
    for name in ("run_all.sh", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, clone)
    text = "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0+cpu\n"
    (build / "torch-2.10.0+cpu.dist-info/METADATA").write_text(text)
    places = "\\n".join([str(build), *site.getsitepackages()])
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    scripts = {
        "uv": 'case "$*" in *" -r "*) echo "$*" >../asked; cat >../lock ;; esac',
        "python": f'[ "$1" = -c ] && echo "$0" && exit\n"{sys.executable}" -m venv --symlinks '
        f'--without-pip "$3" && printf "{places}\\n" >"$3/{packages}/there.pth"',
    }
    for name, lines in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHON": str(tools / "python")}
    return clone, lambda *words: run_script(*words, script=clone / "run_all.sh", **environment)


def alter_lock(clone, name, version):
    """Ask for a version that is not installed."""
    file = clone / "requirements.txt"
    text, n = re.subn(rf"(?m)^{name}==[^ \n]+", f"{name}=={version}", file.read_text())
    assert n == 1
    file.write_text(text)


def test_set_up_stops_where_an_installed_version_differs_from_the_lock(set_up):
    clone, run = set_up
    done = run("setup")
    assert done.returncode == 0, done.stderr
    assert (clone / "lock").read_text() == (clone / "requirements.txt").read_text()
    asked = (clone / "asked").read_text().split()
    assert "--compile-bytecode" in asked and "--torch-backend" not in asked
    alter_lock(clone, "pyyaml", "5.0.1")
    done = run("setup")
    assert done.returncode == 1 and not (clone / ".venv/set-up-complete").exists()
    assert "pyyaml: the lock says ==5.0.1, installed is " in done.stderr


def test_set_up_for_cpus_leaves_out_cuda_now_and_later(set_up):
    clone, run = set_up
    alter_lock(clone, "triton", "9.9.9")
    assert "triton: the lock says ==9.9.9, installed is " in run("setup").stderr
    (clone / ".venv/of-cuda").touch()
    done = run("setup", "--cpu")
    assert done.returncode == 0, done.stderr
    assert not (clone / ".venv/of-cuda").exists(), "an environment with CUDA is made anew"

    def check():
        assert "--torch-backend cpu" in (clone / "asked").read_text()
        whole, rest = ((clone / name).read_text() for name in ("requirements.txt", "lock"))
        left_out = {line for line in whole.splitlines() if line not in rest.splitlines()}
        # what only Linux on x86-64 has is for NVIDIA's GPUs, but for what has no wheel elsewhere
        only_there = {line for line in whole.splitlines() if not holds(line, "linux", "aarch64")}
        only_there = {line for line in only_there if holds(line, "linux", "x86_64")}
        assert left_out == {line for line in only_there if not line.startswith("sphn==")}
        assert any(line.startswith("nvidia-") for line in left_out)
        (clone / "asked").unlink()

    check()
    assert run("setup").returncode == 0 and not (clone / "asked").exists(), "nothing is to be done"
    alter_lock(clone, "xformers", "9.9.9")
    assert run("setup").returncode == 0, "a later command, after the lock was changed"
    check()
    (clone / ".venv/set-up-begun").touch()
    assert run("setup").returncode == 0, "a later command, after a set-up that was killed"
    check()


def test_set_up_refuses_other_words_before_it_begins(set_up):
    clone, run = set_up
    done = run("setup", "--gpu")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--cpu" in done.stderr
    assert not (clone / ".venv").exists()


def test_script_keeps_to_its_own_project_and_lets_nothing_of_the_caller_in(tmp_path):
    clone, elsewhere = tmp_path / "a clone", tmp_path / "elsewhere"
    for folder in (clone / ".venv/bin", elsewhere / "clone", tmp_path / "links"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "run_all.sh", clone)
    # a Python that only says what it is given
    python = clone / ".venv/bin/python"
    python.write_text('#!/bin/sh\n[ "$1" = - ] && echo same && exit\necho "$0 $@"\nenv\n')
    python.chmod(0o755)
    (clone / ".venv/set-up-complete").write_text("same\n")
    (tmp_path / "links/first").symlink_to("../a clone/run_all.sh")
    (tmp_path / "second").symlink_to("links/first")
    foreign = {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONDONTWRITEBYTECODE"}
    foreign |= {"PYTHONINSPECT", "CDPATH", "JUPYTER_PATH", "IPYTHONDIR", "MPLBACKEND", "PIP_TARGET"}
    for script in ("second", "links/first", "a clone/run_all.sh"):
        done = subprocess.run(
            ["bash", script, "profiles"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
            env={**os.environ, **dict.fromkeys(foreign, str(elsewhere))},
        )
        first, *rest = done.stdout.splitlines()
        assert first == f"{python} -m soundscapes_utils profiles"
        seen = dict(line.partition("=")[::2] for line in rest)
        assert not foreign & seen.keys() and seen["PYTHONSAFEPATH"] == "1"


def test_continuous_integration_calls_the_documented_test_command():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == "./run_all.sh test"
    assert "./run_all.sh test" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pipeline.profiles(ROOT))
def test_profile_fits_the_notebooks_and_says_what_it_takes(name):
    assert pipeline.resolve_parameters(name, root=ROOT)
    assert all(pipeline.profile_table().loc[name])
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


def test_everything_that_is_loaded_has_its_line_in_the_table_of_licences():
    text = (
        (ROOT / "data/README.md")
        .read_text(encoding="utf-8")
        .partition("## Licences")[2]
        .partition("\n## ")[0]
    )
    rows = [row.replace("-", " ") for row in text.splitlines() if row.startswith("| ")]
    tables = {name: store.read_table(ROOT / f"soundscapes_utils/{name}.csv")
              for name in ("datasets", "checkpoints", "embeddings")}  # fmt: skip
    known = [title.partition(",")[0] for title in tables["datasets"]["title"]]
    for name in tables["checkpoints"]["checkpoint"]:
        known.append(f"{name.partition('/')[0]}/" if f"{name.partition('/')[0]}/…" in text else name)
    own = {"logmel-stats", "mini-clap"}
    for name in set(tables["embeddings"]["name"]) - own:
        known.append(re.match("(?:ms-|laion-)?[a-z]+", name)[0])
    for name in known:
        assert any(name.replace("-", " ").lower() in row.lower() for row in rows), name


def test_every_module_has_its_place_on_the_map():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for module in MODULES:
        assert f"{module}.py" in text, module


def test_every_module_that_others_build_on_shows_an_example():
    for module in MODULES:
        promised = {n.name for n in TREES[module].body if isinstance(n, FUNCTIONS)}
        if promised & set(PROMISED.split()):
            assert ">>>" in SOURCES[module], module


def test_compare_hands_its_options_to_the_notebook(tmp_path, monkeypatch, capsys):
    from soundscapes_utils import pipeline
    from soundscapes_utils.__main__ import main

    asked = []

    def run(profile, given, *, name, only):
        asked.append((name, pipeline.resolve_parameters(profile, given, only=only)))
        return tmp_path

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "my.txt").write_text("a dog\n")
    words = ["compare", "--backends", "audioldm", "audioldm,steps:3", "--prompts", "my.txt", "-n", "4"]
    assert main([*words, "--real", "real", "--embedding", "logmel-stats"]) == 0
    ((name, values),) = asked
    (values,) = values.values()
    assert name == "compare" and values["backends"] == ["audioldm", "audioldm,steps:3"]
    assert values["prompts"] == str(tmp_path / "my.txt")
    assert values["real_root"] == str(tmp_path / "real")
    assert (values["n_clips"], values["embedding_names"]) == (4, ["logmel-stats"])
    assert main(words) == 2 and "--real" in capsys.readouterr().err
    words[words.index("my.txt")] = "none.txt"
    assert main([*words, "--real", "real"]) == 1 and "none.txt" in capsys.readouterr().err
