"""Recordings as one table of clips, whatever data set they come from.

Every loader returns the columns of :data:`CLIP_COLUMNS`, one row a recording, and checks the
folder first: a half-copied one or a table that contradicts itself is one error that names what is
wrong, never a shorter table.
"""

import re
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import soundfile as sf

from soundscapes_utils import audio

CLIP_COLUMNS = [
    "clip_id",
    "path",
    "label",
    "fold",
    "source_id",
    "dataset",
    "duration_s",
    "sample_rate",
]
AUDIO_SUFFIXES = (".wav", ".ogg", ".flac")
N_FOLDS = 5
DATASETS = ("embedded", "esc10", "esc50", "urbansound8k")
# Even, long sounds of ESC-50 that a foreground can be laid over where no scene recordings are.
AMBIENT_CLASSES = ("rain", "sea_waves", "crackling_fire", "helicopter")

ESC50_COMMIT = "33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6"
ESC50_URL = f"https://github.com/karolpiczak/ESC-50/archive/{ESC50_COMMIT}.zip"
ESC50_SHA256 = "661183a6f53ef04f12c9bd618fed0ddc1713280d6c94a5a5431e844ba6f6a21f"

_ESC50_COLUMNS = ["filename", "fold", "target", "category", "esc10", "src_file"]
_URBANSOUND8K_COLUMNS = ["slice_file_name", "fsID", "fold", "classID", "class"]
_TAU_COLUMNS = ["filename", "scene_label", "identifier"]
_ESC50_NAME = re.compile(r"(\d+)-.+-[A-Z]+-(\d+)$")
_SHOWN = 3


class DatasetError(ValueError):
    """A data folder, table or archive that cannot be used; the message says how to mend it."""


# --- loaders ------------------------------------------------------------------------------------


def load_esc50(root, esc10=False):
    """Load ESC-50, or any folder laid out as it (``meta/esc50.csv``, ``audio/``).

    Parameters
    ----------
    root : str or Path
        Folder that holds ``meta`` and ``audio``. Files may be .wav, .ogg or .flac whatever ending
        the table gives.
    esc10 : bool
        Keep the ten classes of ESC-10 only.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; ``fold`` 1 to 5, ``source_id`` the Freesound recording.

    Raises
    ------
    DatasetError
        Folder or table missing, files missing, duplicate or contradicting rows.

    Notes
    -----
    Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia 2015.

    Examples
    --------
    >>> load_esc50("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: no/such/folder: no such folder; ...
    """
    return _load_esc_layout(root, "esc10" if esc10 else "esc50", esc10)


def load_urbansound8k(root):
    """Load UrbanSound8K (``metadata/UrbanSound8K.csv``, ``audio/fold1`` to ``fold10``).

    Parameters
    ----------
    root : str or Path
        Folder that holds ``metadata`` and ``audio``.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; ``fold`` 1 to 10, ``source_id`` the Freesound recording.

    Raises
    ------
    DatasetError
        Folder or table missing, files missing, duplicate or contradicting rows.

    Notes
    -----
    Salamon, Jacoby and Bello, "A Dataset and Taxonomy for Urban Sound Research", ACM MM 2014.

    Examples
    --------
    >>> load_urbansound8k("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: no/such/folder: no such folder; ...
    """
    root = Path(root)
    hint = "download UrbanSound8K.tar.gz from zenodo.org/records/1203745 and unpack it whole"
    table, where = _read_table(root, "metadata/UrbanSound8K.csv", _URBANSOUND8K_COLUMNS, hint)
    _check_rows(table, where, "slice_file_name", "classID", "class")
    names = "audio/fold" + table.fold.astype(str) + "/" + table.slice_file_name
    return _clips(root, where, names, table["class"], table.fold, table.fsID, "urbansound8k", hint)


