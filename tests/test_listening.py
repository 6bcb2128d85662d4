"""The page of a set: what it refers to, what it shows, and what a click does in a browser."""

import html.parser
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

import numpy as np
import pandas as pd
import pytest

from soundscapes_utils import audio, listening

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(html.parser.HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def named(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


def tables(folder, n=3):
    """Generated and real clips of two classes: tones whose pitch tells them apart."""
    rows = {"made": [], "real": []}
    places = itertools.product(rows, ("dog", "rain"), range(n))
    for number, (kind, label, index) in enumerate(places):
        path = folder / "source" / f"{kind}-{label}-{index}.wav"
        seconds = 1 if kind == "made" else 2
        tone = 0.4 * np.sin(np.arange(16_000 * seconds) * 0.02 * (number + 1))
        audio.save_audio(path, tone.astype(np.float32), 16_000)
        rows[kind].append({"clip_id": path.stem, "label": label, "path": str(path)})
    made = pd.DataFrame(rows["made"]).assign(
        prompt='a "loud" <b>one',
        prompt_family=np.resize(["simple", "gpt", "simple"], 2 * n),
        seed=7,
        clap_score=np.resize([0.1, 0.9, 0.5, -0.2, np.nan, 0.3], 2 * n),
        heard_as=np.resize(["dog", "dog", "rain"], 2 * n),
    )
    return made, pd.DataFrame(rows["real"]).assign(fold=1)


def test_page_refers_to_files_beside_it_only(tmp_path):
    made, real = tables(tmp_path)
    page = Page(listening.write_page(tmp_path / "listen", made, real, title="<set>"))
    links = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert len(links) == 2 * 12
    for link in links:
        assert (tmp_path / "listen" / link).is_file(), link
    assert all(image["alt"] for image in page.named("img"))
    text = (tmp_path / "listen/index.html").read_text()
    assert "://" not in text and "&lt;set&gt;" in text
    assert "<b>one" not in text and "&lt;b&gt;one" in text
    assert "nan" not in text.lower()


def test_cards_hold_scores_and_words_of_both_sides(tmp_path):
    made, real = tables(tmp_path)
    page = Page(listening.write_page(tmp_path, made, real))
    cards = page.named("article")
    assert [card["data-side"] for card in cards] == (["real"] * 3 + ["synthetic"] * 3) * 2
    numbers = [json.loads(card["data-numbers"]) for card in cards]
    assert numbers[3:6] == [{"clap score": 0.1}, {"clap score": 0.9}, {"clap score": 0.5}]
    # no score: no number, and a real recording has none of the fold's
    assert numbers[10] == {} == numbers[0]
    values = [a["value"] for a in page.named("option") if "value" in a]
    assert {"dog", "rain", "clap score"} <= set(values)


def test_sounds_are_the_clips_sample_by_sample(tmp_path):
    made, _ = tables(tmp_path)
    page = Page(listening.write_page(tmp_path, made))
    players = page.named("audio")
    for player, path in zip(players, made.sort_values("label", kind="stable").path, strict=True):
        y, rate = audio.load_audio(tmp_path / player["src"])
        original, _ = audio.load_audio(path)
        assert rate == 16_000 and np.array_equal(y, original)


def test_pictures_are_log_mels_low_bands_below(tmp_path):
    from PIL import Image

    made, _ = tables(tmp_path)
    made = made.iloc[[0]]
    # 0.02 rad a sample at 16 kHz is 51 Hz: the lowest of 64 bands, the last row of the picture
    page = Page(listening.write_page(tmp_path, made))
    with Image.open(tmp_path / page.named("img")[0]["src"]) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.shape == (64, 100)
    assert pixels.mean(axis=1).argmax() == 63


def test_second_call_keeps_files_and_a_changed_clip_is_noticed(tmp_path):
    made, real = tables(tmp_path)
    listening.write_page(tmp_path / "listen", made, real)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "listen").glob("*/*")}
    first = (tmp_path / "listen/index.html").read_bytes()
    listening.write_page(tmp_path / "listen", made, real)
    assert (tmp_path / "listen/index.html").read_bytes() == first
    assert {p: p.stat().st_mtime_ns for p in before} == before
    audio.save_audio(made.path[0], np.full(16_000, 0.1, np.float32), 16_000)
    listening.write_page(tmp_path / "listen", made, real)
    assert (tmp_path / "listen/index.html").read_bytes() != first


