"""Embeddings of clips behind one protocol, cached by the content of what they embed.

Every clip becomes one row: the network (or statistic) sees it as mono at its own rate, cut into windows
from a fixed start; what it returns for the windows is averaged over the clip.
"""

import contextlib
import hashlib
import importlib.util
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np

from soundscapes_utils import audio, store


class SilenceWarning(UserWarning):
    """Clips without sound were embedded: some networks rate silence well, so look at the score."""


@dataclass(frozen=True)
class Embedding:
    """One way to turn clips into rows; `EMBEDDINGS` describes them, `get_embedding` opens one.

    - ``sample_rate`` (Hz) and ``dim``: of what `network` takes and gives.
    - ``window_s, hop_s``: seconds that the network sees at once, and from one window to the next; what
      is left after the last whole window is not seen. Without ``hop_s`` it sees the whole clip.
    - ``short``: what fills a clip shorter than the window. "repeat": itself, the last repetition cut;
      "repeat-pad": itself as often as it fits, then zeros; "pad": zeros, and a window starts every
      ``hop_s`` to the end of any clip.
    - ``version`` changes whenever the same sound could give another row; part of the cache's key.
    - ``network`` maps mono float32 [samples], or [windows, samples] where ``batched``, to [dim].
    - ``needs, url, checksum, path``: the file that it wants, where it is fetched and was opened from.

    >>> tone = np.sin(np.arange(16_000) * 0.1).astype(np.float32)
    >>> get_embedding("logmel-stats").embed([tone]).shape
    (1, 64)
    """

    name: str
    sample_rate: int
    dim: int
    window_s: float
    version: str = ""
    network: Callable | None = None
    hop_s: float | None = None
    short: str = "repeat"
    batched: bool = False
    pooling: str = ""
    licence: str = ""
    source: str = ""
    needs: str = "nothing"
    url: str = ""
    checksum: str = ""
    path: str = ""

    def embed(self, clips, sample_rate=None, cache_dir=None, silence="warn", batch_size=16):
        """Embed clips, one row each: the mean over the clip's windows, float32 [clips, dim].

        Parameters
        ----------
        clips : sequence of path or np.ndarray [samples]
            Sound files (the mean of their channels is embedded), or mono signals (±1 is full scale).
        sample_rate : int, optional
            Of the signals among `clips`, Hz; the embedding's own by default.
        cache_dir : path, optional
            Folder for rows already computed, keyed by the clip's content, the embedding and its version.
        silence : {"warn", "allow"}
            Whether clips that peak below −80 dB of full scale raise a `SilenceWarning`.
        batch_size : int, default 16
            Windows that the network sees at once, where it can; the last digits may depend on it.

        Raises
        ------
        audio.AudioError
            A clip that cannot be read or embedded, by name; no row is ever left out silently.
        """
        if silence not in ("warn", "allow"):
            raise ValueError(f"silence must be 'warn' or 'allow', got {silence!r}")
        clips, silent = list(clips), []
        rows = np.empty((len(clips), self.dim), np.float32)
        for place, windows in self._each(clips, sample_rate, cache_dir, batch_size):
            rows[place] = windows[:, :-1].mean(axis=0)
            if windows[0, -1] < audio.SILENT_PEAK:
                silent.append(place)
        if silent and silence == "warn":
            names = ", ".join(_name(clips[place], place) for place in sorted(silent)[:5])
            message = f"{len(silent)} of {len(clips)} clips are silent: {names}"
            warnings.warn(SilenceWarning(message), stacklevel=2)
        return rows

    def embed_windows(self, clips, sample_rate=None, cache_dir=None, batch_size=16):
        """Embed clips as `embed` does, one row per window: a list of float32 [windows, dim]."""
        rows = dict(self._each(list(clips), sample_rate, cache_dir, batch_size))
        return [rows[place][:, :-1] for place in range(len(rows))]

    def _each(self, clips, sample_rate, cache_dir, batch_size):
        """Yield every clip's place and rows [windows, dim + 1]; the last column is the clip's peak."""
        waiting, held = [], 0
        known = store.Records(cache_dir, "digests") if cache_dir else None
        for place, clip in enumerate(clips):
            name = _name(clip, place)
            file = self._cache_file(clip, name, sample_rate, known) if cache_dir else None
            if file and (rows := store.read_array(file)) is not None:
                yield place, rows
                continue
            peak, windows = self._windows(clip, name, sample_rate)
            # a batch is one block of memory: only windows of one length share it
            if waiting and len(windows[0]) != len(waiting[0][-1][0]):
                yield from self._finished(waiting, batch_size)
                waiting, held = [], 0
            waiting.append((place, name, file, peak, windows))
            held += len(windows)
            if held >= batch_size or not self.batched:
                yield from self._finished(waiting, batch_size)
                waiting, held = [], 0
        yield from self._finished(waiting, batch_size)

    def _finished(self, waiting, batch_size):
        windows = [window for *_, windows in waiting for window in windows]
        if self.batched:
            blocks = range(0, len(windows), batch_size)
            rows = [r for b in blocks for r in self.network(np.stack(windows[b : b + batch_size]))]
        else:
            rows = [self.network(window) for window in windows]
        rows = iter(rows)
        for place, name, file, peak, windows in waiting:
            own = [np.append(next(rows), peak).astype(np.float32) for _ in windows]
            if any(row.shape != (self.dim + 1,) or not np.isfinite(row).all() for row in own):
                raise audio.AudioError(
                    f"{name}: {self.name} gave no finite row of {self.dim} numbers; check the clip, "
                    "and the file that the embedding was loaded from"
                )
            own = np.stack(own)
            yield place, store.cached_array(file, lambda own=own: own) if file else own

    def _windows(self, clip, name, sample_rate):
        """Peak of a clip, and its windows."""
        if isinstance(clip, (str, os.PathLike)):
            y = audio.load_audio(clip, self.sample_rate)[0]
        else:
            y = audio.check_audio(clip, name, silent_ok=True)
            y = audio.resample(y, sample_rate or self.sample_rate, self.sample_rate)
        peak, n = np.abs(y).max(), round(self.window_s * self.sample_rate)
        if self.hop_s is not None and self.short == "pad":
            starts, y = range(0, len(y), round(self.hop_s * self.sample_rate)), np.pad(y, (0, n))
            return peak, [y[start : start + n] for start in starts]
        if len(y) < n:
            full = {"repeat": n, "repeat-pad": n // len(y) * len(y), "pad": len(y)}[self.short]
            y = audio.fix_length(audio.fix_length(y, full), n, "pad")
        if self.hop_s is None:
            return peak, [y]
        starts = range(0, len(y) - n + 1, round(self.hop_s * self.sample_rate))
        return peak, [y[start : start + n] for start in starts]

    def _cache_file(self, clip, name, sample_rate, known):
        if isinstance(clip, (str, os.PathLike)):
            try:
                content = (store.known_digest(clip, known),)
            except OSError as error:
                raise audio.AudioError(f"{clip}: cannot be read ({error})") from error
        else:
            y = audio.check_audio(clip, name, silent_ok=True)
            content = sample_rate or self.sample_rate, y.tobytes()
        framing = self.window_s, self.hop_s, self.short, "soxr HQ"
        key = store.content_key(self.name, self.version, framing, *content, length=32)
        return known.folder.parent / self.name / key[:2] / f"{key}.npy"


def _name(clip, place):
    return str(clip) if isinstance(clip, (str, os.PathLike)) else f"clip {place}"


# --- the networks --------------------------------------------------------------------------------

_TABLE = store.read_table(Path(__file__).with_name("embeddings.csv")).astype(object)
EMBEDDINGS = {
    row["name"]: Embedding(**row) for row in _TABLE.where(_TABLE.notna(), None).to_dict("records")
}
"""What `get_embedding` opens, by name: the rows of ``embeddings.csv``, without a network yet."""

CHALLENGE = {"panns-wavegram-logmel": "panns-wavegram", "vggish": "vggish", "clap-2023": "ms-clap-dcase"}
"""The networks of DCASE 2024 Task 7: their names there, and here."""


def get_embedding(name, path=""):
    """Open an embedding, on the GPU where there is one.

    Parameters
    ----------
    name : str
        A key of `EMBEDDINGS`.
    path : str or Path, default ""
        Its weights. For yamnet the TFLite file; for mini-clap a checkpoint as `ldm.load_clap` takes
        it (the built-in one by default); for laion-clap an un-fused checkpoint of transformers (a
        folder or a hub name; ``laion/clap-htsat-unfused`` by default) or of laion-clap (a .pt file).
        For the others the published file, which is fetched and checked by default.

    Raises
    ------
    ValueError, FileNotFoundError, ImportError
        Unknown name, a file that is wrong or cannot be had, a package that is not installed.
    """
    if name not in EMBEDDINGS:
        raise ValueError(f"unknown embedding {name!r}; known: {', '.join(EMBEDDINGS)}")
    card = EMBEDDINGS[name]
    return replace(card, path=str(path), **_OPENERS[name](card, str(path)))


def _on_torch(net, dim, forward=None):
    """Fields of an embedding whose network maps a batch of windows to a batch of rows."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = _digest(net)
    net = net.to(device).eval()
    forward = forward or net

    def network(windows):
        with torch.inference_mode():
            return forward(torch.from_numpy(windows).to(device)).float().cpu().numpy()

    return {"dim": dim, "version": version, "network": network, "batched": True}


def _digest(net):
    digest = hashlib.sha256()
    for key, weights in sorted(net.state_dict().items()):
        digest.update(key.encode() + weights.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _weights(card, path):
    """State dict of the checkpoint at `path`, or of the published one."""
    import pooch

    file = Path(path)
    if not path:
        folder, name = pooch.os_cache("soundscapes_utils"), Path(unquote(card.url)).name
        bar = sys.stderr.isatty()
        with contextlib.suppress(OSError):
            file = Path(pooch.retrieve(card.url, card.checksum, name, folder, progressbar=bar))
    if not file.is_file():
        raise FileNotFoundError(
            f"no weights of {card.name} at {file}: they are {card.needs}, {card.licence}, at "
            f"{card.url}; bring the file from a machine that reaches it, and give its place as path"
        )
    content = _read_checkpoint(file)
    return content.get("model", content)


def _read_checkpoint(file):
    """Content of a checkpoint, which may hold tensors and arrays only."""
    import torch
    from numpy._core.multiarray import _reconstruct, scalar

    # published checkpoints keep the state of the trainer's sampler with the weights: plain arrays
    parts = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        parts += [(_reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    try:
        with torch.serialization.safe_globals(parts):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{file}: cannot be loaded as a checkpoint of tensors ({reason}); fetch it again from its "
            "source"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not weights by name")
    return content


def _load_strictly(net, state, source, **options):
    try:
        net.load_state_dict(state, strict=True, **options)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise ValueError(f"{source}: not the weights of this network ({reason})") from error
    return net.eval()


def _open_logmel(card, path):
    if path:
        raise ValueError("logmel-stats takes no file; leave path empty")
    return {"version": "1", "network": _logmel_statistics}


def _logmel_statistics(y):
    """64 statistics of a clip's log-mel spectrogram, in nats.

    16 bands (four mel bands each, low to high): their mean over time, their standard deviation, and
    that of their change from frame to frame, 10 ms. Then, for each quarter of the bands, the RMS
    modulation at 1–2, 2–4, 4–8 and 8–16 Hz (the analysis window of 64 ms weakens the last octave).
    The first 16 follow the level. After McDermott and Simoncelli, Neuron 71, 2011.
    """
    mel = audio.log_mel(y).astype(np.float64)
    bands = mel.reshape(len(mel), 16, 4).mean(axis=2)
    modulation = _modulation(bands.reshape(len(bands), 4, 4).mean(axis=2))
    parts = bands.mean(axis=0), bands.std(axis=0), np.diff(bands, axis=0).std(axis=0), modulation
    return np.concatenate(parts).astype(np.float32)


def _modulation(contours):
    """RMS of each contour in octaves of modulation rate, 1 to 16 Hz."""
    n = len(contours)
    window = np.hanning(n + 1)[:n, None]
    spectrum = np.fft.rfft((contours - contours.mean(axis=0)) * window, axis=0)
    power = 2.0 * np.abs(spectrum) ** 2 / (n * (window**2).sum())
    rates = np.fft.rfftfreq(n, audio.LOG_MEL_HOP / audio.LOG_MEL_RATE)
    octaves = [(rates >= low) & (rates < 2 * low) for low in (1, 2, 4, 8)]
    return np.concatenate([np.sqrt(power[octave].sum(axis=0)) for octave in octaves])


def _open_mini_clap(card, path):
    from soundscapes_utils import ldm

    clap = ldm.load_clap(path or "builtin")

    def network(y):
        return ldm.embed_audio(clap, [y], card.sample_rate)[0].numpy()

    dim = len(network(np.zeros(card.sample_rate, np.float32)))
    version = f"{clap.front_end} {_digest(clap.audio_encoder)}"
    return {"dim": dim, "version": version, "network": network}


def _open_yamnet(card, path):
    hint = (
        "YAMNet's TFLite file (4 MB, Apache-2.0) is on kaggle.com/models/google/yamnet (variation "
        "'classification-tflite'); give its place as yamnet_path"
    )
    if not Path(path).is_file():
        raise FileNotFoundError(f"no YAMNet file at {path!r}: {hint}")
    from ai_edge_litert.interpreter import Interpreter

    try:
        with _quiet():
            net = Interpreter(path, num_threads=1, experimental_preserve_all_tensors=True)
            net.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be opened as a TFLite model: {hint}") from error
    entry = net.get_input_details()[0]
    name = "global_average_pooling2d/Mean"
    pooled = [t["index"] for t in net.get_tensor_details() if t["name"].endswith(name)]
    if len(pooled) != 1:
        raise ValueError(f"{path} is a TFLite model, but not YAMNet's: {hint}")

    def network(patch):
        net.set_tensor(entry["index"], patch.reshape(entry["shape"]))
        net.invoke()
        return net.get_tensor(pooled[0])[0].copy()

    return {"version": store.file_digest(path)[:16], "network": network}


@contextlib.contextmanager
def _quiet():
    # the runtime greets on the process's own stderr, which ends up in notebooks
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as void, warnings.catch_warnings():
            os.dup2(void.fileno(), 2)
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _open_vggish(card, path):
    import torch

    from soundscapes_utils.audio_networks import VGGish

    state = _weights(card, path)
    with torch.device("meta"):
        net = VGGish()
    return _on_torch(_load_strictly(net, state, path or card.needs, assign=True), 128)


def _open_pann(card, path):
    import torch

    from soundscapes_utils.audio_networks import PANN

    state, source = _weights(card, path), path or card.needs
    first = state.get("conv_block1.conv1.weight")
    if first is None:
        raise ValueError(f"{source}: not a checkpoint of PANNs (it has no conv_block1)")
    with torch.device("meta"):
        net = PANN(card.sample_rate, card.name == "panns-wavegram", len(first))
    net = _load_strictly(net, state, source, assign=True).fold_norms()
    return _on_torch(net, net.fc1.out_features)


def _open_msclap(card, path):
    state = _weights(card, path)
    # the package silences all warnings of the process as it is imported, and has some of its own
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from msclap.models.clap import AudioEncoder
        except ImportError as error:
            raise ImportError(
                f"ms-clap needs the package msclap ({error}): pip install --no-deps msclap==1.3.4"
            ) from error
        # the audio half of the package's config_2023.yml; the text half would come from the hub
        net = AudioEncoder("HTSAT", 768, 1024, 44_100, 1024, 320, 64, 50, 8_000, 527)
    part = "audio_encoder."
    state = {key.removeprefix(part): v for key, v in state.items() if key.startswith(part)}
    _load_strictly(net, state, path or card.needs)
    return _on_torch(net, 1024, lambda y: net(y)[0])


def _open_laion(card, path):
    if Path(path).is_file():
        return _open_laion_file(path)
    from torch.nn.functional import normalize

    from soundscapes_utils import ldm

    clap = ldm.load_clap(path or ldm.HUB_CLAP)
    net = clap.audio_encoder

    def forward(y):
        # each window is as long as the network's own, so that neither option has anything to do; the
        # default of un-fused checkpoints' files, fusion, would make four pictures of it
        options = {"truncation": "rand_trunc", "padding": "repeatpad", "return_tensors": "pt"}
        features = clap.extractor(list(y.cpu().numpy()), sampling_rate=card.sample_rate, **options)
        features = features["input_features"].to(y.device, y.dtype)
        return normalize(net(input_features=features).audio_embeds, dim=-1)

    return _on_torch(net, net.config.projection_dim, forward)


def _open_laion_file(path):
    """Open a checkpoint of the package laion-clap itself."""
    from torch import nn

    content = _read_checkpoint(Path(path))
    state = content.get("state_dict", content)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    patches = state.get("audio_branch.patch_embed.proj.weight")
    projection = state.get("audio_projection.0.weight")
    sizes = {96: "tiny", 128: "base", 256: "large"}
    if patches is None or projection is None or len(patches) not in sizes:
        raise ValueError(f"{path}: not a checkpoint of laion-clap with an HTSAT audio tower")
    if any("fusion_model" in key or "mel_conv2d" in key for key in state):
        raise ValueError(
            f"{path} is a fused checkpoint, which sees random crops of a clip and gives another row "
            "each time; take an un-fused one"
        )
    joint, wide = projection.shape
    layers = nn.Linear(wide, joint), nn.ReLU(), nn.Linear(joint, joint)
    parts = {"audio_branch": _htsat(sizes[len(patches)]), "audio_projection": nn.Sequential(*layers)}
    net = nn.ModuleDict(parts)
    own = {k: v for k, v in state.items() if k.startswith(("audio_branch.", "audio_projection."))}
    _load_strictly(net, own, path)

    def forward(y):
        row = net["audio_branch"]({"waveform": y}, device=y.device)["embedding"]
        return nn.functional.normalize(net["audio_projection"](row), dim=-1)

    return _on_torch(net, joint, forward)


def _htsat(size):
    package = importlib.util.find_spec("laion_clap")
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "a .pt file of laion-clap needs its package: pip install --no-deps laion-clap==1.1.7"
        )
    # importing the package itself fetches three tokenizers; its networks lie in a folder that it
    # puts on the path under this name
    folder = package.submodule_search_locations[0]
    config = {"model_name": size, "class_num": 527, "mel_bins": 64, "sample_rate": 48_000}
    config |= {"window_size": 1024, "hop_size": 480, "fmin": 50, "fmax": 14_000}
    sys.path.insert(0, folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from clap_module.htsat import create_htsat_model

            return create_htsat_model(SimpleNamespace(**config))
    finally:
        sys.path.remove(folder)


_OPENERS = {
    "logmel-stats": _open_logmel,
    "mini-clap": _open_mini_clap,
    "yamnet": _open_yamnet,
    "vggish": _open_vggish,
    **dict.fromkeys(("panns-cnn14", "panns-cnn14-16k", "panns-wavegram"), _open_pann),
    **dict.fromkeys(("ms-clap", "ms-clap-dcase"), _open_msclap),
    "laion-clap": _open_laion,
}
