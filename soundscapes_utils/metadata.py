"""The files that others read, and the checks that keep a data set honest.

:func:`write_audiocaps` writes what AudioLDM's trainer (haoheliu/AudioLDM-training-finetuning)
expects: one JSON per split, a CSV of class labels, and ``dataset_root.json`` that points to them;
:func:`write_metadata` adds scaper's JAMS and Hugging Face's ``metadata.jsonl``. :func:`read_audiocaps`
and :func:`validate` read them back; :func:`check_leaks` makes sure that no split shares another's
recordings.
"""

import csv
import itertools
import json
import math
import os
import unicodedata
from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

from soundscapes_utils import audio, captions, mixing, store

OWN_ID = "/own/"
CLASS_FILE = "class_labels_indices.csv"
ROOT_FILE = "dataset_root.json"
FOLDER_FILE = "metadata.jsonl"
JAMS_FOLDER = "jams"
_RESERVED = ("comments", "metadata")
# what other people's tables of captions call these columns
_ALSO = {"path": ("audio", "file_name", "filename"), "caption": ("text", "caption_1")}
# times in the tables are rounded to milliseconds
_ROUNDED_S = 1e-3
# the release of the format that the files follow
_JAMS_VERSION = "0.3.5"
_SHOWN = 5


class MetadataError(store.DataError):
    """Metadata that cannot be written or read; the message names the file and the remedy."""


class LeakError(store.DataError):
    """Two splits share a source, a recording or a scene location; the message names them."""


# --- writing ----------------------------------------------------------------------------------


def write_audiocaps(mixes, out_dir, name, events=None):
    """Write the metadata of a set of rendered mixes for AudioLDM's trainer.

    `out_dir` gets ``<name>_<split>.json``, ``class_labels_indices.csv`` and ``dataset_root.json``, whose
    path is returned. The folders in it are absolute, as the trainer takes them; the clips are named
    relative to the folder of the audio.

    Parameters
    ----------
    mixes : pandas.DataFrame
        With ``split, path, label, scene, caption``; a clip of a single event has an empty scene.
    out_dir : str or Path
    name : str
        The data set's name in ``dataset_root.json``.
    events : pandas.DataFrame, optional
        Of :func:`~soundscapes_utils.mixing.plan_scenes`, where mixes have several.

    Examples
    --------
    >>> from tempfile import mkdtemp
    >>> path = audio.save_audio(Path(mkdtemp(), "test", "mix.wav"), [0.1, 0.2], 16000)
    >>> mix = {"split": "test", "label": "dog", "scene": "park", "caption": "a dog", "path": path}
    >>> root = write_audiocaps(pd.DataFrame([mix]), mkdtemp(), "scenes")
    >>> read_audiocaps(root).drop(columns="path").to_numpy().tolist()
    [['test', 'dog, park', 'a dog']]
    """
    gone = [path for path in mixes["path"] if not Path(path).is_file()]
    if gone or mixes.empty:
        some = f"{len(gone)} of {len(mixes)} mixes have no file ({gone[0]})" if gone else "no mixes"
        raise MetadataError(f"{some}; plan and render them first")
    store.check_rows(pd.DataFrame({"name": [name]}), "the data set", name="a name")
    if name in _RESERVED:
        raise MetadataError(f"a data set cannot be called {name!r}: {ROOT_FILE} has a key of that name")
    out_dir = _absolute(out_dir)
    audio_root = _folder(mixes["path"])
    if all(_absolute(path).parent == audio_root for path in mixes["path"]):
        audio_root = audio_root.parent  # a set of one split keeps its split's folder
    names = _label_lists(mixes, events)
    forms = captions.caption_columns(mixes)
    entries = {split: [] for split in mixes["split"]}
    for row, labels in zip(mixes.to_dict("records"), names, strict=True):
        wav = _absolute(row["path"]).relative_to(audio_root).as_posix()
        mids = ",".join(dict.fromkeys(map(_mid, labels)))
        texts = {name: row[name] for name in ("source_id", *forms) if _is_said(row.get(name))}
        entries[row["split"]].append({"wav": wav, "labels": mids} | texts)
    paths = {split: str(out_dir / f"{name}_{split}.json") for split in entries}
    for split, path in paths.items():
        store.write_atomic(path, _json({"data": entries[split]}, indent=1) + "\n")
    classes = sorted(set(itertools.chain(*names)))
    table = {"mid": map(_mid, classes), "display_name": map(captions.tidy, classes)}
    table = pd.DataFrame(table).rename_axis("index").to_csv(quoting=csv.QUOTE_MINIMAL)
    store.write_atomic(out_dir / CLASS_FILE, table)
    paths["class_label_indices"] = str(out_dir / CLASS_FILE)
    root = {name: str(audio_root), "comments": {}, "metadata": {"path": {name: paths}}}
    return store.write_atomic(out_dir / ROOT_FILE, _json(root, indent=1) + "\n")


