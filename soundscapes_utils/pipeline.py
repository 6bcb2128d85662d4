"""Profiles, batch runs with papermill, and resuming.

Two parts. *Inside a notebook*: :func:`open_run` hands out the folder into which a run's tables,
figures and sounds go, and :func:`project_path` makes relative paths mean the same from a notebook,
a script and a test. *Around the notebooks*: :func:`run` reads a profile, checks every parameter
against the notebooks before anything starts, and executes them in order, skipping what is already
done. The page that closes a run is made in ``report.py``.
"""

from __future__ import annotations

import ast
import errno
import hashlib
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
from pathlib import Path

from . import store

PACKAGE = Path(__file__).resolve().parent


# --- inside a notebook ---------------------------------------------------------------------------


@contextmanager
def _replacing(path):
    """Give a temporary path beside `path`; put it in place only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: matplotlib and soundfile choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def run_parameters(run):
    """Tabulate the parameters of this run: those of the batch run, or the notebooks' defaults.

    Returns
    -------
    pandas.DataFrame
        One row a parameter, one column a notebook (its number), values as text; empty where a
        notebook has no such parameter.
    """
    import pandas as pd

    path = run.path / "run.json"
    if path.is_file():
        planned = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    else:
        planned = {stem: notebook_parameters(file) for stem, file in notebooks().items()}
    columns = {stem[:2]: pd.Series(values, dtype=object) for stem, values in planned.items()}
    table = pd.DataFrame(columns).sort_index().drop(index=INJECTED, errors="ignore")
    return table.rename_axis("parameter").map(lambda value: "" if value != value else str(value))


def profile_table():
    """Tabulate the profiles: what each is for and what it takes.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``profile``; columns ``description, time, memory, disk, needs``.

    Examples
    --------
    >>> "quick" in profile_table().index
    True
    """
    import pandas as pd

    rows = {name: read_profile(name) for name in profiles()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(ABOUT))
    return table.rename_axis("profile")


# --- profiles and parameters ---------------------------------------------------------------------


class UsageError(ValueError):
    """A profile, parameter, path or run name that cannot be used; nothing has run yet."""


class RunFailed(RuntimeError):
    """A notebook failed or was interrupted; the message ends with the command to resume.

    Attributes
    ----------
    exit_code : int
        1, or 130 after an interruption.
    """

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


ABOUT = ("description", "time", "memory", "disk", "needs")
INJECTED = "run_dir"
KERNEL_START_S = 300


def notebooks(root=None):
    """List the numbered notebooks in the order in which they run.

    Parameters
    ----------
    root : path-like, optional
        The project; found by :func:`project_root` by default.

    Returns
    -------
    dict of str to Path
        Name without extension, and file.

    Examples
    --------
    >>> list(notebooks())[:2]
    ['00_start_here', '01_dataset_mixing']
    """
    folder = Path(root or store.project_root()) / "notebooks"
    return {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}


def notebook_parameters(path):
    """Read the parameters of a notebook and their defaults from its cell tagged ``parameters``.

    Parameters
    ----------
    path : path-like
        The notebook.

    Returns
    -------
    dict of str to object
        Empty if no cell has the tag.

    Raises
    ------
    UsageError
        If a default is no plain scalar or list.

    Examples
    --------
    >>> notebook_parameters(notebooks()["00_start_here"])["run_dir"]
    'runs/quick'
    """
    tagged = [
        "".join(cell["source"])
        for cell in json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell["metadata"].get("tags", [])
    ]
    found = {}
    for node in ast.parse("\n".join(tagged)).body:
        try:
            (target,) = node.targets
            found[target.id] = ast.literal_eval(node.value)
            if type(found[target.id]) not in (bool, int, float, str, list):
                raise ValueError(node)
        except (AttributeError, ValueError) as error:
            line = ast.unparse(node)
            raise UsageError(
                f"{path}: the parameters cell may hold only `name = scalar or list`, not: {line}"
            ) from error
    return found


def profiles(root=None):
    """List the profiles by name.

    Parameters
    ----------
    root : path-like, optional
        The project; found by :func:`project_root` by default.

    Returns
    -------
    dict of str to Path
        Name and file.

    Examples
    --------
    >>> "quick" in profiles()
    True
    """
    folder = Path(root or store.project_root()) / "notebooks" / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_profile(name, root=None):
    """Read a profile, on top of the one that it extends.

    Parameters
    ----------
    name : str
        Name of a file in ``notebooks/profiles``, without extension.
    root : path-like, optional
        The project; found by :func:`project_root` by default.

    Returns
    -------
    dict
        ``description, time, memory, disk, needs`` (texts), ``offline`` (bool), and ``sections``:
        for ``"common"`` and for each notebook the parameters that differ from its defaults.

    Raises
    ------
    UsageError
        If there is no such profile, or the file has keys that mean nothing.

    Examples
    --------
    >>> read_profile("quick")["offline"]
    True
    """
    import yaml

    known = profiles(root)
    if name not in known:
        raise UsageError(f"no profile {name!r}{_nearest(name, known)}")
    try:
        content = yaml.safe_load(known[name].read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{known[name]} is not valid YAML: {error}") from error
    base = {"offline": True, "sections": {}} | dict.fromkeys(ABOUT, "")
    if "extends" in content:
        base = read_profile(content.pop("extends"), root)
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

    Parameters
    ----------
    profile : str
    parameters : dict of str to object, optional
        Given by the user, above the profile; each goes to every notebook that has a parameter of
        that name. Texts are read as the type of the notebook's default. Relative paths are taken
        from the working directory.
    root : path-like, optional
        The project; found by :func:`project_root` by default.
    only : str, optional
        Number or name of the one notebook to run.

    Returns
    -------
    dict of str to dict
        For each notebook that will run, all its parameters but ``run_dir``.

    Raises
    ------
    UsageError
        Unknown profile, notebook or parameter (the nearest are named), wrong type, missing path.

    Examples
    --------
    >>> resolve_parameters("quick", {"seed": "7"})["01_dataset_mixing"]["seed"]
    7
    """
    defaults = {stem: notebook_parameters(path) for stem, path in notebooks(root).items()}
    sections = read_profile(profile, root)["sections"]
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
            if stem in resolved:
                resolved[stem][name] = _as_type_of(reach[stem][name], value, name, stem)


