import csv
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import audio, captions, metadata, mixing, store

JAMS = "meta/jams/test/test-00000.jams"
CAPTIONS = ["caption", "caption_2", "caption_3"]


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
                "label": ("dog", "mouse_click")[number % 2],
                "source_id": str(number),
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
    # the trainer looks at the first three only
    assert set(entries[0]) == {"wav", "labels", "caption", "caption_2", "caption_3", "source_id"}
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
    assert table[[*CAPTIONS, "source_id"]].equals(mixes[[*CAPTIONS, "source_id"]])
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


@pytest.mark.parametrize("name", ["comments", "metadata", "../scenes", "a/b", ""])
def test_a_set_whose_name_could_not_be_read_back_is_refused(mixes, tmp_path, name):
    with pytest.raises(store.DataError, match="data set"):
        metadata.write_audiocaps(mixes, tmp_path / "meta", name)
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("nothing", [np.nan, None, "", " "])
def test_a_caption_that_is_missing_is_left_out(mixes, tmp_path, nothing):
    mixes["caption_2"] = ["second", nothing] * 3
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "meta/scenes_train.json").read_text(encoding="utf-8")
    first, second = json.loads(text, parse_constant=refuse)["data"]
    assert first["caption_2"] == "second" and "caption_2" not in second and second["caption_3"]
    assert metadata.validate(root_file).empty


@pytest.mark.parametrize("caption", [["a", "b"], 3, None, {"en": "a dog"}, [], ""])
def test_a_caption_that_is_no_text_is_reported(mixes, tmp_path, caption):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    break_entry(caption=caption)(tmp_path / "meta")
    assert metadata.validate(root_file).problem.tolist() == ["has an empty caption"]


@pytest.mark.parametrize("wav", ["../outside.wav", "val/../../outside.wav", "val/.."])
def test_metadata_names_no_file_outside_its_folder(mixes, tmp_path, wav):
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    (tmp_path / "outside.wav").write_bytes(Path(mixes.path[0]).read_bytes())
    break_entry(wav=wav)(tmp_path / "meta")
    with pytest.raises(metadata.MetadataError, match=r"must be a path rel.* inside it"):
        metadata.read_audiocaps(root_file)
    assert metadata.validate(root_file).problem.str.contains("inside it").any()
    for part in ("scenes", "metadata"):
        root = json.loads(root_file.read_text())
        files = root["metadata"]["path"]["scenes"]
        if part == "scenes":
            root["scenes"] = "../elsewhere"
        else:
            files["val"] = "../meta/scenes_val.json"
        (tmp_path / "meta/odd.json").write_text(json.dumps(root))
        with pytest.raises(metadata.MetadataError, match=r"odd\.json: .*leaves its folder"):
            metadata.read_audiocaps(tmp_path / "meta/odd.json")


def test_clips_that_are_links_keep_their_names(mixes, tmp_path):
    for number, path in enumerate(map(Path, mixes.path)):
        key = tmp_path / "annex" / f"KEY-{number}"
        key.parent.mkdir(exist_ok=True)
        path.rename(key)
        path.symlink_to(key)
    root_file = metadata.write_audiocaps(mixes, tmp_path / "meta", "scenes")
    entries = json.loads((tmp_path / "meta/scenes_val.json").read_text())["data"]
    assert [entry["wav"] for entry in entries] == ["val/val-00002.wav", "val/val-00003.wav"]
    assert metadata.validate(root_file).empty


@pytest.mark.parametrize(
    "names",
    [("path", "caption"), ("audio", "caption"), ("file_name", "text"), ("filename", "caption_1")],
)
def test_other_peoples_tables_of_captions_are_understood(mixes, tmp_path, names):
    files = [str(Path(path).relative_to(tmp_path)) for path in mixes.path]
    table = pd.DataFrame({names[0]: files, names[1]: mixes.caption, "caption_2": ["b", ""] * 3})
    clips = metadata.read_clips(store.write_table(table, tmp_path / "captions.csv"))
    assert clips.path.tolist() == mixes.path.tolist()
    assert clips.caption.tolist() == mixes.caption.tolist()
    assert set(clips.split) >= {"train", "val"}


