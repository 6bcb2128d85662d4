"""The files that a trainer reads, and the checks that keep a data set honest.

:func:`write_audiocaps` writes what AudioLDM's trainer (haoheliu/AudioLDM-training-finetuning)
expects: one JSON a split, a CSV of class labels, and ``dataset_root.json`` that points to them.
:func:`read_audiocaps` and :func:`validate` read it all back; :func:`check_leaks` makes sure that no
split has heard another's recordings.
"""

import csv
import io
import itertools
import json
import os
from pathlib import Path, PurePosixPath

import pandas as pd

from soundscapes_utils import audio
from soundscapes_utils.captions import tidy

# AudioSet's machine ids of the classes and scenes that have one of the same meaning. The others
# get an id of this project's own, which the class CSV lists like any other.
AUDIOSET_MIDS = {
    "dog": "/m/0bt9lr",
    "dog_bark": "/m/05tny_",
    "rooster": "/m/07qn5dc",
    "pig": "/m/068zj",
    "cow": "/m/01xq0k1",
    "frog": "/m/09ld4",
    "cat": "/m/01yrx",
    "hen": "/m/07st89h",
    "insects": "/m/03vt0",
    "sheep": "/m/07bgp",
    "crow": "/m/04s8yn",
    "rain": "/m/06mb1",
    "sea_waves": "/m/034srq",
    "crackling_fire": "/m/07pzfmf",
    "crickets": "/m/09xqv",
    "chirping_birds": "/m/020bb7",
    "water_drops": "/m/07r5v4s",
    "wind": "/m/03m9d0z",
    "pouring_water": "/m/07prgkl",
    "toilet_flush": "/m/01jt3m",
    "thunderstorm": "/m/0jb2l",
    "crying_baby": "/t/dd00002",
    "sneezing": "/m/01hsr_",
    "clapping": "/m/0l15bq",
    "breathing": "/m/0lyf6",
    "coughing": "/m/01b_21",
    "footsteps": "/m/07pbtc8",
    "laughing": "/m/01j3sz",
    "brushing_teeth": "/m/012xff",
    "snoring": "/m/01d3sd",
    "door_wood_knock": "/m/07r4wb8",
    "keyboard_typing": "/m/01m2v",
    "vacuum_cleaner": "/m/0d31p",
    "clock_alarm": "/m/046dlr",
    "clock_tick": "/m/07qjznt",
    "glass_breaking": "/m/07rn7sz",
    "helicopter": "/m/09ct_",
    "chainsaw": "/m/01j4z9",
    "siren": "/m/03kmc9",
    "car_horn": "/m/0912c9",
    "engine": "/m/02mk9",
    "engine_idling": "/m/07pb8fc",
    "train": "/m/07jdr",
    "church_bells": "/m/03w41f",
    "airplane": "/m/0cmf2",
    "fireworks": "/m/0g6b5",
    "hand_saw": "/m/01b82r",
    "air_conditioner": "/m/025wky1",
    "children_playing": "/t/dd00013",
    "drilling": "/m/01d380",
    "gun_shot": "/m/032s66",
    "jackhammer": "/m/03p19w",
    "bus": "/m/01bjv",
    "metro": "/m/0195fx",
    "street_traffic": "/m/0btp2",
}
OWN_ID = "/own/"
CLASS_FILE = "class_labels_indices.csv"
ROOT_FILE = "dataset_root.json"
_SHOWN = 5


class MetadataError(ValueError):
    """Metadata that cannot be written or read; the message names the file and the remedy."""


class LeakError(ValueError):
    """Two splits share a source, a recording or a scene location; the message names them."""


# --- writing ----------------------------------------------------------------------------------


def class_labels(labels):
    """Number the classes of a data set and give each its AudioSet id.

    Parameters
    ----------
    labels : iterable of str
        Class and scene names, in any order, repeated or not.

    Returns
    -------
    pandas.DataFrame
        Columns ``index, mid, display_name``, in alphabetical order of the names.

    Examples
    --------
    >>> class_labels(["tram", "dog"]).mid.tolist()
    ['/m/0bt9lr', '/own/tram']
    """
    names = sorted(set(labels))
    mids = [_mid(name) for name in names]
    table = {"index": range(len(names)), "mid": mids, "display_name": [tidy(n) for n in names]}
    return pd.DataFrame(table)


def _mid(label):
    # the trainer splits the labels of a clip at commas
    return AUDIOSET_MIDS.get(label) or OWN_ID + tidy(label).replace(" ", "_").replace(",", "")


