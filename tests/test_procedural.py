import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import audio, procedural, store

MODELS = Path(__file__).parents[2] / "shared/models"
ESC10_TABLE = Path(__file__).parents[2] / "shared/data/ESC-10/meta/esc50.csv"
needs_yamnet = pytest.mark.skipif(
    not (MODELS / "yamnet.tflite").is_file(), reason="../shared/models/yamnet.tflite is not there"
)
# AudioSet's name of each event, and what it belongs to
TAGS = {
    "dog": {"Dog", "Bark", "Bow-wow", "Yip", "Domestic animals, pets", "Animal"},
    "rooster": {"Chicken, rooster", "Crowing, cock-a-doodle-doo", "Fowl", "Bird"},
    "rain": {"Rain", "Raindrop", "Rain on surface", "Water"},
    "sea_waves": {"Ocean", "Waves, surf", "Water"},
    "crackling_fire": {"Fire", "Crackle"},
    "crying_baby": {"Baby cry, infant cry", "Crying, sobbing", "Whimper"},
    "sneezing": {"Sneeze"},
    "clock_tick": {"Tick", "Tick-tock", "Clock"},
    "helicopter": {"Helicopter", "Aircraft", "Engine"},
    "chainsaw": {"Chainsaw", "Power tool", "Light engine (high frequency)", "Engine"},
}
LABELS = procedural.EVENTS + procedural.SCENES
any_label = st.sampled_from(LABELS)
small = st.integers(0, 10_000)


def short(label, **options):
    return procedural.synthesize(label, sample_rate=8000, duration_s=2.0, **options)


# --- one clip


@settings(max_examples=60, deadline=None)
@given(any_label, small, st.sampled_from(procedural.POOLS), small, small,
       st.sampled_from([8000, 16_000, 22_050, 44_100]), st.floats(2, 4))  # fmt: skip
def test_every_clip_is_a_usable_signal(label, seed, pool, source, take, rate, seconds):
    y = procedural.synthesize(label, seed, rate, seconds, pool=pool, source=source, take=take)
    audio.check_audio(y, label)
    assert y.dtype == np.float32 and y.size == round(seconds * rate)
    assert np.abs(y).max() <= 0.951


@pytest.mark.parametrize("label", LABELS)
def test_same_key_same_samples_and_any_other_key_another_clip(label):
    y = short(label, seed=1, source=2, take=0)
    np.testing.assert_array_equal(y, short(label, seed=1, source=2, take=0))
    for other in (
        short(label, seed=2, source=2, take=0),
        short(label, seed=1, source=3, take=0),
        short(label, seed=1, source=2, take=1),
        short(label, seed=1, source=2, take=0, pool="pretraining"),
    ):
        a, b = y / np.linalg.norm(y), other / np.linalg.norm(other)
        aligned = np.fft.irfft(np.fft.rfft(a, 32_768) * np.conj(np.fft.rfft(b, 32_768)))
        assert np.abs(aligned).max() < 0.98


def test_lengths_follow_the_data_sets():
    assert procedural.synthesize("dog").size == 5 * 44_100
    assert procedural.synthesize("park").size == 10 * 44_100


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        ("cow", {}, "unknown label 'cow'; known are dog"),
        ("dog", {"pool": "test"}, "unknown pool 'test'"),
        ("dog", {"duration_s": 1.0}, "got 44100 Hz, 1.0 s"),
        ("dog", {"sample_rate": 4000}, "got 4000 Hz"),
        ("dog", {"seed": -1}, "seed -1"),
        ("dog", {"take": -1}, "take -1"),
    ],
)
def test_synthesize_refuses(label, options, message):
    with pytest.raises(ValueError, match=message):
        procedural.synthesize(label, **options)


def test_takes_of_a_source_share_its_pitch():
    def pitch(source, take):
        y = procedural.synthesize("crying_baby", 0, 16_000, source=source, take=take)
        frames = np.lib.stride_tricks.sliding_window_view(y, 1024)[::512]
        frames = frames[np.argsort(-frames.std(axis=1))[:20]]
        power = np.abs(np.fft.rfft(frames * np.hanning(1024), 4096)) ** 2
        lag = np.fft.irfft(power.mean(axis=0))[27:58]
        return 16_000 / (27 + lag.argmax())

    pitches = np.array([[pitch(source, take) for take in range(2)] for source in range(16)])
    within = np.abs(np.diff(np.log(pitches), axis=1)).mean()
    across = np.abs(np.log(pitches[:, 0])[:, None] - np.log(pitches[:, 1])).mean()
    assert within < 0.75 * across


# --- what a classifier can use