@pytest.mark.parametrize("name", ["../outside.wav", "mixes/../../outside.wav", ""])
def test_a_table_of_captions_names_no_file_outside(tmp_path, name):
    table = pd.DataFrame({"path": ["a.wav", name], "caption": "a dog"})
    with pytest.raises(store.DataError, match=r"captions\.csv, row 2: path"):
        metadata.read_clips(store.write_table(table, tmp_path / "captions.csv"))


def test_one_file_in_two_spellings_is_a_leak(mixes, tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path / "mixes")
    file = Path(mixes.path[0])
    for other in (
        f"{file.parent}/./{file.name}",
        f"{file.parent}/../train/{file.name}",
        f"{tmp_path}/linked/train/{file.name}",
        os.path.relpath(file),
    ):
        table = mixes.assign(foreground=[str(file), *mixes.foreground[1:5], other])
        with pytest.raises(metadata.LeakError, match=r"train and test share 1 recordings"):
            metadata.check_leaks(table)


def test_what_cannot_be_written_is_said(mixes, tmp_path):
    with pytest.raises(metadata.MetadataError, match=r"1 of 6 mixes have no file.*render"):
        metadata.write_audiocaps(mixes.replace(mixes.path[0], "gone.wav"), tmp_path, "scenes")
    with pytest.raises(metadata.MetadataError, match="plan and render"):
        metadata.write_audiocaps(mixes[:0], tmp_path, "scenes")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(store.DataError, match="choose another folder"):
        metadata.write_audiocaps(mixes, tmp_path / "file", "scenes")


def test_clean_mixes_pass(mixes):
    assert metadata.check_leaks(mixes) is None


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_kind_of_leak_is_found_and_named(data):
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    columns = ["foreground", "source_id", "background", "background_source", "path"]
    table = pd.DataFrame({c: [f"{c}-{i}" for i in range(8)] for c in columns}).assign(split=splits)
    metadata.check_leaks(table)
    victim, thief = data.draw(
        st.tuples(st.integers(0, 7), st.integers(0, 7)).filter(lambda p: splits[p[0]] != splits[p[1]])
    )
    taken, given_to = data.draw(
        st.sampled_from(
            [(c, c) for c in columns]
            + [("foreground", "background"), ("background", "foreground")]
            + [("source_id", "background_source")]
            + [("background_source", "source_id")]
        )
    )
    table.loc[thief, given_to] = table.loc[victim, taken]
    with pytest.raises(metadata.LeakError) as caught:
        metadata.check_leaks(table)
    text = str(caught.value)
    assert f"({table.loc[victim, taken]})" in text
    assert splits[victim] in text and splits[thief] in text


def test_leak_inside_a_split_is_none(mixes):
    mixes.loc[1, ["foreground", "source_id"]] = mixes.loc[0, ["foreground", "source_id"]]
    metadata.check_leaks(mixes)


def test_long_lists_are_cut(mixes):
    many = pd.concat([mixes.assign(source_id=str(i)) for i in range(9)])
    with pytest.raises(metadata.LeakError, match=r"share 9 foreground sources \(0, 1, 2, 3, 4, …\)"):
        metadata.check_leaks(many)


def test_ids_are_audiosets_where_it_has_one(mixes, tmp_path):
    labels = ["dog", "siren", "mouse_click", "a,b", "dog", "dog"]
    root = metadata.write_audiocaps(mixes.assign(label=labels), tmp_path, "scenes")
    table = pd.read_csv(root.parent / metadata.CLASS_FILE).set_index("display_name").mid
    assert table["dog"] == captions.EVENTS["dog"]["audioset"] == "/m/0bt9lr"
    assert table["mouse click"] == "/own/mouse_click"
    # the trainer splits labels at commas
    assert table["a,b"] == "/own/ab" and table.is_unique


