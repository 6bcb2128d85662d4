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

    Raises
    ------
    DatasetError
        Folder, table or files missing, duplicate or contradicting rows.
    """
    return _load_esc_layout(root, "esc10" if esc10 else "esc50")


def _load_esc_layout(root, dataset):
    columns = ["filename", "fold", "target", "category", "esc10", "src_file"]
    table, where = _read_table(root, "meta/esc50.csv", columns, "esc50")
    _check_rows(table, where, "filename", "target", "category")
    # ESC-50 spells fold and target out in the name: 1-100032-A-0.wav
    table["fold"], table["target"] = (_whole(table, where, name) for name in ("fold", "target"))
    names = table["filename"].str.extract(r"^(\d+)-.+-[A-Z]+-(\d+)\.").astype(float)
    wrong = names[0].notna() & (names[0].ne(table["fold"]) | names[1].ne(table["target"]))
    if wrong.any():
        raise DatasetError(
            f"{where}: {wrong.sum()} rows contradict the fold or target in their file's name "
            f"({_first(table['filename'][wrong])}); restore the published table"
        )
    if dataset == "esc10":
        table = table[table["esc10"].str.lower() == "true"]
        if table.empty:
            raise DatasetError(f"{where}: no row has esc10 = True; choose dataset esc50 instead")
    paths = _find_files(root, "audio/" + table["filename"], where, "esc50")
    return _clips(paths, table["category"], table["fold"], table["src_file"], dataset)


def load_urbansound8k(root):
    """Load UrbanSound8K (``metadata/UrbanSound8K.csv``, ``audio/fold1`` to ``fold10``).

    As :func:`load_esc50`; ``fold`` 1 to 10 (Salamon, Jacoby and Bello, ACM Multimedia 2014).
    """
    columns = ["slice_file_name", "fsID", "fold", "classID", "class"]
    table, where = _read_table(root, "metadata/UrbanSound8K.csv", columns, "urbansound8k")
    _check_rows(table, where, "slice_file_name", "classID", "class")
    table["fold"] = _whole(table, where, "fold")
    names = "audio/fold" + table["fold"].astype(str) + "/" + table["slice_file_name"]
    paths = _find_files(root, names, where, "urbansound8k")
    return _clips(paths, table["class"], table["fold"], table["fsID"], "urbansound8k")


def load_tau(root):
    """Load TAU Urban Acoustic Scenes 2020 Mobile (``meta.csv``, ``audio/``).

    ``label`` is the scene, ``source_id`` city and location (Heittola, Mesaros and Virtanen, DCASE
    Workshop 2020). The set has no five folds: the ten cities are dealt out to five folds in turn, so
    that a test city is never trained on.
    """
    return _load_tau_layout(root, "tau")


def _load_tau_layout(root, dataset):
    columns = ["filename", "scene_label", "identifier"]
    table, where = _read_table(root, "meta.csv", columns, "tau", sep="\t")
    _check_rows(table, where, "filename")
    city = table["identifier"].str.split("-").str[0]
    table["fold"] = city.rank(method="dense").astype(int).sub(1) % N_FOLDS + 1
    paths = _find_files(root, table["filename"], where, "tau")
    return _clips(paths, table["scene_label"], table["fold"], table["identifier"], dataset)


def load_folder(root):
    """Load recordings of one's own: a folder with one subfolder per class.

    Every file that ends as :data:`audio.SUFFIXES` counts as a recording of its own (``source_id`` is
    class and file name); those of each class are dealt out to five folds in the order of a hash of
    their names. If several were cut from one recording, give them one ``source_id`` and one ``fold``.

    Examples
    --------
    >>> import tempfile
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("dog/a.wav", "dog/b.wav", "cat/a.wav"):
    ...     _ = audio.save_audio(root / name, np.ones(800) / 2, 8000)
    >>> load_folder(root)[["clip_id", "label", "fold"]].to_numpy().tolist()
    [['cat-a', 'cat', 1], ['dog-a', 'dog', 1], ['dog-b', 'dog', 2]]
    """
    root = Path(root)
    paths = [path for path in store.walk_files(root, audio.SUFFIXES) if path.parent != root]
    if not paths:
        raise DatasetError(
            f"{root}: no recordings; give a folder with one subfolder per class, with files that "
            f"end in {', '.join(audio.SUFFIXES)}"
        )
    parts = [path.relative_to(root).with_suffix("").parts for path in paths]
    labels, names = [part[0] for part in parts], ["-".join(part) for part in parts]
    table = pd.DataFrame({"label": labels, "name": names})
    _check_rows(table, root, "name")
    table["hash"] = [hashlib.sha256(name.encode()).hexdigest() for name in names]
    folds = table.sort_values("hash").groupby("label").cumcount().sort_index() % N_FOLDS + 1
    return _clips(paths, labels, folds, names, "own").assign(clip_id=names)


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
            raise DatasetError(
                f"{path}: cannot be used ({error}); {_hint('dcase2024_task7')}"
            ) from error
        arrays.append(array.astype(np.float32))
    return np.stack(arrays)


def load_builtin(data_dir="data", clips_per_class=40, seed=0):
    """Load the built-in events (ten classes, five folds), made in ``data_dir/builtin`` on first use."""
    root = Path(data_dir) / "builtin" / f"events-{clips_per_class}-seed{seed}"
    return _load_esc_layout(procedural.write_events(root, clips_per_class, seed), "builtin")


# --- the sounds of a study -----------------------------------------------------------------------


def load_clips(
    dataset, *, esc50_root="", urbansound8k_root="", own_root="", data_dir="data",
    clips_per_class=40, seed=0,
):  # fmt: skip
    """Load the foreground clips of a data set by its name, one of :data:`DATASETS`.

    Where a root is not given, it is ``ESC-50``, ``UrbanSound8K`` or ``own`` in `data_dir`. "own" is a
    folder with one subfolder per class (:func:`load_folder`); `clips_per_class` and `seed` are those
    of the built-in data set (:func:`load_builtin`).
    """
    data_dir = Path(data_dir)
    if dataset == "builtin":
        return load_builtin(data_dir, clips_per_class, seed)
    if dataset == "urbansound8k":
        return load_urbansound8k(urbansound8k_root or data_dir / "UrbanSound8K")
    if dataset == "own":
        return load_folder(own_root or data_dir / "own")
    if dataset in ("esc10", "esc50"):
        return load_esc50(esc50_root or data_dir / "ESC-50", esc10=dataset == "esc10")
    raise DatasetError(f"unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}")


def load_scenes(dataset, clips, *, tau_root="", data_dir="data", scenes_per_class=20, seed=0):
    """Choose what the events of a data set are laid over; return foregrounds and backgrounds.

    TAU scenes where `tau_root` is given; else the built-in scenes for the built-in events; else
    the ambient classes among the clips (:data:`AMBIENT_CLASSES`), which are then not foregrounds.
    """
    if tau_root:
        return clips, load_tau(tau_root)
    if dataset == "builtin":
        root = Path(data_dir) / "builtin" / f"scenes-{scenes_per_class}-seed{seed}"
        procedural.write_scenes(root, scenes_per_class, seed)
        return clips, _load_tau_layout(root, "builtin-scenes")
    ambient = clips["label"].isin(AMBIENT_CLASSES)
    if not ambient.any():
        raise DatasetError(
            f"{dataset} has none of the ambient classes {', '.join(AMBIENT_CLASSES)} to serve as "
            "scenes; give tau_root, the folder of TAU Urban Acoustic Scenes 2020 Mobile"
        )
    return clips[~ambient].reset_index(drop=True), clips[ambient].reset_index(drop=True)


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
        raise DatasetError(
            f"test_fold {test_fold} with folds {folds}: need at least three folds, this among them"
        )
    names = {test_fold: "test", folds[(folds.index(test_fold) + 1) % len(folds)]: "val"}
    split = clips["fold"].map(lambda fold: names.get(fold, "train")).rename("split")
    spread = split.groupby(clips["source_id"]).nunique()
    if (spread > 1).any():
        raise DatasetError(
            f"{(spread > 1).sum()} recordings are in more than one split (source_id "
            f"{_first(spread.index[spread > 1])}): give all clips of one recording the same fold"
        )
    return split


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
        if (counts > 1).any():
            raise DatasetError(
                f"{where}: {one} {_first(counts.index[counts > 1])} goes with more than one {many}; "
                "correct those rows"
            )


def _find_files(root, names, where, dataset):
    store.check_rows(pd.DataFrame({"name": names}), where, name="a path inside")
    # one walk instead of one look-up per file, which network disks answer slowly
    files = store.walk_files(Path(root) / "audio", audio.SUFFIXES)
    present = {_spelling(path.relative_to(root)): path for path in files}
    by_stem = {_spelling(path.relative_to(root).with_suffix("")): path for path in files}
    wanted = [PurePosixPath(_spelling(name)) for name in names]
    paths = [present.get(str(p)) or by_stem.get(str(p.with_suffix(""))) for p in wanted]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise DatasetError(
            f"{len(missing)} of the {len(paths)} files named in {where} are missing "
            f"(first: {_first(missing)}); {_hint(dataset)}"
        )
    return paths


def _spelling(name):
    """One spelling of a file's name: accents composed (a Mac takes them apart), slashes forward."""
    return unicodedata.normalize("NFC", str(name)).replace("\\", "/")


