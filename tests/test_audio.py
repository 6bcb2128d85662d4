import io
import math
import os
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from soundscapes_utils import audio, store

ESC10 = Path(__file__).parents[2] / "shared/data/ESC-10/audio"
needs_esc10 = pytest.mark.skipif(not ESC10.is_dir(), reason="../shared/data/ESC-10 is not there")
LSB = 1 / 32768


def tone(pitch=997.0, rate=48_000, seconds=1.0, peak=1.0):
    return peak * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def torch_log_mel(y):
    """AudioLDM-training-finetuning's mel_spectrogram_train, step by step in torch."""
    import torch
    from librosa.filters import mel

    basis = torch.from_numpy(mel(sr=16000, n_fft=1024, n_mels=64, fmin=0, fmax=8000)).double()
    x = torch.from_numpy(np.asarray(y, np.float64))[None, None]
    x = torch.nn.functional.pad(x, (432, 432), mode="reflect")[0]
    spectrum = torch.stft(
        x, 1024, 160, 1024, torch.hann_window(1024, dtype=x.dtype), center=False, return_complex=True
    ).abs()
    return torch.log(torch.clamp(basis @ spectrum, min=1e-5))[0].T.numpy()


# --- log-mel


@needs_esc10
@pytest.mark.parametrize("position", [0, 133, 266, 399])
def test_log_mel_is_the_trainers_on_real_recordings(position):
    y, rate = audio.load_audio(sorted(ESC10.glob("*.ogg"))[position], sample_rate=16_000)
    np.testing.assert_allclose(audio.log_mel(y, rate), torch_log_mel(y), atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(433, 20_000), st.integers(0, 2**32 - 1), st.floats(-60, 0))
def test_log_mel_is_the_trainers_on_noise(n, seed, level):
    y = np.random.default_rng(seed).uniform(-1, 1, n) * 10 ** (level / 20)
    ours = audio.log_mel(y)
    assert ours.shape == (n // 160, 64) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, torch_log_mel(y), atol=1e-4)


def test_log_mel_of_silence_is_the_floor():
    np.testing.assert_allclose(audio.log_mel(np.zeros(16_000)), np.log(1e-5), rtol=1e-6)


def test_log_mel_peaks_in_the_band_of_the_tone():
    from librosa import mel_frequencies

    centres = mel_frequencies(66, fmin=0, fmax=8000)[1:-1]
    mean = audio.log_mel(tone(3000, 44_100), 44_100).mean(axis=0)
    assert abs(centres[mean.argmax()] - 3000) < 150


def test_log_mel_refuses_what_the_padding_cannot_reflect():
    assert audio.log_mel(np.ones(433)).shape == (2, 64)
    with pytest.raises(audio.AudioError, match="too short"):
        audio.log_mel(np.ones(432))


# --- loudness


@pytest.mark.parametrize(("rate", "peak_db"), [(48_000, 0), (44_100, -20), (16_000, -6)])
def test_loudness_of_the_standards_sine(rate, peak_db):
    y = tone(997, rate, 3, 10 ** (peak_db / 20))
    assert audio.loudness(y, rate) == pytest.approx(peak_db - 3.01, abs=0.1)


@needs_esc10
def test_loudness_is_pyloudnorms_on_a_real_recording():
    import pyloudnorm

    y, rate = audio.load_audio(ESC10 / "1-100032-A-0.ogg")
    expected = pyloudnorm.Meter(rate).integrated_loudness(y.astype(np.float64))
    assert audio.loudness(y, rate) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(50, 16_000), st.floats(-30, 0), st.sampled_from([16_000, 22_050, 44_100]))
@example(52, -6.0, 44_100)  # 52 / 44100 * 44100 is more than 52
def test_loudness_follows_the_gain_at_any_length(n, gain_db, rate):
    y = np.random.default_rng(0).uniform(-1, 1, n)
    louder = audio.loudness(y, rate)
    assert audio.loudness(y * 10 ** (gain_db / 20), rate) == pytest.approx(louder + gain_db, abs=0.01)


@pytest.mark.parametrize("n", [1, 100, 16_000])
def test_loudness_of_silence_is_minus_infinity_without_a_warning(n):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert audio.loudness(np.zeros(n), 16_000) == -np.inf


# --- files


samples = hnp.arrays(np.int16, st.integers(1, 3000), elements=st.integers(-32768, 32767))


