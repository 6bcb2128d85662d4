"""The trainer: AudioLDM's U-Net on the latents of captioned sounds, under the CLAP condition.

Latents and embeddings are computed once and cached, so that the loop sees only the U-Net. What is
drawn at a step (clips, noise, timesteps, dropped conditions) follows from the seed and the number of
the step alone: a run that was killed continues the sequence it would have had.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import audio, ldm, metadata


class TrainingError(RuntimeError):
    """Training that cannot start or go on."""


@dataclass(frozen=True)
class FinetuneConfig:
    """What `finetune` is to do.

    Parameters
    ----------
    checkpoint : str
        Where to start: ``"embedded"``, a diffusers AudioLDM folder or a hub name.
    dataset_root : str
        ``dataset_root.json`` of an AudioCaps-format set (see `metadata.write_audiocaps`).
    out_dir : str
        Becomes a diffusers folder; the resumable state lies beside it.
    steps, batch_size : int
        Optimiser steps, and segments in each.
    learning_rate : float
        Peak rate of AdamW.
    warmup_steps : int
        Steps of linear warm-up.
    decay_start : float
        Fraction of the steps after which the rate falls to zero on a cosine; 1 keeps it constant, as
        the baseline trainer does.
    ema_decay : float
        Of the exponential moving average of the weights, which is what is saved.
    text_condition_probability : float
        How often the condition is the caption's text embedding, not the audio embedding.
    condition_dropout : float
        How often the condition is that of the empty text, for classifier-free guidance.
    segment_s : float
        Length of a training segment, seconds; rounded to what the U-Net can halve.
    segments_per_clip : int
        Segments cached for each clip, each the loudest of ``loudest_of`` random positions.
    loudest_of : int
        1 draws segments uniformly.
    val_every : int
        Steps between validations and saved states.
    val_segments : int
        At most so many validation segments, each at its own fixed timestep and noise.
    keep_best : bool
        Save the averaged weights of the lowest validation loss (default), or the last ones.
    seed : int
        For everything that is drawn.
    info : dict
        Entries for the checkpoint's note, such as ``training_dataset`` and ``training_folds``.
    """

    checkpoint: str
    dataset_root: str
    out_dir: str
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_start: float = 1.0
    ema_decay: float = 0.99
    text_condition_probability: float = 0.5
    condition_dropout: float = 0.1
    segment_s: float = 2.56
    segments_per_clip: int = 2
    loudest_of: int = 4
    val_every: int = 50
    val_segments: int = 64
    keep_best: bool = True
    seed: int = 0
    info: dict = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` made.

    Parameters
    ----------
    checkpoint : Path
        Diffusers folder that ``AudioLDMPipeline.from_pretrained`` opens.
    log : pandas.DataFrame
        ``step, train_loss, val_loss, val_loss_ema, learning_rate, grad_norm, seconds``.
    best_step : int
        Of the lowest validation loss of the averaged weights.
    """

    checkpoint: Path
    log: pd.DataFrame
    best_step: int


def finetune(config):
    """Train the U-Net of a checkpoint on captioned sounds; resume where a killed run stopped.

    Parameters
    ----------
    config : FinetuneConfig
        The same configuration and data continue or return what is there; others start anew.

    Returns
    -------
    FinetuneResult
        The averaged weights in diffusers' format, and the log.

    Raises
    ------
    TrainingError
        If the set has no training or validation clips, or the loss is no longer finite.
    ldm.CheckpointError
        If the checkpoint cannot be opened.

    Notes
    -----
    The objective is L(θ) of AudioLDM (arXiv 2301.12503, eq. 4) for ε-prediction checkpoints; a
    checkpoint that predicts the latent itself (``prediction_type="sample"``) is weighted by its SNR
    clamped to [0.25, 4] (as min-SNR, arXiv 2303.09556, bounds it).

    Examples
    --------
    >>> config = FinetuneConfig("embedded", "set/dataset_root.json", "out", steps=100)
    >>> finetune(config).log.tail(1)  # doctest: +SKIP
    """
    out_dir = Path(config.out_dir)
    clips = _read_clips(config)
    key = _run_key(config, clips)
    done = _finished(out_dir, key)
    if done:
        return done
    pipe = ldm.load_pipeline(config.checkpoint)
    cache = prepare(pipe, clips, config, out_dir.with_name(out_dir.name + ".cache"))
    state_file = out_dir.with_name(out_dir.name + ".state.safetensors")
    run = _Run(pipe, cache, config)
    run.restore(state_file, key)
    run.train(state_file, key)
    if config.keep_best:
        pipe.unet.load_state_dict(run.best)
    else:
        pipe.unet.load_state_dict(run.ema)
    _save_result(pipe, run, config, key)
    state_file.unlink(missing_ok=True)
    return _finished(out_dir, key)


