"""Recordings as one table of clips, whatever data set they come from.

Every loader returns the columns of :data:`CLIP_COLUMNS`, one row a recording, and checks the
folder first: a half-copied one or a table that contradicts itself is one error that names what is
wrong, never a shorter table.
"""

import contextlib
import hashlib
import lzma
import re
import shutil
import stat
import sys
import tarfile
import zipfile
import zlib
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
import soundfile as sf

from soundscapes_utils import audio, store

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
DATASETS = ("builtin", "esc10", "esc50", "urbansound8k")
# Even, long sounds of ESC-50 that a foreground can be laid over where no scene recordings are.
AMBIENT_CLASSES = ("rain", "sea_waves", "crackling_fire", "helicopter")

# What every download prints before it starts.
SOURCES = pd.DataFrame(
    [
        (
            "esc50",
            "ESC-50",
            "CC BY-NC 3.0; the ESC-10 part CC BY 3.0",
            'K. J. Piczak, "ESC: Dataset for Environmental Sound Classification", ACM Multimedia '
            "2015, doi:10.1145/2733373.2806390",
            "https://github.com/karolpiczak/ESC-50",
        ),
        (
            "urbansound8k",
            "UrbanSound8K",
            "CC BY-NC 3.0",
            'J. Salamon, C. Jacoby and J. P. Bello, "A Dataset and Taxonomy for Urban Sound '
            'Research", ACM Multimedia 2014, doi:10.1145/2647868.2655045',
            "https://zenodo.org/records/1203745",
        ),
        (
            "tau",
            "TAU Urban Acoustic Scenes 2020 Mobile, development set",
            "experimental and non-commercial use, with acknowledgement of Tampere University's "
            "Audio Research Group",
            'T. Heittola, A. Mesaros and T. Virtanen, "Acoustic scene classification in DCASE 2020 '
            'Challenge: generalization across devices and low complexity solutions", DCASE '
            "Workshop 2020",
            "https://zenodo.org/records/3819968",
        ),
        (
            "dcase2024_task7",
            "DCASE 2024 Task 7, development set",
            "as its record says, zenodo.org/records/10869644",
            'M. Lagrange et al., "Sound Scene Synthesis at the DCASE 2024 Challenge", '
            "arXiv 2501.08587",
            "https://zenodo.org/records/10869644",
        ),
    ],
    columns=["dataset", "title", "licence", "citation", "url"],
).set_index("dataset")

ESC50_COMMIT = "33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6"
ESC50_URL = f"https://github.com/karolpiczak/ESC-50/archive/{ESC50_COMMIT}.zip"
ESC50_SHA256 = "661183a6f53ef04f12c9bd618fed0ddc1713280d6c94a5a5431e844ba6f6a21f"
URBANSOUND8K_URL = "https://zenodo.org/records/1203745/files/UrbanSound8K.tar.gz"
URBANSOUND8K_MD5 = "9aa69802bbf37fb986f71ec1483a196e"
TAU_NAME = "TAU-urban-acoustic-scenes-2020-mobile-development"
TAU_URL = "https://zenodo.org/records/3819968/files"
TAU_ARCHIVES = pd.DataFrame(
    [
        ("doc", 18066, "175f40dc3fec144347abad4d2962b7ae"),
        ("meta", 214159, "6eae9db553ce48e4ea246e34e50a3cf5"),
        ("audio.1", 1726039031, "b1e85b8a908d3d6a6ab73268f385d5c8"),
        ("audio.2", 1782268370, "4310a13cc2943d6ce3f70eba7ba4c784"),
        ("audio.3", 1870468865, "ed38956c4246abb56190c1e9b602b7b8"),
        ("audio.4", 1879413176, "97ab8560056b6816808dedc044dcc023"),
        ("audio.5", 1823936584, "b50f5e0bfed33cd8e52cb3e7f815c6cb"),
        ("audio.6", 1827246144, "fbf856a3a86fff7520549c899dc94372"),
        ("audio.7", 1728630243, "0dbffe7b6e45564da649378723284062"),
        ("audio.8", 1748646043, "bb6f77832bf0bd9f786f965beb251b2e"),
        ("audio.9", 1780487215, "a65596a5372eab10c78e08a0de797c9e"),
        ("audio.10", 1726068853, "2ad595819ffa1d56d2de4c7ed43205a6"),
        ("audio.11", 1744480272, "0ad29f7040a4e6a22cfd639b3a6738e5"),
        ("audio.12", 1738707195, "e5f4400c6b9697295fab4cf507155a2f"),
        ("audio.13", 1835797785, "8855ab9f9896422746ab4c5d89d8da2f"),
        ("audio.14", 1846390881, "092ad744452cd3e7de78f988a3d13020"),
        ("audio.15", 1869032508, "4b5eb85f6592aebf846088d9df76b420"),
        ("audio.16", 436971777, "2e0a89723e58a3836be019e6996ae460"),
    ],
    columns=["part", "size", "md5"],
)
DCASE2024_TASK7_URL = "https://zenodo.org/records/10869644/files"
DCASE2024_TASK7_NETWORKS = ("panns-wavegram-logmel", "vggish", "clap-2023")
DCASE2024_TASK7_SHA256 = "a8ab58a031b576410222a86fbea5146c68d95dfe9e0d00bc1dd19cc573854c69"

