import functools
import hashlib
import http.server
import io
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import datasets, store

RATE = 8000
SHARED = Path(__file__).parents[2] / "shared/data"
ESC10 = SHARED / "ESC-10"
DCASE = SHARED / "dcase2024_task7_dev"


def write_tone(path, seconds=0.25, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.3 * np.sin(np.arange(int(seconds * rate)) * 0.2), rate)


@pytest.fixture
def esc_root(tmp_path):
    """Ten clips, two classes, five folds, named as ESC-50 names its files."""
    rows = [
        (f"{fold}-{100 + fold}-A-{target}.wav", fold, target, category, target == 0, 100 + fold)
        for fold in range(1, 6)
        for target, category in ((0, "dog"), (3, "cow"))
    ]
    for row in rows:
        write_tone(tmp_path / "esc" / "audio" / row[0])
    columns = ["filename", "fold", "target", "category", "esc10", "src_file"]
    (tmp_path / "esc/meta").mkdir()
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "esc/meta/esc50.csv", index=False)
    return tmp_path / "esc"


def edit(path, change, sep=","):
    change(table := pd.read_csv(path, sep=sep))
    table.to_csv(path, index=False, sep=sep)


def test_esc_layout_becomes_the_clip_table(esc_root):
    clips = datasets.load_esc50(esc_root)
    assert clips.columns.tolist() == datasets.CLIP_COLUMNS
    assert len(clips) == 10 and set(clips.dataset) == {"esc50"}
    assert clips.source_id[0] == "101" and clips.fold.tolist() == sorted([1, 2, 3, 4, 5] * 2)
    assert clips.duration_s.unique().tolist() == [0.25]
    assert clips.sample_rate.unique().tolist() == [RATE]
    ten = datasets.load_esc50(esc_root, esc10=True)
    assert set(ten.label) == {"dog"} and set(ten.dataset) == {"esc10"}


def test_ogg_stands_in_for_wav(esc_root):
    wav = esc_root / "audio" / "1-101-A-0.wav"
    y, rate = sf.read(wav)
    sf.write(wav.with_suffix(".ogg"), y, rate)
    wav.unlink()
    assert datasets.load_esc50(esc_root).path[0].endswith("1-101-A-0.ogg")


