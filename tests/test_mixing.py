import hashlib
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import fields
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pyloudnorm
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st
from pydub import AudioSegment
from scipy import stats

from soundscapes_utils import audio, datasets, metadata, mixing, store

RATE = 8000
SCALING = ("numpy", "pydub")  # engines that scale what would clip
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


def plan_scenes(clips, n=30, seed=0, **options):
    return mixing.plan_scenes(*clips, n, seed, **{"duration_s": 1.0, **options})


def file_bytes(mixes):
    return [Path(path).read_bytes() for path in mixes.path]


# --- one mix ----------------------------------------------------------------------------------


@settings(deadline=None)
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
    event = mixing.Event(fg, onset_ms / 1000, fg_db)
    y, scale, *_ = mixing.mix_signals(event, bg, RATE, 0.05, background_gain_db=bg_db)
    expected = [10 ** (bg_db / 20) * float(bg[i % n_bg]) for i in range(400)]
    for i in range(min(n_fg, 400 - onset_ms * 8)):
        expected[onset_ms * 8 + i] += 10 ** (fg_db / 20) * float(fg[i])
    assert y.dtype == np.float32 and y.size == 400
    # as near as 16 bit can be
    assert np.abs(y - np.array(expected) * scale).max() <= 0.5 * LSB + 1e-6
    peak = max(map(abs, expected))
    assert scale == 1.0 or math.isclose(scale, 32767 / 32768 / peak, rel_tol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8000, 11025, 16000, 44100]), st.floats(0, 0.9))