def load_tau(root):
    """Load TAU Urban Acoustic Scenes 2020 Mobile, development set (``meta.csv``, ``audio/``).

    The set has no folds. They are made here: its ten cities are dealt out to five folds in turn, so
    that all recordings of a place, by all its devices, and of the whole city lie in one.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``meta.csv`` and ``audio``.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; ``label`` is the scene, ``source_id`` city and location.

    Raises
    ------
    DatasetError
        Folder or table missing, files missing, duplicate rows.

    Notes
    -----
    Heittola, Mesaros and Virtanen, DCASE Workshop 2020.

    Examples
    --------
    >>> load_tau("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: no/such/folder: no such folder; ...
    """
    return _load_tau_layout(root, "tau")


def load_embedded(data_dir="data", clips_per_class=40, seed=0):
    """Load the embedded events, made by rule on first use.

    Parameters
    ----------
    data_dir : str or Path
        They are kept in its folder ``embedded``.
    clips_per_class : int
        Clips of each of the ten classes, over five folds.
    seed : int
        Chooses the sounds.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; class names are those of ESC-10.

    Raises
    ------
    DatasetError
        The folder is there but damaged.

    Examples
    --------
    >>> import tempfile
    >>> load_embedded(tempfile.mkdtemp(), clips_per_class=1).label.nunique()
    10
    """
    from soundscapes_utils import procedural

    root = _embedded_root(data_dir, "events", clips_per_class, seed)
    procedural.write_events(root, clips_per_class, seed)
    return _load_esc_layout(root, "embedded", esc10=False)


def load_embedded_scenes(data_dir="data", scenes_per_class=20, seed=0):
    """Load the embedded scenes, made by rule on first use.

    Parameters
    ----------
    data_dir : str or Path
        They are kept in its folder ``embedded``.
    scenes_per_class : int
        Recordings of each of the ten scenes.
    seed : int
        Chooses the sounds.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; ``label`` is a scene name of TAU.

    Raises
    ------
    DatasetError
        The folder is there but damaged.

    Examples
    --------
    >>> import tempfile
    >>> load_embedded_scenes(tempfile.mkdtemp(), scenes_per_class=1).label.nunique()
    10
    """
    from soundscapes_utils import procedural

    root = _embedded_root(data_dir, "scenes", scenes_per_class, seed)
    procedural.write_scenes(root, scenes_per_class, seed)
    return _load_tau_layout(root, "embedded-scenes")


def load_clips(
    dataset, *, esc50_root="", urbansound8k_root="", data_dir="data", clips_per_class=40, seed=0
):
    """Load the foreground clips of a data set by its name.

    Parameters
    ----------
    dataset : {"embedded", "esc10", "esc50", "urbansound8k"}
        Which one.
    esc50_root, urbansound8k_root : str or Path
        Where ESC-50 and UrbanSound8K lie; by default ``ESC-50`` and ``UrbanSound8K`` in `data_dir`.
    data_dir : str or Path
        Folder of the project's data.
    clips_per_class, seed : int
        Of the embedded data set, see :func:`load_embedded`.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`.

    Raises
    ------
    DatasetError
        Unknown name, or what the loader finds.

    Examples
    --------
    >>> load_clips("esc5")
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: unknown dataset 'esc5'; choose one of embedded, \
esc10, esc50, urbansound8k
    """
    if dataset not in DATASETS:
        raise DatasetError(f"unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}")
    if dataset == "embedded":
        return load_embedded(data_dir, clips_per_class, seed)
    if dataset == "urbansound8k":
        return load_urbansound8k(urbansound8k_root or Path(data_dir) / "UrbanSound8K")
    return load_esc50(esc50_root or Path(data_dir) / "ESC-50", esc10=dataset == "esc10")