def _as_type_of(default, value, name, stem):
    kind = type(default)
    try:
        if kind is list:
            return _as_list(default, value)
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float) and not isinstance(value, (bool, list)):
            return kind(value) if kind is float else int(str(value))
        if kind is str and isinstance(value, str):
            return value
        raise ValueError(value)
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"parameter {name!r} of {stem} takes {_kind_in_words(default)}, not {value!r}"
        ) from None


def _as_list(default, value):
    import yaml

    items = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(items, list):
        raise ValueError(value)
    if not default:
        return items
    # [0, 0.5] is a list of floats, whichever number stands first
    model = next((item for item in default if isinstance(item, float)), default[0])
    return [_as_type_of(model, item, "item", "list") for item in items]


def _kind_in_words(default):
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return words.get(type(default), f"a list such as {json.dumps(default)} (in quotes)")


def _nearest(name, known):
    import difflib

    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    if close:
        return f"; nearest: {', '.join(close)}"
    return f"; there are: {', '.join(known)}"


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
        if _is_path(name) and value and not _from(root, value).exists():
            raise UsageError(
                f"parameter {name!r} of {stem}: {value} does not exist; correct the path "
                "(data/README.md says how to get each data set)"
            )


def _from(root, path):
    """Resolve as :func:`project_path` does, in a given project."""
    return Path(root or store.project_root()) / Path(path).expanduser()


# --- what makes a notebook's results stale -------------------------------------------------------


def _code_cells(path):
    cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


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


def _modules_behind(code):
    """Sources of all modules that `code` leads to, so that a fix in one stage spares the others."""
    sources, waiting = {}, _imported(code)
    while waiting:
        name = waiting.pop()
        sources[name] = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        waiting |= _imported(sources[name]) - sources.keys()
    # The runner only carries results from here to there: it cannot make them stale.
    sources.pop("pipeline", None)
    return sources