def test_half_copied_folder_says_how_much_is_missing(esc_root):
    for path in sorted((esc_root / "audio").iterdir())[:4]:
        path.unlink()
    with pytest.raises(datasets.DatasetError, match=r"4 of the 10 .*1-101-A-0.*copy the folder"):
        datasets.load_esc50(esc_root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.__setitem__("filename", ["1-101-A-0.wav"] * 10), "9 files are listed twice"),
        (lambda t: t.__setitem__("category", ["pig", *t.category[1:]]), "goes with more than one"),
        (lambda t: t.__setitem__("fold", [2, *t.fold[1:]]), "1 rows contradict the fold"),
        (lambda t: t.__setitem__("src_file", [np.nan, *t.src_file[1:]]), "1 of 10 rows are incom"),
        (lambda t: t.__delitem__("fold"), "columns fold are missing"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(esc_root, change, message):
    edit(esc_root / "meta/esc50.csv", change)
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load_esc50(esc_root)


@pytest.mark.parametrize(
    "names", [("None", "NA"), ("001", "1e5"), ("nan", "True"), ("1.0", "2023-01-02")]
)
def test_classes_and_sources_stay_text(esc_root, names):
    table = pd.read_csv(esc_root / "meta/esc50.csv", dtype=str)
    table["category"] = table["target"].map({"0": names[0], "3": names[1]})
    table["src_file"] = [f"{number:03}" for number in range(10)]
    table.to_csv(esc_root / "meta/esc50.csv", index=False)
    clips = datasets.load_esc50(esc_root)
    assert clips.label.tolist() == list(names) * 5
    assert clips.source_id.tolist() == table["src_file"].tolist()


@pytest.mark.parametrize("fold", ["1.5", "-1", "inf", "one", "0x1"])
def test_a_fold_is_a_whole_number(esc_root, urbansound8k_root, fold):
    for table, load in (
        (esc_root / "meta/esc50.csv", datasets.load_esc50),
        (urbansound8k_root / "metadata/UrbanSound8K.csv", datasets.load_urbansound8k),
    ):
        edit(table, lambda t: t.__setitem__("fold", [*t.fold[:3].astype(str), fold, *t.fold[4:]]))
        with pytest.raises(
            store.DataError, match=rf"{table.name}, row 4: fold '?-?[\w.]+'? must be a w"
        ):
            load(table.parents[1])


@pytest.mark.parametrize("name", ["../1-101-A-0.wav", "a/../../1-101-A-0.wav", "/etc/1-101-A-0.wav"])
def test_a_table_names_no_file_outside_its_folder(esc_root, tau_root, name):
    edit(
        esc_root / "meta/esc50.csv", lambda t: t.__setitem__("filename", [*t.filename[:9], "../" + name])
    )
    with pytest.raises(store.DataError, match=r"esc50\.csv, row 10: name .* stays inside"):
        datasets.load_esc50(esc_root)
    change = lambda t: t.__setitem__("filename", [*t.filename[:-1], name])  # noqa: E731
    edit(tau_root / "meta.csv", change, sep="\t")
    with pytest.raises(store.DataError, match=r"meta\.csv, row 24: name .* stays inside"):
        datasets.load_tau(tau_root)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_spelling_of_an_accent(tau_root, forms):
    told, there = (unicodedata.normalize(form, "audio/parc-Orléans-0-0-a.wav") for form in forms)
    write_tone(tau_root / there)
    table = pd.read_csv(tau_root / "meta.csv", sep="\t")
    table.loc[0, "filename"] = told
    table["filename"] = table["filename"].str.replace("/", "\\")  # as a table from Windows has it
    table.to_csv(tau_root / "meta.csv", sep="\t", index=False)
    clips = datasets.load_tau(tau_root)
    assert Path(clips.path[0]).is_file() and len(clips) == 24
    assert clips.clip_id[0] == unicodedata.normalize("NFC", "parc-Orléans-0-0-a")


@pytest.mark.parametrize("ending", [".mp3", ".aiff", ".AIF", ".opus", ".FLAC"])
def test_other_formats_stand_in_for_wav(esc_root, ending):
    wav = esc_root / "audio" / "1-101-A-0.wav"
    forms = {".opus": {"format": "OGG", "subtype": "OPUS"}, ".AIF": {"format": "AIFF"}}
    form = forms.get(ending, {})
    sf.write(wav.with_suffix(ending), sf.read(wav)[0], RATE, **form)
    wav.unlink()
    assert datasets.load_esc50(esc_root).path[0].endswith(f"1-101-A-0{ending}")


def test_links_into_a_store_are_clips_under_their_own_names(esc_root, tmp_path):
    (esc_root / "audio").rename(tmp_path / "annex")
    (esc_root / "audio").mkdir()
    for number, file in enumerate(sorted((tmp_path / "annex").iterdir())):
        key = file.rename(tmp_path / "annex" / f"KEY-{number}")
        (esc_root / "audio" / file.name).symlink_to(key)
    clips = datasets.load_esc50(esc_root)
    assert clips.clip_id[0] == "1-101-A-0" and clips.duration_s.notna().all()
    (tmp_path / "linked").symlink_to(esc_root)
    assert datasets.load_esc50(tmp_path / "linked").clip_id.equals(clips.clip_id)


def test_a_folder_of_folders_is_a_data_set(tmp_path):
    for label in ("dog", "cat"):
        for number in range(7):
            write_tone(tmp_path / "own" / label / f"{number:03}.wav")
    write_tone(tmp_path / "own/dog/far/000.flac")
    write_tone(tmp_path / "own/stray.wav")
    (tmp_path / "own/dog/notes.txt").write_text("recorded in May")
    clips = datasets.load_clips("own", data_dir=tmp_path)
    assert clips.columns.tolist() == datasets.CLIP_COLUMNS and set(clips.dataset) == {"own"}
    assert clips.label.value_counts().to_dict() == {"dog": 8, "cat": 7}
    assert clips.clip_id.is_unique and set(clips.clip_id) >= {"dog-000", "cat-000", "dog-far-000"}
    assert (clips.source_id == clips.clip_id).all()
    # numbered recordings are dealt in turn
    assert clips.groupby("label").fold.nunique().tolist() == [5, 5]
    near = clips[~clips.clip_id.str.contains("far")]
    assert near.groupby(["label", "fold"]).size().isin([1, 2]).all()
    assert set(datasets.assign_splits(clips, 5)) == {"train", "val", "test"}
    (tmp_path / "own").rename(tmp_path / "moved")
    again = datasets.load_folder(tmp_path / "moved")
    assert again.drop(columns="path").equals(clips.drop(columns="path"))
    write_tone(tmp_path / "moved/dog/000.flac")
    with pytest.raises(datasets.DatasetError, match=r"1 files are listed twice.*dog-000"):
        datasets.load_folder(tmp_path / "moved")


def test_sounds_in_the_folder_itself_are_one_class_named_after_it(tmp_path):
    write_tone(tmp_path / "Hof 2/a.wav")
    write_tone(tmp_path / "Hof 2/b_1.flac")
    for root in (tmp_path / "Hof 2", f"{tmp_path}/Hof 2/"):
        clips = datasets.load_folder(root)
        assert clips.label.tolist() == ["Hof 2"] * 2
        assert clips.clip_id.tolist() == ["Hof 2-a", "Hof 2-b_1"]
    write_tone(tmp_path / "Hof 2/.hidden/c.wav")
    assert len(datasets.load_folder(tmp_path / "Hof 2")) == 2
    write_tone(tmp_path / "Hof 2/Regen/stark/c.aiff")
    assert datasets.load_folder(tmp_path / "Hof 2").label.tolist() == ["Regen"]


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        (["rec-1", "rec-2", "rec_03", "rec (4)", "rec_5 (2)", "rec 6"], 1),
        (["rec-1-1", "rec-1-2", "rec-2-1"], 2),
        (["rec_0001", "rec_0002", "rec-00010", "rec.5", "rec#6", "rec [7]", "rec"], 1),
        (["rec", "rec copy", "rec copy 2", "rec - Copy", "rec - Copy (3)", "rec_1 copy"], 1),
        (["Hof-2024-05-01_0001", "Hof-2024-05-01_0002", "Hof-2024-05-02_0001"], 2),
        (["Tür-1", "Tu\u0308r-2", "門 (1)", "門_٢", "скрип 01", "скрип 02"], 3),
        (["001", "002", "(3)"], 3),
        (["dog_1", "dog-2", "Dog (3)", "DOG 4"], 4),  # numbered, of the class dog
        (["dog_1", "dog_1 (2)"], 1),
        (["2024-05-01 yard_1", "2024-05-02 yard_1", "2024-05-01 yard_2"], 2),
        (["172649-A", "172649-B", "48213", "48214"], 4),
        (["dog-48213", "dog-48214"], 2),
        (["hund_a", "hund_b", "hund1", "hund2"], 4),
    ],
)
def test_a_source_is_what_a_name_has_before_a_counter(tmp_path, names, sources):
    for name in names:
        write_tone(tmp_path / "dog" / f"{name}.wav")
    clips = datasets.load_folder(tmp_path)
    assert clips.source_id.nunique() == sources
    assert clips.groupby("source_id").fold.nunique().eq(1).all()


def test_equal_names_in_other_folders_are_other_recordings(tmp_path):
    for place in ("a/day1", "a/day2", "b/day1"):
        write_tone(tmp_path / place / "rec_1.wav")
    assert datasets.load_folder(tmp_path).source_id.tolist() == [
        "a-day1-rec", "a-day2-rec", "b-day1-rec",
    ]  # fmt: skip


NAME = st.text("abc1290-_() ", min_size=1, max_size=8).filter(lambda name: name == name.strip(" "))


def own_table(folder, names, **columns):
    for name in names:
        write_tone(folder / f"{name}.wav", 0.01)
    table = pd.DataFrame({"path": [f"{name}.wav" for name in names], "label": "x"}).assign(**columns)
    table.to_csv(folder / "sounds.csv", index=False)
    return folder


@settings(max_examples=40, deadline=None)
@given(
    st.sets(NAME, min_size=1, max_size=5), st.sets(NAME, max_size=5), st.booleans(), st.integers(1, 9)
)
def test_no_clip_moves_when_others_are_added(first, more, listed, folds):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for label, names in (("a", first), ("b 1", first)):
            for name in names:
                write_tone(root / label / f"{name}.wav", 0.01)
        kept = ["clip_id", "source_id", "fold"]
        before = datasets.load_folder(root, folds)
        for name in more - first:
            write_tone(root / "a" / f"{name}.wav", 0.01)
        write_tone(root / "new/one_1.wav", 0.01)
        if listed:  # the same files, listed in another order, are the same clips
            paths = [path.relative_to(root) for path in sorted(root.rglob("*.wav"), reverse=True)]
            table = pd.DataFrame({"path": paths, "label": [path.parts[0] for path in paths]})
            table.to_csv(root / "list.csv", index=False)
        after = datasets.load_folder(root, folds)
        assert before[kept].merge(after[kept]).shape == before[kept].shape
        assert after.fold.between(1, folds).all()