def test_engines_agree_to_one_step_on_the_plain_equation(seed, rate, onset):
    rng = np.random.default_rng(seed)
    onset = math.floor(onset * 100) / 1000
    fg = rng.uniform(-0.5, 0.5, rng.integers(1, rate // 5)).astype(np.float32)
    bg = rng.uniform(-0.4, 0.4, rng.integers(rate // 10, rate // 5)).astype(np.float32)
    event = mixing.Event(fg, onset)
    results = [mixing.mix_signals(event, bg, rate, engine=e) for e in SCALING]
    (ours, scale, *_), (theirs, their_scale, *_) = results
    assert scale == their_scale == 1.0 and ours.size == theirs.size == bg.size
    assert np.abs(np.rint(ours * 32768) - theirs * 32768).max() <= 1


def test_16_bit_sources_give_the_same_bytes_in_both_engines():
    rng = np.random.default_rng(1)
    fg, bg = (rng.integers(-16000, 16000, 800) / np.float32(32768) for _ in range(2))
    ours, theirs = (mixing.mix_signals(fg, bg, RATE, engine=e).audio for e in SCALING)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("engine", SCALING)
def test_loud_mix_is_scaled_not_clipped(engine):
    tone = np.sin(np.arange(800) * 0.1).astype(np.float32)
    y, scale, *_ = mixing.mix_signals(tone, tone, RATE, engine=engine)
    assert math.isclose(scale, 32767 / 32768 / 2, rel_tol=1e-3)
    # a clipped sine would not correlate with the clean one to the last digits
    assert np.corrcoef(y, tone)[0, 1] > 0.999999
    assert np.abs(y).max() <= 1


def tone_events(seed, n, loud):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        y = rng.uniform(-1, 1, rng.integers(1, 500)).astype(np.float32)
        yield mixing.Event(
            y, onset_s=int(rng.integers(0, 40)) / 1000, gain_db=rng.uniform(-20, loud),
            fade_s=rng.choice([0.0, 0.01]), repeats=int(rng.integers(1, 4)),
        )  # fmt: skip


def event_in_float64(event, n):
    """Place an event sample by sample: repeated, faded at both ends of each repetition, cut."""
    y, start = np.zeros(n), round(event.onset_s * RATE)
    period = event.signal.size
    for begin in range(start, start + event.repeats * period, period):
        length = min(event.signal.size, n - begin)
        ramp = max(0, min(round(event.fade_s * RATE), length // 2))
        for i in range(length):
            near = min(i, length - 1 - i)
            rise = math.sin(math.pi / 2 * (near + 0.5) / ramp) ** 2 if near < ramp else 1.0
            y[begin + i] += rise * float(event.signal[i])
    return y * 10 ** (event.gain_db / 20)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(-12, 6))
def test_several_events_against_plain_float64(seed, n_events, bg_db):
    events = list(tone_events(seed, n_events, loud=6))
    bg = np.random.default_rng(seed).uniform(-0.5, 0.5, 400).astype(np.float32)
    mix = mixing.mix_signals(events, bg, RATE, background_gain_db=bg_db)
    expected = bg * 10 ** (bg_db / 20) + sum(event_in_float64(event, 400) for event in events)
    assert np.abs(mix.audio - expected * mix.peak_scale).max() <= 0.51 * LSB
    limit = 32767 / 32768
    assert math.isclose(mix.peak_scale, min(1, limit / np.abs(expected).max()), rel_tol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.sampled_from(SCALING))
def test_stems_sum_to_the_mix_without_rest(seed, n_events, engine):
    events = list(tone_events(seed, n_events, loud=12))
    bg = np.random.default_rng(seed).uniform(-1, 1, 400).astype(np.float32)
    mix = mixing.mix_signals(events, bg, RATE, background_gain_db=-2, engine=engine, stems=True)
    codes = [part * 32768 for part in (mix.audio, mix.foreground, mix.background)]
    for part in codes:
        np.testing.assert_array_equal(part, np.rint(part))
        assert part.min() >= -32768 and part.max() <= 32767
    np.testing.assert_array_equal(codes[0], codes[1] + codes[2])
    # one step for numpy; pydub rounds the scene, every event and every overlay by itself
    slack = 1.01 if engine == "numpy" else 2 + 2 * n_events
    whole = sum(event_in_float64(event, 400) for event in events) * mix.peak_scale * 32768
    assert np.abs(codes[1] - whole).max() <= slack
    plain = mixing.mix_signals(events, bg, RATE, background_gain_db=-2, engine=engine)
    if mix.peak_scale == 1:
        np.testing.assert_array_equal(plain.audio, mix.audio)


def int16_noise(seed, n, peak):
    return np.random.default_rng(seed).integers(-peak, peak, n, dtype=np.int16)


@pytest.mark.parametrize(("preset", "steps"), [("gaurav2024-report", 0), ("gaurav2024-code", 2)])
def test_presets_do_what_pydub_does(tmp_path, preset, steps):
    rate = 44_100
    labels = {"e": ["dog"], "s": ["park"]}
    tables = []
    for kind, seconds in (("e", 0.5), ("s", 1.5)):
        clips = make_clips(tmp_path, labels[kind], seconds, kind, per_fold=1)
        for i, path in enumerate(clips.path):
            sf.write(path, int16_noise(i, int(seconds * rate), 6000), rate)
        tables.append(clips)
    mixes = mixing.plan_mixes(*tables, 5, **mixing.PRESETS[preset] | {"duration_s": 1.5})
    done = mixing.render_mixes(mixes, tmp_path / "out", rate)
    for row in done.itertuples():
        x1, x2 = (AudioSegment.from_wav(path) for path in (row.foreground, row.background))
        theirs = x2.overlay(x1) if preset == "gaurav2024-report" else (x2 - 3).overlay(x1 * 2 + 3)
        ours, found_rate = sf.read(row.path, dtype="int16")
        theirs = np.frombuffer(theirs.raw_data, "<i2")
        assert found_rate == rate and ours.size == theirs.size == 1.5 * rate
        assert np.abs(ours.astype(int) - theirs).max() <= steps
    # the trap: on a segment, "* 2" is no gain
    assert (done.repeats == (2 if preset == "gaurav2024-code" else 1)).all()
    assert len(x1 * 2) == 2 * len(x1)


def as_segment(y, rate):
    return AudioSegment(y.tobytes(), sample_width=2, frame_rate=rate, channels=1)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([8000, 16000, 44100]), st.integers(1, 3),
    st.floats(3, 12), st.sampled_from([0.0, -3.0, 7.5]),
)  # fmt: skip
def test_pydub_saturates_as_pydub_does(seed, rate, n_events, gain, bg_gain):
    rng = np.random.default_rng(seed)
    bg = int16_noise(seed, rate // 5, 32768)
    expected, events = as_segment(bg, rate) + bg_gain, []
    for number in range(n_events):
        y, onset = int16_noise(seed + 1 + number, rate // 10, 32768), int(rng.integers(0, 190))
        repeats = int(rng.integers(1, 3))
        expected = expected.overlay(as_segment(y, rate) * repeats + gain, position=onset)
        events.append(mixing.Event(y / np.float32(32768), onset / 1000, gain, repeats=repeats))
    how = {"background_gain_db": bg_gain, "engine": "pydub-saturate"}
    mix = mixing.mix_signals(events, bg / np.float32(32768), rate, **how)
    assert (mix.audio * 32768).astype("<i2").tobytes() == expected.raw_data
    assert mix.peak_scale == 1.0
    # it did clip, and is not what the scaling engine makes
    assert np.isin(mix.audio * 32768, [-32768, 32767]).any()


def test_files_of_clipping_pairs_are_those_of_a_plain_pydub_loop(tmp_path):
    rate = 44_100
    tables = []
    for kind, label, seconds in (("e", "dog", 0.5), ("s", "park", 1.5)):
        table = make_clips(tmp_path, [label], seconds, kind, per_fold=1)
        for i, path in enumerate(table.path):
            sf.write(path, int16_noise(i, int(seconds * rate), 30000), rate)
        tables.append(table)
    mixes = mixing.plan_mixes(*tables, 5, **mixing.PRESETS["gaurav2024-report"] | {"duration_s": 1.5})
    done = mixing.render_mixes(mixes, tmp_path / "out", rate, engine="pydub-saturate")
    for row in done.itertuples():
        x1, x2 = (AudioSegment.from_wav(path) for path in (row.foreground, row.background))
        x2.overlay(x1).export(tmp_path / "theirs.wav", format="wav")
        assert Path(row.path).read_bytes() == (tmp_path / "theirs.wav").read_bytes()
    assert (done.peak_scale == 1).all()
    scaled = mixing.render_mixes(mixes, tmp_path / "scaled", rate, engine="pydub")
    assert (scaled.peak_scale < 1).all()
    # what saturates is no sum of two parts
    with pytest.raises(ValueError, match=r"unknown engine of stems 'pydub-saturate'; .* numpy, pydub$"):
        mixing.render_mixes(mixes, tmp_path / "stems", rate, engine="pydub-saturate", stems=True)
    item = mixing.MixDataset(mixes, rate, engine="pydub-saturate")[1]
    np.testing.assert_array_equal(item["audio"], sf.read(done.path[1], dtype="float32")[0])


@pytest.mark.parametrize("engine", mixing.ENGINES)
@pytest.mark.parametrize(
    "wrong",
    [
        {"gain_db": math.nan}, {"gain_db": math.inf}, {"gain_db": -math.inf}, {"gain_db": 7000.0},
        {"gain_db": 700.0}, {"onset_s": math.nan}, {"onset_s": math.inf}, {"onset_s": -0.001},
        {"fade_s": math.nan}, {"fade_s": math.inf}, {"fade_s": -1.0}, {"repeats": math.nan},
        {"repeats": 1.5}, {"repeats": -1},
    ],
)  # fmt: skip
def test_events_that_are_no_numbers_are_refused(engine, wrong):
    y = np.full(80, 0.1, np.float32)
    with pytest.raises(audio.AudioError, match=r"a gain of|not in a mix"):
        mixing.mix_signals(mixing.Event(y, **wrong), y, RATE, engine=engine)
    if "gain_db" in wrong:
        with pytest.raises(audio.AudioError, match="a gain of"):
            mixing.mix_signals(y, y, RATE, background_gain_db=wrong["gain_db"], engine=engine)


def test_bad_mixes_are_refused():
    y = np.ones(8, np.float32)
    with pytest.raises(audio.AudioError, match=r"not in a mix of 0\.001 s"):
        mixing.mix_signals(mixing.Event(y, onset_s=0.5), y, RATE)
    with pytest.raises(ValueError, match="choose one of numpy, pydub"):
        mixing.mix_signals(y, y, RATE, engine="sox")
    with pytest.raises(audio.AudioError, match="0 repeats: not in a mix"):
        mixing.mix_signals(mixing.Event(y, repeats=0), y, RATE)
    with pytest.raises(audio.AudioError, match="needs an event"):
        mixing.mix_signals([], y, RATE)
    with pytest.raises(audio.AudioError, match="event 1: 1 of 2 samples are NaN"):
        events = [mixing.Event(np.ones(2)), mixing.Event(np.array([0, np.nan]))]
        mixing.mix_signals(events, y, RATE)


def lufs(y, rate):
    return pyloudnorm.Meter(rate).integrated_loudness(np.asarray(y, dtype=np.float64))


def test_lufs_ratio_is_that_of_the_active_part():
    rng = np.random.default_rng(0)
    sound, bg = rng.normal(0, 0.1, 2 * RATE), rng.normal(0, 0.01, 4 * RATE)
    fg = np.concatenate([np.zeros(RATE), sound, np.zeros(RATE)])
    gain = mixing.snr_gain_db(fg, bg, RATE, 6.0, measure="lufs")
    # steady sound: the gate of integrated loudness takes nothing away
    assert abs(lufs(sound * 10 ** (gain / 20), RATE) - lufs(bg, RATE) - 6.0) < 0.05
    with pytest.raises(ValueError, match="unknown measure 'peak'"):
        mixing.snr_gain_db(fg, bg, RATE, 6.0, measure="peak")


def k_weighted(y, rate):
    """K-weighting by the formulas of ITU-R BS.1770 (RBJ's shelf and high pass), one sample at a time."""
    for gain, q, at, shelf in ((4.0, math.sqrt(0.5), 1500.0, True), (0.0, 0.5, 38.0, False)):
        a, w = 10 ** (gain / 40), 2 * math.pi * at / rate
        alpha, c = math.sin(w) / (2 * q), math.cos(w)
        if shelf:
            root = 2 * math.sqrt(a) * alpha
            b = a * (a + 1 + (a - 1) * c + root), -2 * a * (a - 1 + (a + 1) * c)
            b = *b, a * (a + 1 + (a - 1) * c - root)
            d = a + 1 - (a - 1) * c + root, 2 * (a - 1 - (a + 1) * c), a + 1 - (a - 1) * c - root
        else:
            b, d = ((1 + c) / 2, -(1 + c), (1 + c) / 2), (1 + alpha, -2 * c, 1 - alpha)
        x1 = x2 = y1 = y2 = 0.0
        out = []
        for x in y.tolist():
            new = (b[0] * x + b[1] * x1 + b[2] * x2 - d[1] * y1 - d[2] * y2) / d[0]
            x1, x2, y1, y2 = x, x1, new, y1
            out.append(new)
        y = np.array(out)
    return y


def barks(rng, rate, pause_s, n, before_s=0.1):
    """Bursts of noise of 0.2 s with pauses between, and which 20 ms frames sound."""
    parts, sounds = [np.zeros(round(before_s * rate))], [False] * round(before_s * 50)
    for _ in range(n):
        parts += [
            rng.normal(0, rng.uniform(0.05, 0.2), round(0.2 * rate)),
            np.zeros(round(pause_s * rate)),
        ]
        sounds += [True] * 10 + [False] * round(pause_s * 50)
    return np.concatenate(parts).astype(np.float32), np.repeat(sounds, round(0.02 * rate))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.1, 1.0]), st.integers(1, 4), st.booleans())
def test_both_measures_take_the_same_frames_and_differ_by_the_weighting_alone(seed, pause, n, loud):
    rng = np.random.default_rng(seed)
    fg, sounds = barks(rng, RATE, pause, n)
    bg = rng.normal(0, 0.01, RATE).astype(np.float32)
    bg[: RATE // 2] *= 30 if loud else 1  # what a gate would single out
    for measure, weight in (("rms", lambda y: y), ("lufs", lambda y: k_weighted(y, RATE))):
        event, scene = (weight(y.astype(np.float64)) for y in (fg, bg))
        ratio = 10 * math.log10(np.mean(event[sounds] ** 2) / np.mean(scene**2))
        gain = mixing.snr_gain_db(fg, bg, RATE, 6.0, measure=measure)
        assert math.isclose(gain, 6.0 - ratio, abs_tol=1e-6)


# making 50 sounds takes its seconds; of fewer a single odd clip would speak for its class
@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builtin")
    return datasets.load_builtin(folder, clips_per_class=5)


def test_on_the_built_in_events_the_measures_agree_but_for_the_weighting(builtin):
    bg = np.random.default_rng(0).normal(0, 0.05, 5 * 16000)
    apart = {}
    for label, part in builtin.groupby("label"):
        events = [audio.load_audio(path, 16000, 5.0)[0] for path in part.path]
        gains = [[mixing.snr_gain_db(y, bg, 16000, 6.0, m) for m in mixing.MEASURES] for y in events]
        apart[label] = np.mean([rms - lufs for rms, lufs in gains])
    assert len(apart) == 10
    # what all have in common is the weighting of the background
    assert np.abs(np.array([*apart.values()]) - np.mean([*apart.values()])).max() <= 1.5


def test_the_silence_around_an_event_does_not_count():
    burst, background = np.full(RATE, 0.1), np.full(RATE, 0.1)
    for before, after in ((0, 0), (1, 0), (2, 3)):
        y = np.concatenate([np.zeros(before * RATE), burst, np.zeros(after * RATE)])
        assert mixing.snr_gain_db(y, background, RATE, 6.0) == pytest.approx(6.0)


# --- planning ---------------------------------------------------------------------------------


def test_plan_is_the_table_of_mixes_and_balanced(clips):
    mixes = plan(clips, 90)
    assert mixes.columns.tolist() == [*mixing.MIX_COLUMNS, "caption", "caption_2", "caption_3"]
    assert mixes.split.value_counts().to_dict() == {"train": 54, "val": 18, "test": 18}
    for _, part in mixes.groupby("split"):
        grid = pd.crosstab(part.label, part.scene).to_numpy()
        assert grid.shape == (3, 2) and np.ptp(grid) == 0
        used = part.foreground.value_counts()
        assert used.max() - used.min() <= 1
    # a mix is a clip: its foreground's
    known = clips[0].set_index("path").loc[mixes.foreground]
    for name in ("label", "source_id", "fold", "dataset"):
        assert mixes[name].tolist() == known[name].tolist()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31), st.integers(5, 60), st.integers(1, 5), st.sampled_from(["snr", "lambda"]))
def test_any_plan_is_balanced_seeded_and_free_of_leaks(clips, seed, n, test_fold, mode):
    mixes = plan(clips, n, seed, test_fold=test_fold, mode=mode)
    assert len(mixes) == n and mixes.clip_id.is_unique and set(mixes.split) == {"train", "val", "test"}
    metadata.check_leaks(mixes)
    fold = mixes.source_id.str.split("-").str[2].astype(int)
    assert (fold[mixes.split == "test"] == test_fold).all()
    for split, part in mixes.groupby("split"):
        for column, names in (("label", LABELS), ("scene", SCENES)):
            counts = part[column].value_counts().reindex(names, fill_value=0)
            assert counts.max() - counts.min() <= 1, split
    pd.testing.assert_frame_equal(mixes, plan(clips, n, seed, test_fold=test_fold, mode=mode))


def test_more_mixes_keep_the_first_ones(clips):
    few, many = (plan(clips, n).set_index("clip_id") for n in (20, 60))
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


def fixed_clips(folder, labels, seconds):
    rng = np.random.default_rng(7)
    rows = []
    for label in labels:
        for fold in range(1, 6):
            for take in range(2):
                name = f"{label}-{fold}-{take}"
                y = rng.integers(-9000, 9000, int(seconds * RATE), dtype=np.int16)
                y[: y.size // 5] = 0
                sf.write(folder / f"{name}.wav", y, RATE)
                rows.append((name, str(folder / f"{name}.wav"), label, fold, name))
    return pd.DataFrame(rows, columns=["clip_id", "path", "label", "fold", "source_id"])


OLD_COLUMNS = ["clip_id", "split", "foreground", "label", "source_id", "background", "scene"]
OLD_COLUMNS += ["background_source", "onset_s", "duration_s", "foreground_gain_db"]
OLD_COLUMNS += ["background_gain_db", "snr_db", "seed", "caption", "caption_2", "caption_3", "path"]
OLD_NAMES = {"clip_id": "mix_id", "label": "foreground_label", "source_id": "foreground_source"}
# taken from the first version, whose plans and sounds a checkpoint was trained on
FIRST_VERSION = {
    "snr": ("e72f04a357f332f7", "c2f4b57c0ff8ef85", "750e53747c504bdc"),
    "lambda": ("c2d0a5ab7a88786f", "4dae20711372b6b5", "787e2a15564bb988"),
}


def short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("mode", ["snr", "lambda"])
def test_default_plans_and_sounds_never_change(tmp_path, mode):
    pair = fixed_clips(tmp_path, LABELS, 0.5), fixed_clips(tmp_path, SCENES, 0.7)
    options = {"mode": mode, "onset": 0.1, "foreground_lambda": 4.0} if mode == "lambda" else {}
    mixes = plan(pair, 25, 3, **options)
    names = {kind: mixes[kind].map(lambda p: Path(p).name) for kind in ("foreground", "background")}
    first = mixes.assign(**names)[OLD_COLUMNS].rename(columns=OLD_NAMES)
    found = [short_hash(first.to_csv(index=False).encode())]
    for engine in SCALING:
        done = mixing.render_mixes(mixes, tmp_path / engine, RATE, workers=1, engine=engine)
        scales = repr(done.peak_scale.tolist()).encode()
        found.append(short_hash(b"".join(file_bytes(done)) + scales))
    assert tuple(found) == FIRST_VERSION[mode]
    # a table without fades and repeats is the same recipe: nothing is made again
    times = [Path(path).stat().st_mtime_ns for path in done.path]
    again = mixing.render_mixes(mixes[OLD_COLUMNS], tmp_path / "pydub", RATE, engine="pydub")
    assert [Path(path).stat().st_mtime_ns for path in again.path] == times


def test_a_range_is_drawn_evenly_and_a_list_is_chosen_from(clips):
    mixes = plan(clips, 600, snr_db=(-6, 12), fade_s=[0.0, 0.01, 0.01], repeat=(1, 3))
    assert stats.kstest(mixes.snr_db, stats.uniform(-6, 18).cdf).pvalue > 0.01
    for name, shares in (("fade_s", {0.0: 1, 0.01: 2}), ("repeats", {1: 1, 2: 1, 3: 1})):
        counts = mixes[name].value_counts().reindex(shares)
        expected = np.array(list(shares.values())) / sum(shares.values()) * len(mixes)
        assert counts.sum() == len(mixes)
        assert stats.chisquare(counts, expected).pvalue > 0.01
    _, events = mixing.plan_scenes(*clips, 600, duration_s=1.0, events=(1, 3))
    counts = events.groupby("clip_id").size().value_counts()
    assert stats.binomtest(int(counts[2]), 600, 1 / 3).pvalue > 0.01
    assert stats.binomtest(int(counts[3]), 600, 1 / 3).pvalue > 0.01


def test_every_option_draws_for_itself(clips):
    plain = plan(clips, 40)
    rich, _ = plan_scenes(
        clips, 40, events=(1, 3), repeat=[1, 3], fade_s=(0.0, 0.02),
        background_gain_db=(-6, 0), snr_db=[0, 6], n_captions=5,
    )  # fmt: skip
    same = ["clip_id", "foreground", "background", "seed"]
    pd.testing.assert_frame_equal(plain[same], rich[same])
    assert set(rich.snr_db) == {0.0, 6.0} and set(rich.repeats) == {1, 3}
    assert rich.background_gain_db.between(-6, 0).all() and rich.fade_s.between(0, 0.02).all()
    once = rich.repeats == 1
    np.testing.assert_array_equal(rich.onset_s[once], plain.onset_s[once])
    assert [c for c in rich if c.startswith("caption")][-1] == "caption_5"
    one = plan(clips, 40, n_captions=1)
    assert [c for c in one if c.startswith("caption")] == ["caption"]
    few, many = (plan_scenes(clips, n, events=(1, 3)) for n in (20, 40))
    for one, other in zip(few, many, strict=True):
        same = other[other.clip_id.isin(few[0].clip_id)].reset_index(drop=True)
        pd.testing.assert_frame_equal(one, same)


def test_51000_mixes_are_one_line_and_use_every_event_25_or_26_times(clips):
    preset = mixing.PRESETS["gaurav2024-report"] | {"duration_s": 1.0, "sample_rate": None}
    mixes = mixing.plan_mixes(*clips, 51 * 15, **preset)
    uses = mixes.foreground.value_counts()
    assert len(uses) == 30 and set(uses) <= {25, 26}
    assert (mixes[["onset_s", "foreground_gain_db", "background_gain_db"]] == 0).all().all()


def test_further_events_have_other_labels_and_are_all_listed(clips):
    mixes, events = plan_scenes(clips, 60, events=3, snr_db=3.0)
    assert (mixes.n_events == 3).all() and len(events) == 180
    assert events.columns.tolist() == mixing.EVENT_COLUMNS
    for row, sounding in zip(mixes.itertuples(), mixing.events_of(mixes, events), strict=True):
        assert row.label == sounding[0]["label"]
        assert {event["label"] for event in sounding} == set(LABELS)
        assert row.caption.count(" and ") >= 1
    when = mixing.occurrences(mixes, events)
    assert len(when) == 180
    assert when.groupby("clip_id", sort=False).event.apply(list).map(lambda e: e == [0, 1, 2]).all()
    # the clips are silent for 0.1 s, then sound for 0.4 s
    np.testing.assert_allclose(when.offset_s - when.onset_s, 0.4, atol=1e-9)
    assert (when.offset_s <= 1).all() and (when.snr_db == 3).all()
    folds = when.source_id.str.split("-").str[2].astype(int)
    split = when.clip_id.str.split("-").str[0]
    assert (folds[split == "test"] == 5).all() and (folds[split == "val"] == 1).all()
    assert not folds[split == "train"].isin([1, 5]).any()


def test_occurrences_list_repetitions_within_the_mix(clips):
    mixes = plan(clips, 5, repeat=3, onset=0.2)
    when = mixing.occurrences(mixes)
    first = when[when.clip_id == mixes.clip_id[0]]
    # 0.2 + 0.1 of silence in the clip; 0.5 later again, and then the mix is over
    np.testing.assert_allclose(first[["onset_s", "offset_s"]], [[0.3, 0.7], [0.8, 1.0]])


def test_events_that_are_not_given_are_missed(clips, tmp_path):
    mixes, events = plan_scenes(clips, 6, events=2)
    for table in (None, events[events.clip_id != "train-00000"]):
        with pytest.raises(ValueError, match="train-00000: 1 of 2 events are listed"):
            mixing.render_mixes(mixes, tmp_path, RATE, events=table)
        with pytest.raises(ValueError, match="the second table of plan_scenes"):
            mixing.MixDataset(mixes, RATE, events=table)


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
        ({"snr_db": (5, -5)}, "give a number"),
        ({"mode": "lambda", "foreground_lambda": 0}, "values from 1e-06 on"),
        ({"onset": 1.5}, "does not lie in 1.0 s"),
        ({"onset": "soon"}, "give a number"),
        ({"duration_s": 0}, "duration_s 0 must be a number above 0"),
        ({"test_fold": 9}, "test_fold 9"),
        ({"preset": "report-A"}, "unknown option 'preset'"),
        ({"gap_s": 0.1}, "unknown option 'gap_s'"),
        ({"format": "mp3"}, "unknown format 'mp3'"),
        ({"foreground_lambda": 1.0}, "foreground_lambda has no effect in mode 'snr'"),
        ({"background_lambda": 2.0}, "background_lambda has no effect in mode 'snr'"),
        ({"mode": "lambda", "snr_db": 3.0}, "snr_db has no effect in mode 'lambda'.*mode 'snr'"),
        ({"snr_measure": "peak"}, "unknown snr_measure 'peak'"),
        ({"foreground_gain_db": 3.0}, "use mode 'lambda'"),
        ({"events": 0}, "values from 1 on"),
        ({"events": 1.5}, "whole numbers"),
        ({"events": 2}, "plan_scenes lays several"),
        ({"fade_s": -1}, "values from 0.0 on"),
        ({"snr_db": (0, 1, 2)}, "give a number"),
        ({"snr_db": ["gamma", 0, 1]}, "give a number"),
        ({"snr_db": []}, "give a number"),
        ({"snr_db": [0, math.nan]}, "give a number"),
        ({"snr_db": "loud"}, "give a number"),
        ({"onset": [0.1, 1.0]}, "does not lie in 1.0 s"),
        ({"n_captions": 0}, "at least 1"),
        ({"n_captions": math.nan}, "n_captions nan must be a whole number"),
        ({"n": math.nan}, "n nan must be a whole number"),
        ({"n": -5}, "n -5 must be a whole number"),
        ({"n": 30.5}, "n 30.5 must be a whole number"),
        ({"seed": math.nan}, "seed nan must be a whole number"),
        ({"seed": -1}, "seed -1 must be a whole number"),
        ({"seed": "1"}, "seed '1' must be a whole number"),
        ({"duration_s": math.nan}, "duration_s nan must be a number above 0"),
        ({"duration_s": math.inf}, "duration_s inf must be a number above 0"),
        ({"duration_s": -1.0}, "duration_s -1.0 must be"),
        ({"test_fold": math.nan}, "test_fold nan must be a whole number"),
        ({"sample_rate": 0}, "sample_rate 0 must be a number above 0"),
        ({"sample_rate": math.nan}, "sample_rate nan must be a number above 0"),
    ],
)
def test_bad_options_are_named(clips, options, message):
    with pytest.raises(ValueError, match=message):
        plan(clips, **options)


@pytest.mark.parametrize("preset", mixing.PRESETS)
def test_what_a_preset_sets_may_be_overridden_and_what_cannot_act_is_refused(clips, preset):
    options = mixing.PRESETS[preset] | {"duration_s": 1.0, "sample_rate": None}
    with pytest.raises(ValueError, match="snr_db has no effect in mode 'lambda'"):
        plan(clips, 5, **options | {"snr_db": 3.0})
    with pytest.raises(ValueError, match=r"foreground_.* has no effect in mode 'snr'"):
        plan(
            clips, 5, **{k: v for k, v in options.items() if k != "background_lambda"} | {"mode": "snr"}
        )
    # what is given acts
    before = plan(clips, 5, **options)
    for name, value, column in (
        ("onset", 0.25, "onset_s"),
        ("repeat", 3, "repeats"),
        ("fade_s", 0.05, "fade_s"),
        ("background_gain_db", -9.0, "background_gain_db"),
        ("background_lambda", 10 ** (-9 / 20), "background_gain_db"),
        ("foreground_lambda", 2.0, "foreground_gain_db"),
        ("snr_measure", "lufs", "snr_db"),
        ("n_captions", 4, "caption_4"),
        ("format", "flac", "path"),
        ("test_fold", 1, "source_id"),
    ):
        after = plan(clips, 5, **options | {name: value})
        assert column not in before or not after[column].equals(before[column]), name
        assert column in after


def test_no_more_events_than_labels(clips):
    with pytest.raises(ValueError, match="events up to 4: a split has 3 labels"):
        plan_scenes(clips, 30, events=(1, 4))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("fold", math.nan), ("fold", 1.5), ("fold", "two"), ("label", math.nan), ("label", ""),
        ("label", None), ("source_id", math.nan), ("source_id", " "), ("path", None), ("path", ""),
    ],
)  # fmt: skip
def test_rows_of_clips_that_cannot_be_used_are_named(clips, column, value):
    for which in (0, 1):
        bad = [table.astype({column: object}) for table in clips]
        bad[which].loc[2, column] = value
        name = ("foregrounds", "backgrounds")[which]
        with pytest.raises(store.DataError, match=rf"{name}, row 3: {column} "):
            plan(bad)
        with pytest.raises(store.DataError, match=rf"{name}: has no column {column}"):
            plan([table.drop(columns=column) if i == which else table for i, table in enumerate(clips)])


