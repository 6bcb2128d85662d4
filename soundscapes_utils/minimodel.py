"""Make the mini-AudioLDM: fit its latent, train its CLAP pair, train its U-Net from scratch.

The result is a checkpoint in AudioLDM's layout, small enough for two CPU cores. Two kinds of data feed
it: procedural sounds (the built-in checkpoint, from a pool that no study clip comes from) and real
recordings (of which the test fold is never touched).
"""

import contextlib
import fcntl
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from . import audio, captions, datasets, finetuning, ldm, mixing, procedural, store

SEGMENT_S = 2.56
SAMPLING = {"clip_s": SEGMENT_S, "steps": 10, "guidance_scale": 2.5, "eta": 1.0}

_SEGMENT_FRAMES = 256
# what the built-in model is trained on
_POOL = "procedural sounds, pretraining pool"


@dataclass(frozen=True)
class MiniConfig:
    """Sizes and lengths of the training: optimiser steps of both parts; ``n_mixes`` from which the CLAP
    pair learns the captions of scenes; ``segments_per_clip`` of events; U-Net widths; its peak rate.
    """

    unet_steps: int = 4000
    clap_steps: int = 1200
    n_mixes: int = 600
    segments_per_clip: int = 4
    channels: tuple = (64, 128, 192)
    learning_rate: float = 1e-3
    seed: int = 0


def get_checkpoint(checkpoint, clips, foregrounds, backgrounds, **options):
    """Give a checkpoint for a run: the one that is named, or a mini model trained on its clips.

    ``"mini"`` trains one on the training folds (or finds it trained before). `clips` are all of the run,
    of which those of the test fold are left out; `foregrounds` and `backgrounds` as
    `datasets.load_scenes` returns them. Options: ``cache_dir, dataset, test_fold, config``.
    """
    if checkpoint != "mini":
        return checkpoint
    config, dataset, fold = options["config"], options["dataset"], options["test_fold"]
    tables = [_identity(table) for table in (clips, foregrounds, backgrounds)]
    labels = {*clips["label"], *backgrounds["label"]}
    words = [{label: own for label, own in captions.OWN.items() if label in labels}]
    key = store.content_key(asdict(config), fold, *tables, *filter(None, words), length=12)
    folder = Path(options["cache_dir"]) / f"{dataset}-without-fold-{fold}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # the notebook beside this one may train it just now
        if not (folder / "model_index.json").is_file():
            named = {"dataset": dataset, "test_fold": fold}
            train(clips, foregrounds, backgrounds, folder, config, **named)
    return str(folder)


def _identity(clips):
    """What makes a table of clips another one: sounds, labels, folds and sources."""
    known = clips[["label", "fold", "source_id"]].astype(str).to_numpy().tolist()
    return [known, [store.file_digest(path) for path in clips["path"]]]


def train_builtin(out_dir, data_dir, clips_per_class=120, scenes_per_class=25, config=None):
    """Train the built-in checkpoint on a pool of procedural sounds, kept in ``data_dir``."""
    pool, config = Path(data_dir) / "pretraining", config or MiniConfig()
    procedural.write_events(pool / "events", clips_per_class, config.seed, pool="pretraining")
    procedural.write_scenes(pool / "scenes", scenes_per_class, config.seed, pool="pretraining")
    events, scenes = datasets.load_esc50(pool / "events"), datasets.load_tau(pool / "scenes")
    named = {"dataset": _POOL, "test_fold": procedural.N_FOLDS}
    return train(events, events, scenes, out_dir, config, **named)


def train(events, foregrounds, backgrounds, out_dir, config, *, dataset, test_fold):
    """Train a mini-AudioLDM on clips; resume where a killed run stopped.

    `events` are all sounds that the generator shall make, `foregrounds` and `backgrounds` those from
    which mixes are made for the CLAP pair. The test fold is left out wholly, the next one validates.
    Intermediate files lie next to the checkpoint in ``<name>.work``. Returns ``out_dir``.
    """
    out_dir = Path(out_dir)
    work = out_dir.with_name(out_dir.name + ".work")
    events = events.assign(split=datasets.assign_splits(events, test_fold))
    events = events[events["split"] != "test"].reset_index(drop=True)
    folds = sorted({int(fold) for fold in events.loc[events["split"] == "train", "fold"]})
    # no study has a clip of the pool
    heard = {} if dataset == _POOL else {dataset: folds}
    info = {"training_dataset": dataset, "heard": heard, "sample_rate": ldm.SAMPLE_RATE, **SAMPLING}
    plan = mixing.plan_mixes(
        foregrounds, backgrounds, config.n_mixes, config.seed, test_fold=test_fold, duration_s=5.0
    )
    plan = plan[plan["split"] == "train"].reset_index(drop=True)
    mixes = mixing.render_mixes(plan, work / "mixes", ldm.SAMPLE_RATE)
    pairs = _pairs(events[events["split"] == "train"], mixes)
    digests = [store.file_digest(path) for path in pairs["path"]]
    start = work / f"start-{store.content_key(asdict(config), pairs.to_csv(index=False), digests)}"
    if not (start / "model_index.json").is_file():
        _make_start(pairs, start, config, info)
    tuning = finetuning.FinetuneConfig(
        checkpoint=str(start),
        dataset_root=str(store.write_table(_captioned(events), work / "events.csv")),
        out_dir=str(work / "trained"),
        steps=config.unet_steps,
        learning_rate=config.learning_rate,
        decay_start=0.5,
        ema_decay=0.995,
        segments_per_clip=config.segments_per_clip,
        text_condition_probability=0.5,  # a small CLAP's texts lie far from its sounds
        validation_steps=250,
        keep_best=False,
        seed=config.seed,
        info=info,
    )
    trained = finetuning.finetune(tuning).checkpoint
    pipe, clap = ldm.load_pipeline(trained, device="cpu"), ldm.load_clap(str(trained))
    card = {ldm.CARD_FILE: _card(info, config, folds, len(events))}
    return ldm.save_checkpoint(pipe, out_dir, info, clap.audio_encoder, half=True, extra=card)


