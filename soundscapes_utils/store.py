"""Files and tables: the one place that writes, keys, finds again and deals out what a run makes.

Everything here answers one of four questions. *Where?* :func:`project_path`, :class:`RunFolder`,
:func:`walk_files`. *Whole?* :func:`write_atomic`, :func:`write_table`: a file is there complete or not
at all. *Made already?* :func:`content_key`, :func:`cached_array`, :class:`Records`. *Mine?*
:func:`shard`.
"""

import contextlib
import hashlib
import importlib.machinery
import io
import json
import math
import os
import re
import sys
import uuid
import warnings
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import xxhash

# columns that stay text however much they look like numbers, dates or missing values
_TEXT = """clip_id path label source_id dataset split foreground background scene background_source
    prompt prompt_family negative_prompt backend checkpoint heard reason made_from arm model against
    predicted candidate reference metric embedding change name note licence quantity"""
TEXT_COLUMNS = frozenset(_TEXT.split())


class DataError(ValueError):
    """A file or table that cannot be used; the message names it and says what to do."""


class MissingStage(FileNotFoundError):
    """A table that an earlier notebook leaves is not there; the message names that notebook."""


# --- where ---------------------------------------------------------------------------------------


def project_root(start=None):
    """Find the project: the nearest folder upwards that holds ``notebooks/`` and ``pyproject.toml``.

    It is looked for from `start`, by default the working directory, then from this package, which may
    be installed alone, then from the working directory.
    """
    for begin in (start or Path.cwd(), __file__, Path.cwd()):
        for folder in Path(begin, "here").resolve().parents:
            if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
                return folder
    wanted = f"a folder with notebooks/ and pyproject.toml, upwards from {Path.cwd()}"
    raise FileNotFoundError(f"no copy of the project here ({wanted}): change into the clone first")


def project_path(path):
    """Find a path: a relative one in the working folder if it is there, else in the project, if any."""
    path = Path(path).expanduser()
    if not (path.is_absolute() or path.exists()):
        with contextlib.suppress(FileNotFoundError):  # the package is installed without the project
            return project_root() / path
    return Path.cwd() / path  # which is the path itself if it is absolute


def walk_files(root, suffixes=None):
    """List the files under a folder, sorted, links followed, without hidden ones."""
    found, seen = [], set()
    for folder, names, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:  # a link back to a folder that is being walked
            names.clear()
            continue
        seen.add(here)
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [Path(folder) / name for name in files if not name.startswith(".")]
    return sorted(path for path in found if suffixes is None or path.suffix.lower() in suffixes)


def load_class(name):
    """Import one's own class, ``module:Class``: of a file where one stands, or of what is installed.

    In a run one stands where the run was begun. A :class:`DataError` says what hinders it.
    """
    module, _, attribute = name.partition(":")
    here = _here()
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # what an import can raise is no short list
        remedy = f"give module:Class of a file in {here}, or of an installed package"
        raise DataError(f"{name}: cannot be imported ({error}); {remedy}") from error


def _here():
    """Where one stands, on the path of imports: at its end, so that nothing of ours is overridden."""
    here = os.environ.get("SOUNDSCAPES_HERE") or os.getcwd()
    sys.path += [here] * (here not in sys.path)
    return here


def class_files(name):
    """Digests of what one's own class, ``module:Class``, is made of; empty for any other name.

    That is the module's file, or all of its package, and what it imports from where one stands.
    """
    top, files = re.match(r"([^\W\d]\w*)[.\w]*:[^\W\d]", name), {}
    here = top and _here()
    if not (spec := top and importlib.machinery.PathFinder.find_spec(top[1])):
        return []
    place, waiting = next(iter(spec.submodule_search_locations or [spec.origin])), [top[1]]
    folder = Path(place).parent
    while waiting:
        module = folder / waiting.pop()
        for file in walk_files(module, [".py"]) or [module.with_suffix(".py")]:
            if file.is_file() and file not in files:
                files[file] = file_digest(file)
                imports = re.findall(r"^\s*(?:from|import) (.*)", file.read_text("utf-8"), re.MULTILINE)
                waiting += re.findall(r"\w+", " ".join(imports)) * (str(folder) == here)
    return sorted(files.values())