def _absolute(path):
    # not resolved: a clip that is a link into a store keeps its name
    return Path(os.path.abspath(path))  # noqa: PTH100


def _folder(paths):
    return Path(os.path.commonpath({_absolute(path).parent for path in paths}))


def read_heard(texts):
    """Read the column ``heard`` of generated clips: the folds that their model knew, by data set.

    >>> read_heard(pd.Series(["esc10:2,3;own:1", None, "esc10:4"]))
    {'esc10': {2, 3, 4}, 'own': {1}}
    """
    heard = {}
    for part in filter(None, ";".join(texts.fillna("").unique()).split(";")):
        name, _, folds = part.partition(":")
        heard.setdefault(name, set()).update(map(int, folds.split(",")))
    return heard


def _is_said(text):
    return isinstance(text, str) and bool(text.strip())


def _label_lists(mixes, events):
    """Labels of all events of each mix, and its scene where it has one."""
    names = [[event["label"] for event in sounding] for sounding in mixing.events_of(mixes, events)]
    for labels, scene in zip(names, mixes["scene"], strict=True):
        labels += [scene] if isinstance(scene, str) and scene else []
    return names


def _mid(label):
    """AudioSet's id of a class; where AudioSet has none of that meaning, one of the project's own."""
    words = captions.EVENTS.get(label) or captions.SCENES.get(label) or {}
    # the trainer splits the labels of a clip at commas
    own = OWN_ID + captions.tidy(label).replace(" ", "_").replace(",", "")
    return words.get("audioset") or own


def _json(content, indent=None):
    return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)


def write_metadata(mixes, out_dir, name, events=None):
    """Write a set's metadata in every format at once.

    AudioCaps JSON as :func:`write_audiocaps`, whose path is returned; ``jams/<split>/<clip_id>.jams`` in
    scaper's namespace, with the row of the table of mixes in its sandbox; and next to the clips of each
    split ``metadata.jsonl``, for ``datasets.load_dataset("audiofolder")``, which tells splits by folder.
    """
    root = write_audiocaps(mixes, out_dir, name, events)
    _write_audiofolder(mixes, events)
    _write_jams(mixes, root.parent / JAMS_FOLDER, events)
    return root


def _write_audiofolder(mixes, events):
    folders = mixes.groupby("split", sort=False)["path"].agg(_folder)
    for (one, first), (other, second) in itertools.combinations(folders.items(), 2):
        if first.is_relative_to(second) or second.is_relative_to(first):
            raise MetadataError(
                f"the clips of {one} and {other} lie in one folder ({second}), and AudioFolder "
                "tells splits by folder; render each split into a folder of its own"
            )
    shown = ["clip_id", "scene", "onset_s", "duration_s", "snr_db"]
    shown += captions.caption_columns(mixes)
    lines = {split: [] for split in folders.index}
    for row, sounding in zip(mixes.to_dict("records"), mixing.events_of(mixes, events), strict=True):
        file = _absolute(row["path"]).relative_to(folders[row["split"]]).as_posix()
        labels = [event["label"] for event in sounding]
        line = {"file_name": file, "label": row["label"], "events": labels}
        line |= {name: _plain(row[name]) for name in shown}
        lines[row["split"]].append(_json(line) + "\n")
    for split, folder in folders.items():
        store.write_atomic(folder / FOLDER_FILE, "".join(lines[split]))


