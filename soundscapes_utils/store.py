"""Files and tables: the one place that writes, keys, finds again and deals out what a run makes.

Everything here answers one of four questions. *Where?* :func:`project_path`, :class:`RunFolder`,
:func:`walk_files`. *Whole?* :func:`write_atomic`, :func:`write_table`: a file is there complete or not
at all. *Made already?* :func:`content_key`, :func:`cached_array`, :class:`Records`. *Mine?*
:func:`shard`.
"""

import contextlib
import hashlib
import io
import json
import os
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

# columns that stay text however much they look like numbers, dates or missing values
TEXT_COLUMNS = frozenset(
    [
        "clip_id",
        "path",
        "label",
        "source_id",
        "dataset",
        "split",
        "foreground",
        "background",
        "scene",
        "background_source",
        "caption",
        "prompt",
        "prompt_family",
        "negative_prompt",
        "backend",
        "checkpoint",
        "heard",
        "reason",
        "made_from",
        "arm",
        "model",
        "against",
        "predicted",
        "candidate",
        "reference",
        "metric",
        "embedding",
        "change",
        "name",
        "note",
        "licence",
        "quantity",
    ]
)


class DataError(ValueError):
    """A file or table that cannot be used; the message names it and says what to do."""


class MissingStage(FileNotFoundError):
    """A table that an earlier notebook leaves is not there; the message names that notebook."""


# --- where ---------------------------------------------------------------------------------------


def project_root(start=None):
    """Find the project: the nearest folder upwards that holds ``notebooks/`` and ``pyproject.toml``.

    The search begins at `start`, by default the working directory, then at this package.
    """
    begin = Path(start or Path.cwd()).resolve()
    for folder in (begin, *begin.parents, Path(__file__).resolve().parents[1]):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError(
        f"{begin} is not inside a copy of the project (no folder with notebooks/ and "
        "pyproject.toml upwards from it): change into the clone first"
    )


def project_path(path):
    """Resolve a path: absolute ones stay, relative ones are taken from the project's root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else project_root() / path


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


# --- whole ---------------------------------------------------------------------------------------


def write_atomic(path, content):
    """Write bytes, or text as UTF-8: the file is there complete or not at all."""
    path = Path(path)
    # the process and the chance keep two writers of one path from sharing a half-written file
    part = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    content = content.encode() if isinstance(content, str) else content
    try:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise DataError(
            f"{path}: cannot be written ({error}); free some space or choose another folder"
        ) from error
    return path


def write_table(table, path):
    """Write a table as CSV, or as Parquet where the name ends so; its index is not written."""
    path = Path(path)
    if path.suffix == ".parquet":
        return write_atomic(path, table.to_parquet(index=False))
    return write_atomic(path, table.to_csv(index=False))


def read_table(path):
    """Read a CSV or Parquet table: names stay text, only the empty cell is missing.

    Columns of names (``TEXT_COLUMNS``, and every ``caption…``) are text whatever they hold: a clip
    "001", a label "None". Of the other columns those that hold numbers only become numbers, and
    ``True``/``False`` become booleans. A file that is not a table is a :class:`DataError`.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table ({error})") from error
    names = [n for n in table if n not in TEXT_COLUMNS and not n.startswith("caption")]
    return table.assign(**{name: _typed(table[name]) for name in names})


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
    """SHA-256 of a file's content, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_array(path, compute):
    """Read an array kept as ``.npy``, or compute and keep it; a damaged file is made again."""
    path = Path(path)
    if path.is_file():
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            warnings.warn(f"{path}: damaged ({error}); made again", stacklevel=2)
    array = compute()
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())
    return array


class Records:
    """What is made already: one JSON line per thing, one file per process, torn lines ignored.

    ``entries`` maps each key to its entry, of all processes up to now; of one key the one written last.
    They lie in ``folder/.records``; `name` tells the records of one folder apart.
    """

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder) / ".records", name
        self._file = None
        self.entries = self._read()

    def _read(self):
        files = [(path.stat().st_mtime_ns, path) for path in self.folder.glob(f"{self.name}-*.jsonl")]
        entries = {}
        for _, path in sorted(files):
            # a line without an end was cut off by a kill
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    with contextlib.suppress(ValueError):
                        key, entry = json.loads(line)
                        entries[key] = entry
        return entries

    def add(self, key, entry):
        """Note a thing as made: on the disk when this returns."""
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                own = f"{self.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
                self._file = (self.folder / own).open("a", encoding="utf-8", buffering=1)
            self._file.write(json.dumps([key, entry], allow_nan=False) + "\n")
        except OSError as error:
            raise DataError(
                f"{self.folder}: cannot be written ({error}); free some space and call again to go on"
            ) from error
        self.entries[key] = entry

    def __getstate__(self):
        # another process writes a file of its own, and has no use for what is made already
        return {**self.__dict__, "_file": None, "entries": {}}


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
    ``notebooks/``, from the root and in batch.
    """

    path: Path

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
        return write_table(table, self.tables / f"{name}.csv")

    def load_table(self, name, made_by):
        """Read ``tables/<name>.csv``, left by `made_by`; its paths come back absolute."""
        path = self.tables / f"{name}.csv"
        if not path.is_file():
            raise MissingStage(
                f"{self.path.name} has no table {name!r} yet: run notebook {made_by} first, with "
                f"the same run_dir (looked for {path})"
            )
        table = read_table(path)
        if "path" in table:
            table["path"] = [str(project_path(path)) for path in table["path"]]
        return table

    def save_figure(self, figure, name, caption=""):
        """Write a figure as ``figures/<name>.png``; begin the name with the notebook's number.

        The caption, by default the figure's own title, says what it shows: for the report, and for
        readers who cannot see it. It is kept inside the PNG.
        """
        titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
        described = {"Description": caption or next(filter(None, titles), name)}
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata=described, format="png")
        return write_atomic(self.figures / f"{name}.png", buffer.getvalue())