# --- whole ---------------------------------------------------------------------------------------


def filled(template, **content):
    """Fill in a template that lies in the package, and return the text.

    >>> filled("drawings.svg.j2", drawing="model").strip()[:4]
    '<svg'
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template(template).render(content)


def write_atomic(path, content, flush=True):
    """Write bytes, or text as UTF-8: the file is there complete or not at all.

    Without `flush` a loss of power may leave it damaged: for what is known by its :func:`file_stamp`.
    """
    # text, as this is done for every mix; the process and the chance keep two writers of one path from
    # sharing a half-written file
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    try:
        content = content.encode() if isinstance(content, str) else content
        os.makedirs(folder or ".", exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            if flush:  # a loss of power after the renaming must not leave an empty file
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, UnicodeError) as error:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise DataError(
            f"{path}: cannot be written ({error}); free some space or choose another folder"
        ) from error
    return Path(path)


def write_table(table, path):
    """Write a table as CSV; its index is not written."""
    return write_atomic(path, table.to_csv(index=False))


def read_table(path, sep=",", as_text=False):
    """Read a CSV table: names stay text, only the empty cell is missing.

    Columns of names (``TEXT_COLUMNS``, and every ``caption…``) are text whatever they hold: a clip
    "001", a label "None"; so are all with `as_text`. Of the other columns those that hold numbers only
    become numbers, and ``True``/``False`` become booleans. What is no table is a :class:`DataError`.
    """
    try:
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error
    text = [name for name in table if as_text or name in TEXT_COLUMNS or name.startswith("caption")]
    return table.assign(**{name: _typed(table[name]) for name in table if name not in text})


def _typed(column):
    full = (column != "").all()
    if full and column.isin(["True", "False"]).all():
        return column == "True"
    try:
        whole = full and column.str.fullmatch(r"[+-]?\d{1,18}").all()
        # through numpy, which parses exactly; pandas' own parser is off by a last digit at times
        return column.astype("int64") if whole else column.replace("", "nan").astype(float)
    except ValueError:
        return column


def _number(least, step=0.0):
    def fits(value):
        number = isinstance(value, int | float | np.number) and math.isfinite(value)
        return number and value >= least and not (step and value % step)

    return fits


def _text(pattern):
    return lambda value: isinstance(value, str) and re.search(pattern, value, re.DOTALL)


_TINY = float(np.finfo(float).tiny)
_RULES = {
    "text": (_text(r"\S"), "is empty or not text"),
    "a name": (_text(r"^(?!\.)[^/\\\0]{0,199}[^/\\\0\s]$"), "must be a plain name, without slashes"),
    "a path inside": (
        _text(r"^(?![/\\~]|\w:|(.*[/\\])?\.\.([/\\]|$))[^\0]+$"),
        "must be a relative path that stays inside its folder",
    ),
    "a number": (_number(-math.inf), "must be a finite number"),
    "not negative": (_number(0), "must be a number from 0 on"),
    "positive": (_number(_TINY), "must be a number above 0"),
    "whole": (_number(0, 1), "must be a whole number from 0 on"),
}


def check_rows(table, where, **columns):
    """Refuse a table whose values cannot be used: the one check at the door of what names files.

    `columns` says what each column must hold: "text", "a name", "a path inside", "a number", "not
    negative", "positive" or "whole". A :class:`DataError` names `where`, row (from 1) and column.

    >>> check_rows(pd.DataFrame({"id": ["a", "../b"]}), "plan", id="a name")
    Traceback (most recent call last):
    soundscapes_utils.store.DataError: plan, row 2: id '../b' must be a plain name, without slashes
    """
    for name, kind in columns.items():
        if name not in table:
            raise DataError(f"{where}: has no column {name}; there are {', '.join(map(str, table))}")
        fits, wanted = _RULES[kind]
        for row, value in enumerate(table[name].tolist(), 1):
            if not fits(value):
                raise DataError(f"{where}, row {row}: {name} {value!r} {wanted}")


def check_value(name, value, place, error=DataError, listed=None):
    """Refuse a value that ``parameters.csv`` rules out for a parameter, by the `error` asked for.

    `listed` gives the choices of a word such as ``mixing.ENGINES``; without it such words allow all.
    """
    rules = read_table(Path(__file__).with_name("parameters.csv"), as_text=True).set_index("parameter")
    if name not in rules.index:
        return
    least, most, words = rules.loc[name]
    listed = listed or (lambda word: [word if word.islower() else "*"])
    choices = [choice for word in words.split() for choice in listed(word)]
    for item in value if isinstance(value, list | tuple) else [value]:
        if choices and not any(fnmatchcase(str(item), choice) for choice in choices):
            raise error(f"{place} takes {', '.join(choices)}; not {item!r}")
        if not choices and not float(least) <= item <= float(most or "inf"):
            bounds = f"from {least} to {most}" if most else f"from {least} on"
            raise error(f"{place} takes numbers {bounds}, not {item!r}")


# --- made already --------------------------------------------------------------------------------


def content_key(*parts, length=16):
    """Name a thing by what it is made from: a digest of values, bytes and nested lists or dicts."""
    digest = hashlib.sha256()
    for part in parts:
        if not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, default=str).encode()
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:length]


def file_digest(path):
    """Digest of a file's content, in hex: XXH3 of 128 bits, which guards against chance, not malice."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def known_digest(path, known):
    """Digest of a file's content, read once: it is noted in :class:`Records` by place, size and time."""
    info = os.stat(path)
    stamp = f"{info.st_size} {info.st_mtime_ns} {os.path.abspath(path)}"
    if stamp not in known.entries:
        known.add(stamp, {"digest": file_digest(path)})
    return known.entries[stamp]["digest"]


