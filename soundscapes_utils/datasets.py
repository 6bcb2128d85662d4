"""Recordings as one table of clips, whatever data set they come from.

Every loader returns the columns of :data:`CLIP_COLUMNS`, one row per recording, and checks the folder
first: a half-copied one, or a table that contradicts itself, is one error that names what is wrong,
never a shorter table. ``datasets.csv`` says what the sets are and on which terms, ``archives.csv``
where they are fetched from.
"""

import hashlib
import lzma
import re
import shutil
import stat
import sys
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from soundscapes_utils import audio, procedural, store

CLIP_COLUMNS = [
    "clip_id", "path", "label", "fold", "source_id", "dataset", "duration_s", "sample_rate",
]  # fmt: skip
N_FOLDS = 5
DATASETS = ("builtin", "esc10", "esc50", "urbansound8k", "own")
# Even, long sounds of ESC-50 that a foreground can be laid over where no scene recordings are.
AMBIENT_CLASSES = ("rain", "sea_waves", "crackling_fire", "helicopter")
_REMEDY = "add recordings, or say in a CSV with a column split (train, val, test) what each is for"
SOURCES = store.read_table(Path(__file__).with_name("datasets.csv")).set_index("dataset")
ARCHIVES = store.read_table(Path(__file__).with_name("archives.csv"))
# RuntimeError: an encrypted zip, a method that Python does not know
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, RuntimeError)
DCASE2024_TASK7_NETWORKS = ("panns-wavegram-logmel", "vggish", "clap-2023")


class DatasetError(store.DataError):
    """A data folder, table or archive that cannot be used; the message says how to mend it."""


# --- loaders -------------------------------------------------------------------------------------


def load_esc50(root, esc10=False):
    """Load ESC-50 (Piczak, 2015), or a folder laid out like it (``meta/esc50.csv``, ``audio/``).

    Files may end as :data:`audio.SUFFIXES` whatever ending the table gives; `esc10` keeps the ten
    classes of ESC-10. ``fold`` is 1 to 5, ``source_id`` the Freesound recording.
    """
    columns = ["filename", "fold", "target", "category", "esc10", "src_file"]
    name = "esc10" if esc10 else "esc50"
    table, where = _read_table(root, "meta/esc50.csv", columns, name)
    _check_rows(table, where, "filename", "target", "category")
    # ESC-50 spells fold and target out in the name: 1-100032-A-0.wav
    table["fold"], table["target"] = (_whole(table, where, name) for name in ("fold", "target"))
    names = table["filename"].str.extract(r"^(\d+)-.+-[A-Z]+-(\d+)\.").astype(float)
    wrong = names[0].notna() & (names[0].ne(table["fold"]) | names[1].ne(table["target"]))
    if wrong.any():
        fault = f"{wrong.sum()} rows contradict the fold or target in their file's name"
        first = _first(table["filename"][wrong])
        raise DatasetError(f"{where}: {fault} ({first}); restore the published table")
    if esc10:
        table = table[table["esc10"].str.lower() == "true"]
        if table.empty:
            raise DatasetError(f"{where}: no row has esc10 = True; choose dataset esc50 instead")
    paths = _find_files(root, "audio/" + table["filename"], where, _hint(name))
    return _clips(paths, table["category"], table["fold"], table["src_file"], name)


def load_urbansound8k(root):
    """Load UrbanSound8K (``metadata/UrbanSound8K.csv``, ``audio/fold1`` to ``fold10``).

    As :func:`load_esc50`; ``fold`` 1 to 10 (Salamon, Jacoby and Bello, ACM Multimedia 2014).
    """
    columns = ["slice_file_name", "fsID", "fold", "classID", "class"]
    table, where = _read_table(root, "metadata/UrbanSound8K.csv", columns, "urbansound8k")
    _check_rows(table, where, "slice_file_name", "classID", "class")
    table["fold"] = _whole(table, where, "fold")
    names = "audio/fold" + table["fold"].astype(str) + "/" + table["slice_file_name"]
    paths = _find_files(root, names, where, _hint("urbansound8k"))
    return _clips(paths, table["class"], table["fold"], table["fsID"], "urbansound8k")


