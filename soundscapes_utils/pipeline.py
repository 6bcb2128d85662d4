"""Profiles, batch runs with papermill, and resuming.

:func:`run` reads a profile, checks every parameter against the notebooks before anything starts, and
executes the notebooks, those that need nothing of each other side by side, skipping what is finished
and unchanged. A run is the folder ``runs/<name>``: its ``run.json`` says what was run, with which
parameters, and how far it came. :func:`settings` and :func:`open_run` stand at the head of a notebook.
"""

import ast
import difflib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import yaml

from . import store

PACKAGE = Path(__file__).resolve().parent
_LOCK = threading.Lock()  # what notebooks side by side do one after the other
ABOUT = ("description", "time", "memory", "disk", "needs")
INJECTED = "run_dir"
KERNEL_START_S = 300


class UsageError(store.DataError):
    """A profile, parameter, path or run name that cannot be used; nothing has run yet."""


class RunFailed(RuntimeError):
    """A notebook failed or was interrupted; the message ends with the command to resume.

    ``exit_code`` is 1, or 130 after an interruption.
    """

    exit_code = 1


class Interrupted(RunFailed):
    """A run that was stopped from outside."""

    exit_code = 130


# --- running -------------------------------------------------------------------------------------


def run(
    profile="quick", parameters=None, *, name=None, only=None, fresh=False, appendix=False, root=None
):
    """Run the notebooks of a profile; return the run's folder, ``runs/<name>``.

    What is finished and unchanged (code, parameters, inputs) is skipped, so that the same call resumes
    after a failure or an interruption. `parameters` as for :func:`resolve_parameters`; `name` is by
    default the profile's; `only` runs just this notebook (number or name), even if nothing changed;
    `fresh` runs everything again; `appendix` adds the appendix's notebooks and the solutions; `root` is
    by default the project that this package belongs to.

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
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UsageError(f"the run's name {name!r} may hold up to 100 letters, digits, '.', '-' and '_'")
    values = resolve_parameters(profile, parameters, root, only, appendix)
    given = {key: value for own in values.values() for key, value in own.items()}
    _check_demands(values, given)
    _fetch_sounds(given)
    folder, how = root / "runs" / name, _read_profile(profile, root)
    jobs = min(how["jobs"], len(values), os.cpu_count() or 1)

    def resume(only=only, more=""):
        more += " --appendix" * appendix
        return f"Resume with:\n  {_command(profile, parameters, name, only, root)}{more}"

    def run_one(label, slot, stem):
        again = fresh or only is not None
        _run_one((label, slot), stem, values[stem], folder, record, again, how["tags"], root)

    with _owned(folder):
        try:
            record = _begin_record(folder, profile, parameters, values)
            # the environment ends first, and with it the kernels that the threads wait for
            with ThreadPoolExecutor(jobs) as pool, _environment(how["offline"], how["jobs"]):
                _run_side_by_side(pool, jobs, _builds_on(values, root), run_one)
            _note(folder, record, finished=_now())
            return folder
        except KeyboardInterrupt:
            raise Interrupted(f"\nInterrupted. {resume()}") from None
        except _StageMissing as error:  # whose own command would fail again
            more = " --fresh" if only is None else ""
            raise RunFailed(f"{error}\n{resume(None, more)}") from error
        except (OSError, store.DataError, _NotebookError) as error:
            raise RunFailed(f"{in_words(error)}\n{resume()}") from error


def _builds_on(stems, root):
    """For each notebook the earlier ones of the run that its code names."""
    stems, known = list(stems), notebooks(root)
    code = {stem: "\n".join(source for _, source in _code_cells(known[stem])) for stem in stems}
    return {stem: {one for one in stems[:i] if one in code[stem]} for i, stem in enumerate(stems)}


def _run_side_by_side(pool, jobs, builds_on, run_one):
    """Begin each notebook when what it builds on is done; after a failure finish what runs."""
    waiting, running, slots, failed = list(builds_on), {}, set(range(jobs)), []
    while waiting or running:
        ready = [stem for stem in waiting if not builds_on[stem] & {*waiting, *running.values()}]
        for stem in ready[: len(slots)]:
            waiting.remove(stem)
            number, slot = list(builds_on).index(stem) + 1, min(slots)
            slots.remove(slot)
            task = pool.submit(run_one, f"[{number}/{len(builds_on)}] {stem}", slot, stem)
            task.slot, running[task] = slot, stem
        for task in wait(running, return_when=FIRST_COMPLETED).done:
            running.pop(task)
            slots.add(task.slot)
            if error := task.exception():
                if not isinstance(error, Exception):  # interrupted
                    raise error
                failed.append(error)
                waiting.clear()
    for error in failed[:1]:
        raise error


class _NotebookError(RuntimeError):
    pass


class _StageMissing(_NotebookError):
    pass


def in_words(error):
    """Say what went wrong: errors of the system as path and remedy, others in their own words."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno is None:
        return str(error)
    place = f"{cause.filename or 'the disk'}: "
    said = f"{cause.strerror}; check its path, permissions and free space"
    return str(error).replace(str(cause), said if str(error).startswith(place) else place + said)