def test_large_classes_are_sampled_and_the_page_says_so(tmp_path):
    made, real = tables(tmp_path, n=5)
    text = listening.write_page(tmp_path, made, real, per_class=2).read_text()
    assert text.count("synthetic: 2 of 5") == 2 and text.count("<article") == 8


def test_bad_tables_and_lost_clips_are_named(tmp_path):
    made, real = tables(tmp_path)
    with pytest.raises(ValueError, match="synthetic clips lacks label, path"):
        listening.write_page(tmp_path, made[["clip_id"]])
    with pytest.raises(ValueError, match="real clips has no rows"):
        listening.write_page(tmp_path, made, real.iloc[:0])
    (tmp_path / "source/made-dog-0.wav").unlink()
    with pytest.raises(audio.AudioError, match=r"made-dog-0\.wav.*moved"):
        listening.write_page(tmp_path / "listen", made)
    assert not (tmp_path / "listen/index.html").exists()


def test_command_makes_the_page_of_a_run(tmp_path, capsys):
    from soundscapes_utils.__main__ import main

    made, real = tables(tmp_path)
    (tmp_path / "run/tables").mkdir(parents=True)
    scores = made[["clip_id", "label", "clap_score"]].iloc[::-1].assign(keep_joint=True)
    made.drop(columns="clap_score").to_csv(tmp_path / "run/tables/generated.csv")
    scores.to_csv(tmp_path / "run/tables/generated_scores.csv", index=False)
    real.assign(label="dog").to_csv(tmp_path / "run/tables/clips.csv", index=False)
    assert main(["listen", str(tmp_path / "run"), "--per-class", "2"]) == 0
    cards = Page(tmp_path / "run/listen/index.html").named("article")
    assert [card["data-side"] for card in cards] == ["real"] * 2 + ["synthetic"] * 4
    assert (tmp_path / "run/listen/index.html").read_text().count("marked: keep joint") == 4
    named = {json.loads(card["data-numbers"]).get("clap score") for card in cards[2:]}
    assert named <= {0.1, 0.9, 0.5, -0.2, 0.3, None} and len(named) > 1
    made.to_csv(tmp_path / "mine.csv", index=False)
    assert main(["listen", str(tmp_path / "run"), "--table", str(tmp_path / "mine.csv")]) == 0
    assert (tmp_path / "run/listen-mine/index.html").is_file()
    assert main(["listen", str(tmp_path / "run"), "--table", "nothing"]) == 2
    assert "no such table; run notebook 02" in capsys.readouterr().err
    (tmp_path / "source/made-dog-1.wav").unlink()
    assert main(["listen", str(tmp_path / "run"), "--table", str(tmp_path / "mine.csv")]) == 1


# --- in a browser ----------------------------------------------------------------------------------