def load_tau(root):
    """Load TAU Urban Acoustic Scenes 2020 Mobile (``meta.csv``, ``audio/``).

    ``label`` is the scene, ``source_id`` city and location (Heittola, Mesaros and Virtanen, DCASE
    Workshop 2020). The set has no five folds: the ten cities are dealt out to five folds in turn, so
    that a test city is never trained on.
    """
    columns = ["filename", "scene_label", "identifier"]
    table, where = _read_table(root, "meta.csv", columns, "tau", sep="\t")
    _check_rows(table, where, "filename")
    city = table["identifier"].str.split("-").str[0]
    table["fold"] = city.rank(method="dense").astype(int).sub(1) % N_FOLDS + 1
    paths = _find_files(root, table["filename"], where, _hint("tau"))
    return _clips(paths, table["scene_label"], table["fold"], table["identifier"], "tau")


def load_folder(root, folds=N_FOLDS):
    """Load recordings of one's own: one subfolder a class, or a table beside the sounds.

    - Folders: all below a subfolder, in any format of :data:`audio.SUFFIXES`, is of that class. Files in
      `root` itself count where no subfolder has any: one class, named as `root`.
    - A table: `root` is a CSV, or holds one, with columns ``path`` (or ``filename``; from the table's
      folder, or absolute) and ``label`` (or ``category``), and ``source_id, fold, split`` if any.

    ``source_id`` is what a name has before a counter ("-1", "_0002", " (3)"), or all if no more than
    the class would be left; in a table that has folds or splits, every file is a source.

    ``fold``, 1 to `folds`, follows from the source's name alone: no clip moves when others come.
    Numbered sources are dealt in turn, so evenly; others by a digest, evenly only if there are many
    (four sources may share three folds). A ``split`` becomes the folds from which :func:`assign_splits`
    gives it back for test fold `folds`: test the last, val the first, train those between; eval is test,
    or val beside a test.

    Files that cannot be read are set aside with a warning; nothing to load is a DatasetError.

    Examples
    --------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("dog/a_1.wav", "dog/a_2.wav", "cat/far/b (3).wav"):
    ...     _ = audio.save_audio(root / name, np.ones(800) / 2, 8000)
    >>> load_folder(root)[["label", "source_id", "fold"]].to_numpy().tolist()
    [['cat', 'cat-far-b', 4], ['dog', 'dog-a', 3], ['dog', 'dog-a', 3]]
    """
    where, base, table = _own_sounds(Path(root).absolute())
    parts = list(map(_parts, table["path"], [base] * len(table), table["label"]))
    names = ["-".join(part) for part in parts]
    _check_rows(pd.DataFrame({"name": names}), where, "name")
    if "source_id" not in table:
        own = {"fold", "split"} & {*table}
        table["source_id"] = names if own else list(map(_recording, parts, table["label"]))
    splits = _splits(table["split"], where) if "split" in table else [""] * len(table)
    dealt = [_deal(*pair, folds) for pair in zip(table["source_id"], splits, strict=True)]
    dealt = _whole(table, where, "fold") if "fold" in table else dealt
    clips = _clips(table["path"], table["label"], dealt, table["source_id"], "own").assign(clip_id=names)
    if (bad := clips["duration_s"].isna()).any():
        path, problem = audit(clips[bad].head(1))[1].loc[0, ["path", "problem"]]
        problem = problem.partition(";")[0]  # the rest speaks of published sets
        aside = f"{bad.sum()} of {len(bad)} files cannot be read and are set aside"
        warnings.warn(f"{where}: {aside}; the first, {path}: {problem}", stacklevel=2)
    return clips[~bad].reset_index(drop=True)


