"""The files that others read, and the checks that keep a data set honest.

:func:`write_audiocaps` writes what AudioLDM's trainer (haoheliu/AudioLDM-training-finetuning)
expects: one JSON a split, a CSV of class labels, and ``dataset_root.json`` that points to them.
:func:`write_audiofolder`, :func:`write_strong_labels` and :func:`write_jams` say the same to Hugging
Face datasets, to tools of sound event detection and to readers of scaper's annotations;
:func:`write_metadata` writes all four. :func:`read_audiocaps`, :func:`read_jams` and
:func:`validate` read them back; :func:`check_leaks` makes sure that no split has heard another's
recordings.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

from soundscapes_utils import audio, store
from soundscapes_utils.captions import caption_columns, event_labels, tidy

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
    "door_wood_creaks": "/m/07qh7jl",
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
FOLDER_FILE = "metadata.jsonl"
JAMS_FOLDER = "jams"
# times in the tables are rounded to milliseconds
_ROUNDED_S = 1e-3
# the release of the format that the files follow
_JAMS_VERSION = "0.3.5"
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
    >>> mix = {"split": "test", "label": "dog", "scene": "park", "caption": "a dog"}
    >>> root = write_audiocaps(pd.DataFrame([mix | {"path": path}]), folder, "scenes")
    >>> root.name, validate(root).empty
    ('dataset_root.json', True)
    >>> read_audiocaps(root).drop(columns="path").to_numpy().tolist()
    [['test', 'dog, park', 'a dog']]
    """
    _refuse_unrendered(mixes)
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


def _refuse_unrendered(mixes):
    if mixes.empty:
        raise MetadataError("no mixes to describe; plan and render some first")
    gone = [path for path in mixes.path if not Path(path).is_file()]
    if gone:
        raise MetadataError(
            f"{len(gone)} of {len(mixes)} mixes have no file ({gone[0]}); render them first"
        )


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
    return [name for name in (*event_labels(row), row["scene"]) if name and name == name]


def _write_json(path, content):
    _write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _write_text(path, text):
    try:
        store.write_atomic(path, text.encode())
    except audio.AudioError as error:
        raise MetadataError(str(error)) from error


def write_metadata(mixes, out_dir, name, events=None):
    """Write a set's metadata in every format at once.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`~soundscapes_utils.mixing.render_mixes`.
    out_dir : str or Path
        Gets the files of :func:`write_audiocaps` and :func:`write_strong_labels`, and a folder
        ``jams``; :func:`write_audiofolder` writes beside the clips.
    name : str
        Of the data set.
    events : pandas.DataFrame, optional
        As in :func:`write_jams`.

    Returns
    -------
    Path
        ``dataset_root.json``, for :func:`validate`.

    Raises
    ------
    MetadataError
        What any of the four refuses.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "mixes" / "test" / "m-0.wav", [0.1] * 8000, 8000)
    >>> mix = {"clip_id": "m-0", "split": "test", "foreground": "dog.wav", "scene": "park"}
    >>> mix |= {"label": "dog", "source_id": "1", "background": "park.wav"}
    >>> mix |= {"onset_s": 0.2, "duration_s": 1.0, "snr_db": 6.0, "caption": "a dog", "path": path}
    >>> mix |= {"active_start_s": 0.1, "active_end_s": 0.5, "foreground_gain_db": 0.0}
    >>> root = write_metadata(pd.DataFrame([mix]), folder / "metadata", "scenes")
    >>> sorted(file.name for file in root.parent.rglob("*.*"))  # doctest: +NORMALIZE_WHITESPACE
    ['class_labels_indices.csv', 'dataset_root.json', 'm-0.jams', 'scenes_test.json',
     'scenes_test_durations.tsv', 'scenes_test_strong.tsv']
    >>> validate(root, sample_rate=8000, duration_s=1.0).empty
    True
    """
    events = _events(mixes, events)
    root = write_audiocaps(mixes, out_dir, name)
    write_audiofolder(mixes)
    write_strong_labels(mixes, out_dir, name, events)
    write_jams(mixes, root.parent / JAMS_FOLDER, events)
    return root