def test_names_of_clips_may_be_numbers_and_paths(clips):
    odd = [
        table.assign(path=table.path.map(Path), source_id=range(start, start + len(table)))
        for table, start in zip(clips, (0, 100), strict=True)
    ]
    mixes = plan(odd)
    pd.testing.assert_frame_equal(mixes[["foreground", "seed"]], plan(clips)[["foreground", "seed"]])
    assert mixes.source_id.map(type).eq(str).all()


def test_none_is_not_given(clips):
    names = [field.name for field in fields(mixing.MixOptions)]
    bare = mixing.plan_mixes(*clips, 10, **dict.fromkeys(names) | {"duration_s": 1.0})
    pd.testing.assert_frame_equal(bare, plan(clips, 10))
    # what is given counts, even where it equals a default
    preset = mixing.PRESETS["gaurav2024-report"] | {"duration_s": 1.0, "onset": "uniform"}
    assert plan(clips, 10, **preset).onset_s.nunique() > 5


def spoilt(table, folder, rows, how):
    """The table with some of its clips replaced by what no mix of 1 s can use."""
    table = table.copy()
    for i in rows:
        y, path = sf.read(table.path[i])[0], folder / f"spoilt-{i}.wav"
        if how == "silent first":
            sf.write(path, np.concatenate([np.zeros(2 * RATE), y]), RATE)
        elif how == "opposite phase":
            sf.write(path, np.stack([y, -y], axis=1), RATE)
        elif how == "damaged":
            path.write_bytes(b"no sound" * 100)
        table.loc[i, "path"] = str(path)  # of "missing" there is none
    return table