def _read_clips(config):
    clips = metadata.read_audiocaps(config.dataset_root)
    for split in ("train", "val"):
        if not (clips["split"] == split).any():
            raise TrainingError(
                f"{config.dataset_root}: no clips in its split {split!r}; fine-tuning needs train and "
                "val (see metadata.write_audiocaps)"
            )
    return clips[clips["split"].isin(["train", "val"])].reset_index(drop=True)


def _run_key(config, clips):
    """Identity of a run: its settings without places, its sounds by content, its checkpoint."""
    digest = hashlib.sha256()
    settings = asdict(config)
    for place in ("out_dir", "dataset_root", "checkpoint"):
        settings.pop(place)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    digest.update(ldm.checkpoint_digest(ldm.resolve(config.checkpoint)).encode())
    captions = clips[["split", *_caption_columns(clips)]].fillna("")
    digest.update(captions.to_csv(index=False).encode())
    for path in clips["path"]:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _finished(out_dir, key):
    note = out_dir / "training.json"
    if not note.is_file():
        return None
    told = json.loads(note.read_text())
    if told["key"] != key:
        return None
    return FinetuneResult(out_dir, pd.DataFrame(told["log"]), told["best_step"])


def _save_result(pipe, run, config, key):
    info = {**ldm.checkpoint_info(config.checkpoint), **config.info}
    tower = ldm.load_audio_tower(str(config.checkpoint))[0]
    own_tower = tower if isinstance(tower, ldm.AudioTower) else None
    training = {"key": key, "best_step": run.best_step, "config": asdict(config), "log": run.log}
    for place in ("out_dir", "dataset_root", "checkpoint"):
        training["config"][place] = Path(training["config"][place]).name
    pipe.unet.eval()
    ldm.save_checkpoint(
        pipe, config.out_dir, info, own_tower, extra={"training.json": json.dumps(training)}
    )


def _caption_columns(clips):
    return [name for name in clips.columns if name.startswith("caption")]


def prepare(pipe, clips, config, cache_dir):
    """Compute, or read from the cache, all that the loop needs: latents and embeddings.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Gives VAE and text tower.
    clips : pandas.DataFrame
        ``split, path, caption, caption_2, …``.
    config : FinetuneConfig
        Gives segment length, number and seed, and the checkpoint of the audio tower.
    cache_dir : Path
        One file for each split; named by the content that it was made from.

    Returns
    -------
    dict of str to dict of torch.Tensor
        For ``"train"`` and ``"val"``: ``latents`` [segments, channels, time, mel], ``audio``
        [segments, dim], ``clip`` [segments], ``text`` [clips, captions, dim] (zero where a clip has
        fewer captions), ``n_text`` [clips]; and ``empty`` [1, dim].
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    settings = [config.segment_s, config.segments_per_clip, config.loudest_of, config.seed]
    prefix = f"{ldm.checkpoint_digest(ldm.resolve(config.checkpoint))}{settings}"
    prepared = {}
    for split in ("train", "val"):
        rows = clips[clips["split"] == split].reset_index(drop=True)
        content = prefix + rows[_caption_columns(rows)].fillna("").to_csv(index=False)
        digest = hashlib.sha256(content.encode())
        for path in rows["path"]:
            digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
        file = cache_dir / f"{split}-{digest.hexdigest()[:16]}.safetensors"
        if not file.is_file():
            _write_tensors(_prepare_split(pipe, rows, config), file)
        prepared[split] = load_file(file)
    return prepared


def _prepare_split(pipe, rows, config):
    from tqdm.auto import tqdm

    frames = _segment_frames(pipe, config.segment_s)
    tower = ldm.load_audio_tower(str(config.checkpoint))
    latents, embeddings, owner = [], [], []
    for i, path in enumerate(tqdm(rows["path"], desc="latents", disable=None, leave=False)):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        for _ in range(config.segments_per_clip):
            segment = loudest(y, frames * ldm.HOP, config.loudest_of, rng)
            mel = ldm.waveform_to_mel(segment, frames)
            latents.append(ldm.encode_mel(pipe, mel[None])[0].cpu())
            embeddings.append(ldm.embed_with(tower, segment, ldm.SAMPLE_RATE))
            owner.append(i)
    texts = [[t for t in row if isinstance(t, str) and t] for row in _captions(rows)]
    widest = max(len(row) for row in texts)
    padded = [row + [""] * (widest - len(row)) for row in texts]
    distinct = sorted({text for row in padded for text in row} | {""})
    table = dict(zip(distinct, ldm.embed_text(pipe, distinct).cpu(), strict=True))
    return {
        "latents": torch.stack(latents).contiguous(),
        "audio": torch.stack(embeddings),
        "clip": torch.tensor(owner),
        "text": torch.stack([torch.stack([table[text] for text in row]) for row in padded]),
        "n_text": torch.tensor([len(row) for row in texts]),
        "empty": table[""][None].clone(),
    }


def _captions(rows):
    return rows[_caption_columns(rows)].to_numpy().tolist()


def _segment_frames(pipe, segment_s):
    # each of the U-Net's levels but the last halves the latent once more
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    return max(1, round(segment_s * ldm.SAMPLE_RATE / ldm.HOP / unit)) * unit


def loudest(y, n, tries, rng):
    """Cut the loudest of a few random segments out of a signal.

    Events are short and recordings long: a segment drawn blindly would often hold none.

    Parameters
    ----------
    y : np.ndarray [samples]
        Signal.
    n : int
        Samples of a segment; a shorter signal is returned whole.
    tries : int
        Positions drawn; 1 cuts blindly.
    rng : np.random.Generator
        Draws the positions.

    Returns
    -------
    np.ndarray [min(n, samples)]
        The segment with the largest energy.

    Examples
    --------
    >>> loudest(np.ones(5), 3, 4, np.random.default_rng(0)).tolist()
    [1.0, 1.0, 1.0]
    """
    starts = rng.integers(0, max(1, len(y) - n + 1), size=tries)
    return max((y[s : s + n] for s in starts), key=lambda part: float(np.sum(part**2)))


def _write_tensors(tensors, file, note=None):
    part = file.with_name(file.name + ".part")
    save_file(tensors, part, metadata=note)
    part.replace(file)


def draw(data, config, step):
    """Draw the batch of a step: its content follows from the seed and the step alone.

    Parameters
    ----------
    data : dict of str to torch.Tensor
        One split of what `prepare` returns.
    config : FinetuneConfig
        Gives batch size, probabilities and seed.
    step : int
        Number of the step.

    Returns
    -------
    dict of str to torch.Tensor
        ``latents``, ``noise`` of their shape, ``t`` in [0, 1), ``condition`` [batch, dim].
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    n = config.batch_size

    def uniform():
        return torch.rand(n, generator=generator)

    index = torch.randint(len(data["latents"]), (n,), generator=generator)
    clip = data["clip"][index]
    which = (uniform() * data["n_text"][clip]).long()
    as_text = (uniform() < config.text_condition_probability)[:, None]
    condition = torch.where(as_text, data["text"][clip, which], data["audio"][index])
    dropped = (uniform() < config.condition_dropout)[:, None]
    latents = data["latents"][index]
    # one timestep in each of n equal bins: the loss of a batch varies less
    t = (torch.arange(n) + uniform()) / n
    return {
        "latents": latents,
        "noise": torch.randn(latents.shape, generator=generator),
        "t": t,
        "condition": torch.where(dropped, data["empty"], condition),
    }


