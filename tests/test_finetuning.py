"""The trainer: what it draws, what it minimises, how it resumes."""

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny_checkpoints
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from soundscapes_utils import audio, conditioning, finetuning, ldm, metadata, mixing, store

TEXTS = ["a dog is barking", "rain", "a dog is barking in the rain"] * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pipe, tower = ldm.build_small(TEXTS, channels=(16, 32, 48))
    rng = np.random.default_rng(0)
    mels = [ldm.waveform_to_mel(rng.normal(size=10_240), 64) for _ in range(4)]
    pipe.vae.fit(torch.stack(mels))
    folder = tmp_path_factory.mktemp("start") / "small"
    info = {"training_folds": [], "steps": 2}
    return ldm.save_checkpoint(pipe, folder, info, tower.eval())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    rows = []
    splits = ["train"] * 4 + ["val"] * 4 + ["test"] * 2
    for i, split in enumerate(splits):
        path = folder / "audio" / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.save_audio(path, 0.2 * rng.normal(size=16_000).clip(-3, 3), 16_000)
        rows.append((str(i), split, str(path), "dog", "park", *TEXTS[:3]))
    names = ["clip_id", "split", "path", "label", "scene"]
    table = pd.DataFrame(rows, columns=[*names, "caption", "caption_2", "caption_3"])
    return metadata.write_audiocaps(table, folder / "metadata", "noise")


def make_config(checkpoint, dataset, folder):
    return finetuning.FinetuneConfig(
        checkpoint=str(checkpoint),
        dataset_root=str(dataset),
        out_dir=str(folder / "out"),
        steps=6,
        batch_size=4,
        learning_rate=1e-3,
        lr_warmup_steps=2,
        segment_s=0.64,
        validation_steps=2,
        test_segments=0,
        info={"training_dataset": "noise"},
    )


@pytest.fixture
def config(checkpoint, dataset, tmp_path):
    return make_config(checkpoint, dataset, tmp_path)


@pytest.fixture(scope="module")
def plain(checkpoint, dataset, tmp_path_factory):
    """The unbroken run of `config`, to compare with."""
    folder = tmp_path_factory.mktemp("plain")
    return finetuning.finetune(make_config(checkpoint, dataset, folder))


def test_result_opens_and_carries_its_note(plain):
    result = plain
    assert list(result.log["step"]) == [0, 2, 4, 6]
    assert np.isfinite(result.log[["val_loss", "val_loss_ema"]]).all().all()
    best = result.log.loc[result.log["val_loss_ema"].idxmin(), "step"]
    assert result.best_step == best
    assert ldm.checkpoint_info(result.checkpoint)["training_dataset"] == "noise"
    assert ldm.load_pipeline(result.checkpoint, device="cpu").unet.config.in_channels == 32


def test_killed_run_ends_with_the_same_weights_and_losses(config, plain, tmp_path, monkeypatch):
    whole = plain
    parted = replace(config, out_dir=str(tmp_path / "parted"))
    draw, calls = finetuning.training_batch, []

    def dies_at_the_fourth(data, settings, step):
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return draw(data, settings, step)

    monkeypatch.setattr(finetuning, "training_batch", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(parted)
    monkeypatch.setattr(finetuning, "training_batch", draw)
    resumed = finetuning.finetune(parted)
    columns = ["step", "train_loss", "val_loss", "val_loss_ema", "grad_norm"]
    pd.testing.assert_frame_equal(resumed.log[columns], whole.log[columns], atol=1e-6)
    one, two = (ldm.load_pipeline(r.checkpoint, device="cpu").unet for r in (whole, resumed))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_finished_run_is_returned_untouched_and_another_seed_is_not(config, monkeypatch):
    first = finetuning.finetune(config)
    stamp = (first.checkpoint / "model_index.json").stat().st_mtime_ns
    monkeypatch.setattr(finetuning, "training_batch", lambda *_: pytest.fail("trained again"))
    again = finetuning.finetune(config)
    assert (again.checkpoint / "model_index.json").stat().st_mtime_ns == stamp
    with pytest.raises(pytest.fail.Exception):
        finetuning.finetune(replace(config, seed=1))


def test_loss_falls_on_something_learnable(config):
    log = finetuning.finetune(replace(config, steps=40, validation_steps=20)).log
    assert log["val_loss"].iloc[-1] < 0.9 * log["val_loss"].iloc[0]


def test_divergence_stops_and_names_the_last_good_step(config, monkeypatch):
    good = finetuning.denoising
    calls = iter(range(100))

    def breaks_in_the_end(*args):
        found = good(*args)
        return found._replace(error=found.error * float("nan")) if next(calls) > 10 else found

    monkeypatch.setattr(finetuning, "denoising", breaks_in_the_end)
    with pytest.raises(finetuning.TrainingError, match=r"not finite at step \d.*learning_rate"):
        finetuning.finetune(config)


def test_set_without_validation_is_refused(config, tmp_path):
    clips = metadata.read_audiocaps(config.dataset_root).assign(label="dog", scene="")
    only = clips[clips["split"] == "train"]
    root = metadata.write_audiocaps(only, tmp_path / "only", "only")
    with pytest.raises(store.DataError, match="no clips in its split 'val'"):
        finetuning.finetune(replace(config, dataset_root=str(root)))


KINDS = ["epsilon", "sample", "v_prediction"]


class Answer(torch.nn.Linear):
    """A U-Net that predicts what it was given, whatever it is asked."""

    def __init__(self, answer):
        super().__init__(1, 1)
        self.answer = answer

    def forward(self, *_, **__):
        return SimpleNamespace(sample=self.answer)


def random_batch(n=8):
    latents, noise = torch.randn(2, n, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = torch.zeros(n, 2)
    return {"latents": latents, "noise": noise, "t": torch.arange(n) / n, "condition": condition}


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_prediction_has_no_loss_and_zero_has_the_closed_form(kind):
    scheduler, batch = DDIMScheduler(prediction_type=kind), random_batch()
    latents, noise = batch["latents"], batch["noise"]
    alpha = scheduler.alphas_cumprod[(batch["t"] * 1000).long()].view(-1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
    }[kind]
    perfect = finetuning.denoising(Answer(target), scheduler, batch)
    assert float(perfect.error.max()) < 1e-10
    found = finetuning.denoising(Answer(torch.zeros_like(target)), scheduler, batch)
    snr = (alpha / (1 - alpha)).flatten().clamp(0.25, 4) if kind == "sample" else torch.ones(8)
    expected = snr * (target**2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.weight * found.error, expected)


@given(step=st.integers(0, 10**6), text=st.floats(0, 1), drop=st.floats(0, 1))
def test_draw_follows_from_the_step_and_keeps_clip_and_condition_together(step, text, drop):
    n = 5
    data = {
        "latents": torch.arange(n).view(n, 1, 1, 1).expand(n, 2, 4, 4).float(),
        "audio": torch.arange(n).view(n, 1).expand(n, 3).float(),
        "clip": torch.arange(n),
        "text": torch.arange(n).view(n, 1).expand(n, 3).float() + 100,
        "caption": torch.arange(n).view(n, 1).expand(n, 2),
        "n_text": torch.full((n,), 2),
        "empty": torch.full((1, 3), -1.0),
        "empty_of": torch.zeros(n, dtype=torch.long),
    }
    config = finetuning.FinetuneConfig(
        "", "", "", text_condition_probability=text, conditioning_dropout=drop
    )
    batch = finetuning.training_batch(data, config, step)
    again = finetuning.training_batch(data, config, step)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    assert not torch.equal(batch["noise"], finetuning.training_batch(data, config, step + 1)["noise"])
    clip, condition = batch["latents"][:, 0, 0, 0], batch["condition"][:, 0]
    assert all(c in (-1, i, i + 100) for i, c in zip(clip, condition, strict=True))
    assert bool(((batch["t"] >= 0) & (batch["t"] < 1)).all())


def test_conditions_come_in_the_asked_proportions():
    data = {
        "latents": torch.zeros(1, 1, 1, 1),
        "audio": torch.zeros(1, 1),
        "clip": torch.zeros(1, dtype=torch.long),
        "text": torch.ones(1, 1),
        "caption": torch.zeros(1, 1, dtype=torch.long),
        "n_text": torch.ones(1, dtype=torch.long),
        "empty": torch.full((1, 1), -1.0),
        "empty_of": torch.zeros(1, dtype=torch.long),
    }
    config = finetuning.FinetuneConfig(
        "", "", "", batch_size=20_000, text_condition_probability=0.3, conditioning_dropout=0.1
    )
    condition = finetuning.training_batch(data, config, 0)["condition"].flatten()
    # three standard errors of a share in 20,000 draws are at most 0.011
    assert float((condition == -1).float().mean()) == pytest.approx(0.1, abs=0.011)
    assert float((condition == 1).float().mean()) == pytest.approx(0.27, abs=0.011)


def test_segments_are_the_loudest_of_the_tries():
    y = np.zeros(10_000, np.float32)
    y[7000:7100] = 1
    rng = np.random.default_rng(0)
    assert audio.loudest_segment(y, 2000, 200, rng).sum() == 100
    assert len(audio.loudest_segment(y[:500], 2000, 4, rng)) == 500


# --- options of the loop ------------------------------------------------------------------------

NUMBERS = ["step", "train_loss", "train_vlb", "val_loss", "val_loss_ema", "val_vlb_ema"]


def unet_of(folder):
    return ldm.load_pipeline(folder, device="cpu").unet.state_dict()


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}]
)
def test_saving_memory_changes_no_number(config, plain, options):
    saving = finetuning.finetune(replace(config, **options))
    columns = [*NUMBERS, "grad_norm"]
    pd.testing.assert_frame_equal(saving.log[columns], plain.log[columns], rtol=1e-4)