@contextmanager
def _owned(folder):
    """Keep other runs out of a folder; the lock ends with this process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".owner").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # any other one: a network disk without locks
            file.seek(0)
            if isinstance(error, BlockingIOError):
                owner = f"a run that is going on (process {file.read()})"
                remedy = "wait until it ends, or give this one another --name"
                raise UsageError(f"{folder} is in use by {owner}: {remedy}") from None
        file.truncate(0)
        print(f"{os.getpid()} on {platform.node()}", file=file, end="", flush=True)
        yield


def _run_one(label, stem, values, folder, record, again, tags, root):
    source = notebooks(root)[stem]
    key = _state_key(source, values, record["stages"], tags, root)
    executed = folder / "notebooks" / source.name
    if not again and _is_done(record["stages"].get(stem), key, folder, executed):
        print(f"{label[0]}: unchanged, skipped", flush=True)
        return
    stage = {"status": "running", "parameters": values, "started": _now()}
    _note(folder, record, stem, **stage)
    begin = time.time()
    try:
        with _peak_memory() as memory:
            _execute(label, _tagged(source, executed, tags), executed, values, folder, root)
        stage |= {"status": "finished", "key": key, "outputs": _outputs(folder, source, begin)}
    except BaseException:
        stage["status"] = "failed"
        raise
    finally:
        stage["seconds"] = round(time.time() - begin, 1)
        stage["peak_memory_gb"] = round(max(memory) / 1e9, 2)
        _note(folder, record, stem, **stage)
    print(f"{label[0]}: {duration(stage['seconds'])}, {stage['peak_memory_gb']:.1f} GB", flush=True)


def _tagged(source, executed, tags):
    """The notebook to execute: the whole, or where a profile names tags those cells alone."""
    if not tags:
        return source
    content = json.loads(source.read_text(encoding="utf-8"))
    content["cells"] = [c for c in content["cells"] if {*tags} & {*c["metadata"].get("tags", [])}]
    return store.write_atomic(executed, json.dumps(content, ensure_ascii=False, indent=1))


def _is_done(stage, key, folder, executed):
    same = stage and stage["status"] == "finished" and stage["key"] == key
    return same and executed.is_file() and all((folder / name).is_file() for name in stage["outputs"])


def _outputs(folder, source, since):
    """Tables and figures that its code names, written since a time: one deleted, and it runs again."""
    files, code = [*folder.glob("tables/*.csv"), *folder.glob("figures/*.png")], str(_code_cells(source))
    own = [file for file in files if file.name[:2] == source.name[:2] or file.stem in code]
    new = [file for file in own if file.stat().st_mtime >= since - 1]
    return sorted(str(file.relative_to(folder)) for file in new)


def _execute(label, source, executed, values, folder, root):
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    executed.parent.mkdir(parents=True, exist_ok=True)
    in_cell = _cell_parameters(source)
    parameters = {INJECTED: folder.relative_to(root).as_posix()}
    parameters |= {name: value for name, value in values.items() if name in in_cell}
    if "more" in in_cell:
        usual = _seldom_changed(root, source.stem)
        parameters["more"] = {k: values[k] for k in usual if values[k] != usual[k]}
    # not papermill's cwd, which would move this whole process
    kernel = {"kernel_name": "python3", "start_timeout": KERNEL_START_S}
    kernel |= {"resources": {"metadata": {"path": str(root / "notebooks")}}}
    kernel |= {"config": Config({"KernelManager": _sockets()}), "extra_arguments": _KERNEL_PATH}
    label, slot = label
    bar = {"desc": label, "leave": False, "position": slot} if sys.stderr.isatty() else False
    if not bar:
        print(f"{label} …", flush=True)
    try:
        papermill.execute_notebook(source, executed, parameters, progress_bar=bar, **kernel)
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        kind = _StageMissing if error.ename == store.MissingStage.__name__ else _NotebookError
        raise kind(_explain(error, source.stem, executed)) from error
    except DeadKernelError as error:
        ended = "its Python process was ended from outside, most often because memory ran out"
        remedy = "close other programs or make the run smaller (see the parameters)"
        raise _NotebookError(f"{source.stem}: {ended}; {remedy}") from error


def _explain(error, stem, executed):
    if "No space left" in error.evalue:
        remedy = "make room there, or delete runs that you no longer need. What is finished is kept."
        return f"{stem}: {error.evalue} ({_free_gb(executed.parent):.1f} GB free): {remedy}"
    failed = f"{stem} failed in cell In [{error.exec_count}]:\n  {error.ename}: {error.evalue}"
    return f"{failed}\nThe whole traceback is in {os.path.relpath(executed)}"


def _command(profile, parameters, name, only, root):
    """The command line that continues this run, typed from the same folder."""
    script = os.path.relpath(root / "run_all.sh")
    words = [script if os.sep in script else f"./{script}", profile]
    for key, value in (parameters or {}).items():
        words += ["-p", key, value if isinstance(value, str) else json.dumps(value)]
    words += ["--name", name] * (name != profile)
    words += ["--only", str(only)] * (only is not None)
    return shlex.join(words)


# ends what a run started, when the run ends or is killed: workers outlive the kernel that they serve
_WARDEN = """
import psutil, shutil, sys
sys.stdin.read()
for process in psutil.process_iter():
    try:
        if process.environ().get("JUPYTER_RUNTIME_DIR") == sys.argv[1]:
            process.kill()
    except psutil.Error:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
