"""The pieces of AudioLDM: load them from a checkpoint, build a small set, encode, decode, embed.

A checkpoint is a folder (or hub name) in diffusers' AudioLDM layout. The small model that comes
with the project keeps that layout and those interfaces; two of its pieces are defined here, because
at its size nothing published fits: a *linear* latent instead of a convolutional autoencoder, and a
vocoder that needs no training.
"""

import copy
import functools
import hashlib
import importlib
import itertools
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, EDMDPMSolverMultistepScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn
from torch.nn import functional as F

from . import audio

SAMPLE_RATE = 16_000
HOP = 160
N_MELS = 64
BUILTIN_CHECKPOINT = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "mini-audioldm"
INFO_FILE = "soundscapes.json"
CARD_FILE = "README.md"
HUB_CLAP = "laion/clap-htsat-unfused"
HUB_INFO = {
    "training_dataset": "AudioCaps, AudioSet, BBC Sound Effects, Freesound",
    "training_folds": [],
    "sample_rate": SAMPLE_RATE,
    "clip_s": 10.24,
    "steps": 200,
    "guidance_scale": 3.5,
    "eta": 0.0,
    "audio_encoder": HUB_CLAP,
}
# The published cvssp/audioldm-s-full-v2, as diffusers' convert_original_audioldm_to_diffusers.py
# derives it from audioldm_original.yaml of AudioLDM-training-finetuning.
AUDIOLDM_S = {
    "unet": {
        "sample_size": 128,
        "in_channels": 8,
        "out_channels": 8,
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
        "block_out_channels": (128, 256, 384, 640),
        "layers_per_block": 2,
        "cross_attention_dim": (128, 256, 384, 640),
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 512,
        "class_embeddings_concat": True,
    },
    "vae": {
        "sample_size": 512,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (128, 256, 512),
        "latent_channels": 8,
        "layers_per_block": 2,
        "scaling_factor": 0.9227914214134216,
    },
    "scheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "prediction_type": "epsilon",
    },
    "vocoder": {
        "model_in_dim": N_MELS,
        "sampling_rate": SAMPLE_RATE,
        "upsample_initial_channel": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "normalize_before": False,
    },
}
# the libraries whose classes a checkpoint's model_index.json may name
_LIBRARIES = ("diffusers", "transformers", "soundscapes_utils.ldm")
# tensors that hold no knowledge, which some releases of transformers save and others do not
_COUNTERS = ("position_ids", "token_type_ids", "num_batches_tracked", "relative_position_index")
# the other half of a published CLAP, which an audio tower is opened without
_TEXT_HALF = ("text_model.", "text_projection.", "logit_scale")
# tokens of captions that one pass of the text tower takes
_TOKENS_A_PASS = 2**17


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of the wrong kind."""


class PatchVAE(ModelMixin, ConfigMixin):
    """Linear latent of a log-mel: whitened principal components of 8 × 8 patches.

    It has the encoder and decoder interface of diffusers' ``AutoencoderKL``, so that
    ``AudioLDMPipeline`` and the trainer treat it alike. Being linear, it is fitted in closed form.

    Parameters
    ----------
    patch : int
        Side of a patch in frames and in mel bands.
    latent_channels : int
        Principal components kept for each patch.
    block_out_channels : sequence of int
        Its length gives the pipeline the down-sampling factor, ``2 ** (len - 1) == patch``.
    scaling_factor : float
        Factor on the latent, as in ``AutoencoderKL``; 1 because the latent is whitened.

    Examples
    --------
    >>> vae = PatchVAE()
    >>> vae.decode(torch.zeros(1, 32, 4, 8)).sample.shape
    torch.Size([1, 1, 32, 64])
    """

    @register_to_config
    def __init__(
        self,
        patch: int = 8,
        latent_channels: int = 32,
        block_out_channels: tuple = (1, 1, 1, 1),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(patch * patch))
        self.register_buffer("components", torch.zeros(latent_channels, patch * patch))
        self.register_buffer("scale", torch.ones(latent_channels))

    @torch.no_grad()
    def fit(self, mels):
        """Set the latent from log-mels by principal component analysis.

        Parameters
        ----------
        mels : torch.Tensor, float32 [clips, frames, 64]
            Natural-log mel spectrograms; frames divisible by the patch side.

        Returns
        -------
        PatchVAE
            Itself, fitted.
        """
        mels = mels.to(self.mean)  # the network may lie on a GPU
        rows = self._patches(mels[:, None]).movedim(1, -1).reshape(-1, self.config.patch**2)
        self.mean.copy_(rows.mean(0))
        centred = (rows - self.mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        top = torch.argsort(values, descending=True)[: self.config.latent_channels]
        self.components.copy_(vectors[:, top].T)
        self.scale.copy_(values[top].clamp(min=1e-8).sqrt())
        return self

    def _patches(self, x):
        return F.pixel_unshuffle(x, self.config.patch)

    def encode(self, x, return_dict=True):
        """Encode log-mels.

        Parameters
        ----------
        x : torch.Tensor [batch, 1, frames, 64]
            Log-mel spectrograms.
        return_dict : bool
            Return diffusers' output class (default) or a tuple.

        Returns
        -------
        AutoencoderKLOutput
            ``latent_dist`` over [batch, latent_channels, frames / 8, 8], of negligible variance.
        """
        centred = self._patches(x) - self.mean[:, None, None]
        z = torch.einsum("bdtf,cd->bctf", centred, self.components) / self.scale[:, None, None]
        dist = DiagonalGaussianDistribution(torch.cat([z, torch.full_like(z, -30.0)], dim=1))
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(self, z, return_dict=True):
        """Decode latents.

        Parameters
        ----------
        z : torch.Tensor [batch, latent_channels, frames / 8, 8]
            Latents.
        return_dict : bool
            Return diffusers' output class (default) or a tuple.

        Returns
        -------
        DecoderOutput
            ``sample`` is the log-mel [batch, 1, frames, 64].
        """
        scaled = z * self.scale[:, None, None]
        rows = torch.einsum("bctf,cd->bdtf", scaled, self.components) + self.mean[:, None, None]
        mel = F.pixel_shuffle(rows, self.config.patch)
        return DecoderOutput(sample=mel) if return_dict else (mel,)


class NoiseVocoder(ModelMixin, ConfigMixin):
    """Vocoder without training: white noise, its bins scaled until the mel spectrogram fits.

    Environmental sound is mostly texture, so the phase of noise serves it better than the phase that
    Griffin-Lim finds. The noise is the same for each clip and each call: same mel, same bytes.

    Parameters
    ----------
    model_in_dim : int
        Mel bands.
    sampling_rate : int
        Hz.
    upsample_rates : sequence of int
        Their product is the hop in samples, where ``AudioLDMPipeline`` looks for it.
    iterations : int
        Rounds of analysis, scaling and synthesis.

    Examples
    --------
    >>> NoiseVocoder()(torch.full((1, 32, 64), -4.0)).shape
    torch.Size([1, 5120])
    """

    @register_to_config
    def __init__(
        self,
        model_in_dim: int = N_MELS,
        sampling_rate: int = SAMPLE_RATE,
        upsample_rates: tuple = (5, 4, 4, 2),
        iterations: int = 6,
    ):
        super().__init__()
        # a saved buffer, because diffusers finds a model's dtype and device by its tensors
        self.register_buffer("basis", torch.from_numpy(audio.mel_filters().T.copy()))

    def forward(self, spectrogram):
        """Turn log-mels into waveforms.

        Parameters
        ----------
        spectrogram : torch.Tensor [batch, frames, 64]
            Natural-log magnitude mel spectrograms.

        Returns
        -------
        torch.Tensor, float32 [batch, frames · hop]
            Waveforms.
        """
        target = spectrogram.float().exp().transpose(1, 2)
        basis = self.basis.float()
        spread = (basis / basis.sum(0, keepdim=True).clamp(min=1e-8)).T
        noise = torch.Generator().manual_seed(0)
        y = 0.1 * torch.randn(target.shape[-1] * self._hop, generator=noise)
        y = y.to(target.device).repeat(len(target), 1)
        for _ in range(self.config.iterations):
            stft = self._analyse(y)
            gain = target / (basis @ stft.abs()).clamp(min=1e-6)
            y = self._synthesise(stft * (spread @ gain.clamp(max=1e4)), y.shape[-1])
        return y

    @property
    def _hop(self):
        return int(np.prod(self.config.upsample_rates))

    def _analyse(self, y):
        # the framing of audio.log_mel: no centring, reflection of (FFT - hop) / 2 at both ends
        edge = (1024 - self._hop) // 2
        padded = F.pad(y[:, None], (edge, edge), mode="reflect")[:, 0]
        window = torch.hann_window(1024, device=y.device)
        return torch.stft(padded, 1024, self._hop, window=window, center=False, return_complex=True)

    def _synthesise(self, stft, length):
        window = torch.hann_window(1024, device=stft.device)
        frames = torch.fft.irfft(stft, n=1024, dim=1) * window[:, None]
        weight = (window**2)[:, None].expand_as(frames[:1])
        size = (1, 1024 + self._hop * (frames.shape[-1] - 1))
        fold = {"output_size": size, "kernel_size": (1, 1024), "stride": (1, self._hop)}
        y = F.fold(frames, **fold)[:, 0, 0] / F.fold(weight, **fold)[:, 0, 0].clamp(min=1e-4)
        edge = (1024 - self._hop) // 2
        return y[:, edge : edge + length]


class AudioTower(ModelMixin, ConfigMixin):
    """Audio half of the small CLAP: a convolutional network over the log-mel.

    Parameters
    ----------
    projection_dim : int
        Width of the embedding that text and audio share.
    channels : sequence of int
        Width of each of the convolution stages, each of which halves time and frequency.

    Examples
    --------
    >>> AudioTower()(torch.zeros(2, 256, 64)).shape
    torch.Size([2, 128])
    """

    @register_to_config
    def __init__(self, projection_dim: int = 128, channels: tuple = (24, 48, 96, 128)):
        super().__init__()
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(b),
                    nn.ReLU(),
                )
                for a, b in itertools.pairwise([1, *channels])
            )
        )
        bands = N_MELS // 2 ** len(channels)
        self.projection = nn.Linear(2 * bands * channels[-1], projection_dim)

    def forward(self, mel):
        """Embed log-mels.

        Parameters
        ----------
        mel : torch.Tensor [batch, frames, 64]
            Natural-log mel spectrograms, at least 16 frames.

        Returns
        -------
        torch.Tensor [batch, projection_dim]
            Unit-length embeddings.
        """
        h = self.stages((mel[:, None] + 5.0) / 3.0).movedim(2, -1).flatten(1, 2)
        return F.normalize(self.projection(torch.cat([h.mean(-1), h.amax(-1)], dim=1)), dim=-1)


class CosineSDESolver(EDMDPMSolverMultistepScheduler):
    """SDE-DPM-Solver++ on the cosine schedule of Stable Audio Open, with one noise stream a clip.

    Defaults are those of diffusers' ``CosineDPMSolverMultistepScheduler``, and so is every step,
    given the same noise (Evans et al., "Stable Audio Open", arXiv 2407.14358).

    Parameters
    ----------
    sigma_min, sigma_max, sigma_data : float
        Noise levels and standard deviation of the data.
    sigma_schedule : str
        "exponential" or "karras".
    num_train_timesteps, solver_order, prediction_type, rho, solver_type, lower_order_final
        As in diffusers.
    euler_at_final, final_sigmas_type
        As in diffusers.

    Examples
    --------
    >>> solver = CosineSDESolver()
    >>> solver.set_timesteps(4)
    >>> [round(t, 3) for t in solver.timesteps.tolist()]
    [0.999, 0.985, 0.826, 0.186]
    """

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.3,
        sigma_max: float = 500,
        sigma_data: float = 1.0,
        sigma_schedule: str = "exponential",
        num_train_timesteps: int = 1000,
        solver_order: int = 2,
        prediction_type: str = "v_prediction",
        rho: float = 7.0,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
    ):
        super().__init__(
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            sigma_data=sigma_data,
            sigma_schedule=sigma_schedule,
            num_train_timesteps=num_train_timesteps,
            solver_order=solver_order,
            prediction_type=prediction_type,
            rho=rho,
            algorithm_type="sde-dpmsolver++",
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            final_sigmas_type=final_sigmas_type,
        )

    def precondition_noise(self, sigma):
        """Map a noise level to the time that the model is told.

        Parameters
        ----------
        sigma : torch.Tensor or float
            Noise level.

        Returns
        -------
        torch.Tensor
            2 / π · arctan σ, from 0 to 1.
        """
        return torch.as_tensor(sigma).atan() / np.pi * 2


def resolve(checkpoint):
    """Turn the name of a checkpoint into what diffusers opens.

    Parameters
    ----------
    checkpoint : str or Path
        ``"builtin"``, a folder, or a hub name such as ``cvssp/audioldm-s-full-v2``.

    Returns
    -------
    str
        A folder or the hub name.

    Raises
    ------
    CheckpointError
        If a folder is meant and it is not a diffusers checkpoint.

    Examples
    --------
    >>> resolve("cvssp/audioldm-s-full-v2")
    'cvssp/audioldm-s-full-v2'
    """
    path = BUILTIN_CHECKPOINT if checkpoint == "builtin" else Path(checkpoint)
    if (path / "model_index.json").is_file():
        return str(path)
    hub_like = str(checkpoint).count("/") == 1 and not str(checkpoint).startswith((".", "/", "~"))
    if hub_like and not path.exists():
        return str(checkpoint)
    raise CheckpointError(
        f"{checkpoint}: no model_index.json in {path}. Give a diffusers AudioLDM folder, a hub name, "
        "or 'builtin'; the built-in one is re-made by `python -m soundscapes_utils train-mini`."
    )


def checkpoint_digest(source):
    """Identify a checkpoint by the content of its files, its card apart.

    Parameters
    ----------
    source : str or Path
        Folder of a checkpoint of any kind; or a hub name, which stands for itself.

    Returns
    -------
    str
        16 hexadecimal digits, or the hub name.

    Examples
    --------
    >>> checkpoint_digest("cvssp/audioldm-s-full-v2")
    'cvssp/audioldm-s-full-v2'
    """
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    digest = hashlib.sha256()
    # scores are noted in the card later on, which makes no other model of it
    card = folder / CARD_FILE
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != card):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def checkpoint_info(checkpoint):
    """Read what is known about a checkpoint: what it was trained on, how to sample from it.

    Parameters
    ----------
    checkpoint : str or Path
        As for `load_pipeline`.

    Returns
    -------
    dict
        ``training_dataset, training_folds, sample_rate, clip_s, steps, guidance_scale, eta,
        audio_encoder``; the published values where the checkpoint carries no note of its own.

    Examples
    --------
    >>> checkpoint_info("cvssp/audioldm-s-full-v2")["guidance_scale"]
    3.5
    """
    note = Path(resolve(checkpoint)) / INFO_FILE
    own = json.loads(note.read_text()) if note.is_file() else {}
    return {**HUB_INFO, **own}


def load_pipeline(checkpoint, device=None):
    """Load an AudioLDM pipeline in float32, whatever it was saved in.

    Parameters
    ----------
    checkpoint : str or Path
        ``"builtin"``, a folder in diffusers' layout, or a hub name.
    device : str, optional
        Where to put it; a GPU if there is one.

    Returns
    -------
    diffusers.AudioLDMPipeline
        Ready to call; its progress bar is off.

    Raises
    ------
    CheckpointError
        If the folder is not a checkpoint, or the hub cannot be reached; or if the weights do not fit
        the configuration: the message lists missing, unexpected and mis-shaped keys.

    Examples
    --------
    >>> pipe = load_pipeline("builtin", device="cpu")
    >>> pipe("a dog barking", audio_length_in_s=2.56, num_inference_steps=2).audios.shape
    (1, 40960)
    """
    from diffusers import AudioLDMPipeline

    source = resolve(checkpoint)
    try:
        with quiet():
            parts = _load_parts(source, AudioLDMPipeline.load_config(source))
            pipe = AudioLDMPipeline.from_pretrained(source, dtype=torch.float32, **parts)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be opened as an AudioLDM checkpoint ({_first_line(error)}). "
            "Check the name, and that the hub can be reached (HF_HUB_OFFLINE unset) or its files are "
            "in the local cache."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def cosine_sampler():
    """Let diffusers open Stable Audio's sampler as `CosineSDESolver`.

    Checkpoints name ``CosineDPMSolverMultistepScheduler``, which needs torchsde and draws its noise
    from a Brownian tree of that package. On a fixed grid of steps the tree's increments are
    independent normal numbers; here they come from each clip's own generator.

    Yields
    ------
    None

    Examples
    --------
    >>> with cosine_sampler():
    ...     from diffusers import CosineDPMSolverMultistepScheduler as sampler
    >>> sampler.__name__
    'CosineSDESolver'
    """
    import diffusers

    name = "CosineDPMSolverMultistepScheduler"
    original = getattr(diffusers, name)
    setattr(diffusers, name, CosineSDESolver)
    try:
        yield
    finally:
        setattr(diffusers, name, original)


def _load_parts(source, index):
    """Load the networks one by one: the pipeline would only warn of keys that do not fit."""
    parts, faults = {}, []
    for part in ("unet", "vae", "text_encoder", "vocoder"):
        library, name = index[part]
        if library not in _LIBRARIES:
            continue
        network = getattr(importlib.import_module(library), name)
        parts[part], told = network.from_pretrained(
            source, subfolder=part, dtype=torch.float32, output_loading_info=True
        )
        faults += _faults(part, told)
    _refuse_faults(source, faults)
    return parts


def _faults(part, told, elsewhere=()):
    """List the keys that do not fit, by kind; those that begin as told lie elsewhere rightly."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = (str(key[0] if isinstance(key, tuple) else key) for key in told[f"{kind}_keys"])
        keys = [n for n in names if not n.endswith(_COUNTERS) and not n.startswith(elsewhere)]
        if keys:
            faults.append(f"{part}: {kind} {_some(keys)}")
    return faults


