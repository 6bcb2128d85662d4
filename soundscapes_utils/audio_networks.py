"""VGGish and PANNs: the networks alone; `embeddings` loads the published weights into them.

Their parts have the names of the published checkpoints. Both take waveforms, float32 [batch, samples]
at their own rate, and give one row for each.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class VGGish(nn.Module):
    """VGGish without its last ReLU, as the Fréchet audio distance takes it: 128 numbers.

    Hershey et al., ICASSP 2017; names of torchvggish. 16 kHz, 15,600 samples.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool"):
            if step == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, step, 3, padding=1), nn.ReLU()]
            channels = step
        self.features = nn.Sequential(*layers)
        # 96 frames and 64 bands, halved four times
        head = nn.Linear(512 * 6 * 4, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()
        self.embeddings = nn.Sequential(*head, nn.Linear(4096, 128))

    def forward(self, y):
        """Rows [batch, 128] of windows [batch, 15600]."""
        x = self.features(self.log_mel(y)[:, None])
        # TensorFlow, in which it was trained, has the channels last
        return self.embeddings(x.permute(0, 2, 3, 1).flatten(1))

    @staticmethod
    def log_mel(y):
        """Log-mel [batch, 96, 64] of windows [batch, 15600], as in its training."""
        frames = y.double().unfold(1, 400, 160)
        window = torch.hann_window(400, dtype=torch.float64, device=y.device)
        magnitude = torch.fft.rfft(frames * window, 512).abs()
        filters = torch.from_numpy(_triangles()).to(y.device)
        return torch.log(magnitude @ filters + 0.01).float()


def _triangles():
    """64 mel filters from 125 to 7,500 Hz, straight in mel (librosa's are straight in Hz)."""
    low, high = 1127.0 * np.log1p(np.array([125.0, 7500.0]) / 700.0)
    bins = 1127.0 * np.log1p(np.linspace(0.0, 8000.0, 257) / 700.0)[:, None]
    edges = np.linspace(low, high, 66)
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rise, fall))


class _Block(nn.Module):
    def __init__(self, entry, exit_, wave=False):
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if wave else (nn.Conv2d, nn.BatchNorm2d)
        wide = 2 if wave else 1
        self.conv1 = conv(entry, exit_, 3, padding=1, bias=False)
        self.conv2 = conv(exit_, exit_, 3, padding=wide, dilation=wide, bias=False)
        self.bn1, self.bn2 = norm(exit_), norm(exit_)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu_()
        return self.bn2(self.conv2(x)).relu_()


class PANN(nn.Module):
    """CNN14 or Wavegram-Logmel-CNN14 up to the tagger: 32 × `width` numbers, 2,048 as published.

    Kong et al., IEEE/ACM TASLP 28, 2020, Table 1, and their released models: at 32,000 or 16,000 Hz,
    with or without a wavegram beside the log-mel, of `width` channels in the first block.
    """

    def __init__(self, sample_rate=32_000, wavegram=False, width=64):
        super().__init__()
        from torchlibrosa.stft import LogmelFilterBank, Spectrogram

        n_fft, fmax = {32_000: (1024, 14_000), 16_000: (512, 8_000)}[sample_rate]
        with torch.device("cpu"):  # torchlibrosa computes weights, which the meta device cannot
            self.spectrogram_extractor = Spectrogram(n_fft, sample_rate // 100, n_fft)
            self.logmel_extractor = LogmelFilterBank(
                sample_rate, n_fft, 64, 50, fmax, ref=1.0, amin=1e-10, top_db=None
            )
        self.bn0 = nn.BatchNorm2d(64)
        self.wavegram = wavegram
        if wavegram:
            self.pre_conv0 = nn.Conv1d(1, 64, 11, stride=5, padding=5, bias=False)
            self.pre_bn0 = nn.BatchNorm1d(64)
            self.pre_block1 = _Block(64, 64, wave=True)
            self.pre_block2 = _Block(64, 128, wave=True)
            self.pre_block3 = _Block(128, 128, wave=True)
            self.pre_block4 = _Block(4, width)
        widths = [width * 2**k for k in range(6)]
        # the wavegram joins the log-mel after the first block
        entries = [1, (2 if wavegram else 1) * width, *widths[1:-1]]
        for k, (entry, exit_) in enumerate(zip(entries, widths, strict=True), 1):
            setattr(self, f"conv_block{k}", _Block(entry, exit_))
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.fc_audioset = nn.Linear(widths[-1], 527)

    def fold_norms(self):
        """Put the normalisations of the mel blocks into their convolutions: the same sums, read once."""
        self.eval()
        for k in range(1, 7):
            block = getattr(self, f"conv_block{k}")
            block.conv1 = fuse_conv_bn_eval(block.conv1, block.bn1)
            block.conv2 = fuse_conv_bn_eval(block.conv2, block.bn2)
            block.bn1 = block.bn2 = nn.Identity()
        return self

    def forward(self, y):
        """Rows [batch, 32 · width] of waveforms [batch, samples]."""
        mel = self.logmel_extractor(self.spectrogram_extractor(y))
        mel = self.bn0(mel.transpose(1, 3)).transpose(1, 3)
        x = F.avg_pool2d(self.conv_block1(mel), 2)
        if self.wavegram:
            wave = self._wave_pictures(y)
            # the published code runs only where both have as many frames; elsewhere the log-mel has
            # one (20 ms) more
            frames = min(x.shape[2], wave.shape[2])
            x = torch.cat([x[:, :, :frames], wave[:, :, :frames]], dim=1)
        for k in range(2, 6):
            x = F.avg_pool2d(getattr(self, f"conv_block{k}")(x), 2)
        x = self.conv_block6(x).mean(dim=3)
        return self.fc1(x.amax(dim=2) + x.mean(dim=2)).relu()

    def _wave_pictures(self, y):
        x = self.pre_bn0(self.pre_conv0(y[:, None])).relu()
        for block in (self.pre_block1, self.pre_block2, self.pre_block3):
            x = F.max_pool1d(block(x), 4)
        # 128 channels become 4 pictures of 32 "bands" over time
        x = x.unflatten(1, (-1, 32)).transpose(2, 3)
        return F.avg_pool2d(self.pre_block4(x), (2, 1))