def _card(info, config, folds, n_clips):
    made_by = "notebook 02 with `checkpoint` mini (`soundscapes_utils.minimodel.get_checkpoint`)"
    if info["training_dataset"] == _POOL:
        made_by = "`python -m soundscapes_utils train-mini` (see its `--help`)"
    about = {"folds": ", ".join(map(str, folds)), "n_clips": n_clips, "made_by": made_by}
    template = Path(__file__).with_name("mini_card.md").read_text(encoding="utf-8")
    return template.format(info=info, config=config, **about)


def _event_texts(label):
    """List the wordings under which a class is taught to the text tower, the plain one first."""
    counts = {"label": 1, "simple": 1, "gpt": 1, "varied": len(captions.VARIED_TEMPLATES)}
    plans = [captions.prompts([label], family, n) for family, n in counts.items()]
    return list(dict.fromkeys(text for plan in plans for text in plan["prompt"]))


def _pairs(events, mixes):
    """One row per training sound: its path, what makes two of them alike, and all its wordings."""
    texts = {label: _event_texts(label) for label in events["label"].unique()}
    columns = captions.caption_columns(mixes)[:3]
    alike = pd.concat([events["label"], mixes["label"] + " / " + mixes["scene"]])
    wordings = [texts[label] for label in events["label"]] + mixes[columns].to_numpy().tolist()
    paths = pd.concat([events["path"], mixes["path"]])
    return pd.DataFrame({"path": paths, "alike": alike, "texts": wordings}).reset_index(drop=True)


def _captioned(events):
    """Give single events their captions, as many as all classes have."""
    texts = {label: _event_texts(label) for label in events["label"].unique()}
    for i in range(min(map(len, texts.values()))):
        name = "caption" if i == 0 else f"caption_{i + 1}"
        events = events.assign(**{name: [texts[label][i] for label in events["label"]]})
    return events.assign(path=[str(Path(path).absolute()) for path in events["path"]])


def _make_start(pairs, start, config, info):
    """Fit the latent and train the CLAP pair: all but the U-Net."""
    from tqdm.auto import tqdm

    mels = []
    for i, path in enumerate(tqdm(pairs["path"], desc="segments", disable=None, leave=False)):
        y, _ = audio.load_audio(path, ldm.SAMPLE_RATE)
        rng = np.random.default_rng([config.seed, i])
        length = _SEGMENT_FRAMES * ldm.HOP
        parts = [audio.loudest_segment(y, length, 4, rng) for _ in range(config.segments_per_clip)]
        mels.append(torch.stack([ldm.waveform_to_mel(part, _SEGMENT_FRAMES) for part in parts]))
    mels, texts = torch.stack(mels), pairs["texts"].tolist()
    wordings = sorted({text for row in texts for text in row})
    pipe, tower = ldm.build_small(wordings, config.seed, channels=config.channels)
    pipe.vae.fit(mels.flatten(0, 1))
    _train_clap(pipe, tower, mels, texts, pd.factorize(pairs["alike"])[0], config)
    ldm.save_checkpoint(pipe, start, info, tower)


def _train_clap(pipe, tower, mels, texts, alike, config, batch_size=64):
    """Train the small text and audio towers against each other; clips of one kind are alike."""
    from tqdm.auto import tqdm

    rng, alike = np.random.default_rng(config.seed), torch.from_numpy(alike)
    modules = [pipe.text_encoder, tower, objective := ContrastiveLoss()]
    towers = torch.nn.ModuleList(modules).train()
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=config.clap_steps)
    for _ in tqdm(range(config.clap_steps), desc="CLAP", disable=None, leave=False):
        index = rng.integers(len(mels), size=batch_size)
        segment = rng.integers(mels.shape[1], size=batch_size)
        words = [texts[i][rng.integers(len(texts[i]))] for i in index]
        tokens = pipe.tokenizer(words, padding=True, truncation=True, return_tensors="pt")
        out = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        positive = alike[index][:, None] == alike[index][None]
        text = F.normalize(out.text_embeds, dim=-1)
        loss = objective(tower(mels[index, segment]), text, positive)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    towers.eval()


class ContrastiveLoss(torch.nn.Module):
    """Symmetric InfoNCE as in CLAP (arXiv 2211.06687), with all sounds of a kind as positives; its
    learnt parameter is the logarithm of the inverse temperature.
    """

    def __init__(self, log_scale=2.3):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.tensor(log_scale))

    def forward(self, sound, text, positive):
        """Mean cross-entropy of unit rows [batch, dim] against the positives [batch, batch]."""
        logits = self.log_scale.exp().clamp(max=100.0) * sound @ text.T
        target = positive.float() / positive.sum(1, keepdim=True)
        return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