@pytest.fixture(scope="module")
def features():
    """Fold, label and features of 20 clips of each event."""
    rows = []
    for label in procedural.EVENTS:
        for i in range(20):
            fold, source, take = i % 5 + 1, i // 10 * 5 + i % 5, i // 5 % 2
            y = procedural.synthesize(label, 0, 16_000, source=source, take=take)
            mel = audio.log_mel(y)
            power = np.exp(mel).mean(axis=0)
            rows.append({
                "fold": fold, "label": label, "loudness": max(audio.loudness(y, 16_000), -70),
                "length": np.flatnonzero(y)[-1], "peak": np.abs(y).max(),
                "centroid": power @ np.arange(64) / power.sum(),
                "mel": np.concatenate([mel.mean(0), mel.std(0), np.abs(np.diff(mel, axis=0)).mean(0)]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def cross_validated(table, x, model):
    accuracy = []
    for fold in range(1, 6):
        test = (table.fold == fold).to_numpy()
        model.fit(x[~test], table.label[~test])
        accuracy.append(model.score(x[test], table.label[test]))
    return np.mean(accuracy)


@pytest.mark.parametrize("cue", ["loudness", "length", "peak", "centroid"])
def test_no_single_cue_tells_the_events_apart(features, cue):
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(50, min_samples_leaf=5, random_state=0)
    assert cross_validated(features, features[[cue]].to_numpy(), forest) < 0.4


def test_the_events_can_be_learned_across_folds(features):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    assert cross_validated(features, np.stack(features.mel), model) > 0.7


@needs_yamnet
def test_yamnet_recognises_most_events():
    from ai_edge_litert.interpreter import Interpreter

    with (MODELS / "yamnet_class_map.csv").open() as file:
        names = [row["display_name"] for row in csv.DictReader(file)]
    tagger = Interpreter(str(MODELS / "yamnet.tflite"), num_threads=1)
    into, out = tagger.get_input_details()[0], tagger.get_output_details()[0]
    tagger.resize_tensor_input(into["index"], [15_600])
    tagger.allocate_tensors()

    def top_tags(y):
        scores = []
        for start in range(0, y.size - 15_600 + 1, 7800):
            tagger.set_tensor(into["index"], y[start : start + 15_600])
            tagger.invoke()
            scores.append(tagger.get_tensor(out["index"])[0])
        return [names[i] for i in np.argsort(-np.mean(scores, axis=0))[:10]]

    recognised = {}
    for label, accepted in TAGS.items():
        clips = [procedural.synthesize(label, source=source) for source in range(6)]
        tags = [top_tags(audio.resample(y, 44_100, 16_000)) for y in clips]
        recognised[label] = sum(bool(accepted & set(t)) for t in tags)
    passed = [label for label, count in recognised.items() if count >= 4]
    assert len(passed) >= 7, recognised


# --- the folders


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    return procedural.write_events(tmp_path_factory.mktemp("events"), clips_per_class=10)


def read_all(root):
    return {p.relative_to(root): p.read_bytes() for p in store.walk_files(root)}


def test_events_are_laid_out_as_esc50(events):
    table = pd.read_csv(events / "meta/esc50.csv")
    assert table.category.value_counts().eq(10).all() and set(table.category) == set(TAGS)
    assert table.groupby(["category", "fold"]).size().eq(2).all()
    assert sorted(table.filename) == sorted(p.name for p in (events / "audio").glob("*.wav"))
    named = table.fold.astype(str) + "-" + table.src_file.astype(str) + "-" + table["take"]
    assert (named + "-" + table.target.astype(str) + ".wav" == table.filename).all()
    y, rate = audio.load_audio(events / "audio" / table.filename[0])
    assert (y.size, rate) == (220_500, 44_100)


@pytest.mark.skipif(not ESC10_TABLE.is_file(), reason="../shared/data/ESC-10 is not there")
def test_columns_and_targets_are_the_real_ones(events):
    ours, real = pd.read_csv(events / "meta/esc50.csv"), pd.read_csv(ESC10_TABLE)
    assert list(ours.columns) == list(real.columns)
    both = [t.drop_duplicates("category").set_index("category").target for t in (ours, real)]
    pd.testing.assert_series_equal(both[0].sort_index(), both[1].sort_index())


def test_no_two_clips_are_equal_and_no_source_spans_folds(events):
    clips = [p.read_bytes() for p in (events / "audio").glob("*.wav")]
    assert len(set(clips)) == len(clips) == 100
    table = pd.read_csv(events / "meta/esc50.csv")
    assert table.groupby("src_file").fold.nunique().max() == 1
    assert table.groupby("src_file").category.nunique().max() == 1
    assert table.groupby("src_file").size().max() == 2


def test_pools_share_no_source(events, tmp_path):
    other = procedural.write_events(tmp_path, clips_per_class=1, pool="pretraining")
    numbers = [set(pd.read_csv(root / "meta/esc50.csv").src_file) for root in (events, other)]
    assert not numbers[0] & numbers[1]


def test_files_are_what_synthesize_makes(events):
    y, _ = audio.load_audio(events / "audio" / "3-1100002-A-10.wav")
    expected = procedural.synthesize("rain", 0, source=2, take=0)
    np.testing.assert_allclose(y, expected, atol=0.51 / 32768)


def test_what_is_there_is_kept_and_what_is_missing_is_made(tmp_path):
    root = procedural.write_events(tmp_path, clips_per_class=1)
    before = read_all(root)
    lost, cut, *kept = sorted((root / "audio").glob("*.wav"))
    dates = {p: p.stat().st_mtime_ns for p in [*kept, root / "meta/esc50.csv"]}
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:1000])
    procedural.write_events(root, clips_per_class=1)
    assert read_all(root) == before
    assert {p: p.stat().st_mtime_ns for p in dates} == dates


def test_an_interrupted_run_leaves_no_table_and_goes_on(tmp_path, monkeypatch):
    save, made = audio.save_audio, []

    def interrupted(path, y, rate):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(path)
        return save(path, y, rate)

    monkeypatch.setattr(audio, "save_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        procedural.write_events(tmp_path, clips_per_class=1)
    assert not (tmp_path / "meta").exists() and len(made) == 4
    dates = [p.stat().st_mtime_ns for p in made]
    monkeypatch.undo()
    procedural.write_events(tmp_path, clips_per_class=1)
    assert len(pd.read_csv(tmp_path / "meta/esc50.csv")) == 10
    assert [p.stat().st_mtime_ns for p in made] == dates


def test_more_clips_keep_the_earlier_ones(tmp_path):
    few = read_all(procedural.write_events(tmp_path, clips_per_class=1))
    many = read_all(procedural.write_events(tmp_path, clips_per_class=2))
    assert all(many[name] == few[name] for name in few if name.suffix == ".wav")
    assert len(pd.read_csv(tmp_path / "meta/esc50.csv")) == 20


def test_another_recipe_replaces_the_clips(tmp_path):
    before = read_all(procedural.write_events(tmp_path, clips_per_class=1))
    after = read_all(procedural.write_events(tmp_path, clips_per_class=1, seed=1))
    assert before.keys() == after.keys()
    assert not [n for n in before if n.suffix == ".wav" and before[n] == after[n]]


def test_clips_of_other_sketches_are_made_again(tmp_path):
    root = procedural.write_events(tmp_path, clips_per_class=1)
    before = read_all(root)
    made = store.Records(root, "clips")
    for name in list(made.entries):
        made.add(name, "older sketches")
    wav = next((root / "audio").glob("*.wav"))
    wav.write_bytes(bytes(wav.stat().st_size))
    procedural.write_events(root, clips_per_class=1)
    assert read_all(root) == before


def test_a_folder_with_other_data_is_left_alone(tmp_path):
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "mine.wav").write_bytes(b"precious")
    with pytest.raises(ValueError, match="not made here; choose another folder"):
        procedural.write_events(tmp_path, clips_per_class=1)
    assert list(read_all(tmp_path).values()) == [b"precious"]


@pytest.mark.parametrize("options", [{"clips_per_class": 0}, {"seed": -1}, {"pool": "mine"}])
def test_write_refuses_before_anything_is_written(tmp_path, options):
    with pytest.raises(ValueError, match=r"at least 1 clip|got -1|unknown pool"):
        procedural.write_events(tmp_path / "new", **{"clips_per_class": 1, **options})
    assert not (tmp_path / "new").exists()


def test_scenes_are_laid_out_as_tau(tmp_path):
    root = procedural.write_scenes(tmp_path, scenes_per_class=5)
    table = pd.read_csv(root / "meta.csv", sep="\t")
    assert list(table.columns) == ["filename", "scene_label", "identifier", "source_label"]
    assert table.scene_label.value_counts().eq(5).all()
    assert sorted(table.filename) == sorted(f"audio/{p.name}" for p in root.glob("audio/*.wav"))
    parts = table.filename.str.extract(r"^audio/(\w+)-([a-z]+)-(\d+)-(\d+)-a\.wav$")
    assert (parts[0] == table.scene_label).all()
    assert (parts[1] + "-" + parts[2] == table.identifier).all()
    folds = table.identifier.map(lambda place: procedural.CITIES.index(place.split("-")[0]) % 5 + 1)
    assert folds.groupby(table.scene_label).nunique().eq(5).all()