def _fingerprint(path):
    """Names, sizes and times of all files under a path: cheap, and it notices any change."""
    path = Path(path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _inputs(values, root):
    """Folders that a notebook reads and a person provides. `data_dir` is the runs' own cache."""
    named = {name: value for name, value in values.items() if _is_path(name) and value}
    named.pop("data_dir", None)
    if values.get("checkpoint") == "builtin":
        named["checkpoint"] = "data/checkpoints/mini-audioldm"
    elif values.get("checkpoint"):
        named["checkpoint"] = values["checkpoint"]
    paths = {name: _from(root, value) for name, value in named.items()}
    return {name: _fingerprint(path) for name, path in paths.items() if path.exists()}


def _state_key(path, values, stages, root):
    """Digest of all that a notebook's results follow from: same key, same results."""
    code = _code_cells(path)
    text = "\n".join(code)
    earlier = {stem: stage.get("key") for stem, stage in stages.items() if stem in text}
    earlier.pop(path.stem, None)
    parts = [code, _modules_behind(text), values, _inputs(values, root), earlier]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- running -------------------------------------------------------------------------------------


def run(profile="quick", parameters=None, *, name=None, only=None, fresh=False, root=None):
    """Run the notebooks of a profile in order, and write the report.

    What is finished and unchanged (code, parameters, inputs) is skipped, so that the same call
    resumes after a failure or an interruption.

    Parameters
    ----------
    profile : str, optional
        Name of a file in ``notebooks/profiles``.
    parameters : dict of str to object, optional
        See :func:`resolve_parameters`.
    name : str, optional
        Of the folder under ``runs/``; the profile's name by default.
    only : str, optional
        Run just this notebook (number or name), even if nothing changed.
    fresh : bool, optional
        Run everything again.
    root : path-like, optional
        The project; by default the one that this package belongs to.

    Returns
    -------
    Path
        The report, ``runs/<name>/index.html``.

    Raises
    ------
    UsageError
        Before anything runs: see :func:`resolve_parameters`.
    RunFailed
        A notebook failed, the disk is full, or the run was interrupted.

    Examples
    --------
    >>> run("quick", {"seed": 1}, name="seed-1")  # doctest: +SKIP
    PosixPath('.../runs/seed-1/index.html')
    """
    from . import report

    root = Path(root or store.project_root(PACKAGE))
    name = name or profile
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"the run's name {name!r} may hold letters, digits, '.', '-' and '_' only")
    values = resolve_parameters(profile, parameters, root, only)
    resume = _command(profile, parameters, name, only, root)
    folder = root / "runs" / name
    try:
        record = _begin_record(folder, profile, parameters, values)
        with _environment(offline=read_profile(profile, root)["offline"]):
            for number, stem in enumerate(values, 1):
                label = f"[{number}/{len(values)}] {stem}"
                again = fresh or only is not None
                _run_one(label, stem, values[stem], folder, record, again, root)
        record["finished"] = _now()
        _save_json(folder / "run.json", record)
        return report.write_report(folder)
    except KeyboardInterrupt:
        raise RunFailed(f"\nInterrupted. Resume with:\n  {resume}", exit_code=130) from None
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunFailed(f"{_disk_full(folder)}\nResume with:\n  {resume}") from error
    except _NotebookError as error:
        raise RunFailed(f"{error}\nResume with:\n  {resume}") from error


class _NotebookError(RuntimeError):
    pass