def write_audiofolder(mixes):
    """Write ``metadata.jsonl`` beside the clips of each split, for Hugging Face's AudioFolder.

    ``datasets.load_dataset("audiofolder", data_dir=…)`` then finds splits, captions and labels; the
    folder is the one that holds the folders of the splits.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`~soundscapes_utils.mixing.render_mixes`; every split lies in a folder of its
        own, named so that AudioFolder knows it (train, val, test).

    Returns
    -------
    list of Path
        The files, one a split. A row names its clip (``file_name``), all captions, the class of
        the first event (``label``) and of all (``events``), the scene, the onset and the SNR.

    Raises
    ------
    MetadataError
        No mixes, mixes that have not been rendered, splits that share a folder, or a disk that
        refuses.

    Examples
    --------
    >>> import tempfile
    >>> path = audio.save_audio(Path(tempfile.mkdtemp()) / "test" / "m-0.wav", [0.1, 0.2], 16000)
    >>> mix = {"split": "test", "label": "dog", "scene": "park", "caption": "a dog"}
    >>> (file,) = write_audiofolder(pd.DataFrame([mix | {"path": path}]))
    >>> json.loads(file.read_text())["file_name"]
    'm-0.wav'
    """
    _refuse_unrendered(mixes)
    folders = _split_folders(mixes)
    spoken = caption_columns(mixes)
    told = [
        name for name in ("clip_id", "scene", "onset_s", "duration_s", "snr_db") if name in mixes
    ]
    for split, folder in folders.items():
        rows = [
            {"file_name": Path(row["path"]).resolve().relative_to(folder).as_posix()}
            | {"label": row["label"], "events": event_labels(row)}
            | {name: _plain(row[name]) for name in (*told, *spoken)}
            for row in _rows(mixes[mixes.split == split])
        ]
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
        _write_text(folder / FOLDER_FILE, "\n".join(lines) + "\n")
    return [folder / FOLDER_FILE for folder in folders.values()]


def _folder(paths):
    return Path(os.path.commonpath({str(Path(path).resolve().parent) for path in paths}))


def _split_folders(mixes):
    folders = {split: _folder(paths) for split, paths in mixes.groupby("split", sort=False)["path"]}
    for (one, first), (other, second) in itertools.combinations(folders.items(), 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise MetadataError(
                f"the clips of {one} and {other} lie in one folder ({second}), and AudioFolder "
                "tells splits by folder; render each split into a folder of its own"
            )
    return folders


def _plain(value):
    # JSON has no NaN, and numpy's numbers are none of its own
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, os.PathLike):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _events(mixes, events):
    from soundscapes_utils import mixing

    # the first file alone tells too late that a set has not been rendered
    _refuse_unrendered(mixes)
    return mixing.events_table(mixes) if events is None else events


