"""Make the mini-AudioLDM: fit its latent, train its CLAP pair, train its U-Net from scratch.

The result is a checkpoint in AudioLDM's layout, small enough for two CPU cores. Two data sets feed
it: the procedural sounds (the built-in checkpoint, from a pool that no study clip comes from) and a
folder of real recordings (of which the test fold is never touched).
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from . import audio, captions, datasets, finetuning, ldm, metadata, mixing, procedural

SEGMENT_S = 2.56
SEGMENT_FRAMES = 256
SAMPLING = {"clip_s": SEGMENT_S, "steps": 25, "guidance_scale": 2.5, "eta": 1.0}

# what `train-mini` trains on
_POOL = "procedural sounds, pretraining pool"


@dataclass(frozen=True)
class MiniConfig:
    """Sizes and lengths of the mini model's training.

    Parameters
    ----------
    unet_steps, clap_steps : int
        Optimiser steps.
    n_mixes : int
        Training mixes from which the CLAP pair learns the captions of scenes.
    segments_per_clip : int
        Segments of each event clip.
    channels : tuple of int
        U-Net widths.
    learning_rate : float
        Peak rate of the U-Net.
    seed : int
        For everything.
    """

    unet_steps: int = 4000
    clap_steps: int = 1200
    n_mixes: int = 600
    segments_per_clip: int = 4
    channels: tuple = (64, 128, 192)
    learning_rate: float = 1e-3
    seed: int = 0


def train(events, foregrounds, backgrounds, out_dir, config, *, dataset, test_fold):
    """Train a mini-AudioLDM on clips; resume where a killed run stopped.

    Parameters
    ----------
    events : pandas.DataFrame
        Clip table of all sounds that the generator shall make.
    foregrounds, backgrounds : pandas.DataFrame
        Clip tables from which mixes are made for the CLAP pair.
    out_dir : Path
        The checkpoint; intermediate files lie beside it in ``<name>.work``.
    config : MiniConfig
        Sizes and lengths.
    dataset : str
        Name of the data, for the checkpoint's note.
    test_fold : int
        Left out, wholly; the next fold validates.

    Returns
    -------
    Path
        ``out_dir``, a diffusers folder.

    Raises
    ------
    datasets.DatasetError
        If a source lies in two splits.
    """
    out_dir = Path(out_dir)
    work = out_dir.with_name(out_dir.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    events = events.assign(split=datasets.assign_splits(events, test_fold))
    events = events[events["split"] != "test"].reset_index(drop=True)
    training_folds = sorted(int(f) for f in events.loc[events["split"] == "train", "fold"].unique())
    info = {
        "training_dataset": dataset,
        "training_folds": training_folds,
        "sample_rate": ldm.SAMPLE_RATE,
        **SAMPLING,
    }
    scenes = _scene_mixes(foregrounds, backgrounds, work, config, test_fold)
    pairs = pd.concat([_event_pairs(events), _mix_pairs(scenes)], ignore_index=True)
    start = work / f"start-{_key(pairs, config)}"
    if not (start / "model_index.json").is_file():
        _make_start(pairs, start, config, info)
    root = _event_set(events, work)
    finetuning.finetune(
        finetuning.FinetuneConfig(
            checkpoint=str(start),
            dataset_root=str(root),
            out_dir=str(work / "trained"),
            steps=config.unet_steps,
            learning_rate=config.learning_rate,
            decay_start=0.5,
            ema_decay=0.995,
            segments_per_clip=config.segments_per_clip,
            # a small CLAP's texts lie far from its sounds
            text_condition_probability=0.5,
            val_every=250,
            keep_best=False,
            seed=config.seed,
            info=info,
        )
    )
    pipe = ldm.load_pipeline(work / "trained", device="cpu")
    tower, _ = ldm.load_audio_tower(str(work / "trained"))
    card = {"README.md": _card(info, config, len(events))}
    return ldm.save_checkpoint(pipe, out_dir, info, tower, half=True, extra=card)


def get_checkpoint(checkpoint, clips, foregrounds, backgrounds, **options):
    """Give a checkpoint for a run: the one that is named, or a mini model trained on its clips.

    Parameters
    ----------
    checkpoint : str
        ``"mini"`` trains one on the training folds (or finds it trained before); anything else is
        returned as it is.
    clips : pandas.DataFrame
        All clips of the run; those of the test fold are left out.
    foregrounds, backgrounds : pandas.DataFrame
        As `datasets.load_scenes` returns them.
    **options
        ``cache_dir, dataset, test_fold, config`` (a `MiniConfig`).

    Returns
    -------
    str
        What `ldm.load_pipeline` opens.

    Examples
    --------
    >>> get_checkpoint("builtin", None, None, None)
    'builtin'
    """
    if checkpoint != "mini":
        return checkpoint
    config, fold = options["config"], options["test_fold"]
    digest = hashlib.sha256(f"{config}{fold}".encode())
    for path in [*clips["path"], *backgrounds["path"]]:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    name = f"{options['dataset']}-without-fold-{fold}-{digest.hexdigest()[:12]}"
    folder = Path(options["cache_dir"]) / name
    if not (folder / "model_index.json").is_file():
        named = {"dataset": options["dataset"], "test_fold": fold}
        train(clips, foregrounds, backgrounds, folder, config, **named)
    return str(folder)


def _key(pairs, config):
    digest = hashlib.sha256(f"{config.clap_steps}{config.channels}{config.seed}".encode())
    digest.update(pairs.drop(columns="path").to_csv(index=False).encode())
    for path in pairs["path"]:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()[:16]


def _scene_mixes(foregrounds, backgrounds, work, config, test_fold):
    plan = mixing.plan_mixes(
        foregrounds, backgrounds, config.n_mixes, config.seed, test_fold=test_fold, duration_s=5.0
    )
    plan = plan[plan["split"] == "train"].reset_index(drop=True)
    return mixing.render_mixes(plan, work / "mixes", ldm.SAMPLE_RATE)


def _event_pairs(events):
    """One row a training clip: its path, what makes two clips alike, and all its wordings."""
    texts = {label: event_texts(label) for label in events["label"].unique()}
    kept = events[events["split"] == "train"]
    return pd.DataFrame(
        {
            "path": kept["path"].to_numpy(),
            "alike": kept["label"].to_numpy(),
            "texts": [json.dumps(texts[label]) for label in kept["label"]],
        }
    )


def _mix_pairs(mixes):
    columns = ["caption", "caption_2", "caption_3"]
    return pd.DataFrame(
        {
            "path": mixes["path"],
            "alike": mixes["label"] + " / " + mixes["scene"],
            "texts": [json.dumps(row) for row in mixes[columns].to_numpy().tolist()],
        }
    )


def event_texts(label):
    """List the wordings under which a class is taught to the text tower.

    Parameters
    ----------
    label : str
        Class name.

    Returns
    -------
    list of str
        The prompts of `captions.FAMILIES`, each once; the plain one first, and of "varied" those
        of its templates.

    Examples
    --------
    >>> event_texts("dog")[0]
    'dog'
    """
    n_varied = len(captions.VARIED_TEMPLATES)
    families = [(family, n_varied if family == "varied" else 1) for family in captions.FAMILIES]
    texts = [
        text
        for family, n in families
        for text in captions.prompts([label], family, n)["prompt"].tolist()
    ]
    return list(dict.fromkeys(texts))


def _event_set(events, work):
    """Write the single events as an AudioCaps-format set, which is what the trainer reads."""
    texts = {label: event_texts(label) for label in events["label"].unique()}
    rows = events.rename(columns={"label": "label"}).assign(clip_id=events["clip_id"], scene="")
    for i in range(min(len(t) for t in texts.values())):
        rows["caption" if i == 0 else f"caption_{i + 1}"] = [
            texts[label][i] for label in events["label"]
        ]
    return metadata.write_audiocaps(rows, work / "events", "events")


def _make_start(pairs, start, config, info):
    """Fit the latent and train the CLAP pair: all but the U-Net."""
    texts = [json.loads(row) for row in pairs["texts"]]
    mels = _segments(pairs["path"], config)
    pipe, tower = ldm.build_small(
        sorted({text for row in texts for text in row}), config.seed, channels=config.channels
    )
    pipe.vae.fit(mels.flatten(0, 1))
    alike = pd.factorize(pairs["alike"])[0]
    train_clap(pipe, tower, mels, texts, torch.from_numpy(alike), config.clap_steps, config.seed)
    ldm.save_checkpoint(pipe, start, info, tower)


def _segments(paths, config):
    from tqdm.auto import tqdm

    mels = []
    for i, path in enumerate(tqdm(paths, desc="segments", disable=None, leave=False)):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        parts = [
            audio.loudest_segment(y, SEGMENT_FRAMES * ldm.HOP, 4, rng)
            for _ in range(config.segments_per_clip)
        ]
        mels.append(torch.stack([ldm.waveform_to_mel(part, SEGMENT_FRAMES) for part in parts]))
    return torch.stack(mels)


def train_clap(pipe, tower, mels, texts, alike, steps, seed=0, batch_size=64):
    """Train the small text and audio towers against each other.

    Parameters
    ----------
    pipe : AudioLDMPipeline
        Its text tower is trained.
    tower : ldm.AudioTower
        Trained.
    mels : torch.Tensor, float32 [clips, segments, frames, 64]
        Log-mels of each clip's segments.
    texts : list of list of str
        Wordings of each clip.
    alike : torch.Tensor, int64 [clips]
        Clips of the same number are positives of each other.
    steps, seed, batch_size : int
        Length, randomness and size of the training.

    Returns
    -------
    float
        Mean loss of the last tenth of the steps.

    Notes
    -----
    Symmetric InfoNCE as in CLAP (arXiv 2211.06687), with all clips of a kind as positives.
    """
    from tqdm.auto import tqdm

    rng = np.random.default_rng(seed)
    towers = torch.nn.ModuleList([pipe.text_encoder, tower]).train()
    scale = torch.nn.Parameter(torch.tensor(2.3))
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc="CLAP", disable=None, leave=False):
        index = rng.integers(len(mels), size=batch_size)
        segment = rng.integers(mels.shape[1], size=batch_size)
        words = [texts[i][rng.integers(len(texts[i]))] for i in index]
        sound = tower(mels[index, segment])
        positive = alike[index][:, None] == alike[index][None]
        loss = contrastive_loss(sound, _text_features(pipe, words), positive, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    towers.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


def _text_features(pipe, words):
    tokens = pipe.tokenizer(words, padding=True, truncation=True, return_tensors="pt")
    out = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    return F.normalize(out.text_embeds, dim=-1)


def contrastive_loss(sound, text, positive, log_scale):
    """Multi-positive InfoNCE, both ways.

    Parameters
    ----------
    sound, text : torch.Tensor [batch, dim]
        Unit-length embeddings.
    positive : torch.Tensor, bool [batch, batch]
        Which sound (row) belongs to which text (column); symmetric, true on the diagonal.
    log_scale : torch.Tensor, scalar
        Logarithm of the inverse temperature.

    Returns
    -------
    torch.Tensor, scalar
        Mean cross-entropy against the positives, each with equal share.

    Examples
    --------
    >>> one = torch.eye(2)
    >>> float(contrastive_loss(one, one, one.bool(), torch.tensor(9.0))) < 1e-3
    True
    """
    logits = log_scale.exp().clamp(max=100.0) * sound @ text.T
    target = positive.float() / positive.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def _card(info, config, n_clips):
    folds = ", ".join(map(str, info["training_folds"]))
    made_by = "notebook 02 with `checkpoint` mini (`soundscapes_utils.minimodel.get_checkpoint`)"
    if info["training_dataset"] == _POOL:
        made_by = "`python -m soundscapes_utils train-mini` (see its `--help`)"
    return f"""---