def _own_sounds(root):
    """What lists sounds of one's own, the folder where paths and names begin, and paths and labels."""
    if not root.exists():
        raise DatasetError(f"{root}: no such folder of sounds, nor table; check its spelling")
    tables = {}
    for path in [root] if root.is_file() else sorted(root.glob("[!.]*.csv")):
        table = store.read_table(path, as_text=True)
        # without any entry they say nothing: generated clips have no fold
        table = table.drop(columns=[c for c in {"fold", "split"} & {*table} if table[c].eq("").all()])
        names = {"filename": "path", "category": "label"}.items()
        table = table.rename(columns={old: new for old, new in names if new not in table})
        if {"path", "label"} <= {*table}:
            tables[path] = table
    if len(tables) > 1 or (root.is_file() and not tables):
        raise DatasetError(f"{root}: {len(tables)} tables with path and label; name the one to use")
    for where, table in tables.items():
        texts = dict.fromkeys({"path", "source_id"} & {*table}, "text")
        store.check_rows(table, where, **texts, label="a name")
        outside = {n: Path(n) for n in table["path"] if Path(n).is_absolute() and Path(n).is_file()}
        hint = "correct the paths, which begin at the table's folder, or leave these rows out"
        paths = _find_files(where.parent, table["path"], where, hint, "", outside)
        return where, where.parent, table.assign(path=paths, label=table["label"].map(_spelling))
    found = store.walk_files(root, audio.SUFFIXES)
    if not found:
        ways = "give a folder with one subfolder per class, or a CSV with columns path and label"
        raise DatasetError(f"{root}: no recordings ({' '.join(audio.SUFFIXES)}); {ways}")
    inner = [path for path in found if path.parent != root]
    base = root if inner else root.parent
    table = pd.DataFrame({"path": inner or found})
    return root, base, table.assign(label=[_parts(path, base)[0] for path in table["path"]])


def _parts(path, base, label=""):
    inside = path.relative_to(base) if path.is_relative_to(base) else Path(label, path.name)
    return _spelling(inside.with_suffix("")).split("/")


def _recording(parts, label):
    """Name a file without its counters: first those of a copy, "x (2)", then the clip's own."""
    # 48213 is a name and no counter, but 0001 is one
    for counter in (r"\s*[([#]\d+[)\]]?$", r"( -)? copy( \d+)?$", r"[-_. ](\d{1,3}|0\d*)$"):
        shorter = re.sub(counter, "", parts[-1], flags=re.IGNORECASE)
        # dog_01 and dog_02 in the folder dog are numbered, not cut from one recording
        if re.sub(r"[\W_]", "", shorter).lower() not in ("", re.sub(r"[\W_]", "", label).lower()):
            parts = [*parts[:-1], shorter]
    return "-".join(parts)


def _deal(source, split, folds):
    """Fold of a source by its name alone, from 1; those that differ in a last number come in turn."""
    start, number = re.fullmatch(r"(.*?)(\d{0,9})", source, re.DOTALL).groups()
    turn = int(store.content_key(start), 16) + int(number or 0)
    dealt = turn % (folds - 2) + 2 if split else turn % folds + 1
    return {"test": folds, "val": 1}.get(split, dealt)


def _splits(words, where):
    known = words.str.strip().str.lower().str.extract("^(train|val|test|eval)", expand=False)
    if len(wrong := words[known.isna()]):
        raise DatasetError(f"{where}: split {wrong.iloc[0]!r} is not train, val or test; correct it")
    return known.replace("eval", "val" if "test" in set(known) else "test")


def load_dcase2024_task7(root, networks=DCASE2024_TASK7_NETWORKS):
    """Load the development set of DCASE 2024 Task 7 (Lagrange et al., arXiv 2501.08587).

    Its audio was never published: what there is are the captions (``clip_id, file, caption``) and
    what three networks made of the recordings, returned as a dict of float32 arrays of shape (clips,
    frames, dimensions): ``panns-wavegram-logmel`` (60, 1, 2048), ``vggish`` (60, 4, 128) and
    ``clap-2023`` (60, 4, 1024).
    """
    root = Path(root)
    table, where = _read_table(root, "captions.csv", ["file", "caption"], "dcase2024_task7")
    _check_rows(table, where, "file")
    table.insert(0, "clip_id", [Path(file).stem for file in table["file"]])
    names = [f"{clip}.npy" for clip in table["clip_id"]]
    embeddings = {
        n: _read_embeddings([root / "embeddings" / n / name for name in names]) for n in networks
    }
    return table[["clip_id", "file", "caption"]], embeddings


def _read_embeddings(paths):
    arrays = []
    for path in paths:
        try:
            array = np.load(path, allow_pickle=False)
            shape = arrays[0].shape if arrays else "(frames, dimensions)"
            if array.ndim != 2 or array.dtype.kind != "f" or (arrays and array.shape != shape):
                raise ValueError(f"{array.dtype} of shape {array.shape}, expected floats of {shape}")
            if not np.isfinite(array).all():
                raise ValueError("not all of its numbers are finite")
        except (ValueError, OSError, EOFError) as error:
            hint = _hint("dcase2024_task7")
            raise DatasetError(f"{path}: cannot be used ({error}); {hint}") from error
        arrays.append(array.astype(np.float32))
    return np.stack(arrays)