@settings(max_examples=30, deadline=None)
@given(samples, st.sampled_from([".wav", ".flac"]), st.sampled_from([8000, 16_000, 44_100]))
def test_sixteen_bits_survive_a_round_trip(tmp_path_factory, pcm, ending, rate):
    path = tmp_path_factory.mktemp("audio") / f"a{ending}"
    audio.save_audio(path, pcm / 32768, rate)
    y, got = audio.load_audio(path)
    assert got == rate and y.dtype == np.float32
    np.testing.assert_array_equal(y * 32768, pcm)


def test_floats_come_back_within_half_a_step(tmp_path):
    y = np.random.default_rng(0).uniform(-1, 1 - LSB, 5000)
    back, _ = audio.load_audio(audio.save_audio(tmp_path / "new" / "a.wav", y, 16_000))
    assert np.abs(back - y).max() <= LSB / 2 + 1e-7


def test_channels_are_averaged(tmp_path):
    sf.write(tmp_path / "a.wav", np.tile([0.5, -0.25], (100, 1)), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(audio.load_audio(tmp_path / "a.wav")[0], 0.125)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100])
def test_resampling_keeps_the_tone(tmp_path, rate):
    audio.save_audio(tmp_path / "a.wav", tone(1000, 44_100, 1, 0.5), 44_100)
    y, got = audio.load_audio(tmp_path / "a.wav", sample_rate=rate)
    assert (y.size, got) == (rate, rate)
    middle = slice(rate // 4, 3 * rate // 4)
    np.testing.assert_allclose(y[middle], tone(1000, rate, 1, 0.5)[middle], atol=2e-4)


@pytest.mark.parametrize(("duration", "expected"), [(0.5, 8000), (0.3333, 5333), (9, 32_000)])
def test_duration_crops_and_never_pads(tmp_path, duration, expected):
    audio.save_audio(tmp_path / "a.wav", tone(440, 44_100, 2, 0.5), 44_100)
    y, _ = audio.load_audio(tmp_path / "a.wav", sample_rate=16_000, duration=duration)
    assert y.size == expected


@needs_esc10
def test_reads_the_real_recordings():
    for path in sorted(ESC10.glob("*.ogg"))[::40]:
        y, rate = audio.load_audio(path)
        assert (y.dtype, rate) == (np.float32, 44_100)
        assert y.size == sf.info(path).frames == pytest.approx(5 * rate, rel=0.01)


def cut(path, name, part):
    target = path.with_name(name)
    target.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return target


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_a_file_that_was_cut_short_is_refused(tmp_path, ending):
    y = np.random.default_rng(0).uniform(-0.5, 0.5, 44_100)
    sf.write(tmp_path / f"a.{ending}", y, 44_100)
    audio.load_audio(tmp_path / f"a.{ending}")
    with pytest.raises(audio.AudioError, match=r"half\..*cut short"):
        audio.load_audio(cut(tmp_path / f"a.{ending}", f"half.{ending}", 0.5))


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_part_of_a_file_is_never_read_as_the_whole(tmp_path, form, share):
    path = tmp_path / "a.bin"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 44_100), 44_100, format=form)
    assert audio.load_audio(path)[0].size == audio.read_header(path)[0] == 44_100
    with pytest.raises(audio.AudioError, match=r"part\.bin"):
        audio.load_audio(cut(path, "part.bin", share))


def test_containers_that_cannot_tell_are_refused_with_a_remedy(tmp_path):
    sf.write(tmp_path / "a.nist", np.ones(99) / 2, 16_000, format="NIST")
    with pytest.raises(audio.AudioError, match="convert it to WAV or FLAC"):
        audio.load_audio(tmp_path / "a.nist")