_ESC50_COLUMNS = ["filename", "fold", "target", "category", "esc10", "src_file"]
_URBANSOUND8K_COLUMNS = ["slice_file_name", "fsID", "fold", "classID", "class"]
_TAU_COLUMNS = ["filename", "scene_label", "identifier"]
_TAU_FOLDS = ("city", "official")
_ESC50_HINT = "copy the folder whole, or delete it and fetch it with datasets.download_esc50()"
_URBANSOUND8K_HINT = (
    "download UrbanSound8K.tar.gz from zenodo.org/records/1203745 and unpack it whole, or call "
    "datasets.download_urbansound8k()"
)
_TAU_HINT = (
    "unpack all audio archives of zenodo.org/records/3819968, or cut meta.csv to your files, or "
    "fetch as many as you want with datasets.download_tau()"
)
_DCASE_HINT = "copy the folder whole, or fetch it with datasets.download_dcase2024_task7()"
_ESC50_NAME = re.compile(r"(\d+)-.+-[A-Z]+-(\d+)$")
# long enough to hold one frame, so that opening a file checks its header and nothing else
_HEADER_S = 1e-6
_CHUNK_BYTES = 1 << 20
_SHOWN = 3


class DatasetError(ValueError):
    """A data folder, table or archive that cannot be used; the message says how to mend it."""


class _Archive(NamedTuple):
    """One file to fetch; a publisher that gives no checksum leaves it empty."""

    name: str
    url: str
    checksum: str
    size: int
    unpacked: int


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
    table, where, names = _read_urbansound8k(root)
    labels, hint = table["class"], _URBANSOUND8K_HINT
    return _clips(root, where, names, labels, table.fold, table.fsID, "urbansound8k", hint)


def load_tau(root, folds="city"):
    """Load TAU Urban Acoustic Scenes 2020 Mobile, development set (``meta.csv``, ``audio/``).

    The set has no five folds. They are made here, in one of two ways; in both, all recordings of a
    location, by all its devices, lie in one fold.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``meta.csv`` and ``audio``.
    folds : {"city", "official"}
        "city" deals the ten cities out to five folds in turn, so that a whole city is unheard in
        the split that it is not in. "official" follows ``evaluation_setup``: fold 5 is
        ``fold1_evaluate.csv``, and the locations of ``fold1_train.csv`` are dealt out to folds 1
        to 4, scene by scene; the recordings that the setup leaves unused are left out here too.

    Returns
    -------
    pandas.DataFrame
        Columns :data:`CLIP_COLUMNS`; ``label`` is the scene, ``source_id`` city and location.

    Raises
    ------
    DatasetError
        Folder or table missing, files missing, duplicate rows, unknown `folds`.

    Notes
    -----
    Heittola, Mesaros and Virtanen, DCASE Workshop 2020.

    Examples
    --------
    >>> load_tau("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: no/such/folder: no such folder; ...
    """
    return _load_tau_layout(root, "tau", folds)