def load_builtin(data_dir="data", clips_per_class=40, seed=0):
    """Load the built-in events (ten classes, five folds), made in ``data_dir/builtin`` on first use."""
    root = Path(data_dir) / "builtin" / f"events-{clips_per_class}-seed{seed}"
    root = procedural.write_events(root, clips_per_class, seed)
    return load_esc50(root).assign(dataset="builtin")


# --- the sounds of a study -----------------------------------------------------------------------


def load_clips(
    dataset, *, esc50_root="", urbansound8k_root="", sounds_root="", data_dir="data",
    clips_per_class=40, seed=0,
):  # fmt: skip
    """Load the foreground clips of a data set by its name, one of :data:`DATASETS`.

    Where a root is not given, it is ``ESC-50`` (for "esc10" or ``ESC-10``), ``UrbanSound8K`` or ``own``
    in `data_dir`. "own" (:func:`load_folder`) needs two classes or more with three sources each;
    `clips_per_class` and `seed` are those of :func:`load_builtin`.
    """
    data_dir = Path(data_dir)
    if dataset == "builtin":
        return load_builtin(data_dir, clips_per_class, seed)
    if dataset == "urbansound8k":
        return load_urbansound8k(urbansound8k_root or data_dir / "UrbanSound8K")
    if dataset == "own":
        root = Path(sounds_root or data_dir / "own")
        if not (sounds_root or root.exists()):
            raise DatasetError(f"{root}: no such folder; name that of your sounds by -p sounds_root")
        return _classes(load_folder(root), root)
    if dataset in ("esc10", "esc50"):
        root = data_dir / "ESC-50"
        root = data_dir / "ESC-10" if dataset == "esc10" and not root.exists() else root
        return load_esc50(esc50_root or root, esc10=dataset == "esc10")
    raise DatasetError(f"unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}")


def _classes(clips, where):
    sources = clips.groupby("label")["source_id"].nunique()
    if few := [f"{label}: {n}" for label, n in sources.items() if n < 3 or len(sources) < 2]:
        there = f"{where}: classes: {len(sources)}, recordings of {_first(few)}"
        needed = (
            "two classes, one subfolder each, of three recordings or more: add some, or leave one out"
        )
        told = (
            "Files that differ in a counter are one recording, unless a CSV says otherwise (source_id)"
        )
        raise DatasetError(f"{there}; a study needs {needed}. {told}")
    return clips


def load_scenes(
    dataset, clips, *, tau_root="", scenes_root="", ambient_classes=(), data_dir="data",
    scenes_per_class=20, seed=0,
):  # fmt: skip
    """Choose what the events of a data set are laid over; return foregrounds and backgrounds.

    Recordings in `scenes_root` (see :func:`load_folder`), else TAU's in `tau_root`, else the clips of
    `ambient_classes` (by default, of ESC-50, :data:`AMBIENT_CLASSES`), which are then not foregrounds,
    else the built-in scenes, which is printed unless the events are built in, too.
    """
    if scenes_root or tau_root:
        return clips, load_folder(scenes_root) if scenes_root else load_tau(tau_root)
    named = list(ambient_classes) or [*AMBIENT_CLASSES] * (dataset in ("esc10", "esc50"))
    ambient = clips["label"].isin(named)
    absent = [name for name in ambient_classes if name not in set(clips["label"])]
    if absent or ambient.all():
        known = ", ".join(sorted(clips["label"].unique()))
        raise DatasetError(f"ambient_classes {_first(absent or named)}: name some of {known}, not all")
    if ambient.any():
        return clips[~ambient].reset_index(drop=True), clips[ambient].reset_index(drop=True)
    if dataset != "builtin":
        print("No scenes are given (scenes_root, tau_root, ambient_classes): the built-in ones serve.")
    root = Path(data_dir) / "builtin" / f"scenes-{scenes_per_class}-seed{seed}"
    procedural.write_scenes(root, scenes_per_class, seed)
    return clips, load_tau(root).assign(dataset="builtin-scenes")