def write_strong_labels(mixes, out_dir, name, events=None):
    """Write what sounds when, as tools of sound event detection read it.

    The columns ``filename, onset, offset, event_label`` are those of DCASE task 4, which
    ``dcase_util``, ``sed_eval``, ``sed_scores_eval`` and ``psds_eval`` read; the last two ask for
    the second table, ``filename, duration``, too.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`~soundscapes_utils.mixing.render_mixes`.
    out_dir : str or Path
        Gets ``<name>_<split>_strong.tsv`` and ``<name>_<split>_durations.tsv``.
    name : str
        Of the data set.
    events : pandas.DataFrame, optional
        As in :func:`write_jams`.

    Returns
    -------
    dict of str to Path
        The table of events of each split. Files are named relative to the split's folder; a mix
        in which nothing sounds has a row with its name alone.

    Raises
    ------
    MetadataError
        No mixes, mixes that have not been rendered, or a disk that refuses.

    Examples
    --------
    >>> import tempfile
    >>> path = audio.save_audio(Path(tempfile.mkdtemp()) / "test" / "m-0.wav", [0.1, 0.2], 16000)
    >>> mix = {"clip_id": "m-0", "split": "test", "duration_s": 10.0, "path": path}
    >>> events = pd.DataFrame({"clip_id": ["m-0"], "label": "dog", "onset_s": 1.5, "offset_s": 2.25})
    >>> files = write_strong_labels(pd.DataFrame([mix]), tempfile.mkdtemp(), "scenes", events)
    >>> files["test"].read_text().split()
    ['filename', 'onset', 'offset', 'event_label', 'm-0.wav', '1.500', '2.250', 'dog']
    """
    events = _events(mixes, events).set_index("clip_id")
    paths = {}
    for split, rows in mixes.groupby("split", sort=False):
        folder = _folder(rows.path)
        files = {
            row["clip_id"]: Path(row["path"]).resolve().relative_to(folder).as_posix()
            for row in _rows(rows)
        }
        named = pd.Series(files, name="filename").rename_axis("clip_id").to_frame()
        strong = named.join(events[["onset_s", "offset_s", "label"]])
        strong.columns = ["filename", "onset", "offset", "event_label"]
        lengths = pd.DataFrame({"filename": files.values(), "duration": rows.duration_s.tolist()})
        paths[split] = Path(out_dir) / f"{name}_{split}_strong.tsv"
        # in order of time within a file, as published tables are
        strong = strong.sort_values(["filename", "onset", "offset"], kind="stable")
        _write_text(paths[split], strong.to_csv(sep="\t", index=False, float_format="%.3f"))
        durations = Path(out_dir) / f"{name}_{split}_durations.tsv"
        _write_text(durations, lengths.to_csv(sep="\t", index=False))
    return paths


