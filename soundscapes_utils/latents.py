"""What a step of the trainer sees, computed once and cached: latents, embeddings of sounds and texts.

The set is in AudioCaps' format (see `metadata.write_audiocaps`) or a plain table of sounds and
captions. Files of the cache are named by the content that they were made from: a run that was killed
here computes only what is missing, and runs of one ``cache_dir`` share them.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from . import audio, captions, ldm, metadata, store

# clips whose latents share a file; a killed run loses at most these
CLIPS_PER_FILE = 64
# segments are the loudest of this many random positions
_TRIES = 4


def read_clips(config):
    """Read the set of a `FinetuneConfig`: ``split, path, caption, …`` of the splits that are needed."""
    path = Path(config.dataset_root)
    clips = metadata.read_audiocaps(path) if path.suffix == ".json" else _captioned_table(path)
    for split in ("train", "val"):
        if not (clips["split"] == split).any():
            raise store.DataError(
                f"{path}: no clips in its split {split!r}; fine-tuning needs train and val"
            )
    splits = ("train", "val", "test") if config.test_segments else ("train", "val")
    return clips[clips["split"].isin(splits)].reset_index(drop=True)


def _captioned_table(path):
    clips = store.read_table(path)
    if missing := {"path", "caption"} - set(clips):
        raise store.DataError(f"{path}: has no column {' or '.join(sorted(missing))}")
    clips["path"] = [str(path.parent / name) for name in clips["path"]]
    source = clips.get("source_id", clips["path"].map(lambda name: Path(name).name))
    if "split" not in clips:  # by the name of the source: it stays where it is when others come
        places = source.map(lambda name: int(store.content_key(name), 16) % 10)
        clips["split"] = np.select([places == 0, places == 1], ["val", "test"], "train")
    shared = clips.groupby(source)["split"].transform("nunique") > 1
    if shared.any():
        names = ", ".join(source[shared].unique()[:5])
        raise store.DataError(f"{path}: sources in more than one split: {names}")
    return clips


def load_data(pipe, config, clips=None, accelerator=None):
    """Compute, or read from the cache, all that the loop needs: latents and embeddings.

    By default of the set of a `FinetuneConfig`, else of `clips` with ``split, path, caption, …``; `pipe`
    is the pipeline of its checkpoint. An accelerate.Accelerator shares the work among its processes.

    For each split: ``latents`` [segments, channels, time, mel], ``audio`` [segments, dim], ``clip``
    [segments], ``text`` [clips, captions, dim] (the empty text where a clip has fewer captions),
    ``n_text`` [clips]; and ``empty`` [1, dim].
    """
    from tqdm.auto import tqdm

    clips = read_clips(config) if clips is None else clips
    folder = Path(config.cache_dir or f"{config.out_dir}.cache")
    made_from = [ldm.checkpoint_digest(ldm.resolve(config.checkpoint)), config.seed]
    made_from += [ldm.checkpoint_info(config.checkpoint)["audio_encoder"], _TRIES]
    jobs = {}
    for split, rows in clips.groupby("split", sort=False):
        for start in range(0, len(rows), CLIPS_PER_FILE):
            part = rows.iloc[start : start + CLIPS_PER_FILE]
            settings = [*made_from, config.segment_s, config.segments_per_clip, start]
            content = store.content_key(
                settings, [store.file_digest(path) for path in part["path"]]
            )
            make = _sound_tensors, (pipe, config, part, start)
            jobs[folder / f"{split}-{start:06d}-{content}.safetensors"] = split, make
        texts = rows[captions.caption_columns(rows)].fillna("")
        content = store.content_key(made_from, texts.to_numpy().tolist())
        make = _text_tensors, (pipe, texts)
        jobs[folder / f"{split}-text-{content}.safetensors"] = split, make
    if accelerator is not None and accelerator.num_processes > 1:
        for file in list(jobs)[accelerator.process_index :: accelerator.num_processes]:
            _cached(file, *jobs[file][1])
        accelerator.wait_for_everyone()
    parts = {split: {} for split in clips["split"]}
    for file, (split, make) in tqdm(jobs.items(), desc="latents", disable=None, leave=False):
        for name, value in _cached(file, *make).items():
            parts[split].setdefault(name, []).append(value)
    return {
        split: {name: torch.cat(values) for name, values in tensors.items()}
        for split, tensors in parts.items()
    }


def _cached(file, make, arguments):
    if not file.is_file():
        store.write_atomic(file, save(make(*arguments)))
    return load_file(file)


def _sound_tensors(pipe, config, rows, start):
    clap = ldm.load_clap(str(config.checkpoint))
    clap.audio_encoder.to(pipe.device)
    # each of the U-Net's levels but the last halves the latent once more
    unit = pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)
    frames = max(1, round(config.segment_s * ldm.SAMPLE_RATE / ldm.HOP / unit)) * unit
    latents, sounds, owner = [], [], []
    for i, path in enumerate(rows["path"], start=start):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        # of a clip that is no longer than a segment there is only one
        for _ in range(config.segments_per_clip if len(y) > frames * ldm.HOP else 1):
            segment = audio.loudest_segment(y, frames * ldm.HOP, _TRIES, rng)
            latents.append(ldm.encode_mel(pipe, ldm.waveform_to_mel(segment, frames)[None]))
            sounds.append(ldm.embed_audio(clap, [segment], ldm.SAMPLE_RATE))
            owner.append(i)
    clap.audio_encoder.to("cpu")  # others share this tower
    return {"latents": torch.cat(latents), "audio": torch.cat(sounds), "clip": torch.tensor(owner)}


def _text_tensors(pipe, rows):
    texts = [[text for text in row if text] for row in rows.to_numpy().tolist()]
    widest = max(map(len, texts))
    padded = [row + [""] * (widest - len(row)) for row in texts]
    distinct = sorted({text for row in padded for text in row} | {""})
    vectors = dict(zip(distinct, ldm.embed_text(pipe, distinct), strict=True))
    return {
        "text": torch.stack([torch.stack([vectors[text] for text in row]) for row in padded]),
        "n_text": torch.tensor([len(row) for row in texts]),
        "empty": vectors[""][None].clone(),
    }
