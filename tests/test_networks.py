"""Architectures, training and prediction, held to published sizes and closed forms."""

import inspect
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from soundscapes_utils import esc, networks


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # two torch jobs side by side that each want all cores slow each other a hundredfold
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def count(network):
    return sum(p.numel() for p in network.parameters())


def conv(kernel, before, after):
    return kernel * kernel * before * after + after


def test_sbcnn_has_the_published_parameters():
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    flat = 48 * 5 * 16  # 94 frames / 4 / 4, 64 bands / 2 / 2
    assert count(esc.SBCNN(10)) == convolutions + (flat * 64 + 64) + (64 * 10 + 10) == 333_594
    # the released code keeps 45 frames and states 1536 inputs of its first linear layer
    assert esc.SBCNN(10, n_frames=45).head[1].in_features == 1536


def test_crnn_has_the_published_parameters():
    filters = [1, 16, 32, 64, 128, 128, 128, 128]
    pairs = list(pairwise(filters))
    # convolution, batch norm (scale, shift) and the 1×1 value of the GLU
    blocks = sum(conv(3, a, b) + 2 * b + conv(1, b, b) for a, b in pairs)
    layer = [2 * 3 * 128 * (width + 128 + 2) for width in (128, 256)]
    head = 23 * 256 * 10 + 10  # 94 frames / 2 / 2
    assert count(esc.CRNN(10)) == blocks + sum(layer) + head == 1_166_170
    # the released code keeps 45 frames and states 2816 inputs of its linear layer
    assert esc.CRNN(10, n_frames=45).head.in_features == 2816


def test_faithful_networks_have_the_released_codes_parameters():
    pairs = list(pairwise([1, 16, 32, 64, 128, 128, 128, 128]))
    blocks = sum(conv(3, a, b) + 2 * b for a, b in pairs)  # no weights in the gate
    gru = sum(2 * 3 * 128 * (width + 128 + 2) for width in (128, 256))
    assert count(esc.FAITHFUL["crnn"](10)) == blocks + gru + 2816 * 10 + 10 == 1_063_914
    convolutions = conv(5, 1, 24) + conv(5, 24, 48) + conv(5, 48, 48)
    linear = 1536 * 64 + 64 + 64 * 10 + 10
    assert count(esc.FAITHFUL["sbcnn"](10)) == convolutions + linear == 186_138
    patch = torch.zeros(2, 1, 45, 64)
    assert all(network(7)(patch).shape == (2, 7) for network in esc.FAITHFUL.values())


def test_the_faithful_crnn_mixes_the_clips_of_a_batch():
    torch.manual_seed(0)
    network = esc.FAITHFUL["crnn"](4).eval()
    x = torch.randn(5, 1, 45, 64)
    with torch.no_grad():
        assert not torch.allclose(network(x)[:1], network(x[:1]), atol=1e-4)
        # alone, a clip's frames do not see each other: to swap them swaps the GRU's output
        frames = network.convolutions(x[:1]).squeeze(-1).transpose(1, 2)
        forward, backward = network.gru(frames)[0], network.gru(frames.flip(1))[0]
    torch.testing.assert_close(forward, backward.flip(1))


def test_the_released_codes_gate_has_no_weights():
    x = torch.randn(2, 3, 5, 4)
    gate = esc.FAITHFUL["crnn"](4).convolutions[2]
    by_glu = torch.nn.functional.glu(torch.cat([x, x], dim=-1), dim=-1)
    torch.testing.assert_close(gate(x), by_glu)


