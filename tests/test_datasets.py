import functools
import hashlib
import http.server
import io
import re
import stat
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from soundscapes_utils import datasets

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


def test_missing_folder_and_table_are_named(tmp_path):
    with pytest.raises(datasets.DatasetError, match=r"gone: no such folder.*download_esc50"):
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


def write_setup(root, train, evaluate):
    (root / "evaluation_setup").mkdir()
    for part, rows in (("train", train), ("evaluate", evaluate)):
        columns = rows[["filename", "scene_label"]]
        columns.to_csv(root / f"evaluation_setup/fold1_{part}.csv", sep="\t", index=False)


def test_official_tau_folds_are_the_evaluation_setup(tau_root):
    with pytest.raises(datasets.DatasetError, match=r"has no evaluation_setup/fold1_train.csv"):
        datasets.load_tau(tau_root, folds="official")
    meta = pd.read_csv(tau_root / "meta.csv", sep="\t")
    tested = meta.identifier.str.startswith("milan")
    unused = (meta.identifier == "lyon-0") & (meta.source_label == "b")
    write_setup(tau_root, meta[~tested & ~unused], meta[tested])
    clips = datasets.load_tau(tau_root, folds="official")
    assert set(clips.clip_id) == {Path(name).stem for name in meta.filename[~unused]}
    test = datasets.assign_splits(clips, 5) == "test"
    assert set(clips.source_id[test]) == {"milan-0", "milan-1"}
    assert clips.groupby("source_id").fold.nunique().max() == 1
    assert sorted(clips.fold.unique()) == [1, 2, 3, 4, 5]
    assert all(set(scenes) == {1, 2, 3, 4, 5} for _, scenes in clips.groupby("label").fold)


def test_official_tau_folds_do_not_hang_on_the_archives_at_hand(tau_root):
    meta = pd.read_csv(tau_root / "meta.csv", sep="\t")
    tested = meta.identifier.str.startswith("milan")
    write_setup(tau_root, meta[~tested], meta[tested])
    whole = datasets.load_tau(tau_root, folds="official").set_index("clip_id").fold
    meta[6:20].to_csv(tau_root / "meta.csv", sep="\t", index=False)
    part = datasets.load_tau(tau_root, folds="official").set_index("clip_id").fold
    assert 0 < len(part) < len(whole) and part.equals(whole[part.index])
    meta.drop(columns="source_label")[:0].to_csv(
        tau_root / "evaluation_setup/fold1_train.csv", sep="\t", index=False
    )
    with pytest.raises(datasets.DatasetError, match=r"fold1_train\.csv: 0 of 0 rows"):
        datasets.load_tau(tau_root, folds="official")
    with pytest.raises(datasets.DatasetError, match="unknown folds 'scene'; choose one of city"):
        datasets.load_tau(tau_root, folds="scene")


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
    assert datasets.check_folder("tau", tau_root).empty


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
    clips = datasets.load_clips("builtin", data_dir=tmp_path, clips_per_class=5)
    assert clips.groupby("label").fold.nunique().tolist() == [5] * 10
    events, scenes = datasets.load_scenes("builtin", clips, data_dir=tmp_path, scenes_per_class=5)
    assert len(events) == 50 and scenes.label.nunique() == 10
    for table in (events, scenes):
        assert set(datasets.assign_splits(table, 5)) == {"train", "val", "test"}
    assert datasets.audit(events)[1].empty


def test_a_folder_is_reported_on_file_by_file(esc_root, urbansound8k_root, tau_root):
    folders = {"esc50": esc_root, "urbansound8k": urbansound8k_root, "tau": tau_root}
    for dataset, root in folders.items():
        assert datasets.check_folder(dataset, root).empty
        gone, empty, cut, noise, *_ = sorted(root.glob("audio/**/*.wav"))
        gone.unlink()
        empty.write_bytes(b"")
        cut.write_bytes(cut.read_bytes()[:2000])
        noise.write_bytes(b"RIFF, or so it says" * 40)
        report = datasets.check_folder(dataset, root).set_index("file").problem
        assert len(report) == 4
        for path, text in ((gone, "missing"), (empty, "empty"), (cut, "cut"), (noise, "cannot")):
            assert text in report[path.relative_to(root).as_posix()]
    ten = datasets.check_folder("esc10", esc_root)
    assert set(ten.file) < set(datasets.check_folder("esc50", esc_root).file)