def load_scenes(dataset, clips, *, tau_root="", data_dir="data", scenes_per_class=20, seed=0):
    """Choose what the events of a data set are laid over.

    TAU scenes where `tau_root` is given; else the embedded scenes for the embedded events; else
    the ambient classes among the clips (:data:`AMBIENT_CLASSES`), which then are no foreground.

    Parameters
    ----------
    dataset : str
        The name given to :func:`load_clips`.
    clips : pandas.DataFrame
        What it returned.
    tau_root : str or Path
        Folder of TAU 2020 Mobile; empty if there is none.
    data_dir : str or Path
        Folder of the project's data.
    scenes_per_class, seed : int
        Of the embedded scenes, see :func:`load_embedded_scenes`.

    Returns
    -------
    foregrounds, backgrounds : pandas.DataFrame
        Two clip tables.

    Raises
    ------
    DatasetError
        No scenes are to be had.

    Examples
    --------
    >>> clips = pd.DataFrame({"label": ["dog", "rain"]})
    >>> [table.label.tolist() for table in load_scenes("esc10", clips)]
    [['dog'], ['rain']]
    """
    if tau_root:
        return clips, load_tau(tau_root)
    if dataset == "embedded":
        return clips, load_embedded_scenes(data_dir, scenes_per_class, seed)
    ambient = clips.label.isin(AMBIENT_CLASSES)
    if not ambient.any():
        raise DatasetError(
            f"{dataset} has none of the ambient classes {', '.join(AMBIENT_CLASSES)} to serve as "
            "scenes; give tau_root, the folder of TAU Urban Acoustic Scenes 2020 Mobile"
        )
    return clips[~ambient].reset_index(drop=True), clips[ambient].reset_index(drop=True)


def assign_splits(clips, test_fold):
    """Say of each clip whether it trains, validates or tests.

    Parameters
    ----------
    clips : pandas.DataFrame
        With ``fold`` and ``source_id``; at least three folds.
    test_fold : int
        This fold tests, the next one (the first after the last) validates, the others train.

    Returns
    -------
    pandas.Series of str
        "train", "val" or "test", on the index of `clips`.

    Raises
    ------
    DatasetError
        Unknown or too few folds, or a source that would be in two splits.

    Examples
    --------
    >>> clips = pd.DataFrame({"fold": [1, 2, 3, 4, 5], "source_id": list("abcde")})
    >>> assign_splits(clips, test_fold=5).tolist()
    ['val', 'train', 'train', 'train', 'test']
    """
    folds = sorted(int(fold) for fold in clips.fold.unique())
    if test_fold not in folds or len(folds) < 3:
        raise DatasetError(
            f"test_fold {test_fold} with folds {folds}: need at least three folds, one of them it"
        )
    val_fold = folds[(folds.index(test_fold) + 1) % len(folds)]
    split = clips.fold.map(lambda fold: {test_fold: "test", val_fold: "val"}.get(fold, "train"))
    spread = split.groupby(clips.source_id).nunique()
    shared = spread.index[spread > 1].astype(str).tolist()
    if shared:
        raise DatasetError(
            f"{len(shared)} recordings are in more than one split (source_id {_some(shared)}): "
            "give all clips of one recording the same fold"
        )
    return split.rename("split")


def audit(clips):
    """Listen to every file and set aside what cannot be used.

    Parameters
    ----------
    clips : pandas.DataFrame
        Clip table.

    Returns
    -------
    good : pandas.DataFrame
        The usable rows, renumbered.
    problems : pandas.DataFrame
        Columns ``clip_id, path, problem``: unreadable, cut short, empty, silent or not finite.

    Examples
    --------
    >>> clips = pd.DataFrame({"clip_id": ["a"], "path": ["gone.wav"]})
    >>> good, problems = audit(clips)
    >>> len(good), problems.clip_id.tolist()
    (0, ['a'])
    """
    problem = [_problem(path) for path in clips.path]
    bad = pd.Series([p is not None for p in problem], index=clips.index, dtype=bool)
    problems = clips.loc[bad, ["clip_id", "path"]].assign(problem=[p for p in problem if p])
    return clips[~bad].reset_index(drop=True), problems.reset_index(drop=True)


# --- downloads ----------------------------------------------------------------------------------


