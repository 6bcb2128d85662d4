import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from soundscapes_utils import audio, datasets, metadata, mixing

RATE = 8000
LSB = 1 / 32768
LABELS, SCENES = ("dog", "cow", "rain"), ("park", "tram")


def make_clips(folder, labels, seconds, prefix, per_fold=2):
    """Noise bursts after a silence, five folds, one source a clip."""
    rng = np.random.default_rng(0)
    rows = []
    for label in labels:
        for fold in range(1, 6):
            for take in range(per_fold):
                name = f"{prefix}-{label}-{fold}-{take}"
                y = rng.normal(0, 0.05, int(seconds * RATE)).clip(-0.9, 0.9)
                y[: y.size // 5] = 0
                sf.write(folder / f"{name}.wav", y, RATE)
                rows.append((name, str(folder / f"{name}.wav"), label, fold, name))
    clips = pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])
    return clips.assign(dataset="test", duration_s=seconds, sample_rate=RATE)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return make_clips(folder, LABELS, 0.5, "e"), make_clips(folder, SCENES, 1.0, "s")


def plan(clips, n=30, seed=0, **options):
    return mixing.plan_mixes(*clips, n, seed, **{"duration_s": 1.0, **options})


def file_bytes(mixes):
    return [Path(path).read_bytes() for path in mixes.path]


# --- one mix ----------------------------------------------------------------------------------


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(0, 2**32 - 1),
    st.floats(-20, 6),
    st.floats(-20, 6),
    st.integers(0, 49),
)
def test_equation_against_plain_float64(n_fg, n_bg, seed, fg_db, bg_db, onset_ms):
    rng = np.random.default_rng(seed)
    fg, bg = (rng.uniform(-0.3, 0.3, n).astype(np.float32) for n in (n_fg, n_bg))
    y, scale = mixing.mix_signals(
        fg, bg, RATE, onset_s=onset_ms / 1000, duration_s=0.05,
        foreground_gain_db=fg_db, background_gain_db=bg_db,
    )  # fmt: skip
    expected = [10 ** (bg_db / 20) * float(bg[i % n_bg]) for i in range(400)]
    for i in range(min(n_fg, 400 - onset_ms * 8)):
        expected[onset_ms * 8 + i] += 10 ** (fg_db / 20) * float(fg[i])
    assert y.dtype == np.float32 and y.size == 400
    np.testing.assert_allclose(y, np.array(expected) * scale, atol=1e-6)
    peak = max(map(abs, expected))
    assert scale == 1.0 or math.isclose(scale, 32767 / 32768 / peak, rel_tol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8000, 11025, 16000, 44100]), st.floats(0, 0.9))
