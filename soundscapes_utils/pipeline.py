"""Profiles, batch runs with papermill, and resuming.

:func:`run` reads a profile, checks every parameter against the notebooks before anything starts, and
executes the notebooks in order, skipping what is finished and unchanged. A run is the folder
``runs/<name>``: its ``run.json`` says what was run, with which parameters, and how far it came.
:func:`run_parameters`, :func:`profile_table` and :func:`check_environment` tell a reader about it.
"""

import ast
import difflib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path

import pandas as pd
import yaml

from . import store

PACKAGE = Path(__file__).resolve().parent
ABOUT = ("description", "time", "memory", "disk", "needs")
INJECTED = "run_dir"
KERNEL_START_S = 300


class UsageError(store.DataError):
    """A profile, parameter, path or run name that cannot be used; nothing has run yet."""


class RunFailed(RuntimeError):
    """A notebook failed or was interrupted; the message ends with the command to resume.

    ``exit_code`` is 1, or 130 after an interruption.
    """

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


# --- running -------------------------------------------------------------------------------------


def run(profile="quick", parameters=None, *, name=None, only=None, fresh=False, root=None):
    """Run the notebooks of a profile in order; return the run's folder, ``runs/<name>``.

    What is finished and unchanged (code, parameters, inputs) is skipped, so that the same call resumes
    after a failure or an interruption. `parameters` as for :func:`resolve_parameters`; `name` is by
    default the profile's; `only` runs just this notebook (number or name), even if nothing changed;
    `fresh` runs everything again; `root` is by default the project that this package belongs to.

    Raises
    ------
    UsageError
        Before anything runs: see :func:`resolve_parameters`.
    RunFailed
        A notebook failed, the disk is full, or the run was interrupted.

    >>> run("quick", {"seed": 1}, name="seed-1")  # doctest: +SKIP
    """
    root = Path(root or store.project_root(PACKAGE))
    name = name or profile
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"the run's name {name!r} may hold letters, digits, '.', '-' and '_' only")
    values = resolve_parameters(profile, parameters, root, only)
    resume = f"Resume with:\n  {_command(profile, parameters, name, only, root)}"
    folder = root / "runs" / name
    try:
        record = _begin_record(folder, profile, parameters, values)
        with _environment(offline=_read_profile(profile, root)["offline"]):
            for number, stem in enumerate(values, 1):
                label = f"[{number}/{len(values)}] {stem}"
                again = fresh or only is not None
                _run_one(label, stem, values[stem], folder, record, again, root)
        record["finished"] = _now()
        _save_record(folder, record)
        return folder
    except KeyboardInterrupt:
        raise RunFailed(f"\nInterrupted. {resume}", exit_code=130) from None
    except (OSError, store.DataError, _NotebookError) as error:
        raise RunFailed(f"{error}\n{resume}") from error


class _NotebookError(RuntimeError):
    pass


def _run_one(label, stem, values, folder, record, again, root):
    stages, source = record["stages"], notebooks(root)[stem]
    key = _state_key(source, values, stages, root)
    executed = folder / "notebooks" / source.name
    if not again and _is_done(stages.get(stem), key, folder, executed):
        print(f"{label}: unchanged, skipped", flush=True)
        return
    stage = stages[stem] = {"status": "running", "parameters": values, "started": _now()}
    _save_record(folder, record)
    begin, memory = time.time(), _PeakMemory()
    try:
        with memory:
            _execute(label, source, executed, values, folder, root)
        stage |= {"status": "finished", "key": key, "outputs": _outputs(folder, begin)}
    except BaseException:
        stage["status"] = "failed"
        raise
    finally:
        stage["seconds"] = round(time.time() - begin, 1)
        stage["peak_memory_gb"] = round(memory.peak / 1e9, 2)
        _save_record(folder, record)
    print(f"{label}: {duration(stage['seconds'])}, {stage['peak_memory_gb']:.1f} GB", flush=True)