def write_audiocaps(mixes, out_dir, name):
    """Write the metadata of a set of rendered mixes.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`~soundscapes_utils.mixing.render_mixes`; all splits that occur are written.
    out_dir : str or Path
        Gets ``<name>_<split>.json``, ``class_labels_indices.csv`` and ``dataset_root.json``.
    name : str
        The data set's name in ``dataset_root.json``.

    Returns
    -------
    Path
        ``dataset_root.json``. The folders in it are absolute, as the trainer takes them; the clips
        are named relative to the folder of the audio.

    Raises
    ------
    MetadataError
        No mixes, mixes that have not been rendered, or a disk that refuses.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "mixes" / "test" / "mix.wav", [0.1, 0.2], 16000)
    >>> mix = {"split": "test", "foreground_label": "dog", "scene": "park", "caption": "a dog"}
    >>> root = write_audiocaps(pd.DataFrame([mix | {"path": path}]), folder, "scenes")
    >>> root.name, validate(root).empty
    ('dataset_root.json', True)
    >>> read_audiocaps(root).drop(columns="path").to_numpy().tolist()
    [['test', 'dog, park', 'a dog']]
    """
    if mixes.empty:
        raise MetadataError("no mixes to describe; plan and render some first")
    gone = [path for path in mixes.path if not Path(path).is_file()]
    if gone:
        raise MetadataError(
            f"{len(gone)} of {len(mixes)} mixes have no file ({gone[0]}); render them first"
        )
    out_dir = Path(out_dir).resolve()
    audio_root = _common_folder(mixes.path)
    files = {split: out_dir / f"{name}_{split}.json" for split in mixes.split.unique()}
    for split, path in files.items():
        entries = [_entry(row, audio_root) for row in _rows(mixes[mixes.split == split])]
        _write_json(path, {"data": entries})
    labels = class_labels(name for row in _rows(mixes) for name in _names(row))
    _write_text(out_dir / CLASS_FILE, labels.to_csv(index=False, quoting=csv.QUOTE_MINIMAL))
    paths = {split: str(path) for split, path in files.items()}
    paths["class_label_indices"] = str(out_dir / CLASS_FILE)
    root = {name: str(audio_root), "comments": {}, "metadata": {"path": {name: paths}}}
    _write_json(out_dir / ROOT_FILE, root)
    return out_dir / ROOT_FILE


def _rows(table):
    return table.to_dict("records")


def _common_folder(paths):
    folders = {str(Path(path).resolve().parent) for path in paths}
    # a set of one split must not lose its split's folder
    common = Path(os.path.commonpath(folders))
    return common if len(folders) > 1 else common.parent


def _entry(row, audio_root):
    wav = Path(row["path"]).resolve().relative_to(audio_root).as_posix()
    labels = ",".join(dict.fromkeys(_mid(name) for name in _names(row)))
    captions = {key: text for key, text in row.items() if key.startswith("caption")}
    return {"wav": wav, "labels": labels} | captions


def _names(row):
    # a clip of a single event has no scene; CSV turns that into NaN
    return [row[key] for key in ("foreground_label", "scene") if row[key] and row[key] == row[key]]


def _write_json(path, content):
    _write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_text(path, text):
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MetadataError(
            f"{path}: cannot be written ({error}); free some space or choose another folder"
        ) from error


# --- reading ----------------------------------------------------------------------------------