def load_dcase2024_task7(root, networks=DCASE2024_TASK7_NETWORKS):
    """Load the development set of DCASE 2024 Task 7 (``captions.csv``, ``embeddings/``).

    Its audio was never published: what there is are the captions and what three networks made of
    the reference recordings, 4 s each.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``captions.csv`` and ``embeddings/<network>/<clip>.npy``.
    networks : sequence of str
        Which networks to load, named as their folders.

    Returns
    -------
    captions : pandas.DataFrame
        Columns ``clip_id, file, caption``, one row a recording.
    embeddings : dict of str to np.ndarray, float32, shape (clips, frames, dimensions)
        Rows in the order of `captions`. As published: ``panns-wavegram-logmel`` (60, 1, 2048),
        ``vggish`` (60, 4, 128), ``clap-2023`` (60, 4, 1024).

    Raises
    ------
    DatasetError
        Folder, table or embeddings missing, duplicate rows, an array that is none of the kind.

    Notes
    -----
    Lagrange et al., "Sound Scene Synthesis at the DCASE 2024 Challenge", arXiv 2501.08587.

    Examples
    --------
    >>> load_dcase2024_task7("no/such/folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    soundscapes_utils.datasets.DatasetError: no/such/folder: no such folder; ...
    """
    root = Path(root)
    table, where = _read_dcase(root)
    names = {network: _embedding_names(network, table) for network in networks}
    missing = [n for of_one in names.values() for n in of_one if not (root / n).is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {sum(map(len, names.values()))} embeddings of the clips in "
            f"{where} are missing (first: {_some(missing)}); {_DCASE_HINT}"
        )
    embeddings = {
        network: _stack_embeddings([root / name for name in of_one])
        for network, of_one in names.items()
    }
    captions = table[["file", "caption"]].copy()
    captions.insert(0, "clip_id", [Path(file).stem for file in table.file])
    return captions, embeddings


def load_builtin(data_dir="data", clips_per_class=40, seed=0):
    """Load the built-in events, made by rule on first use.

    Parameters
    ----------
    data_dir : str or Path
        They are kept in its folder ``builtin``.
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
    >>> load_builtin(tempfile.mkdtemp(), clips_per_class=1).label.nunique()
    10
    """
    from soundscapes_utils import procedural

    root = _builtin_root(data_dir, "events", clips_per_class, seed)
    procedural.write_events(root, clips_per_class, seed)
    return _load_esc_layout(root, "builtin", esc10=False)


def load_builtin_scenes(data_dir="data", scenes_per_class=20, seed=0):
    """Load the built-in scenes, made by rule on first use.

    Parameters
    ----------
    data_dir : str or Path
        They are kept in its folder ``builtin``.
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
    >>> load_builtin_scenes(tempfile.mkdtemp(), scenes_per_class=1).label.nunique()
    10
    """
    from soundscapes_utils import procedural

    root = _builtin_root(data_dir, "scenes", scenes_per_class, seed)
    procedural.write_scenes(root, scenes_per_class, seed)
    return _load_tau_layout(root, "builtin-scenes")


def load_clips(
    dataset, *, esc50_root="", urbansound8k_root="", data_dir="data", clips_per_class=40, seed=0
):
    """Load the foreground clips of a data set by its name.

    Parameters
    ----------
    dataset : {"builtin", "esc10", "esc50", "urbansound8k"}
        Which one.
    esc50_root, urbansound8k_root : str or Path
        Where ESC-50 and UrbanSound8K lie; by default ``ESC-50`` and ``UrbanSound8K`` in `data_dir`.
    data_dir : str or Path
        Folder of the project's data.
    clips_per_class, seed : int
        Of the built-in data set, see :func:`load_builtin`.

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
    soundscapes_utils.datasets.DatasetError: unknown dataset 'esc5'; choose one of builtin, \
esc10, esc50, urbansound8k
    """
    if dataset not in DATASETS:
        raise DatasetError(f"unknown dataset {dataset!r}; choose one of {', '.join(DATASETS)}")
    if dataset == "builtin":
        return load_builtin(data_dir, clips_per_class, seed)
    if dataset == "urbansound8k":
        return load_urbansound8k(urbansound8k_root or Path(data_dir) / "UrbanSound8K")
    return load_esc50(esc50_root or Path(data_dir) / "ESC-50", esc10=dataset == "esc10")


