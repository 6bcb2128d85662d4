"""AudioLDM, AudioLDM 2 and CLAP: open them, build a small pair, encode, decode, embed, save.

A checkpoint is a folder (or hub name) in diffusers' AudioLDM layout: a VAE that makes a log-mel small,
a U-Net that denoises it there, a vocoder that makes sound of a log-mel, and the text tower of a CLAP
whose audio tower lies next to it; of AudioLDM 2, a whole CLAP, a T5 and a GPT-2. The small model that
comes with the project keeps AudioLDM's layout; two of its parts are defined here, because at its size
nothing published fits: a *linear* latent instead of a convolutional autoencoder, and a vocoder that
needs no training.
"""

import copy
import functools
import importlib
import itertools
import json
import re
import shutil
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from . import audio, captions, datasets, store

SAMPLE_RATE = 16_000
HOP = 160
N_MELS = 64
BUILTIN_CHECKPOINT = Path(__file__).resolve().parents[1] / "data" / "checkpoints" / "mini-audioldm"
INFO_FILE = "soundscapes.json"
CARD_FILE = "README.md"
HUB_CLAP = "laion/clap-htsat-unfused"
# the pipelines that can be trained, with what is trained where nothing else is asked
PIPELINES = {"AudioLDMPipeline": "full", "AudioLDM2Pipeline": "lora"}
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # as diffusers names it
HUB_INFO = {"training_dataset": "AudioCaps, AudioSet, BBC Sound Effects, Freesound", "heard": {}}
HUB_INFO |= {"sample_rate": SAMPLE_RATE, "clip_s": 10.24, "steps": 200, "guidance_scale": 3.5}
HUB_INFO |= {"eta": 0.0, "audio_encoder": HUB_CLAP}
# the libraries whose classes a checkpoint's model_index.json may name, and where these are
_LIBRARIES = {name: name for name in ("diffusers", "transformers", "soundscapes_utils.ldm")}
_LIBRARIES["audioldm2"] = "diffusers"
_NETWORKS = ("unet", "vae", "text_encoder", "vocoder")
_NETWORKS += ("text_encoder_2", "projection_model", "language_model")
# tensors without knowledge in them, which some releases of transformers save and others do not
_COUNTERS = ("position_ids", "token_type_ids", "num_batches_tracked", "relative_position_index")
# the keys of each half of a published CLAP, without which the other half is opened
_TEXT_HALF = ("text_model.", "text_projection.", "logit_scale")
_AUDIO_HALF = ("audio_model.", "audio_projection.", "logit_scale")
_TOKENS_PER_PASS = 2**17  # of captions, in the text tower
_SAME_DIRECTION = 0.99  # cosine of a text by both towers of a pair, but for rounding
TRIES = 4  # random positions, of which a segment is the loudest
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_KNOWN = store.read_table(Path(__file__).with_name("checkpoints.csv")).set_index("checkpoint")


class CheckpointError(store.DataError):
    """A checkpoint that is missing, incomplete or of the wrong kind."""


# --- open ----------------------------------------------------------------------------------------


def local_folder(name):
    """Find the folder that "builtin" or a path means; relative ones lie in the project, else here."""
    path = BUILTIN_CHECKPOINT if name == "builtin" else store.project_path(name)
    return path if path.exists() else Path(name)


def resolve(checkpoint):
    """Turn ``"builtin"``, a folder or a hub name into what diffusers opens: a folder or a hub name."""
    path = local_folder(checkpoint)
    if (path / "model_index.json").is_file():
        return str(path)
    hub_like = str(checkpoint).count("/") == 1 and not str(checkpoint).startswith((".", "/", "~"))
    if hub_like and not path.exists():
        return str(checkpoint)
    raise CheckpointError(
        f"{checkpoint}: no model_index.json in {path}. Give a diffusers AudioLDM folder, a hub name, "
        "or 'builtin'; the built-in one is made by `python -m soundscapes_utils train-mini`."
    )