def _refuse_faults(source, faults):
    if faults:
        raise CheckpointError(
            f"{source}: the weights do not fit the configuration ({'; '.join(faults)}). Give a "
            "checkpoint whose parts were saved together, or save it again with save_pretrained."
        )


def _some(keys):
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"{len(keys)} ({', '.join(sorted(keys)[:5])}{more})"


def _first_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


@contextmanager
def quiet():
    """Keep diffusers and transformers silent: no loading bars, no notes, errors only.

    AudioLDM is marked deprecated in diffusers and is what is studied here.

    Yields
    ------
    None

    Examples
    --------
    >>> with quiet():
    ...     pass
    """
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            log.enable_progress_bar()


def waveform_to_mel(y, n_frames):
    """Condition a 16 kHz waveform as AudioLDM's trainer does, and take its log-mel.

    Cut to the length of ``n_frames``, mean removed, peak to 0.5, zero-padded.

    Parameters
    ----------
    y : np.ndarray, float32 [samples]
        Waveform at 16 kHz.
    n_frames : int
        Frames wanted, of 10 ms.

    Returns
    -------
    torch.Tensor, float32 [n_frames, 64]
        Natural-log mel spectrogram.

    Examples
    --------
    >>> waveform_to_mel(np.zeros(16_000, np.float32), 128).shape
    torch.Size([128, 64])
    """
    y = np.asarray(y, np.float64)[: n_frames * HOP]
    y = y - y.mean()
    y = 0.5 * y / max(float(np.abs(y).max()), 1e-8)
    return torch.from_numpy(audio.log_mel(np.pad(y, (0, n_frames * HOP - len(y)))))