def read_audiocaps(dataset_root_json):
    """Read a data set back from its ``dataset_root.json``.

    Parameters
    ----------
    dataset_root_json : str or Path
        As :func:`write_audiocaps` returned it, or anyone else's in that format with one data set.

    Returns
    -------
    pandas.DataFrame
        One row a clip: ``split, path, labels`` (display names, separated by ", "), ``caption`` and
        whatever further captions there are.

    Raises
    ------
    MetadataError
        A file that is missing or not in the format, a path that is not relative, or a label that
        the class table does not list.

    Examples
    --------
    >>> read_audiocaps("none.json")
    Traceback (most recent call last):
    soundscapes_utils.metadata.MetadataError: none.json: no such file; run notebook \
01_dataset_mixing
    """
    root_file = Path(dataset_root_json)
    root = _read_json(root_file)
    try:
        ((name, files),) = root["metadata"]["path"].items()
        audio_root = root_file.parent / root[name]
        names = _read_classes(root_file.parent / files["class_label_indices"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MetadataError(
            f"{root_file}: not a dataset_root.json of one data set ({error!r}); write it again "
            "with metadata.write_audiocaps"
        ) from error
    splits = [split for split in files if split != "class_label_indices"]
    rows = []
    for split in splits:
        path = root_file.parent / files[split]
        rows += [_read_entry(entry, split, path, audio_root, names) for entry in _entries(path)]
    return pd.DataFrame(rows)


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MetadataError(f"{path}: no such file; run notebook 01_dataset_mixing") from error
    except ValueError as error:
        raise MetadataError(f"{path}: not JSON ({error}); write it again") from error


def _read_classes(path):
    table = pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")))
    return dict(zip(table["mid"], table["display_name"], strict=True))


def _entries(path):
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise MetadataError(f'{path}: has no list "data"; write it again')
    return content["data"]


def _read_entry(entry, split, path, audio_root, names):
    wav, mids = str(entry.get("wav", "")), str(entry.get("labels", "")).split(",")
    if not wav or PurePosixPath(wav).is_absolute():
        raise MetadataError(f"{path}: wav {wav!r} must be a path relative to the audio folder")
    unknown = [mid for mid in mids if mid not in names]
    if unknown:
        raise MetadataError(f"{path}: label {unknown[0]!r} of {wav} is not in the class table")
    spoken = {key: text for key, text in entry.items() if "caption" in key}
    labels = ", ".join(names[mid] for mid in mids)
    return {"split": split, "path": str(audio_root / wav), "labels": labels} | spoken


def validate(dataset_root_json):
    """Open every file that a data set's metadata names, and report what is wrong.

    Parameters
    ----------
    dataset_root_json : str or Path
        See :func:`read_audiocaps`.

    Returns
    -------
    pandas.DataFrame
        Columns ``split, path, problem``; empty if all is well. Files that are missing, unreadable
        or silent, captions that are empty, files that two splits or two entries name.

    Raises
    ------
    MetadataError
        What :func:`read_audiocaps` finds.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "mixes" / "test" / "mix.wav", [0.0, 0.0], 16000)
    >>> mix = {"split": "test", "foreground_label": "dog", "scene": "park", "caption": "a dog"}
    >>> root = write_audiocaps(pd.DataFrame([mix | {"path": path}]), folder, "scenes")
    >>> validate(root).problem.tolist()
    ['is silent; leave it out or replace it']
    """
    table = read_audiocaps(dataset_root_json)
    spoken = [column for column in table if "caption" in column]
    repeated = table.path.duplicated(keep=False)
    rows = [
        (row["split"], row["path"], problem)
        for row, twice in zip(_rows(table), repeated, strict=True)
        for problem in _problems(row, spoken, twice)
    ]
    return pd.DataFrame(rows, columns=["split", "path", "problem"])


def _problems(row, spoken, twice):
    if twice:
        yield "is named more than once"
    if not spoken or any(not str(row[key]).strip() or pd.isna(row[key]) for key in spoken):
        yield "has an empty caption"
    try:
        audio.check_audio(audio.load_audio(row["path"])[0], row["path"])
    except audio.AudioError as error:
        yield str(error).removeprefix(f"{row['path']}: ")


# --- leaks ------------------------------------------------------------------------------------

# What two splits must not share, and the columns that tell: an event's recording may turn up as
# another mix's background, so both sides are taken together.
_SHARED = {
    "foreground sources": ["foreground_source"],
    "scene locations": ["background_source"],
    "sources, once as event and once as scene": ["foreground_source", "background_source"],
    "recordings": ["foreground", "background"],
    "mixed files": ["path"],
}


def check_leaks(mixes):
    """Make sure that no split has heard what another one consists of.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of mixes.

    Returns
    -------
    None
        If nothing is shared.

    Raises
    ------
    LeakError
        Two splits share a foreground source, a scene location, a recording or a mixed file; the
        message says which splits, what, and names the first few.

    Examples
    --------
    >>> names = ["foreground", "foreground_source", "background", "background_source", "path"]
    >>> mixes = pd.DataFrame({name: [f"{name} 1", f"{name} 2"] for name in names})
    >>> check_leaks(mixes.assign(split=["train", "test"]))
    >>> check_leaks(mixes.assign(split=["train", "test"], background_source="lyon-3"))
    Traceback (most recent call last):
    soundscapes_utils.metadata.LeakError: train and test share 1 scene locations (lyon-3)
    """
    found = []
    for one, other in itertools.combinations(mixes.split.unique(), 2):
        seen = set()
        for what, columns in _SHARED.items():
            sides = (mixes[mixes.split == split] for split in (one, other))
            first, second = ({str(v) for c in columns for v in side[c]} for side in sides)
            # a source that was named as event or as scene is not named a second time
            shared = sorted((first & second) - seen)
            seen |= set(shared)
            if shared:
                listed = ", ".join(shared[:_SHOWN]) + (", …" if len(shared) > _SHOWN else "")
                found.append(f"{one} and {other} share {len(shared)} {what} ({listed})")
    if found:
        raise LeakError("; ".join(found))