def _is_done(stage, key, folder, executed):
    if not stage or stage["status"] != "finished" or stage["key"] != key:
        return False
    return executed.is_file() and all((folder / name).is_file() for name in stage["outputs"])


def _outputs(folder, since):
    """Tables and figures written since a time: if one is deleted, its notebook runs again."""
    files = [*(folder / "tables").glob("*.csv"), *(folder / "figures").glob("*.png")]
    new = [file for file in files if file.stat().st_mtime >= since - 1]
    return sorted(str(file.relative_to(folder)) for file in new)


def _execute(label, source, executed, values, folder, root):
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    executed.parent.mkdir(parents=True, exist_ok=True)
    shown = sys.stderr.isatty()
    if not shown:
        print(f"{label} …", flush=True)
    try:
        papermill.execute_notebook(
            source,
            executed,
            {INJECTED: folder.relative_to(root).as_posix(), **values},
            kernel_name="python3",
            progress_bar={"desc": label, "leave": False} if shown else False,
            start_timeout=KERNEL_START_S,
            cwd=root / "notebooks",
            config=Config({"KernelManager": {"transport": "ipc"}}),
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        raise _NotebookError(_explain(error, source.stem, executed)) from error
    except DeadKernelError as error:
        raise _NotebookError(
            f"{source.stem}: its Python process was ended from outside, most often because memory "
            "ran out. Close other programs or make the run smaller (see the parameters)."
        ) from error


def _explain(error, stem, executed):
    if "No space left" in error.evalue:
        return (
            f"{stem}: {error.evalue} ({_free_gb(executed.parent):.1f} GB free): make room there, or "
            "delete runs that you no longer need. What is finished is kept."
        )
    return (
        f"{stem} failed in cell In [{error.exec_count}]:\n  {error.ename}: {error.evalue}\n"
        f"The whole traceback is in {os.path.relpath(executed)}"
    )


def _command(profile, parameters, name, only, root):
    """The command line that continues this run, typed from the same folder."""
    script = os.path.relpath(root / "run_all.sh")
    words = [script if os.sep in script else f"./{script}", profile]
    for key, value in (parameters or {}).items():
        words += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    words += ["--name", name] * (name != profile)
    words += ["--only", str(only)] * (only is not None)
    return shlex.join(words)


@contextmanager
def _environment(offline):
    """Settings for the kernels: this package, this Python's kernel, and no needless network."""
    before = dict(os.environ)
    wanted = {"JUPYTER_PREFER_ENV_PATH": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if offline:
        wanted["HF_HUB_OFFLINE"] = "1"
    paths = filter(None, [str(PACKAGE.parent), before.get("PYTHONPATH")])
    with tempfile.TemporaryDirectory(prefix="soundscapes-") as sockets:
        # Sockets in a local, short path: home may be a network disk, and TCP ports can collide.
        os.environ.update(wanted | before)
        os.environ.update(JUPYTER_RUNTIME_DIR=sockets, PYTHONPATH=os.pathsep.join(paths))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


class _PeakMemory:
    """Samples the resident memory of this process and all its children while a block runs."""

    def __enter__(self):
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self):
        import psutil

        process = psutil.Process()
        while True:
            total = 0
            for one in [process, *process.children(recursive=True)]:
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)
            if self._stop.wait(0.5):
                return

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


# --- what makes a notebook's results stale -------------------------------------------------------