def encode_mel(pipe, mel):
    """Encode log-mels into the latent in which the diffusion runs.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives the VAE.
    mel : torch.Tensor [batch, frames, 64]
        Log-mel spectrograms; frames divisible by the VAE's factor.

    Returns
    -------
    torch.Tensor [batch, channels, frames / factor, 64 / factor]
        Scaled latents (the mode of the VAE's posterior), on the CPU.
    """
    with torch.no_grad():
        dist = pipe.vae.encode(mel[:, None].to(pipe.device)).latent_dist
    return (dist.mode() * pipe.vae.config.scaling_factor).cpu()


def decode_latents(pipe, latents):
    """Decode latents to log-mels.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives the VAE.
    latents : torch.Tensor [batch, channels, frames / factor, 64 / factor]
        Scaled latents.

    Returns
    -------
    torch.Tensor [batch, frames, 64]
        Log-mel spectrograms, on the CPU.
    """
    with torch.no_grad():
        return pipe.decode_latents(latents.to(pipe.device))[:, 0].cpu()


def vocode(pipe, mel):
    """Turn log-mels into sound.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives the vocoder.
    mel : torch.Tensor [batch, frames, 64]
        Log-mel spectrograms.

    Returns
    -------
    np.ndarray, float32 [batch, samples]
        Waveforms at the vocoder's rate.
    """
    with torch.no_grad():
        return pipe.mel_spectrogram_to_waveform(mel.to(pipe.device)).numpy()


