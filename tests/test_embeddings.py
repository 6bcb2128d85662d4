"""The protocol, its cache, and each embedding against signals whose answer is known."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from soundscapes_utils import audio, embeddings, ldm

SHARED = Path(__file__).parents[2] / "shared"
YAMNET = SHARED / "models" / "yamnet.tflite"
ESC10 = SHARED / "data" / "ESC-10"
needs_yamnet = pytest.mark.skipif(not YAMNET.is_file(), reason="yamnet.tflite is not at hand")
needs_esc10 = pytest.mark.skipif(not ESC10.is_dir(), reason="ESC-10 is not at hand")


def noise(seconds=2.0, seed=0, level=0.1):
    return np.random.default_rng(seed).normal(0, level, int(16_000 * seconds)).astype(np.float32)


@pytest.fixture
def logmel():
    return embeddings.get_embedding("logmel-stats")


# --- protocol and cache ----------------------------------------------------------------------------


def test_files_and_signals_give_the_same_row(logmel, tmp_path):
    y = noise()
    file = audio.save_audio(tmp_path / "noise.wav", y, 16_000)
    from_file, from_signal = logmel.embed([file]), logmel.embed([audio.load_audio(file)[0]])
    np.testing.assert_array_equal(from_file, from_signal)
    assert from_file.dtype == np.float32


def test_other_rates_are_resampled(logmel):
    rate = 44_100
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    own = np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000).astype(np.float32)
    found, expected = logmel.embed([tone], sample_rate=rate), logmel.embed([own])
    # 440 Hz lies in the second of sixteen bands
    assert found[0, 1] == pytest.approx(expected[0, 1], abs=0.02)
    assert found[0, :16].argmax() == expected[0, :16].argmax()


def test_short_clips_are_repeated(logmel):
    y = noise(0.3)
    np.testing.assert_array_equal(logmel.embed([y]), logmel.embed([np.resize(y, 16_000)]))


def test_cache_is_used_and_notices_changes(tmp_path):
    calls = []

    def network(y):
        calls.append(1)
        return np.full(3, y.max())

    toy = embeddings.Embedding("toy", 16_000, 3, 0.1, "1", network)
    file = audio.save_audio(tmp_path / "a.wav", noise(seed=1), 16_000)
    first = toy.embed([file], cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(toy.embed([file], cache_dir=tmp_path / "cache"), first)
    assert len(calls) == 1
    moved = file.rename(tmp_path / "b.wav")
    toy.embed([moved], cache_dir=tmp_path / "cache")
    assert len(calls) == 1
    audio.save_audio(moved, noise(seed=2), 16_000)
    assert not np.array_equal(toy.embed([moved], cache_dir=tmp_path / "cache"), first)
    newer = embeddings.Embedding("toy", 16_000, 3, 0.1, "2", network)
    newer.embed([moved], cache_dir=tmp_path / "cache")
    assert len(calls) == 3


def test_cache_of_signals_knows_their_rate(logmel, tmp_path):
    y = noise()
    slow = logmel.embed([y], sample_rate=16_000, cache_dir=tmp_path)
    fast = logmel.embed([y], sample_rate=32_000, cache_dir=tmp_path)
    assert not np.array_equal(slow, fast)


def test_cache_cut_short_is_made_anew(logmel, tmp_path):
    expected = logmel.embed([noise()], cache_dir=tmp_path)
    (cached,) = tmp_path.rglob("*.npy")
    cached.write_bytes(cached.read_bytes()[:100])
    np.testing.assert_array_equal(logmel.embed([noise()], cache_dir=tmp_path), expected)
    assert len(list(tmp_path.rglob("*.npy"))) == 1


def test_silence_is_flagged_also_from_the_cache(logmel, tmp_path):
    clips = [noise(), np.zeros(16_000, np.float32)]
    for _ in range(2):
        with pytest.warns(embeddings.SilenceWarning, match="1 of 2 clips are silent: clip 1"):
            logmel.embed(clips, cache_dir=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logmel.embed(clips, silence="allow")
        logmel.embed([noise()])


def test_bad_clips_are_named(logmel, tmp_path):
    with pytest.raises(audio.AudioError, match=r"missing\.wav"):
        logmel.embed([tmp_path / "missing.wav"])
    with pytest.raises(audio.AudioError, match=r"missing\.wav"):
        logmel.embed([tmp_path / "missing.wav"], cache_dir=tmp_path)
    with pytest.raises(audio.AudioError, match="clip 1: 1 of 3 samples"):
        logmel.embed([noise(), [0.0, np.nan, 0.0]])
    broken = embeddings.Embedding("toy", 16_000, 3, 0.1, "1", lambda y: np.full(3, np.nan))
    with pytest.raises(audio.AudioError, match="clip 0: toy gave no finite row"):
        broken.embed([noise()])


def test_wrong_words_are_refused(logmel, tmp_path):
    with pytest.raises(ValueError, match="known: logmel-stats, mini-clap, yamnet"):
        embeddings.get_embedding("vgg")
    with pytest.raises(ValueError, match="silence must be"):
        logmel.embed([noise()], silence="error")
    with pytest.raises(ValueError, match="takes no file"):
        embeddings.get_embedding("logmel-stats", "x")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tflite.*kaggle"):
        embeddings.get_embedding("yamnet", tmp_path / "nowhere.tflite")
    (tmp_path / "text.tflite").write_text("no model")
    with pytest.raises(ValueError, match="cannot be opened as a TFLite model"):
        embeddings.get_embedding("yamnet", tmp_path / "text.tflite")


def test_nothing_in_nothing_out(logmel):
    assert logmel.embed([]).shape == (0, 64)


def test_excerpts_take_the_loudest_stretch_at_one_level(tmp_path):
    y = np.zeros(32_000, np.float32)
    y[20_000:24_000] = noise(0.25, level=0.02)
    y[4_000] = 0.05
    late = audio.save_audio(tmp_path / "late.wav", y, 16_000)
    short = audio.save_audio(tmp_path / "short.wav", noise(0.1), 16_000)
    silent = audio.save_audio(tmp_path / "silent.wav", np.zeros(9_000), 16_000)
    found = embeddings.excerpts([late, short, silent], 0.25)
    assert [len(e) for e in found] == [4_000] * 3
    cut = y[20_000:24_000] / np.abs(y[20_000:24_000]).max()
    # 16 bit and the mean of the whole file leave a trace
    np.testing.assert_allclose(found[0], cut * 10 ** (-1 / 20), atol=2e-3)
    assert np.abs(found[1]).max() == pytest.approx(10 ** (-1 / 20))
    assert not found[2].any()
    with pytest.raises(ValueError, match="seconds must be positive"):
        embeddings.excerpts([late], 0)


# --- logmel-stats ----------------------------------------------------------------------------------


def test_gain_moves_only_the_level_part(logmel):
    loud, quiet = logmel.embed([noise(), noise() / 2])
    np.testing.assert_allclose(loud[:16] - quiet[:16], np.log(2), atol=1e-4)
    np.testing.assert_allclose(loud[16:], quiet[16:], atol=1e-4)


def test_silence_has_no_spread(logmel):
    (row,) = logmel.embed([np.zeros(32_000, np.float32)], silence="allow")
    np.testing.assert_allclose(row[:16], np.log(1e-5), rtol=1e-6)
    np.testing.assert_allclose(row[16:], 0, atol=1e-6)


@pytest.mark.parametrize(
    ("rate", "octave", "tolerance"), [(1.5, 0, 0.15), (3, 1, 0.15), (6, 2, 0.15), (12, 3, 0.3)]
)
def test_modulation_rate_is_found(logmel, rate, octave, tolerance):
    t = np.arange(64_000) / 16_000
    # a level that swings by ±0.5 nats has an RMS modulation of 0.5 / √2
    y = noise(4.0, level=0.05) * np.exp(0.5 * np.sin(2 * np.pi * rate * t)).astype(np.float32)
    modulation = logmel.embed([y])[0, 48:].reshape(4, 4).mean(axis=1)
    assert modulation.argmax() == octave
    assert modulation[octave] == pytest.approx(0.5 / np.sqrt(2), rel=tolerance)


# --- mini-clap -------------------------------------------------------------------------------------


def test_mini_clap_is_the_checkpoints_tower(tmp_path):
    def checkpoint(name, seed):
        torch.manual_seed(seed)
        ldm.AudioTower().save_pretrained(tmp_path / name / "audio_encoder")
        (tmp_path / name / "model_index.json").write_text("{}")
        return tmp_path / name

    y, folder = noise(), checkpoint("one", 1)
    clap, other = (embeddings.get_embedding("mini-clap", f) for f in (folder, checkpoint("two", 2)))
    expected = ldm.embed_audio([y], 16_000, str(folder))[0]
    np.testing.assert_allclose(clap.embed([y])[0], expected, atol=1e-6)
    assert clap.dim == embeddings.EMBEDDINGS.set_index("name").loc["mini-clap", "dim"]
    # other weights under the same name must not be answered from the cache
    first = clap.embed([y], cache_dir=tmp_path / "cache")
    assert not np.allclose(other.embed([y], cache_dir=tmp_path / "cache"), first, atol=1e-3)


# --- yamnet ----------------------------------------------------------------------------------------


@needs_yamnet
def test_yamnet_hears_noise_and_averages_patches():
    yamnet = embeddings.get_embedding("yamnet", YAMNET)
    y = noise(1.455)  # two patches, 0.48 s apart
    both = yamnet.embed([y, y[:15_600], y[7_680:]])
    np.testing.assert_allclose(both[0], (both[1] + both[2]) / 2, atol=1e-5)
    tags = embeddings.yamnet_tags([noise(2.0)], YAMNET, top=3)
    assert tags["rank"].tolist() == [1, 2, 3]
    assert tags["score"].is_monotonic_decreasing
    assert "noise" in " ".join(tags["tag"]).lower()


@needs_yamnet
def test_yamnet_tags_want_the_class_map(tmp_path):
    model = tmp_path / "yamnet.tflite"
    model.write_bytes(YAMNET.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"yamnet_class_map\.csv beside"):
        embeddings.yamnet_tags([noise()], model)


@needs_esc10
@needs_yamnet
def test_yamnet_tells_the_classes_of_esc10():
    from sklearn.linear_model import LogisticRegression

    rows = list(csv.DictReader((ESC10 / "meta" / "esc50.csv").open()))
    rows = [r for r in rows if r["fold"] in "15"]
    files = [ESC10 / "audio" / r["filename"] for r in rows]
    x = embeddings.get_embedding("yamnet", YAMNET).embed(files, silence="allow")
    labels, train = (
        np.array([r["category"] for r in rows]),
        np.array([r["fold"] for r in rows]) == "1",
    )
    probe = LogisticRegression(max_iter=1000).fit(x[train], labels[train])
    # with four folds to learn from the published protocol gives 96.75 %; here there is one
    assert probe.score(x[~train], labels[~train]) > 0.9