def _plain(value):
    # JSON has no NaN, and numpy's numbers are none of its own
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_jams(mixes, folder, events):
    sounding = {clip_id: [] for clip_id in mixes["clip_id"]}
    for event in mixing.occurrences(mixes, events).to_dict("records"):
        sounding[event["clip_id"]].append(event)
    for mix in mixes.to_dict("records"):
        file = folder / mix["split"] / f"{mix['clip_id']}.jams"
        store.write_atomic(file, _json(_jams(mix, sounding[mix["clip_id"]])) + "\n")


def _jams(mix, sounding):
    # plain JSON: the library jams takes seconds to import and is needed by readers only
    seconds = float(mix["duration_s"])
    scene = {"label": mix["scene"], "foreground": mix["background"], "snr_db": 0.0}
    scene |= {"active_start_s": 0.0, "onset_s": 0.0, "offset_s": seconds}
    scaper = {"duration": seconds, "n_events": len(sounding)}
    scaper |= {"soundscape_audio_path": str(mix["path"])}
    # the background first, as scaper has it
    data = [_observation("background", scene), *(_observation("foreground", e) for e in sounding)]
    annotation = {"namespace": "scaper", "time": 0.0, "duration": seconds, "data": data}
    annotation |= {"annotation_metadata": {"annotation_tools": "soundscapes_utils"}}
    annotation |= {"sandbox": {"scaper": scaper}}
    about = {"title": mix["clip_id"], "artist": "", "release": "", "duration": seconds}
    about |= {"identifiers": {}, "jams_version": _JAMS_VERSION}
    recipe = {name: _plain(value) for name, value in mix.items()}
    return {"annotations": [annotation], "file_metadata": about, "sandbox": {"mix": recipe}}


def _observation(role, event):
    onset, seconds = event["onset_s"], round(event["offset_s"] - event["onset_s"], 4)
    value = {"label": event["label"], "role": role, "source_file": str(event["foreground"])}
    value |= {"source_time": event["active_start_s"], "event_time": onset}
    value |= {"event_duration": seconds, "pitch_shift": None, "time_stretch": None}
    # the namespace wants a number; a level that nobody knows is left out
    value |= {"snr": float(event["snr_db"])} if _plain(event["snr_db"]) is not None else {}
    return {"time": onset, "duration": seconds, "value": value, "confidence": 1.0}


# --- reading ----------------------------------------------------------------------------------


def read_audiocaps(dataset_root_json):
    """Read a data set in AudioCaps format back from its ``dataset_root.json``.

    Returns one row per clip: ``split, path, labels`` (display names, separated by ", "), ``caption`` and
    whatever further captions there are. A file that is missing or not in the format, a path that is
    not relative, or a label that the class table does not list is a :class:`MetadataError`.
    """
    audio_root, files, names = _read_root(Path(dataset_root_json))
    clips = []
    for split, path in files.items():
        for clip, faults in _read_split(split, path, audio_root, names):
            if faults:
                raise MetadataError(f"{path}: {faults[0]}")
            clips.append(clip)
    return pd.DataFrame(clips)