@pytest.mark.parametrize("how", ["silent first", "opposite phase", "damaged", "missing"])
def test_clips_that_no_mix_can_use_are_left_out_and_reported(clips, tmp_path, how):
    events, scenes = clips
    bad = spoilt(events, tmp_path, [0, 3, 12], how), spoilt(scenes, tmp_path, [5], how)
    with pytest.warns(UserWarning, match=r"4 clips that no mix can use are left out: .*spoilt-\d+\.wav"):
        mixes, more = plan_scenes(bad, 120, events=(1, 2))
    used = {*mixes.foreground, *mixes.background, *more.foreground}
    assert not [path for path in used if "spoilt" in path] and len(used) == 46
    # balanced as ever
    for _, part in mixes.groupby("split"):
        assert np.ptp(part.label.value_counts()) <= 1 and np.ptp(part.scene.value_counts()) <= 1
    with pytest.warns(UserWarning, match="left out"):
        few, _ = plan_scenes(bad, 40, events=(1, 2))
    kept = mixes[mixes.clip_id.isin(few.clip_id)].reset_index(drop=True)
    pd.testing.assert_frame_equal(few, kept)
    if how == "silent first":  # what is silent in 1 s sounds in 3 s
        assert set(plan(bad, 120, duration_s=3.0).foreground) == set(bad[0].path)