def test_numbered_and_many_recordings_are_dealt_evenly(tmp_path):
    root = own_table(tmp_path, [f"rec{number}" for number in range(33, 73)])
    assert datasets.load_folder(root).fold.value_counts().tolist() == [8] * 5
    words = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvw"]
    counts = datasets.load_folder(own_table(tmp_path / "many", words)).fold.value_counts()
    assert counts.between(35, 90).all()  # 60 each, five deviations of chance


def test_a_table_beside_the_sounds_says_what_they_are(tmp_path):
    for name in ("x/a_1", "x/a_2", "b"):
        write_tone(tmp_path / f"{name}.ogg")
    write_tone(tmp_path.parent / f"{tmp_path.name}-far/c.wav")
    far = f"{tmp_path}-far/c.wav"
    rows = [
        "filename,category,note",
        "x/a_1.ogg,one,1",
        "./x\\a_2.wav,two,",
        f"{far},two,",
        "b.ogg,one,",
    ]
    (tmp_path / "list.CSV").write_text("ignored")
    (tmp_path / "words.csv").write_text("label,noun,clause\none,a one,a one is heard\n")
    (tmp_path / "sounds.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    clips = datasets.load_folder(tmp_path)
    assert clips.label.tolist() == ["one", "two", "two", "one"]
    assert clips.clip_id.tolist() == ["x-a_1", "x-a_2", "two-c", "b"]
    assert clips.source_id.tolist() == ["x-a", "x-a", "two-c", "b"] and clips.path[2] == far
    assert datasets.load_folder(tmp_path / "sounds.csv").equals(clips)
    (tmp_path / "more.csv").write_text("\n".join(rows[:2]))
    with pytest.raises(datasets.DatasetError, match="2 tables with path and label; name the one"):
        datasets.load_folder(tmp_path)
    assert len(datasets.load_folder(tmp_path / "more.csv")) == 1
    with pytest.raises(datasets.DatasetError, match=r"words\.csv: 0 tables with path and label"):
        datasets.load_folder(tmp_path / "words.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\n../a.wav,x", r"sounds\.csv, row 1: name '\.\./a\.wav' must be a relative path"),
        ("path,label\n/nowhere/a.wav,x", "row 1: name '/nowhere/a.wav' must be a relative"),
        ("path,label\na.wav,x\nb.wav,x", r"1 of the 2 files .*first: b\.wav\); correct the paths"),
        ("path,label\na.wav,x\na.wav,y", "1 files are listed twice"),
        ("path,label\na.wav,", "row 1: label '' must be a plain name"),
        ("path,label\na.wav,x/y", "row 1: label 'x/y' must be a plain name"),
        ("path,label,source_id\na.wav,x,", "row 1: source_id '' is empty"),
        ("path,label,fold\na.wav,x,1.5", "row 1: fold 1.5 must be a whole number"),
        ("path,label,split\na.wav,x,dev", "split 'dev' is not train, val or test; correct it"),
    ],
)
def test_a_table_of_own_sounds_is_checked(tmp_path, rows, message):
    write_tone(tmp_path / "a.wav")
    (tmp_path / "sounds.csv").write_text(rows)
    with pytest.raises(store.DataError, match=message) as caught:
        datasets.load_folder(tmp_path)
    assert not re.search("delete|fetch|download", str(caught.value))


@pytest.mark.parametrize(
    "words",
    [("train", "val", "test"), ("Training", "validation ", "TEST"), ("train", "valid", "eval"),
     ("train", "eval", "testing")],
)  # fmt: skip
def test_a_split_of_ones_own_comes_back(tmp_path, words):
    names = [f"n{number}" for number in range(20)]
    kinds = ["train", "val", "test", "train", "train"] * 4
    said = dict(zip(("train", "val", "test"), words, strict=True))
    root = own_table(tmp_path, names, split=[said[kind] for kind in kinds])
    clips = datasets.load_folder(root)
    assert datasets.assign_splits(clips, 5).tolist() == kinds
    assert clips.fold[clips.fold.between(2, 4)].nunique() == 3  # folds to replace, or to choose by
    assert datasets.assign_splits(datasets.load_folder(root, folds=8), 8).tolist() == kinds


def test_folds_and_sources_of_ones_own_are_kept(tmp_path):
    names = ["take_1", "take_2", "take_3"]
    clips = datasets.load_folder(own_table(tmp_path, names, fold=[3, 1, 2]))
    assert clips.fold.tolist() == [3, 1, 2] and clips.source_id.tolist() == names
    clips = datasets.load_folder(own_table(tmp_path, names, source_id=["007", "007", "1e3"]))
    assert clips.source_id.tolist() == ["007", "007", "1e3"]
    assert clips.fold[0] == clips.fold[1]


def test_what_cannot_be_read_is_set_aside_and_said(tmp_path):
    for name in ("a/1", "a/2", "b/1"):
        write_tone(tmp_path / f"{name}.wav")
    (tmp_path / "a/2.wav").write_bytes(b"")
    (tmp_path / "b/x.mp3").write_bytes(b"no sound" * 99)
    whole = (tmp_path / "b/1.wav").read_bytes()
    (tmp_path / "b/cut.wav").write_bytes(whole[:900])
    with pytest.warns(
        UserWarning, match=r"3 of 5 files cannot be read .*a/2\.wav: the file is emp"
    ) as said:
        clips = datasets.load_folder(tmp_path)
    assert clips.clip_id.tolist() == ["a-1", "b-1"] and clips.index.tolist() == [0, 1]
    assert len(said) == 1 and not re.search("delete|remove|fetch|copy", str(said[0].message))


def classes(root, **numbers):
    for label, number in numbers.items():
        for name in range(number):
            write_tone(root / label / f"{name}.wav")
    return root


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "no recordings .*one subfolder per class, or a CSV"),
        ({"dog": 5}, r"classes: 1, recordings of dog: 5; a study needs two"),
        ({"dog": 5, "cat": 2, "cow": 1}, r"classes: 3, recordings of cat: 2, cow: 1; .* leave one out"),
    ],
)
def test_what_no_study_can_be_made_of_is_refused(tmp_path, numbers, message):
    with pytest.raises(datasets.DatasetError, match=message) as caught:
        datasets.load_clips("own", sounds_root=classes(tmp_path, **numbers))
    assert str(tmp_path) in str(caught.value) and not re.search("delete|fetch", str(caught.value))


def test_counters_do_not_make_three_recordings(tmp_path):
    classes(tmp_path, dog=5)
    for number in range(9):
        write_tone(tmp_path / "cat" / f"field_{number}.wav")
    with pytest.raises(datasets.DatasetError, match=r"cat: 1; .*differ in a counter are one recording"):
        datasets.load_clips("own", sounds_root=tmp_path)