def _state_key(path, values, stages, root):
    """Digest of all that a notebook's results follow from: same key, same results."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(code)
    # what an earlier notebook left counts where the code names that notebook
    earlier = {stem: stage.get("key") for stem, stage in stages.items() if stem in text}
    earlier.pop(path.stem, None)
    return store.content_key(code, _sources(text), values, _inputs(values, root), earlier)


def _sources(code):
    """Sources of the modules that `code` leads to, so that a fix in one stage spares the others."""
    tables = [*PACKAGE.glob("*.csv"), *PACKAGE.glob("*.json")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in tables}
    waiting = _imported(code)
    while waiting:
        name = waiting.pop()
        sources[name] = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        waiting |= _imported(sources[name]) - sources.keys()
    sources.pop("pipeline", None)  # the runner only carries results from here to there
    return sources


def _imported(code):
    """Names of the package's modules that a piece of Python imports, at any depth of nesting."""
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))]
    dotted = []
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE.name] * (node.level > 0) + [node.module] * bool(node.module)
            dotted += [".".join([*base, alias.name]) for alias in node.names]
    modules = {name.split(".")[1] for name in dotted if name.startswith(f"{PACKAGE.name}.")}
    return {name for name in modules if (PACKAGE / f"{name}.py").is_file()}


def _inputs(values, root):
    """Names, sizes and times of the files that a person provides; `data_dir` is the runs' cache."""
    named = {name: value for name, value in values.items() if _is_path(name) and value}
    named.pop("data_dir", None)
    if values.get("checkpoint"):
        builtin = values["checkpoint"] == "builtin"
        named["checkpoint"] = "data/checkpoints/mini-audioldm" if builtin else values["checkpoint"]
    inputs = {}
    for name, value in named.items():
        path = root / Path(value).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        inputs[name] = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return inputs


# --- the record of a run -------------------------------------------------------------------------


def read_record(folder):
    """What is known of a run, from its ``run.json``; an empty dict where nothing has run."""
    path = Path(folder) / "run.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _save_record(folder, record):
    store.write_atomic(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False))