def checkpoint_info(checkpoint):
    """Read what is known about a checkpoint, or published where it has no note.

    ``training_dataset`` in words; ``heard``, the folds that it was trained on by data set, as in
    ``{"esc10": [2, 3, 4]}``; ``sample_rate, clip_s, steps, guidance_scale, eta, audio_encoder``.
    """
    note = Path(resolve(checkpoint)) / INFO_FILE
    try:
        info = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        folds = info.pop("training_folds", [])
        if "heard" not in info and folds:  # notes from before there was this entry
            names = info["training_dataset"].split(";")
            info["heard"] = {name.strip().removeprefix("mixes of "): folds for name in names}
        datasets.format_heard(info.get("heard", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{note}: damaged ({error!r}); copy or make it again") from error
    public = {"audio_encoder": HUB_CLAP, "trained_on": HUB_INFO["training_dataset"]}
    tower, data = (_KNOWN[key].get(str(checkpoint)) or usual for key, usual in public.items())
    return {**HUB_INFO, "audio_encoder": tower, "training_dataset": data, **info}


def licence(checkpoint):
    """The licence of a checkpoint: as is known of a public one, or as its card says."""
    card = local_folder(checkpoint) / CARD_FILE
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    said = [line.removeprefix("license:").strip() for line in lines if line.startswith("license:")]
    return _KNOWN["licence"].get(str(checkpoint), (said or ["unknown"])[0])


def checkpoint_digest(source):
    """Identify a checkpoint by its files, but for card and note; a hub name stands for itself."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    notes = {folder / CARD_FILE, folder / INFO_FILE}
    files = [path for path in store.walk_files(folder) if path not in notes]
    digests = [(path.relative_to(folder).as_posix(), store.file_digest(path)) for path in files]
    return store.content_key(digests)


def load_pipeline(checkpoint, device=None):
    """Load a pipeline of AudioLDM or AudioLDM 2 in float32, whatever it was saved in.

    `checkpoint` is "builtin", a folder or a hub name; `device` by default a GPU if there is one.

    Raises
    ------
    CheckpointError
        The folder is not a checkpoint, the hub cannot be reached, or the weights do not fit the
        configuration: the message lists missing, unexpected and mis-shaped keys.

    Examples
    --------
    >>> pipe = load_pipeline("builtin", device="cpu")
    >>> pipe("a dog barking", audio_length_in_s=2.56, num_inference_steps=2).audios.shape
    (1, 40960)
    """
    import diffusers

    source, index, parts = resolve(checkpoint), pipeline_index(checkpoint, *PIPELINES), {}
    with opening(checkpoint, "an AudioLDM checkpoint"):
        # the networks one by one: the pipeline would only warn of keys that do not fit
        for part in _NETWORKS:
            library, name = index.get(part, ("", ""))
            if library in _LIBRARIES:
                # the pipeline calls what GPT-2 has only with its head, and is published without
                name = "GPT2LMHeadModel" if name == "GPT2Model" else name
                network = getattr(importlib.import_module(_LIBRARIES[library]), name)
                parts[part] = _load_network(network, source, part)
        kind = getattr(diffusers, index["_class_name"])
        pipe = kind.from_pretrained(source, dtype=torch.float32, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def pipeline_index(checkpoint, *kinds):
    """Read a pipeline's ``model_index.json``; one of another class than `kinds` is refused by name."""
    from diffusers import DiffusionPipeline

    with opening(checkpoint, "a pipeline of diffusers"):
        index = DiffusionPipeline.load_config(resolve(checkpoint))
        found = index.get("_class_name")
    if any(kinds) and found not in kinds:
        raise CheckpointError(f"{checkpoint}: is an {found}; {' or '.join(kinds)} is needed here")
    return index


def weight_options(source, parts):
    """Say how the weights in a folder's `parts` are opened: never pickled, as the variant they are."""
    options = {}
    for part in parts:
        files = [path.name for path in Path(source, part).glob("*.*")]
        names = [name for name in files if name.endswith(".safetensors")]
        if pickled := [name for name in files if name.endswith(_PICKLED) and not names]:
            raise CheckpointError(
                f"{Path(source, part, pickled[0])}: pickled weights, which can run any code as they are "
                "opened; give safetensors, as save_pretrained writes them"
            )
        variants = [re.search(r"\.(fp16|bf16|fp32)[.-]", name) for name in names]
        if names and all(variants):
            options["variant"] = variants[0][1]
    return options


@contextmanager
def opening(name, what):
    """Say what could not be opened and what to do, whichever library found it."""
    try:
        with quiet():
            yield
    except store.DataError:
        raise
    except Exception as error:  # libraries have errors of their own for what is damaged
        raise CheckpointError(
            f"{name}: cannot be opened as {what} ({str(error).strip().partition(chr(10))[0][:200]}). "
            "Check the name, that its licence is accepted on the hub where it asks for that, and that "
            "the hub can be reached (HF_HUB_OFFLINE unset) or its files are in the local cache."
        ) from error


def _load_network(network, source, part, elsewhere=()):
    """Load one network; keys that begin as `elsewhere` says rightly belong to another one."""
    options = {"subfolder": part, "dtype": torch.float32, **weight_options(source, [part])}
    model, info = network.from_pretrained(source, output_loading_info=True, **options)
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = (str(key[0] if isinstance(key, tuple) else key) for key in info[f"{kind}_keys"])
        keys = [n for n in names if not n.endswith(_COUNTERS) and not n.startswith(elsewhere)]
        if keys:
            shown = ", ".join(sorted(keys)[:5])
            faults.append(f"{kind} {len(keys)} ({shown}{', …' if len(keys) > 5 else ''})")
    if faults:
        raise CheckpointError(
            f"{source}: the weights of {part or network.__name__} do not fit the configuration "
            f"({'; '.join(faults)}). Give a checkpoint whose parts were saved together, or save it "
            "again with save_pretrained."
        )
    return model.eval()


@contextmanager
def quiet():
    """Keep diffusers and transformers silent: no loading bars, notes or questions, errors only."""
    from diffusers.utils import logging as diffusers_log
    from transformers import dynamic_module_utils as foreign_code
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [log.get_verbosity() for log in logs]
    # without time for an answer nobody is asked whether a checkpoint's own code may run: it may not
    patience, foreign_code.TIME_OUT_REMOTE_CODE = foreign_code.TIME_OUT_REMOTE_CODE, 0
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        foreign_code.TIME_OUT_REMOTE_CODE = patience
        for log, verbosity in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            log.enable_progress_bar()


class Clap:
    """Towers that give texts and sounds of one meaning the same direction; read when asked for."""

    def __init__(self, text, audio_part):
        self._text, self._audio = text, audio_part  # (folder or hub name, subfolder)

    @functools.cached_property
    def tokenizer(self):
        """Turns texts into the text tower's input; cuts at the tower's length."""
        from transformers import AutoTokenizer

        source, part = self._text
        options = {"subfolder": "tokenizer" if part else "", "trust_remote_code": False}
        with opening(source, "a CLAP text tower"):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # tokenizers without a limit name 10³⁰; the tower's own counts two places for padding
        limit = self.text_encoder.config.max_position_embeddings - 2
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        return tokenizer

    @functools.cached_property
    def text_encoder(self):
        """The text tower, on the CPU."""
        from transformers import ClapTextModelWithProjection

        with opening(self._text[0], "a CLAP text tower"):
            return _load_network(ClapTextModelWithProjection, *self._text, _AUDIO_HALF)

    @functools.cached_property
    def audio_encoder(self):
        """The audio tower, on the CPU."""
        from transformers import ClapAudioModelWithProjection

        source, part = self._audio
        with opening(source, "a CLAP audio tower (0.6 GB on the Hugging Face hub)"):
            network = ClapAudioModelWithProjection if self.extractor else AudioTower
            model = _load_network(network, source, part, _TEXT_HALF)
            if self._audio != self._text:
                self._check_pair(model.config.projection_dim)
        if getattr(model.config, "enable_fusion", False):
            raise CheckpointError(
                f"{source}: a fused CLAP, which takes random crops of a clip and gives another row "
                f"each time; take an un-fused one such as {HUB_CLAP}"
            )
        return model

    def _check_pair(self, width):
        """Refuse an audio tower that was trained with another text tower than this one."""
        (source, _), config = self._audio, Path(*self._text, "config.json")
        if source == self._text[0]:  # saved together: of the text tower no more than this is opened
            own = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            fits = own.get("projection_dim", width) == width
        elif fits := width == self.text_encoder.config.projection_dim:
            texts = [row["phrase"] for row in captions.EVENTS.values()][:10]
            ours, theirs = (embed_text(c, texts) for c in (self, Clap(self._audio, self._audio)))
            fits = float((ours * theirs).sum(dim=1).min()) >= _SAME_DIRECTION
        if not fits:
            raise CheckpointError(
                f"{source}: its texts lie elsewhere than those of {self._text[0]}: the towers were not "
                f"trained together. Name the right CLAP as audio_encoder in its {INFO_FILE}."
            )

    @functools.cached_property
    def extractor(self):
        """The front end of a published audio tower, as its file says, else LAION's; None of a small."""
        from transformers import ClapFeatureExtractor

        source, part = self._audio
        config, own = (Path(source, part, f"{kind}config.json") for kind in ("", "preprocessor_"))
        with opening(source, "a CLAP audio tower"):
            if config.is_file() and "_class_name" in json.loads(config.read_text(encoding="utf-8")):
                return None
            try:
                return ClapFeatureExtractor.from_pretrained(source, subfolder=part)
            except OSError:
                if own.exists():
                    raise
                # LAION's front end begins at 50 Hz, the default of transformers at 0
                return ClapFeatureExtractor(frequency_min=50)

    @property
    def front_end(self):
        """What is done to a waveform before the audio tower, as text: for keys of what is cached."""
        return self.extractor.to_json_string() if self.extractor else "log-mel of AudioLDM"

    @property
    def sample_rate(self):
        """Hz, of the waveforms that the audio tower takes."""
        return self.extractor.sampling_rate if self.extractor else SAMPLE_RATE

    @property
    def device(self):
        """Where the text tower is."""
        return next(self.text_encoder.parameters()).device


@functools.lru_cache(maxsize=2)
def load_clap(name="builtin"):
    """Open the pair that conditions a checkpoint of AudioLDM, or a CLAP of transformers, as a `Clap`.

    Names are of folders or of the hub. A tower that does not open or fit raises `CheckpointError`.
    """
    folder = local_folder(name)
    whole = (folder / "config.json").is_file()
    if not folder.exists():
        resolve(name)
        try:  # on the hub
            pipeline_index(name)
        except CheckpointError:
            whole = True
    if whole:
        return Clap((str(folder), ""), (str(folder), ""))
    source = resolve(name)
    if pipeline_index(name).get("_class_name") == "AudioLDM2Pipeline":
        tower = source, "text_encoder"  # which is both of them
    elif (folder / "audio_encoder").is_dir():
        tower = source, "audio_encoder"
    else:
        tower = str(local_folder(checkpoint_info(name)["audio_encoder"])), ""
    return Clap((source, "text_encoder"), tower)


# --- encode, decode, embed -----------------------------------------------------------------------


def waveform_to_mel(y, n_frames):
    """Condition a 16 kHz waveform as AudioLDM's trainer does; give its log-mel [n_frames, 64].

    Cut to the length of ``n_frames`` (10 ms each), mean removed, peak to 0.5, zero-padded.
    """
    y = np.asarray(y, np.float64)[: n_frames * HOP]
    y = y - y.mean()
    y = 0.5 * y / max(float(np.abs(y).max()), 1e-8)
    return torch.from_numpy(audio.log_mel(np.pad(y, (0, n_frames * HOP - len(y)))))


@torch.no_grad()
def encode_mel(pipe, mel):
    """Encode log-mels [batch, frames, 64] to scaled modes of the VAE [batch, channels, time, mel]."""
    dist = pipe.vae.encode(mel[:, None].to(pipe.device)).latent_dist
    return (dist.mode() * pipe.vae.config.scaling_factor).cpu().contiguous()


@torch.no_grad()
def decode_latents(pipe, latents):
    """Decode scaled latents, as `encode_mel` gives them, to log-mels on the CPU."""
    latents = 1 / pipe.vae.config.scaling_factor * latents.to(pipe.device)
    return pipe.vae.decode(latents).sample[:, 0].cpu()


@torch.no_grad()
def vocode(pipe, mel):
    """Turn log-mels [batch, frames, 64] into waveforms: float32 [batch, samples]."""
    return pipe.mel_spectrogram_to_waveform(mel.to(pipe.device)).numpy()


def embed_text(clap, texts):
    """Embed texts by the text tower of a `Clap` or pipeline: unit rows, float32, on the CPU.

    ``""`` is the unconditional text of classifier-free guidance.
    """
    texts, length = list(texts), clap.tokenizer.model_max_length
    size = max(1, _TOKENS_PER_PASS // length)
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    rows = []
    for start in range(0, len(texts), size):
        tokens = clap.tokenizer(texts[start : start + size], return_tensors="pt", **options)
        tokens = tokens.to(clap.device)
        with torch.no_grad():
            out = clap.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        rows.append(F.normalize(out.text_embeds.float(), dim=-1).cpu())
    return torch.cat(rows)


@torch.no_grad()
def embed_audio(clap, waveforms, sample_rate):
    """Embed mono waveforms by the audio tower of a `Clap`: unit rows, float32, on the CPU.

    Each is embedded whole, or its first 10 s by a published CLAP.
    """
    tower, rows = clap.audio_encoder, []
    device = next(tower.parameters()).device
    for y in waveforms:
        y = audio.resample(np.asarray(y, np.float32), sample_rate, clap.sample_rate)
        if isinstance(tower, AudioTower):
            row = tower(waveform_to_mel(y, max(16, len(y) // HOP))[None].to(device))
        else:
            # un-fused checkpoints accept no other truncation, and that one would crop at random
            options = {"truncation": "rand_trunc", "padding": "repeatpad", "return_tensors": "pt"}
            y = y[: clap.extractor.nb_max_samples]
            features = clap.extractor(y, sampling_rate=clap.sample_rate, **options)
            row = tower(input_features=features["input_features"].to(device)).audio_embeds
            row = F.normalize(row.float(), dim=-1)
        rows.append(row[0].cpu())
    return torch.stack(rows)


def set_trainable(unet, config):
    """Freeze what a `FinetuneConfig` does not train; add its adapters."""
    if config.train == "full":
        return
    unet.requires_grad_(False)
    for name, value in unet.named_parameters():
        value.requires_grad_(".attn" in name)
    if not any(value.requires_grad for value in unet.parameters()):
        raise CheckpointError(f"train={config.train!r}: this U-Net has no attention layers")
    if config.train == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        parts = ["to_q", "to_k", "to_v", "to_out.0"]
        sizes = {"r": config.lora_rank, "lora_alpha": config.lora_rank}
        adapters = LoraConfig(**sizes, init_lora_weights="gaussian", target_modules=parts)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            inject_adapter_in_model(adapters, unet)  # which freezes all the rest


def checkpoint_gradients(unet):
    """Let a U-Net compute parts of its forward pass twice, which takes less memory.

    As diffusers does, but that its AudioLDM 2 (0.42) gives the mask of a text as that of the sound.
    """
    from diffusers import Transformer2DModel

    def compute(module, hidden, other, *rest):
        if isinstance(module, Transformer2DModel):
            module, rest = functools.partial(module, encoder_attention_mask=rest[-1]), ()
        return checkpoint(module, hidden, other, *rest, use_reentrant=False)

    unet.enable_gradient_checkpointing(compute)


def merge_adapters(unet):
    """Add a U-Net's adapters to its weights; return them as the content of diffusers' file for them."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}
    content = save({name: value.cpu().contiguous() for name, value in adapters.items()})
    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(unet)
    return content


# --- the parts of the small model ----------------------------------------------------------------


class PatchVAE(ModelMixin, ConfigMixin):
    """Linear latent of a log-mel: whitened principal components of 8 × 8 patches.

    It has the interface of diffusers' ``AutoencoderKL``. Being linear, it is fitted in closed form. The
    length of ``block_out_channels`` tells the pipeline how far it reduces time and mel.
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
        """Set the latent from log-mels [clips, frames, 64] by principal component analysis."""
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
        """Encode log-mels [batch, 1, frames, 64]; the variance of ``latent_dist`` is negligible."""
        centred = self._patches(x) - self.mean[:, None, None]
        z = torch.einsum("bdtf,cd->bctf", centred, self.components) / self.scale[:, None, None]
        dist = DiagonalGaussianDistribution(torch.cat([z, torch.full_like(z, -30.0)], dim=1))
        return AutoencoderKLOutput(latent_dist=dist) if return_dict else (dist,)

    def decode(self, z, return_dict=True):
        """Decode latents [batch, latent_channels, frames / 8, 8] to log-mels."""
        scaled = z * self.scale[:, None, None]
        rows = torch.einsum("bctf,cd->bdtf", scaled, self.components) + self.mean[:, None, None]
        mel = F.pixel_shuffle(rows, self.config.patch)
        return DecoderOutput(sample=mel) if return_dict else (mel,)


class NoiseVocoder(ModelMixin, ConfigMixin):
    """Vocoder without training: white noise, its bins scaled until the mel spectrogram fits.

    Environmental sound is mostly texture, so the phase of noise serves it better than the phase that
    Griffin-Lim finds. The noise is the same for every clip and every call: same mel, same bytes.
    The product of ``upsample_rates`` is the hop, where ``AudioLDMPipeline`` looks for it.
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
        """Turn log-mels [batch, frames, 64] into waveforms [batch, frames · hop]."""
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
    """Audio half of the small CLAP: convolutions over the log-mel, each of which halves its sides."""

    @register_to_config
    def __init__(self, projection_dim: int = 128, channels: tuple = (24, 48, 96, 128)):
        super().__init__()
        self.stages = nn.Sequential()
        for a, b in itertools.pairwise([1, *channels]):
            convolution = nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)
            self.stages.append(nn.Sequential(convolution, nn.BatchNorm2d(b), nn.ReLU()))
        bands = N_MELS // 2 ** len(channels)
        self.projection = nn.Linear(2 * bands * channels[-1], projection_dim)

    def forward(self, mel):
        """Embed log-mels [batch, frames, 64] of at least 16 frames to unit length."""
        h = self.stages((mel[:, None] + 5.0) / 3.0).movedim(2, -1).flatten(1, 2)
        return F.normalize(self.projection(torch.cat([h.mean(-1), h.amax(-1)], dim=1)), dim=-1)


# --- build and save -------------------------------------------------------------------------------


def build_small(texts, seed=0, projection_dim=128, channels=(64, 128, 192)):
    """Build the small AudioLDM, untrained: every part by the class that diffusers would load.

    The tokenizer learns its vocabulary from `texts`; `channels` are the U-Net's widths, one per level,
    `projection_dim` the width of the CLAP embedding. Returns the pipeline (`PatchVAE`, a U-Net
    conditioned as AudioLDM's, `NoiseVocoder`), and the `AudioTower` of its CLAP pair.
    """
    from diffusers import AudioLDMPipeline, DDIMScheduler, UNet2DConditionModel
    from transformers import ClapTextConfig, ClapTextModelWithProjection

    sizes = json.loads(Path(__file__).with_name("small_audioldm.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    tokenizer = _train_tokenizer(texts)
    config = ClapTextConfig(
        **sizes["text_encoder"],
        vocab_size=len(tokenizer),
        max_position_embeddings=projection_dim + 8,  # the pipeline pads the unconditional text so far
        projection_dim=projection_dim,
        **{name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    )
    text, plain = ClapTextModelWithProjection(config), len(channels) - 1
    unet = UNet2DConditionModel(
        **sizes["unet"],
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        block_out_channels=tuple(channels),
        cross_attention_dim=tuple(channels),
        projection_class_embeddings_input_dim=projection_dim,
    )
    ends = DDIMScheduler(**sizes["scheduler"]), NoiseVocoder()
    with quiet():
        pipe = AudioLDMPipeline(PatchVAE(), text.eval(), tokenizer, unet.eval(), *ends)
    pipe.set_progress_bar_config(disable=True)
    return pipe, AudioTower(projection_dim)


def _train_tokenizer(texts, vocab_size=800):
    """Train a byte-level BPE tokenizer of RoBERTa's kind, which cuts at 64 tokens."""
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
    """Save a pipeline in diffusers' layout, its note and its audio tower next to it.

    The folder appears whole or not at all, and replaces one that is there. `info` is what
    `checkpoint_info` returns, `tower` a CLAP's audio tower (``audio_encoder/``), `extra` the content of
    further files by name; `half` stores float16 weights. Returns the folder.
    """
    out_dir = Path(out_dir)
    own = f".{uuid.uuid4().hex[:8]}"  # two writers of one folder must not share a half-written one
    part, old = (out_dir.with_name(f".{out_dir.name}{own}.{end}") for end in ("part", "old"))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    if half:
        pipe, tower = copy.deepcopy((pipe, tower))  # rounding must not reach the caller's weights
    dtype = torch.float16 if half else torch.float32
    try:
        with quiet():
            pipe.to(dtype=dtype).save_pretrained(part)
            if tower is not None:
                tower.to(dtype).save_pretrained(part / "audio_encoder")
        for path in part.rglob("*.json"):
            # diffusers notes the folder that a part came from: another machine has no use for it
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("_name_or_path", None):
                path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name, content in {INFO_FILE: json.dumps(info, indent=2) + "\n", **(extra or {})}.items():
            store.write_atomic(part / name, content)
        with suppress(FileNotFoundError):
            out_dir.rename(old)
        part.rename(out_dir)
    finally:
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
    return out_dir
