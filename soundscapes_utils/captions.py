"""Words for sounds: captions of mixes and prompts of classes, from one small lexicon.

Two tables hold all the language: :data:`EVENTS` says how each ESC-50 and UrbanSound8K class is
spoken of, :data:`SCENES` does so for the acoustic scenes of TAU and for the ambient classes that
can stand in for them. A label that is in neither is still captioned, from its tidied name.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import pandas as pd


class Event(NamedTuple):
    """How a foreground class is spoken of: ``phrase``, whole ``clause``, and ``noun`` phrase."""

    phrase: str
    clause: str
    noun: str


class Scene(NamedTuple):
    """How a background is spoken of: ``noun`` after "with", and ``place`` after the event."""

    noun: str
    place: str


# ESC-50's 50 classes, then the UrbanSound8K classes whose names differ from ESC-50's.
EVENTS = {
    "dog": Event("dog barking", "a dog is barking", "the barks of a dog"),
    "rooster": Event("rooster crowing", "a rooster is crowing", "the crow of a rooster"),
    "pig": Event("pig grunting", "a pig is grunting", "the grunts of a pig"),
    "cow": Event("cow mooing", "a cow is mooing", "the moo of a cow"),
    "frog": Event("frog croaking", "a frog is croaking", "the croaks of a frog"),
    "cat": Event("cat meowing", "a cat is meowing", "the meow of a cat"),
    "hen": Event("hen clucking", "a hen is clucking", "the clucks of a hen"),
    "insects": Event("insects buzzing", "insects are buzzing", "the buzz of flying insects"),
    "sheep": Event("sheep bleating", "a sheep is bleating", "the bleats of a sheep"),
    "crow": Event("crow cawing", "a crow is cawing", "the caws of a crow"),
    "rain": Event("rain falling", "rain is falling", "falling rain"),
    "sea_waves": Event("sea waves breaking", "sea waves are breaking", "the surf of the sea"),
    "crackling_fire": Event("fire crackling", "a fire is crackling", "the crackle of a fire"),
    "crickets": Event("crickets chirping", "crickets are chirping", "the chirp of crickets"),
    "chirping_birds": Event("birds chirping", "birds are chirping", "the song of birds"),
    "water_drops": Event("water dripping", "water is dripping", "drops of water"),
    "wind": Event("wind blowing", "wind is blowing", "gusts of wind"),
    "pouring_water": Event("pouring water", "water is being poured", "water poured into a vessel"),
    "toilet_flush": Event("toilet flushing", "a toilet is flushing", "the flush of a toilet"),
    "thunderstorm": Event("thunder rumbling", "thunder is rumbling", "claps of thunder"),
    "crying_baby": Event("baby crying", "a baby is crying", "the cries of a baby"),
    "sneezing": Event("sneezing", "a person is sneezing", "the sneeze of a person"),
    "clapping": Event("hands clapping", "people are clapping", "the applause of hands"),
    "breathing": Event("breathing", "a person is breathing", "the breath of a person"),
    "coughing": Event("coughing", "a person is coughing", "the cough of a person"),
    "footsteps": Event("footsteps", "a person is walking", "the footsteps of a person"),
    "laughing": Event("laughing", "a person is laughing", "the laughter of a person"),
    "brushing_teeth": Event(
        "brushing teeth", "a person is brushing teeth", "the strokes of a toothbrush"
    ),
    "snoring": Event("snoring", "a person is snoring", "the snores of a sleeper"),
    "drinking_sipping": Event(
        "drinking and sipping", "a person is sipping a drink", "sips from a cup"
    ),
    "door_wood_knock": Event(
        "knocking on a wooden door", "someone is knocking on a door", "knocks on a wooden door"
    ),
    "mouse_click": Event(
        "computer mouse clicking", "a computer mouse is clicking", "clicks of a computer mouse"
    ),
    "keyboard_typing": Event(
        "keyboard typing", "someone is typing on a keyboard", "the keystrokes of a keyboard"
    ),
    "door_wood_creaks": Event(
        "wooden door creaking", "a wooden door is creaking", "the creaks of a wooden door"
    ),
    "can_opening": Event("can opening", "a can is being opened", "the hiss of an opened can"),
    "washing_machine": Event(
        "washing machine running", "a washing machine is running", "the drone of a washing machine"
    ),
    "vacuum_cleaner": Event(
        "vacuum cleaner running", "a vacuum cleaner is running", "the whine of a vacuum cleaner"
    ),
    "clock_alarm": Event(
        "alarm clock ringing", "an alarm clock is ringing", "the ring of an alarm clock"
    ),
    "clock_tick": Event("clock ticking", "a clock is ticking", "the ticks of a clock"),
    "glass_breaking": Event("glass breaking", "glass is breaking", "the crash of breaking glass"),
    "helicopter": Event("helicopter flying", "a helicopter is flying", "the rotor of a helicopter"),
    "chainsaw": Event("chainsaw running", "a chainsaw is running", "the roar of a chainsaw"),
    "siren": Event(
        "emergency siren wailing",
        "an emergency siren is wailing",
        "the siren of an emergency vehicle",
    ),
    "car_horn": Event("car horn honking", "a car horn is honking", "the honk of a car horn"),
    "engine": Event("engine running", "an engine is running", "the rumble of an engine"),
    "train": Event("train passing", "a train is passing by", "the clatter of a train"),
    "church_bells": Event(
        "church bells ringing", "church bells are ringing", "the peal of church bells"
    ),
    "airplane": Event("airplane flying", "an airplane is flying over", "the drone of an airplane"),
    "fireworks": Event("fireworks exploding", "fireworks are exploding", "the bangs of fireworks"),
    "hand_saw": Event(
        "hand saw cutting", "a hand saw is cutting wood", "the strokes of a hand saw"
    ),
    "air_conditioner": Event(
        "air conditioner humming", "an air conditioner is humming", "the hum of an air conditioner"
    ),
    "children_playing": Event(
        "children playing", "children are playing", "the voices of playing children"
    ),
    "dog_bark": Event("dog barking", "a dog is barking", "the barks of a dog"),
    "drilling": Event("drilling", "a drill is operating", "the whirr of a drill"),
    "engine_idling": Event("engine idling", "an engine is idling", "the idle of an engine"),
    "gun_shot": Event("gun shot", "a gun is being fired", "the shot of a gun"),
    "jackhammer": Event(
        "jackhammer pounding", "a jackhammer is pounding", "the blows of a jackhammer"
    ),
    "street_music": Event("street music", "street musicians are playing", "music from the street"),
}

# TAU's ten scenes, then the ambient ESC classes that serve as scenes where TAU is not at hand.
SCENES = {
    "airport": Scene("an airport hall", "in an airport"),
    "bus": Scene("a bus ride", "on a bus"),
    "metro": Scene("a metro ride", "on an underground train"),
    "metro_station": Scene("a metro station", "in a metro station"),
    "park": Scene("a park", "in a park"),
    "public_square": Scene("a public square", "on a public square"),
    "shopping_mall": Scene("a shopping mall", "in a shopping mall"),
    "street_pedestrian": Scene("a pedestrian street", "in a pedestrian street"),
    "street_traffic": Scene("traffic", "by a busy road"),
    "tram": Scene("a tram ride", "on a tram"),
    "rain": Scene("rain", "in the rain"),
    "sea_waves": Scene("sea waves", "by the sea"),
    "crackling_fire": Scene("a crackling fire", "beside a fire"),
    "helicopter": Scene("a helicopter", "near a helicopter"),
}

PARAPHRASES = (
    "{clause} {place}",
    "{place}, {clause}",
    "{noun}, heard {place}",
    "one can hear {noun} {place}",
)

# Ronchini et al. (arXiv 2403.17864): one fixed wording a class, two templates, spelled as there.
STUDY_TEMPLATES = {
    "simple": "A clear sound of {x} in a urban context.",
    "gpt": "Generate a realistic audio representation of the sound of {x} in a urban environment.",
}
STUDY_PHRASES = {
    "air_conditioner": "an air conditioner",
    "car_horn": "a car horning",
    "children_playing": "children playing",
    "dog_bark": "a dog barking",
    "drilling": "drilling",
    "engine_idling": "an engine idling",
    "gun_shot": "a gun shot",
    "jackhammer": "a jackhammer",
    "siren": "a siren coming from an emergency vehicle",
    "street_music": "street music",
}
# The same two for classes outside that study: a cow in a urban context is not what they mean.
GENERAL_TEMPLATES = {
    "simple": "A clear sound of {x}.",
    "gpt": "Generate a realistic audio representation of the sound of {x}.",
}
VARIED_TEMPLATES = (
    "{clause}",
    "{noun}",
    "the sound of {x}",
    "a recording of {noun}",
    "{clause} close to the microphone",
    "{clause} in the distance",
    "{noun}, recorded outdoors",
    "a clear recording of {x}",
    "the sound of {x} and nothing else",
    "{clause} in a quiet place",
)
FAMILIES = ("label", "simple", "gpt", "varied")


def tidy(label):
    """Turn a class name into words.

    Parameters
    ----------
    label : str
        Class name as the data sets write it.

    Returns
    -------
    str
        Lower case, single spaces.

    Raises
    ------
    ValueError
        Nothing is left of it.

    Examples
    --------
    >>> tidy("street_traffic")
    'street traffic'
    """
    words = " ".join(str(label).replace("_", " ").replace("-", " ").lower().split())
    if not words:
        raise ValueError(f"label {label!r} holds no word; give every clip a class name")
    return words


def event_words(label):
    """Look an event up in :data:`EVENTS`; a label that is not there speaks for itself.

    Parameters
    ----------
    label : str
        Class name.

    Returns
    -------
    Event
        ``phrase``, ``clause`` and ``noun``.

    Examples
    --------
    >>> event_words("snoring").clause
    'a person is snoring'
    >>> event_words("Steam_Whistle").clause
    'steam whistle can be heard'
    """
    if label in EVENTS:
        return EVENTS[label]
    words = tidy(label)
    return Event(words, f"{words} can be heard", f"the sound of {words}")


def scene_words(scene):
    """Look a scene up in :data:`SCENES`; one that is not there speaks for itself.

    Parameters
    ----------
    scene : str
        Scene or ambient class name.

    Returns
    -------
    Scene
        ``noun`` and ``place``.

    Examples
    --------
    >>> scene_words("tram").place
    'on a tram'
    >>> scene_words("wind").place
    'with wind around'
    """
    if scene in SCENES:
        return SCENES[scene]
    words = tidy(scene)
    return Scene(words, f"with {words} around")


def mix_captions(foreground_label, scene, seed):
    """Caption a mix three times, in three manners.

    The first is the form of Gaurav et al. (DCASE 2024 Task 7), the second that of the challenge's
    own development set, the third one of :data:`PARAPHRASES`, drawn by `seed`.

    Parameters
    ----------
    foreground_label, scene : str
        Class of the event and of the background.
    seed : int
        Chooses the paraphrase; not negative.

    Returns
    -------
    tuple of str
        ``caption``, ``caption_2``, ``caption_3``.

    Examples
    --------
    >>> for caption in mix_captions("dog", "street_traffic", seed=0):
    ...     print(caption)
    dog barking with the sound of street traffic in background
    a dog is barking with traffic in the background
    one can hear the barks of a dog by a busy road
    """
    event, place = event_words(foreground_label), scene_words(scene)
    paraphrase = PARAPHRASES[np.random.default_rng(seed).integers(len(PARAPHRASES))]
    return (
        f"{event.phrase} with the sound of {tidy(scene)} in background",
        f"{event.clause} with {place.noun} in the background",
        paraphrase.format(clause=event.clause, noun=event.noun, place=place.place),
    )


def prompts(labels, family="simple", n=1, seed=0):
    """Write the prompts of each class for a text-to-audio model.

    Parameters
    ----------
    labels : iterable of str
        Class names; each once.
    family : {"label", "simple", "gpt", "varied"}
        The bare class name; one of the two fixed templates of Ronchini et al. (with their wording
        for the ten UrbanSound8K classes, and without their "urban" ending for all others); or
        different sentences from :data:`VARIED_TEMPLATES`, none twice before all were used.
    n : int
        Prompts a class. The fixed families repeat their one sentence.
    seed : int
        Order in which "varied" uses its sentences, for each class of its own.

    Returns
    -------
    pandas.DataFrame
        Columns ``label, prompt, prompt_family``; ``n`` rows a class, in the order of `labels`.

    Raises
    ------
    ValueError
        Unknown family, no labels, a label twice, or `n` below 1.

    Examples
    --------
    >>> prompts(["dog_bark", "cow"]).prompt.tolist()
    ['A clear sound of a dog barking in a urban context.', 'A clear sound of a cow mooing.']
    """
    labels = list(labels)
    if family not in FAMILIES:
        raise ValueError(f"unknown prompt family {family!r}; choose one of {', '.join(FAMILIES)}")
    if n < 1 or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"need n of at least 1 and each label once, got n={n}, labels={labels}")
    rows = [(label, p, family) for label in labels for p in _prompts(label, family, n, seed)]
    return pd.DataFrame(rows, columns=["label", "prompt", "prompt_family"])


def _prompts(label, family, n, seed):
    if family == "label":
        return [tidy(label)] * n
    if family == "varied":
        return _varied(label, n, seed)
    templates = STUDY_TEMPLATES if label in STUDY_PHRASES else GENERAL_TEMPLATES
    return [templates[family].format(x=STUDY_PHRASES.get(label) or _doing(label))] * n


def _varied(label, n, seed):
    event = event_words(label)
    # keyed by the name, so that adding a class changes no other class's prompts
    key = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, key])
    order = [
        t for _ in range(-(-n // len(VARIED_TEMPLATES))) for t in rng.permutation(VARIED_TEMPLATES)
    ]
    return [t.format(clause=event.clause, noun=event.noun, x=_doing(label)) for t in order[:n]]


def _doing(label):
    # "a dog is barking" names the sound as "a dog barking"
    words = event_words(label).clause
    for verb in (" is ", " are "):
        words = words.replace(verb, " ", 1)
    return words.removesuffix(" can be heard")