def check_own(given):
    """Refuse sounds of one's own that a run's parameters (a dict) cannot work with: a DatasetError.

    Each test fold must leave every class something to train and to test; scenes need three folds.
    """
    data, root = store.project_path(given["data_dir"]), given["sounds_root"]
    clips, serve = load_clips("own", sounds_root=root, data_dir=data), []
    named = {name: given[name] for name in ("scenes_root", "ambient_classes") if given[name]}
    scenes = load_scenes("own", clips, **named)[1] if named else clips
    where = root or data / "own"
    for place, table in ((where, clips), (given["scenes_root"] or given["ambient_classes"], scenes)):
        if table["fold"].nunique() < 3:
            raise DatasetError(f"{place}: all recordings fall into fewer than three folds; {_REMEDY}")
    for fold in sorted(clips["fold"].unique().tolist()):
        n = clips["label"].groupby(assign_splits(clips, fold)).nunique()
        serve += [fold] if n["train"] == n["test"] == clips["label"].nunique() else []
    if lost := {given.get("test_fold", N_FOLDS), *given.get("test_folds", ())}.difference(serve):
        other = f"test on another (-p test_fold, -p test_folds; of use: {serve})"
        lacks = f"test fold {min(lost)} leaves a class nothing to train or to test"
        raise DatasetError(f"{where}: {lacks}; {_REMEDY}, or {other}")


def assign_splits(clips, test_fold):
    """Say of each clip whether it trains, validates or tests: "train", "val" or "test".

    `test_fold` tests, the next fold (the first after the last) validates, the others train. A
    ``source_id`` that would be in two splits is an error.

    >>> clips = pd.DataFrame({"fold": [1, 2, 3, 4, 5], "source_id": list("abcde")})
    >>> assign_splits(clips, test_fold=5).tolist()
    ['val', 'train', 'train', 'train', 'test']
    """
    folds = sorted(int(fold) for fold in clips["fold"].unique())
    if test_fold not in folds or len(folds) < 3:
        needed = "need at least three folds, this among them"
        raise DatasetError(f"test_fold {test_fold} with folds {folds}: {needed}")
    names = {test_fold: "test", folds[(folds.index(test_fold) + 1) % len(folds)]: "val"}
    split = clips["fold"].map(lambda fold: names.get(fold, "train")).rename("split")
    spread = split.groupby(clips["source_id"]).nunique()
    if len(torn := spread.index[spread > 1]):
        fault = f"{len(torn)} recordings are in more than one split (source_id {_first(torn)})"
        raise DatasetError(f"{fault}: give all clips of one recording the same fold")
    return split


def format_heard(heard):
    """Write the folds that a model was trained on as the column ``heard`` of a table holds them."""
    parts = [f"{name}:{','.join(map(str, sorted(map(int, heard[name]))))}" for name in sorted(heard)]
    return ";".join(parts)


def audit(clips):
    """Read every file whole; return the usable rows and a table ``clip_id, path, problem``.

    A problem is a file that is unreadable, cut short, empty, silent or not finite.
    """
    faults = [audio.find_fault(path).removeprefix(f"{path}: ") for path in clips["path"]]
    named = clips[["clip_id", "path"]].assign(problem=faults)
    bad = named["problem"] != ""
    return clips[~bad].reset_index(drop=True), named[bad].reset_index(drop=True)


# --- checks of the loaders -----------------------------------------------------------------------


def _hint(dataset):
    return (
        f"copy the folder whole ({SOURCES['url'][dataset]}), cut its table to the files that you have, "
        f"or fetch it with datasets.download_dataset({dataset!r})"
    )


def _first(names):
    names = [str(name) for name in names]
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _read_table(root, name, columns, dataset, sep=","):
    """Read a table of a data set, all of it as text."""
    root, where, hint = Path(root), Path(root) / name, _hint(dataset)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; {hint}")
    if not where.is_file():
        raise DatasetError(f"{root}: has no {name}; {hint}")
    try:
        table = store.read_table(where, sep, as_text=True)
    except store.DataError as error:
        raise DatasetError(f"{error}; {hint}") from error
    if lacking := [column for column in columns if column not in table]:
        raise DatasetError(f"{where}: columns {', '.join(lacking)} are missing; {hint}")
    holes = (table[columns].isna() | table[columns].eq("")).any(axis=1)
    if holes.any() or table.empty:
        raise DatasetError(f"{where}: {holes.sum()} of {len(table)} rows are incomplete; {hint}")
    return table, where