@pytest.mark.parametrize("name", esc.MODELS)
def test_a_clips_output_does_not_depend_on_its_batch(name):
    torch.manual_seed(0)
    network = esc.MODELS[name](4).eval()
    x = torch.randn(5, 1, esc.PATCH_FRAMES, 64)
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        torch.testing.assert_close(network(x)[order], network(x[order]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(network(x)[:1], network(x[:1]), atol=1e-5, rtol=1e-4)


def test_the_gru_carries_the_past_and_the_future_of_a_clip():
    torch.manual_seed(0)
    gru = esc.CRNN(4).gru
    x = torch.zeros(3, 23, 128)
    changed = x.clone()
    changed[1, 11] = 1.0
    with torch.no_grad():
        moved = (gru(changed)[0] - gru(x)[0]).abs().amax(dim=2) > 1e-6
    assert moved[1].all(), "every step of the clip sees the change, before and after"
    assert not moved[[0, 2]].any(), "no other clip of the batch does"


def test_the_glu_has_a_value_of_its_own():
    torch.manual_seed(0)
    glu, x = esc.GLU(3), torch.randn(2, 3, 5, 4)
    weight, bias = glu.value.weight[:, :, 0, 0], glu.value.bias
    by_hand = torch.einsum("oc,bcft->boft", weight, x) + bias[:, None, None]
    torch.testing.assert_close(glu(x), by_hand * torch.sigmoid(x))
    assert not torch.allclose(glu(x), x * torch.sigmoid(x), atol=1e-2)
    # very negative input shuts the gate, whatever the value
    assert glu(torch.full((1, 3, 1, 1), -50.0)).abs().max() < 1e-12


# --- training ------------------------------------------------------------------------------------


def toy_set(n, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 126, 64))
    x[y == 1, :, 20:30] += 1.5
    return esc.standardise(x), y


# batch norm's running statistics need a few dozen steps before they serve the test
@pytest.mark.parametrize(("name", "epochs"), [("sbcnn", 5), ("crnn", 12)])
def test_networks_learn_and_keep_their_best_weights(name, epochs):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    network, log = esc.train_classifier(
        name, train, validation, 2, epochs=epochs, batch_size=4, seed=1
    )
    probabilities = esc.predict(network, validation[0])
    kept = -np.log(probabilities[np.arange(8), validation[1]]).mean()
    assert kept == pytest.approx(log["validation_loss"].min(), rel=1e-4)
    assert (probabilities.argmax(axis=1) == validation[1]).mean() >= 0.9


def test_training_follows_its_seed_and_leaves_the_callers_alone():
    train, validation = toy_set(12, 0), toy_set(6, 1)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    def weights(seed):
        network, _ = esc.train_classifier(
            "sbcnn", train, validation, 2, epochs=2, batch_size=4, seed=seed
        )
        return network.head[1].weight

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))
    assert torch.equal(torch.rand(3), expected)


def test_training_has_the_papers_settings(monkeypatch):
    asked, adam = [], torch.optim.Adam

    def recorded(weights, **options):
        asked.append(options)
        return adam(weights, **options)

    monkeypatch.setattr(torch.optim, "Adam", recorded)
    train = toy_set(4, 0)
    for name, x in (("sbcnn", train[0]), ("crnn:faithful", esc.divide_by_variance(train[0]))):
        esc.train_classifier(name, (x, train[1]), (x, train[1]), 2, epochs=1)
    assert asked == [{"lr": 1e-3, "eps": 1e-7, "weight_decay": 1e-3}] * 2
    for study in (esc.run_arms, esc.train_classifier):
        defaults = {name: p.default for name, p in inspect.signature(study).parameters.items()}
        assert [defaults[name] for name in ("epochs", "batch_size", "patience")] == [100, 128, 15]


def test_training_stops_when_validation_no_longer_improves():
    x, y = toy_set(12, 0)
    _, log = esc.train_classifier(
        "sbcnn", (x, y), (x, 1 - y), 2, epochs=30, batch_size=4, patience=2
    )
    assert len(log) == log["validation_loss"].idxmin() + 1 + 2 < 30


@pytest.mark.parametrize("model", esc.FAITHFUL)
def test_faithful_and_corrected_see_the_same_batches(monkeypatch, model):
    seen, loss = [], networks._loss

    def recorded(network, batch, y, augment):
        seen[-1].append(y.tolist())
        return loss(network, batch, y, augment)

    monkeypatch.setattr(networks, "_loss", recorded)
    raw = np.random.default_rng(0).normal(size=(12, 126, 64))
    # every clip is a class of its own, so that the classes tell which clips were drawn
    y = np.arange(12)
    for name, x in (
        (model, esc.standardise(raw)),
        (f"{model}:faithful", esc.divide_by_variance(raw)),
    ):
        seen.append([])
        esc.train_classifier(name, (x, y), (x[:2], y[:2]), 12, epochs=2, batch_size=4, seed=5)
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_one_random_patch_follows_its_seed():
    torch.manual_seed(0)
    network = esc.FAITHFUL["sbcnn"](3)
    x = esc.divide_by_variance(toy_set(6, 0)[0])
    found = esc.predict_one_patch(network, x, seed=1)
    np.testing.assert_array_equal(found, esc.predict_one_patch(network, x, seed=1))
    assert not np.array_equal(found, esc.predict_one_patch(network, x, seed=2))
    with torch.no_grad():
        places = torch.from_numpy(x[:1]).unfold(1, 45, 1)[0, :15].transpose(1, 2).unsqueeze(1)
        every = network(places).softmax(dim=1).numpy()
    assert np.abs(every - found[0]).max(axis=1).min() < 1e-6