def embed_text(pipe, texts):
    """Embed texts by the CLAP text tower, as the pipeline does at sampling.

    Long lists go through the tower in passes that fit into memory.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives tokenizer and text tower.
    texts : list of str
        Captions; ``""`` is the unconditional one of classifier-free guidance.

    Returns
    -------
    torch.Tensor, float32 [len(texts), dim]
        Unit-length embeddings.

    Examples
    --------
    >>> embed_text(load_pipeline("builtin", device="cpu"), ["a dog", ""]).shape
    torch.Size([2, 128])
    """
    texts = list(texts)
    size = max(1, _TOKENS_A_PASS // pipe.tokenizer.model_max_length)
    passes = [texts[start : start + size] for start in range(0, len(texts), size)]
    return torch.cat([_embed_pass(pipe, part) for part in passes])


def _embed_pass(pipe, texts):
    tokens = pipe.tokenizer(
        texts,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).to(pipe.device)
    with torch.no_grad():
        hidden = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    return F.normalize(hidden.text_embeds.float(), dim=-1)


@functools.lru_cache(maxsize=2)
def load_audio_tower(checkpoint):
    """Load the CLAP audio tower that belongs to a checkpoint's text tower.

    Parameters
    ----------
    checkpoint : str
        As for `load_pipeline`.

    Returns
    -------
    model : torch.nn.Module
        `AudioTower`, or transformers' ``ClapAudioModelWithProjection``.
    sample_rate : int
        Of the waveforms it wants, Hz.

    Raises
    ------
    CheckpointError
        If the tower is neither in the folder nor in the hub's reach; or if its weights do not fit
        its configuration: the message lists the keys.
    """
    own = Path(resolve(checkpoint)) / "audio_encoder"
    if own.is_dir() and json.loads((own / "config.json").read_text()).get("_class_name"):
        name, network, rate = str(own), AudioTower, SAMPLE_RATE
    else:
        from transformers import ClapAudioModelWithProjection as network

        name = str(own) if own.is_dir() else checkpoint_info(checkpoint)["audio_encoder"]
        rate = 48_000
    try:
        with quiet():
            tower, told = network.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: the CLAP audio tower for {checkpoint} cannot be opened "
            f"({_first_line(error)}). It is about 0.6 GB on the Hugging Face hub."
        ) from error
    _refuse_faults(name, _faults("audio tower", told, _TEXT_HALF))
    return tower.eval(), rate