def write_jams(mixes, out_dir, events=None):
    """Write a JAMS file for each mix, in scaper's namespace, and with the recipe in it.

    ``jams.load`` reads and validates them (jams ≥ 0.3 knows the namespace ``scaper``). The first
    observation is the background, then come the foreground events, as scaper has it; each has its
    onset, duration, label, source and SNR. The row of the mixes table is kept in the sandbox.

    Parameters
    ----------
    mixes : pandas.DataFrame
        From :func:`~soundscapes_utils.mixing.render_mixes`.
    out_dir : str or Path
        Gets ``<split>/<clip_id>.jams``; the folder of the clips puts them beside these.
    events : pandas.DataFrame, optional
        From :func:`~soundscapes_utils.mixing.events_table`, which is called where it is not given:
        ``clip_id, event, repetition, label, foreground, onset_s, offset_s, snr_db``.

    Returns
    -------
    list of Path
        One file a mix, in the order of the table.

    Raises
    ------
    MetadataError
        No mixes, mixes that have not been rendered, or a disk that refuses.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "test" / "m-0.wav", [0.1, 0.2], 16000)
    >>> mix = {"clip_id": "m-0", "split": "test", "label": "dog", "foreground": "dog.wav"}
    >>> mix |= {"scene": "park", "background": "park.wav", "onset_s": 1.0, "duration_s": 10.0}
    >>> event = {"clip_id": "m-0", "event": 0, "repetition": 0, "label": "dog", "snr_db": 6.0}
    >>> event |= {"foreground": "dog.wav", "onset_s": 1.5, "offset_s": 2.25}
    >>> mixes, events = pd.DataFrame([mix | {"path": path}]), pd.DataFrame([event])
    >>> (file,) = write_jams(mixes, folder, events)
    >>> [o["value"]["label"] for o in json.loads(file.read_text())["annotations"][0]["data"]]
    ['park', 'dog']
    >>> read_jams(folder).onset_s.tolist()
    [1.0]
    """
    sounding = {clip_id: _rows(rows) for clip_id, rows in _events(mixes, events).groupby("clip_id")}
    files = []
    for mix in _rows(mixes):
        file = Path(out_dir) / mix["split"] / f"{mix['clip_id']}.jams"
        content = _jams(mix, sounding.get(mix["clip_id"], []))
        _write_text(file, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
        files.append(file)
    return files


def _jams(mix, events):
    duration = float(mix["duration_s"])
    # plain JSON: the library jams takes seconds to import and is needed by readers only
    return {
        "annotations": [
            {
                "namespace": "scaper",
                "time": 0.0,
                "duration": duration,
                "annotation_metadata": {"annotation_tools": "soundscapes_utils"},
                "data": [_background(mix, duration), *_foregrounds(mix, events)],
                "sandbox": {
                    "scaper": {
                        "duration": duration,
                        "n_events": len(events),
                        "soundscape_audio_path": str(mix["path"]),
                    }
                },
            }
        ],
        "file_metadata": {
            "title": mix["clip_id"],
            "artist": "",
            "release": "",
            "duration": duration,
            "identifiers": {},
            "jams_version": _JAMS_VERSION,
        },
        "sandbox": {"mix": {key: _plain(value) for key, value in mix.items()}},
    }


def _background(mix, duration):
    return _observation("background", mix["scene"], mix["background"], 0.0, 0.0, duration, 0.0)


def _foregrounds(mix, events):
    from soundscapes_utils import mixing

    begins = [e["onset_s"] for e in (mix, *mixing.further_events(mix.get("events")))]
    skipped = {}
    for event in events:
        # how much of its clip lies before the sound; the same in every repetition
        skipped.setdefault(event["event"], event["onset_s"] - begins[event["event"]])
        length = event["offset_s"] - event["onset_s"]
        source_time = max(0.0, round(skipped[event["event"]], 4))
        yield _observation(
            "foreground",
            event["label"],
            event["foreground"],
            source_time,
            event["onset_s"],
            round(length, 4),
            event["snr_db"],
        )


def _observation(role, label, source, source_time, onset, duration, snr):
    value = {
        "label": label,
        "source_file": str(source),
        "source_time": source_time,
        "event_time": onset,
        "event_duration": duration,
        "role": role,
        "pitch_shift": None,
        "time_stretch": None,
    }
    # the namespace wants a number; a level that nobody knows is left out
    value |= {"snr": float(snr)} if _plain(float(snr)) is not None else {}
    return {"time": onset, "duration": duration, "value": value, "confidence": 1.0}


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
    audio_root, _, files, names = _read_root(Path(dataset_root_json))
    rows = []
    for split, path in files.items():
        for entry in _entries(path):
            for fault in _entry_faults(entry, names):
                raise MetadataError(f"{path}: {fault}")
            rows.append(_clip(entry, split, audio_root, names))
    return pd.DataFrame(rows)


def _read_root(root_file):
    """Folder of the audio, name of the set, split files, display names by id."""
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
    splits = {
        split: root_file.parent / path
        for split, path in files.items()
        if split != "class_label_indices"
    }
    return audio_root, name, splits, names


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
    for number, entry in enumerate(content["data"], start=1):
        if not isinstance(entry, dict):
            raise MetadataError(f"{path}: entry {number} is no object; write it again")
    return content["data"]


def _entry_faults(entry, names):
    wav, mids = str(entry.get("wav", "")), str(entry.get("labels", "")).split(",")
    if not wav or PurePosixPath(wav).is_absolute():
        yield f"wav {wav!r} must be a path relative to the audio folder"
    for mid in mids:
        if mid not in names:
            yield f"label {mid!r} of {wav} is not in the class table"


def _clip(entry, split, audio_root, names):
    spoken = {key: text for key, text in entry.items() if "caption" in key}
    labels = ", ".join(names.get(mid, mid) for mid in str(entry.get("labels", "")).split(","))
    path = str(audio_root / str(entry.get("wav", "")))
    return {"split": split, "path": path, "labels": labels} | spoken


def read_jams(folder):
    """Read the recipes back that :func:`write_jams` has kept in its files.

    Parameters
    ----------
    folder : str or Path
        All ``.jams`` files in it and below are read, in order of their path.

    Returns
    -------
    pandas.DataFrame
        Table of mixes; rendered again it gives the same files, wherever they are to lie.

    Raises
    ------
    MetadataError
        No such files, or one that is no JAMS file with a recipe.

    Examples
    --------
    >>> read_jams("nowhere")
    Traceback (most recent call last):
    soundscapes_utils.metadata.MetadataError: nowhere: holds no .jams file; write some with \
metadata.write_jams
    """
    files = sorted(Path(folder).rglob("*.jams"))
    if not files:
        raise MetadataError(f"{folder}: holds no .jams file; write some with metadata.write_jams")
    rows = []
    for file in files:
        content = _read_json(file)
        try:
            rows.append(dict(content["sandbox"]["mix"]))
        except (KeyError, TypeError, ValueError) as error:
            raise MetadataError(
                f"{file}: holds no recipe ({error!r}); write it again with metadata.write_jams"
            ) from error
    return pd.DataFrame(rows)


# --- validating -------------------------------------------------------------------------------


def validate(dataset_root_json, *, sample_rate=None, duration_s=None, full=True):
    """Open every file that a data set's metadata names, and report what is wrong.

    Where they are there, the other formats of :func:`write_metadata` are read back too and held
    against the split files and the clips.

    Parameters
    ----------
    dataset_root_json : str or Path
        See :func:`read_audiocaps`.
    sample_rate : int, optional
        Hz that every clip must have.
    duration_s : float, optional
        Seconds that every clip must last, to the sample.
    full : bool
        Read every clip to its end, which finds silence and samples that are not finite; False
        reads the headers only.

    Returns
    -------
    pandas.DataFrame
        Columns ``split, path, problem``; empty if all is well. Split files that are missing or
        damaged, paths that are not relative, labels that the class table does not list, captions
        that are empty, files that two splits or two entries name; clips that are missing,
        unreadable, silent, of another rate or length; rows of ``metadata.jsonl``, of the strong
        labels and of JAMS files that contradict them.

    Raises
    ------
    MetadataError
        ``dataset_root.json`` or the class table cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = audio.save_audio(folder / "mixes" / "test" / "mix.wav", [0.0, 0.0], 16000)
    >>> mix = {"split": "test", "label": "dog", "scene": "park", "caption": "a dog"}
    >>> root = write_audiocaps(pd.DataFrame([mix | {"path": path}]), folder, "scenes")
    >>> validate(root).problem.tolist()
    ['is silent; leave it out or replace it']
    >>> validate(root, sample_rate=44100, full=False).problem.tolist()
    ['has 16000 Hz instead of 44100 Hz']
    """
    root_file = Path(dataset_root_json)
    audio_root, name, files, names = _read_root(root_file)
    rows, clips = [], []
    for split, path in files.items():
        try:
            entries = _entries(path)
        except MetadataError as error:
            rows.append((split, str(path), str(error).removeprefix(f"{path}: ")))
            continue
        clips += [
            (_clip(e, split, audio_root, names), list(_entry_faults(e, names))) for e in entries
        ]
    times = Counter(clip["path"] for clip, _ in clips)
    for clip, faults in clips:
        wrong, clip["seconds"] = _sound_problems(clip["path"], sample_rate, duration_s, full)
        texts = [*faults, *_text_problems(clip, times[clip["path"]] > 1), *wrong]
        rows += [(clip["split"], clip["path"], text) for text in texts]
    clips = [clip for clip, _ in clips]
    rows += _folder_problems(audio_root, clips)
    for split in files:
        own = {Path(clip["path"]).stem: clip for clip in clips if clip["split"] == split}
        strong = root_file.parent / f"{name}_{split}_strong.tsv"
        found = _strong_problems(strong, own, set(names.values())) if strong.is_file() else []
        for file in sorted((root_file.parent / JAMS_FOLDER / split).glob("*.jams")):
            found += [(file, text) for text in _jams_problems(file, own)]
        rows += [(split, str(file), text) for file, text in found]
    return pd.DataFrame(rows, columns=["split", "path", "problem"])


def _text_problems(clip, twice):
    if twice:
        yield "is named more than once"
    texts = [text for key, text in clip.items() if "caption" in key]
    if not texts or any(pd.isna(text) or not str(text).strip() for text in texts):
        yield "has an empty caption"


def _sound_problems(path, sample_rate, duration_s, full):
    """What is wrong with a clip, and its length in seconds (None if it cannot be read)."""
    problems = []
    try:
        if full:
            y, rate = audio.load_audio(path)
            samples = y.size
        else:
            samples, rate = audio.read_header(path)
    except audio.AudioError as error:
        return [str(error).removeprefix(f"{path}: ")], None
    if full:
        try:
            audio.check_audio(y, path)
        except audio.AudioError as error:
            problems.append(str(error).removeprefix(f"{path}: "))
    if sample_rate is not None and rate != sample_rate:
        problems.append(f"has {rate} Hz instead of {sample_rate} Hz")
    if duration_s is not None and samples != round(duration_s * rate):
        problems.append(f"has {samples} samples instead of {round(duration_s * rate)}")
    return problems, samples / rate


def _folder_problems(audio_root, clips):
    """Hold what AudioFolder reads against the split files."""
    known = {Path(clip["path"]).resolve(): clip for clip in clips}
    rows = []
    root = Path(audio_root).resolve()
    # beside the clips or above them: the folder may be one of many in somebody's collection
    folders = {folder for path in known for folder in path.parents if folder.is_relative_to(root)}
    for file in sorted(folder / FOLDER_FILE for folder in folders):
        if not file.is_file():
            continue
        named = set()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                path = (file.parent / row["file_name"]).resolve()
            except (ValueError, KeyError, TypeError) as error:
                rows.append(("", str(file), f"line {number}: names no file ({error!r})"))
                continue
            named.add(path)
            clip = known.get(path)
            if clip is None:
                rows.append(("", str(file), f"line {number}: {row['file_name']} is in no split"))
            elif any(row.get(key) != text for key, text in clip.items() if "caption" in key):
                rows.append((clip["split"], str(file), f"line {number}: other captions"))
        left = [clip for path, clip in known.items() if file.parent in path.parents]
        rows += [
            (clip["split"], clip["path"], f"is not in {FOLDER_FILE}; write it again")
            for clip in left
            if Path(clip["path"]).resolve() not in named
        ]
    return rows


def _strong_problems(file, clips, names):
    table = pd.read_csv(file, sep="\t", keep_default_na=False, dtype=str)
    wanted = ["filename", "onset", "offset", "event_label"]
    if table.columns.tolist() != wanted:
        return [(file, f"has columns {', '.join(table)} instead of {', '.join(wanted)}")]
    named = table.filename.map(lambda text: PurePosixPath(text).stem)
    problems = [(file, f"has no row for {stem}") for stem in clips if stem not in set(named)]
    for line, (row, stem) in enumerate(zip(_rows(table), named, strict=True), start=2):
        if stem not in clips:
            problems.append((file, f"line {line}: {row['filename']} is not in the split"))
        elif row["event_label"] and tidy(row["event_label"]) not in names:
            problems.append((file, f"line {line}: {row['event_label']} is not in the class table"))
        elif row["event_label"]:
            text = _span_problem(row["onset"], row["offset"], clips[stem]["seconds"])
            problems += [(file, f"line {line}: {text}")] if text else []
    return problems


def _jams_problems(file, clips):
    if file.stem not in clips:
        return ["belongs to no clip of the split"]
    seconds = clips[file.stem]["seconds"]
    try:
        content = _read_json(file)
        told = float(content["file_metadata"]["duration"])
        spans = [(o["time"], o["time"] + o["duration"]) for o in content["annotations"][0]["data"]]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return [f"cannot be read ({error}); write it again with metadata.write_jams"]
    problems = []
    if seconds is not None and abs(told - seconds) > _ROUNDED_S:
        problems.append(f"speaks of {told:g} s, its clip lasts {seconds:g} s")
    return problems + [text for span in spans if (text := _span_problem(*span, told))]


def _span_problem(onset, offset, seconds):
    try:
        onset, offset = float(onset), float(offset)
    except ValueError:
        return f"{onset!r} to {offset!r} is no span of time"
    end = math.inf if seconds is None else seconds + _ROUNDED_S
    return None if 0 <= onset < offset <= end else f"an event from {onset:g} to {offset:g} s"


# --- leaks ------------------------------------------------------------------------------------

# What two splits must not share, and the columns that tell: an event's recording may turn up as
# another mix's background, so both sides are taken together.
_SHARED = {
    "foreground sources": ["source_id"],
    "scene locations": ["background_source"],
    "sources, once as event and once as scene": ["source_id", "background_source"],
    "recordings": ["foreground", "background"],
    "mixed files": ["path"],
}


def check_leaks(mixes, *, cities=False, contents=False):
    """Make sure that no split has heard what another one consists of.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of mixes; further foreground events (``events``) count like the first.
    cities : bool
        Splits may not share a city either: the part of ``background_source`` before its hyphen,
        as TAU names its locations ("lyon-1029"). Splits by fold keep to it, TAU's official split,
        which is by location, does not.
    contents : bool
        Read every recording, and every mix that has been rendered, and compare the samples: finds
        the same sound under another name, or in another lossless format.

    Returns
    -------
    None
        If nothing is shared.

    Raises
    ------
    LeakError
        Two splits share a foreground source, a scene location, a recording, a mixed file, a city
        or the content of a file; the message says which splits, what, and names the first few.
        Two splits of the very same mixes (validation that is the test set) are called that.
    AudioError
        With `contents`, a recording that cannot be read.

    Examples
    --------
    >>> names = ["foreground", "source_id", "background", "background_source", "path"]
    >>> mixes = pd.DataFrame({name: [f"{name} 1", f"{name} 2"] for name in names})
    >>> check_leaks(mixes.assign(split=["train", "test"]))
    >>> check_leaks(mixes.assign(split=["train", "test"], background_source="lyon-3"))
    Traceback (most recent call last):
    soundscapes_utils.metadata.LeakError: train and test share 1 scene locations (lyon-3)
    """
    kinds = _SHARED | ({"cities": ["city"]} if cities else {})
    sides = {split: _heard(rows, cities) for split, rows in mixes.groupby("split", sort=False)}
    digests = _digests(sides) if contents else {}
    found = []
    for (one, first), (other, second) in itertools.combinations(sides.items(), 2):
        if first["pairs"] == second["pairs"]:
            found.append(f"{one} and {other} are the same mixes")
        seen = set()
        for what, columns in kinds.items():
            shared = set.intersection(
                *({v for c in columns for v in s[c]} for s in (first, second))
            )
            # a source that was named as event or as scene is not named a second time
            shared -= seen
            seen |= shared
            if shared:
                found.append(f"{one} and {other} share {len(shared)} {what} ({_some(shared)})")
        if contents:
            twins = _twins(digests[one], digests[other])
            if twins:
                found.append(
                    f"{one} and {other} share the sound of {len(twins)} files ({_some(twins)})"
                )
    if found:
        raise LeakError("; ".join(found))


def _some(names):
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _heard(mixes, cities):
    """Everything that the mixes of a split consist of: a set of texts for each column."""
    from soundscapes_utils import mixing

    columns = sorted({column for columns in _SHARED.values() for column in columns})
    heard = {column: {str(value) for value in mixes[column]} for column in columns}
    for cell in mixes.get("events", ()):
        for event in mixing.further_events(cell):
            heard["foreground"].add(str(event["foreground"]))
            heard["source_id"].add(str(event["source_id"]))
    heard["pairs"] = set(zip(mixes.foreground, mixes.background, strict=True))
    if cities:
        heard["city"] = {source.partition("-")[0] for source in heard["background_source"]}
    return heard


def _digests(sides):
    """Digest of the samples → files of a split that hold them."""
    known, found = {}, {}
    for split, heard in sides.items():
        found[split] = {}
        rendered = {path for path in heard["path"] if Path(path).is_file()}
        for path in sorted(heard["foreground"] | heard["background"] | rendered):
            if path not in known:
                y, rate = audio.load_audio(path)
                known[path] = hashlib.sha256(rate.to_bytes(4, "big") + y.tobytes()).digest()
            found[split].setdefault(known[path], []).append(path)
    return found


def _twins(first, second):
    # one and the same path is a shared recording, and named as such
    return {
        f"{a} = {b}"
        for digest in first.keys() & second.keys()
        for a, b in itertools.product(first[digest], second[digest])
        if a != b
    }