def diffusion_loss(unet, scheduler, batch):
    """Weighted denoising loss of a batch.

    Parameters
    ----------
    unet : torch.nn.Module
        Called as ``unet(noisy, timestep, encoder_hidden_states=None, class_labels=condition)``.
    scheduler : diffusers scheduler
        Gives the noise schedule and says what the U-Net predicts.
    batch : dict
        As `draw` returns it.

    Returns
    -------
    torch.Tensor, scalar
        Mean over the batch of the squared error, times the clamped SNR for sample prediction.

    Raises
    ------
    TrainingError
        If the scheduler's prediction type is unknown here.
    """
    device = next(unet.parameters()).device
    latents, noise = batch["latents"].to(device), batch["noise"].to(device)
    t = (batch["t"] * scheduler.config.num_train_timesteps).long().to(device)
    noisy = scheduler.add_noise(latents, noise, t)
    condition = batch["condition"].to(device)
    out = unet(noisy, t, encoder_hidden_states=None, class_labels=condition).sample
    alpha = scheduler.alphas_cumprod.to(device)[t]
    kind = scheduler.config.prediction_type
    weight = torch.ones_like(alpha)
    if kind == "epsilon":
        target = noise
    elif kind == "sample":
        target = latents
        weight = (alpha / (1 - alpha)).clamp(0.25, 4.0)
    elif kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, t)
    else:
        raise TrainingError(f"prediction type {kind!r} is none of epsilon, sample, v_prediction")
    return (weight * ((out - target) ** 2).mean(dim=(1, 2, 3))).mean()