def embed_audio(waveforms, sample_rate, checkpoint="builtin"):
    """Embed waveforms by a checkpoint's CLAP audio tower.

    Parameters
    ----------
    waveforms : list of np.ndarray, float32 [samples]
        Mono waveforms; each is embedded whole, or its first 10 s by a published CLAP.
    sample_rate : int
        Theirs, Hz.
    checkpoint : str or Path
        As for `load_pipeline`.

    Returns
    -------
    np.ndarray, float32 [len(waveforms), dim]
        Unit-length embeddings, comparable with `embed_text` of the same checkpoint.

    Examples
    --------
    >>> embed_audio([np.random.default_rng(0).normal(size=16_000)], 16_000).shape
    (1, 128)
    """
    tower = load_audio_tower(str(checkpoint))
    return torch.stack([embed_with(tower, y, sample_rate) for y in waveforms]).numpy()


def embed_with(tower, y, sample_rate):
    """Embed one waveform by a loaded audio tower.

    Parameters
    ----------
    tower : tuple
        What `load_audio_tower` returns.
    y : np.ndarray, float32 [samples]
        Mono waveform; a published CLAP hears its first 10 s.
    sample_rate : int
        Its rate, Hz.

    Returns
    -------
    torch.Tensor, float32 [dim]
        Unit-length embedding.
    """
    model, rate = tower
    y = audio.resample(np.asarray(y, np.float32), sample_rate, rate)
    device = next(model.parameters()).device
    with torch.no_grad():
        if isinstance(model, AudioTower):
            return model(waveform_to_mel(y, max(16, len(y) // HOP))[None].to(device))[0].cpu()
        extractor = _clap_features()
        # un-fused CLAP checkpoints accept no other truncation, and that one would crop at random
        features = extractor(
            y[: extractor.nb_max_samples],
            sampling_rate=rate,
            truncation="rand_trunc",
            return_tensors="pt",
        ).to(device)
        return F.normalize(model(**features).audio_embeds[0].float(), dim=-1).cpu()


@functools.lru_cache(maxsize=1)
def _clap_features():
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor()


def build_audioldm_s(device="cpu"):
    """Build the networks of AudioLDM-S in full size, untrained: what the published weights fill.

    Parameters
    ----------
    device : str
        Where; ``"meta"`` builds names and shapes alone, without memory.

    Returns
    -------
    dict of str to object
        ``unet`` (185 million parameters), ``vae`` (55), ``text_encoder`` (125), ``vocoder`` (55) and
        ``audio_encoder`` (28, `HUB_CLAP`'s): networks in the classes that ``AudioLDMPipeline``
        loads; and the ``scheduler``. There is no tokenizer: RoBERTa's comes with a checkpoint.

    Notes
    -----
    Configurations: `AUDIOLDM_S`; transformers' defaults are those of ``laion/clap-htsat-unfused``.

    Examples
    --------
    >>> parts = build_audioldm_s("meta")
    >>> sum(p.numel() for p in parts["unet"].parameters())
    185036552
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import (
        ClapAudioConfig,
        ClapAudioModelWithProjection,
        ClapTextConfig,
        ClapTextModelWithProjection,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
    )

    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(**AUDIOLDM_S["unet"]),
            "vae": AutoencoderKL(**AUDIOLDM_S["vae"]),
            "text_encoder": ClapTextModelWithProjection(ClapTextConfig()),
            "vocoder": SpeechT5HifiGan(SpeechT5HifiGanConfig(**AUDIOLDM_S["vocoder"])),
            "audio_encoder": ClapAudioModelWithProjection(ClapAudioConfig()),
        }
    for network in parts.values():
        network.eval()  # as from_pretrained leaves them
    return {**parts, "scheduler": DDIMScheduler(**AUDIOLDM_S["scheduler"])}


def build_small(texts, seed=0, projection_dim=128, channels=(64, 128, 192)):
    """Build the small AudioLDM, untrained: every piece by the class that diffusers would load.

    Parameters
    ----------
    texts : list of str
        Captions from which the tokenizer learns its vocabulary.
    seed : int
        For the random weights.
    projection_dim : int
        Width of the CLAP embedding.
    channels : sequence of int
        U-Net widths, one a level.

    Returns
    -------
    pipe : AudioLDMPipeline
        With `PatchVAE`, ``ClapTextModelWithProjection``, ``UNet2DConditionModel`` conditioned by
        concatenation with the time embedding (as AudioLDM's), ``DDIMScheduler``, `NoiseVocoder`.
    tower : AudioTower
        The audio half of the CLAP pair.
    """
    from diffusers import AudioLDMPipeline, DDIMScheduler, UNet2DConditionModel
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(texts)
    text = ClapTextModelWithProjection(
        ClapTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            # the pipeline pads the unconditional text to the width of the embedding
            max_position_embeddings=projection_dim + 8,
            projection_dim=projection_dim,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    levels = len(channels)
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=32,
        out_channels=32,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=tuple(channels),
        attention_head_dim=8,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=projection_dim,
        class_embeddings_concat=True,
    )
    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    with quiet():
        pipe = AudioLDMPipeline(PatchVAE(), text, tokenizer, unet, scheduler, NoiseVocoder())
    for part in (text, unet):
        part.eval()  # as from_pretrained leaves them
    pipe.set_progress_bar_config(disable=True)
    return pipe, AudioTower(projection_dim)


def train_tokenizer(texts, vocab_size=800):
    """Train a byte-level BPE tokenizer of RoBERTa's kind on captions.

    Parameters
    ----------
    texts : list of str
        Captions.
    vocab_size : int
        At most so many tokens.

    Returns
    -------
    transformers.RobertaTokenizerFast
        Cuts at 64 tokens.
    """
    import tempfile

    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizerFast

    bpe = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, special_tokens=specials)
    with tempfile.TemporaryDirectory() as folder:
        bpe.save_model(folder)
        return RobertaTokenizerFast.from_pretrained(folder, model_max_length=64)


def save_checkpoint(pipe, out_dir, info, tower=None, half=False, extra=None):
    """Save a pipeline in diffusers' layout with the project's note and audio tower beside it.

    The folder appears whole or not at all.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        What to save.
    out_dir : Path
        Replaced if it exists.
    info : dict
        What `checkpoint_info` returns.
    tower : torch.nn.Module, optional
        As `load_audio_tower` returns it; saved as ``audio_encoder/``.
    half : bool
        Store float16 weights.
    extra : dict of str to str, optional
        Texts of further files, by file name.

    Returns
    -------
    Path
        ``out_dir``.
    """
    out_dir = Path(out_dir)
    part, old = (out_dir.with_name(out_dir.name + end) for end in (".part", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    if half:
        pipe, tower = copy.deepcopy((pipe, tower))  # rounding must not reach the caller's weights
    dtype = torch.float16 if half else torch.float32
    with quiet():
        pipe.to(dtype=dtype).save_pretrained(part)
        if tower is not None:
            tower.to(dtype).save_pretrained(part / "audio_encoder")
    _forget_places(part)
    for name, text in {INFO_FILE: json.dumps(info, indent=2) + "\n", **(extra or {})}.items():
        (part / name).write_text(text)
    shutil.rmtree(old, ignore_errors=True)
    if out_dir.exists():
        out_dir.rename(old)
    part.rename(out_dir)
    shutil.rmtree(old, ignore_errors=True)
    return out_dir


def _forget_places(folder):
    # diffusers notes the folder that a part came from: another machine has no use for it
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if content.pop("_name_or_path", None):
            path.write_text(json.dumps(content, indent=2) + "\n")