# what sox, arecord and ffmpeg leave in the header of a stream
@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x80000000, 0x7FFFFFFF, 0x80000024])
def test_a_stream_of_unknown_length_is_read(tmp_path, size):
    audio.save_audio(tmp_path / "a.wav", tone(440, 16_000, 1, 0.5), 16_000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", size)
    (tmp_path / "piped.wav").write_bytes(content)
    y, _ = audio.load_audio(tmp_path / "piped.wav")
    np.testing.assert_array_equal(y, audio.load_audio(tmp_path / "a.wav")[0])
    assert audio.read_header(tmp_path / "piped.wav") == (16_000, 16_000)


def flac_claiming(path, total):
    """A FLAC of 20,000 samples whose STREAMINFO holds another number of them (36 bits)."""
    buffer = io.BytesIO()
    sf.write(buffer, tone(440, 16_000, 1.25, 0.5), 16_000, format="FLAC")
    content = bytearray(buffer.getvalue())
    content[21] = content[21] & 0xF0 | total >> 32
    content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    path.write_bytes(content)
    return path


def test_a_flac_from_a_pipe_is_read_to_its_end(tmp_path):
    path = flac_claiming(tmp_path / "piped.flac", 0)
    y, rate = audio.load_audio(path)
    assert (y.size, rate) == (20_000, 16_000) == audio.read_header(path)
    assert audio.load_audio(path, duration=0.5)[0].size == 8000


@pytest.mark.parametrize("total", [20_001, 2**30, 2**36 - 1])
def test_a_flac_that_claims_more_than_it_holds_is_refused(tmp_path, total):
    with pytest.raises(audio.AudioError, match=r"a\.flac"):
        audio.load_audio(flac_claiming(tmp_path / "a.flac", total))


@pytest.mark.parametrize(("n", "rate"), [(1, 44_100), (2, 192_000), (3, 384_000)])
def test_what_holds_no_sample_at_the_wanted_rate_is_refused(tmp_path, n, rate):
    sf.write(tmp_path / "a.wav", np.full(n, 0.5), rate)
    assert audio.load_audio(tmp_path / "a.wav")[0].size == n
    with pytest.raises(audio.AudioError, match=r"a\.wav: holds no samples at 4000 Hz"):
        audio.load_audio(tmp_path / "a.wav", 4000)


@pytest.mark.parametrize("gain", [-1.0, -0.9999])
@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_cancel_are_named_and_not_called_silent(tmp_path, gain, channels):
    y = tone(440, 16_000, 1, 10 ** (-10 / 20))
    sf.write(tmp_path / "a.wav", np.stack([y, gain * y] * (channels // 2), axis=1), 16_000)
    with pytest.raises(audio.AudioError, match="channels cancel"):
        audio.load_audio(tmp_path / "a.wav", silent_ok=False)
    assert np.abs(audio.load_audio(tmp_path / "a.wav")[0]).max() < 1e-4
    sf.write(tmp_path / "silent.wav", np.zeros((99, channels)), 16_000)
    assert not audio.load_audio(tmp_path / "silent.wav")[0].any()


def test_names_rates_and_durations_that_cannot_be_read(tmp_path):
    audio.save_audio(tmp_path / "a.wav", np.ones(999) / 2, 16_000)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "samples.raw").write_bytes(whole)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0.wav"))
    latin.write_bytes(whole)
    (tmp_path / "slow.wav").write_bytes(whole[:24] + struct.pack("<II", 1, 2) + whole[32:])
    for path in (tmp_path / "samples.raw", latin, tmp_path / "slow.wav", tmp_path / ("x" * 999)):
        with pytest.raises(audio.AudioError) as caught:
            audio.load_audio(path, 16_000)
        str(caught.value).encode()  # can be printed
    for duration in (math.inf, math.nan, 0, -1):
        with pytest.raises(audio.AudioError, match=r"a\.wav: duration"):
            audio.load_audio(tmp_path / "a.wav", duration=duration)


@settings(max_examples=150, deadline=5000)
@given(st.data())
def test_a_damaged_header_ends_in_an_error_of_sound_or_none(tmp_path_factory, data):
    form = data.draw(st.sampled_from(["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3"]))
    buffer = io.BytesIO()
    sf.write(buffer, np.random.default_rng(0).uniform(-0.5, 0.5, 3000), 16_000, format=form)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("mutated") / "a.bin"
    path.write_bytes(content)
    try:
        y, rate = audio.load_audio(path, 16_000)
    except audio.AudioError as error:
        assert str(path) in str(error)
        return
    assert y.size and np.isfinite(y).all() and rate == 16_000
    frames, own_rate = audio.read_header(path)
    assert audio.load_audio(path)[0].size == frames and own_rate >= 1000


def test_unreadable_files_are_named_with_a_remedy(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("no sound")
    sf.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    sf.write(tmp_path / "nan.wav", np.array([0, np.nan, 0]), 16_000, subtype="FLOAT")
    for name, message in {
        "absent.wav": "no such file",
        "empty.wav": "0 bytes",
        "text.wav": "cannot be read as sound",
        "none.wav": "no samples",
        "nan.wav": "1 of 3 samples are NaN",
        "": "no such file",
    }.items():
        with pytest.raises(audio.AudioError, match=message) as caught:
            audio.load_audio(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        ([], "no samples"),
        ([0.0, np.inf], "NaN or infinite"),
        ([[0.0, 0.1]], "one channel"),
        ([0.0, -1.2], "peak 1.200 would clip"),
    ],
)
def test_a_bad_signal_is_not_written(tmp_path, y, message):
    with pytest.raises(audio.AudioError, match=message):
        audio.save_audio(tmp_path / "a.wav", y, 16_000)
    assert not list(tmp_path.iterdir())


def test_another_file_ending_is_refused(tmp_path):
    with pytest.raises(audio.AudioError, match=r"can only write \.wav"):
        audio.save_audio(tmp_path / "a.mp3", [0.0], 16_000)


def test_a_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch):
    path = audio.save_audio(tmp_path / "a.wav", [0.5], 16_000)
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(store.DataError, match=r"No space left on device.*free some space"):
        audio.save_audio(path, [0.25], 16_000)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- signals


def test_check_audio_tells_silence_from_quiet():
    audio.check_audio([0, 4 * LSB], "quiet")
    with pytest.raises(audio.AudioError, match="quieter: is silent"):
        audio.check_audio([0, -3 * LSB], "quieter")
    with pytest.raises(audio.AudioError, match=r"rain\.wav: is silent"):
        audio.check_audio(np.zeros(10), "rain.wav")
    assert audio.check_audio(np.zeros(10), "rain.wav", silent_ok=True).size == 10


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1, 1, width=32)),
       st.integers(1, 200))  # fmt: skip
