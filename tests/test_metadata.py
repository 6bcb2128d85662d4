import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import metadata

CAPTIONS = ["caption", "caption_2", "caption_3"]
CLASS_MAP = Path(__file__).parents[2] / "shared/models/yamnet_class_map.csv"


@pytest.fixture
def mixes(tmp_path):
    """Six rendered mixes, two a split, nothing shared."""
    rows = []
    for number, split in enumerate(["train", "train", "val", "val", "test", "test"]):
        path = tmp_path / "mixes" / split / f"{split}-{number:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, np.sin(np.arange(1600) * 0.1) * 0.2, 16000)
        rows.append(
            {
                "split": split,
                "foreground": f"e{number}.wav",
                "foreground_label": ("dog", "mouse_click")[number % 2],
                "foreground_source": str(number),
                "background": f"s{number}.wav",
                "scene": "street_traffic",
                "background_source": f"city-{number}",
                "path": str(path),
                "caption": f"first of {number}",
                "caption_2": "second",
                "caption_3": "naïve third",
            }
        )
    return pd.DataFrame(rows)


def test_files_have_the_trainers_format(mixes, tmp_path):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    root = json.loads(root_file.read_text())
    assert set(root) == {"scenes", "comments", "metadata"}
    files = root["metadata"]["path"]["scenes"]
    assert set(files) == {"train", "val", "test", "class_label_indices"}
    entries = json.loads(Path(files["train"]).read_text())["data"]
    assert set(entries[0]) == {"wav", "labels", "caption", "caption_2", "caption_3"}
    assert not entries[0]["wav"].startswith("/")
    assert (Path(root["scenes"]) / entries[0]["wav"]).is_file()
    with Path(files["class_label_indices"]).open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["index", "mid", "display_name"]
    # as the trainer uses them: labels index the rows of the class table
    index = {row["mid"]: int(row["index"]) for row in table}
    assert [index[mid] for mid in entries[1]["labels"].split(",")] == [1, 2]
    assert [row["display_name"] for row in table] == ["dog", "mouse click", "street traffic"]


def test_what_was_written_is_read_back(mixes, tmp_path):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    table = metadata.read_audiocaps(root_file)
    assert table.split.tolist() == mixes.split.tolist()
    assert [Path(p) for p in table.path] == [Path(p) for p in mixes.path]
    assert table[CAPTIONS].equals(mixes[CAPTIONS])
    assert table.labels[1] == "mouse click, street traffic"
    assert metadata.validate(root_file).empty


@pytest.mark.parametrize("no_scene", ["", np.nan])
def test_clip_of_a_single_event_has_one_label(mixes, tmp_path, no_scene):
    root_file = metadata.write_audiocaps(mixes.assign(scene=no_scene), tmp_path / "meta", "events")
    assert metadata.read_audiocaps(root_file).labels.unique().tolist() == ["dog", "mouse click"]


def test_one_split_alone_keeps_its_folder(mixes, tmp_path):
    part = mixes[mixes.split == "test"]
    root_file = metadata.write_audiocaps(part, tmp_path / "meta", "scenes")
    entries = json.loads((tmp_path / "meta/scenes_test.json").read_text())["data"]
    assert entries[0]["wav"] == "test/test-00004.wav"
    assert metadata.validate(root_file).empty


def test_hand_written_files_with_relative_folders_are_read(mixes, tmp_path):
    metadata.write_audiocaps(mixes, tmp_path, "scenes")
    paths = {split: f"scenes_{split}.json" for split in ("train", "test")}
    paths["class_label_indices"] = metadata.CLASS_FILE
    root = {"scenes": "mixes", "comments": {}, "metadata": {"path": {"scenes": paths}}}
    (tmp_path / "own.json").write_text(json.dumps(root))
    assert metadata.validate(tmp_path / "own.json").empty
    assert len(metadata.read_audiocaps(tmp_path / "own.json")) == 4


def test_validate_reports_by_file(mixes, tmp_path):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    Path(mixes.path[0]).unlink()
    sf.write(mixes.path[1], np.zeros(1600), 16000)
    Path(mixes.path[2]).write_bytes(b"no sound" * 20)
    test_file = tmp_path / "meta/scenes_test.json"
    content = json.loads(test_file.read_text())
    content["data"][0]["caption"] = "  "
    content["data"].append(content["data"][1])
    test_file.write_text(json.dumps(content))
    problems = metadata.validate(root_file)
    found = dict(zip(problems.path, problems.problem, strict=False))
    for number, text in enumerate(["no such file", "is silent", "cannot be read"]):
        assert text in found[mixes.path[number]]
    assert found[mixes.path[4]] == "has an empty caption"
    assert (problems.problem == "is named more than once").sum() == 2
    assert len(problems) == 6