def download_esc50(dest="data", url=ESC50_URL, sha256=ESC50_SHA256):
    """Fetch ESC-50 (646 MB, unpacked about 0.9 GB more) and unpack it into ``dest/ESC-50``.

    A finished folder is left as it is. The archive is one pinned commit, held to its checksum and
    kept in `dest` until it is unpacked, so that a broken attempt can simply be repeated.

    Parameters
    ----------
    dest : str or Path
        Folder for it.
    url : str
        Address of the archive; any host of a ZIP with this layout will do.
    sha256 : str
        Checksum that the archive must have.

    Returns
    -------
    Path
        The folder to give to :func:`load_esc50`.

    Raises
    ------
    DatasetError
        No connection, wrong checksum, too little space, an archive that is unsafe or damaged.

    Notes
    -----
    CC BY-NC 3.0 (the ESC-10 part: CC BY 3.0).

    Examples
    --------
    >>> root = download_esc50("data")  # doctest: +SKIP
    """
    dest = Path(dest)
    root = dest / "ESC-50"
    if root.exists():
        load_esc50(root)
        return root
    archive = _fetch(url, sha256, dest)
    _unpack(archive, root)
    archive.unlink()
    return root


def _fetch(url, sha256, dest):
    import pooch

    try:
        dest.mkdir(parents=True, exist_ok=True)
        name = pooch.retrieve(url, f"sha256:{sha256}", fname=f"{sha256[:16]}.zip", path=dest)
    except ValueError as error:
        raise DatasetError(
            f"{url}: not the expected archive ({error}); it was cut short or changed, try again"
        ) from error
    except OSError as error:
        raise DatasetError(
            f"{url}: cannot be fetched into {dest} ({error}); check the connection and the free "
            "space, or copy the folder there by hand"
        ) from error
    return Path(name)