def test_a_folder_without_its_table_is_one_row(tmp_path):
    for dataset in ("esc10", "esc50", "urbansound8k", "tau", "dcase2024_task7"):
        assert datasets.check_folder(dataset, tmp_path).problem[0].startswith("has no ")
        report = datasets.check_folder(dataset, tmp_path / "gone")
        assert len(report) == 1 and report.problem[0].startswith("no such folder")
    with pytest.raises(datasets.DatasetError, match="unknown dataset 'esc'; choose one of esc10"):
        datasets.check_folder("esc", tmp_path)


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
    assert datasets.check_folder("dcase2024_task7", dcase_root).empty


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "1 of the 9 embeddings .*vggish/dev_002.npy"),
        (lambda p: p.write_bytes(p.read_bytes()[:90]), "dev_002.npy: cannot be read"),
        (lambda p: np.save(p, np.full((4, 8), np.nan)), "expected finite floats"),
        (lambda p: np.save(p, np.zeros(8)), "expected finite floats of shape"),
        (lambda p: np.save(p, np.array([["a"]], dtype=object)), "cannot be read as an array"),
    ],
)
def test_dcase_folder_that_is_damaged_is_refused_and_reported(dcase_root, spoil, message):
    spoil(dcase_root / "embeddings/vggish/dev_002.npy")
    with pytest.raises(datasets.DatasetError, match=message):
        datasets.load_dcase2024_task7(dcase_root)
    report = datasets.check_folder("dcase2024_task7", dcase_root)
    assert report.file.tolist() == ["embeddings/vggish/dev_002.npy"]


def test_dcase_clips_of_another_shape_are_refused(dcase_root):
    np.save(dcase_root / "embeddings/vggish/dev_002.npy", np.zeros((5, 8)))
    with pytest.raises(datasets.DatasetError, match=r"dev_002.npy: shape \(5, 8\) where dev_003"):
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
    digest = datasets._content_sha256(captions, embeddings)
    assert digest == datasets.DCASE2024_TASK7_SHA256


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
    """Serves parts of files, and hangs up in the middle of those in ``server.cut``."""

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.asked.append((Path(self.path).name, wanted))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        content = path.read_bytes()
        start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.cut.pop(path.name, None)])

    def log_message(self, *args):
        pass


@pytest.fixture
def web(tmp_path, monkeypatch):
    # what is fetched is kept chunk by chunk, and the archives here are smaller than one
    monkeypatch.setattr(datasets, "_CHUNK_BYTES", 1000)
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked, server.cut, server.ranges = [], {}, True
    server.folder, server.address = folder, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(web):
    return web.folder, web.address


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