def break_entry(**changes):
    def change(folder):
        path = folder / "scenes_val.json"
        content = json.loads(path.read_text())
        content["data"][0] |= changes
        path.write_text(json.dumps(content))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_entry(wav="/etc/x.wav"), r"scenes_val\.json: wav '/etc/x\.wav' must be a path rel"),
        (break_entry(labels="/m/none"), "'/m/none' of val/val-00002.wav is not in the class"),
        (lambda f: (f / "scenes_val.json").write_text("{"), r"scenes_val\.json: not JSON"),
        (lambda f: (f / "scenes_val.json").write_text("[]"), 'has no list "data"'),
        (lambda f: (f / "scenes_val.json").unlink(), "01_dataset_mixing"),
        (lambda f: (f / "dataset_root.json").write_text("{}"), "not a dataset_root.json"),
    ],
)
def test_damaged_metadata_is_named(mixes, tmp_path, damage, message):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    damage(tmp_path / "meta")
    with pytest.raises(metadata.MetadataError, match=message):
        metadata.read_audiocaps(root_file)


def test_what_cannot_be_written_is_said(mixes, tmp_path):
    with pytest.raises(metadata.MetadataError, match=r"1 of 6 mixes have no file.*render"):
        metadata.write_audiocaps(mixes.replace(mixes.path[0], "gone.wav"), tmp_path, "scenes")
    with pytest.raises(metadata.MetadataError, match="plan and render"):
        metadata.write_audiocaps(mixes[:0], tmp_path, "scenes")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(metadata.MetadataError, match="choose another folder"):
        metadata.write_audiocaps(mixes, tmp_path / "file", "scenes")


def test_clean_mixes_pass(mixes):
    assert metadata.check_leaks(mixes) is None


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_kind_of_leak_is_found_and_named(data):
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    columns = ["foreground", "foreground_source", "background", "background_source", "path"]
    table = pd.DataFrame({c: [f"{c}-{i}" for i in range(8)] for c in columns}).assign(split=splits)
    metadata.check_leaks(table)
    victim, thief = data.draw(
        st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(
            lambda p: splits[p[0]] != splits[p[1]]
        )
    )
    taken, given_to = data.draw(
        st.sampled_from(
            [(c, c) for c in columns]
            + [("foreground", "background"), ("background", "foreground")]
            + [("foreground_source", "background_source")]
            + [("background_source", "foreground_source")]
        )
    )
    table.loc[thief, given_to] = table.loc[victim, taken]
    with pytest.raises(metadata.LeakError) as caught:
        metadata.check_leaks(table)
    text = str(caught.value)
    assert f"({table.loc[victim, taken]})" in text
    assert splits[victim] in text and splits[thief] in text


def test_leak_inside_a_split_is_none(mixes):
    mixes.loc[1, ["foreground", "foreground_source"]] = mixes.loc[
        0, ["foreground", "foreground_source"]
    ]
    metadata.check_leaks(mixes)


def test_long_lists_are_cut(mixes):
    many = pd.concat([mixes.assign(foreground_source=str(i)) for i in range(9)])
    with pytest.raises(
        metadata.LeakError, match=r"share 9 foreground sources \(0, 1, 2, 3, 4, …\)"
    ):
        metadata.check_leaks(many)


def test_ids_are_unique():
    assert len(set(metadata.AUDIOSET_MIDS.values())) == len(metadata.AUDIOSET_MIDS)
    assert metadata.class_labels(["a,b"]).mid[0].count(",") == 0


@pytest.mark.skipif(not CLASS_MAP.is_file(), reason="YAMNet's class map is not beside the project")
def test_ids_are_audiosets_own():
    with CLASS_MAP.open(newline="") as file:
        names = {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
    unknown = {label for label, mid in metadata.AUDIOSET_MIDS.items() if mid not in names}
    assert not unknown
    same = {"dog": "Dog", "rain": "Rain", "helicopter": "Helicopter", "bus": "Bus", "crow": "Crow"}
    assert {label: names[metadata.AUDIOSET_MIDS[label]] for label in same} == same