def _run_one(label, stem, values, folder, record, again, root):
    stages, source = record["stages"], notebooks(root)[stem]
    key = _state_key(source, values, stages, root)
    executed = folder / "notebooks" / source.name
    if not again and _is_done(stages.get(stem), key, folder, executed):
        print(f"{label}: unchanged, skipped", flush=True)
        return
    stages[stem] = {"status": "running", "parameters": values, "started": _now()}
    _save_json(folder / "run.json", record)
    begin = time.time()
    # The parent's own time stamps are compared with files', so both must come from one clock.
    with _PeakMemory() as memory:
        try:
            _execute(label, source, executed, values, folder, root)
            stages[stem] |= {"status": "finished", "key": key, "outputs": _made(folder, begin)}
        except BaseException:
            stages[stem]["status"] = "failed"
            raise
        finally:
            stages[stem]["seconds"] = round(time.time() - begin, 1)
            stages[stem]["peak_memory_gb"] = memory.peak_gb()
            _save_json(folder / "run.json", record)
    print(f"{label}: {_seconds(stages[stem]['seconds'])}, {memory.peak_gb():.1f} GB", flush=True)


def _is_done(stage, key, folder, executed):
    if not stage or stage["status"] != "finished" or stage["key"] != key:
        return False
    return executed.is_file() and all((folder / made).is_file() for made in stage["outputs"])


def _made(folder, since):
    """Tables and figures written since a time: if one is deleted, its notebook runs again."""
    files = [*(folder / "tables").glob("*.csv"), *(folder / "figures").glob("*.png")]
    new = [file for file in files if file.stat().st_mtime >= since - 1]
    return sorted(str(file.relative_to(folder)) for file in new)


def _execute(label, source, executed, values, folder, root):
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError
    from traitlets.config import Config

    executed.parent.mkdir(parents=True, exist_ok=True)
    if sys.stderr.isatty():
        progress = {"desc": label, "leave": False}
    else:
        progress = False
        print(f"{label} …", flush=True)
    try:
        papermill.execute_notebook(
            source,
            executed,
            {INJECTED: folder.relative_to(root).as_posix(), **values},
            kernel_name="python3",
            progress_bar=progress,
            start_timeout=KERNEL_START_S,
            cwd=root / "notebooks",
            config=Config({"KernelManager": {"transport": "ipc"}}),
        )
    except PapermillExecutionError as error:
        raise _NotebookError(_explain(error, source.stem, executed, folder)) from error
    except DeadKernelError as error:
        raise _NotebookError(
            f"{source.stem}: its Python process was ended from outside, most often because memory "
            "ran out. Close other programs or make the run smaller (see the parameters)."
        ) from error


def _explain(error, stem, executed, folder):
    if error.ename == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if "[Errno 28]" in error.evalue or "No space left" in error.evalue:
        return _disk_full(folder)
    shown = os.path.relpath(executed)
    return (
        f"{stem} failed in cell In [{error.exec_count}]:\n"
        f"  {error.ename}: {error.evalue}\n"
        f"The whole traceback is in {shown}"
    )


def _free_gb(folder):
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free / 1e9


def _disk_full(folder):
    return (
        f"No space left on the disk that holds {folder} ({_free_gb(folder):.1f} GB free): make "
        "room there, or "
        "delete runs that you no longer need. What is finished is kept."
    )


def _command(profile, parameters, name, only, root):
    """The command line that continues this run, typed from the same folder."""
    script = os.path.relpath(root / "run_all.sh")
    words = [script if os.sep in script else f"./{script}", profile]
    for key, value in (parameters or {}).items():
        words += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    if name != profile:
        words += ["--name", name]
    if only is not None:
        words += ["--only", str(only)]
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
        import psutil

        self._process, self._peak, self._stop = psutil.Process(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.5):
            self._sample()

    def _sample(self):
        import psutil

        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        self._peak = max(self._peak, total)

    def peak_gb(self):
        self._sample()
        return round(self._peak / 1e9, 2)

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


# --- the record of a run -------------------------------------------------------------------------


def _begin_record(folder, profile, given, values):
    path = folder / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
    from importlib import metadata

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    direct = project["project"]["dependencies"]
    names = [re.match(r"[\w.-]+", requirement).group() for requirement in direct]
    installed = {}
    for name in names:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def _git_state():
    def git(*words):
        done = subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown (not a git clone)", "dirty": False}


def _save_json(path, content):
    with _replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _now():
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _seconds(seconds):
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