def test_a_label_of_which_nothing_sounds_is_one_error(clips, tmp_path):
    events, scenes = clips
    cows = events.index[(events.label == "cow") & (events.fold == 5)]
    bad = spoilt(events, tmp_path, cows, "silent first")
    with pytest.raises(audio.AudioError, match=rf"test clips of label 'cow' .*{bad.path[cows[0]]}"):
        plan((bad, scenes))
    bad = spoilt(scenes, tmp_path, scenes.index, "damaged")
    with pytest.raises(audio.AudioError, match=r"label '(park|tram)' .*spoilt-"):
        plan((events, bad))


def test_gains_that_amplify_the_noise_of_rounding_are_reported(clips, tmp_path):
    events, scenes = clips
    path = tmp_path / "faint.wav"
    sf.write(path, np.random.default_rng(0).integers(-4, 5, RATE, dtype=np.int16), RATE)
    faint = events.assign(path=events.path.where(events.index != 0, str(path)))
    with pytest.warns(UserWarning, match=r"mixes amplify by more than 40 dB.*: (train|val|test)-\d"):
        mixes = plan((faint, scenes), 60, snr_db=6.0)
    loud = mixes.clip_id[mixes.foreground_gain_db > 40]
    assert len(loud) and set(mixes.foreground[mixes.clip_id.isin(loud)]) == {str(path)}
    for options in ({"mode": "lambda", "foreground_lambda": 200.0}, {"background_gain_db": 45.0}):
        with pytest.warns(UserWarning, match="5 mixes amplify"):
            plan(clips, 5, **options)
    # of further events, too
    with pytest.warns(UserWarning, match="mixes amplify"):
        _, more = plan_scenes((faint, scenes), 40, events=2, snr_db=6.0)
    assert (more.gain_db[more.event > 0] > 40).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(clips, 30, snr_db=(0, 30))


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
    again = store.read_table(tmp_path / "mixes.csv").sample(frac=1, random_state=0)
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