def _whole(table, where, column):
    numbers = pd.to_numeric(table[column], errors="coerce")
    store.check_rows(pd.DataFrame({column: numbers.fillna(table[column])}), where, **{column: "whole"})
    return numbers.astype(int)


def _check_rows(table, where, name, number=None, label=None):
    if len(twice := table[name][table[name].duplicated()]):
        raise DatasetError(f"{where}: {len(twice)} files are listed twice ({_first(twice)}); keep one")
    for one, many in ((number, label), (label, number)) if number else ():
        counts = table.groupby(one)[many].nunique()
        if len(several := counts.index[counts > 1]):
            fault = f"{one} {_first(several)} goes with more than one {many}"
            raise DatasetError(f"{where}: {fault}; correct those rows")


def _find_files(root, names, where, hint, below="audio", outside=()):
    inside = ["-" if name in outside else name for name in names]
    store.check_rows(pd.DataFrame({"name": inside}), where, name="a path inside")
    # one walk instead of one look-up per file, which network disks answer slowly
    files = store.walk_files(Path(root) / below, audio.SUFFIXES)
    present = {_spelling(path.relative_to(root)): path for path in files}
    present |= {_spelling(name): path for name, path in dict(outside).items()}
    by_stem = {_spelling(path.relative_to(root).with_suffix("")): path for path in files}
    wanted = [PurePosixPath(_spelling(name)) for name in names]
    paths = [present.get(str(p)) or by_stem.get(str(p.with_suffix(""))) for p in wanted]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        lacking = f"{len(missing)} of the {len(paths)} files named in {where} are missing"
        raise DatasetError(f"{lacking} (first: {_first(missing)}); {hint}")
    return paths


def _spelling(name):
    """One spelling of a file's name: accents composed (a Mac takes them apart), slashes forward."""
    return unicodedata.normalize("NFC", str(name)).replace("\\", "/")


def _clips(paths, labels, folds, sources, dataset):
    names = [_spelling(path.stem) for path in paths]
    columns = names, map(str, paths), labels, folds, map(str, sources)
    table = pd.DataFrame(dict(zip(CLIP_COLUMNS, map(list, columns), strict=False)))
    info = pd.DataFrame(map(_probe, paths), columns=CLIP_COLUMNS[-2:])
    return table.assign(fold=table["fold"].astype(int), dataset=dataset).join(info)


def _probe(path):
    # an unreadable clip stays in the table for `audit` to report; one bad file stops no study
    try:
        frames, rate = audio.read_header(path)
    except audio.AudioError:
        return np.nan, 0
    return frames / rate, rate


# --- downloads -----------------------------------------------------------------------------------


def download_dataset(name, dest="data", archives=ARCHIVES):
    """Fetch a data set into its folder in `dest`, which appears complete or not at all; return it.

    `name` is one of "esc10", "esc50", "urbansound8k", "tau", "dcase2024_task7"; `archives` a table like
    ``archives.csv``. What will be fetched, the disk space that it needs, licence and citation are
    printed first, and at a terminal the question whether to go on. A finished folder is left as it is.
    An archive that was fetched whole is kept until all are unpacked, so that a broken attempt can
    simply be repeated.
    """
    if name not in SOURCES.index:
        raise DatasetError(f"unknown dataset {name!r}; choose one of {', '.join(SOURCES.index)}")
    load = {"esc10": load_esc50, "esc50": load_esc50, "urbansound8k": load_urbansound8k,
            "tau": load_tau, "dcase2024_task7": load_dcase2024_task7}[name]  # fmt: skip
    source, archives = SOURCES.loc[name], list(archives[archives["dataset"] == name].itertuples())
    dest, root = Path(dest), Path(dest) / source["folder"]
    if root.exists():
        load(root)
        return root
    _announce(source, dest, archives)
    paths = [_fetch(archive, dest) for archive in archives]
    folder = dest / f".unpacking-{root.name}"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    folder.mkdir()
    try:
        for path, archive in zip(paths, archives, strict=True):
            _unpack(path, folder, archive.unpacked)
        if name == "esc10":
            _lay_out_as_esc50(folder)
        tables = list(folder.rglob(source["table"]))
        if len(tables) != 1:
            raise DatasetError(f"{paths[0]}: {len(tables)} files {source['table']}, expected one")
        top = tables[0].parents[source["table"].count("/")]
        load(top)
        top.replace(root)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path, archive in zip(paths, archives, strict=True):
            # without a checksum, a bad archive cannot be told from a good one: fetched again
            if root.exists() or not archive.checksum:
                path.unlink()
    return root


