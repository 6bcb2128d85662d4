"""The trainer: what it draws, what it minimises, how it resumes."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from soundscapes_utils import audio, finetuning, ldm, metadata

TEXTS = ["a dog is barking", "rain", "a dog is barking in the rain"] * 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pipe, tower = ldm.build_small(TEXTS, channels=(16, 32, 48))
    rng = np.random.default_rng(0)
    mels = [ldm.waveform_to_mel(rng.normal(size=10_240), 64) for _ in range(4)]
    pipe.vae.fit(torch.stack(mels))
    folder = tmp_path_factory.mktemp("start") / "small"
    return ldm.save_checkpoint(pipe, folder, {"training_folds": []}, tower.eval())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(6):
        path = folder / "audio" / f"{i}.wav"
        path.parent.mkdir(exist_ok=True)
        audio.save_audio(path, 0.2 * rng.normal(size=16_000).clip(-3, 3), 16_000)
        rows.append((str(i), "train" if i < 4 else "val", str(path), "dog", "park", *TEXTS[:3]))
    names = ["mix_id", "split", "path", "foreground_label", "scene"]
    table = pd.DataFrame(rows, columns=[*names, "caption", "caption_2", "caption_3"])
    return metadata.write_audiocaps(table, folder / "metadata", "noise")


@pytest.fixture
def config(checkpoint, dataset, tmp_path):
    return finetuning.FinetuneConfig(
        checkpoint=str(checkpoint),
        dataset_root=str(dataset),
        out_dir=str(tmp_path / "out"),
        steps=6,
        batch_size=4,
        learning_rate=1e-3,
        warmup_steps=2,
        segment_s=0.64,
        val_every=2,
        info={"training_dataset": "noise"},
    )


def test_result_opens_and_carries_its_note(config):
    result = finetuning.finetune(config)
    assert list(result.log["step"]) == [0, 2, 4, 6]
    assert np.isfinite(result.log[["val_loss", "val_loss_ema"]]).all().all()
    best = result.log.loc[result.log["val_loss_ema"].idxmin(), "step"]
    assert result.best_step == best
    assert ldm.checkpoint_info(result.checkpoint)["training_dataset"] == "noise"
    assert ldm.load_pipeline(result.checkpoint, device="cpu").unet.config.in_channels == 32


def test_killed_run_ends_with_the_same_weights_and_losses(config, tmp_path, monkeypatch):
    whole = finetuning.finetune(config)
    parted = replace(config, out_dir=str(tmp_path / "parted"))
    draw, calls = finetuning.draw, []

    def dies_at_the_fourth(data, settings, step):
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return draw(data, settings, step)

    monkeypatch.setattr(finetuning, "draw", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        finetuning.finetune(parted)
    monkeypatch.setattr(finetuning, "draw", draw)
    resumed = finetuning.finetune(parted)
    columns = ["step", "train_loss", "val_loss", "val_loss_ema", "grad_norm"]
    pd.testing.assert_frame_equal(resumed.log[columns], whole.log[columns], atol=1e-6)
    one, two = (ldm.load_pipeline(r.checkpoint, device="cpu").unet for r in (whole, resumed))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_finished_run_is_returned_untouched_and_another_seed_is_not(config, monkeypatch):
    first = finetuning.finetune(config)
    stamp = (first.checkpoint / "model_index.json").stat().st_mtime_ns
    monkeypatch.setattr(finetuning, "draw", lambda *_: pytest.fail("trained again"))
    again = finetuning.finetune(config)
    assert (again.checkpoint / "model_index.json").stat().st_mtime_ns == stamp
    with pytest.raises(pytest.fail.Exception):
        finetuning.finetune(replace(config, seed=1))


def test_loss_falls_on_something_learnable(config):
    log = finetuning.finetune(replace(config, steps=40, val_every=20)).log
    assert log["val_loss"].iloc[-1] < 0.9 * log["val_loss"].iloc[0]


def test_divergence_stops_and_names_the_last_good_step(config, monkeypatch):
    good = finetuning.denoising
    calls = iter(range(100))

    def breaks_in_the_end(*args):
        found = good(*args)
        return found._replace(error=found.error * float("nan")) if next(calls) > 6 else found

    monkeypatch.setattr(finetuning, "denoising", breaks_in_the_end)
    with pytest.raises(finetuning.TrainingError, match=r"not finite at step \d.*learning_rate"):
        finetuning.finetune(config)


def test_set_without_validation_is_refused(config, tmp_path):
    clips = metadata.read_audiocaps(config.dataset_root).assign(foreground_label="dog", scene="")
    only = clips[clips["split"] == "train"]
    root = metadata.write_audiocaps(only, tmp_path / "only", "only")
    with pytest.raises(finetuning.TrainingError, match="no clips in its split 'val'"):
        finetuning.finetune(replace(config, dataset_root=str(root)))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_perfect_prediction_has_no_loss_and_zero_has_the_closed_form(kind):
    scheduler = DDIMScheduler(prediction_type=kind)
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 8, 4, 4, 4, generator=generator)
    batch = {
        "latents": latents,
        "noise": noise,
        "t": torch.arange(8) / 8,
        "condition": torch.zeros(8, 2),
    }
    t = (batch["t"] * 1000).long()
    alpha = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    target = {
        "epsilon": noise,
        "sample": latents,
        "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,
    }[kind]

    class Answer(torch.nn.Linear):
        def forward(self, *_, **__):
            return type("Out", (), {"sample": self.answer})

    unet = Answer(1, 1)
    unet.answer = target
    assert float(finetuning.diffusion_loss(unet, scheduler, batch)) < 1e-10
    unet.answer = torch.zeros_like(target)
    snr = (alpha / (1 - alpha)).flatten().clamp(0.25, 4) if kind == "sample" else torch.ones(8)
    expected = (snr * (target**2).mean(dim=(1, 2, 3))).mean()
    torch.testing.assert_close(finetuning.diffusion_loss(unet, scheduler, batch), expected)


@given(step=st.integers(0, 10**6), text=st.floats(0, 1), drop=st.floats(0, 1))
def test_draw_follows_from_the_step_and_keeps_clip_and_condition_together(step, text, drop):
    n = 5
    data = {
        "latents": torch.arange(n).view(n, 1, 1, 1).expand(n, 2, 4, 4).float(),
        "audio": torch.arange(n).view(n, 1).expand(n, 3).float(),
        "clip": torch.arange(n),
        "text": torch.arange(n).view(n, 1, 1).expand(n, 2, 3).float() + 100,
        "n_text": torch.full((n,), 2),
        "empty": torch.full((1, 3), -1.0),
    }
    config = finetuning.FinetuneConfig(
        "", "", "", text_condition_probability=text, condition_dropout=drop
    )
    batch = finetuning.draw(data, config, step)
    again = finetuning.draw(data, config, step)
    assert all(torch.equal(batch[k], again[k]) for k in batch)
    assert not torch.equal(batch["noise"], finetuning.draw(data, config, step + 1)["noise"])
    clip, condition = batch["latents"][:, 0, 0, 0], batch["condition"][:, 0]
    assert all(c in (-1, i, i + 100) for i, c in zip(clip, condition, strict=True))
    assert bool(((batch["t"] >= 0) & (batch["t"] < 1)).all())


def test_conditions_come_in_the_asked_proportions():
    data = {
        "latents": torch.zeros(1, 1, 1, 1),
        "audio": torch.zeros(1, 1),
        "clip": torch.zeros(1, dtype=torch.long),
        "text": torch.ones(1, 1, 1),
        "n_text": torch.ones(1, dtype=torch.long),
        "empty": torch.full((1, 1), -1.0),
    }
    config = finetuning.FinetuneConfig(
        "", "", "", batch_size=20_000, text_condition_probability=0.3, condition_dropout=0.1
    )
    condition = finetuning.draw(data, config, 0)["condition"].flatten()
    # three standard errors of a share in 20,000 draws are at most 0.011
    assert float((condition == -1).float().mean()) == pytest.approx(0.1, abs=0.011)
    assert float((condition == 1).float().mean()) == pytest.approx(0.27, abs=0.011)


def test_segments_are_the_loudest_of_the_tries():
    y = np.zeros(10_000, np.float32)
    y[7000:7100] = 1
    rng = np.random.default_rng(0)
    assert finetuning.loudest(y, 2000, 200, rng).sum() == 100
    assert len(finetuning.loudest(y[:500], 2000, 4, rng)) == 500