def learning_rate(config, step):
    """Learning rate of a step: linear warm-up, constant, then a cosine to zero.

    Parameters
    ----------
    config : FinetuneConfig
        Gives the peak and the shape.
    step : int
        From 0.

    Returns
    -------
    float
        The rate.

    Examples
    --------
    >>> config = FinetuneConfig("embedded", "", "", steps=100, warmup_steps=10, decay_start=0.5)
    >>> learning_rate(config, 4) == 0.5 * config.learning_rate
    True
    >>> learning_rate(config, 99) < 0.01 * config.learning_rate
    True
    """
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    start = config.decay_start * config.steps
    if step < start:
        return config.learning_rate * warm
    progress = (step + 1 - start) / max(1.0, config.steps - start)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _Run:
    """The state of a training run: weights, their average, optimiser, log."""

    def __init__(self, pipe, cache, config):
        self.unet, self.scheduler, self.cache, self.config = (
            pipe.unet.train(),
            pipe.scheduler,
            cache,
            config,
        )
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=config.learning_rate)
        self.ema = self._weights()
        self.best, self.best_step, self.step, self.log = self._weights(), 0, 0, []

    def _weights(self):
        return {k: v.detach().clone() for k, v in self.unet.state_dict().items()}

    def train(self, state_file, key):
        from tqdm.auto import tqdm

        config, started, losses, norms = self.config, time.monotonic(), [], []
        bar = tqdm(
            total=config.steps, initial=self.step, desc="training", disable=None, leave=False
        )
        if not self.log:
            self._record(float("nan"), float("nan"), 0.0)
        while self.step < config.steps:
            loss, norm = self._step()
            losses.append(loss)
            norms.append(norm)
            bar.update()
            if self.step % config.val_every == 0 or self.step == config.steps:
                seconds = time.monotonic() - started
                self._record(float(np.mean(losses)), float(np.mean(norms)), seconds)
                losses, norms, started = [], [], time.monotonic()
                self._save(state_file, key)
        bar.close()

    def _step(self):
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = draw(self.cache["train"], self.config, self.step)
        loss = diffusion_loss(self.unet, self.scheduler, batch)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is not finite at step {self.step}; lower learning_rate "
                f"({self.config.learning_rate:g}). The last good state is of step {self._saved()}."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        # a young average follows faster, or it would remember the starting weights for long
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.unet.state_dict().items():
                self.ema[name].lerp_(value, 1 - decay)
        self.step += 1
        return float(loss.detach()), float(norm)

    def _saved(self):
        return self.log[-1]["step"] if self.log else 0

    def _record(self, train_loss, grad_norm, seconds):
        raw = self._validate()
        weights = self._weights()
        self.unet.load_state_dict(self.ema)
        averaged = self._validate()
        self.unet.load_state_dict(weights)
        if not self.log or averaged < min(row["val_loss_ema"] for row in self.log):
            self.best, self.best_step = {k: v.clone() for k, v in self.ema.items()}, self.step
        self.log.append(
            {
                "step": self.step,
                "train_loss": train_loss,
                "val_loss": raw,
                "val_loss_ema": averaged,
                "learning_rate": learning_rate(self.config, max(0, self.step - 1)),
                "grad_norm": grad_norm,
                "seconds": round(seconds, 3),
            }
        )

    @torch.no_grad()
    def _validate(self):
        data, config = self.cache["val"], self.config
        n = min(config.val_segments, len(data["latents"]))
        index = torch.linspace(0, len(data["latents"]) - 1, n).long()
        noise = torch.randn(
            (n, *data["latents"].shape[1:]), generator=torch.Generator().manual_seed(config.seed)
        )
        batch = {
            "latents": data["latents"][index],
            "noise": noise,
            # a stride coprime to n: neighbouring clips get distant timesteps
            "t": (torch.arange(n) * 37 % n + 0.5) / n if n % 37 else (torch.arange(n) + 0.5) / n,
            "condition": data["text"][data["clip"][index], 0],
        }
        self.unet.eval()
        losses = []
        for start in range(0, n, config.batch_size):
            part = {k: v[start : start + config.batch_size] for k, v in batch.items()}
            losses += [float(diffusion_loss(self.unet, self.scheduler, part))] * len(part["t"])
        self.unet.train()
        return float(np.mean(losses))

    def _save(self, file, key):
        tensors = {f"model.{k}": v for k, v in self.unet.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        note = {"step": self.step, "best_step": self.best_step, "log": self.log, "key": key}
        tensors = {k: v.contiguous() for k, v in tensors.items()}
        _write_tensors(tensors, file, {"note": json.dumps(note)})

    def restore(self, file, key):
        if not file.is_file():
            return
        with safe_open(file, framework="pt") as stored:
            note = json.loads(stored.metadata()["note"])
        if note["key"] != key:
            return
        groups = {"model": {}, "ema": {}, "best": {}, "optimizer": {}}
        for name, value in load_file(file).items():
            group, rest = name.split(".", 1)
            groups[group][rest] = value
        self.unet.load_state_dict(groups["model"])
        self.ema, self.best = groups["ema"], groups["best"]
        state = self.optimizer.state_dict()
        for name, value in groups["optimizer"].items():
            index, moment = name.split(".", 1)
            state["state"].setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict(state)
        self.step, self.best_step, self.log = note["step"], note["best_step"], note["log"]