def parameters(root, **changed):
    known = {"sounds_root": str(root), "scenes_root": "", "ambient_classes": [], "data_dir": "data"}
    return known | {"test_fold": 5, "test_folds": [5]} | changed


def test_a_run_on_own_sounds_is_checked_before_it_starts(tmp_path):
    root = classes(tmp_path / "own", dog=10, cat=10, rain=10)
    datasets.check_own(parameters(root))
    datasets.check_own(parameters(root, ambient_classes=["rain"], test_folds=[4, 5]))
    datasets.check_own(parameters(root, scenes_root=classes(tmp_path / "places", yard=3)))
    for changed, message in (
        ({"test_folds": [5, 6]}, r"test fold 6 leaves a class .*of use: \[1, 2, 3, 4, 5\]"),
        ({"ambient_classes": ["rian"]}, "ambient_classes rian: name some of cat, dog, rain"),
        ({"ambient_classes": ["rain", "dog", "cat"]}, "ambient_classes .*not all"),
        ({"scenes_root": classes(tmp_path / "few", yard=2)}, r"few: .* fewer than three folds; add"),
        ({"sounds_root": str(tmp_path / "gone")}, "gone: no such folder"),
    ):
        with pytest.raises(datasets.DatasetError, match=message):
            datasets.check_own(parameters(root, **changed))
    for path in (root / "cat").iterdir():
        path.rename(path.with_stem(f"{5 * int(path.stem)}"))  # all in one fold
    with pytest.raises(datasets.DatasetError, match=r"leaves a class nothing .*of use: \[\]"):
        datasets.check_own(parameters(root))


def test_scenes_of_own_sounds(tmp_path, tau_root, capsys):
    root = classes(tmp_path / "own", dog=4, hall_2=4)
    clips = datasets.load_clips("own", sounds_root=root)
    events, scenes = datasets.load_scenes("own", clips, ambient_classes=["hall_2"])
    assert set(events.label) == {"dog"} and set(scenes.label) == {"hall_2"}
    assert events.index.tolist() == scenes.index.tolist() == [0, 1, 2, 3]
    places = classes(tmp_path / "places", yard=4, port=4)
    events, scenes = datasets.load_scenes("own", clips, scenes_root=places, tau_root=tau_root)
    assert len(events) == 8 and set(scenes.label) == {"yard", "port"}
    events, scenes = datasets.load_scenes("own", clips, scenes_root=places / "yard")
    assert set(scenes.label) == {"yard"} and capsys.readouterr().out == ""
    for named in ("own", "urbansound8k"):
        events, scenes = datasets.load_scenes(named, clips, data_dir=tmp_path, scenes_per_class=5)
        assert len(events) == 8 and set(scenes.dataset) == {"builtin-scenes"}
        assert capsys.readouterr().out.count("the built-in ones serve") == 1


def test_missing_folder_and_table_are_named(tmp_path):
    with pytest.raises(datasets.DatasetError, match=r"gone: no such folder.*download_dataset..esc50"):
        datasets.load_esc50(tmp_path / "gone")
    with pytest.raises(datasets.DatasetError, match=r"has no metadata/UrbanSound8K.csv.*zenodo"):
        datasets.load_urbansound8k(tmp_path)


@pytest.fixture
def urbansound8k_root(tmp_path):
    root = tmp_path / "us8k"
    rows = [(f"{700 + f}-3-0-0.wav", 700 + f, f, 3, "dog_bark") for f in range(1, 11)]
    for row in rows:
        write_tone(root / "audio" / f"fold{row[2]}" / row[0])
    columns = ["slice_file_name", "fsID", "fold", "classID", "class"]
    (root / "metadata").mkdir()
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(root / "metadata/UrbanSound8K.csv", index=False)
    return root


def test_urbansound8k_layout(urbansound8k_root):
    clips = datasets.load_clips("urbansound8k", urbansound8k_root=urbansound8k_root)
    assert clips.fold.tolist() == list(range(1, 11))
    assert clips.source_id[0] == "701" and clips.label[0] == "dog_bark"
    splits = datasets.assign_splits(clips, test_fold=10)
    assert splits.tolist() == ["val"] + ["train"] * 8 + ["test"]


@pytest.fixture
def tau_root(tmp_path):
    cities = ["barcelona", "helsinki", "lisbon", "london", "lyon", "milan"]
    rows = [
        (f"audio/{scene}-{city}-{place}-0-{device}.wav", scene, f"{city}-{place}", device)
        for place, scene in enumerate(("airport", "park"))
        for city in cities
        for device in "ab"
    ]
    for row in rows:
        write_tone(tmp_path / "tau" / row[0])
    columns = ["filename", "scene_label", "identifier", "source_label"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "tau/meta.csv", sep="\t", index=False)
    return tmp_path / "tau"


def test_tau_folds_keep_a_city_and_its_devices_together(tau_root):
    clips = datasets.load_tau(tau_root)
    assert clips.source_id[0] == "barcelona-0" and clips.label[0] == "airport"
    city = clips.source_id.str.split("-").str[0]
    assert clips.groupby(city).fold.nunique().max() == 1
    assert sorted(clips.fold.unique()) == [1, 2, 3, 4, 5]
    assert set(datasets.assign_splits(clips, 5)) == {"train", "val", "test"}


def write_setup(root, train, evaluate):
    (root / "evaluation_setup").mkdir()
    for part, rows in (("train", train), ("evaluate", evaluate)):
        columns = rows[["filename", "scene_label"]]
        columns.to_csv(root / f"evaluation_setup/fold1_{part}.csv", sep="\t", index=False)


def test_loading_reads_headers_only(tau_root):
    for path in sorted((tau_root / "audio").iterdir()):
        header = path.read_bytes()[:44]
        size = 2**31 - 2**20
        sizes = {4: size + 36, 40: size}
        for at, number in sizes.items():
            header = header[:at] + number.to_bytes(4, "little") + header[at + 4 :]
        with path.open("wb") as file:
            file.write(header)
            # a hole of 2 GB: 48 GB in all could not be read within the test's time
            file.truncate(44 + size)
    clips = datasets.load_tau(tau_root)
    assert clips.duration_s.unique().tolist() == [(2**31 - 2**20) / 2 / RATE]


def test_scenes_come_from_tau_or_from_the_ambient_classes(esc_root, tau_root):
    clips = datasets.load_esc50(esc_root)
    events, scenes = datasets.load_scenes("esc50", clips, tau_root=tau_root)
    assert len(events) == 10 and set(scenes.label) == {"airport", "park"}
    clips.loc[clips.label == "cow", "label"] = "rain"
    events, scenes = datasets.load_scenes("esc50", clips)
    assert set(events.label) == {"dog"} and set(scenes.label) == {"rain"}