def load_scenes(
    dataset,
    clips,
    *,
    tau_root="",
    data_dir="data",
    scenes_per_class=20,
    seed=0,
    tau_folds="city",
):
    """Choose what the events of a data set are laid over.

    TAU scenes where `tau_root` is given; else the built-in scenes for the built-in events; else
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
        Of the built-in scenes, see :func:`load_builtin_scenes`.
    tau_folds : {"city", "official"}
        Of TAU, see :func:`load_tau`.

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
        return clips, load_tau(tau_root, tau_folds)
    if dataset == "builtin":
        return clips, load_builtin_scenes(data_dir, scenes_per_class, seed)
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


def check_folder(dataset, root):
    """Say what is missing or damaged in a local copy of a data set, file by file.

    Headers only are read, so that the 23,040 recordings of TAU take seconds; :func:`audit` listens.

    Parameters
    ----------
    dataset : {"esc10", "esc50", "urbansound8k", "tau", "dcase2024_task7"}
        Whose layout the folder shall have.
    root : str or Path
        The folder.

    Returns
    -------
    pandas.DataFrame
        Columns ``file, problem``, one row a file that is missing, empty, cut short or unreadable;
        one row for the folder where its table cannot be used. No rows: all is there.

    Raises
    ------
    DatasetError
        Unknown `dataset`.

    Examples
    --------
    >>> check_folder("esc50", "no/such/folder").problem[0]  # doctest: +ELLIPSIS
    'no such folder; copy the folder whole, ...'
    """
    root = Path(root)
    checks = {
        "esc10": lambda: _check_sound(root, _read_esc50(root, esc10=True)),
        "esc50": lambda: _check_sound(root, _read_esc50(root)),
        "urbansound8k": lambda: _check_sound(root, _read_urbansound8k(root)),
        "tau": lambda: _check_sound(root, _read_tau(root)),
        "dcase2024_task7": lambda: _check_embeddings(root),
    }
    if dataset not in checks:
        raise DatasetError(f"unknown dataset {dataset!r}; choose one of {', '.join(checks)}")
    try:
        problems = checks[dataset]()
    except DatasetError as error:
        problems = [(str(root), str(error).removeprefix(f"{root}: "))]
    return pd.DataFrame(problems, columns=["file", "problem"])


# --- downloads ----------------------------------------------------------------------------------


def download_esc50(dest="data", url=ESC50_URL, sha256=ESC50_SHA256):
    """Fetch ESC-50 (646 MB, unpacked about 0.9 GB more) and unpack it into ``dest/ESC-50``.

    A finished folder is left as it is. The archive is one pinned commit, held to its checksum and
    kept in `dest` until it is unpacked, so that a broken attempt can simply be repeated: it goes on
    where it stopped if the host allows it, and from the start otherwise. Disk need, licence and
    citation are printed first.

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
    checksum, size, unpacked = f"sha256:{sha256}", 645_832_161, 900_000_000
    archive = _Archive(f"{sha256[:16]}.zip", url, checksum, size, unpacked)
    return _download_whole("esc50", archive, Path(dest) / "ESC-50", "meta/esc50.csv", load_esc50)


def download_urbansound8k(dest="data", url=URBANSOUND8K_URL, md5=URBANSOUND8K_MD5):
    """Fetch UrbanSound8K (6.0 GB, unpacked about 7.1 GB more) into ``dest/UrbanSound8K``.

    As :func:`download_esc50`. An ``UrbanSound8K.tar.gz`` that lies in `dest` already is used if its
    checksum is right.

    Parameters
    ----------
    dest : str or Path
        Folder for it.
    url : str
        Address of the archive; any host of a tar file with this layout will do.
    md5 : str
        Checksum that the archive must have.

    Returns
    -------
    Path
        The folder to give to :func:`load_urbansound8k`.

    Raises
    ------
    DatasetError
        No connection, wrong checksum, too little space, an archive that is unsafe or damaged.

    Notes
    -----
    CC BY-NC 3.0.

    Examples
    --------
    >>> root = download_urbansound8k("data")  # doctest: +SKIP
    """
    archive = _Archive("UrbanSound8K.tar.gz", url, f"md5:{md5}", 6_023_741_708, 7_100_000_000)
    table = "metadata/UrbanSound8K.csv"
    root = Path(dest) / "UrbanSound8K"
    return _download_whole("urbansound8k", archive, root, table, load_urbansound8k)