license: mit
library_name: diffusers
pipeline_tag: text-to-audio
---

# mini-AudioLDM ({info["training_dataset"]})

A text-to-audio latent diffusion model in the layout of AudioLDM, small enough for two CPU cores:
16 kHz, 64-band log-mel, {config.channels} U-Net conditioned on a small CLAP pair, DDIM sampler that
predicts the latent. Its latent is linear (`PatchVAE`) and its vocoder scales the bins of white noise
(`NoiseVocoder`); both are classes of `soundscapes_utils.ldm` with the interfaces that diffusers'
`AudioLDMPipeline` calls. Weights are float16 safetensors.

- Data: {info["training_dataset"]}, folds {folds} for training ({n_clips} clips with validation).
- Training: {config.clap_steps} steps of the CLAP pair, {config.unet_steps} of the U-Net, batch 16,
  seed {config.seed}; the exponential average of the weights is what is saved.
- Sampling: {info["clip_s"]} s, {info["steps"]} DDIM steps, guidance {info["guidance_scale"]},
  eta {info["eta"]}.
- Made by {made_by}.
- Use: for teaching and for testing pipelines. It knows the classes that it was trained on and no
  others; it is no substitute for AudioLDM.

## Scores

Not measured when this card was written: `python benchmarks/generation.py mini --yamnet FILE` tells how
class-consistent its clips are and how far from real ones (`--checkpoint FOLDER` for another model).
"""


def main(argv):
    """Make the mini checkpoint from the command line.

    Parameters
    ----------
    argv : list of str
        Arguments; see ``--help``.

    Returns
    -------
    int
        Exit status.
    """
    defaults = MiniConfig()
    parser = argparse.ArgumentParser(
        prog="python -m soundscapes_utils train-mini",
        description="Train the mini-AudioLDM on a pool of procedural sounds. Run again to resume.",
    )
    parser.add_argument("--out", default=str(ldm.BUILTIN_CHECKPOINT), help="folder to write")
    parser.add_argument("--data-dir", default="data", help="where the pool of sounds is kept")
    parser.add_argument("--clips-per-class", type=int, default=120)
    parser.add_argument("--scenes-per-class", type=int, default=25)
    parser.add_argument("--steps", type=int, default=defaults.unet_steps, help="of the U-Net")
    parser.add_argument("--clap-steps", type=int, default=defaults.clap_steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(argv)
    pool = Path(options.data_dir) / "pretraining"
    procedural.write_events(
        pool / "events", options.clips_per_class, options.seed, pool="pretraining"
    )
    procedural.write_scenes(
        pool / "scenes", options.scenes_per_class, options.seed, pool="pretraining"
    )
    events = datasets.load_esc50(pool / "events")
    config = MiniConfig(unet_steps=options.steps, clap_steps=options.clap_steps, seed=options.seed)
    folder = train(
        events,
        events,
        datasets.load_tau(pool / "scenes"),
        options.out,
        config,
        dataset=_POOL,
        test_fold=procedural.N_FOLDS,
    )
    print(f"Checkpoint: {folder}")
    return 0