def test_splits_follow_the_study_and_refuse_a_shared_source():
    clips = pd.DataFrame({"fold": [1, 2, 3, 4, 5], "source_id": list("abcde")})
    for test_fold in range(1, 6):
        splits = datasets.assign_splits(clips, test_fold)
        # validation is fold (n + 1) mod 6, 0 becoming 1, as in arXiv 2403.17864 with ten folds
        val_fold = (test_fold + 1) % 6 or 1
        assert splits[clips.fold == val_fold].tolist() == ["val"]
        assert (splits == "train").sum() == 3
    with pytest.raises(datasets.DatasetError, match=r"1 recordings .*source_id a"):
        datasets.assign_splits(clips.assign(source_id=list("abcda")), 5)
    with pytest.raises(datasets.DatasetError, match="test_fold 7 with folds"):
        datasets.assign_splits(clips, 7)


def test_audit_sets_bad_clips_aside(esc_root):
    clips = datasets.load_esc50(esc_root)
    bad = {
        "silent": lambda p: sf.write(p, np.zeros(800), RATE),
        "NaN": lambda p: sf.write(p, np.full(800, np.nan), RATE, subtype="FLOAT"),
        "cannot be read": lambda p: Path(p).write_bytes(b"RIFF, or so it says" * 40),
        "empty": lambda p: Path(p).write_bytes(b""),
    }
    for path, spoil in zip(clips.path, bad.values(), strict=False):
        spoil(path)
    good, problems = datasets.audit(datasets.load_esc50(esc_root))
    assert len(good) == 6 and good.index.tolist() == list(range(6))
    assert problems.clip_id.tolist() == clips.clip_id[:4].tolist()
    for text, expected in zip(problems.problem, bad, strict=True):
        assert expected in text


def test_builtin_sets_have_the_layouts_they_borrow(tmp_path):
    clips = datasets.load_clips("builtin", data_dir=tmp_path, clips_per_class=5)
    assert clips.groupby("label").fold.nunique().tolist() == [5] * 10
    events, scenes = datasets.load_scenes("builtin", clips, data_dir=tmp_path, scenes_per_class=5)
    assert len(events) == 50 and scenes.label.nunique() == 10
    for table in (events, scenes):
        assert set(datasets.assign_splits(table, 5)) == {"train", "val", "test"}
    assert datasets.audit(events)[1].empty


@pytest.fixture
def dcase_root(tmp_path):
    root = tmp_path / "dcase"
    rng = np.random.default_rng(0)
    shapes = zip(datasets.DCASE2024_TASK7_NETWORKS, ((1, 16), (4, 8), (4, 12)), strict=True)
    for network, shape in shapes:
        (root / "embeddings" / network).mkdir(parents=True)
        for clip in (1, 2, 3):
            path = root / f"embeddings/{network}/dev_00{clip}.npy"
            np.save(path, rng.normal(size=shape).astype(np.float16))
    rows = [(f"dev_00{clip}.wav", f"a dog is barking, {clip} times") for clip in (3, 1, 2)]
    pd.DataFrame(rows, columns=["file", "caption"]).to_csv(root / "captions.csv", index=False)
    return root


def test_dcase_embeddings_come_in_the_order_of_the_captions(dcase_root):
    captions, embeddings = datasets.load_dcase2024_task7(dcase_root)
    assert captions.columns.tolist() == ["clip_id", "file", "caption"]
    assert captions.clip_id.tolist() == ["dev_003", "dev_001", "dev_002"]
    assert embeddings["vggish"].shape == (3, 4, 8) and embeddings["vggish"].dtype == np.float32
    first = np.load(dcase_root / "embeddings/vggish/dev_003.npy")
    assert (embeddings["vggish"][0] == first).all()
    assert list(datasets.load_dcase2024_task7(dcase_root, ["clap-2023"])[1]) == ["clap-2023"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "vggish/dev_002.npy: cannot be used"),
        (lambda p: p.write_bytes(p.read_bytes()[:90]), "dev_002.npy: cannot be used"),
        (lambda p: np.save(p, np.full((4, 8), np.nan)), "not all .* finite"),
        (lambda p: np.save(p, np.zeros(8)), r"expected floats of \(4, 8\)"),
        (lambda p: np.save(p, np.array([["a"]], dtype=object)), "cannot be used"),
    ],
)
def test_dcase_folder_that_is_damaged_is_refused(dcase_root, spoil, message):
    spoil(dcase_root / "embeddings/vggish/dev_002.npy")
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load_dcase2024_task7(dcase_root)


def test_dcase_clips_of_another_shape_are_refused(dcase_root):
    np.save(dcase_root / "embeddings/vggish/dev_002.npy", np.zeros((5, 8)))
    with pytest.raises(
        datasets.DatasetError, match=r"dev_002.npy: .*\(5, 8\), expected floats of \(4, 8\)"
    ):
        datasets.load_dcase2024_task7(dcase_root)


@pytest.mark.skipif(not DCASE.is_dir(), reason="the DCASE 2024 set is not beside the project")
def test_real_dcase_set_has_the_pinned_content():
    captions, embeddings = datasets.load_dcase2024_task7(DCASE)
    # 30 foregrounds over 2 of 3 backgrounds each, as its organisers describe it
    background = captions.caption.str.extract(r" with (\w+) in the background$")[0]
    assert background.value_counts().to_dict() == {"traffic": 22, "water": 19, "crowd": 19}
    shapes = {network: array.shape for network, array in embeddings.items()}
    assert shapes["panns-wavegram-logmel"] == (60, 1, 2048)
    assert (shapes["vggish"], shapes["clap-2023"]) == ((60, 4, 128), (60, 4, 1024))
    digest = hashlib.sha256(captions.to_csv(index=False, lineterminator="\n").encode())
    for network in sorted(embeddings):
        digest.update(embeddings[network].astype("<f4").tobytes())
    assert digest.hexdigest() == "a8ab58a031b576410222a86fbea5146c68d95dfe9e0d00bc1dd19cc573854c69"


@pytest.mark.skipif(not ESC10.is_dir(), reason="the real ESC-10 is not beside the project")
def test_real_esc10():
    clips = datasets.load_clips("esc10", esc50_root=ESC10)
    assert clips.groupby("label").size().tolist() == [40] * 10
    assert clips.groupby("fold").size().tolist() == [80] * 5
    assert round(clips.duration_s.median(), 2) == 5.0 and set(clips.sample_rate) == {44100}
    events, scenes = datasets.load_scenes("esc10", clips)
    assert (len(events), len(scenes)) == (240, 160)
    assert set(datasets.assign_splits(events, 3)) == {"train", "val", "test"}