def download_tau(dest="data", parts=16, url=TAU_URL, archives=TAU_ARCHIVES):
    """Fetch TAU Urban Acoustic Scenes 2020 Mobile, or some of it, into ``dest/TAU-2020-Mobile``.

    One archive after the other is fetched, checked, unpacked and deleted, so that the disk need is
    the unpacked recordings (about 2 GB an archive, 31 GB in all) and one archive. ``meta.csv``
    lists the recordings of the archives unpacked so far, ``meta-all.csv`` the whole set; a later
    call with more `parts` adds to the folder, and a broken one goes on where it stopped.

    Parameters
    ----------
    dest : str or Path
        Folder for it.
    parts : int or sequence of int
        How many of the 16 audio archives, from the first on, or which of them.
    url : str
        Address of the folder that holds the archives.
    archives : pandas.DataFrame
        Columns ``part`` ("doc", "meta", "audio.1" …), ``size`` in bytes and ``md5``.

    Returns
    -------
    Path
        The folder to give to :func:`load_tau`.

    Raises
    ------
    DatasetError
        Unknown part, no connection, wrong checksum, too little space, an archive that is unsafe or
        damaged. What was unpacked before stays and can be loaded.

    Notes
    -----
    For experimental and non-commercial use; the copyright notice is in the folder's README.

    Examples
    --------
    >>> root = download_tau("data", parts=2)  # doctest: +SKIP
    """
    dest = Path(dest)
    root = dest / "TAU-2020-Mobile"
    wanted = _tau_archives(parts, url, archives)
    if (root / "meta.csv").exists() and not (root / "archives.csv").exists():
        load_tau(root)
        return root
    done = set(_tau_unpacked(root).archive)
    todo = [archive for archive in wanted if archive.name not in done]
    if todo:
        _announce("tau", dest, todo)
    for archive in todo:
        path = _fetch(archive, dest)
        _add_to_tau(path, archive, root)
        path.unlink()
    _refuse_uncovered(root, archives)
    load_tau(root)
    return root


def download_dcase2024_task7(dest="data", url=DCASE2024_TASK7_URL, sha256=DCASE2024_TASK7_SHA256):
    """Fetch the captions and embeddings of DCASE 2024 Task 7 into ``dest/dcase2024_task7_dev``.

    As :func:`download_esc50`, but what is held to a checksum is the content (captions, and the
    embeddings of :data:`DCASE2024_TASK7_NETWORKS`) instead of the archive.

    Parameters
    ----------
    dest : str or Path
        Folder for it.
    url : str
        Address of the folder that holds ``captions.csv`` and ``embeddings.tar.xz``.
    sha256 : str or None
        Checksum that the content must have; None takes any that is whole.

    Returns
    -------
    Path
        The folder to give to :func:`load_dcase2024_task7`.

    Raises
    ------
    DatasetError
        No connection, wrong content, too little space, an archive that is unsafe or damaged.

    Examples
    --------
    >>> root = download_dcase2024_task7("data")  # doctest: +SKIP
    """
    dest = Path(dest)
    root = dest / "dcase2024_task7_dev"
    if root.exists():
        load_dcase2024_task7(root)
        return root
    archives = [
        _Archive(f"dcase2024_task7_{name}", f"{url}/{name}", "", size, unpacked)
        for name, size, unpacked in (
            ("captions.csv", 10_000, 10_000),
            ("embeddings.tar.xz", 50_000_000, 200_000_000),
        )
    ]
    _announce("dcase2024_task7", dest, archives)
    captions, embeddings = [_fetch(archive, dest) for archive in archives]
    try:
        with _unpacked(embeddings, archives[1], root) as folder:
            shutil.copyfile(captions, folder / "captions.csv")
            content = _content_sha256(*load_dcase2024_task7(folder))
            if sha256 not in (None, content):
                raise DatasetError(
                    f"{url}: not the expected content (sha256 {content}); it was cut short or "
                    "changed, try again, or give sha256=None to take it as it is"
                )
            folder.replace(root)
    finally:
        # without a checksum of their own, bad files cannot be told from good ones: fetch anew
        captions.unlink()
        embeddings.unlink()
    return root


def _download_whole(dataset, archive, root, table, load):
    if root.exists():
        load(root)
        return root
    _announce(dataset, root.parent, [archive])
    path = _fetch(archive, root.parent)
    with _unpacked(path, archive, root) as folder:
        tables = sorted(folder.glob(f"**/{table}"))
        if len(tables) != 1:
            raise DatasetError(f"{path}: holds {len(tables)} files {table}, expected one")
        load(tables[0].parent.parent)
        tables[0].parent.parent.replace(root)
    path.unlink()
    return root


def _announce(dataset, dest, archives):
    source = SOURCES.loc[dataset]
    try:
        dest.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(dest).free
    except OSError as error:
        raise DatasetError(
            f"{dest}: cannot be written to ({error}); choose another dest"
        ) from error
    have = sum(_fetched_bytes(archive, dest) for archive in archives)
    fetch = max(sum(archive.size for archive in archives) - have, 0)
    # archives are unpacked one by one and then deleted: one of them lies beside what was unpacked
    need = sum(a.unpacked for a in archives) + max(a.size for a in archives)
    need = max(need - have, 0)
    print(
        f"{source.title}, {source.url}\n"
        f"  to fetch {fetch / 1e9:.2f} GB, disk needed {need / 1e9:.2f} GB, free in {dest} "
        f"{free / 1e9:.2f} GB\n"
        f"  licence: {source.licence}\n"
        f"  please cite: {source.citation}"
    )
    _require_space(dest, need, free)