class Browser:
    """A page in headless Chromium, over its debugging protocol."""

    def __init__(self, folder, width):
        self.process = subprocess.Popen(
            [
                BROWSER,
                *("--headless", "--no-sandbox", "--disable-gpu", "--mute-audio"),
                *("--disable-background-networking", "--remote-debugging-port=0"),
                *("--autoplay-policy=no-user-gesture-required", f"--window-size={width},900"),
                *(f"--user-data-dir={folder}", "--remote-allow-origins=*", "about:blank"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = folder / "DevToolsActivePort"
        self.until(lambda: port_file.is_file() and port_file.read_text().count("\n"))
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            targets = json.load(answer)
        import websocket

        address = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page")
        self.socket = websocket.create_connection(address, timeout=60)
        self.numbers = itertools.count(1)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    @staticmethod
    def until(true, seconds=60):
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "the browser did not get there in time"
            time.sleep(0.05)

    def call(self, method, **parameters):
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.until(
            lambda: self.value("document.readyState === 'complete' && typeof form === 'object'")
        )

    def click(self, selector, across=0.5):
        """Press the mouse where a finger or pointer would."""
        box = self.value(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect(); "
            f"return [b.x + b.width * {across}, b.y + b.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **place)

    def enter(self, name, text):
        code = "form.elements[{0}].value = {1}; form.elements[{0}].dispatchEvent({2}); null"
        event = "new Event('input', {bubbles: true})"
        self.value(code.format(json.dumps(name), json.dumps(text), event))

    def shown(self, side="synthetic"):
        code = (
            "[...document.querySelectorAll('.card')].filter(c => c.offsetParent !== null && "
            f"c.dataset.side === '{side}').map(c => c.querySelector('.name').textContent)"
        )
        return self.value(code)

    def close(self):
        self.call("Browser.close")
        self.process.wait(60)


@pytest.fixture
def browse(tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine to click in")
    pytest.importorskip("websocket", reason="websocket-client comes with JupyterLab")
    opened = []

    def start(width):
        opened.append(Browser(tmp_path / f"profile-{width}", width))
        return opened[-1]

    yield start
    for browser in opened:
        browser.close()


@pytest.mark.timeout(240)
def test_clicks_on_a_player_and_on_filters(tmp_path, browse):
    made, real = tables(tmp_path)
    page = listening.write_page(tmp_path / "listen", made, real)
    browser = browse(1280)
    browser.open(page)
    names = [f"made-{label}-{i}" for label in ("dog", "rain") for i in range(3)]
    assert browser.shown() == names
    # a player plays, and only one at a time; the spectrogram plays from where it is clicked
    first, second = (f"[...document.querySelectorAll('audio')][{i}]" for i in (0, 4))
    browser.value("document.querySelectorAll('.seek')[0].id = 'first'; null")
    browser.click("#first", across=0.5)
    Browser.until(lambda: browser.value(f"!{first}.paused && {first}.currentTime >= 0.9"))
    browser.value("document.querySelectorAll('.seek')[4].id = 'second'; null")
    browser.click("#second", across=0.01)
    Browser.until(lambda: browser.value(f"{second}.currentTime > 0 && {first}.paused"))
    assert browser.value(f"{second}.error === null && Math.abs({second}.duration - 1) < 0.05")
    # filters and sorting
    browser.enter("label", "dog")
    assert browser.shown() == names[:3] and len(browser.shown("real")) == 3
    assert browser.value("form.querySelector('output').value") == "6 of 12 clips"
    browser.enter("sort", "clap score")
    assert browser.shown() == [names[1], names[2], names[0]]
    browser.enter("order", "1")
    assert browser.shown() == [names[0], names[2], names[1]]
    browser.enter("least", "0.4")
    assert browser.shown() == [names[2], names[1]]
    browser.enter("words", "heard as: rain")
    assert browser.shown() == [names[2]]
    browser.click("form button[type=reset]")
    Browser.until(lambda: browser.shown() == names)
    browser.enter("side", "synthetic")
    assert browser.shown("real") == []
    browser.enter("family", "gpt")
    assert browser.shown() == [names[1], names[4]]
    # a clip without the score is last, whichever the order
    browser.enter("family", "")
    for order, expected in (("-1", [5, 3, 4]), ("1", [3, 5, 4])):
        browser.enter("sort", "clap score")
        browser.enter("order", order)
        assert browser.shown()[3:] == [names[i] for i in expected]


@pytest.mark.timeout(240)
def test_page_fits_a_phone(tmp_path, browse):
    made, real = tables(tmp_path)
    page = listening.write_page(tmp_path / "listen", made, real)
    browser = browse(390)
    browser.open(page)
    assert browser.value("document.documentElement.scrollWidth") <= 390
    lefts = browser.value(
        "['real', 'synthetic'].map(s => document.querySelector('.side.' + s)"
        ".getBoundingClientRect().left)"
    )
    # still beside each other
    assert lefts[0] < 30 and 190 < lefts[1] < 230
    small = browser.value(
        "[...document.querySelectorAll('select, input, button')].filter(e => e.offsetParent && "
        "e.getBoundingClientRect().height < 32).length"
    )
    assert small == 0


# --- a model and what it makes on its way ----------------------------------------------------


def test_last_step_of_denoising_is_the_clip_and_the_first_is_noise():
    from soundscapes_utils import generation

    backend = generation.get_backend("audioldm", steps=6, device="cpu")
    found = listening.denoising_steps(backend, "a dog barking", 3, 1.28, [1, 4, 99])
    assert list(found) == [f"after {i} of 6 steps" for i in (1, 4, 6)]
    clip = backend.generate(["a dog barking"], [3], 1.28)[0]
    last = found["after 6 of 6 steps"]
    assert last == pytest.approx(clip / np.abs(clip).max() * 10 ** (-1 / 20), abs=1e-5)

    def flatness(y):
        power = np.abs(np.fft.rfft(y)) ** 2 + 1e-12
        return np.exp(np.log(power).mean()) / power.mean()

    first, *_ = found.values()
    assert flatness(first) > 2 * flatness(last)
    # where it will end: early estimates are nearer to the clip than what is there
    guessed = listening.denoising_steps(backend, "a dog barking", 3, 1.28, [1, 4, 6], "estimate")
    # the schedule ends a little above no noise at all
    assert np.corrcoef(guessed["after 6 of 6 steps"], last)[0, 1] > 0.98
    mels = {
        name: [audio.log_mel(sounds[f"after {i} of 6 steps"], 16_000) for i in (4, 6)]
        for name, sounds in {"latent": found, "estimate": guessed}.items()
    }
    error = {name: np.abs(there - end).mean() for name, (there, end) in mels.items()}
    assert error["estimate"] < 0.7 * error["latent"]
    assert "step" not in vars(backend.pipe.scheduler)
    with pytest.raises(ValueError, match="view 'both'"):
        listening.denoising_steps(backend, "a dog barking", 3, 1.28, [1], "both")
    with pytest.raises(ValueError, match="step 0"):
        listening.denoising_steps(backend, "a dog barking", 3, 1.28, [0])


def test_a_model_without_such_steps_gives_its_clip():
    class Model:
        sample_rate = 8_000

        def generate(self, prompts, seeds, duration_s):
            return [np.linspace(0, 0.5, round(duration_s * self.sample_rate), dtype=np.float32)]

    found = listening.denoising_steps(Model(), "rain", 0, 0.5, [1])
    assert list(found) == ["as made"] and found["as made"].max() == pytest.approx(10 ** (-1 / 20))


def test_parts_of_a_model_in_the_order_of_their_work(tmp_path, monkeypatch):
    import tiny_checkpoints

    from soundscapes_utils import generation

    folder = tiny_checkpoints.audiogen(tmp_path / "audiogen")
    monkeypatch.chdir(tmp_path)
    backend = generation.get_backend("audiogen", checkpoint=folder, device="cpu")
    parts = listening.model_parts(backend).set_index("part").millions * 1e6
    assert parts.index.tolist() == ["T5", "language model", "EnCodec"]
    lm, codec = backend.model.lm, backend.model.compression_model
    conditioner = lm.condition_provider.conditioners["description"]
    text = sum(p.numel() for p in conditioner.t5.parameters())
    # the text encoder hides inside the language model, and counts once
    assert parts["T5"] == pytest.approx(text + sum(p.numel() for p in conditioner.parameters()))
    seen = sum(p.numel() for net in (lm, codec) for p in net.parameters())
    assert parts.sum() == pytest.approx(seen + text)
    assert listening.model_parts(object()).empty