@pytest.fixture
def decoded(monkeypatch):
    """What is decoded: nothing is rendered without that."""
    paths, load = [], audio.load_audio
    monkeypatch.setattr(
        audio, "load_audio", lambda path, *a, **k: paths.append(path) or load(path, *a, **k)
    )
    return paths


def damage(path, how):
    content = path.read_bytes()
    if how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:100])
    elif how == "longer":
        path.write_bytes(content + b"\0\0")
    elif how == "zeros after a loss of power":
        path.write_bytes(content[:4096] + bytes(len(content) - 4096))
    elif how == "one bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "another mix":
        path.write_bytes(path.with_name("train-00003.wav").read_bytes())
    elif how == "no link's end":
        path.unlink()
        path.symlink_to("nowhere")


@pytest.mark.parametrize("part", ["", "_background"])
@pytest.mark.parametrize(
    "how",
    [
        "emptied",
        "cut",
        "longer",
        "zeros after a loss of power",
        "one bit",
        "another mix",
        "no link's end",
    ],
)
def test_a_damaged_mix_is_made_again(clips, tmp_path, how, part):
    mixes = plan(clips, 10)
    done = mixing.render_mixes(mixes, tmp_path, RATE, stems=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.wav")}
    times = {path: path.stat().st_mtime_ns for path in before}
    spoilt = Path(done.path[1].replace(".wav", f"{part}.wav"))
    damage(spoilt, how)
    mixing.render_mixes(mixes, tmp_path, RATE, stems=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.wav")} == before
    again = {path.stem for path in before if path.stat().st_mtime_ns != times[path]}
    name = Path(done.path[1]).stem
    assert again == {name, f"{name}_foreground", f"{name}_background"}


@pytest.mark.parametrize("how", ["moved", "copied with other times", "linked"])
def test_the_same_data_elsewhere_is_known(tmp_path, decoded, monkeypatch, how):
    here, there = tmp_path / "here", tmp_path / "mnt" / "there"
    for name in ("events", "scenes"):
        (here / name).mkdir(parents=True)
    pair = make_clips(here / "events", LABELS, 0.5, "e"), make_clips(here / "scenes", SCENES, 1.0, "s")
    mixes, events = plan_scenes(pair, 30, events=(1, 2))
    mixing.render_mixes(mixes, here / "out", RATE, workers=1, events=events)
    before = folder_bytes(here / "out")
    if how == "linked":
        there.parent.mkdir()
        there.symlink_to(here)
    elif how == "moved":
        there.parent.mkdir()
        here.rename(there)
    else:
        shutil.copytree(here, there, copy_function=shutil.copyfile)
        for number, path in enumerate(there.rglob("*.wav")):
            os.utime(path, (number, number))
        shutil.rmtree(here)
    decoded.clear()
    moved = [
        table.replace(
            {name: {str(here): str(there)} for name in table if name.endswith("ground")}, regex=True
        )
        for table in (mixes, events)
    ]
    assert moved[0].foreground.str.startswith(str(there)).all()
    done = mixing.render_mixes(moved[0], there / "out", RATE, workers=1, events=moved[1])
    assert not decoded and folder_bytes(there / "out") == before and done.peak_scale.notna().all()
    # where nothing has moved nothing is read: neither sources nor, where times agree, mixes
    hashed, digest = [], store.file_digest
    monkeypatch.setattr(store, "file_digest", lambda path: hashed.append(path) or digest(path))
    mixing.render_mixes(moved[0], there / "out", RATE, workers=1, events=moved[1])
    assert not decoded and not {*map(str, hashed)} & {*moved[0].foreground, *moved[0].background}
    assert not hashed or how == "copied with other times"


def test_sources_are_hashed_once_and_only_where_files_are_made(clips, tmp_path, monkeypatch):
    mixes, hashed, digest = plan(clips, 60), [], store.file_digest
    monkeypatch.setattr(store, "file_digest", lambda path: hashed.append(str(path)) or digest(path))
    sources = {*mixes.foreground, *mixes.background}
    mixing.MixDataset(mixes, RATE)[0]
    assert not hashed
    mixing.render_mixes(mixes, tmp_path, RATE, workers=1, shard="1/2")
    share = [path for path in hashed if path in sources]
    assert len(share) == len(set(share)) < len(sources)
    mixing.render_mixes(mixes, tmp_path, RATE, workers=1)
    mixing.render_mixes(mixes, tmp_path, RATE // 2, workers=1)
    found = [path for path in hashed if path in sources]
    assert sorted(found) == sorted(sources)


def test_sources_of_equal_size_and_time_are_told_apart(clips, tmp_path):
    """Unpacked archives often give all their files one time, and clips of one length have one size."""
    mixes = plan(clips, 5, mode="lambda", foreground_lambda=1.0)[:1]
    row, rng, made = mixes.iloc[0], np.random.default_rng(0), []
    for name in ("one", "two"):
        path = tmp_path / name / "clip.wav"
        path.parent.mkdir()
        sf.write(path, rng.normal(0, 0.1, RATE // 2), RATE)
        os.utime(path, (10**9, 10**9))
        done = mixing.render_mixes(mixes.assign(foreground=str(path)), tmp_path / "out", RATE)
        made.append(Path(done.path.iloc[0]).read_bytes())
    assert made[0] != made[1] and row.foreground not in made


@pytest.mark.parametrize("name", ["mixes", "sources"])
@pytest.mark.parametrize(
    "line",
    [b"5", b"{}", b"[1, 2, 3]", b'["train-00000", 5]', b'["train-00000", {}]', b'["', b"\xff\xfe"],
)
def test_damaged_notes_cost_a_rendering_at_most(clips, tmp_path, name, line):
    mixes = plan(clips, 5)
    before = file_bytes(mixing.render_mixes(mixes, tmp_path, RATE))
    (note,) = (tmp_path / ".records").glob(f"{name}-*.jsonl")
    note.write_bytes(note.read_bytes() + line + b"\n" + line)
    done = mixing.render_mixes(mixes, tmp_path, RATE)
    assert file_bytes(done) == before and done.peak_scale.notna().all()


TOGETHER = """
import sys
import pandas as pd
from soundscapes_utils import mixing
mixes = pd.read_pickle(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for number in range(3):
    done = mixing.render_mixes(mixes, sys.argv[2], int(sys.argv[3]), workers=1)
    assert done.peak_scale.notna().all() and len(done) == len(mixes)
"""


@pytest.mark.parametrize("rates", [(8000, 8000), (8000, 4000)])
def test_two_renders_in_one_folder_at_once(clips, tmp_path, rates):
    """Also of two rates, whose files replace each other all the time. (Slow: processes start.)"""
    plan(clips, 60).to_pickle(tmp_path / "plan.pickle")
    call = [sys.executable, "-c", TOGETHER, str(tmp_path / "plan.pickle"), str(tmp_path / "out")]
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*call, str(rate)], **pipe) for rate in rates]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert not list((tmp_path / "out").rglob("*.part"))
    if rates[0] != rates[1]:
        return
    mixes = plan(clips, 60)
    done = mixing.render_mixes(mixes, tmp_path / "out", RATE, workers=1)
    assert file_bytes(done) == file_bytes(
        mixing.render_mixes(mixes, tmp_path / "fresh", RATE, workers=1)
    )


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
    with pytest.raises(audio.AudioError, match=r"gone\.wav: this source is not there"):
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
    with pytest.raises(ValueError, match="mixes: has no column onset_s"):
        mixing.render_mixes(mixes.drop(columns="onset_s"), tmp_path, RATE)
    with pytest.raises(ValueError, match=r"unknown format '\.mp3'"):
        mixing.render_mixes(mixes.assign(path="x.mp3"), tmp_path, RATE)
    for shard in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(ValueError, match="from 1 to n"):
            mixing.render_mixes(mixes, tmp_path, RATE, shard=shard)


WRONG_VALUES = [
    ("clip_id", "../../../evil"), ("clip_id", "/tmp/evil"), ("clip_id", ".."), ("clip_id", "a/b"),
    ("clip_id", ""), ("clip_id", 1), ("clip_id", "x" * 300), ("split", "../../evil"), ("split", "."),
    ("split", "/tmp"), ("split", "a\\b"), ("split", None), ("split", ".records"),
    ("foreground", math.nan), ("foreground", ""), ("background", None), ("background", 3),
    ("duration_s", math.nan), ("duration_s", -1.0), ("duration_s", 0.0), ("duration_s", math.inf),
    ("onset_s", math.nan), ("onset_s", -0.5), ("fade_s", math.nan), ("fade_s", -1.0), ("repeats", 0),
    ("repeats", 1.5), ("repeats", math.nan), ("foreground_gain_db", math.nan),
    ("foreground_gain_db", math.inf), ("background_gain_db", -math.inf), ("background_gain_db", "loud"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value"), WRONG_VALUES)
def test_a_plan_is_checked_before_anything_is_rendered(clips, tmp_path, column, value):
    mixes = plan(clips, 6).astype({column: object})
    mixes.loc[4, column] = value
    for call in (
        lambda: mixing.render_mixes(mixes, tmp_path / "a" / "b" / "out", RATE, workers=1),
        lambda: mixing.MixDataset(mixes, RATE),
    ):
        with pytest.raises(store.DataError, match=rf"mixes, row 5: {column} "):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("gain_db", math.nan), ("gain_db", math.inf), ("onset_s", -1.0), ("repeats", 0),
        ("fade_s", math.nan), ("foreground", None), ("event", math.nan), ("clip_id", "../evil"),
    ],
)  # fmt: skip
def test_a_table_of_events_is_checked_too(clips, tmp_path, column, value):
    mixes, events = plan_scenes(clips, 6, events=2)
    events = events.astype({column: object})
    events.loc[3, column] = value
    for call in (
        lambda: mixing.render_mixes(mixes, tmp_path / "out", RATE, events=events),
        lambda: mixing.MixDataset(mixes, RATE, events=events),
    ):
        with pytest.raises(store.DataError, match=rf"events, row 4: {column} "):
            call()
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=20)
@given(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12))
def test_no_name_leads_out_of_the_folder(clips, tmp_path_factory, clip_id, split):
    folder = tmp_path_factory.mktemp("names")
    mixes = plan(clips, 5)[:1].assign(clip_id=clip_id, split=split)
    try:
        done = mixing.render_mixes(mixes, folder / "in" / "out", RATE, workers=1)
    except store.DataError:
        done = mixes[:0]
    made = [path for path in folder.rglob("*") if path.is_file() and ".records" not in path.parts]
    assert made == [Path(path) for path in done.path]
    assert all(path.parent.parent == folder / "in" / "out" for path in made)


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf])
def test_rates_that_are_none_are_refused(clips, tmp_path, rate):
    with pytest.raises(store.DataError, match="must be at least 1"):
        mixing.render_mixes(plan(clips, 5), tmp_path, rate)