def test_masks_cover_no_more_than_they_may():
    torch.manual_seed(0)
    batch = torch.rand(50, 1, 94, 64) + 1
    masked = networks._masked(batch, 2)
    empty = masked == 0
    assert torch.equal(masked[~empty], batch[~empty])
    frames = empty.all(dim=3).sum(dim=2).flatten()
    bands = empty.all(dim=2).sum(dim=2).flatten()
    assert 0 < frames.max() <= 2 * round(0.19 * 94) and 0 < bands.max() <= 2 * round(0.19 * 64)
    assert len(set(frames.tolist())) > 5, "each clip has masks of its own"


def test_mixup_is_the_loss_of_soft_labels():
    torch.manual_seed(0)
    heard = []

    class Network(torch.nn.Module):
        def forward(self, x):
            heard.append(x)
            return 3 * x.flatten(1)

    # clip i is the i-th unit vector: what the network hears are the soft labels themselves
    y = torch.arange(6)
    loss = networks._loss(Network(), torch.eye(6).reshape(6, 1, 1, 6), y, ("mixup", 1.0))
    soft = heard[0].flatten(1)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
    assert ((soft > 0).sum(dim=1) == 2).any()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(3 * soft, soft))


@pytest.mark.parametrize("augment", [("specaugment", 2.0), ("mixup", 0.3)])
def test_augmented_training_learns_and_follows_its_seed(augment):
    train, validation = toy_set(16, 0), toy_set(8, 1)
    logs = [
        esc.train_classifier(
            "sbcnn", train, validation, 2, epochs=4, batch_size=4, seed=1, augment=kind
        )[1]
        for kind in (augment, augment, None)
    ]
    pd.testing.assert_frame_equal(logs[0], logs[1])
    assert not logs[0].equals(logs[2])
    assert logs[0]["validation_loss"].min() < np.log(2)


def test_baselines_tell_clouds_apart():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 5)) + 4 * y[:, None]
    for name in ("knn", "forest", "svm", "probe"):
        fitted = esc.fit_baseline(name, x[:40], y[:40], seed=1)
        assert (fitted.predict(x[40:]) == y[40:]).mean() >= 0.9
    with pytest.raises(ValueError, match="choose one of knn"):
        esc.fit_baseline("tree", x, y)


def test_an_epoch_can_hold_any_number_of_patches():
    chance = torch.Generator().manual_seed(0)
    once = networks._draw_order(5, None, chance)
    assert sorted(once.tolist()) == list(range(5))
    # as even as possible: nothing a third time before all were drawn twice
    counts = torch.bincount(networks._draw_order(5, 13, chance), minlength=5)
    assert counts.sum() == 13 and set(counts.tolist()) == {2, 3}
    assert len(set(networks._draw_order(5, 3, chance).tolist())) == 3


def test_a_clip_is_scored_by_the_mean_over_patches_that_cover_it():
    torch.manual_seed(0)
    network, x = esc.SBCNN(3), toy_set(2, 0)[0]
    found = esc.predict(network, x)
    np.testing.assert_array_equal(found, esc.predict(network, x))
    with torch.no_grad():
        first, last = (
            network(torch.from_numpy(x[:, start : start + 94]).unsqueeze(1)).softmax(dim=1)
            for start in (0, 32)
        )
    np.testing.assert_allclose(found, ((first + last) / 2).numpy(), atol=1e-6)
    # pooling drops the patch's last frames that fill no window of 4
    for frame in (0, 120):
        changed = x.copy()
        changed[:, frame] += 5
        assert np.abs(esc.predict(network, changed) - found).max() > 1e-6