@pytest.fixture
def esc_archive(web, esc_root, tmp_path):
    digest = zip_folder(esc_root, web.folder / "esc.zip")
    return lambda: datasets.download_esc50(tmp_path / "data", f"{web.address}/esc.zip", digest)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_interrupted_download_goes_on_where_it_stopped(web, esc_archive, tmp_path):
    web.cut["esc.zip"] = 10_000
    with pytest.raises(datasets.DatasetError, match="what has come so far is kept"):
        esc_archive()
    (part,) = (tmp_path / "data").iterdir()
    assert part.name.endswith(".zip.part") and part.stat().st_size == 10_000
    assert len(datasets.load_esc50(esc_archive())) == 10
    assert web.asked == [("esc.zip", None), ("esc.zip", "bytes=10000-")]
    assert names_in(tmp_path / "data") == ["ESC-50"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("rest", [b"of another file", b"x" * 10**6])
def test_what_lies_there_is_never_taken_for_the_archive(web, esc_archive, tmp_path, ranges, rest):
    web.ranges = ranges
    with pytest.raises(datasets.DatasetError):
        web.cut["esc.zip"] = 10_000
        esc_archive()
    (part,) = (tmp_path / "data").iterdir()
    part.write_bytes(rest)
    assert len(datasets.load_esc50(esc_archive())) == 10
    assert names_in(tmp_path / "data") == ["ESC-50"]


def test_archive_fetched_by_an_earlier_run_is_used(web, esc_archive, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "_extract", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(datasets.DatasetError, match="cannot be unpacked"):
            esc_archive()
    stale = tmp_path / "data/.unpacking-ESC-50"
    stale.mkdir()
    (stale / "half.wav").write_bytes(b"RIFF")
    assert len(datasets.load_esc50(esc_archive())) == 10
    assert len(web.asked) == 1 and names_in(tmp_path / "data") == ["ESC-50"]


def test_need_licence_and_citation_are_said_beforehand(web, esc_archive, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 1_000_000_000})
    with monkeypatch.context() as patch:
        patch.setattr(datasets.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(datasets.DatasetError, match=r"1\.55 GB needed, 1\.00 GB are free"):
            esc_archive()
    assert not web.asked
    said = capsys.readouterr().out
    assert "to fetch 0.65 GB, disk needed 1.55 GB" in said and "free in" in said
    assert "licence: CC BY-NC 3.0" in said and "please cite: K. J. Piczak" in said
    esc_archive()
    capsys.readouterr()
    esc_archive()
    assert not capsys.readouterr().out


def tar_folder(root, path, top, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        archive.add(root, arcname=top)
        for member in extra:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_urbansound8k_is_fetched_and_unpacked(web, urbansound8k_root, tmp_path):
    digest = tar_folder(urbansound8k_root, web.folder / "us8k.tar.gz", "UrbanSound8K")
    fetch = functools.partial(
        datasets.download_urbansound8k, tmp_path / "data", f"{web.address}/us8k.tar.gz"
    )
    with pytest.raises(datasets.DatasetError, match="not the expected archive"):
        fetch()
    assert not any((tmp_path / "data").iterdir())
    web.cut["us8k.tar.gz"] = 2_000
    with pytest.raises(datasets.DatasetError, match="what has come so far is kept"):
        fetch(digest)
    root = fetch(digest)
    assert web.asked[-1] == ("us8k.tar.gz", "bytes=2000-")
    assert len(datasets.load_clips("urbansound8k", data_dir=tmp_path / "data")) == 10
    assert names_in(tmp_path / "data") == ["UrbanSound8K"] and fetch(digest) == root
    assert datasets.check_folder("urbansound8k", root).empty


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
def test_tar_file_that_climbs_out_or_links_is_refused(web, urbansound8k_root, tmp_path, member):
    digest = tar_folder(urbansound8k_root, web.folder / "us8k.tar.gz", "UrbanSound8K", [member])
    with pytest.raises(datasets.DatasetError, match="would be written outside"):
        datasets.download_urbansound8k(tmp_path / "data", f"{web.address}/us8k.tar.gz", digest)
    assert not list(tmp_path.rglob("climbed.txt"))
    assert names_in(tmp_path / "data") == ["UrbanSound8K.tar.gz"]


def bomb(path):
    """Declares 10 TB; the bytes behind it are never reached."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("ESC-50-abc/audio/bomb.wav", b"")
            archive.filelist[-1].file_size = 10**13
            archive._didModify = True
    else:
        with tarfile.open(path, "w") as archive:
            archive.fileobj.write(tar_member(size=10**13).tobuf(tarfile.GNU_FORMAT))
    return path.read_bytes()


def test_bombs_are_refused_by_what_they_declare(web, esc_root, tmp_path, monkeypatch):
    zip_folder(esc_root, web.folder / "esc.zip")
    digest = hashlib.sha256(bomb(web.folder / "esc.zip")).hexdigest()
    with pytest.raises(datasets.DatasetError, match=r"unpacks to 10000\.00 GB or more where 0\.90"):
        datasets.download_esc50(tmp_path / "data", f"{web.address}/esc.zip", digest)
    digest = hashlib.md5(bomb(web.folder / "us8k.tar")).hexdigest()
    with pytest.raises(datasets.DatasetError, match=r"unpacks to 10000\.00 GB or more where 7\.10"):
        datasets.download_urbansound8k(tmp_path / "data", f"{web.address}/us8k.tar", digest)
    assert sum(file.stat().st_size for file in (tmp_path / "data").rglob("*")) < 10**6


@pytest.fixture
def tau_web(web, tau_root):
    """Two audio archives, tables and licence text, named and laid out as on Zenodo."""
    meta = pd.read_csv(tau_root / "meta.csv", sep="\t")
    tested = meta.identifier.str.startswith("milan")
    write_setup(tau_root, meta[~tested], meta[tested])
    (tau_root / "README.md").write_text("copyright notice")
    setup = [f"evaluation_setup/fold1_{part}.csv" for part in ("train", "evaluate")]
    files = {
        "doc": ["README.md"],
        "meta": ["meta.csv", *setup],
        "audio.1": meta.filename[:14],
        "audio.2": meta.filename[14:],
    }
    rows = []
    for part, names in files.items():
        path = web.folder / f"{datasets.TAU_NAME}.{part}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name in names:
                archive.write(tau_root / name, f"{datasets.TAU_NAME}/{name}")
        rows.append((part, path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()))
    web.archives = pd.DataFrame(rows, columns=["part", "size", "md5"])
    return web


def test_tau_comes_in_as_many_archives_as_are_wanted(tau_web, tau_root, tmp_path, capsys):
    fetch = functools.partial(
        datasets.download_tau, tmp_path / "data", url=tau_web.address, archives=tau_web.archives
    )
    root = fetch(parts=[1, 1])
    assert "Tampere University" in capsys.readouterr().out
    assert len(datasets.load_tau(root)) == 14 and (root / "README.md").is_file()
    assert len(datasets.load_tau(root, folds="official")) == 14
    assert fetch(parts=1) == root and len(tau_web.asked) == 3
    fetch(parts=2)
    assert [name for name, _ in tau_web.asked[3:]] == [f"{datasets.TAU_NAME}.audio.2.zip"]
    for folds in ("city", "official"):
        ours, theirs = (datasets.load_tau(where, folds) for where in (root, tau_root))
        assert ours.drop(columns="path").equals(theirs.drop(columns="path"))
    assert names_in(tmp_path / "data") == ["TAU-2020-Mobile"]
    assert datasets.check_folder("tau", root).empty
    for parts in (3, 0, [], [0]):
        with pytest.raises(datasets.DatasetError, match="TAU has the audio archives 1 to 2"):
            fetch(parts=parts)


def test_tau_goes_on_after_a_broken_archive(tau_web, tmp_path):
    fetch = functools.partial(datasets.download_tau, tmp_path / "data", 2, tau_web.address)
    wrong = tau_web.archives.assign(md5=[*tau_web.archives.md5[:3], "0" * 32])
    with pytest.raises(datasets.DatasetError, match=r"audio\.2\.zip: not the expected archive"):
        fetch(wrong)
    root = tmp_path / "data/TAU-2020-Mobile"
    assert len(datasets.load_tau(root)) == 14
    assert names_in(tmp_path / "data") == ["TAU-2020-Mobile"]
    tau_web.asked.clear()
    assert len(datasets.load_tau(fetch(tau_web.archives))) == 24
    assert len(tau_web.asked) == 1


def test_tau_killed_at_any_write_ends_with_the_same_files(tau_web, tmp_path, monkeypatch):
    def fetch(dest):
        return datasets.download_tau(tmp_path / dest, 2, tau_web.address, tau_web.archives)

    def contents(root):
        files = (path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root): path.read_bytes() for path in files}

    whole = contents(fetch("whole"))
    write, steps = datasets._write_table, 0
    for step in range(7):

        def stop(path, table, sep=",", step=step):
            nonlocal steps
            if steps == step:
                raise KeyboardInterrupt
            steps += 1
            write(path, table, sep)

        steps = 0
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "_write_table", stop)
            if step < 6:
                with pytest.raises(KeyboardInterrupt):
                    fetch(f"killed-{step}")
        assert contents(fetch(f"killed-{step}")) == whole


def test_tau_archive_with_less_or_more_than_it_should_hold(tau_web, tmp_path):
    def fetch(dest):
        path = tau_web.folder / f"{datasets.TAU_NAME}.audio.2.zip"
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        archives = tau_web.archives.assign(md5=[*tau_web.archives.md5[:3], digest])
        return datasets.download_tau(tmp_path / dest, 2, tau_web.address, archives)

    path = tau_web.folder / f"{datasets.TAU_NAME}.audio.2.zip"
    with zipfile.ZipFile(path) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()[1:]}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in kept.items():
            archive.writestr(name, content)
    with pytest.raises(datasets.DatasetError, match="1 of the 24 recordings are in none of the"):
        fetch("less")
    assert len(datasets.load_tau(tmp_path / "less/TAU-2020-Mobile")) == 23
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{datasets.TAU_NAME}/../../climbed.wav", b"RIFF")
    with pytest.raises(datasets.DatasetError, match="would be written outside"):
        fetch("climbs")
    assert not list(tmp_path.rglob("climbed.wav"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("elsewhere/audio/a.wav", b"RIFF")
    with pytest.raises(datasets.DatasetError, match="holds no folder TAU-urban"):
        fetch("elsewhere")


def test_tau_copied_by_hand_is_left_as_it_is(tau_web, tau_root, tmp_path):
    (tmp_path / "data").mkdir()
    tau_root.rename(tmp_path / "data/TAU-2020-Mobile")
    root = datasets.download_tau(tmp_path / "data", 1, tau_web.address, tau_web.archives)
    assert not tau_web.asked and len(datasets.load_tau(root)) == 24
    next((root / "audio").iterdir()).unlink()
    with pytest.raises(datasets.DatasetError, match="1 of the 24 files"):
        datasets.download_tau(tmp_path / "data", 1, tau_web.address, tau_web.archives)


def test_the_table_of_tau_archives_is_whole():
    archives = datasets.TAU_ARCHIVES
    audio = archives[archives.part.str.startswith("audio.")]
    assert audio.part.tolist() == [f"audio.{number}" for number in range(1, 17)]
    assert archives.md5.is_unique and archives.md5.str.fullmatch("[0-9a-f]{32}").all()
    # 64 hours of 24-bit mono at 44.1 kHz, less what ZIP saves
    assert 0.8 < audio["size"].sum() / (64 * 3600 * 44_100 * 3) < 1.0


def serve_dcase(root, web):
    (web.folder / "captions.csv").write_bytes((root / "captions.csv").read_bytes())
    tar_folder(root / "embeddings", web.folder / "embeddings.tar.xz", "embeddings", mode="w:xz")


def test_dcase_set_is_fetched_and_held_to_its_content(web, dcase_root, tmp_path, capsys):
    serve_dcase(dcase_root, web)
    fetch = functools.partial(datasets.download_dcase2024_task7, tmp_path / "data", web.address)
    with pytest.raises(datasets.DatasetError, match=r"not the expected content \(sha256 [0-9a-f]"):
        fetch()
    assert names_in(tmp_path / "data") == [] and "Lagrange" in capsys.readouterr().out
    root = fetch(None)
    captions, embeddings = datasets.load_dcase2024_task7(root)
    theirs = datasets.load_dcase2024_task7(dcase_root)
    assert captions.equals(theirs[0])
    assert all((embeddings[network] == theirs[1][network]).all() for network in embeddings)
    assert names_in(tmp_path / "data") == ["dcase2024_task7_dev"]
    web.asked.clear()
    assert fetch(None) == root and not web.asked


def test_dcase_archive_that_is_cut_short_is_fetched_anew(web, dcase_root, tmp_path):
    serve_dcase(dcase_root, web)
    archive = web.folder / "embeddings.tar.xz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(datasets.DatasetError, match="try again"):
        datasets.download_dcase2024_task7(tmp_path / "data", web.address, None)
    archive.write_bytes(whole)
    root = datasets.download_dcase2024_task7(tmp_path / "data", web.address, None)
    assert datasets.check_folder("dcase2024_task7", root).empty


@pytest.mark.skipif(not DCASE.is_dir(), reason="the DCASE 2024 set is not beside the project")
def test_real_dcase_set_passes_its_checksum(web, tmp_path):
    serve_dcase(DCASE, web)
    root = datasets.download_dcase2024_task7(tmp_path / "data", web.address)
    assert len(datasets.load_dcase2024_task7(root)[0]) == 60


def test_unknown_dataset_lists_the_names():
    with pytest.raises(datasets.DatasetError, match="builtin, esc10, esc50, urbansound8k"):
        datasets.load_clips("esc")