def file_stamp(path, content=None):
    """Size, time and digest of a file: what :func:`is_unchanged` knows it by.

    `content`, where it is at hand, spares the reading.
    """
    info = os.stat(path)
    digest = file_digest(path) if content is None else xxhash.xxh3_128_hexdigest(content)
    return [info.st_size, info.st_mtime_ns, digest]


def is_unchanged(path, stamp):
    """Whether a file is there with the content of its stamp; a copy of it is, whatever its time."""
    try:
        info = os.stat(path)
        size, time, digest = stamp
        # the content decides; equal time spares the reading
        return info.st_size == size and (info.st_mtime_ns == time or file_digest(path) == digest)
    except (OSError, TypeError, ValueError):
        return False


def read_array(path):
    """Read an array kept as ``.npy``; None where there is none, or (with a warning) a damaged one."""
    try:
        content = Path(path).read_bytes()
        begin = 10 + int.from_bytes(content[8:10], "little")
        shape, by_column, dtype = _npy_header(content[:begin])
        array = np.frombuffer(content, dtype, offset=begin)
        return array.reshape(shape, order="F" if by_column else "C").copy()
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        warnings.warn(f"{path}: damaged ({error}); made again", stacklevel=3)


def cached_array(path, compute):
    """Read an array kept as ``.npy``, or compute and keep it; a damaged file is made again."""
    array = read_array(path)
    if array is None:
        array, buffer = compute(), io.BytesIO()
        np.save(buffer, array)
        write_atomic(path, buffer.getvalue())
    return array


@lru_cache  # arrays of one shape have it in common, and parsing it takes longer than all the rest
def _npy_header(head):
    file = io.BytesIO(head)
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


