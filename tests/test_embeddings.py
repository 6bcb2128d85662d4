"""The protocol, its cache, sets of files, and each embedding against answers that are known."""

import csv
import functools
import hashlib
import http.server
import importlib
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from soundscapes_utils import audio, audio_networks, embeddings, ldm

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


def test_cache_cut_short_is_made_again(logmel, tmp_path):
    expected = logmel.embed([noise()], cache_dir=tmp_path)
    (cached,) = tmp_path.rglob("*.npy")
    cached.write_bytes(cached.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        np.testing.assert_array_equal(logmel.embed([noise()], cache_dir=tmp_path), expected)
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
    found = audio.excerpts([late, short, silent], 0.25)
    assert [len(e) for e in found] == [4_000] * 3
    cut = y[20_000:24_000] / np.abs(y[20_000:24_000]).max()
    # 16 bit and the mean of the whole file leave a trace
    np.testing.assert_allclose(found[0], cut * 10 ** (-1 / 20), atol=2e-3)
    assert np.abs(found[1]).max() == pytest.approx(10 ** (-1 / 20))
    assert not found[2].any()
    with pytest.raises(ValueError, match="seconds must be positive"):
        audio.excerpts([late], 0)


# --- windows ---------------------------------------------------------------------------------------


def first_and_last(window):
    return window[[0, -1]]


def framed(name):
    """The framing of an embedding, with a network that returns each window's ends."""
    card = embeddings.EMBEDDINGS[name]
    return replace(card, name="toy", dim=2, version="1", network=first_and_last), card.sample_rate


def ramp(n):
    return (np.arange(n) / n).astype(np.float32)


def test_every_embedding_declares_itself():
    for name, card in embeddings.EMBEDDINGS.items():
        assert card.name == name
        assert all((card.needs, card.pooling, card.licence, card.source)), name
        assert card.short in {"repeat", "repeat-pad", "pad"}
        assert card.window_s > 0 and (card.hop_s is None or card.hop_s > 0)
        assert card.network is None and bool(card.url) == bool(card.checksum)
    logmel = embeddings.get_embedding("logmel-stats")
    assert replace(logmel, network=None, version="") == embeddings.EMBEDDINGS["logmel-stats"]


def test_clips_of_four_seconds_have_the_windows_of_the_published_embeddings():
    # (4, 128), (4, 1024) and (1, 2048) a clip in the development set of DCASE 2024 Task 7
    for name, windows in (("vggish", 4), ("ms-clap-dcase", 4), ("panns-wavegram", 1)):
        toy, rate = framed(name)
        (rows,) = toy.embed_windows([ramp(4 * rate)])
        assert rows.shape == (windows, 2), name


def test_windows_start_at_the_start_and_every_hop():
    toy, rate = framed("yamnet")
    y = ramp(3 * rate)
    (rows,) = toy.embed_windows([y])
    starts = np.arange(5) * 7_680  # 2 · 3.0 s / 0.96 s, less what is not whole
    np.testing.assert_array_equal(rows, np.column_stack([y[starts], y[starts + 15_599]]))
    np.testing.assert_allclose(toy.embed([y]), rows.mean(axis=0)[None], rtol=1e-6)
    # MS-CLAP and LAION-CLAP would crop at random what is longer than their window
    for name, windows in (("ms-clap", 4), ("laion-clap", 1)):
        toy, rate = framed(name)
        (rows,) = toy.embed_windows([ramp(round(10.5 * rate))])
        assert len(rows) == windows
        assert rows[0, 0] == 0


@pytest.mark.parametrize(
    ("short", "expected"), [("repeat", (0, 4)), ("repeat-pad", (0, 0)), ("pad", (0, 0))]
)
def test_short_clips_are_filled_as_declared(short, expected):
    y = np.arange(10, dtype=np.float32)
    seen = []
    toy = embeddings.Embedding("toy", 100, 1, 0.25, "1", lambda w: seen.append(w) or w[:1])
    replace(toy, short=short).embed([y])
    (window,) = seen
    repeats = {"repeat": 2.5, "repeat-pad": 2, "pad": 1}[short]
    full = np.resize(y, int(10 * repeats))
    np.testing.assert_array_equal(window, np.pad(full, (0, 25 - len(full))))
    assert (window[0], window[-1]) == expected


def test_padded_windows_leave_nothing_unseen():
    toy, rate = framed("ms-clap-dcase")
    y = np.ones(round(2.5 * rate), np.float32)
    (rows,) = toy.embed_windows([y])
    np.testing.assert_array_equal(rows, [[1, 0]] * 3)


def test_many_windows_at_once_are_the_same_as_one_by_one():
    sizes = []

    def network(windows):
        sizes.append(len(windows))
        return windows[:, [0, -1]]

    toy, rate = framed("yamnet")
    many = replace(toy, network=network, batched=True)
    rng = np.random.default_rng(0)
    clips = [rng.normal(size=n).astype(np.float32) for n in (2 * rate, 20 * rate, 500, 3 * rate)]
    np.testing.assert_array_equal(many.embed(clips, batch_size=8), toy.embed(clips))
    assert max(sizes) == 8
    # clips of other lengths cannot share a batch where the network sees them whole
    whole = replace(many, hop_s=None)
    alone = replace(toy, hop_s=None)
    np.testing.assert_array_equal(whole.embed(clips), alone.embed(clips))


def test_the_cache_knows_the_framing(tmp_path):
    toy, rate = framed("ms-clap")
    y = ramp(8 * rate)
    first = toy.embed([y], cache_dir=tmp_path)
    padded = replace(toy, short="pad").embed([y], cache_dir=tmp_path)
    assert not np.array_equal(first, padded)
    (windows,) = toy.embed_windows([y], cache_dir=tmp_path)
    np.testing.assert_allclose(windows.mean(axis=0), first[0])


def test_stereo_is_the_mean_of_the_channels(logmel, tmp_path):
    import soundfile as sf

    left, right = noise(seed=1), noise(seed=2)
    sf.write(tmp_path / "two.wav", np.column_stack([left, right]), 16_000, subtype="FLOAT")
    sf.write(tmp_path / "out.wav", np.column_stack([left, -left]), 16_000, subtype="FLOAT")
    expected = logmel.embed([(left + right) / 2])
    np.testing.assert_allclose(logmel.embed([tmp_path / "two.wav"]), expected, atol=1e-5)
    with pytest.warns(embeddings.SilenceWarning, match=r"out\.wav"):
        logmel.embed([tmp_path / "out.wav"])
    with pytest.raises(audio.AudioError, match="clip 0: expected one channel"):
        logmel.embed([np.zeros((2, 16_000))])


# --- weights ---------------------------------------------------------------------------------------


FETCHED = [name for name, card in embeddings.EMBEDDINGS.items() if card.url]


@pytest.mark.parametrize("name", FETCHED)
def test_weights_that_are_not_there_are_named_with_size_and_place(name, tmp_path):
    card = embeddings.EMBEDDINGS[name]
    with pytest.raises(FileNotFoundError) as found:
        embeddings.get_embedding(name, tmp_path / "none.pth")
    for word in (str(tmp_path / "none.pth"), card.needs, card.url, card.licence):
        assert word in str(found.value)


@pytest.fixture
def server(tmp_path):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    site = tmp_path / "site"
    site.mkdir()
    handler = functools.partial(Silent, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield site, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def test_weights_are_fetched_once_and_checked(server, tmp_path, monkeypatch):
    site, url = server
    (site / "w 1.pth").write_bytes(b"weights")
    checksum = "sha256:" + hashlib.sha256(b"weights").hexdigest()
    card = replace(embeddings.EMBEDDINGS["vggish"], url=f"{url}/w%201.pth", checksum=checksum)
    monkeypatch.setitem(embeddings.EMBEDDINGS, "vggish", card)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def open_it(error, message):
        with pytest.raises(error, match=message):
            embeddings.get_embedding("vggish")

    open_it(ValueError, r"w 1\.pth: cannot be loaded as a checkpoint")
    (file,) = (tmp_path / "cache").rglob("*.pth")
    assert file.read_bytes() == b"weights"
    (site / "w 1.pth").write_bytes(b"changed")
    open_it(ValueError, "cannot be loaded as a checkpoint")  # what is there is not fetched again
    file.write_bytes(b"weig")
    open_it(ValueError, "does not match the known hash")
    assert file.read_bytes() == b"weig" and len(list(file.parent.iterdir())) == 1
    (site / "w 1.pth").unlink()
    open_it(FileNotFoundError, r"no weights of vggish.*0\.29 GB")


def test_checkpoints_hold_tensors_and_arrays_only(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("this ran",))

    torch.save({"model": {}, "sampler": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth: cannot be loaded as a checkpoint"):
        embeddings.get_embedding("panns-cnn14", tmp_path / "harmful.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pth: cannot be loaded as a checkpoint"):
        embeddings.get_embedding("vggish", tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        embeddings.get_embedding("vggish", tmp_path / "list.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a checkpoint of PANNs"):
        embeddings.get_embedding("panns-cnn14", tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the weights of this network"):
        embeddings.get_embedding("vggish", tmp_path / "other.pth")


# --- VGGish and PANNs ------------------------------------------------------------------------------


PANNS = {  # sample rate, FFT, hop, highest frequency
    "panns-cnn14": (32_000, 1024, 320, 14_000),
    "panns-cnn14-16k": (16_000, 512, 160, 8_000),
    "panns-wavegram": (32_000, 1024, 320, 14_000),
}


def pann(name, width=64):
    return audio_networks.PANN(PANNS[name][0], name == "panns-wavegram", width)


def shapes(net):
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def trained(net):
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def test_vggish_has_the_names_and_shapes_of_the_published_file():
    convolutions = {0: (64, 1), 3: (128, 64), 6: (256, 128), 8: (256, 256)}
    convolutions |= {11: (512, 256), 13: (512, 512)}
    expected = {}
    for place, (out, entry) in convolutions.items():
        expected[f"features.{place}.weight"] = (out, entry, 3, 3)
        expected[f"features.{place}.bias"] = (out,)
    for place, size in {0: (4096, 12288), 2: (4096, 4096), 4: (128, 4096)}.items():
        expected[f"embeddings.{place}.weight"] = size
        expected[f"embeddings.{place}.bias"] = size[:1]
    with torch.device("meta"):
        net = audio_networks.VGGish()
    assert shapes(net) == expected
    assert trained(net) == 72_141_184


def test_vggish_front_end_is_that_of_the_paper():
    from scipy.signal import get_window
    from torchaudio.compliance.kaldi import get_mel_banks

    # Kaldi's triangles are straight in mel, too
    banks, _ = get_mel_banks(64, 512, 16_000.0, 125.0, 7500.0, 100.0, -500.0, 1.0)
    y = noise(0.975)
    frames = np.stack([y[s : s + 400] for s in range(0, 15_201, 160)]) * get_window("hann", 400)
    magnitude = np.abs(np.fft.rfft(frames, 512))[:, :256]
    expected = np.log(magnitude @ banks.T.double().numpy() + 0.01)
    found = audio_networks.VGGish.log_mel(torch.from_numpy(y[None]))[0]
    assert found.shape == (96, 64)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_vggish_flattens_as_tensorflow_does():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return picture.expand(len(x), -1, -1, -1)

    picture = torch.arange(512 * 6 * 4.0).reshape(512, 6, 4)
    with torch.device("meta"):
        net = audio_networks.VGGish()
    net.features, net.embeddings = Fixed(), torch.nn.Identity()
    found = net(torch.zeros(2, 15_600))
    # height (time), width (bands), channels
    expected = np.array([picture[c, t, b] for t in range(6) for b in range(4) for c in range(512)])
    np.testing.assert_array_equal(found[1], expected)


def norm_shapes(name, n):
    parts = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (n,))
    return {f"{name}.{part}": size for part, size in (parts | {"num_batches_tracked": ()}).items()}


def block_shapes(name, entry, out, kernel):
    convolutions = {
        f"{name}.conv1.weight": (out, entry, *kernel),
        f"{name}.conv2.weight": (out, out, *kernel),
    }
    return convolutions | norm_shapes(f"{name}.bn1", out) | norm_shapes(f"{name}.bn2", out)


@pytest.mark.parametrize(
    ("name", "n_fft", "entries", "trainable"),
    # Table 8 of the paper counts 80,753,615 and 81,065,487 parameters
    [
        ("panns-cnn14", 1024, 84, 80_753_615),
        ("panns-cnn14-16k", 512, 84, 80_753_615),
        ("panns-wavegram", 1024, 138, 81_065_487),
    ],
)
def test_panns_have_the_names_and_shapes_of_the_published_files(name, n_fft, entries, trainable):
    bins, wavegram = n_fft // 2 + 1, name == "panns-wavegram"
    expected = {
        "spectrogram_extractor.stft.conv_real.weight": (bins, 1, n_fft),
        "spectrogram_extractor.stft.conv_imag.weight": (bins, 1, n_fft),
        "logmel_extractor.melW": (bins, 64),
        "fc1.weight": (2048, 2048),
        "fc1.bias": (2048,),
        "fc_audioset.weight": (527, 2048),
        "fc_audioset.bias": (527,),
        **norm_shapes("bn0", 64),
    }
    for k, out in enumerate((64, 128, 256, 512, 1024, 2048), 1):
        entry = {1: 1, 2: 128 if wavegram else 64}.get(k, out // 2)
        expected |= block_shapes(f"conv_block{k}", entry, out, (3, 3))
    if wavegram:
        expected |= {"pre_conv0.weight": (64, 1, 11)} | norm_shapes("pre_bn0", 64)
        for k, (entry, out) in enumerate([(64, 64), (64, 128), (128, 128)], 1):
            expected |= block_shapes(f"pre_block{k}", entry, out, (3,))
        expected |= block_shapes("pre_block4", 4, 64, (3, 3))
    with torch.device("meta"):
        net = pann(name)
    assert shapes(net) == expected
    assert (len(expected), trained(net)) == (entries, trainable)


def published_forward(state, y, rate, n_fft, hop, fmax):
    """CNN14 and Wavegram-Logmel-CNN14 as the paper describes them, over librosa's log-mel."""
    import librosa

    def norm(x, name):
        parts = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    def block(x, name, convolve, dilation=1):
        x = convolve(x, state[f"{name}.conv1.weight"], padding=1)
        x = F.relu(norm(x, f"{name}.bn1"))
        x = convolve(x, state[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)
        return F.relu(norm(x, f"{name}.bn2"))

    mel = librosa.feature.melspectrogram(
        y=y, sr=rate, n_fft=n_fft, hop_length=hop, pad_mode="reflect", n_mels=64, fmin=50, fmax=fmax
    )
    x = torch.from_numpy(librosa.power_to_db(mel, amin=1e-10, top_db=None).T.copy())
    # the norm of bands: they take the place of channels
    x = norm(x[None, :, :, None].transpose(1, 2), "bn0").transpose(1, 3)
    x = F.avg_pool2d(block(x, "conv_block1", F.conv2d), 2)
    if "pre_conv0.weight" in state:
        a = torch.from_numpy(y)[None, None]
        a = F.conv1d(a, state["pre_conv0.weight"], stride=5, padding=5)
        a = F.relu(norm(a, "pre_bn0"))
        for k in (1, 2, 3):
            a = F.max_pool1d(block(a, f"pre_block{k}", F.conv1d, 2), 4)
        a = a.reshape(1, 4, 32, -1).permute(0, 1, 3, 2)
        x = torch.cat([x, F.avg_pool2d(block(a, "pre_block4", F.conv2d), (2, 1))], dim=1)
    for k in range(2, 6):
        x = F.avg_pool2d(block(x, f"conv_block{k}", F.conv2d), 2)
    x = block(x, "conv_block6", F.conv2d).mean(3)
    x = x.max(2).values + x.mean(2)
    return F.relu(F.linear(x, state["fc1.weight"], state["fc1.bias"]))[0].numpy()


def narrow_checkpoint(name, folder):
    """Random weights of a PANN of two channels, in a file like the published ones."""
    torch.manual_seed(0)
    state = pann(name, width=2).state_dict()
    for key, value in state.items():
        if "conv" in key and value.ndim in (3, 4) and "stft" not in key:
            state[key] = torch.randn_like(value) * (2 / value[0].numel()) ** 0.5
        elif key.endswith(("running_mean", "bias")):
            state[key] = 0.1 * torch.randn_like(value)
        elif key.endswith("running_var"):
            state[key] = 0.5 + torch.rand_like(value)
    # decibels
    state["bn0.running_mean"] -= 20
    state["bn0.running_var"] *= 50
    sampler = {"indexes": np.arange(5), "pointer": np.float64(2), "names": np.array([True])}
    torch.save({"iteration": 3, "model": state, "sampler": sampler}, folder / f"{name}.pth")
    return folder / f"{name}.pth", state


@pytest.mark.parametrize("name", ["panns-cnn14", "panns-cnn14-16k", "panns-wavegram"])
def test_panns_load_and_compute_as_published(name, tmp_path):
    file, state = narrow_checkpoint(name, tmp_path)
    network = embeddings.get_embedding(name, file)
    rate, n_fft, hop, fmax = PANNS[name]
    assert (network.sample_rate, network.dim) == (rate, 64)
    t = np.arange(2 * rate) / rate
    hiss = np.random.default_rng(0).normal(0, 0.1, len(t))
    clips = [hiss, np.sin(2 * np.pi * 440 * t), hiss * (t > 1)]
    clips = [y.astype(np.float32) for y in clips]
    rows = network.embed(clips)
    expected = [published_forward(state, y, rate, n_fft, hop, fmax) for y in clips]
    # weights that let the sound through
    assert np.ptp(expected, axis=0).max() > 0.1
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-3)
    # the two branches of the wavegram network differ by a frame here: the published code fails
    assert network.embed([clips[0][: 101 * hop]]).shape == (1, 64)
    del state["fc1.bias"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"not the weights of this network.*fc1\.bias"):
        embeddings.get_embedding(name, file)


# --- MS-CLAP ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_ms_clap_loads_its_audio_half_and_never_crops_at_random(tmp_path):
    clap = pytest.importorskip("msclap.models.clap", reason="msclap is not installed")
    torch.manual_seed(0)
    encoder = clap.AudioEncoder("HTSAT", 768, 1024, 44_100, 1024, 320, 64, 50, 8_000, 527).eval()
    state = {f"audio_encoder.{key}": value for key, value in encoder.state_dict().items()}
    file = tmp_path / "clap.pth"
    torch.save({"model": state | {"caption_encoder.x": torch.zeros(1)}}, file)
    network = embeddings.get_embedding("ms-clap", file)
    y = np.random.default_rng(0).normal(0, 0.1, 8 * 44_100).astype(np.float32)
    with torch.no_grad():
        windows = torch.from_numpy(np.stack([y[: 7 * 44_100], y[44_100:]]))
        expected = encoder(windows)[0].mean(0)
    np.testing.assert_allclose(network.embed([y])[0], expected, atol=1e-4)
    del state["audio_encoder.projection.linear1.weight"]
    torch.save({"model": state}, file)
    with pytest.raises(ValueError, match=r"not the weights of this network.*linear1"):
        embeddings.get_embedding("ms-clap", file)


# --- LAION-CLAP ------------------------------------------------------------------------------------


def tiny_clap(**audio_config):
    from transformers import ClapConfig, ClapModel

    torch.manual_seed(0)
    sizes = {
        "patch_embeds_hidden_size": 16, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_hidden_layers": 2, "hidden_size": 32, "projection_dim": 16,
    }  # fmt: skip
    text = {
        "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "projection_dim": 16,
    }  # fmt: skip
    config = ClapConfig(text_config=text, audio_config=sizes | audio_config, projection_dim=16)
    return ClapModel(config).eval()


def test_laion_clap_is_the_audio_half_of_the_whole_model(tmp_path):
    from transformers import ClapFeatureExtractor

    model, extractor = tiny_clap(), ClapFeatureExtractor()
    model.save_pretrained(tmp_path / "clap")
    # as in the hub's un-fused checkpoints
    ClapFeatureExtractor(truncation="rand_trunc").save_pretrained(tmp_path / "clap")
    network = embeddings.get_embedding("laion-clap", tmp_path / "clap")
    assert (network.dim, network.sample_rate) == (16, 48_000)
    rng = np.random.default_rng(0)
    short, long = (rng.normal(0, 0.1, n * 48_000).astype(np.float32) for n in (3, 11))
    # what the model's own preparation does with a short clip is what is done here
    features = extractor(
        [short, long[:480_000], long[48_000:]],
        sampling_rate=48_000, truncation="rand_trunc", return_tensors="pt",
    )["input_features"]  # fmt: skip
    with torch.no_grad():
        expected = model.get_audio_features(input_features=features.float()).pooler_output.numpy()
    rows = network.embed([short, long])
    np.testing.assert_allclose(rows[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(rows[1], expected[1:].mean(axis=0), atol=1e-5)


def test_wrong_laion_checkpoints_are_refused(tmp_path):
    from transformers import ClapFeatureExtractor

    with pytest.raises(ldm.CheckpointError, match=r"nowhere: no model_index"):
        embeddings.get_embedding("laion-clap", tmp_path / "nowhere")
    ClapFeatureExtractor().save_pretrained(tmp_path / "fused")
    tiny_clap(enable_fusion=True).save_pretrained(tmp_path / "fused")
    with pytest.raises(ValueError, match="a fused CLAP"):
        embeddings.get_embedding("laion-clap", tmp_path / "fused")
    whole = tiny_clap()
    state = {k: v for k, v in whole.state_dict().items() if "audio_projection" not in k}
    whole.save_pretrained(tmp_path / "half", state_dict=state)
    ClapFeatureExtractor().save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match="audio_projection"):
        embeddings.get_embedding("laion-clap", tmp_path / "half")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a checkpoint of laion-clap"):
        embeddings.get_embedding("laion-clap", tmp_path / "other.pt")


def test_laion_clap_reads_the_packages_own_checkpoints(tmp_path, monkeypatch):
    package = importlib.util.find_spec("laion_clap")
    if package is None:
        pytest.skip("laion_clap is not installed")
    monkeypatch.syspath_prepend(package.submodule_search_locations[0])
    htsat = importlib.import_module("clap_module.htsat")
    torch.manual_seed(0)
    config = {"model_name": "tiny", "class_num": 527, "mel_bins": 64, "sample_rate": 48_000}
    config |= {"window_size": 1024, "hop_size": 480, "fmin": 50, "fmax": 14_000}
    tower = htsat.create_htsat_model(SimpleNamespace(**config)).eval()
    projection = torch.nn.Sequential(
        torch.nn.Linear(768, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)
    )
    net = torch.nn.ModuleDict({"audio_branch": tower, "audio_projection": projection})
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    # the whole model's other parts, and what its trainer left
    other = {"module.text_branch.x": torch.zeros(1), "module.logit_scale_a": torch.zeros(())}
    file = tmp_path / "630k.pt"
    torch.save({"epoch": np.float64(1), "state_dict": state | other}, file)
    network = embeddings.get_embedding("laion-clap", file)
    y = noise(3.0)[:48_000]
    repeated = np.concatenate([y] * 10)
    with torch.no_grad():
        seen = tower({"waveform": torch.from_numpy(repeated)[None]}, device="cpu")["embedding"]
        expected = F.normalize(projection(seen), dim=-1)[0]
    np.testing.assert_allclose(network.embed([y])[0], expected, atol=1e-5)
    fused = {"module.audio_branch.patch_embed.mel_conv2d.weight": torch.zeros(1)}
    torch.save({"state_dict": state | fused}, file)
    with pytest.raises(ValueError, match="is a fused checkpoint"):
        embeddings.get_embedding("laion-clap", file)


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
    expected = ldm.embed_audio(ldm.load_clap(str(folder)), [y], 16_000)[0]
    np.testing.assert_allclose(clap.embed([y])[0], expected, atol=1e-6)
    assert clap.dim == embeddings.EMBEDDINGS["mini-clap"].dim
    # other weights under the same name must not be answered from the cache
    first = clap.embed([y], cache_dir=tmp_path / "cache")
    assert not np.allclose(other.embed([y], cache_dir=tmp_path / "cache"), first, atol=1e-3)


# --- yamnet ----------------------------------------------------------------------------------------


@needs_yamnet
def test_yamnet_averages_patches(tmp_path):
    yamnet = embeddings.get_embedding("yamnet", YAMNET)
    y = noise(1.455)  # two patches, 0.48 s apart
    both = yamnet.embed([y, y[:15_600], y[7_680:]])
    np.testing.assert_allclose(both[0], (both[1] + both[2]) / 2, atol=1e-5)
    other = tmp_path / "other.tflite"
    other.write_bytes(YAMNET.read_bytes().replace(b"global_average_pooling2d/Mean", b"x" * 29))
    with pytest.raises(ValueError, match="is a TFLite model, but not YAMNet's"):
        embeddings.get_embedding("yamnet", other)


@needs_esc10
@needs_yamnet
def test_yamnet_tells_the_classes_of_esc10():
    from sklearn.linear_model import LogisticRegression

    rows = list(csv.DictReader((ESC10 / "meta" / "esc50.csv").open()))
    rows = [r for r in rows if r["fold"] in "15"]
    files = [ESC10 / "audio" / r["filename"] for r in rows]
    x = embeddings.get_embedding("yamnet", YAMNET).embed(files, silence="allow")
    labels, train = (np.array([r["category"] for r in rows]), np.array([r["fold"] for r in rows]) == "1")
    probe = LogisticRegression(max_iter=1000).fit(x[train], labels[train])
    # with four folds to learn from the published protocol gives 96.75 %; here there is one
    assert probe.score(x[~train], labels[~train]) > 0.9