def test_fit_length_repeats_and_pads(y, n):
    repeated, padded = audio.fix_length(y, n), audio.fix_length(y, n, "pad")
    index = np.arange(n)
    np.testing.assert_array_equal(repeated, y[index % y.size])
    np.testing.assert_array_equal(padded, np.where(index < y.size, y[index % y.size], 0))
    assert repeated.dtype == padded.dtype == y.dtype


@pytest.mark.parametrize(("y", "n", "mode"), [([], 3, "pad"), ([1.0], 0, "pad"), ([1.0], 3, "no")])
def test_fit_length_refuses(y, n, mode):
    with pytest.raises(audio.AudioError):
        audio.fix_length(np.array(y), n, mode)


def test_resample_refuses_a_rate_of_zero():
    with pytest.raises(audio.AudioError, match="positive"):
        audio.resample(np.zeros(10), 16_000, 0)


def test_the_player_is_small_compressed_and_safe():
    import base64
    import io

    page = audio.listen(tone(440, 16_000, 9, 1.7), 16_000, "<dog> & rain").data
    assert "&lt;dog&gt; &amp; rain</figcaption>" in page and len(page) < 150_000
    assert 'aria-label="&lt;dog&gt; &amp; rain"' in page
    ogg = base64.b64decode(re.search(r"data:audio/ogg;base64,([^\"]+)", page)[1])
    y, rate = sf.read(io.BytesIO(ogg))
    assert (y.size, rate) == (80_000, 16_000)
    spectrum = np.abs(np.fft.rfft(y))
    assert np.fft.rfftfreq(y.size, 1 / rate)[spectrum.argmax()] == pytest.approx(440, abs=1)


def test_listen_table_keeps_the_order_and_leaves_gaps():
    tone = np.sin(np.arange(800) / 5)
    page = audio.listen_table({"0 <dB>": {"park": tone, "bus": tone}, "6 dB": {"bus": tone}}, 8000)
    assert page.data.count("<audio") == 3
    assert page.data.count("<td></td>") == 1
    assert page.data.index("park") < page.data.index("bus")
    assert "0 &lt;dB&gt;" in page.data
    names = re.findall('<audio [^>]*aria-label="([^"]*)"', page.data)
    assert names == ["park, 0 &lt;dB&gt;", "bus, 0 &lt;dB&gt;", "bus, 6 dB"]
    alone = audio.listen_table({'a "dog"': {"": tone}, "": {"": tone}}, 8000).data
    assert re.findall('aria-label="([^"]*)"', alone) == ["a &quot;dog&quot;", "sound"]
    with pytest.raises(audio.AudioError):
        audio.listen_table({"0 dB": {"park": [np.nan]}}, 8000)