def codes(path):
    return sf.read(path, dtype="int16")[0].astype(int)


@pytest.mark.parametrize("engine", SCALING)
def test_stems_and_flac_hold_the_same_samples(clips, tmp_path, engine):
    options = {"events": 2, "fade_s": 0.02, "snr_db": (0, 40)}
    mixes, events = plan_scenes(clips, 12, **options)
    flac, _ = plan_scenes(clips, 12, format="flac", **options)
    how = {"engine": engine, "events": events}
    plain = mixing.render_mixes(mixes, tmp_path / "a", RATE, **how)
    parts = mixing.render_mixes(flac, tmp_path / "b", RATE, stems=True, **how)
    assert (plain.peak_scale < 1).any() and (plain.peak_scale == 1).any()
    for one, other in zip(plain.itertuples(), parts.itertuples(), strict=True):
        stem = other.path.removesuffix(".flac")
        y, fg, bg = (codes(f"{stem}{part}.flac") for part in ("", "_foreground", "_background"))
        np.testing.assert_array_equal(fg + bg, y)
        assert sf.info(other.path).subtype == "PCM_16" and other.peak_scale <= one.peak_scale
        if one.peak_scale == other.peak_scale:
            np.testing.assert_array_equal(codes(one.path), y)
    Path(parts.path[3].replace(".flac", "_background.flac")).unlink()
    mixing.render_mixes(flac, tmp_path / "b", RATE, stems=True, **how)
    assert len(list((tmp_path / "b").rglob("*.flac"))) == 36