def test_engines_agree_to_one_step_on_the_plain_equation(seed, rate, onset):
    rng = np.random.default_rng(seed)
    onset = math.floor(onset * 100) / 1000
    fg = rng.uniform(-0.5, 0.5, rng.integers(1, rate // 5)).astype(np.float32)
    bg = rng.uniform(-0.4, 0.4, rng.integers(rate // 10, rate // 5)).astype(np.float32)
    results = [mixing.mix_signals(fg, bg, rate, onset_s=onset, engine=e) for e in mixing.ENGINES]
    (ours, scale), (theirs, their_scale) = results
    assert scale == their_scale == 1.0 and ours.size == theirs.size == bg.size
    assert np.abs(np.rint(ours * 32768) - theirs * 32768).max() <= 1


def test_16_bit_sources_give_the_same_bytes_in_both_engines():
    rng = np.random.default_rng(1)
    fg, bg = (rng.integers(-16000, 16000, 800) / np.float32(32768) for _ in range(2))
    ours, theirs = (mixing.mix_signals(fg, bg, RATE, engine=e)[0] for e in mixing.ENGINES)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("engine", mixing.ENGINES)
def test_loud_mix_is_scaled_not_clipped(engine):
    tone = np.sin(np.arange(800) * 0.1).astype(np.float32)
    y, scale = mixing.mix_signals(tone, tone, RATE, engine=engine)
    assert math.isclose(scale, 32767 / 32768 / 2, rel_tol=1e-3)
    # a clipped sine would not correlate with the clean one to the last digits
    assert np.corrcoef(y, tone)[0, 1] > 0.999999
    assert np.abs(y).max() <= 1


def test_bad_mixes_are_refused():
    y = np.ones(8, np.float32)
    with pytest.raises(audio.AudioError, match="outside the mix"):
        mixing.mix_signals(y, y, RATE, onset_s=0.5)
    with pytest.raises(audio.AudioError, match="choose one of numpy, pydub"):
        mixing.mix_signals(y, y, RATE, engine="sox")


def test_active_level_ignores_the_silence_around_an_event():
    burst = np.full(RATE, 0.1)
    for before, after in ((0, 0), (1, 0), (2, 3)):
        y = np.concatenate([np.zeros(before * RATE), burst, np.zeros(after * RATE)])
        level, start, end = mixing.active_level(y, RATE)
        assert (round(level, 6), start, end) == (-20.0, before, before + 1)


# --- planning ---------------------------------------------------------------------------------


def test_plan_is_the_table_of_mixes_and_balanced(clips):
    mixes = plan(clips, 90)
    assert mixes.columns.tolist() == mixing.MIX_COLUMNS
    assert mixes.split.value_counts().to_dict() == {"train": 54, "val": 18, "test": 18}
    for _, part in mixes.groupby("split"):
        grid = pd.crosstab(part.foreground_label, part.scene).to_numpy()
        assert grid.shape == (3, 2) and np.ptp(grid) == 0
        used = part.foreground.value_counts()
        assert used.max() - used.min() <= 1


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(5, 60), st.integers(1, 5), st.sampled_from(mixing.MODES))
def test_any_plan_is_balanced_seeded_and_free_of_leaks(clips, seed, n, test_fold, mode):
    mixes = plan(clips, n, seed, test_fold=test_fold, mode=mode)
    assert len(mixes) == n and mixes.mix_id.is_unique and set(mixes.split) == set(mixing.SPLITS)
    metadata.check_leaks(mixes)
    fold = mixes.foreground_source.str.split("-").str[2].astype(int)
    assert (fold[mixes.split == "test"] == test_fold).all()
    for split, part in mixes.groupby("split"):
        for column, names in (("foreground_label", LABELS), ("scene", SCENES)):
            counts = part[column].value_counts().reindex(names, fill_value=0)
            assert counts.max() - counts.min() <= 1, split
    pd.testing.assert_frame_equal(mixes, plan(clips, n, seed, test_fold=test_fold, mode=mode))


def test_more_mixes_keep_the_first_ones(clips):
    few, many = (plan(clips, n).set_index("mix_id") for n in (20, 60))
    pd.testing.assert_frame_equal(few, many.loc[few.index])
    assert not plan(clips, 20, seed=1).equals(plan(clips, 20))


def test_snr_of_the_rendered_parts_is_the_planned_one(clips, tmp_path):
    mixes = plan(clips, 30, snr_db=(-6, 12))
    assert mixes.snr_db.between(-6, 12).all() and mixes.snr_db.nunique() == 30
    for row in mixes.head(8).itertuples():
        fg, bg = (audio.load_audio(path)[0] for path in (row.foreground, row.background))
        scaled = fg * 10 ** (row.foreground_gain_db / 20)
        # the burst's own samples, known from how the clip was made
        event = scaled[scaled.size // 5 :]
        ratio = 20 * np.log10(np.sqrt(np.mean(event**2)) / np.sqrt(np.mean(bg**2)))
        assert abs(ratio - row.snr_db) < 0.01


def test_lambda_mode_is_the_plain_equation_and_records_its_ratio(clips):
    options = {"mode": "lambda", "onset": 0.0}
    mixes = plan(clips, 20, **options)
    assert (mixes[["onset_s", "foreground_gain_db", "background_gain_db"]] == 0).all().all()
    louder = plan(clips, 20, foreground_lambda=2.0, background_lambda=0.5, **options)
    np.testing.assert_allclose(louder.snr_db - mixes.snr_db, 20 * np.log10(4), atol=2e-4)


def test_onsets_leave_the_event_whole(clips):
    mixes = plan(clips, 60)
    assert mixes.onset_s.between(0, 0.5).all() and mixes.onset_s.nunique() > 40
    assert set(plan(clips, 20, onset=0.25).onset_s) == {0.25}
    assert set(plan(clips, 20, onset="0").onset_s) == {0.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 4}, "leaves a split empty"),
        ({"mode": "loud"}, "unknown mode 'loud'"),
        ({"snr_db": (5, -5)}, "smaller one first"),
        ({"mode": "lambda", "foreground_lambda": 0}, "above 0"),
        ({"onset": 1.5}, "does not lie in a mix"),
        ({"onset": "soon"}, "give 'uniform' or seconds"),
        ({"duration_s": 0}, "does not lie in a mix"),
        ({"test_fold": 9}, "test_fold 9"),
    ],
)
def test_bad_options_are_named(clips, options, message):
    with pytest.raises(ValueError, match=message):
        plan(clips, **options)


def test_silent_clip_is_named(clips, tmp_path):
    events, scenes = clips
    sf.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    events = events.assign(path=str(tmp_path / "silent.wav"))
    with pytest.raises(audio.AudioError, match=r"silent\.wav: is silent"):
        plan((events, scenes))


def test_tenfold_foregrounds_over_fivefold_scenes(clips):
    events, scenes = clips
    ten = pd.concat([events, events.assign(fold=events.fold + 5, source_id=events.source_id + "x")])
    mixes = plan((ten.reset_index(drop=True), scenes), 40, test_fold=7)
    assert mixes.split.value_counts().to_dict() == {"train": 32, "val": 4, "test": 4}
    assert (mixes.background_source[mixes.split == "test"].str.split("-").str[2] == "2").all()


# --- rendering --------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "workers"), [("numpy", 2), ("pydub", 1)])
def test_same_recipe_same_bytes_in_any_order_and_with_any_workers(clips, tmp_path, engine, workers):
    mixes = plan(clips, 70)
    first = mixing.render_mixes(mixes, tmp_path / "a", RATE, workers=1, engine=engine)
    mixes.to_csv(tmp_path / "mixes.csv", index=False)
    again = pd.read_csv(tmp_path / "mixes.csv").sample(frac=1, random_state=0)
    second = mixing.render_mixes(again, tmp_path / "b", RATE, workers=workers, engine=engine)
    second = second.sort_index()
    assert file_bytes(first) == file_bytes(second)
    assert first.peak_scale.tolist() == second.peak_scale.tolist()
    info = {(sf.info(p).frames, sf.info(p).samplerate, sf.info(p).subtype) for p in first.path}
    assert info == {(RATE, RATE, "PCM_16")}


def test_rendered_file_is_the_sum_of_its_sources(clips, tmp_path):
    mixes = plan(clips, 10, mode="lambda", onset=0.1)
    done = mixing.render_mixes(mixes, tmp_path, RATE)
    row = done.iloc[3]
    x1, x2, y = (sf.read(p)[0] for p in (row.foreground, row.background, row.path))
    expected = x2.copy()
    expected[800 : 800 + x1.size] += x1
    np.testing.assert_allclose(y, expected * row.peak_scale, atol=LSB)


def test_resuming_makes_only_what_is_missing_or_changed(clips, tmp_path):
    mixes = plan(clips, 20)
    done = mixing.render_mixes(mixes, tmp_path, RATE)
    before = {path: Path(path).stat().st_mtime_ns for path in done.path}
    Path(done.path[0]).unlink()
    mixes.loc[1, "foreground_gain_db"] -= 3
    again = mixing.render_mixes(mixes, tmp_path, RATE)
    after = {path: Path(path).stat().st_mtime_ns for path in again.path}
    assert [path for path in before if before[path] != after[path]] == done.path[:2].tolist()
    assert file_bytes(again)[0] == file_bytes(mixing.render_mixes(mixes, tmp_path / "c", RATE))[0]
    other = mixing.render_mixes(mixes, tmp_path, RATE // 2)
    assert {sf.info(path).samplerate for path in other.path} == {RATE // 2}


def test_a_source_that_changed_is_mixed_anew(tmp_path):
    pair = make_clips(tmp_path, ["dog"], 0.5, "e"), make_clips(tmp_path, ["park"], 1.0, "s")
    mixes = plan(pair, 5)
    old = file_bytes(mixing.render_mixes(mixes, tmp_path / "out", RATE))
    y, _ = sf.read(mixes.foreground[0])
    sf.write(mixes.foreground[0], y[: y.size // 2], RATE)
    new = file_bytes(mixing.render_mixes(mixes, tmp_path / "out", RATE))
    assert old[0] != new[0]


def test_a_failure_names_the_mix_and_keeps_what_was_made(clips, tmp_path):
    mixes = plan(clips, 60)
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound" * 100)
    # rendering goes by scene, so a name that sorts last fails after the others are made
    last = mixes.assign(background=mixes.background.where(mixes.index != 7, str(broken)))
    last.loc[7, "background"] = str(broken.rename(tmp_path.parent / "zzz.wav"))
    with pytest.raises(audio.AudioError, match=r"mix train-00007: .*zzz\.wav: cannot be read"):
        mixing.render_mixes(last, tmp_path / "out", RATE)
    made = list((tmp_path / "out").rglob("*.wav"))
    assert len(made) >= 32 and not list((tmp_path / "out").rglob("*.part"))
    with pytest.raises(audio.AudioError, match=r"train-00007.*is not there"):
        mixing.render_mixes(last.assign(background="gone.wav")[7:8], tmp_path / "out", RATE)
    assert len(mixing.render_mixes(mixes, tmp_path / "out", RATE)) == 60


def test_bad_rendering_requests_are_named(clips, tmp_path):
    mixes = plan(clips, 5)
    with pytest.raises(ValueError, match="unknown engine 'sox'"):
        mixing.render_mixes(mixes, tmp_path, RATE, engine="sox")
    with pytest.raises(ValueError, match="must be at least 1"):
        mixing.render_mixes(mixes, tmp_path, RATE, workers=0)
    with pytest.raises(ValueError, match="occurs twice"):
        mixing.render_mixes(pd.concat([mixes, mixes]), tmp_path, RATE)


ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10"


@pytest.mark.skipif(not ESC10.is_dir(), reason="the real ESC-10 is not beside the project")
def test_real_recordings_mix_without_leaks(tmp_path):
    found = datasets.load_clips("esc10", esc50_root=ESC10)
    events, scenes = datasets.load_scenes("esc10", found)
    mixes = mixing.plan_mixes(events, scenes, 25, duration_s=5.0, sample_rate=16000)
    metadata.check_leaks(mixes)
    done = mixing.render_mixes(mixes, tmp_path, 16000)
    assert {sf.info(path).frames for path in done.path} == {80000}