# --- more leaks -----------------------------------------------------------------------------------


def test_leak_through_a_further_event_is_found(mixes):
    mixes = mixes.assign(clip_id=[f"m-{i}" for i in range(6)], n_events=[2, *[1] * 5])
    event = {"clip_id": "m-0", "event": 1, "label": "dog", "foreground": "x.wav", "source_id": "x"}
    metadata.check_leaks(mixes, pd.DataFrame([event]))
    with pytest.raises(metadata.LeakError, match=r"train and test share 1 foreground sources \(4\)"):
        metadata.check_leaks(mixes, pd.DataFrame([event | {"source_id": "4"}]))
    with pytest.raises(metadata.LeakError, match=r"train and test share 1 recordings \(s5.wav\)"):
        metadata.check_leaks(mixes, pd.DataFrame([event | {"foreground": "s5.wav"}]))
    with pytest.raises(store.DataError, match="m-0: 1 of 2 events are listed"):
        metadata.check_leaks(mixes)


def test_validation_that_is_the_test_set_is_called_that(mixes):
    val, test = mixes[mixes.split == "val"], mixes[mixes.split == "test"]
    same = pd.concat([mixes[mixes.split == "train"], test, test.assign(split="val")])
    with pytest.raises(metadata.LeakError, match="test and val are the same mixes"):
        metadata.check_leaks(same)
    metadata.check_leaks(pd.concat([val, test]))


# --- the other formats ----------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path):
    """Two labels and two scenes, a clip of each in each of three folds."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(12):
        label = ("dog", "siren", "park", "street_traffic")[number // 3]
        y = rng.normal(0, 0.05, 8000)
        y[:800] = 0
        path = audio.save_audio(tmp_path / f"{label}-{number}.wav", y, 8000)
        row = {"clip_id": str(number), "path": str(path), "label": label}
        rows.append(row | {"fold": number % 3 + 1, "source_id": f"{label}-{number}"})
    return pd.DataFrame(rows)


@pytest.fixture
def rendered(clips, tmp_path):
    """Six rendered mixes with their whole recipe, two a fold."""
    plan = mixing.plan_mixes(clips[:6], clips[6:], n=6, seed=2, test_fold=3, duration_s=2.0)
    return mixing.render_mixes(plan, tmp_path / "mixes", 8000, workers=1)


def test_everything_written_at_once_is_valid(rendered, tmp_path):
    metadata.check_leaks(rendered)
    root = metadata.write_metadata(rendered, tmp_path / "meta", "scenes")
    assert metadata.validate(root, sample_rate=8000, duration_s=2.0).empty
    assert metadata.validate(root, sample_rate=8000, duration_s=2.0).empty
    assert len(list((tmp_path / "meta/jams").rglob("*.jams"))) == 6
    assert not list(tmp_path.rglob("*.part"))
    before = {p: p.read_bytes() for p in (tmp_path / "meta").rglob("*") if p.is_file()}
    metadata.write_metadata(rendered, tmp_path / "meta", "scenes")
    assert before == {p: p.read_bytes() for p in (tmp_path / "meta").rglob("*") if p.is_file()}


def test_audiofolder_names_each_clip_beside_it(rendered, tmp_path):
    metadata.write_metadata(rendered, tmp_path / "meta", "scenes")
    for split in ("train", "val", "test"):
        file = tmp_path / "mixes" / split / "metadata.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        mixes = rendered[rendered.split == file.parent.name]
        assert [row["caption_3"] for row in rows] == mixes.caption_3.tolist()
        assert all((file.parent / row["file_name"]).is_file() for row in rows)
        # one type a column, or Arrow refuses the table
        assert len({tuple(type(value) for value in row.values()) for row in rows}) == 1


def test_audiofolder_needs_a_folder_per_split(rendered, tmp_path):
    with pytest.raises(metadata.MetadataError, match="train and val lie in one folder"):
        metadata.write_metadata(rendered.assign(path=rendered.path[0]), tmp_path / "meta", "scenes")


def jams_of(rendered, folder, events=None):
    """Write a set's metadata; return its JAMS files in the order of the mixes."""
    root = metadata.write_metadata(rendered, folder, "scenes", events)
    places = zip(rendered.split, rendered.clip_id, strict=True)
    return [root.parent / "jams" / split / f"{clip_id}.jams" for split, clip_id in places]