class Records:
    """What is made already: one JSON line per thing, one file per process, torn lines ignored.

    ``entries`` maps each key to its entry, of all processes up to now; of one key the one written last.
    They lie in ``folder/.records``; `name` tells the records of one folder apart.
    """

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder) / ".records", name
        self._file, self.entries = None, _Entries()
        files = [(path.stat().st_mtime_ns, path) for path in self.folder.glob(f"{name}-*.jsonl")]
        for _, path in sorted(files):
            with path.open("rb") as file:
                for line in file:
                    with contextlib.suppress(ValueError, TypeError):
                        key, entry = json.loads(line)
                        # a line without an end was cut off by a kill
                        if line.endswith(b"\n") and isinstance(entry, dict):
                            self.entries[key] = line

    def add(self, key, entry):
        """Note a thing as made: the system has it when this returns, even if the process is killed."""
        line = json.dumps([key, entry], allow_nan=False).encode() + b"\n"
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                own = f"{self.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = (self.folder / own).open("ab", buffering=0)
            self._file.write(line)
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written ({error}); free some space and call again to go on"
            ) from error
        self.entries[key] = line

    def __getstate__(self):
        # another process writes a file of its own, and has no use for what is made already
        return {**self.__dict__, "_file": None, "entries": _Entries()}


class _Entries(UserDict):
    # lines as they are in the files, a quarter of what the entries would take
    def __getitem__(self, key):
        return json.loads(self.data[key])[1]


# --- mine ----------------------------------------------------------------------------------------


def shard(rows, text):
    """Take one machine's share of a list or table: of ``"i/n"`` every n-th row from the i-th."""
    if not text:
        return rows
    number, _, total = str(text).partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise DataError(f"shard {text!r}: give 'i/n' with i from 1 to n, such as '1/4'")
    part = slice(int(number) - 1, None, int(total))
    return rows.iloc[part] if isinstance(rows, pd.DataFrame) else rows[part]


# --- the folder of a run -------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its tables, figures and sounds.

    Relative paths are taken from the project's root, so ``"runs/quick"`` is the same folder from
    ``notebooks/``, from the root and in batch. A table that is missing is taken from the folder that the
    function `otherwise` gives, where there is one.
    """

    path: Path
    otherwise: Callable | None = None

    def __post_init__(self):
        object.__setattr__(self, "path", project_path(self.path))
        for folder in (self.tables, self.figures, self.audio):
            folder.mkdir(parents=True, exist_ok=True)
        # bars in plain text are what a stored notebook should have; tqdm warns that widgets are absent
        warnings.filterwarnings("ignore", message="IProgress not found")

    tables = property(lambda self: self.path / "tables", doc="Path of ``tables/``.")
    figures = property(lambda self: self.path / "figures", doc="Path of ``figures/``.")
    audio = property(lambda self: self.path / "audio", doc="Path of ``audio/``.")

    def save_table(self, table, name):
        """Write a table as ``tables/<name>.csv``; paths inside the project are kept relative to it."""
        if "path" in table:
            root = f"{project_root()}{os.sep}"
            table = table.assign(path=[str(path).removeprefix(root) for path in table["path"]])
        write_table(table, self.tables / f"{name}.csv")

    def load_table(self, name, made_by):
        """Read ``tables/<name>.csv``, left by `made_by`; its paths come back absolute."""
        path = self.tables / f"{name}.csv"
        if not path.is_file():
            missing = MissingStage(
                f"{self.path.name} has no table {name!r} yet: run notebook {made_by} first, with "
                f"the same run_dir (looked for {path})"
            )
            if self.otherwise:
                return self.otherwise(missing).load_table(name, made_by)
            raise missing
        table = read_table(path)
        if "path" in table:
            table["path"] = [str(project_path(path)) for path in table["path"]]
        return table

    def save_figure(self, figure, name, caption=""):
        """Write a figure as ``figures/<name>.png``, and give the picture for the notebook to show.

        Begin the name with the notebook's number. The caption, by default the figure's own title, says
        what it shows: for the report, and as the picture's alt text. It is kept inside the PNG.
        """
        from IPython.display import Image
        from matplotlib import pyplot as plt

        titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        caption = caption or next(filter(None, titles), name)
        buffer, described = io.BytesIO(), {"Description": caption}
        figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata=described, format="png")
        plt.close(figure)  # or the notebook would show it a second time
        write_atomic(self.figures / f"{name}.png", buffer.getvalue())
        return Image(buffer.getvalue(), alt=caption)