# a file beside the notebooks may be imported, but takes no library's place
_KERNEL_PATH = ["--InteractiveShellApp.ignore_cwd=True"]
_KERNEL_PATH += ["--InteractiveShellApp.exec_lines=import sys; sys.path.append('')"]
_KERNEL_PATH += ["--IPKernelApp.log_level=50"]  # its end is an interruption to it
# of the caller's settings, those that change what a kernel imports, starts with or draws on
_FOREIGN = ("PYTHON", "JUPYTER", "IPYTHON", "JPY_", "MPLBACKEND", "MATPLOTLIBRC")


@contextmanager
def _environment(offline, jobs):
    """Settings for the kernels: this package, this Python's kernel, and no needless network."""
    from unittest import mock

    # the path of a socket holds about 100 characters
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
    private = tempfile.mkdtemp(prefix="soundscapes-", dir=place)
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) or k == "PYTHONPYCACHEPREFIX"
    }
    ours = {"JUPYTER_RUNTIME_DIR": private, "IPYTHONDIR": private, "JUPYTER_PREFER_ENV_PATH": "1"}
    ours |= {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}
    if not sys.flags.safe_path:  # else this package was found where kernels find it too
        ours["PYTHONPATH"] = str(PACKAGE.parent)
    wishes = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": str(int(offline))}
    wishes["SOUNDSCAPES_HERE"] = str(Path.cwd())  # where a class of one's own may lie
    if jobs > 1:  # one's share of the cores, alone too: sounds depend on it in their last bit
        wishes["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    words = [sys.executable, "-I", "-c", _WARDEN, private]
    warden = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    with warden, mock.patch.dict(os.environ, wishes | kept | ours, clear=True):
        yield


def _sockets():
    """Where a kernel listens: in the private folder, as ports of TCP can collide."""
    import zmq

    file = Path(os.environ["JUPYTER_RUNTIME_DIR"]) / f"{uuid.uuid4().hex[:8]}.json"
    return {"connection_file": str(file), "transport": "ipc" if zmq.has("ipc") else "tcp"}


@contextmanager
def _peak_memory():
    """Sample the memory of this process and its children; of what they share, the most of one counts."""
    peak, stop, process = [0], threading.Event(), psutil.Process()

    def watch():
        while not stop.wait(0.5):
            with suppress(psutil.Error):  # one has just ended: the next sample counts
                family = [process, *process.children(recursive=True)]
                infos = [one.memory_info() for one in family]
                shared = [getattr(info, "shared", 0) for info in infos]
                peak.append(sum(info.rss for info in infos) - sum(shared) + max(shared))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# --- what makes a notebook's results stale -------------------------------------------------------


def _state_key(path, values, stages, tags, root):
    """Digest of all that a notebook's results follow from: same key, same results."""
    code = [text for own, text in _code_cells(path) if not tags or {*tags} & {*own}]
    text = "\n".join(code)
    # what an earlier notebook left counts where the code names that notebook
    earlier = {stem: stage.get("key") for stem, stage in stages.items() if stem in text}
    earlier.pop(path.stem, None)
    named = re.findall(r"[\w.]+:\w+", str(values))
    own = [digest for name in named for digest in store.class_files(name)]
    return store.content_key(code, _sources(code), values, _inputs(values, root), earlier, *own)


_OF_THE_RUNNER = ("pipeline", "parameters.csv", "commands.csv")


def _sources(code):
    """Sources of the modules that `code` leads to, so that a fix in one stage spares the others."""
    tables = [*PACKAGE.glob("*.csv"), *PACKAGE.glob("*.json")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in tables}
    waiting = set().union(*map(_imported, code))
    while waiting:
        name = waiting.pop()
        sources[name] = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        if name not in _OF_THE_RUNNER:  # it only carries results from here to there
            waiting |= _imported(sources[name]) - sources.keys()
    return {name: text for name, text in sources.items() if name not in _OF_THE_RUNNER}


def _imported(code):
    """Names of the package's modules that a piece of Python imports, at any depth of nesting."""
    dotted = []
    for node in ast.walk(_parsed(code) or ast.Pass()):  # the notebook itself will say what is wrong
        if isinstance(node, ast.Import):
            dotted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE.name] * (node.level > 0) + [node.module] * bool(node.module)
            dotted += [".".join([*base, alias.name]) for alias in node.names]
    modules = {name.split(".")[1] for name in dotted if name.startswith(f"{PACKAGE.name}.")}
    return {name for name in modules if (PACKAGE / f"{name}.py").is_file()}