def _announce(source, dest, archives):
    dest.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(dest).free
    size = sum(archive.size for archive in archives if not (dest / archive.name).exists())
    need = size + sum(archive.unpacked for archive in archives)
    sizes = f"{need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB are free"
    print(f"{source['title']}, {source['url']}\n  to fetch {size / 1e9:.2f} GB; in {dest} {sizes}")
    print(f"  licence: {source['licence']}\n  please cite: {source['citation']}")
    if need > free:
        raise DatasetError(f"{dest}: {sizes}; free some space or choose another folder")
    if sys.stdin.isatty() and input("Fetch it now? [Y/n] ").strip().lower().startswith("n"):
        raise DatasetError(f"{source['title']} is not fetched; give the folder of a copy instead")


def _lay_out_as_esc50(folder):
    """Give ESC-10's archive the layout of ESC-50; each of its files is known by its SHA-256."""
    table = store.read_table(Path(__file__).with_name("esc10.csv"), as_text=True)
    top = next(folder.glob("*/"), folder)
    (top / "audio").mkdir()
    for row in table.itertuples():
        path = top / row.path
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != row.sha256:
            raise DatasetError(f"{row.path} of ESC-10 is not what was published; fetch it again")
        path.replace(top / "audio" / row.filename)
    for path in set(table["path"].str.partition("/")[0]):
        shutil.rmtree(top / path)
    store.write_table(table.drop(columns=["path", "sha256"]), top / "meta" / "esc50.csv")


def _fetch(archive, dest):
    import pooch

    try:
        known, show = archive.checksum or None, sys.stderr.isatty()
        pooch.get_logger().setLevel("WARNING")  # what is fetched has been said
        return Path(pooch.retrieve(archive.url, known, archive.name, dest, progressbar=show))
    except (ValueError, OSError) as error:
        remedy = f"check the connection and free space and try again, or put the file into {dest}"
        raise DatasetError(f"{archive.url}: cannot be fetched ({error}); {remedy}") from error


def _unpack(path, folder, expected):
    # pooch's own Unzip and Untar trust the archive, and until Python 3.12 tar files could climb out
    try:
        if path.suffix == ".csv":
            shutil.copy(path, folder / path.name.rpartition("_")[2])
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder, list(_checked(archive.infolist(), path, expected)))
        else:
            with tarfile.open(path, tarinfo=_TarInfo) as archive:
                archive.extractall(folder, _checked(archive, path, expected), filter="data")
    except (*_DAMAGED, OSError) as error:
        raise DatasetError(f"{path}: cannot be unpacked ({error}); delete it and try again") from error


class _TarInfo(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf, encoding, errors):
        info = super().frombuf(buf, encoding, errors)
        # the name of a member may be given as the content of another: it is read into memory whole
        if not info.isreg() and info.size > 2**20:
            raise tarfile.ReadError(f"a name of {info.size} bytes")
        return info


def _checked(members, path, expected):
    total = 0
    for member in members:
        if isinstance(member, tarfile.TarInfo):
            name, size, plain = member.name, member.size, member.isreg() or member.isdir()
        else:
            kind = stat.S_IFMT(member.external_attr >> 16)
            name, size = member.filename, member.file_size
            plain = kind in (0, stat.S_IFREG, stat.S_IFDIR)
        total, fault = total + size, ""
        if not plain or re.search(r"^[/\\]|:|(^|[/\\])\.\.([/\\]|$)", name):
            fault = f"{name!r} is a link or device or would be written outside its folder"
        elif total > 2 * expected:
            gigabytes = f"{total / 1e9:.2f} GB or more where {expected / 1e9:.2f} GB were expected"
            fault = f"unpacks to {gigabytes}"
        if fault:
            remedy = "delete the archive and fetch it from its publisher"
            raise DatasetError(f"{path}: unsafe, {fault}; {remedy}")
        yield member
