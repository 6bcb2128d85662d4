"""Front ends, their cache and transformed copies, held to librosa, scipy and torch."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from toy_clips import CLASSES, RATE, tone, write_clips

from soundscapes_utils import audio, esc

ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10/audio"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("real"), CLASSES, range(1, 6), 2, 0)


def librosa_features(y):
    import librosa

    mel = librosa.feature.melspectrogram(
        y=y, sr=RATE, n_fft=1024, hop_length=512, n_mels=64, fmin=0, fmax=8000, power=2.0,
        htk=True, norm=None, pad_mode="reflect",
    )  # fmt: skip
    return np.log(mel + 0.001).T


def test_features_equal_librosas_mel_spectrogram():
    y = tone(700, 1, seconds=4.0)
    assert esc.features(y).shape == (126, 64)
    np.testing.assert_allclose(esc.features(y), librosa_features(y), atol=2e-4)


@pytest.mark.skipif(not ESC10.is_dir(), reason="the ESC-10 recordings are not on this machine")
def test_features_of_a_recording_equal_librosas(tmp_path):
    path = sorted(ESC10.glob("*.ogg"))[0]
    x, _ = esc.load_features([path], tmp_path, workers=1)
    y, _ = audio.load_audio(path, sample_rate=RATE)
    np.testing.assert_allclose(x[0], librosa_features(y[: 4 * RATE]), atol=5e-3)


def test_short_clips_are_repeated_to_four_seconds():
    y = tone(500, 2)
    np.testing.assert_array_equal(esc.features(y), esc.features(np.tile(y, 4)))


def test_standardise_divides_by_the_standard_deviation():
    x = esc.standardise(np.random.default_rng(0).normal(3, 5, size=(4, 126, 64)))
    np.testing.assert_allclose(x.mean(axis=(1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2)), 1, atol=1e-5)
    constant = esc.standardise(np.full((1, 126, 64), -6.9, np.float32))
    np.testing.assert_allclose(constant, 0, atol=1e-6)


def test_cache_follows_the_content_not_the_name(tmp_path):
    path = audio.save_audio(tmp_path / "a.wav", tone(300, 0), RATE)
    first, key = esc.load_features([path], tmp_path / "cache", workers=1)
    again, same_key = esc.load_features([path], tmp_path / "cache", workers=1)
    audio.save_audio(path, tone(900, 0), RATE)
    other, new_key = esc.load_features([path], tmp_path / "cache", workers=1)
    assert key == same_key != new_key
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("content", [None, b"", b"not sound", "silence"])
def test_unusable_clips_are_named(tmp_path, content):
    path = tmp_path / "broken.wav"
    if content == "silence":
        audio.save_audio(path, np.zeros(RATE), RATE)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(audio.AudioError, match=r"broken\.wav"):
        esc.load_features([path], tmp_path / "cache", workers=1)


def test_released_code_divides_by_the_variance():
    x = np.random.default_rng(0).normal(3, 5, size=(3, 126, 64)).astype(np.float32)
    by_torch = torch.stack([(one - one.mean()) / one.var() for one in torch.from_numpy(x)])
    np.testing.assert_allclose(esc.divide_by_variance(x), by_torch[:, :63].numpy(), atol=1e-5)


def test_mfcc_statistics_by_scipy():
    from scipy.fft import dct

    y = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44_100) / 44_100)
    found = esc.mfcc_statistics(y)
    # a sine of f Hz crosses zero 2 f times a second; the padded frames at the ends cross less
    assert found[24] == pytest.approx(2 * 1000 / 44_100, rel=0.02)
    import librosa

    mel = librosa.filters.mel(sr=44_100, n_fft=2048)
    power = np.abs(librosa.stft(y, n_fft=2048, hop_length=512)) ** 2
    decibel = 10 * np.log10(np.maximum(mel @ power, 1e-10))
    decibel = np.maximum(decibel, decibel.max() - 80)
    cepstrum = dct(decibel, axis=0, norm="ortho")[1:13]
    np.testing.assert_allclose(found[:12], cepstrum.mean(axis=1), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(found[12:24], cepstrum.std(axis=1), rtol=1e-3, atol=1e-2)


def test_transformed_copies_sound_as_they_should(clips, tmp_path):
    few = clips[clips["label"] == "whistle"].head(1)
    made = esc.transform_clips(few, "ps1", tmp_path, workers=1)
    assert made["made_from"].tolist() == few["clip_id"].tolist() * 4
    assert set(made["label"]) == {"whistle"} and set(made["backend"]) == {"ps1"}
    for path, semitones in zip(made["path"], (-2, -1, 1, 2), strict=True):
        y, rate = audio.load_audio(path)
        peak = np.abs(np.fft.rfft(y * np.hanning(len(y)))).argmax() * rate / len(y)
        assert peak == pytest.approx(3000 * 2 ** (semitones / 12), rel=0.01)
    before = {path: Path(path).stat().st_mtime_ns for path in made["path"]}
    again = esc.transform_clips(few, "ps1", tmp_path, workers=1)
    pd.testing.assert_frame_equal(made, again)
    assert before == {path: Path(path).stat().st_mtime_ns for path in again["path"]}


def test_stretched_copies_last_as_long_as_they_should(clips, tmp_path):
    made = esc.transform_clips(clips.head(1), "ts", tmp_path, workers=1)
    lengths = [len(audio.load_audio(path)[0]) / RATE for path in made["path"]]
    assert lengths == pytest.approx([1 / speed for speed in (0.81, 0.93, 1.07, 1.23)], rel=0.01)


def test_all_clips_that_cannot_be_used_are_named_at_once(tmp_path):
    paths = [tmp_path / name for name in ("good.wav", "silent.wav", "text.wav", "gone.wav")]
    for path, level in zip(paths, (0.1, 0.0), strict=False):
        audio.save_audio(path, level * np.sin(np.arange(8000) * 0.3), 16_000)
    paths[2].write_text("no sound")
    for load in (esc.load_features, esc.load_mfcc_statistics):
        with pytest.raises(audio.AudioError, match="3 of 4 clips cannot be used") as caught:
            load(paths, tmp_path / "cache")
        assert [path.name in str(caught.value) for path in paths] == [False, True, True, True]
