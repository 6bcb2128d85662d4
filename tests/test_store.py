import json
import math
import ntpath
import os
import posixpath
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import store

SETTINGS = settings(deadline=None, max_examples=40)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=8)


# --- tables --------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(WORDS | st.sampled_from(["001", "1e5", "NA", "None", "nan", "True"]), min_size=1))
def test_names_come_back_as_they_were_written(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("tables") / "clips.csv"
    table = pd.DataFrame({"clip_id": names, "label": names, "caption_7": names, "fold": 3})
    store.write_table(table, path)
    back = store.read_table(path)
    assert back["clip_id"].tolist() == back["label"].tolist() == back["caption_7"].tolist() == names
    assert back["fold"].tolist() == [3] * len(names)


@SETTINGS
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_numbers_come_back_to_the_last_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("tables") / "levels.csv"
    store.write_table(pd.DataFrame({"snr_db": values}), path)
    assert store.read_table(path)["snr_db"].tolist() == values


def test_only_the_empty_cell_is_missing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("label,score,kept,fold\nnull,,True,1\n,0.5,False,2\n", encoding="utf-8")
    table = store.read_table(path)
    assert table["label"].tolist() == ["null", ""]
    assert np.isnan(table["score"][0]) and table["score"][1] == 0.5
    assert table["kept"].tolist() == [True, False]
    assert table["fold"].dtype == "int64"


def test_a_file_that_is_not_a_table_is_named(tmp_path):
    with pytest.raises(store.DataError, match=r"gone\.csv"):
        store.read_table(tmp_path / "gone.csv")
    (tmp_path / "odd.csv").write_bytes(b"a,b\n1,2,3,4\n1\n\xff\xfe")
    with pytest.raises(store.DataError, match=r"odd\.csv"):
        store.read_table(tmp_path / "odd.csv")


def test_a_foreign_table_can_be_read_as_text(tmp_path):
    names = ["001", "1e5", "None"]
    path = store.write_table(pd.DataFrame({"class": names, "label": names}), tmp_path / "t.csv")
    assert store.read_table(path, as_text=True).to_numpy().tolist() == [[name] * 2 for name in names]


PLAIN = ["a", "a b", "Straße 7.wav", "1-100032-A-0", "x" * 200, "a..b", "-"]
UNPLAIN = [
    "",
    " ",
    "..",
    ".",
    ".hidden",
    "a/b",
    "/a",
    "../a",
    "a\\b",
    "a\0",
    "x" * 201,
    None,
    3,
    math.nan,
]
OUTSIDE = ["", "../a", "a/../../b", "/etc/a", "~/a", "C:/a", "c:a", "..\\a", "a/..", "a\0b", None, 3.0]


def test_names_and_paths_stay_inside():
    for kind, good, bad in (
        ("a name", PLAIN, UNPLAIN),
        ("a path inside", [*PLAIN, "a/b.wav", "a/.b", "a\\b", ".a/b", "a/..b"], OUTSIDE),
    ):
        store.check_rows(pd.DataFrame({"it": good}), "t.csv", it=kind)
        for value in bad:
            with pytest.raises(store.DataError, match=r"t\.csv, row 2: it "):
                store.check_rows(pd.DataFrame({"it": ["a", value]}), "t.csv", it=kind)


@given(st.lists(st.sampled_from([*"ab./\\~: ", ".."]), max_size=9).map("".join))
def test_no_relative_path_that_passes_leaves_its_folder(text):
    try:
        store.check_rows(pd.DataFrame({"it": [text]}), "t.csv", it="a path inside")
    except store.DataError:
        return
    for here in (posixpath, *[ntpath] * (":" not in text)):
        assert here.normpath(here.join("base", text)).split(here.sep)[0] == "base"


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None, "1", [1], -0.5, 0.5])
def test_numbers_are_finite_and_in_range(odd):
    good = {
        "a number": [-1.5, 0, 2],
        "not negative": [0, 0.5],
        "positive": [1e-300, 3],
        "whole": [0, 7.0],
    }
    fitting = {"a number": (-0.5, 0.5), "not negative": (0.5,), "positive": (0.5,), "whole": ()}
    for kind, values in good.items():
        store.check_rows(pd.DataFrame({"it": values}), "t.csv", it=kind)
        table = pd.DataFrame({"it": [1, odd]}, dtype=object)
        if odd in fitting[kind]:
            store.check_rows(table, "t.csv", it=kind)
        else:
            with pytest.raises(store.DataError, match=r"t\.csv, row 2: it "):
                store.check_rows(table, "t.csv", it=kind)


# --- files ---------------------------------------------------------------------------------------


def test_a_file_is_known_by_its_content(tmp_path):
    path = store.write_atomic(tmp_path / "a.wav", b"1234")
    stamp = json.loads(json.dumps(store.file_stamp(path)))
    assert store.is_unchanged(path, stamp) and stamp == store.file_stamp(path, b"1234")
    copy = store.write_atomic(tmp_path / "b.wav", b"1234")
    os.utime(copy, (0, 0))
    assert store.is_unchanged(copy, stamp)
    for content in (b"", b"123", b"1235", b"12345"):
        store.write_atomic(path, content)
        os.utime(path, (1, 1))
        assert not store.is_unchanged(path, stamp)
    assert not store.is_unchanged(tmp_path / "gone", stamp)
    assert not store.is_unchanged(copy, None) and not store.is_unchanged(copy, [4])


