import functools
import hashlib
import http.server
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from soundscapes_utils import datasets

RATE = 8000
ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10"


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


def test_missing_folder_and_table_are_named(tmp_path):
    with pytest.raises(datasets.DatasetError, match=r"gone: no such folder.*download_esc50"):
        datasets.load_esc50(tmp_path / "gone")
    with pytest.raises(datasets.DatasetError, match=r"has no metadata/UrbanSound8K.csv.*zenodo"):
        datasets.load_urbansound8k(tmp_path)


def test_urbansound8k_layout(tmp_path):
    rows = [(f"{700 + f}-3-0-0.wav", 700 + f, f, 3, "dog_bark") for f in range(1, 11)]
    for row in rows:
        write_tone(tmp_path / "audio" / f"fold{row[2]}" / row[0])
    columns = ["slice_file_name", "fsID", "fold", "classID", "class"]
    (tmp_path / "metadata").mkdir()
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(tmp_path / "metadata/UrbanSound8K.csv", index=False)
    clips = datasets.load_clips("urbansound8k", urbansound8k_root=tmp_path)
    assert clips.fold.tolist() == list(range(1, 11))
    assert clips.source_id[0] == "701" and clips.label[0] == "dog_bark"
    splits = datasets.assign_splits(clips, test_fold=10)
    assert splits.tolist() == ["val"] + ["train"] * 8 + ["test"]
    with pytest.raises(datasets.DatasetError, match="give tau_root"):
        datasets.load_scenes("urbansound8k", clips)


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


def test_embedded_sets_have_the_layouts_they_borrow(tmp_path):
    clips = datasets.load_clips("embedded", data_dir=tmp_path, clips_per_class=5)
    assert clips.groupby("label").fold.nunique().tolist() == [5] * 10
    events, scenes = datasets.load_scenes("embedded", clips, data_dir=tmp_path, scenes_per_class=5)
    assert len(events) == 50 and scenes.label.nunique() == 10
    for table in (events, scenes):
        assert set(datasets.assign_splits(table, 5)) == {"train", "val", "test"}
    assert datasets.audit(events)[1].empty


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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def zip_folder(root, path, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, Path("ESC-50-abc") / file.relative_to(root))
        for member, content in extra:
            archive.writestr(member, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_download_unpacks_and_is_not_repeated(served, esc_root, tmp_path):
    folder, address = served
    digest = zip_folder(esc_root, folder / "esc.zip")
    root = datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest)
    assert len(datasets.load_esc50(root)) == 10
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ESC-50"]
    (folder / "esc.zip").unlink()
    assert datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest) == root


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b + b"x"])
def test_damaged_archive_fails_its_checksum_and_can_be_repeated(served, esc_root, tmp_path, damage):
    folder, address = served
    digest = zip_folder(esc_root, folder / "esc.zip")
    whole = (folder / "esc.zip").read_bytes()
    (folder / "esc.zip").write_bytes(damage(whole))
    with pytest.raises(datasets.DatasetError, match="not the expected archive"):
        datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest)
    assert not (tmp_path / "data/ESC-50").exists()
    (folder / "esc.zip").write_bytes(whole)
    assert datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest).is_dir()


def link_member():
    member = zipfile.ZipInfo("ESC-50-abc/audio/link.wav")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("member", ["../climbed.txt", "/tmp/climbed.txt", link_member()])
def test_archive_that_climbs_out_is_refused(served, esc_root, tmp_path, member):
    folder, address = served
    digest = zip_folder(esc_root, folder / "esc.zip", [(member, "/etc/passwd")])
    with pytest.raises(datasets.DatasetError, match="would be written outside"):
        datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest)
    assert not list(tmp_path.rglob("climbed.txt"))
    assert not (tmp_path / "data/ESC-50").exists()


def test_archive_with_missing_audio_leaves_nothing(served, esc_root, tmp_path):
    folder, address = served
    (esc_root / "audio/1-101-A-0.wav").unlink()
    digest = zip_folder(esc_root, folder / "esc.zip")
    with pytest.raises(datasets.DatasetError, match="1 of the 10 files"):
        datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest)
    assert not [path for path in (tmp_path / "data").iterdir() if path.is_dir()]


def test_no_server_and_full_disk_are_said(served, esc_root, tmp_path, monkeypatch):
    folder, address = served
    with pytest.raises(datasets.DatasetError, match="check the connection"):
        datasets.download_esc50(tmp_path / "data", f"{address}/none.zip", "0" * 64)
    digest = zip_folder(esc_root, folder / "esc.zip")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(datasets.DatasetError, match=r"GB needed, 0\.00 GB are free"):
        datasets.download_esc50(tmp_path / "data", f"{address}/esc.zip", digest)


def test_unknown_dataset_lists_the_names():
    with pytest.raises(datasets.DatasetError, match="embedded, esc10, esc50, urbansound8k"):
        datasets.load_clips("esc")