# --- downloads, from a server of our own ------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Notes what is asked for, and hangs up in the middle of the files in ``server.cut``."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        self.server.asked.append(path.name)
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut.pop(path.name, None)])

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.cut = [], {}
    server.folder, server.address = folder, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def served(web, dataset, checksums):
    """The published archives of a set, taken from our server and held to other checksums."""
    archives = datasets.ARCHIVES[datasets.ARCHIVES.dataset == dataset]
    archives = archives[archives.name.isin(checksums)]
    return archives.assign(url=f"{web.address}/" + archives.name, checksum=archives.name.map(checksums))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


ESC_ZIP = datasets.ARCHIVES.set_index("dataset").name["esc50"]
US8K_TAR = "UrbanSound8K.tar.gz"


def zip_folder(root, path, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, Path("ESC-50-abc") / file.relative_to(root))
        for member, content in extra:
            archive.writestr(member, content)


def tar_folder(root, path, top, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        archive.add(root, arcname=top)
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))


@pytest.fixture
def fetch_esc(web, tmp_path):
    def fetch(checksum=None):
        digest = checksum or hashlib.sha256((web.folder / ESC_ZIP).read_bytes()).hexdigest()
        archives = served(web, "esc50", {ESC_ZIP: f"sha256:{digest}"})
        return datasets.download_dataset("esc50", tmp_path / "data", archives)

    return fetch


@pytest.fixture
def fetch_us8k(web, tmp_path):
    def fetch():
        digest = hashlib.md5((web.folder / US8K_TAR).read_bytes()).hexdigest()
        archives = served(web, "urbansound8k", {US8K_TAR: f"md5:{digest}"})
        return datasets.download_dataset("urbansound8k", tmp_path / "data", archives)

    return fetch


def test_download_unpacks_and_is_not_repeated(web, fetch_esc, esc_root, tmp_path):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    root = fetch_esc()
    assert len(datasets.load_esc50(root)) == 10
    assert names_in(tmp_path / "data") == ["ESC-50"]
    assert fetch_esc() == root and web.asked == [ESC_ZIP]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b + b"x"])
def test_damaged_archive_fails_its_checksum_and_can_be_repeated(
    web, fetch_esc, esc_root, tmp_path, damage
):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    whole = (web.folder / ESC_ZIP).read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    (web.folder / ESC_ZIP).write_bytes(damage(whole))
    with pytest.raises(datasets.DatasetError, match="does not match the known hash"):
        fetch_esc(digest)
    assert names_in(tmp_path / "data") == []
    (web.folder / ESC_ZIP).write_bytes(whole)
    assert fetch_esc(digest).is_dir()


def link_member():
    member = zipfile.ZipInfo("ESC-50-abc/audio/link.wav")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("member", ["../climbed.txt", "/tmp/climbed.txt", link_member()])
def test_archive_that_climbs_out_is_refused(web, fetch_esc, esc_root, tmp_path, member):
    zip_folder(esc_root, web.folder / ESC_ZIP, [(member, "/etc/passwd")])
    with pytest.raises(datasets.DatasetError, match="would be written outside"):
        fetch_esc()
    assert not list(tmp_path.rglob("climbed.txt"))
    assert not (tmp_path / "data/ESC-50").exists()


def test_archive_with_missing_audio_leaves_nothing(web, fetch_esc, esc_root, tmp_path):
    (esc_root / "audio/1-101-A-0.wav").unlink()
    zip_folder(esc_root, web.folder / ESC_ZIP)
    with pytest.raises(datasets.DatasetError, match="1 of the 10 files"):
        fetch_esc()
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_archive_without_the_table_is_refused(web, fetch_esc, esc_root):
    zip_folder(esc_root / "audio", web.folder / ESC_ZIP)
    with pytest.raises(datasets.DatasetError, match=r"0 files meta/esc50\.csv, expected one"):
        fetch_esc()


def test_folds_and_splits_without_entries_say_nothing(tmp_path):
    for number in (1, 2):
        write_tone(tmp_path / f"{number}.wav")
    (tmp_path / "t.csv").write_text("path,label,fold,split\n1.wav,dog,,\n2.wav,dog,,\n")
    clips = datasets.load_folder(tmp_path)
    assert clips["source_id"].tolist() == ["1", "2"] and clips["fold"].notna().all()


PUBLISHED = store.read_table(Path(datasets.__file__).with_name("esc10.csv"), as_text=True)
ESC10_ZIP = datasets.ARCHIVES.set_index("dataset").name["esc10"]


@pytest.fixture
def fetch_esc10(web, tmp_path):
    """ESC-10 from an archive like GitHub's, made of the published files."""
    if not ESC10.is_dir():
        pytest.skip(f"needs the recordings of ESC-10 in {ESC10}")
    with zipfile.ZipFile(web.folder / ESC10_ZIP, "w") as archive:
        archive.writestr("ESC-10-553c8f1/README.md", "ESC-10")
        for row in PUBLISHED.itertuples():
            archive.write(ESC10 / "audio" / row.filename, f"ESC-10-553c8f1/{row.path}")

    def fetch():
        archives = served(web, "esc10", {ESC10_ZIP: ""})
        return datasets.download_dataset("esc10", tmp_path / "data", archives)

    return fetch


def test_esc10_is_laid_out_as_esc50(fetch_esc10, web, tmp_path):
    root = fetch_esc10()
    assert names_in(root) == ["README.md", "audio", "meta"]
    clips = datasets.load_clips("esc10", data_dir=tmp_path / "data")
    same = datasets.load_esc50(ESC10, esc10=True)
    pd.testing.assert_frame_equal(clips.drop(columns="path"), same.drop(columns="path"))
    published = store.read_table(ESC10 / "meta/esc50.csv", as_text=True)
    columns = ["filename", "fold", "target", "category"]
    ours = store.read_table(root / "meta/esc50.csv", as_text=True)
    assert set(ours[columns].itertuples(index=False)) == set(published[columns].itertuples(index=False))
    assert fetch_esc10() == root and web.asked == [ESC10_ZIP]
    assert names_in(tmp_path / "data") == ["ESC-10"]