def _begin_record(folder, profile, given, values):
    before = read_record(folder)
    return {
        "name": folder.name,
        "profile": profile,
        "given": given or {},
        "parameters": before.get("parameters", {}) | values,
        "started": _now(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": _versions(),
        "git": _git_state(),
        "stages": before.get("stages", {}),
    }


def _versions():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    installed = {}
    for requirement in project["project"]["dependencies"]:
        name = re.match(r"[\w.-]+", requirement).group()
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _git_state():
    def git(*words):
        words = ["git", "-C", str(PACKAGE.parent), *words]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown (not a git clone)", "dirty": False}


def _now():
    return datetime.now().astimezone().isoformat(timespec="seconds")


def duration(seconds):
    """Write seconds as people read them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


# --- profiles and parameters ---------------------------------------------------------------------


def notebooks(root=None):
    """List the numbered notebooks in the order in which they run: name and file."""
    folder = Path(root or store.project_root()) / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


def profiles(root=None):
    """List the profiles: name and file."""
    folder = Path(root or store.project_root()) / "notebooks" / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read_profile(name, root=None):
    """Read a profile, on top of the one that it extends.

    The texts of ``ABOUT``, ``offline`` (bool), and ``sections``: for "common" and for each notebook
    the parameters that differ from its defaults.
    """
    known = profiles(root)
    if name not in known:
        raise UsageError(f"no profile {name!r}{_nearest(name, known)}")
    try:
        content = yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{known[name]} is not valid YAML: {error}") from error
    base = {"offline": True, "sections": {}} | dict.fromkeys(ABOUT, "")
    if "extends" in content:
        base = _read_profile(content.pop("extends"), root)
    profile = base | {key: content.pop(key) for key in (*ABOUT, "offline") if key in content}
    profile["sections"] = dict(base["sections"])
    sections = ["common", *notebooks(root)]
    for section, values in content.items():
        if section not in sections:
            raise UsageError(f"{known[name]}: no notebook {section!r}{_nearest(section, sections)}")
        profile["sections"][section] = profile["sections"].get(section, {}) | (values or {})
    return profile


def resolve_parameters(profile, parameters=None, root=None, only=None):
    """Work out the parameters of every notebook, and refuse what does not fit before anything runs.

    `parameters`, given by the user, stand above the profile; each goes to every notebook that has one of
    that name. Texts are read as the type of the notebook's default, relative paths from the working
    directory. Returns, for each notebook that will run, all its parameters but ``run_dir``.
    """
    root = Path(root or store.project_root())
    defaults = {stem: _notebook_parameters(path) for stem, path in notebooks(root).items()}
    sections = _read_profile(profile, root)["sections"]
    selected = _select(only, defaults)
    resolved = {stem: dict(defaults[stem]) for stem in selected}
    for section, values in sections.items():
        reach = defaults if section == "common" else {section: defaults[section]}
        _apply(values, reach, resolved, f"profile {profile}, section {section}")
    given = {name: _given_path(name, value) for name, value in (parameters or {}).items()}
    reach = {stem: defaults[stem] for stem in selected}
    _apply(given, reach, resolved, "-p" if only is None else f"-p, notebook {only}")
    for stem in selected:
        resolved[stem].pop(INJECTED, None)
        _check_paths(stem, resolved[stem], root)
    return resolved


def _notebook_parameters(path):
    """Read names and defaults from a notebook's cell tagged ``parameters``."""
    tagged = [
        "".join(cell["source"])
        for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    parameters = {}
    for node in ast.parse("\n".join(tagged)).body:
        try:
            (target,) = node.targets
            value = parameters[target.id] = ast.literal_eval(node.value)
            if type(value) not in (bool, int, float, str, list):
                raise ValueError(node)
        except (AttributeError, ValueError) as error:
            raise UsageError(
                f"{path}: the parameters cell may hold only `name = scalar or list`, not: "
                f"{ast.unparse(node)}"
            ) from error
    return parameters


def _select(only, stems):
    if only is None:
        return list(stems)
    selected = [stem for stem in stems if stem == only or stem[:2] == str(only).zfill(2)]
    if not selected:
        raise UsageError(f"no notebook {only!r}{_nearest(str(only), stems)}")
    return selected


def _apply(values, reach, resolved, where):
    """Lay `values` over the notebooks of `resolved`; each must be known to one of `reach`."""
    for name, value in values.items():
        if name == INJECTED:
            raise UsageError(f"{INJECTED} follows from the name of the run: use --name instead")
        holders = [stem for stem, defaults in reach.items() if name in defaults]
        if not holders:
            known = sorted({known for defaults in reach.values() for known in defaults})
            raise UsageError(f"{where}: no parameter {name!r}{_nearest(name, known)}")
        for stem in holders:
            default = reach[stem][name]
            try:
                converted = _as_type_of(default, value)
            except (ValueError, KeyError, TypeError):
                kind = _KINDS.get(type(default), f"a list such as {json.dumps(default)} (in quotes)")
                raise UsageError(f"parameter {name!r} of {stem} takes {kind}, not {value!r}") from None
            if stem in resolved:
                resolved[stem][name] = converted


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _as_type_of(default, value):
    kind = type(default)
    if kind is list:
        items = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(value)
        # [0, 0.5] is a list of floats, whichever number stands first
        models = [*(item for item in default if isinstance(item, float)), *default]
        return [_as_type_of(models[0], item) for item in items] if models else items
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if kind in (int, float) and not isinstance(value, (bool, list)):
        return float(value) if kind is float else int(str(value))
    if kind is str and isinstance(value, str):
        return value
    raise ValueError(value)


def _nearest(name, known):
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else f"; there are: {', '.join(known)}"


def _is_path(name):
    return name.endswith(("_root", "_path")) or name == "data_dir"


def _given_path(name, value):
    """Make a path that a person typed absolute: it was meant from where they stood."""
    local_checkpoint = name.endswith("checkpoint") and str(value).startswith((".", "/", "~"))
    if value and (_is_path(name) or local_checkpoint):
        return str(Path(value).expanduser().resolve())
    return value


def _check_paths(stem, values, root):
    for name, value in values.items():
        if _is_path(name) and value and not (root / Path(value).expanduser()).exists():
            raise UsageError(
                f"parameter {name!r} of {stem}: {value} does not exist; correct the path "
                "(data/README.md says how to get each data set)"
            )


# --- for the reader of a notebook ----------------------------------------------------------------


def run_parameters(run):
    """Tabulate the parameters of a ``store.RunFolder``: of its batch run, or the notebooks' defaults.

    One row per parameter, one column per notebook (its number), values as text.
    """
    planned = read_record(run.path).get("parameters")
    planned = planned or {stem: _notebook_parameters(path) for stem, path in notebooks().items()}
    columns = {stem[:2]: pd.Series(values, dtype=object) for stem, values in planned.items()}
    table = pd.DataFrame(columns).sort_index().drop(index=INJECTED, errors="ignore")
    return table.rename_axis("parameter").map(lambda value: "" if value != value else str(value))


def profile_table():
    """Tabulate the profiles: what each is for and what it takes."""
    rows = {name: _read_profile(name) for name in profiles()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(ABOUT))
    return table.rename_axis("profile")


# what the profile paper fetches from the hub, and of each one file that a whole download contains
_HUB_CHECKPOINTS = {
    "cvssp/audioldm-s-full-v2": "model_index.json",
    "cvssp/audioldm2": "model_index.json",
    "facebook/audiogen-medium": "state_dict.bin",
}


def check_environment(data_dir="data", esc50_root="", urbansound8k_root="", tau_root="", yamnet_path=""):
    """Look for what the larger profiles need, and say how to get what is missing.

    Nothing is downloaded, and no data set is read. The folders are the notebooks' parameters of these
    names; `data_dir` is where data sets lie whose own folder is not given. Columns ``item, found``
    (bool), ``detail, needed_for, remedy``.
    """
    from huggingface_hub import try_to_load_from_cache

    data = store.project_path(data_dir)
    urbansound8k = urbansound8k_root or data / "UrbanSound8K"
    rows = _machine(data)
    for item, given, mark, needed_for in (
        ("ESC-50", esc50_root or data / "ESC-50", "meta/esc50.csv", "esc10, paper"),
        ("UrbanSound8K", urbansound8k, "metadata/UrbanSound8K.csv", "paper"),
        ("TAU 2020 Mobile", tau_root, "meta.csv", "paper"),
        ("mini-AudioLDM", "data/checkpoints/mini-audioldm", "model_index.json", "quick"),
        ("YAMNet", yamnet_path, "", "a third embedding in 04, any profile"),
    ):
        there = bool(given) and (store.project_path(given) / mark).exists()
        remedy = f"{data_dir}/README.md says how to get it"
        rows.append((item, there, mark and f"looked for {mark}", needed_for, remedy))
    for name, file in _HUB_CHECKPOINTS.items():
        there = isinstance(try_to_load_from_cache(name, file), str)
        detail = "in the hub's cache" if there else "not in the hub's cache"
        remedy = f"fetched on first use, or before: hf download {name}"
        rows.append((name, there, detail, "paper", remedy))
    table = pd.DataFrame(rows, columns=["item", "found", "detail", "needed_for", "remedy"])
    table.loc[table["found"], "remedy"] = ""
    return table


def _machine(data):
    import psutil
    import torch

    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "none that CUDA sees"
    free, memory = _free_gb(data), psutil.virtual_memory().total / 1e9
    disk_for, memory_for = "paper (quick needs 1 GB)", "paper (quick needs 4 GB)"
    return [
        ("GPU", gpu, name, "paper", "use a machine with an NVIDIA GPU (24 GB or more)"),
        ("disk, 300 GB", free > 300, f"{free:.0f} GB free", disk_for, "make room, or move the clone"),
        ("memory, 32 GB", memory > 32, f"{memory:.0f} GB", memory_for, "use a larger machine"),
    ]


def _free_gb(folder):
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free / 1e9