def test_jams_hold_the_events_and_the_recipe(rendered, tmp_path):
    events = mixing.occurrences(rendered)
    files = jams_of(rendered, tmp_path / "meta")
    for file, mix in zip(files, rendered.to_dict("records"), strict=True):
        background, *foregrounds = json.loads(file.read_text())["annotations"][0]["data"]
        assert background["value"]["role"] == "background"
        assert (background["time"], background["duration"]) == (0, 2)
        assert background["value"]["label"] == mix["scene"]
        assert background["value"]["source_file"] == mix["background"]
        own = events[events.clip_id == mix["clip_id"]]
        assert [o["time"] for o in foregrounds] == own.onset_s.tolist()
        assert [o["value"]["snr"] for o in foregrounds] == [mix["snr_db"]]
        # the clips begin with 0.1 s of silence, which is not a part of the event
        assert foregrounds[0]["value"]["source_time"] == pytest.approx(0.1, abs=1e-3)
        assert foregrounds[0]["value"]["source_file"] == mix["foreground"]


def test_recipes_out_of_jams_render_the_same_bytes(rendered, tmp_path):
    files = jams_of(rendered, tmp_path / "meta")
    again = pd.DataFrame([json.loads(f.read_text())["sandbox"]["mix"] for f in files])
    made = mixing.render_mixes(again, tmp_path / "again", 8000, workers=1)
    for one, other in zip(rendered.path, made.path, strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_several_events_reach_every_format(clips, tmp_path):
    options = {"seed": 2, "test_fold": 3, "duration_s": 2.0, "events": 2, "repeat": 2}
    mixes, events = mixing.plan_scenes(clips[:6], clips[6:], n=6, **options)
    mixes = mixing.render_mixes(mixes, tmp_path / "mixes", 8000, workers=1, events=events)
    metadata.check_leaks(mixes, events)
    files = jams_of(mixes, tmp_path / "meta", events)
    root = tmp_path / "meta" / metadata.ROOT_FILE
    assert metadata.validate(root).empty
    for labels in metadata.read_audiocaps(root).labels:
        assert {"dog", "siren"} < set(labels.split(", "))
    line = json.loads((tmp_path / "mixes/test/metadata.jsonl").read_text().splitlines()[0])
    assert sorted(line["events"]) == ["dog", "siren"]
    for file, mix, sounding in zip(
        files, mixes.itertuples(), mixing.events_of(mixes, events), strict=True
    ):
        _, *found = json.loads(file.read_text())["annotations"][0]["data"]
        when = mixing.occurrences(mixes, events)
        assert len(found) == (when.clip_id == mix.clip_id).sum() > 1
        levels = {o["value"]["label"]: o["value"]["snr"] for o in found}
        assert levels == {event["label"]: event["snr_db"] for event in sounding}
    with pytest.raises(store.DataError, match="1 of 2 events are listed"):
        metadata.write_metadata(mixes, tmp_path / "meta", "scenes")


@pytest.mark.skipif(not importlib.util.find_spec("jams"), reason="the library jams is not installed")
def test_jams_library_reads_and_validates(rendered, tmp_path):
    import jams

    rendered.loc[1, "snr_db"] = np.nan
    events = mixing.occurrences(rendered)
    for file in jams_of(rendered, tmp_path / "meta"):
        jam = jams.load(str(file), validate=True, strict=True)
        (annotation,) = jam.annotations.search(namespace="scaper")
        assert jam.file_metadata.duration == 2.0
        own = events[events.clip_id == file.stem]
        assert [o.value["role"] for o in annotation.data] == ["background", "foreground"]
        assert [o.time for o in annotation.data][1:] == own.onset_s.tolist()
        tags = jams.convert(annotation, "tag_open")
        assert [o.value for o in tags.data][1:] == own.label.tolist()


# --- validating -----------------------------------------------------------------------------------


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


TONE = np.sin(np.arange(1600) * 0.1) * 0.2
# what validate says, and what was done to a clip or to its split file
DAMAGES = {
    "no such file; check": lambda clip, split: clip.unlink(),
    "cannot be read": lambda clip, split: clip.write_bytes(b"no sound" * 20),
    "0 bytes": lambda clip, split: clip.write_bytes(b""),
    "was cut short": lambda clip, split: clip.write_bytes(clip.read_bytes()[:1000]),
    "is silent": lambda clip, split: audio.save_audio(clip, TONE * 0, 16000),
    "NaN or infinite": lambda clip, split: sf.write(clip, TONE * np.nan, 16000, subtype="FLOAT"),
    "has 8000 Hz instead of 16000": lambda clip, split: audio.save_audio(clip, TONE[::2], 8000),
    "has 1599 samples instead of": lambda clip, split: audio.save_audio(clip, TONE[1:], 16000),
    "has an empty caption": lambda clip, split: change(split, '"a hound"', '" "'),
    "is not in the class table": lambda clip, split: change(split, "/own/park", "/own/tram"),
    "must be a path relative": lambda clip, split: change(split, '"val/', f'"{clip.parent}/'),
    "is named more than once": lambda clip, split: change(split, "val/val.wav", "test/test.wav"),
    "not JSON": lambda clip, split: change(split, "{", ""),
    "no such file; run notebook": lambda clip, split: split.unlink(),
    'has no list "data"': lambda clip, split: change(split, '"data"', '"clips"'),
    "entry 1 is not an object": lambda clip, split: split.write_text('{"data": ["val/val.wav"]}'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_every_damage_is_found_in_its_file(tmp_path, message):
    paths = [audio.save_audio(tmp_path / f"mixes/{s}/{s}.wav", TONE, 16000) for s in ("val", "test")]
    mix = {"label": "dog", "scene": "park", "caption": "a dog", "caption_2": "a hound"}
    rows = [mix | {"split": p.stem, "path": str(p), "clip_id": p.stem} for p in paths]
    root = metadata.write_audiocaps(pd.DataFrame(rows), tmp_path / "meta", "scenes")
    assert metadata.validate(root, sample_rate=16000, duration_s=0.1).empty
    DAMAGES[message](paths[0], tmp_path / "meta/scenes_val.json")
    found = metadata.validate(root, sample_rate=16000, duration_s=0.1)
    assert found.problem.str.contains(message, regex=False).any()
    assert "val" in found.split.tolist()
    assert message == "is named more than once" or set(found.split) == {"val"}


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (JAMS, '2.0, "identifiers"', '1.0, "identifiers"', "describes 1 s, its clip lasts 2 s"),
        (JAMS, '"duration": 2.0, "value"', '"duration": 2.5, "value"', "an event from 0 to 2.5 s"),
        (JAMS, '"data": [{"time"', '"data": [{"when"', "cannot be read"),
        (JAMS, "{", "", "not JSON"),
    ],
)
def test_other_formats_are_held_against_the_clips(rendered, tmp_path, name, old, new, message):
    root = metadata.write_metadata(rendered, tmp_path / "meta", "scenes")
    file = tmp_path / name
    change(file, old, new)
    found = metadata.validate(root)
    assert found.problem.str.contains(message, regex=False).any()
    assert {Path(path).name for path in found.path} == {file.name}


def test_files_that_belong_to_no_clip_are_named(rendered, tmp_path):
    root = metadata.write_metadata(rendered, tmp_path / "meta", "scenes")
    (tmp_path / "meta/jams/test/old.jams").write_text("{}")
    problems = metadata.validate(root)
    assert problems.split.tolist() == ["test"]
    assert problems.problem[0] == "belongs to no clip of the split"