def _parsed(code):
    """Syntax tree of a cell as IPython reads it, or None."""
    for transformed in (False, True):
        if transformed:
            from IPython.core.inputtransformer2 import TransformerManager

            # what stands below a cell's magic is most often Python
            code = TransformerManager().transform_cell(re.sub(r"\A\s*%%.*", "", code))
        # CPython 3.11 fails where two threads parse at once ("recursion depth mismatch")
        with suppress(SyntaxError), _LOCK:
            return ast.parse(code)
    return None


def _inputs(values, root):
    """Names, sizes and times of the files that a person provides; `data_dir` is the runs' cache."""
    named = {name: value for name, value in values.items() if _is_path(name, value) and value}
    named.pop("data_dir", None)
    if given := values.get("checkpoint"):
        named["checkpoint"] = "data/checkpoints/mini-audioldm" if given == "builtin" else given
    inputs = {}
    for name, value in named.items():
        path = root / Path(value).expanduser()
        files = store.walk_files(path) if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        inputs[name] = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return inputs


# --- the record of a run -------------------------------------------------------------------------


def read_record(folder):
    """What is known of a run, from its ``run.json``; an empty dict where nothing has run."""
    path = Path(folder) / "run.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise store.DataError(f"{path}: damaged ({error}); remove it, and the run begins anew") from None