@pytest.mark.parametrize("how", ["cut", "another file", "killed"])
def test_esc10_is_never_half_there(fetch_esc10, web, tmp_path, monkeypatch, how):
    if how == "cut":
        web.cut[ESC10_ZIP] = 10**6
    if how == "another file":
        whole = (web.folder / ESC10_ZIP).read_bytes()
        with zipfile.ZipFile(web.folder / ESC10_ZIP, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            archive.writestr(f"ESC-10-553c8f1/{PUBLISHED.path[7]}", b"something else")
    if how == "killed":  # after the archive has come
        (tmp_path / "data/.unpacking-ESC-10/audio").mkdir(parents=True)
        shutil.copy(web.folder / ESC10_ZIP, tmp_path / "data" / ESC10_ZIP)
    else:
        wrong = "check the connection" if how == "cut" else re.escape(PUBLISHED.path[7])
        with pytest.raises(datasets.DatasetError, match=wrong):
            fetch_esc10()
        assert names_in(tmp_path / "data") == []
    if how == "another file":
        (web.folder / ESC10_ZIP).write_bytes(whole)
    assert len(datasets.load_esc50(fetch_esc10(), esc10=True)) == 400
    assert names_in(tmp_path / "data") == ["ESC-10"]
    assert len(web.asked) == (0 if how == "killed" else 2)


@pytest.mark.parametrize("answer", ["", "n"])
def test_at_a_terminal_one_is_asked_before_anything_is_fetched(
    web, fetch_esc, esc_root, monkeypatch, answer
):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: answer)
    if answer == "n":
        with pytest.raises(datasets.DatasetError, match="ESC-50 is not fetched"):
            fetch_esc()
        assert web.asked == []
    else:
        assert fetch_esc().is_dir()


def test_no_server_and_unknown_names_are_said(fetch_esc):
    with pytest.raises(datasets.DatasetError, match="check the connection"):
        fetch_esc("0" * 64)
    with pytest.raises(datasets.DatasetError, match="unknown dataset 'esc'; choose one of esc50, esc10"):
        datasets.download_dataset("esc")


def test_interrupted_download_can_be_repeated(web, fetch_esc, esc_root, tmp_path):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    web.cut[ESC_ZIP] = 10_000
    with pytest.raises(datasets.DatasetError, match="check the connection"):
        fetch_esc()
    assert len(datasets.load_esc50(fetch_esc())) == 10
    assert names_in(tmp_path / "data") == ["ESC-50"]


@pytest.mark.parametrize("rest", [b"of another file", b"x" * 10**6])
def test_what_lies_there_is_never_taken_for_the_archive(web, fetch_esc, esc_root, tmp_path, rest):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ESC_ZIP).write_bytes(rest)
    assert len(datasets.load_esc50(fetch_esc())) == 10
    assert names_in(tmp_path / "data") == ["ESC-50"]


def test_archive_fetched_by_an_earlier_run_is_used(web, fetch_esc, esc_root, tmp_path, monkeypatch):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(datasets.DatasetError, match="cannot be unpacked"):
            fetch_esc()
    stale = tmp_path / "data/.unpacking-ESC-50"
    stale.mkdir()
    (stale / "half.wav").write_bytes(b"RIFF")
    assert len(datasets.load_esc50(fetch_esc())) == 10
    assert web.asked == [ESC_ZIP] and names_in(tmp_path / "data") == ["ESC-50"]


def test_need_licence_and_citation_are_said_beforehand(web, fetch_esc, esc_root, monkeypatch, capsys):
    zip_folder(esc_root, web.folder / ESC_ZIP)
    usage = type("Usage", (), {"free": 1_000_000_000})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(datasets.DatasetError, match=r"1\.55 GB needed, 1\.00 GB are free"):
            fetch_esc()
    assert not web.asked
    said = capsys.readouterr().out
    assert "to fetch 0.65 GB" in said and "1.55 GB needed, 1.00 GB are free" in said
    assert "licence: CC BY-NC 3.0" in said and "please cite: K. J. Piczak" in said
    fetch_esc()
    capsys.readouterr()
    fetch_esc()
    assert not capsys.readouterr().out


def test_urbansound8k_is_fetched_and_unpacked(web, fetch_us8k, urbansound8k_root, tmp_path):
    tar_folder(urbansound8k_root, web.folder / US8K_TAR, "UrbanSound8K")
    web.cut[US8K_TAR] = 2_000
    with pytest.raises(datasets.DatasetError, match="cannot be fetched"):
        fetch_us8k()
    assert names_in(tmp_path / "data") == []
    root = fetch_us8k()
    assert len(datasets.load_clips("urbansound8k", data_dir=tmp_path / "data")) == 10
    assert names_in(tmp_path / "data") == ["UrbanSound8K"] and fetch_us8k() == root


def tar_member(name="UrbanSound8K/x", size=0, **fields):
    member = tarfile.TarInfo(name)
    member.size = size
    for field, value in fields.items():
        setattr(member, field, value)
    return member


@pytest.mark.parametrize(
    "member",
    [
        tar_member("../climbed.txt", 3),
        tar_member("UrbanSound8K/../../climbed.txt", 3),
        tar_member("/tmp/climbed.txt", 3),
        tar_member("..\\climbed.txt", 3),
        tar_member("C:/climbed.txt", 3),
        tar_member(type=tarfile.SYMTYPE, linkname="/etc"),
        tar_member(type=tarfile.LNKTYPE, linkname="UrbanSound8K/metadata/UrbanSound8K.csv"),
        tar_member(type=tarfile.FIFOTYPE),
        tar_member(type=tarfile.CHRTYPE),
    ],
)
def test_tar_file_that_climbs_out_or_links_is_refused(
    web, fetch_us8k, urbansound8k_root, tmp_path, member
):
    tar_folder(urbansound8k_root, web.folder / US8K_TAR, "UrbanSound8K", [member])
    with pytest.raises(datasets.DatasetError, match="would be written outside"):
        fetch_us8k()
    assert not list(tmp_path.rglob("climbed.txt"))
    assert names_in(tmp_path / "data") == [US8K_TAR]


def test_a_locked_or_unknown_zip_is_named(web, fetch_esc, esc_root):
    for place, value in ((6, 1), (8, 99)):  # the flag of a password, the method of packing
        zip_folder(esc_root, web.folder / ESC_ZIP)
        content = bytearray((web.folder / ESC_ZIP).read_bytes())
        for sign, offset in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            start = content.find(sign)
            while start >= 0:
                content[start + place + offset] |= value
                start = content.find(sign, start + 4)
        (web.folder / ESC_ZIP).write_bytes(content)
        with pytest.raises(datasets.DatasetError, match=rf"{ESC_ZIP}: cannot be unpacked"):
            fetch_esc()


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE])
def test_names_as_long_as_a_file_are_not_read(web, fetch_us8k, kind):
    with tarfile.open(web.folder / US8K_TAR, "w") as archive:
        archive.fileobj.write(tar_member(size=6 * 10**8, type=kind).tobuf(tarfile.GNU_FORMAT))
        archive.fileobj.write(b"x" * 10**6)
    with pytest.raises(datasets.DatasetError, match="a name of 600000000 bytes"):
        fetch_us8k()