def read_clips(path):
    """Read sounds and captions: ``split, path, caption, …``.

    From a ``dataset_root.json``, or a table (CSV) of ``path`` (relative to it), ``caption``,
    ``caption_2``, … and, if there are any, ``split``, ``source_id`` (what must not be in two splits) and
    further columns. Paths are also taken from ``audio``, ``file_name`` or ``filename``, captions from
    ``text`` or ``caption_1``. Without ``split``, eight sources of ten are for training, by a digest of
    their name.
    """
    path = Path(path)
    if path.suffix == ".json":
        return read_audiocaps(path)
    clips = store.read_table(path, as_text=path.suffix != ".csv")
    for name, others in _ALSO.items():
        found = [other for other in others if other in clips and name not in clips]
        clips = clips.rename(columns={other: name for other in found[:1]})
    if missing := _ALSO.keys() - set(clips):
        raise MetadataError(f"{path}: has no column {' or '.join(sorted(missing))}")
    relative = [name for name in clips["path"] if not PurePosixPath(name).is_absolute()]
    store.check_rows(pd.DataFrame({"path": relative}), path, path="a path inside")
    clips["path"] = [str(path.parent / name) for name in clips["path"]]
    source = clips.get("source_id", clips["path"].map(lambda name: Path(name).name))
    if "split" not in clips:  # by name: a source stays where it is when others come
        places = source.map(lambda name: int(store.content_key(name), 16) % 10)
        clips["split"] = places.map({0: "val", 1: "test"}).fillna("train")
        if "val" not in set(clips["split"]):  # a small table
            clips.loc[source == source[places.idxmin()], "split"] = "val"
    shared = clips.groupby(source)["split"].transform("nunique") > 1
    if shared.any():
        names = ", ".join(source[shared].unique()[:5])
        raise MetadataError(f"{path}: sources in more than one split: {names}")
    return clips


def _read_root(root_file):
    """Folder of the audio, split files, display names by id."""
    root = _read_json(root_file)
    try:
        ((name, files),) = root["metadata"]["path"].items()
        if any(".." in Path(place).parts for place in (root[name], *files.values())):
            raise ValueError("a path in it leaves its folder")
        paths = {split: root_file.parent / path for split, path in files.items()}
        table = store.read_table(paths.pop("class_label_indices"), as_text=True)
        names = dict(zip(table["mid"], table["display_name"], strict=True))
        return root_file.parent / root[name], paths, names
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MetadataError(
            f"{root_file}: not a dataset_root.json of one data set ({error!r}); write it again "
            "with metadata.write_audiocaps"
        ) from error


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MetadataError(f"{path}: no such file; run notebook 01_dataset_mixing") from error
    except ValueError as error:
        raise MetadataError(f"{path}: not JSON ({error}); write it again") from error


def _read_split(split, path, audio_root, names):
    """Clips of a split file, each with the faults of its entry."""
    content = _read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise MetadataError(f'{path}: has no list "data"; write it again')
    found = []
    for number, entry in enumerate(content["data"], start=1):
        if not isinstance(entry, dict):
            raise MetadataError(f"{path}: entry {number} is not an object; write it again")
        wav, mids = str(entry.get("wav", "")), str(entry.get("labels", "")).split(",")
        faults = [
            f"label {mid!r} of {wav} is not in the class table" for mid in mids if mid not in names
        ]
        if not wav or PurePosixPath(wav).is_absolute() or ".." in PurePosixPath(wav).parts:
            faults.insert(0, f"wav {wav!r} must be a path relative to the audio folder, inside it")
        clip = {"split": split, "path": str(audio_root / wav)}
        clip["labels"] = ", ".join(names.get(mid, mid) for mid in mids)
        clip |= {name: text for name, text in entry.items() if "caption" in name or name == "source_id"}
        found.append((clip, faults))
    return found


def validate(dataset_root_json, *, sample_rate=None, duration_s=None):
    """Open every file that a data set's metadata names, and report what is wrong.

    The table ``split, path, problem`` is empty if all is well. Otherwise it names split files that are
    missing or damaged, paths that are not relative, unknown labels, empty captions, files that two
    splits or two entries name; clips that are missing, unreadable, silent, or not of `sample_rate` (Hz)
    and `duration_s` to the sample; JAMS files that contradict them.
    """
    root_file = Path(dataset_root_json)
    audio_root, files, names = _read_root(root_file)
    rows, clips, seconds = [], [], {}
    for split, path in files.items():
        try:
            clips += _read_split(split, path, audio_root, names)
        except MetadataError as error:
            rows.append((split, str(path), str(error).removeprefix(f"{path}: ")))
    times = Counter(clip["path"] for clip, _ in clips)
    for clip, faults in clips:
        split, path = clip["split"], clip["path"]
        wrong, seconds[split, Path(path).stem] = _sound_problems(path, sample_rate, duration_s)
        texts = [text for name, text in clip.items() if "caption" in name]
        if not texts or not all(map(_is_said, texts)):
            faults.append("has an empty caption")
        if times[path] > 1:
            faults.append("is named more than once")
        rows += [(split, path, text) for text in (*faults, *wrong)]
    for split in files:
        for file in sorted((root_file.parent / JAMS_FOLDER / split).glob("*.jams")):
            rows += [(split, str(file), text) for text in _jams_problems(file, split, seconds)]
    return pd.DataFrame(rows, columns=["split", "path", "problem"])