def _note(folder, record, stem=None, **entries):
    """Write entries into a run's record, or into that of one of its notebooks, and keep it."""
    with _LOCK:
        record.update(entries if stem is None else {"stages": record["stages"] | {stem: entries}})
        store.write_atomic(folder / "run.json", json.dumps(record, indent=1, ensure_ascii=False))


def _begin_record(folder, profile, given, values):
    before = read_record(folder)
    record = {"name": folder.name, "profile": profile, "given": given or {}, "started": _now()}
    record |= {"python": platform.python_version(), "platform": platform.platform()}
    record |= {"cores": os.cpu_count(), "versions": _versions(), "git": _git_state()}
    record["parameters"] = before.get("parameters", {}) | values
    return record | {"stages": before.get("stages", {})}


def _versions():
    names = [re.match(r"[\w.-]+", line).group() for line in metadata.requires("soundscapes-utils")]
    there = {one.name.lower().replace("_", "-"): one.version for one in metadata.distributions()}
    return {name: there.get(name.lower().replace("_", "-"), "not installed") for name in names}


def _git_state():
    words = ["git", "describe", "--always", "--abbrev=40", "--match=-", "--dirty"]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    text = ""
    with suppress(OSError):  # no git
        text = subprocess.run(words, cwd=PACKAGE, env=ours, capture_output=True, text=True).stdout
    commit = text.strip().removesuffix("-dirty") or "unknown (not a git clone)"
    return {"commit": commit, "dirty": "-dirty" in text}


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


_NUMBERED = re.compile(r"(\d\d|A\d)_")


def notebooks(root=None):
    """List the notebooks in the order in which they run: name and file.

    The numbered ones, the appendix's (``A1_…``), and the solutions. Letters, digits and "_" make a
    name: the copies that Jupyter makes (``…-Copy1``) do not join.
    """
    folder = Path(root or store.project_root()) / "notebooks"
    files = [*sorted(folder.glob("*.ipynb")), *sorted((folder / "appendix").glob("*.ipynb"))]
    named = {path.stem: path for path in files if re.fullmatch(rf"{_NUMBERED.pattern}\w+", path.stem)}
    return named | {path.stem: path for path in files if path.stem == "solutions"}


def profiles(root=None):
    """List the profiles: name and file."""
    folder = Path(root or store.project_root()) / "notebooks" / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


_OF_A_RUN = {"offline": True, "jobs": 2, "tags": []}


def _read_profile(name, root=None, above=()):
    """Read a profile, on top of the one that it extends.

    The texts of ``ABOUT``; ``offline``; ``jobs``, notebooks side by side; ``tags`` of the cells to run,
    where not all are; ``sections``: for "common" and each notebook what differs from its defaults.
    """
    known = profiles(root)
    if str(name) not in known:
        raise UsageError(f"no profile {name!r}{_nearest(name, known)}")
    if name in above:
        raise UsageError(f"profile {name} extends itself: {', '.join([*above, name])}")
    path, sections = known[name], ["common", *notebooks(root)]
    try:
        # in YAML 1.1, 010 would be 8 and on would be true: nothing is typed here
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader) or {}
        base = _OF_A_RUN | {"sections": {}} | dict.fromkeys(ABOUT, "")
        if "extends" in content:
            base = _read_profile(content.pop("extends"), root, (*above, name))
        profile = base | {key: content.pop(key) for key in (*ABOUT, *_OF_A_RUN) if key in content}
        profile |= {key: _as_type_of(value, profile[key]) for key, value in _OF_A_RUN.items()}
        profile["sections"] = dict(base["sections"])
        for section, values in content.items():
            if section not in sections:
                raise UsageError(f"{path}: no notebook {section!r}{_nearest(section, sections)}")
            profile["sections"][section] = profile["sections"].get(section, {}) | dict(values or {})
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, yaml.YAMLError) as error:
        form = "in YAML, names and texts, and `notebook: {parameter: value}`"
        raise UsageError(f"{path} is no profile: {form} ({in_words(error)})") from error
    return profile