def _require_space(folder, need, free):
    if need > free:
        raise DatasetError(
            f"{folder}: {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB are free; free some space "
            "or choose another folder"
        )


def _fetched_bytes(archive, dest):
    files = [dest / archive.name, _part(archive, dest)]
    return next((file.stat().st_size for file in files if file.exists()), 0)


def _part(archive, dest):
    return dest / f".{archive.name}.part"


def _fetch(archive, dest):
    path, part = dest / archive.name, _part(archive, dest)
    if path.exists() and _matches(path, archive.checksum):
        return path
    resumed = part.exists()
    _download(archive.url, part)
    if _matches(part, archive.checksum):
        return part.replace(path)
    part.unlink()
    if resumed:
        # what lay there may have been of another version of the file: once more from the start
        return _fetch(archive, dest)
    raise DatasetError(
        f"{archive.url}: not the expected archive (its checksum is not {archive.checksum}); it was "
        "cut short or changed, try again"
    )


def _download(url, part):
    import pooch

    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with part.open("ab") as file:

            def drop_what_comes_again(response, **_):
                if response.status_code == HTTPStatus.OK:
                    file.truncate(0)

            fetch = pooch.HTTPDownloader(
                progressbar=sys.stderr.isatty(),
                chunk_size=_CHUNK_BYTES,
                headers=headers,
                hooks={"response": drop_what_comes_again},
            )
            fetch(url, file, None)
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            # nothing is left to come: the checksum tells whether the file is whole
            return
        if part.exists() and not part.stat().st_size:
            part.unlink()
        raise DatasetError(
            f"{url}: cannot be fetched into {part.parent} ({error}); check the connection and the "
            "free space and try again (what has come so far is kept), or copy the folder there by "
            "hand"
        ) from error


def _matches(path, checksum):
    import pooch

    if not checksum:
        return True
    algorithm, _, digest = checksum.partition(":")
    return pooch.file_hash(str(path), alg=algorithm) == digest.lower()


@contextlib.contextmanager
def _unpacked(path, archive, root):
    # one fixed name: what a killed run left is cleared by the next one
    folder = root.parent / f".unpacking-{root.name}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _extract(path, folder, archive.unpacked)
        yield folder
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        OSError,
    ) as error:
        raise DatasetError(
            f"{path}: cannot be unpacked ({error}); delete it and try again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _extract(path, folder, expected):
    free = shutil.disk_usage(folder).free
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as content:
            # all are checked before the first is written; a tar file shows them one by one only
            members = list(_checked(content.infolist(), path, expected, free))
            content.extractall(folder, members)
    else:
        with tarfile.open(path) as content:
            content.extractall(folder, _checked(content, path, expected, free), filter="data")


def _checked(members, path, expected, free):
    total = 0
    for member in members:
        name, size, plain = _describe(member)
        parts = PurePosixPath(name.replace("\\", "/"))
        if not plain or parts.is_absolute() or ".." in parts.parts or ":" in name:
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
        _require_space(path.parent, total, free)
        yield member


def _describe(member):
    if isinstance(member, tarfile.TarInfo):
        return member.name, member.size, member.isreg() or member.isdir()
    kind = stat.S_IFMT(member.external_attr >> 16)
    return member.filename, member.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR)


def _tau_archives(parts, url, archives):
    numbers = range(1, parts + 1) if isinstance(parts, int) else dict.fromkeys(parts)
    known = set(archives.part)
    wanted = ["doc", "meta", *(f"audio.{number}" for number in numbers)]
    unknown = [part for part in wanted if part not in known]
    if unknown or len(wanted) == 2:
        count = sum(part.startswith("audio.") for part in known)
        raise DatasetError(
            f"parts {parts!r}: TAU has the audio archives 1 to {count}; give how many, or a list"
        )
    rows = archives.set_index("part").loc[wanted]
    return [
        _Archive(
            name=f"{TAU_NAME}.{row.Index}.zip",
            url=f"{url}/{TAU_NAME}.{row.Index}.zip",
            checksum=f"md5:{row.md5}",
            size=int(row.size),
            # 24-bit noise hardly shrinks, tables of file names do
            unpacked=int(row.size * (1.25 if row.Index.startswith("audio.") else 20)),
        )
        for row in rows.itertuples()
    ]