def _sound_problems(path, sample_rate, duration_s):
    """What is wrong with a clip, and its length in seconds (None if it cannot be read)."""
    try:
        y, rate = audio.load_audio(path, silent_ok=False)
    except audio.AudioError as error:
        return [str(error).removeprefix(f"{path}: ")], None
    problems = []
    if sample_rate is not None and rate != sample_rate:
        problems.append(f"has {rate} Hz instead of {sample_rate} Hz")
    if duration_s is not None and y.size != round(duration_s * rate):
        problems.append(f"has {y.size} samples instead of {round(duration_s * rate)}")
    return problems, y.size / rate


def _jams_problems(file, split, seconds):
    if (split, file.stem) not in seconds:
        return ["belongs to no clip of the split"]
    try:
        content = _read_json(file)
        described = float(content["file_metadata"]["duration"])
        spans = [(o["time"], o["time"] + o["duration"]) for o in content["annotations"][0]["data"]]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return [f"cannot be read ({error}); write it again with metadata.write_metadata"]
    end, length = described + _ROUNDED_S, seconds[split, file.stem]
    outside = [(a, b) for a, b in spans if not 0 <= a < b <= end]
    problems = [f"an event from {a:g} to {b:g} s" for a, b in outside]
    if length is not None and abs(described - length) > _ROUNDED_S:
        problems.append(f"describes {described:g} s, its clip lasts {length:g} s")
    return problems


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


def check_leaks(mixes, events=None):
    """Make sure that no split shares with another what it consists of.

    Further events, if given, count like the first of each mix; one file in two spellings of its path
    is one recording.

    Raises
    ------
    LeakError
        Two splits share a foreground source, a scene location, a recording or a mixed file; the
        message says which splits, what, and names the first few.

    >>> names = ["foreground", "label", "source_id", "background", "background_source", "path"]
    >>> mixes = pd.DataFrame({name: [f"{name} 1", f"{name} 2"] for name in names})
    >>> check_leaks(mixes.assign(split=["train", "test"]))
    """
    splits, known = mixes.groupby("split", sort=False), {}
    parts = {split: _parts(rows, events, known) for split, rows in splits}
    leaks = []
    for (one, first), (other, second) in itertools.combinations(parts.items(), 2):
        if first["pairs"] == second["pairs"]:
            leaks.append(f"{one} and {other} are the same mixes")
        named = set()
        for what, columns in _SHARED.items():
            sides = [set().union(*(side[c] for c in columns)) for side in (first, second)]
            # a source that was named as event or as scene is not named a second time
            shared = set.intersection(*sides) - named
            named |= shared
            if shared:
                leaks.append(f"{one} and {other} share {len(shared)} {what} ({_few(shared)})")
    if leaks:
        raise LeakError("; ".join(leaks))


def _few(names):
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _parts(mixes, events, known):
    """What a split consists of, a set of texts a column; `known` keeps a file's first name."""
    parts = {c: set(mixes[c].astype(str)) for c in ("background", "background_source", "path")}
    named = mixes.filter(items=["clip_id", "n_events", "foreground", "source_id"])
    named = named.drop_duplicates([c for c in named if c != "clip_id"]) if events is None else named
    sounding = list(itertools.chain(*mixing.events_of(named, events)))
    parts |= {c: {str(event[c]) for event in sounding} for c in ("foreground", "source_id")}
    for column in ("foreground", "background", "path"):  # one file may be named in several ways
        places = {os.path.realpath(unicodedata.normalize("NFC", name)): name for name in parts[column]}
        parts[column] = {known.setdefault(place, name) for place, name in places.items()}
    return parts | {"pairs": set(zip(mixes["foreground"], mixes["background"], strict=True))}