def resolve_parameters(profile, parameters=None, root=None, only=None, appendix=False):
    """Work out the parameters of every notebook, and refuse what does not fit before anything runs.

    `parameters`, given by the user, stand above the profile; each goes to every notebook that has one of
    that name. Texts are read as the type of the notebook's default, relative paths from the working
    directory. Returns, for each notebook that will run, all its parameters but ``run_dir``: those of its
    cell, and those that ``more`` may hold.
    """
    root = Path(root or store.project_root(PACKAGE))
    defaults = {stem: _notebook_parameters(path, root) for stem, path in notebooks(root).items()}
    how = _read_profile(profile, root)
    sections = how["sections"]
    selected = _select(only, defaults, appendix)
    if how["tags"]:  # the last one is that of the cells for whose sake a notebook runs
        known = notebooks(root)
        selected = [
            k for k in selected if any(how["tags"][-1] in own for own, _ in _code_cells(known[k]))
        ]
    resolved = {stem: dict(defaults[stem]) for stem in selected}
    for section, values in sections.items():
        reach = defaults if section == "common" else {section: defaults[section]}
        _apply(values, reach, resolved, f"profile {profile}, section {section}")
    given = {name: _given_path(name, value) for name, value in (parameters or {}).items()}
    reach = {stem: defaults[stem] for stem in selected}
    _apply(given, reach, resolved, "-p" if only is None else f"-p, notebook {only}")
    for stem in selected:
        resolved[stem].pop(INJECTED, None)
        for name, value in resolved[stem].items():
            if value != defaults[stem][name]:
                _check_value(stem, name, value, root)
    return resolved