@pytest.mark.parametrize("line", ["5", "{}", "[]", '["a", 5]', '["a"]', "\xff", '["a", {}'])
def test_odd_lines_of_records_are_passed_over(tmp_path, line):
    records = store.Records(tmp_path, "made")
    records.add("whole", {"n": 1})
    (file,) = (tmp_path / ".records").iterdir()
    file.write_bytes(line.encode("latin-1") + b"\n" + file.read_bytes() + b'["torn", {"n"')
    assert store.Records(tmp_path, "made").entries == {"whole": {"n": 1}}


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = store.write_atomic(tmp_path / "new" / "a.txt", "first")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(store.DataError, match=r"a\.txt: cannot be written"):
        store.write_atomic(path, "second")
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_walk_follows_links_and_ends_in_circles(tmp_path):
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (
        outside / "far.wav",
        root / "near.WAV",
        root / "sub" / "deep.flac",
        root / ".hidden.wav",
    ):
        path.touch()
    (root / "linked").symlink_to(outside)
    (root / "sub" / "back").symlink_to(root)
    names = [str(p.relative_to(root)) for p in store.walk_files(root, (".wav", ".flac"))]
    assert names == ["linked/far.wav", "near.WAV", "sub/deep.flac"]


def test_a_damaged_array_is_made_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return np.arange(3.0)

    for _ in range(2):
        assert store.cached_array(tmp_path / "a.npy", compute).tolist() == [0, 1, 2]
    assert len(calls) == 1
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY torn")
    with pytest.warns(UserWarning, match="damaged"):
        assert store.cached_array(tmp_path / "a.npy", compute).tolist() == [0, 1, 2]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.float64(3),
     np.zeros((0, 5)), np.array(["a", "bc"]), np.zeros((1, 65), ">i2")],
)  # fmt: skip
def test_a_cached_array_is_what_numpy_reads(tmp_path, array):
    for _ in range(2):
        kept = store.cached_array(tmp_path / "a.npy", lambda: array)
        read = np.load(tmp_path / "a.npy")
        assert (kept.dtype, kept.shape) == (read.dtype, read.shape) and (kept == read).all()
    kept[...] = 0  # what was read can be written to


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b + b"0", lambda b: b[:60], lambda b: b""]
)
def test_a_cached_array_of_another_length_is_made_again(tmp_path, change):
    path = tmp_path / "a.npy"
    store.cached_array(path, lambda: np.ones(4))
    path.write_bytes(change(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        assert store.read_array(path) is None
        assert store.cached_array(path, lambda: np.ones(3)).tolist() == [1, 1, 1]
    assert store.read_array(path).tolist() == [1, 1, 1] and store.read_array(tmp_path / "b.npy") is None


# --- what is made --------------------------------------------------------------------------------


def test_keys_follow_from_values_not_from_their_order_or_joints():
    assert store.content_key({"a": 1, "b": [2]}) == store.content_key({"b": [2], "a": 1})
    keys = [store.content_key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), (b"abc",))]
    assert len(set(keys)) == 4


def test_records_of_several_processes_join_and_torn_lines_are_ignored(tmp_path):
    code = (
        "import sys; from soundscapes_utils import store; "
        "store.Records(sys.argv[1], 'clips').add(sys.argv[2], {'bytes': int(sys.argv[3])})"
    )
    for key, size in (("a", 1), ("b", 2), ("a", 3)):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), key, str(size)], check=True)
    torn = tmp_path / ".records" / "clips-0-torn.jsonl"
    torn.write_text(json.dumps(["c", {"bytes": 4}]) + "\n" + '["d", {"byt', encoding="utf-8")
    os.utime(torn, (0, 0))
    records = store.Records(tmp_path, "clips")
    assert records.entries == {"c": {"bytes": 4}, "a": {"bytes": 3}, "b": {"bytes": 2}}
    assert store.Records(tmp_path, "other").entries == {}


@given(st.integers(0, 40), st.integers(1, 7))
def test_shards_part_the_rows(n, total):
    rows = list(range(n))
    shards = [store.shard(rows, f"{i + 1}/{total}") for i in range(total)]
    assert sorted(row for part in shards for row in part) == rows
    table = pd.DataFrame({"row": rows})
    assert [store.shard(table, f"{i + 1}/{total}")["row"].tolist() for i in range(total)] == shards


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_cannot_be_is_refused(text):
    with pytest.raises(store.DataError, match="give 'i/n'"):
        store.shard([1, 2], text)


# --- a run's folder ------------------------------------------------------------------------------


def test_tables_of_a_run_name_files_from_the_project_and_come_back_absolute(tmp_path):
    run = store.RunFolder(tmp_path / "run")
    inside = store.project_root() / "data" / "dog.wav"
    run.save_table(pd.DataFrame({"clip_id": ["1"], "path": [inside]}), "clips")
    assert (run.tables / "clips.csv").read_text().splitlines()[1] == "1,data/dog.wav"
    assert run.load_table("clips", made_by="00_start_here")["path"].tolist() == [str(inside)]
    with pytest.raises(store.MissingStage, match="run notebook 01_dataset_mixing first"):
        run.load_table("mixes", made_by="01_dataset_mixing")