def folder_bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in store.walk_files(folder)}


def test_shards_are_the_whole(clips, tmp_path):
    mixes, events = plan_scenes(clips, 50, events=(1, 2))
    mixing.render_mixes(mixes, tmp_path / "whole", RATE, workers=1, events=events)
    parts = [
        mixing.render_mixes(mixes, tmp_path / "parts", RATE, workers=1, shard=f"{i}/3", events=events)
        for i in (3, 1, 2)
    ]
    assert sorted(pd.concat(parts).clip_id) == sorted(mixes.clip_id)
    assert min(map(len, parts)) > 10
    assert folder_bytes(tmp_path / "whole") == folder_bytes(tmp_path / "parts")
    again = mixing.render_mixes(mixes, tmp_path / "parts", RATE, events=events)
    assert again.clip_id.tolist() == mixes.clip_id.tolist() and again.peak_scale.notna().all()


KILLED = """
import os, signal, sys
import pandas as pd
from soundscapes_utils import mixing
replace, left = os.replace, 25
def deadly(part, target):
    global left
    left -= 1
    if left or sys.argv[3] == "after":
        replace(part, target)
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = deadly
mixing.render_mixes(pd.read_pickle(sys.argv[1]), sys.argv[2], 8000, workers=1)
"""


@pytest.mark.parametrize(("moment", "made", "twice"), [("before", 24, 0), ("after", 25, 1)])
def test_a_killed_run_goes_on_without_redoing(clips, tmp_path, moment, made, twice):
    """Kill right before a file gets its name, and right after, before that is noted."""
    mixes, out = plan(clips, 60), tmp_path / "out"
    mixes.to_pickle(tmp_path / "plan.pickle")
    call = [sys.executable, "-c", KILLED, str(tmp_path / "plan.pickle"), str(out), moment]
    assert subprocess.run(call, capture_output=True).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.wav")}
    assert len(before) == made
    mixing.render_mixes(mixes, out, RATE, workers=1)
    redone = [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
    assert len(redone) == twice
    mixing.render_mixes(mixes, tmp_path / "fresh", RATE, workers=1)
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")


def test_sources_are_decoded_once_and_memory_is_bounded(clips, tmp_path, monkeypatch):
    mixes, decoded = plan(clips, 300), []
    load = audio.load_audio
    monkeypatch.setattr(
        audio, "load_audio", lambda path, *a, **k: decoded.append(path) or load(path, *a, **k)
    )
    # 30 events of 0.5 s and 20 scenes of 1 s; a mix of 1 s takes 4 bytes a sample
    for room, least, most in ((30, 50, 50), (10, 50, 20 + 30 * 2), (1, 150, 300 + 20)):
        monkeypatch.setattr(mixing, "CACHE_BYTES", 2 * room * 4 * RATE)
        decoded.clear()
        mixing.render_mixes(mixes, tmp_path / str(room), RATE, workers=1)
        assert len(set(decoded)) == 50 and least <= len(decoded) <= most


@pytest.mark.parametrize("stems", [False, True])
def test_items_are_the_samples_of_the_files(clips, tmp_path, stems):
    from torch.utils.data import DataLoader

    mixes, events = plan_scenes(clips, 10, events=(1, 2), snr_db=(0, 30))
    done = mixing.render_mixes(mixes, tmp_path, RATE, stems=stems, events=events)
    items = mixing.MixDataset(mixes, RATE, stems=stems, events=events)
    names = ("", "_foreground", "_background") if stems else ("",)
    for item, row in zip(items, done.itertuples(), strict=True):
        assert item["clip_id"] == row.clip_id and item["peak_scale"] == row.peak_scale
        assert (item["caption"], item["caption_3"]) == (row.caption, row.caption_3)
        for name, key in zip(names, ("audio", "foreground", "background"), strict=False):
            expected = sf.read(row.path.replace(".wav", f"{name}.wav"), dtype="float32")[0]
            assert item[key].dtype == np.float32
            np.testing.assert_array_equal(item[key], expected)
    copy = pickle.loads(pickle.dumps(items))
    np.testing.assert_array_equal(copy[-1]["audio"], items[9]["audio"])
    (batch,) = DataLoader(copy, batch_size=10)
    assert batch["audio"].shape == (10, RATE) and len(batch["caption_2"]) == 10
    with pytest.raises(IndexError):
        items[10]


def test_items_take_a_fraction_of_a_kilobyte_a_mix(clips):
    mixes = plan(clips, 60)
    many = pd.concat([mixes] * 50, ignore_index=True)
    many["clip_id"] = [f"mix-{number}" for number in range(len(many))]
    tracemalloc.start()
    items = mixing.MixDataset(many, RATE)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 600 * len(many)
    np.testing.assert_array_equal(items[len(mixes)]["audio"], items[0]["audio"])


def test_a_dask_cluster_makes_the_same_bytes(clips, tmp_path):
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    mixes = plan(clips, 70)
    mixing.render_mixes(mixes, tmp_path / "here", RATE, workers=1)
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    )
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        mixing.render_mixes(mixes, tmp_path / "there", RATE)
        broken = mixes.assign(background=__file__)
        with pytest.raises(audio.AudioError, match=r"mix .*test_mixing\.py: cannot be read"):
            mixing.render_mixes(broken, tmp_path / "broken", RATE)
    assert folder_bytes(tmp_path / "here") == folder_bytes(tmp_path / "there")


ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10"


@pytest.mark.skipif(not ESC10.is_dir(), reason="the real ESC-10 is not beside the project")
def test_real_recordings_mix_without_leaks(tmp_path):
    found = datasets.load_clips("esc10", esc50_root=ESC10)
    events, scenes = datasets.load_scenes("esc10", found)
    mixes = mixing.plan_mixes(events, scenes, 25, duration_s=5.0, sample_rate=16000)
    metadata.check_leaks(mixes)
    done = mixing.render_mixes(mixes, tmp_path, 16000)
    assert {sf.info(path).frames for path in done.path} == {80000}