def _clips(paths, labels, folds, sources, dataset):
    columns = [
        [_spelling(path.stem) for path in paths],
        map(str, paths),
        labels,
        folds,
        map(str, sources),
    ]
    table = pd.DataFrame(dict(zip(CLIP_COLUMNS, map(list, columns), strict=False)))
    info = pd.DataFrame([_probe(path) for path in paths], columns=CLIP_COLUMNS[-2:])
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

    `name` is one of "esc50", "urbansound8k", "tau", "dcase2024_task7"; `archives` a table like
    ``archives.csv``. What will be fetched, the disk space that it needs, licence and citation are
    printed first. A finished folder is left as it is. An archive that was fetched whole is kept until
    all are unpacked, so that a broken attempt can simply be repeated.
    """
    if name not in SOURCES.index:
        raise DatasetError(f"unknown dataset {name!r}; choose one of {', '.join(SOURCES.index)}")
    load = {"esc50": load_esc50, "urbansound8k": load_urbansound8k, "tau": load_tau,
            "dcase2024_task7": load_dcase2024_task7}[name]  # fmt: skip
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
    print(
        f"{source['title']}, {source['url']}\n"
        f"  to fetch {size / 1e9:.2f} GB, disk needed {need / 1e9:.2f} GB, free in {dest} "
        f"{free / 1e9:.2f} GB\n"
        f"  licence: {source['licence']}\n"
        f"  please cite: {source['citation']}"
    )
    if need > free:
        raise DatasetError(
            f"{dest}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB are free; free some space or "
            "choose another folder"
        )


def _fetch(archive, dest):
    import pooch

    try:
        known, show = archive.checksum or None, sys.stderr.isatty()
        return Path(pooch.retrieve(archive.url, known, archive.name, dest, progressbar=show))
    except (ValueError, OSError) as error:
        raise DatasetError(
            f"{archive.url}: cannot be fetched ({error}); check the connection and the free space "
            f"and try again, or put the file into {dest} by hand"
        ) from error


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
        if not plain or re.search(r"^[/\\]|:|(^|[/\\])\.\.([/\\]|$)", name):
            raise DatasetError(
                f"{path}: unsafe, {name!r} is a link or device or would be written outside its "
                "folder; delete the archive and fetch it from its publisher"
            )
        total += size
        if total > 2 * expected:
            raise DatasetError(
                f"{path}: unsafe, unpacks to {total / 1e9:.2f} GB or more where "
                f"{expected / 1e9:.2f} GB were expected; delete the archive and fetch it from its "
                "publisher"
            )
        yield member