@pytest.mark.parametrize("train", ["attention", "lora"])
def test_part_of_the_weights_is_trained_and_saved_whole(config, checkpoint, train):
    result = finetuning.finetune(replace(config, train=train, lora_rank=2, keep_best=False))
    before, after = unet_of(checkpoint), unet_of(result.checkpoint)
    assert before.keys() == after.keys(), "adapters are merged"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".attn" in name for name in changed)
    assert result.log["val_loss_ema"].iloc[-1] != result.log["val_loss_ema"].iloc[0]


def test_merged_adapters_sound_as_they_did_in_training(config, tmp_path):
    tuned = finetuning.finetune(replace(config, train="lora", keep_best=False))
    # nothing is trained here: the first row is the loss of what was loaded
    again = replace(config, checkpoint=str(tuned.checkpoint), out_dir=str(tmp_path / "again"))
    loaded = finetuning.finetune(replace(again, steps=1, learning_rate=0.0))
    assert loaded.log["val_loss"].iloc[0] == pytest.approx(tuned.log["val_loss_ema"].iloc[-1], rel=1e-5)


def test_half_precision_stays_near_full_precision_and_resumes(config, plain, tmp_path, monkeypatch):
    config, full = replace(config, mixed_precision="bf16"), plain.log["val_loss"]
    whole = finetuning.finetune(config)
    assert not whole.log["val_loss"].equals(full)
    np.testing.assert_allclose(whole.log["val_loss"], full, rtol=0.02)
    parted = replace(config, out_dir=str(tmp_path / "parted"))
    killed_at(5, parted, monkeypatch)
    resumed = finetuning.finetune(parted)
    pd.testing.assert_frame_equal(resumed.log[NUMBERS], whole.log[NUMBERS], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_gives_every_prediction_the_weights_of_its_paper(kind):
    scheduler, batch = DDIMScheduler(prediction_type=kind), random_batch()
    alpha = scheduler.alphas_cumprod[(batch["t"] * 1000).long()]
    snr = alpha / (1 - alpha)
    expected = snr.clamp(max=5.0)
    expected /= {"epsilon": snr, "sample": torch.ones(8), "v_prediction": snr + 1}[kind]
    unet = Answer(torch.zeros(8, 4, 4, 4))
    found = finetuning.denoising(unet, scheduler, batch, snr_gamma=5.0).weight
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_min_snr_trains_other_weights_and_the_simple_loss_is_told_as_well(config, plain):
    weighted, unweighted = finetuning.finetune(replace(config, snr_gamma=5.0)), plain
    assert weighted.best_step == unweighted.best_step > 0
    a, b = unet_of(weighted.checkpoint), unet_of(unweighted.checkpoint)
    assert not all(torch.equal(a[name], b[name]) for name in a)
    first = weighted.log.iloc[0], unweighted.log.iloc[0]
    # nothing is trained yet: the error is the same, its weights are not
    assert first[0]["val_simple_ema"] == pytest.approx(first[1]["val_simple_ema"], rel=1e-6)
    assert first[0]["val_loss_ema"] != pytest.approx(first[1]["val_loss_ema"], rel=1e-3)
    assert (weighted.log["train_simple"].dropna() > 0).all()


def test_simple_loss_is_the_loss_where_no_timestep_is_weighted(config, checkpoint, tmp_path):
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    pipe.scheduler.register_to_config(prediction_type="epsilon")
    tower = ldm.load_clap(str(checkpoint)).audio_encoder
    folder = ldm.save_checkpoint(pipe, tmp_path / "epsilon", {}, tower)
    log = finetuning.finetune(replace(config, checkpoint=str(folder))).log
    for split in ("train", "val"):
        end = "" if split == "train" else "_ema"
        np.testing.assert_allclose(log[f"{split}_simple{end}"], log[f"{split}_loss{end}"], rtol=1e-5)


def test_validation_under_the_sounds_embedding_is_told_beside_that_of_the_captions(plain, config):
    pipe = ldm.load_pipeline(config.checkpoint, device="cpu")
    data = finetuning.load_data(pipe, config)["val"]
    table = finetuning.fixed_losses(pipe.unet, pipe.scheduler, data, condition="audio")
    first = plain.log.iloc[0]
    assert first["val_audio_ema"] == pytest.approx(table["loss"].mean(), rel=1e-4)
    assert first["val_audio_ema"] != first["val_loss_ema"]


def test_bound_is_the_divergence_of_the_posteriors():
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    alpha_bar = scheduler.alphas_cumprod.double()
    t = 300
    previous, now = alpha_bar[t - 1], alpha_bar[t]
    beta, alpha = 1 - now / previous, now / previous
    generator = torch.Generator().manual_seed(0)
    x, guess, noise = torch.randn(3, 1000, generator=generator).double()

    def posterior(latent):
        noisy = now.sqrt() * x + (1 - now).sqrt() * noise
        mean = previous.sqrt() * beta / (1 - now) * latent
        mean += alpha.sqrt() * (1 - previous) / (1 - now) * noisy
        return torch.distributions.Normal(mean, (beta * (1 - previous) / (1 - now)).sqrt())

    divergence = torch.distributions.kl_divergence(posterior(x), posterior(guess)).mean()
    errors = {
        "sample": guess - x,
        "epsilon": (now / (1 - now)).sqrt() * (guess - x),
        "v_prediction": (guess - x) / (1 - now).sqrt(),
    }
    for kind, error in errors.items():
        scheduler.register_to_config(prediction_type=kind)
        bound = bound_at([t], scheduler)[0] * (error**2).mean()
        assert float(bound) == pytest.approx(float(divergence), rel=1e-3), kind


def bound_at(timesteps, scheduler):
    n = len(timesteps)
    batch = random_batch(n) | {"t": (torch.tensor(timesteps) + 0.5) / 1000}
    return finetuning.denoising(Answer(torch.zeros(n, 4, 4, 4)), scheduler, batch).bound


def test_bound_weights_of_noise_are_those_of_the_baseline_trainer():
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    variance = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    expected = betas[1:] ** 2 / (2 * variance * (1 - betas[1:]) * (1 - alpha_bar[1:]))
    found = bound_at([0, 1, 10, 500, 999], scheduler).double()
    torch.testing.assert_close(found[1:], expected[[0, 9, 499, 998]], rtol=1e-3, atol=0)
    assert found[0] == found[1]


# --- what is watched ----------------------------------------------------------------------------


def test_test_loss_is_written_down_and_decides_nothing(config, plain):
    watched, blind = finetuning.finetune(replace(config, test_segments=8)), plain
    assert watched.log["test_loss_ema"].notna().all()
    assert "test_loss" not in blind.log
    a, b = unet_of(watched.checkpoint), unet_of(blind.checkpoint)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_quarters_of_the_timesteps_make_up_the_loss(plain):
    log = plain.log
    quarters = log[[f"val_loss_t{i}" for i in range(1, 5)]]
    np.testing.assert_allclose(quarters.mean(axis=1), log["val_loss_ema"], rtol=1e-5)
    assert (log["val_vlb_ema"] > 0).all()


def test_curves_are_kept_in_csv_and_tensorboard(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = plain
    logs = Path(f"{plain.checkpoint}.logs")
    pd.testing.assert_frame_equal(pd.read_csv(logs / "training_log.csv"), result.log)
    events = EventAccumulator(str(logs / "curves")).Reload()
    losses = [(e.step, e.value) for e in events.Scalars("val_loss_ema")]
    expected = list(zip(result.log["step"], result.log["val_loss_ema"], strict=True))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def wandb_history(file):
    """The numbers in a W&B file: LevelDB's log of records, each in parts of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
            record = b""
    return rows


def test_weights_and_biases_get_the_numbers_offline(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = finetuning.finetune(replace(config, wandb_project="soundscapes", steps=2))
    (file,) = Path(config.out_dir + ".logs").rglob("offline-run-*/*.wandb")
    rows = wandb_history(file)
    for name in ("val_loss_ema", "train_loss"):
        found = [(row["_step"], row[name]) for row in rows if name in row]
        told = result.log[["step", name]].dropna()
        assert found == list(told.itertuples(index=False, name=None)), name


def test_samples_are_the_same_captions_and_scored_beside_a_floor(config):
    result = finetuning.finetune(replace(config, sample_epochs=1, n_watched=3))
    scores = result.scores
    assert set(scores["step"]) == {0, 2, 4, 6}
    assert set(scores["metric"]) == {"FAD", "KAD"}
    assert scores["floor"].notna().all() and set(scores["n_candidate"]) == {3}
    files = sorted(Path(config.out_dir + ".logs", "samples").rglob("*.wav"))
    assert len(files) == 4 * 3
    card = (result.checkpoint / "README.md").read_text()
    assert "floor, real against real" in card
    kept = f"step {result.best_step} against validation"
    assert card.count("FAD in logmel-stats") == card.count(f"FAD in logmel-stats, {kept}") == 1


def test_weights_that_are_kept_are_scored_and_the_card_speaks_of_them(config):
    # nothing is gained at a rate of zero: the first weights are kept, the last ones sampled too
    options = {"learning_rate": 0.0, "steps": 6, "validation_steps": 3, "sample_epochs": 1e6}
    result = finetuning.finetune(replace(config, **options, n_watched=2, test_segments=4))
    assert set(result.scores["step"]) == {0, 6} and result.best_step == 0
    card = (result.checkpoint / "README.md").read_text()
    assert f"{result.log['test_loss_ema'].iloc[0]:.4f}" in card and "of step 0." in card
    assert "FAD in logmel-stats, step 0 " in card and "step 6 against" not in card


def test_scores_of_later_are_noted_in_the_card(plain, tmp_path):
    import shutil

    from soundscapes_utils import fad

    folder = shutil.copytree(plain.checkpoint, tmp_path / "copy")
    before = (folder / "README.md").read_text()
    assert "No samples were scored." in before
    real, made = np.random.default_rng(0).normal(size=(2, 30, 4))
    for name in ("once", "twice"):
        scores = fad.score_table(real, {name: made}, embedding="toy").assign(reference="mixes")
        finetuning.note_scores(folder, scores)
    card = (folder / "README.md").read_text()
    assert "FAD in toy, twice against mixes (n 30 / 30)" in card and "once" not in card
    for part in before.split("## Scores")[0], before[before.index("## Use") :]:
        assert part in card
    with pytest.raises(finetuning.TrainingError, match="no model card"):
        finetuning.note_scores(tmp_path, scores)


def test_card_tells_data_licence_steps_and_loss(config):
    options = {"data_licence": "CC BY 3.0", "validation_steps": 6, "snr_gamma": 5.0}
    result = finetuning.finetune(replace(config, **options))
    card = (result.checkpoint / "README.md").read_text()
    for words in (
        *("noise; licence: CC BY 3.0", "6 steps of 4 segments", "'train': 4"),
        *("(sample); min-SNR gamma 5 (", "license: unknown", "from `small`"),
    ):
        assert words in card
    assert str(result.checkpoint.parent) not in card


def test_card_has_the_licence_of_the_start(config):
    result = finetuning.finetune(replace(config, checkpoint="builtin", steps=1))
    card = (result.checkpoint / "README.md").read_text()
    assert "license: mit" in card and "base_model: builtin" in card


def start_that_knows(heard, checkpoint, folder):
    pipe, clap = ldm.load_pipeline(checkpoint, device="cpu"), ldm.load_clap(str(checkpoint))
    return str(ldm.save_checkpoint(pipe, folder, {"heard": heard, "steps": 2}, clap.audio_encoder))


def test_folds_of_the_start_are_known_to_the_fine_tuned_model_too(config, checkpoint, tmp_path):
    start = start_that_knows({"esc10": [2, 3, 4], "tau": [1]}, checkpoint, tmp_path / "start")
    info = {"training_dataset": "mixes of esc10", "heard": {"esc10": [4, 5]}}
    result = finetuning.finetune(replace(config, checkpoint=start, steps=1, info=info))
    heard = ldm.checkpoint_info(result.checkpoint)["heard"]
    assert heard == {"esc10": [2, 3, 4, 5], "tau": [1]}
    card = (result.checkpoint / "README.md").read_text()
    assert "by data set: esc10:2,3,4,5;tau:1" in card


def test_folds_that_makers_of_generated_clips_had_heard_are_known_too(config, sounds):
    folder, table = sounds
    table = table.assign(dataset="generated", heard="esc10:2,3", split=["train"] * 6 + ["val"] * 6)
    table.loc[0, "heard"] = ""
    result = finetuning.finetune(table_config(config, folder, table))
    assert ldm.checkpoint_info(result.checkpoint)["heard"] == {"esc10": [2, 3]}


# --- a table as the set -------------------------------------------------------------------------


@pytest.fixture
def sounds(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        audio.save_audio(tmp_path / f"{i}.wav", 0.1 * rng.normal(size=8_000).clip(-3, 3), 16_000)
    table = pd.DataFrame({"path": [f"{i}.wav" for i in range(12)], "caption": "a hiss"})
    return tmp_path, table.assign(source_id=[f"s{i // 2}" for i in range(12)])


def table_config(config, folder, table):
    table.to_csv(folder / "sounds.csv", index=False)
    return replace(config, dataset_root=str(folder / "sounds.csv"), segment_s=0.32, steps=1)


def test_table_is_a_set_and_says_which_folds_it_has(config, sounds):
    folder, table = sounds
    table = table.assign(dataset="esc10", fold=[1, 2] * 6)
    table["split"] = ["train"] * 6 + ["val"] * 6
    result = finetuning.finetune(table_config(config, folder, table.drop(index=0)))
    assert ldm.checkpoint_info(result.checkpoint)["heard"] == {"esc10": [1, 2]}
    assert "'train': 5" in (result.checkpoint / "README.md").read_text()


def test_splits_of_a_table_share_no_source(config, sounds, checkpoint):
    folder, table = sounds
    table["source_id"] = [f"s{i % 6}" for i in range(12)]
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    names = (f"s{i}" for i in range(1000))
    for _ in range(20):  # enough draws of names for a validation split of any of them
        table["source_id"] = [next(names) for _ in range(6)] * 2
        config = replace(table_config(config, folder, table), segments_per_clip=1, test_segments=8)
        try:
            sizes = {k: len(v["n_text"]) for k, v in finetuning.load_data(pipe, config).items()}
        except store.DataError as error:
            assert "no clips in its split 'val'" in str(error)
            continue
        assert {"train", "val"} <= set(sizes) and sum(sizes.values()) == 12
        assert all(size % 2 == 0 for size in sizes.values()), "both clips of a source together"
        return
    raise AssertionError("one source in ten should be one of validation")


def test_wrong_tables_name_the_fault(config, sounds):
    folder, table = sounds
    for wrong, words in [
        (table.rename(columns={"caption": "words"}), "has no column caption"),
        (table.assign(split="training"), "no clips in its split 'train'"),
        (table.assign(split="train"), "no clips in its split 'val'"),
        (table.assign(split=["train", "val"] * 6), "sources in more than one split: s0"),
    ]:
        with pytest.raises(store.DataError, match=words):
            finetuning.finetune(table_config(config, folder, wrong))
    with pytest.raises(ValueError, match="cannot be read"):
        finetuning.finetune(replace(config, dataset_root=str(folder / "none.csv")))


# --- fixed losses -------------------------------------------------------------------------------


class Echo(torch.nn.Linear):
    """A U-Net whose prediction is its condition: the error shows which one it was given."""

    def __init__(self):
        super().__init__(1, 1)

    def forward(self, noisy, t, encoder_hidden_states, class_labels):
        return SimpleNamespace(sample=class_labels[:, :1, None, None].expand_as(noisy))


def test_conditions_are_those_of_clip_other_clip_nothing_and_sound():
    texts = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [-1, 0.2]]), dim=-1)
    data = {
        "latents": torch.zeros(3, 1, 2, 2),
        "clip": torch.arange(3),
        "text": texts,
        "caption": torch.arange(3)[:, None],
        "audio": texts + 5,
        "empty": torch.full((1, 2), 3.0),
        "empty_of": torch.zeros(3, dtype=torch.long),
    }
    scheduler = DDIMScheduler(prediction_type="sample")
    expected = {
        "matched": texts,
        "mismatched": texts[[2, 2, 0]],  # the caption least like it
        "unconditional": data["empty"].expand(3, -1),
        "audio": texts + 5,
    }
    for name, condition in expected.items():
        table = finetuning.fixed_losses(Echo(), scheduler, data, n=3, condition=name)
        np.testing.assert_allclose(table["error"], condition[:, 0] ** 2, rtol=1e-5)
    with pytest.raises(ValueError, match="condition must be one of matched"):
        finetuning.fixed_losses(Echo(), scheduler, data, condition="left")


def test_fixed_losses_are_the_same_however_many_at_once(checkpoint, config):
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    data = finetuning.load_data(pipe, config)["train"]
    one, other = (
        finetuning.fixed_losses(pipe.unet, pipe.scheduler, data, n=8, batch_size=size) for size in (8, 3)
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-4)
    assert sorted(one["t"]) == [(i + 0.5) / 8 for i in range(8)]


# --- robustness ---------------------------------------------------------------------------------


def die_at(step, monkeypatch):
    draw = finetuning.training_batch

    def dies(data, settings, number):
        if number == step:
            raise KeyboardInterrupt
        return draw(data, settings, number)

    monkeypatch.setattr(finetuning, "training_batch", dies)


def killed_at(step, config, monkeypatch):
    """Begin a training that ends as if it were killed in a step."""
    die_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(config)
    monkeypatch.undo()


def test_divergence_stops_and_names_the_last_good_state(config):
    wild = replace(config, learning_rate=1.0, lr_warmup_steps=5, max_grad_norm=1e9, steps=40)
    with pytest.raises(finetuning.TrainingError, match=r"diverged|not finite") as told:
        finetuning.finetune(wild)
    assert "a lower learning_rate (now 1)" in str(told.value)


def note_of(state):
    with safe_open(state, "pt") as stored:
        return stored.metadata()["note"]


def test_broken_loss_names_the_state_from_which_the_command_goes_on(
    config, plain, tmp_path, monkeypatch
):
    parted = replace(config, out_dir=str(tmp_path / "parted"))
    good, states = finetuning.denoising, Path(parted.out_dir + ".states")

    def breaks_after_a_state(*arguments):
        found = good(*arguments)
        broken = any('"step": 4' in note_of(file) for file in states.rglob("*.safetensors"))
        return found._replace(error=found.error * float("nan")) if broken else found

    monkeypatch.setattr(finetuning, "denoising", breaks_after_a_state)
    told = r"at step 4\..*parted\.states/\w+\.safetensors;.*lower learning_rate.*starts at step 0"
    with pytest.raises(finetuning.TrainingError, match=told):
        finetuning.finetune(parted)
    monkeypatch.undo()
    a, b = unet_of(plain.checkpoint), unet_of(finetuning.finetune(parted).checkpoint)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_run_goes_on_with_more_parts_after_memory_was_full(config, plain, tmp_path, monkeypatch):
    parted = replace(config, out_dir=str(tmp_path / "parted"))
    killed_at(5, parted, monkeypatch)
    draw, steps = finetuning.training_batch, []
    monkeypatch.setattr(finetuning, "training_batch", lambda *a: (steps.append(a[2]), draw(*a))[1])
    resumed = finetuning.finetune(
        replace(parted, gradient_accumulation_steps=2, gradient_checkpointing=True)
    )
    assert steps == [4, 5], "from the state of step 4"
    pd.testing.assert_frame_equal(resumed.log[NUMBERS], plain.log[NUMBERS], rtol=1e-4)


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"mixed_precision": "fp8"}, "mixed_precision takes no, fp16, bf16; not 'fp8'"),
        ({"mixed_precision": "fp16"}, "needs a GPU"),
        ({"train": "half"}, "train takes auto, full, attention, lora; not 'half'"),
        ({"steps": 0}, "steps takes numbers from 1 on, not 0"),
        ({"gradient_accumulation_steps": 3}, "batch_size 4 must be a multiple of its 3 parts"),
        ({"sample_epochs": 1, "n_watched": 1}, "n_watched takes numbers from 2 on, not 1"),
        ({"learning_rate": float("nan")}, "learning_rate takes numbers from 0 to 1, not nan"),
        ({"conditioning_dropout": 10}, "conditioning_dropout takes numbers from 0 to 1, not 10"),
        ({"max_grad_norm": 0}, "max_grad_norm takes numbers from 1e-9 on, not 0"),
    ],
)
def test_wrong_settings_are_one_clear_error(config, wrong, told):
    with pytest.raises(finetuning.TrainingError, match=told):
        finetuning.finetune(replace(config, **wrong))


def test_killed_preparation_keeps_what_is_done_and_others_share_it(config, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "CLIPS_PER_FILE", 1)
    encode, calls = ldm.encode_mel, []

    def dies_at_the_fourth(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(ldm, "encode_mel", dies_at_the_fourth)
    config = replace(config, cache_dir=str(tmp_path / "cache"), segments_per_clip=1)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(config)
    finetuning.finetune(config)
    assert len(calls) == 8 + 1, "each of eight clips once, and the one that was interrupted"
    other = replace(config, learning_rate=1e-4, out_dir=str(tmp_path / "other"))
    finetuning.finetune(other)
    assert len(calls) == 9


def test_clip_as_short_as_a_segment_is_kept_once(config, checkpoint):
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    for length, expected in [(0.64, [0, 0, 1, 1, 2, 2, 3, 3]), (1.28, [0, 1, 2, 3])]:
        data = finetuning.load_data(pipe, replace(config, segment_s=length))
        assert data["train"]["clip"].tolist() == expected


def test_published_audio_tower_goes_with_the_fine_tuned_checkpoint(config, checkpoint, tmp_path):
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    clap = tiny_checkpoints.audio_tower(projection_dim=128)
    start = ldm.save_checkpoint(pipe, tmp_path / "published", {}, clap)
    result = finetuning.finetune(replace(config, checkpoint=str(start), steps=1))
    tuned = ldm.load_clap(str(result.checkpoint))
    assert tuned.sample_rate == 48_000
    for a, b in zip(tuned.audio_encoder.parameters(), clap.parameters(), strict=True):
        assert torch.equal(a, b)


# --- tables, files and processes ----------------------------------------------------------------


@pytest.mark.parametrize(
    "text, told",
    [
        ("checkpoint: builtin\nstep: 3", "unexpected keyword argument 'step'; see"),
        ("checkpoint: builtin", "missing 2 required .*'dataset_root' and 'out_dir'"),
        ("checkpoint: a\ndataset_root: b\nout_dir: c\nsteps: many", "steps: could not convert"),
        ("- a list", "not a YAML file of names"),
    ],
)
def test_wrong_configurations_name_the_remedy(tmp_path, text, told):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(finetuning.TrainingError, match=told):
        finetuning.read_config(file)


def test_configuration_reads_numbers_as_people_write_them(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("checkpoint: a\ndataset_root: b\nout_dir: c\nlearning_rate: 1e-4\nsteps: 2e3")
    config = finetuning.read_config(file, [("sample_embeddings", "[vggish, [yamnet, y.tflite]]")])
    assert (config.learning_rate, config.steps) == (1e-4, 2000)
    assert config.sample_embeddings == ("vggish", ["yamnet", "y.tflite"])


def test_two_processes_have_the_loss_of_one(config, plain, checkpoint, capsys, monkeypatch):
    # as in a notebook: the package may be on the path of this process only
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = plain
    both = finetuning.launch(replace(config, gradient_accumulation_steps=2), processes=2)
    said = capsys.readouterr().out
    assert said.count("Checkpoint:") == 1, "one process speaks"
    pd.testing.assert_frame_equal(both.log[NUMBERS], alone.log[NUMBERS], rtol=2e-6)
    # a sum over parameters of sums that were taken in another order
    pd.testing.assert_series_equal(both.log["grad_norm"], alone.log["grad_norm"], rtol=2e-5)
    # together, not one by one: AdamW blows up the rounding of gradients that are zero but for it
    start, one, two = (
        torch.cat([w.flatten() for w in unet_of(folder).values()])
        for folder in (checkpoint, alone.checkpoint, both.checkpoint)
    )
    assert (two - one).norm() < 0.01 * (one - start).norm()


def test_launch_in_one_process_is_the_trainer_itself(config, monkeypatch):
    monkeypatch.setattr(finetuning, "finetune", lambda told: told)
    assert finetuning.launch(config) is config
    with pytest.raises(finetuning.TrainingError, match="processes must be"):
        finetuning.launch(config, processes=0)


def test_launched_processes_tell_what_went_wrong(config, monkeypatch, capsys):
    popen = subprocess.Popen
    code = "import sys; print('at work'); sys.exit('error: the set is empty')"
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **options: popen([sys.executable, "-c", code], **options)
    )
    with pytest.raises(finetuning.TrainingError, match=r"status 1: error: the set is empty"):
        finetuning.launch(config, processes=2)
    assert "at work" in capsys.readouterr().out
    file = Path(config.out_dir + ".logs") / "config.yaml"
    assert finetuning.read_config(file) == config


# --- what can be known before anything is trained, and what can be made again --------------------


def test_checkpoints_that_are_no_audioldm_are_refused_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(metadata, "read_clips", lambda *_: pytest.fail("the set was read"))
    folder = tmp_path / "two"
    folder.mkdir()
    for kind in ("MusicLDMPipeline", "StableAudioPipeline"):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        told = f"two: is an {kind}; AudioLDMPipeline or AudioLDM2Pipeline is needed"
        with pytest.raises(store.DataError, match=told):
            finetuning.finetune(replace(config, checkpoint=str(folder)))


@pytest.mark.parametrize("why", ["no key", "no package"])
def test_weights_and_biases_that_cannot_be_used_are_refused_at_once(config, tmp_path, monkeypatch, why):
    import wandb

    monkeypatch.setattr(metadata, "read_clips", lambda *_: pytest.fail("the set was read"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    if why == "no package":
        monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(finetuning.TrainingError, match=r"wandb_project: .*wandb login"):
        finetuning.finetune(replace(config, wandb_project="soundscapes"))


def test_bad_rows_of_a_table_are_set_aside_and_the_rest_trains(config, sounds):
    folder, table = sounds
    table["split"] = ["train"] * 6 + ["val"] * 6
    table["caption_2"] = "a long hiss"
    table.loc[0, ["caption", "caption_2"]] = ""
    table.loc[1, ["caption", "caption_2"]] = " "
    table.loc[2, "caption"] = ""  # has another
    (folder / "3.wav").write_bytes(b"no sound")
    (folder / "4.wav").unlink()
    audio.save_audio(folder / "8.wav", np.zeros(8_000), 16_000)
    config = replace(table_config(config, folder, table), sample_epochs=1, n_watched=2)
    with pytest.warns(UserWarning, match=r"5 of 12 clips are set aside, see .*set_aside\.csv"):
        result = finetuning.finetune(config)
    card = (result.checkpoint / "README.md").read_text()
    assert "'train': 2" in card and "'val': 5" in card
    aside = store.read_table(f"{config.out_dir}.logs/set_aside.csv")
    assert [Path(path).stem for path in aside["path"]] == ["0", "1", "3", "4", "8"]
    assert aside["reason"][:2].tolist() == ["has no caption"] * 2 and aside["split"][4] == "val"
    for place, word in ((2, "3.wav"), (3, "no such file"), (4, "silent")):
        assert word in aside["reason"][place]


@pytest.fixture
def plan(tmp_path):
    """Twelve planned mixes of 1 s, of sounds that are longer than a segment."""
    rng, rows = np.random.default_rng(0), []
    for i in range(10):
        path = tmp_path / "sources" / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.save_audio(path, 0.2 * rng.normal(size=44_100).clip(-3, 3), 44_100)
        rows.append((str(path), "dog" if i < 5 else "park", f"{i}", i % 5 + 1))
    clips = pd.DataFrame(rows, columns=["path", "label", "source_id", "fold"])
    return mixing.plan_mixes(clips[:5], clips[5:], 12, duration_s=1.0)


def trained_on(table, folder, config):
    table = table.assign(
        path=[Path(p).relative_to(folder) if folder.name in p else p for p in table["path"]]
    )
    file = store.write_table(table, folder / "mixes.csv")
    result = finetuning.finetune(replace(config, dataset_root=str(file), out_dir=str(folder / "out")))
    weights = result.checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    return result, weights.read_bytes()


def test_mixes_that_were_only_planned_train_the_same_bytes_as_their_files(config, plan, tmp_path):
    config = replace(config, sample_epochs=2, n_watched=2, sample_embeddings=("logmel-stats",))
    made = mixing.render_mixes(plan, tmp_path / "made", ldm.SAMPLE_RATE)
    files, weights = trained_on(made, tmp_path / "made", config)
    planned, same = trained_on(plan, tmp_path / "planned", config)
    assert same == weights
    columns = files.log.columns.drop(["seconds", "samples_per_s"])
    pd.testing.assert_frame_equal(planned.log[columns], files.log[columns])
    pd.testing.assert_frame_equal(planned.scores, files.scores)
    left = {p.parent.parent.name for p in (tmp_path / "planned").rglob("*.wav")}
    assert left == {"samples"}


@pytest.mark.parametrize("role", ["foreground", "background"])
def test_planned_mixes_of_a_bad_source_are_set_aside(config, plan, tmp_path, role):
    bad = plan[role].iloc[0]
    Path(bad).write_bytes(b"RIFF")
    with pytest.warns(UserWarning, match=rf"of 10 clips are set aside.*{bad}"):
        trained_on(plan, tmp_path / "planned", config)
    aside = pd.read_csv(tmp_path / "planned" / "out.logs" / "set_aside.csv")
    read = plan[plan["split"] != "test"]  # nothing is asked of the test split
    assert len(aside) == (read[role] == bad).sum()


def test_planned_mixes_know_sources_by_content(config, plan, tmp_path):
    _, weights = trained_on(plan, tmp_path / "planned", config)
    assert trained_on(plan, tmp_path / "planned", config)[1] == weights
    audio.save_audio(plan["foreground"].iloc[0], np.sin(np.arange(44_100) / 9) / 2, 44_100)
    assert trained_on(plan, tmp_path / "planned", config)[1] != weights
    Path(plan["background"].iloc[0]).unlink()
    with pytest.raises(store.DataError, match="this source is not there"):
        trained_on(plan, tmp_path / "planned", config)


def test_a_set_of_bad_rows_alone_says_what_is_wrong_with_them(config, sounds):
    folder, table = sounds
    table["split"] = ["train"] * 6 + ["val"] * 6
    config = table_config(config, folder, table.assign(caption=""))
    with pytest.warns(UserWarning), pytest.raises(store.DataError, match=r"12 of 12 .*has no caption"):
        finetuning.finetune(config)
    assert len(store.read_table(f"{config.out_dir}.logs/set_aside.csv")) == 12
    for name in table["path"][6:]:
        (folder / name).write_bytes(b"")
    config = table_config(config, folder, table)
    with pytest.warns(UserWarning), pytest.raises(store.DataError, match="no clips in its split 'val'"):
        finetuning.finetune(config)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"x" * len(b)])
def test_damaged_files_of_the_cache_are_made_again(config, checkpoint, damage):
    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    whole = finetuning.load_data(pipe, config)
    files = sorted(Path(config.out_dir + ".cache").glob("*.safetensors"))
    assert len(files) == 3, "the captions, and the sounds of two splits"
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(damage(before[0]))
    files[1].write_bytes(damage(before[1]))
    with pytest.warns(UserWarning, match="damaged .*made again") as told:
        again = finetuning.load_data(pipe, config)
    assert len([w for w in told if "damaged" in str(w.message)]) == 2
    assert [file.read_bytes() for file in files] == before
    assert all(torch.equal(again[s][k], whole[s][k]) for s in whole for k in whole[s])


def test_damaged_notes_and_states_are_made_again(config, plain, tmp_path, monkeypatch):
    config = replace(config, out_dir=str(tmp_path / "parted"))
    killed_at(5, config, monkeypatch)
    (state,) = Path(config.out_dir + ".states").glob("*.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged .*training starts anew"):
        result = finetuning.finetune(config)
    pd.testing.assert_frame_equal(result.log[NUMBERS], plain.log[NUMBERS], atol=1e-6)
    die_at(0, monkeypatch)
    for text in ("", "{", "[]", json.dumps({"key": 1})):
        (result.checkpoint / "training.json").write_text(text)
        with pytest.raises(KeyboardInterrupt):  # it is trained again
            finetuning.finetune(config)


def test_two_trainers_share_a_cache(config, checkpoint, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    pipes = [ldm.load_pipeline(checkpoint, device="cpu") for _ in range(2)]
    shared = replace(config, cache_dir=str(tmp_path / "cache"))
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(finetuning.load_data, pipes, [shared, replace(shared, out_dir="other")])
    assert all(torch.equal(one[s][k], other[s][k]) for s in one for k in one[s])
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_front_end_of_a_published_tower_keys_the_cache_and_goes_along(config, checkpoint, tmp_path):
    from transformers import ClapFeatureExtractor

    pipe = ldm.load_pipeline(checkpoint, device="cpu")
    tower = tiny_checkpoints.audio_tower(projection_dim=128)
    start = ldm.save_checkpoint(pipe, tmp_path / "published", {}, tower)
    ClapFeatureExtractor(frequency_min=300).save_pretrained(start / "audio_encoder")
    result = finetuning.finetune(replace(config, checkpoint=str(start), steps=1))
    clap = ldm.load_clap(str(result.checkpoint))
    assert clap.extractor.frequency_min == 300


def test_clips_without_a_fold_do_not_end_a_training(config, sounds):
    folder, table = sounds
    table = table.assign(dataset="esc10", fold=[1, "", 2, "", 3, "", *[4] * 6])
    table["split"] = ["train"] * 6 + ["val"] * 6
    result = finetuning.finetune(table_config(config, folder, table))
    assert ldm.checkpoint_info(result.checkpoint)["heard"] == {"esc10": [1, 2, 3]}


# --- AudioLDM 2 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A tiny AudioLDM 2, its index as published: a GPT-2 without the head that the pipeline calls."""
    folder = tmp_path_factory.mktemp("second") / "tiny"
    tiny_checkpoints.audioldm2(folder, as_published=True, bands=64)
    store.write_atomic(folder / ldm.INFO_FILE, json.dumps({"steps": 2}))
    return folder


def make_config2(checkpoint, dataset, folder):
    options = {"steps": 4, "conditioning_dropout": 0.5, "lora_rank": 2}
    options |= {"segments_per_clip": 1, "segment_s": 0.32, "n_watched": 2}
    return replace(make_config(checkpoint, dataset, folder), **options)


@pytest.fixture
def config2(second, dataset, tmp_path):
    return make_config2(second, dataset, tmp_path)


@pytest.fixture(scope="module")
def plain2(second, dataset, tmp_path_factory):
    """The unbroken run of `config2`, to compare with."""
    return finetuning.finetune(make_config2(second, dataset, tmp_path_factory.mktemp("plain2")))


def test_losses_of_audioldm2_are_those_of_a_loop_around_the_pipelines_own_encoding(config2, tmp_path):
    from diffusers import AudioLDM2Pipeline

    options = {"steps": 3, "validation_steps": 1, "validation_segments": 1}
    config = replace(config2, train="full", **options)
    log = finetuning.finetune(config).log
    pipe = AudioLDM2Pipeline.from_pretrained(tiny_checkpoints.audioldm2(tmp_path / "two", bands=64))
    data = finetuning.load_data(pipe, config)["train"]
    clips = metadata.read_clips(config.dataset_root).query("split == 'train'").reset_index(drop=True)
    optimizer, losses, dropped = torch.optim.AdamW(pipe.unet.parameters()), [], []
    for step in range(config.steps):
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        index = torch.randint(len(data["latents"]), (4,), generator=draw)
        which, _, drop = (torch.rand(4, generator=draw) for _ in range(3))
        t = ((torch.arange(4) + torch.rand(4, generator=draw)) / 4 * 1000).long()
        latents = data["latents"][index]
        noise = torch.randn(latents.shape, generator=draw)
        noisy, errors = pipe.scheduler.add_noise(latents, noise, t), []
        for i in range(4):
            caption = clips[["caption", "caption_2", "caption_3"]].iloc[int(data["clip"][index[i]])]
            with torch.no_grad():
                text, mask, generated = pipe.encode_prompt(
                    caption.iloc[int(which[i] * 3)], "cpu", 1, True
                )
            # of the pair for guidance the first is the empty prompt
            row = slice(0, 1) if drop[i] < 0.5 else slice(1, 2)
            streams = {"encoder_hidden_states": generated[row], "encoder_hidden_states_1": text[row]}
            guess = pipe.unet(
                noisy[i : i + 1], t[i], **streams, encoder_attention_mask_1=mask[row]
            ).sample
            errors.append(((guess - noise[i]) ** 2).mean())
        loss = torch.stack(errors).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pipe.unet.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 2)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        dropped += (drop < 0.5).tolist()
    assert 0 < sum(dropped) < len(dropped)
    np.testing.assert_allclose(log["train_loss"].dropna(), losses, rtol=1e-4)
    assert log["val_audio_ema"].isna().all(), "there is no embedding of a sound"


def test_sounds_encoded_together_are_those_encoded_one_by_one(config2):
    config = replace(config2, segments_per_clip=1)
    pipe = ldm.load_pipeline(config.checkpoint, "cpu")
    paths = metadata.read_clips(config.dataset_root)["path"].tolist()
    paths = (paths * 40)[:35]  # more than two passes
    together = conditioning.sound_tensors(paths, pipe, config, 0)
    alone = [conditioning.sound_tensors([path], pipe, config, i) for i, path in enumerate(paths)]
    for name in ("latents", "clip"):
        torch.testing.assert_close(together[name], torch.cat([part[name] for part in alone]))
    assert len(torch.unique(together["latents"], dim=0)) > 2, "sounds that differ"


def test_audioldm2_resumes_with_the_same_bytes(config2, plain2, tmp_path, monkeypatch):
    parted = replace(config2, out_dir=str(tmp_path / "parted"))
    killed_at(3, parted, monkeypatch)
    resumed = finetuning.finetune(parted)
    pd.testing.assert_frame_equal(resumed.log[NUMBERS], plain2.log[NUMBERS], check_exact=True)
    for name in ("unet/diffusion_pytorch_model.safetensors", ldm.ADAPTER_FILE):
        assert (resumed.checkpoint / name).read_bytes() == (plain2.checkpoint / name).read_bytes()


def test_captions_are_encoded_once_whatever_the_language_model_is_called(config2, tmp_path, monkeypatch):
    from diffusers import AudioLDM2Pipeline

    encode, seen = AudioLDM2Pipeline.encode_prompt, []

    def encode_and_tell(pipe, texts, *rest):
        seen.extend(texts)
        return encode(pipe, texts, *rest)

    monkeypatch.setattr(AudioLDM2Pipeline, "encode_prompt", encode_and_tell)
    data = finetuning.load_data(ldm.load_pipeline(config2.checkpoint, "cpu"), config2)
    # one of each length a second time, with the empty text beside it
    assert set(seen) == set(TEXTS) and len(seen) == len(set(TEXTS)) + len({map(len, TEXTS)}) + 2
    shared = replace(config2, out_dir=str(tmp_path / "other"), cache_dir=config2.out_dir + ".cache")
    seen.clear()
    again = finetuning.load_data(ldm.load_pipeline(config2.checkpoint, "cpu"), shared)
    assert not seen
    headed = tiny_checkpoints.audioldm2(tmp_path / "headed", bands=64)
    other = replace(config2, checkpoint=str(headed), out_dir=str(tmp_path / "third"))
    third = finetuning.load_data(ldm.load_pipeline(headed, "cpu"), other)
    for found in (again, third):
        assert all(torch.equal(data[s][k], found[s][k]) for s in data for k in data[s])


def test_audioldm2_is_trained_by_adapters_that_fit_its_start_and_are_merged(second, plain2, tmp_path):
    from diffusers import AudioLDM2Pipeline
    from diffusers.loaders.peft import PeftAdapterMixin

    start = AudioLDM2Pipeline.from_pretrained(tiny_checkpoints.audioldm2(tmp_path / "two", bands=64))
    tuned = AudioLDM2Pipeline.from_pretrained(plain2.checkpoint)
    card = (plain2.checkpoint / "README.md").read_text()
    assert "trained: lora" in card and '"audioldm2", checkpoint=' in card
    before = {name: value.clone() for name, value in start.unet.state_dict().items()}
    after = tuned.unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed and all(".attn" in name for name in changed)
    # as the card says
    unet = start.unet
    unet.__class__ = type("UNet", (PeftAdapterMixin, type(unet)), {})
    unet.load_lora_adapter(plain2.checkpoint, weight_name=ldm.ADAPTER_FILE, prefix="unet")
    options = {"audio_length_in_s": 0.32, "num_inference_steps": 2}
    one, other, plain = (
        p("rain", generator=torch.Generator().manual_seed(0), **options).audios
        for p in (start, tuned, ldm.load_pipeline(second, "cpu"))
    )
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(other - plain).max() > 1e-3


def test_adapters_of_audioldm_open_in_diffusers(config, checkpoint):
    result = finetuning.finetune(replace(config, train="lora", lora_rank=2, steps=2, keep_best=False))
    start, tuned = (ldm.load_pipeline(f, "cpu").unet for f in (checkpoint, result.checkpoint))
    start.load_lora_adapter(result.checkpoint, weight_name=ldm.ADAPTER_FILE, prefix="unet")
    start.fuse_lora()
    start.unload_lora()
    for one, other in zip(start.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_samples_of_audioldm2_do_not_depend_on_the_prompts_beside_them(config2):
    options = {"learning_rate": 0.0, "steps": 1, "sample_epochs": 1, "n_watched": 3}
    finetuning.finetune(replace(config2, **options))
    pipe = ldm.load_pipeline(config2.checkpoint, "cpu")
    files = sorted(Path(config2.out_dir + ".logs", "samples", "step-00000000").glob("*.wav"))
    clips = metadata.read_clips(config2.dataset_root).query("split == 'val'")
    rows = np.linspace(0, len(clips) - 1, 3).astype(int)
    for i, (file, row) in enumerate(zip(files, rows, strict=True)):
        noise = torch.Generator().manual_seed(i)
        options = {"audio_length_in_s": 0.32, "num_inference_steps": 2, "guidance_scale": 3.5}
        y = pipe(clips["caption"].iloc[row], generator=noise, **options).audios[0]
        np.testing.assert_allclose(audio.load_audio(file)[0], y / max(1, np.abs(y).max()), atol=1e-3)


def test_options_that_save_memory_change_no_number_of_audioldm2(config2, plain2):
    saving = replace(config2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    log = finetuning.finetune(saving).log
    pd.testing.assert_frame_equal(log[NUMBERS], plain2.log[NUMBERS], rtol=1e-4)


def test_streams_reach_a_wrapped_unet_as_the_pipeline_gives_them(second):
    pipe = ldm.load_pipeline(second, "cpu")
    found = conditioning.text_tensors(pipe, ["rain", "a dog is barking in the rain"])
    inputs = conditioning.unet_inputs(torch.nn.DataParallel(pipe.unet), found["text"])
    for i, prompt in enumerate(["rain", "a dog is barking in the rain"]):
        text, mask, generated = pipe.encode_prompt(prompt, "cpu", 1, False)
        n = mask.shape[1]
        torch.testing.assert_close(inputs["encoder_hidden_states"][i], generated[0])
        torch.testing.assert_close(inputs["encoder_hidden_states_1"][i, :n], text[0])
        assert inputs["encoder_attention_mask_1"][i].sum() == n