def _unpack(archive, root):
    part = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=root.parent))
    try:
        with zipfile.ZipFile(archive) as content:
            _check_members(content.infolist(), archive, root.parent)
            content.extractall(part)
        tables = sorted(part.glob("**/meta/esc50.csv"))
        if len(tables) != 1:
            raise DatasetError(f"{archive}: holds {len(tables)} files meta/esc50.csv, expected one")
        load_esc50(tables[0].parent.parent)
        tables[0].parent.parent.replace(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(
            f"{archive}: cannot be unpacked ({error}); delete it and try again"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_members(members, archive, folder):
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if name.is_absolute() or ".." in name.parts or ":" in member.filename or is_link:
            raise DatasetError(
                f"{archive}: unsafe, {member.filename!r} would be written outside its folder; "
                "delete the archive and fetch it from its publisher"
            )
    needed, free = sum(m.file_size for m in members), shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(f"{folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB are free")


# --- shared by the loaders ----------------------------------------------------------------------


def _load_esc_layout(root, dataset, esc10):
    root = Path(root)
    hint = "copy the folder whole, or delete it and fetch it with datasets.download_esc50()"
    table, where = _read_table(root, "meta/esc50.csv", _ESC50_COLUMNS, hint)
    _check_rows(table, where, "filename", "target", "category")
    _check_esc50_names(table, where)
    if esc10:
        table = table[table.esc10.astype(str).str.lower() == "true"]
        if table.empty:
            raise DatasetError(f"{where}: no row has esc10 = True; choose dataset esc50 instead")
    names = "audio/" + table.filename
    return _clips(root, where, names, table.category, table.fold, table.src_file, dataset, hint)


def _load_tau_layout(root, dataset):
    root = Path(root)
    hint = "unpack all audio archives of zenodo.org/records/3819968, or cut meta.csv to your files"
    table, where = _read_table(root, "meta.csv", _TAU_COLUMNS, hint, sep="\t")
    _check_rows(table, where, "filename")
    fold = _city_folds(table.identifier)
    return _clips(
        root, where, table.filename, table.scene_label, fold, table.identifier, dataset, hint
    )


def _city_folds(identifiers):
    # two of the ten cities a fold: a whole city is unheard in the split that it is not in
    cities = identifiers.astype(str).str.split("-").str[0]
    rank = {city: number for number, city in enumerate(sorted(cities.unique()))}
    return cities.map(rank) % N_FOLDS + 1


def _read_table(root, name, columns, hint, sep=","):
    where = root / name
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; {hint}")
    if not where.is_file():
        raise DatasetError(f"{root}: has no {name}; {hint}")
    try:
        table = pd.read_csv(where, sep=sep)
    except (ValueError, OSError) as error:
        raise DatasetError(f"{where}: cannot be read as a table ({error}); {hint}") from error
    lacking = [column for column in columns if column not in table]
    if lacking:
        raise DatasetError(f"{where}: columns {', '.join(lacking)} are missing; {hint}")
    holes = table[columns].isna().any(axis=1)
    if holes.any() or table.empty:
        raise DatasetError(
            f"{where}: {int(holes.sum())} of {len(table)} rows are incomplete; {hint}"
        )
    return table, where


def _check_rows(table, where, name, number=None, label=None):
    twice = table[name][table[name].duplicated()].astype(str).tolist()
    if twice:
        raise DatasetError(
            f"{where}: {len(twice)} files are listed twice ({_some(twice)}); keep one"
        )
    if number is None:
        return
    for one, many in ((number, label), (label, number)):
        counts = table.groupby(one)[many].nunique()
        mixed = counts.index[counts > 1].astype(str).tolist()
        if mixed:
            raise DatasetError(
                f"{where}: {one} {_some(mixed)} goes with more than one {many}; correct those rows"
            )


def _check_esc50_names(table, where):
    # ESC-50 spells fold and target out in the name: 1-100032-A-0.wav
    parts = table.filename.map(lambda name: _ESC50_NAME.match(Path(name).stem))
    wrong = [
        row.filename
        for row, match in zip(table.itertuples(), parts, strict=True)
        if match and (int(match[1]), int(match[2])) != (row.fold, row.target)
    ]
    if wrong:
        raise DatasetError(
            f"{where}: {len(wrong)} rows contradict the fold or target in their file's name "
            f"({_some(wrong)}); restore the published table"
        )


def _clips(root, where, names, labels, folds, sources, dataset, hint):
    paths = _find_files(root, where, list(names), hint)
    info = [_probe(path) for path in paths]
    return pd.DataFrame(
        {
            "clip_id": [path.stem for path in paths],
            "path": [str(path) for path in paths],
            "label": list(labels),
            "fold": np.asarray(folds, dtype=int),
            "source_id": [str(source) for source in sources],
            "dataset": dataset,
            "duration_s": [duration for duration, _ in info],
            "sample_rate": [rate for _, rate in info],
        },
        columns=CLIP_COLUMNS,
    )


def _find_files(root, where, names, hint):
    present = {}
    for folder in {(root / name).parent for name in names}:
        if folder.is_dir():
            present |= {
                path.with_suffix(""): path
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in AUDIO_SUFFIXES
            }
    wanted = [root / name for name in names]
    missing = [
        name
        for name, path in zip(names, wanted, strict=True)
        if path.with_suffix("") not in present
    ]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(names)} files named in {where} are missing "
            f"(first: {_some(missing)}); {hint}"
        )
    return [path if path.exists() else present[path.with_suffix("")] for path in wanted]


def _probe(path):
    # an unreadable clip stays in the table for `audit` to report; one bad file stops no study
    try:
        info = sf.info(path)
    except (sf.SoundFileError, OSError):
        return np.nan, 0
    return info.frames / info.samplerate, info.samplerate


def _problem(path):
    try:
        audio.check_audio(audio.load_audio(path)[0], path)
    except audio.AudioError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _embedded_root(data_dir, kind, per_class, seed):
    return Path(data_dir) / "embedded" / f"{kind}-{per_class}-seed{seed}"


def _some(names):
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