def _code_cells(path):
    """Tags and source of each code cell of a notebook."""
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [(cell["metadata"].get("tags", []), "".join(cell["source"])) for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a notebook; open it in Jupyter, and save it again") from error


def _seldom_changed(root, stem):
    """Defaults of what a notebook's ``more`` may hold, from ``notebooks/more.yaml``."""
    path = root / "notebooks" / "more.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return dict(content.get(stem) or {})
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        form = "in YAML, `notebook: {parameter: default}`"
        raise UsageError(f"{path} cannot be read: {form} ({in_words(error)})") from error


def _notebook_parameters(path, root):
    """Names and defaults of all of a notebook's parameters."""
    parameters = _cell_parameters(path)
    if "more" in parameters:
        parameters |= _seldom_changed(root, path.stem)
        del parameters["more"]
    return parameters


def _cell_parameters(path):
    """Read names and defaults from a notebook's cell tagged ``parameters``."""
    tree = _parsed("\n".join(text for tags, text in _code_cells(path) if "parameters" in tags))
    if tree is None:
        raise UsageError(f"{path}: the parameters cell is not Python; open it and run it")
    parameters = {}
    # a magic, or a text, sets nothing
    for node in [node for node in tree.body if not isinstance(node, ast.Expr)]:
        try:
            (target,) = node.targets
            value = parameters[target.id] = ast.literal_eval(node.value)
            if type(value) not in (bool, int, float, str, list) and (target.id, value) != ("more", {}):
                raise ValueError(node)
        except (AttributeError, ValueError) as error:
            form = "the parameters cell may hold only `name = scalar or list`, and `more = {}`"
            raise UsageError(f"{path}: {form}, not: {ast.unparse(node)}") from error
    return parameters


def _select(only, stems, appendix):
    wanted = str(only).zfill(2)
    if only is None:
        return [stem for stem in stems if appendix or stem[0].isdecimal()]
    selected = [stem for stem in stems if wanted in (stem, stem[:2])]
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
            except (ValueError, KeyError, TypeError, yaml.YAMLError):
                kind = _KINDS.get(type(default), f"a list such as {json.dumps(default)} (in quotes)")
                raise UsageError(f"parameter {name!r} of {stem} takes {kind}, not {value!r}") from None
            if stem in resolved:
                resolved[stem][name] = converted


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _as_type_of(default, value):
    kind = type(default)
    if kind is list:
        items = yaml.load(value, yaml.BaseLoader) if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(value)
        # [0, 0.5] is a list of floats, whichever number stands first
        models = [*(item for item in default if isinstance(item, float)), *default]
        return [_as_type_of(models[0], item) for item in items] if models else items
    if kind is bool:
        return {"true": True, "false": False}[str(value).lower()]
    if kind is int:
        return int(str(value))
    if kind is float and not isinstance(value, bool) and math.isfinite(float(value)):
        return float(value)
    if kind is str and isinstance(value, str):
        return value
    raise ValueError(value)


def _nearest(name, known):
    close = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else f"; there are: {', '.join(known)}"


def _is_path(name, value=""):
    local = isinstance(value, str) and re.match(r"\.{0,2}/|~|.*\.csv$", value)
    return name.endswith(("_root", "_path")) or name == "data_dir" or bool(local)


def _given_path(name, value):
    """Make a path that a person typed absolute: it was meant from where they stood."""
    return str(Path(value).expanduser().absolute()) if value and _is_path(name, value) else value


def _check_value(stem, name, value, root):
    """Refuse a value that its stage would refuse, by the table parameters.csv."""
    place = f"parameter {name!r} of {stem}"
    if _is_path(name, value) and value and not (root / Path(value).expanduser()).exists():
        remedy = "correct the path (data/README.md says how to get each data set)"
        raise UsageError(f"{place}: {value} does not exist; {remedy}")
    store.check_value(name, value, place, UsageError, _choices)


def _choices(word):
    """What a word of the table stands for: a choice, or the names in a stage's own list."""
    module, _, name = word.partition(".")
    return getattr(import_module(f".{module}", __package__), name) if name.isupper() else [word]


def _check_demands(values, given):
    """Refuse what a stage's own records refuse, and what a notebook asks of another in vain."""
    if "own" in (given.get("dataset"), given.get("mix_dataset")) and "sounds_root" in given:
        from . import datasets

        datasets.check_own(given)
    for stem, own in values.items():
        try:
            if {"snr_db", "onset", "duration_s"} <= own.keys():
                from . import mixing

                ratio = {"snr_db": tuple(own["snr_db"])} if own["snr_db"] else {}
                mixing.MixOptions(**ratio, onset=own["onset"], duration_s=own["duration_s"])
            if {*_STUDY, *_TRAINING} <= own.keys():
                _check_study(own, values.values())
            if own.get("challenge_form") and not own["dcase_root"]:
                raise ValueError("challenge_form needs dcase_root, the folder of the challenge's set")
            half = own.get("mixed_precision") == "fp16"
            if half and not import_module("torch").accelerator.is_available():
                raise ValueError("mixed_precision fp16 needs a GPU; bf16 works on a CPU too")
        except ValueError as error:
            raise UsageError(f"{stem}: {error}") from error


def _fetch_sounds(given):
    """Fetch ESC-10 where a notebook will load it and no copy is there."""
    if "esc10" in (given.get("dataset"), given.get("mix_dataset")) and given.get("esc50_root") == "":
        from . import datasets

        if not ((data := store.project_path(given["data_dir"])) / "ESC-50").exists():
            datasets.download_dataset("esc10", data)


_STUDY = ("models", "test_folds", "runs", "seed", "real_per_class", "validation")
_TRAINING = ("epochs", "patience", "batch_size", "patches_per_epoch", "device", "workers")
_MAKER = {"n_per_class", "counts", "checkpoint", "test_fold"}


def _check_study(own, parts):
    """Refuse a study that needs clips which the notebooks before it will not leave."""
    from . import classifiers, esc, generation

    own = own | {name: own[name] or None for name in ("real_per_class", "patches_per_epoch", "workers")}
    classifiers.Training(*(own[name] for name in _TRAINING))
    arms, (models, *rest) = (), (own[name] for name in _STUDY)
    # all but `arms` are trained with the first of the models only
    for name in ("arms", "practice_arms", "controls", "few_arms"):
        if own.get(name):
            arms += esc.Study(own[name], models if name == "arms" else models[:1], *rest).arms
    source = next((one for one in parts if "clips_per_class" in one), {"dataset": ""})
    maker = next((one for one in parts if one.keys() >= _MAKER), None)
    known = {"builtin": source.get("clips_per_class"), "esc10": 40, "esc50": 40}
    if source["dataset"] not in known or maker is None:
        return
    whole, first = known[source["dataset"]], maker["test_fold"]
    n_train = 4 if own["validation"] == "none" else 3
    name = "counts" if maker["counts"] else "n_per_class"
    (made,) = generation.class_counts(maker[name], ["each"] * whole).values()
    for arm in arms:
        if missing := {*filter(None, arm.source.split("+"))} - {*own.get("sources", [])}:
            raise ValueError(f"{arm}: no table of synthetic clips is called {sorted(missing)[0]!r} here")
        n = arm.per_class or own["real_per_class"] or whole // 5 * n_train
        if n > -(-whole // 5) * n_train:
            raise ValueError(f"{arm} needs {n} real clips per class; of {whole}, {n_train}/5 train")
        if arm.source or arm.kind not in ("both", "mixed", "synthetic", "thinned"):
            continue
        need = int(arm.ratio * (n // n_train if arm.kind == "mixed" else n) + 0.5)
        if need > made:
            raise ValueError(f"{arm} needs {need} synthetic clips per class, {name} is {maker[name]}")
        if maker["checkpoint"] == "mini" and not {*own["test_folds"]} <= {first, first % 5 + 1}:
            raise ValueError(f"test_folds: the generator is trained on all but {first} and the next one")


# --- for the reader of a notebook ----------------------------------------------------------------


def settings(stem, more):
    """Complete ``more`` (a dict) of notebook `stem` by the defaults in ``notebooks/more.yaml``.

    They are the parameters that do not stand in its parameters cell, and come as a namespace. A name
    that is not known, or a value that does not fit, is a UsageError.

    >>> settings("01_dataset_mixing", {"n_captions": 2}).n_captions
    2
    """
    root = store.project_root()
    usual = _seldom_changed(root, stem)
    resolved = {stem: dict(usual)}
    _apply(more, resolved.copy(), resolved, "more")
    for name in more:
        _check_value(stem, name, resolved[stem][name], root)
    return SimpleNamespace(**resolved[stem])


def open_run(run_dir):
    """Open a run's folder from a notebook.

    Opened by hand, a notebook has the tables that are missing from the run ``starter``, which is made on
    first use; in a batch run a missing one is an error, see ``store.RunFolder``.
    """

    def starter(missing):
        print(
            f"{missing.args[0]}\nUntil then a small set serves, made in 90 s: runs/starter", flush=True
        )
        return store.RunFolder(run("starter", root=store.project_root()))

    return store.RunFolder(run_dir, None if "SOUNDSCAPES_HERE" in os.environ else starter)


def profile_table(root=None):
    """Tabulate the profiles: what each is for and what it takes."""
    rows = {name: _read_profile(name, root) for name in profiles(root)}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(ABOUT))
    return table.rename_axis("profile")


def _free_gb(folder):
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return psutil.disk_usage(str(there)).free / 1e9