def test_bombs_are_refused_by_what_they_declare(web, fetch_esc, fetch_us8k, esc_root, tmp_path):
    # they declare 10 TB; the bytes behind it are never reached
    zip_folder(esc_root, web.folder / ESC_ZIP)
    with zipfile.ZipFile(web.folder / ESC_ZIP, "a") as archive:
        archive.writestr("ESC-50-abc/audio/bomb.wav", b"")
        archive.filelist[-1].file_size = 10**13
        archive._didModify = True
    with pytest.raises(datasets.DatasetError, match=r"unpacks to 10000\.00 GB or more where 0\.90"):
        fetch_esc()
    with tarfile.open(web.folder / US8K_TAR, "w") as archive:
        archive.fileobj.write(tar_member(size=10**13).tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(datasets.DatasetError, match=r"unpacks to 10000\.00 GB or more where 7\.10"):
        fetch_us8k()
    assert sum(file.stat().st_size for file in (tmp_path / "data").rglob("*")) < 10**6


TAU_NAME = "TAU-urban-acoustic-scenes-2020-mobile-development"


def serve_tau(web, root):
    """Two audio archives, tables and licence text, named and laid out as on Zenodo."""
    meta = pd.read_csv(root / "meta.csv", sep="\t")
    tested = meta.identifier.str.startswith("milan")
    write_setup(root, meta[~tested], meta[tested])
    (root / "README.md").write_text("copyright notice")
    setup = [f"evaluation_setup/fold1_{part}.csv" for part in ("train", "evaluate")]
    files = {
        "doc": ["README.md"],
        "meta": ["meta.csv", *setup],
        "audio.1": meta.filename[:14],
        "audio.2": meta.filename[14:],
    }
    checksums = {}
    for part, names in files.items():
        path = web.folder / f"{TAU_NAME}.{part}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                archive.write(root / name, f"{TAU_NAME}/{name}")
        checksums[path.name] = "md5:" + hashlib.md5(path.read_bytes()).hexdigest()
    return served(web, "tau", checksums).assign(unpacked=10**6)


def test_tau_is_put_together_from_its_archives(web, tau_root, tmp_path, capsys):
    archives = serve_tau(web, tau_root)
    root = datasets.download_dataset("tau", tmp_path / "data", archives)
    assert "Tampere University" in capsys.readouterr().out
    ours, theirs = (datasets.load_tau(where) for where in (root, tau_root))
    assert ours.drop(columns="path").equals(theirs.drop(columns="path"))
    assert names_in(tmp_path / "data") == ["TAU-2020-Mobile"]
    assert (root / "README.md").is_file() and len(web.asked) == 4


def test_tau_goes_on_after_a_broken_archive(web, tau_root, tmp_path):
    archives = serve_tau(web, tau_root)
    wrong = archives.assign(checksum=[*archives.checksum[:3], "md5:" + "0" * 32])
    with pytest.raises(datasets.DatasetError, match=r"audio\.2\.zip: cannot be fetched"):
        datasets.download_dataset("tau", tmp_path / "data", wrong)
    web.asked.clear()
    root = datasets.download_dataset("tau", tmp_path / "data", archives)
    assert len(datasets.load_tau(root)) == 24
    assert web.asked == [f"{TAU_NAME}.audio.2.zip"]


def test_tau_without_one_archive_is_refused(web, tau_root, tmp_path):
    archives = serve_tau(web, tau_root)
    with pytest.raises(datasets.DatasetError, match="10 of the 24 files"):
        datasets.download_dataset("tau", tmp_path / "data", archives[:3])
    assert not (tmp_path / "data/TAU-2020-Mobile").exists()


def test_tau_copied_by_hand_is_left_as_it_is(web, tau_root, tmp_path):
    (tmp_path / "data").mkdir()
    tau_root.rename(tmp_path / "data/TAU-2020-Mobile")
    root = datasets.download_dataset("tau", tmp_path / "data")
    assert len(datasets.load_tau(root)) == 24
    next((root / "audio").iterdir()).unlink()
    with pytest.raises(datasets.DatasetError, match="1 of the 24 files"):
        datasets.download_dataset("tau", tmp_path / "data")


def test_the_table_of_archives_is_whole():
    archives = datasets.ARCHIVES
    assert set(archives.dataset) == set(datasets.SOURCES.index)
    published = archives[archives.checksum != ""]
    assert published.checksum.is_unique
    assert published.checksum.str.fullmatch("md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}").all()
    audio = archives[archives.name.str.contains("audio")]
    assert [name.split(".")[2] for name in audio.name] == [str(number) for number in range(1, 17)]
    # 64 hours of 24-bit mono at 44.1 kHz, less what ZIP saves
    assert 0.8 < audio["size"].sum() / (64 * 3600 * 44_100 * 3) < 1.0


def serve_dcase(web, root):
    names = ["dcase2024_task7_captions.csv", "dcase2024_task7_embeddings.tar.xz"]
    (web.folder / names[0]).write_bytes((root / "captions.csv").read_bytes())
    tar_folder(root / "embeddings", web.folder / names[1], "embeddings", mode="w:xz")
    return served(web, "dcase2024_task7", dict.fromkeys(names, ""))


def test_dcase_set_is_fetched(web, dcase_root, tmp_path, capsys):
    archives = serve_dcase(web, dcase_root)
    root = datasets.download_dataset("dcase2024_task7", tmp_path / "data", archives)
    assert "Lagrange" in capsys.readouterr().out
    captions, embeddings = datasets.load_dcase2024_task7(root)
    theirs = datasets.load_dcase2024_task7(dcase_root)
    assert captions.equals(theirs[0])
    assert all((embeddings[network] == theirs[1][network]).all() for network in embeddings)
    assert names_in(tmp_path / "data") == ["dcase2024_task7_dev"]


def test_dcase_archive_that_is_cut_short_is_fetched_again(web, dcase_root, tmp_path):
    archives = serve_dcase(web, dcase_root)
    archive = web.folder / archives.name.iloc[1]
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(datasets.DatasetError, match="try again"):
        datasets.download_dataset("dcase2024_task7", tmp_path / "data", archives)
    assert names_in(tmp_path / "data") == []
    archive.write_bytes(whole)
    assert datasets.download_dataset("dcase2024_task7", tmp_path / "data", archives).is_dir()


def test_unknown_dataset_lists_the_names():
    with pytest.raises(datasets.DatasetError, match="builtin, esc10, esc50, urbansound8k, own"):
        datasets.load_clips("esc")