def _tau_unpacked(root):
    # which archive brought which file: meta.csv is cut to them, and no archive is fetched twice
    where = root / "archives.csv"
    if not where.exists():
        return pd.DataFrame({"archive": [], "filename": []}, dtype=str)
    return pd.read_csv(where, dtype=str)


def _add_to_tau(path, archive, root):
    with _unpacked(path, archive, root) as folder:
        top = folder / TAU_NAME
        files = sorted(file for file in top.rglob("*") if file.is_file())
        if not files:
            raise DatasetError(f"{path}: holds no folder {TAU_NAME}; fetch it from its publisher")
        names = [file.relative_to(top).as_posix() for file in files]
        for file, name in zip(files, names, strict=True):
            target = root / ("meta-all.csv" if name == "meta.csv" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    unpacked = pd.concat(
        [_tau_unpacked(root), pd.DataFrame({"archive": archive.name, "filename": names})]
    )
    # the list goes last: an archive counts as unpacked only when all else is written
    if (root / "meta-all.csv").exists():
        meta, _ = _read_table(root, "meta-all.csv", _TAU_COLUMNS, _TAU_HINT, sep="\t")
        meta = meta[meta.filename.isin(unpacked.filename)]
        if len(meta):
            _write_table(root / "meta.csv", meta, sep="\t")
    _write_table(root / "archives.csv", unpacked)


def _refuse_uncovered(root, archives):
    unpacked = _tau_unpacked(root)
    if not {f"{TAU_NAME}.{part}.zip" for part in archives.part} <= set(unpacked.archive):
        return
    meta, where = _read_table(root, "meta-all.csv", _TAU_COLUMNS, _TAU_HINT, sep="\t")
    lost = meta.filename[~meta.filename.isin(unpacked.filename)].tolist()
    if lost:
        raise DatasetError(
            f"{where}: {len(lost)} of the {len(meta)} recordings are in none of the archives "
            f"({_some(lost)}); {root} holds the others and can be loaded"
        )


def _write_table(path, table, sep=","):
    store.write_atomic(path, table.to_csv(index=False, sep=sep, lineterminator="\n").encode())


def _content_sha256(captions, embeddings):
    digest = hashlib.sha256(captions.to_csv(index=False, lineterminator="\n").encode())
    for network in sorted(embeddings):
        digest.update(np.ascontiguousarray(embeddings[network], dtype="<f4").tobytes())
    return digest.hexdigest()


# --- shared by the loaders ----------------------------------------------------------------------


def _load_esc_layout(root, dataset, esc10):
    root = Path(root)
    table, where, names = _read_esc50(root, esc10)
    labels, sources = table.category, table.src_file
    return _clips(root, where, names, labels, table.fold, sources, dataset, _ESC50_HINT)


def _load_tau_layout(root, dataset, folds="city"):
    if folds not in _TAU_FOLDS:
        raise DatasetError(f"unknown folds {folds!r}; choose one of {', '.join(_TAU_FOLDS)}")
    root = Path(root)
    table, where, _ = _read_tau(root)
    if folds == "city":
        fold = _city_folds(table.identifier)
    else:
        fold = _official_folds(root, table).dropna()
        table = table.loc[fold.index]
    if table.empty:
        raise DatasetError(f"{where}: no recording is in evaluation_setup; choose folds='city'")
    labels, sources = table.scene_label, table.identifier
    return _clips(root, where, table.filename, labels, fold, sources, dataset, _TAU_HINT)


def _read_esc50(root, esc10=False):
    table, where = _read_table(root, "meta/esc50.csv", _ESC50_COLUMNS, _ESC50_HINT)
    _check_rows(table, where, "filename", "target", "category")
    _check_esc50_names(table, where)
    if esc10:
        table = table[table.esc10.astype(str).str.lower() == "true"]
        if table.empty:
            raise DatasetError(f"{where}: no row has esc10 = True; choose dataset esc50 instead")
    return table, where, "audio/" + table.filename


def _read_urbansound8k(root):
    name = "metadata/UrbanSound8K.csv"
    table, where = _read_table(root, name, _URBANSOUND8K_COLUMNS, _URBANSOUND8K_HINT)
    _check_rows(table, where, "slice_file_name", "classID", "class")
    return table, where, "audio/fold" + table.fold.astype(str) + "/" + table.slice_file_name


def _read_tau(root):
    table, where = _read_table(root, "meta.csv", _TAU_COLUMNS, _TAU_HINT, sep="\t")
    _check_rows(table, where, "filename")
    return table, where, table.filename


def _read_dcase(root):
    table, where = _read_table(root, "captions.csv", ["file", "caption"], _DCASE_HINT)
    _check_rows(table, where, "file")
    return table, where


def _embedding_names(network, table):
    return [f"embeddings/{network}/{Path(file).stem}.npy" for file in table.file]


def _stack_embeddings(paths):
    arrays = [_read_embedding(path) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise DatasetError(
                f"{path}: shape {array.shape} where {paths[0].name} has {arrays[0].shape}; "
                f"{_DCASE_HINT}"
            )
    return np.stack(arrays)


def _read_embedding(path):
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DatasetError(
            f"{path}: cannot be read as an array ({error}); {_DCASE_HINT}"
        ) from error
    if array.ndim != 2 or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise DatasetError(
            f"{path}: {array.dtype} of shape {array.shape}, expected finite floats of shape "
            f"(frames, dimensions); {_DCASE_HINT}"
        )
    return array.astype(np.float32)


def _city_folds(identifiers):
    # two of the ten cities a fold: a whole city is unheard in the split that it is not in
    cities = identifiers.astype(str).str.split("-").str[0]
    rank = {city: number for number, city in enumerate(sorted(cities.unique()))}
    return cities.map(rank) % N_FOLDS + 1


def _official_folds(root, table):
    setup = {
        part: _read_table(
            root, f"evaluation_setup/fold1_{part}.csv", ["filename", "scene_label"], _TAU_HINT, "\t"
        )[0]
        for part in ("train", "evaluate")
    }
    # dealt out over the whole training list, so that a location keeps its fold whichever of the
    # archives are at hand
    places = setup["train"].assign(place=setup["train"].filename.map(_tau_place))
    places = places.sort_values(["place", "scene_label"]).drop_duplicates("place")
    dealt = places.groupby("scene_label").cumcount() % (N_FOLDS - 1) + 1
    by_place = dict(zip(places.place, dealt, strict=True))
    fold = table.filename.map(_tau_place).map(by_place)
    fold = fold.where(table.filename.isin(setup["train"].filename))
    return fold.mask(table.filename.isin(setup["evaluate"].filename), N_FOLDS)


def _tau_place(filename):
    # audio/airport-lisbon-1175-44106-a.wav: scene, city, location, segment, device
    return "-".join(PurePosixPath(filename).stem.split("-")[1:-2])


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
    paths = _present_files(root, names)
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise DatasetError(
            f"{len(missing)} of the {len(names)} files named in {where} are missing "
            f"(first: {_some(missing)}); {hint}"
        )
    return paths


def _present_files(root, names):
    # one listing a folder instead of one look-up a file: network disks answer the latter slowly
    present = {}
    for folder in {(root / name).parent for name in names}:
        if folder.is_dir():
            present |= {
                path.with_suffix(""): path
                for path in sorted(folder.iterdir())
                if path.suffix.lower() in AUDIO_SUFFIXES
            }
    wanted = [root / name for name in names]
    listed = set(present.values())
    return [path if path in listed else present.get(path.with_suffix("")) for path in wanted]


def _check_sound(root, listing):
    names = list(listing[2])
    found = zip(names, _present_files(root, names), strict=True)
    problems = [
        (name, "missing" if path is None else _header_problem(path)) for name, path in found
    ]
    return [(name, problem) for name, problem in problems if problem]


def _header_problem(path):
    try:
        audio.load_audio(path, duration=_HEADER_S)
    except audio.AudioError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _check_embeddings(root):
    table, _ = _read_dcase(root)
    problems = []
    for name in [
        n for network in DCASE2024_TASK7_NETWORKS for n in _embedding_names(network, table)
    ]:
        if not (root / name).is_file():
            problems.append((name, "missing"))
            continue
        try:
            _read_embedding(root / name)
        except DatasetError as error:
            problems.append((name, str(error).removeprefix(f"{root / name}: ")))
    return problems


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


def _builtin_root(data_dir, kind, per_class, seed):
    return Path(data_dir) / "builtin" / f"{kind}-{per_class}-seed{seed}"


def _some(names):
    names = [str(name) for name in names]
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
