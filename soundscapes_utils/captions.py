"""Words for sounds: captions of mixes and prompts of classes, from one small lexicon.

Four tables hold the language: :data:`EVENTS` says how each ESC-50 and UrbanSound8K class is
spoken of, :data:`SCENES` does so for the acoustic scenes of TAU and for the ambient classes that
can stand in for them; :data:`EVENT_VARIANTS` and :data:`SCENE_VARIANTS` add synonyms. A label that
is in none is still captioned, from its tidied name. :data:`RANGES` and :data:`RANGE_OF` say how far
off a class can be: nobody holds a microphone close to an airplane. :func:`wrong_senses` keeps a
second meaning of a word (a siren that sings, a mouse that squeaks) out of the texts, the files of
others included.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import re
import string
import warnings
from functools import lru_cache
from pathlib import Path
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


class EventVariants(NamedTuple):
    """Synonyms of an event: ``clauses``, ``nouns``, where it occurs, and more than one of it.

    ``setting`` is a key of :data:`SETTINGS`; ``several`` is empty where the event is not countable
    or its clause already speaks of many.
    """

    clauses: tuple
    nouns: tuple
    setting: str
    several: str = ""


class SceneVariants(NamedTuple):
    """Synonyms of a scene: ``nouns`` and ``places``."""

    nouns: tuple
    places: tuple


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

# fmt: off
# Two more clauses and two more noun phrases a class, its setting, and several of it at once.
EVENT_VARIANTS = {
    "dog": EventVariants(("a dog is yapping", "a dog is woofing"), ("the barking of a dog",
        "the yaps of a dog"), "street", "several dogs are barking"),
    "rooster": EventVariants(("a cockerel is crowing", "a rooster is calling loudly"),
        ("the call of a rooster", "the crowing of a cockerel"), "farm",
        "several roosters are crowing"),
    "pig": EventVariants(("a pig is oinking", "a hog is snorting"), ("the oinks of a pig",
        "the snorts of a hog"), "farm", "several pigs are grunting"),
    "cow": EventVariants(("a cow is lowing", "a cow is calling with a long moo"),
        ("the lowing of a cow", "the mooing of cattle"), "farm", "several cows are mooing"),
    "frog": EventVariants(("a frog is calling with a croak", "a frog is ribbiting"),
        ("the ribbit of a frog", "the croaking of a frog"), "pond", "several frogs are croaking"),
    "cat": EventVariants(("a cat is mewing", "a cat is calling with a meow"),
        ("the mewing of a cat", "the miaow of a cat"), "home", "several cats are meowing"),
    "hen": EventVariants(("a hen is cackling", "a chicken is clucking"), ("the cackle of a hen",
        "the clucking of a chicken"), "farm", "several hens are clucking"),
    "insects": EventVariants(("flies are buzzing around", "flying insects are humming"),
        ("the buzzing of insects", "the hum of flies"), "meadow"),
    "sheep": EventVariants(("a sheep is baaing", "a sheep is calling with a bleat"),
        ("the baa of a sheep", "the bleating of a sheep"), "farm", "several sheep are bleating"),
    "crow": EventVariants(("a crow is calling hoarsely", "a crow is giving a harsh caw"),
        ("the cawing of a crow", "the harsh call of a crow"), "woodland",
        "several crows are cawing"),
    "rain": EventVariants(("raindrops are pattering down", "a shower of rain is coming down"),
        ("the patter of raindrops", "a steady shower of rain"), "outdoors"),
    "sea_waves": EventVariants(("waves are washing ashore", "the surf is rolling in"),
        ("the wash of waves on a shore", "the roll of ocean waves"), "coast"),
    "crackling_fire": EventVariants(("wood is crackling in a fire",
        "flames are crackling and popping"), ("the crackling of burning wood",
        "the pops of a wood fire"), "fireside"),
    "crickets": EventVariants(("crickets are trilling", "a chorus of crickets is chirping"),
        ("the trill of crickets", "the chirping of a cricket chorus"), "meadow"),
    "chirping_birds": EventVariants(("birds are singing", "small birds are twittering"),
        ("birdsong", "the twitter of small birds"), "woodland"),
    "water_drops": EventVariants(("drops of water are falling", "a tap is dripping"),
        ("the drip of water", "a dripping tap"), "bathroom"),
    "wind": EventVariants(("gusts of wind are sweeping by", "a strong wind is howling"),
        ("the howl of the wind", "the rush of a strong wind"), "outdoors"),
    "pouring_water": EventVariants(("someone is pouring water", "water is running into a glass"),
        ("the pouring of water", "water running into a glass"), "kitchen"),
    "toilet_flush": EventVariants(("someone is flushing a toilet",
        "water is rushing down a toilet"), ("a flushing toilet", "the rush of water in a toilet"),
        "bathroom"),
    "thunderstorm": EventVariants(("a thunderstorm is raging", "thunder is rolling across the sky"),
        ("the rumble of thunder", "the roll of a thunderstorm"), "outdoors"),
    "crying_baby": EventVariants(("an infant is crying", "a baby is wailing"),
        ("the crying of an infant", "the wail of a baby"), "home", "several babies are crying"),
    "sneezing": EventVariants(("someone is sneezing", "a person is letting out a sneeze"),
        ("a loud sneeze", "someone's sneezes"), "home", "several people are sneezing"),
    "clapping": EventVariants(("an audience is applauding", "hands are clapping"),
        ("the clapping of hands", "a round of applause"), "hall"),
    "breathing": EventVariants(("someone is breathing heavily", "a person is drawing deep breaths"),
        ("the breathing of a person", "deep breaths"), "bedroom", "several people are breathing"),
    "coughing": EventVariants(("someone is coughing", "a person is having a fit of coughing"),
        ("a dry cough", "someone's coughs"), "home", "several people are coughing"),
    "footsteps": EventVariants(("someone is walking by", "a person is pacing up and down"),
        ("the steps of a walker", "the tread of shoes"), "building", "several people are walking"),
    "laughing": EventVariants(("someone is laughing out loud", "a person is giggling"),
        ("a hearty laugh", "the giggles of a person"), "home", "several people are laughing"),
    "brushing_teeth": EventVariants(("someone is brushing their teeth",
        "a toothbrush is scrubbing teeth"), ("the brushing of teeth", "a toothbrush at work"),
        "bathroom"),
    "snoring": EventVariants(("someone is snoring loudly", "a sleeper is snoring"), ("loud snores",
        "the snoring of a person"), "bedroom", "several people are snoring"),
    "drinking_sipping": EventVariants(("someone is taking small sips",
        "a person is slurping a drink"), ("the sipping of a drink", "slurps from a glass"),
        "kitchen", "several people are sipping drinks"),
    "door_wood_knock": EventVariants(("knuckles are rapping on a door",
        "someone is rapping at a wooden door"), ("raps on a wooden door", "a knock at the door"),
        "building", "several people are knocking on a door"),
    "mouse_click": EventVariants(("someone is clicking a computer mouse",
        "the buttons of a computer mouse are clicking"), ("the clicking of a computer mouse",
        "button presses on a computer mouse"), "office"),
    "keyboard_typing": EventVariants(("fingers are typing on a computer keyboard",
        "computer keys are clattering"), ("the clatter of computer keys",
        "typing on a computer keyboard"), "office", "several people are typing on keyboards"),
    "door_wood_creaks": EventVariants(("a door is squeaking on its hinges",
        "an old wooden door is groaning"), ("the squeak of a wooden door",
        "the groan of old door hinges"), "building", "several wooden doors are creaking"),
    "can_opening": EventVariants(("someone is opening a drink can",
        "a soda can is being popped open"), ("the pop of a soda can", "a drink can popping open"),
        "kitchen", "several cans are being opened"),
    "washing_machine": EventVariants(("a washing machine is spinning",
        "laundry is turning in a washing machine"), ("the spin of a washing machine",
        "the hum of a washing machine"), "laundry", "several washing machines are running"),
    "vacuum_cleaner": EventVariants(("someone is vacuuming the floor",
        "a vacuum cleaner is whining"), ("the hum of a vacuum cleaner",
        "the roar of a vacuum cleaner"), "home"),
    "clock_alarm": EventVariants(("an alarm clock is beeping", "a bedside alarm is going off"),
        ("the beeps of an alarm clock", "the buzz of a bedside alarm"), "bedroom",
        "several alarm clocks are ringing"),
    "clock_tick": EventVariants(("a wall clock is ticking away", "the hand of a clock is ticking"),
        ("the ticking of a clock", "the tick-tock of a clock"), "home",
        "several clocks are ticking"),
    "glass_breaking": EventVariants(("a pane of glass is shattering",
        "glass is smashing to pieces"), ("the shatter of glass", "the smash of a pane of glass"),
        "building"),
    "helicopter": EventVariants(("a helicopter is hovering overhead",
        "helicopter blades are chopping the air"), ("the chop of helicopter blades",
        "the noise of a helicopter"), "sky", "several helicopters are flying"),
    "chainsaw": EventVariants(("a chainsaw is cutting through wood", "a chainsaw is revving"),
        ("the revving of a chainsaw", "the buzz of a chainsaw"), "woodland",
        "several chainsaws are running"),
    "siren": EventVariants(("an ambulance siren is wailing", "a police siren is sounding"),
        ("the wail of an ambulance siren", "the siren of a police car"), "street",
        "several emergency sirens are wailing"),
    "car_horn": EventVariants(("a driver is honking", "a car is sounding its horn"),
        ("the blare of a car horn", "the beeps of a car horn"), "street",
        "several car horns are honking"),
    "engine": EventVariants(("a motor is running", "an engine is rumbling"),
        ("the drone of an engine", "a running motor"), "workshop", "several engines are running"),
    "train": EventVariants(("a train is rolling by", "a train is rattling along the tracks"),
        ("the rattle of a passing train", "a train rolling by"), "railway",
        "several trains are passing by"),
    "church_bells": EventVariants(("bells are pealing from a church",
        "the bells of a church are tolling"), ("the toll of church bells",
        "the ringing of church bells"), "town"),
    "airplane": EventVariants(("a plane is passing overhead", "a jet is flying across the sky"),
        ("the roar of a plane overhead", "a passing jet"), "sky",
        "several airplanes are flying over"),
    "fireworks": EventVariants(("fireworks are going off", "rockets are bursting in the sky"),
        ("the crackle and boom of fireworks", "bursting rockets"), "town"),
    "hand_saw": EventVariants(("someone is sawing wood by hand",
        "a hand saw is rasping through a board"), ("the rasp of a hand saw",
        "the sawing of a board by hand"), "workshop", "several hand saws are cutting wood"),
    "air_conditioner": EventVariants(("a cooling unit is humming", "an air conditioner is blowing"),
        ("the drone of an air conditioner", "the whirr of a cooling unit"), "office",
        "several air conditioners are humming"),
    "children_playing": EventVariants(("kids are playing",
        "children are shouting and laughing at play"), ("children at play",
        "the shouts of playing kids"), "playground"),
    "dog_bark": EventVariants(("a dog is yapping", "a dog is woofing"), ("the barking of a dog",
        "the yaps of a dog"), "street", "several dogs are barking"),
    "drilling": EventVariants(("someone is drilling into a wall", "a power drill is whirring"),
        ("the whine of a power drill", "drilling into a wall"), "site",
        "several drills are operating"),
    "engine_idling": EventVariants(("a car engine is idling",
        "a vehicle is waiting with its engine running"), ("the steady hum of an idling engine",
        "an idling car"), "street", "several engines are idling"),
    "gun_shot": EventVariants(("someone is firing a gun", "a gunshot is ringing out"),
        ("the bang of a gun", "a gunshot"), "range", "several guns are being fired"),
    "jackhammer": EventVariants(("a jackhammer is breaking up concrete",
        "a pneumatic drill is hammering"), ("the hammering of a jackhammer",
        "the rattle of a pneumatic drill"), "site", "several jackhammers are pounding"),
    "street_music": EventVariants(("buskers are performing", "a street band is playing"),
        ("the music of buskers", "a street band"), "town", "several street bands are playing"),
}
SCENE_VARIANTS = {
    "airport": SceneVariants(("an airport terminal", "the bustle of an airport"),
        ("in an airport terminal", "at an airport")),
    "bus": SceneVariants(("the noise inside a bus", "a moving bus"), ("inside a bus",
        "while riding on a bus")),
    "metro": SceneVariants(("the noise inside a metro train", "a moving metro train"),
        ("on the metro", "inside a metro train")),
    "metro_station": SceneVariants(("an underground platform", "the bustle of a metro station"),
        ("on a metro platform", "at a metro station")),
    "park": SceneVariants(("a city park", "the quiet of a park"), ("in a city park",
        "out in a park")),
    "public_square": SceneVariants(("a city square", "the bustle of a public square"),
        ("on a city square", "on an open square")),
    "shopping_mall": SceneVariants(("a shopping centre", "the bustle of a mall"),
        ("in a shopping centre", "inside a mall")),
    "street_pedestrian": SceneVariants(("a pedestrian zone", "the passers-by of a street"),
        ("in a pedestrian zone", "on a street full of passers-by")),
    "street_traffic": SceneVariants(("road traffic", "passing cars"), ("beside a busy street",
        "on a street with traffic")),
    "tram": SceneVariants(("the noise inside a tram", "a moving tram"), ("inside a tram",
        "while riding on a tram")),
    "rain": SceneVariants(("falling rain", "a rain shower"), ("out in the rain",
        "while rain is falling")),
    "sea_waves": SceneVariants(("waves on a shore", "the surf of the sea"), ("at the seaside",
        "on a beach")),
    "crackling_fire": SceneVariants(("a wood fire", "burning wood"), ("by a fireside",
        "next to a wood fire")),
    "helicopter": SceneVariants(("a hovering helicopter", "the blades of a helicopter"),
        ("below a helicopter", "with a helicopter overhead")),
}
# Where an event occurs by nature, for prompts that name a place; "anywhere" for other labels.
SETTINGS = {
    "street": ("on a quiet street", "in a courtyard", "in front of a house"),
    "farm": ("on a farm", "in a barn", "in a farmyard"),
    "pond": ("at a pond", "by a stream", "in a marsh"),
    "home": ("in a living room", "in a hallway", "in a small flat"),
    "bedroom": ("in a bedroom", "in a small room", "in a dormitory"),
    "bathroom": ("in a bathroom", "in a tiled room", "in a washroom"),
    "kitchen": ("in a kitchen", "at a table", "in a dining room"),
    "laundry": ("in a laundry room", "in a basement", "in a utility room"),
    "office": ("in an office", "in a study", "in a meeting room"),
    "building": ("in a corridor", "in a stairwell", "in an old house"),
    "hall": ("in a concert hall", "in a classroom", "in a theatre"),
    "meadow": ("in a meadow", "in a garden", "at the edge of a field"),
    "woodland": ("in a forest", "in a clearing", "among trees"),
    "outdoors": ("in open country", "in a garden", "outside a house"),
    "coast": ("on a beach", "at a rocky shore", "by a harbour"),
    "fireside": ("at a camp site", "in a quiet room", "in a clearing at night"),
    "sky": ("near an airfield", "in open country", "in a quiet suburb"),
    "workshop": ("in a workshop", "in a garage", "in a yard"),
    "railway": ("at a level crossing", "near a small station", "in open country"),
    "town": ("in a village", "in an old town", "near a market square"),
    "playground": ("on a playground", "in a schoolyard", "in a garden"),
    "site": ("at a building site", "in a house under repair", "on a closed road"),
    "range": ("at a shooting range", "in an open field", "in a quarry"),
    "anywhere": ("indoors", "outdoors", "in a large room"),
}
# What betrays that a word was taken in its other sense. Whole words, singular and plural.
WRONG_SENSES = {
    "siren": ("mermaid", "nymph", "myth", "mythical", "mythology", "mythological", "enchantress",
        "temptress", "seductive", "seductress", "odysseus", "sailor", "sirens of the sea",
        "song of the siren", "siren song", "siren's song"),
    "mouse_click": ("rodent", "mice", "squeak", "squeaking", "whisker", "mousetrap", "cheese",
        "scurrying", "field mouse", "pet mouse"),
    "keyboard_typing": ("piano", "pianist", "synthesizer", "organ", "melody", "chord",
        "musical keyboard", "blood typing"),
    "crow": ("crowing", "crowbar", "scarecrow", "crow's nest"),
    "rooster": ("weathercock", "weather vane"),
    "dog": ("hot dog", "tree bark", "bark of a tree", "bark of the tree", "birch bark"),
    "dog_bark": ("hot dog", "tree bark", "bark of a tree", "bark of the tree", "birch bark"),
    "cat": ("caterpillar", "catwalk", "cat scan", "lion", "tiger"),
    "hen": ("hen party", "hen night"),
    "pig": ("pig iron", "guinea pig", "piggy bank"),
    "frog": ("frog in the throat", "frog in his throat", "frog in her throat"),
    "insects": ("software bug", "wiretap"),
    "sea_waves": ("radio wave", "sound wave", "microwave", "heat wave", "hand wave", "wave goodbye",
        "waving"),
    "crackling_fire": ("gunfire", "pork crackling", "firing squad", "you are fired"),
    "crickets": ("wicket", "cricket match", "cricket bat", "batsman", "bowler", "umpire"),
    "chirping_birds": ("chirp signal", "frequency sweep", "radar", "badminton", "shuttlecock"),
    "water_drops": ("bass drop", "price drop", "drop shadow"),
    "wind": ("wind instrument", "flute", "winding", "wind up", "wind-up", "clockwork"),
    "pouring_water": ("pouring rain",),
    "toilet_flush": ("royal flush", "poker", "flushed face"),
    "thunderstorm": ("thunderous applause", "brainstorm"),
    "crying_baby": ("battle cry", "crying wolf"),
    "clapping": ("thunderclap", "clap of thunder", "slap"),
    "breathing": ("breathing fire", "breathing room", "dragon"),
    "coughing": ("engine coughing", "coughing engine"),
    "footsteps": ("in the footsteps of",),
    "laughing": ("laughing gas", "hyena", "kookaburra", "laughing gull"),
    "brushing_teeth": ("paint brush", "paintbrush", "saw teeth", "gear teeth", "hairbrush"),
    "door_wood_knock": ("engine knock", "knocking engine", "knock-knock joke", "knockout"),
    "door_wood_creaks": ("creek", "stream"),
    "can_opening": ("opening ceremony", "grand opening", "opening night", "watering can",
        "trash can", "canned laughter"),
    "vacuum_cleaner": ("vacuum of space", "outer space", "vacuum tube", "vacuum chamber"),
    "clock_alarm": ("fire alarm", "smoke alarm", "car alarm", "burglar alarm"),
    "clock_tick": ("tick bite", "parasite", "arachnid", "check mark"),
    "glass_breaking": ("breaking news", "break dance", "eyeglasses", "spectacles", "glass ceiling"),
    "helicopter": ("helicopter parent", "helicopter parenting"),
    "car_horn": ("french horn", "brass section", "horn section", "trumpet", "trombone", "antler",
        "unicorn", "rhinoceros", "orchestra"),
    "engine": ("search engine", "game engine", "fire engine"),
    "engine_idling": ("search engine", "game engine", "fire engine", "idle chatter", "idle hands"),
    "train": ("training", "trainer", "trainee", "train of thought", "wedding dress"),
    "church_bells": ("bell pepper", "doorbell", "bicycle bell", "cowbell"),
    "airplane": ("airplane mode", "paper plane", "paper airplane", "carpenter's plane"),
    "hand_saw": ("seesaw", "see-saw", "chainsaw", "jigsaw puzzle", "musical saw", "i saw", "we saw",
        "they saw", "he saw", "she saw"),
    "chainsaw": ("hand saw", "handsaw"),
    "air_conditioner": ("hair conditioner", "shampoo"),
    "children_playing": ("playing the piano", "playing the violin", "playing the guitar",
        "playing an instrument", "video game", "playing cards"),
    "drilling": ("fire drill", "military drill", "drill sergeant", "drill music", "drill rap",
        "rehearsal"),
    "gun_shot": ("nail gun", "glue gun", "water gun", "flu shot", "camera shot", "screenshot",
        "shot glass", "espresso", "vaccine"),
    "jackhammer": ("hammerhead", "hammer dulcimer"),
    "street_music": ("sheet music", "wall street", "sesame street"),
    "park": ("car park", "parking", "parked", "parking lot", "amusement park"),
    "bus": ("data bus", "mixing bus", "bus bar"),
    "metro": ("metronome", "metropolitan"),
    "metro_station": ("metronome", "radio station", "space station"),
    "tram": ("trampoline",),
    "public_square": ("square wave", "square root"),
    "shopping_mall": ("online shopping",),
    "street_traffic": ("web traffic", "network traffic", "data traffic", "drug trafficking",
        "human trafficking"),
}
# fmt: on

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
# The built-in model has learned the families above, of "varied" the templates; "task" came later.
ALL_FAMILIES = (*FAMILIES, "task")

# Captions beyond the third: {clause} or {noun} of the events, {scene} or {place} of the background.
CAPTION_FORMS = (
    "{clause} {place}",
    "{place}, {clause}",
    "{clause} with {scene} in the background",
    "with {scene} in the background, {clause}",
    "{clause}, and {scene} can be heard behind",
    "{noun}, heard {place}",
    "one can hear {noun} {place}",
    "{scene} in the background of {noun}",
    "{noun} with {scene} in the background",
    "a recording of {noun} {place}",
)
# "Mind the prompt" (arXiv 2504.03329) found task-specific prompts to serve classifiers best.
TASK_FORMS = ("{clause} {place}, {distance}, recorded with {microphone}",)
GRAMMAR_FORMS = (
    "{clause}{place}{distance}{microphone}{rest}",
    "a recording in which {clause}{place}{distance}{microphone}{rest}",
    "audio of a scene where {clause}{place}{distance}{microphone}{rest}",
    "{noun}{place}{distance}{microphone}{rest}",
    "a recording of {noun}{place}{distance}{microphone}{rest}",
    "a clear recording of {noun}{place}{distance}{microphone}{rest}",
    "a field recording of {noun}{place}{distance}{microphone}{rest}",
)
# How far off a sound can be, from near to far; a class that RANGE_OF does not name is "near".
RANGES = {
    "near": ("close to the microphone", "a few metres away", "in the distance"),
    "hand": ("close to the microphone", "within arm's reach", "on the other side of the room"),
    "room": ("close to the microphone", "a few steps away", "behind a closed door"),
    "hall": ("from the front row", "from the middle of the room", "from the back of the room"),
    "passing": ("passing close by", "passing a few streets away", "far off"),
    "far": ("not far away", "some way off", "in the distance"),
    "air": ("low in the sky", "high in the sky", "heard from the ground"),
    "around": ("on all sides", "heard from a doorway", "heard through an open window"),
}
RANGE_OF = {
    label: name
    for name, labels in {
        "hand": "breathing brushing_teeth can_opening clock_tick drinking_sipping keyboard_typing "
        "mouse_click pouring_water snoring water_drops",
        "room": "clock_alarm door_wood_creaks door_wood_knock toilet_flush vacuum_cleaner "
        "washing_machine",
        "hall": "clapping",
        "passing": "siren",
        "far": "church_bells gun_shot thunderstorm train",
        "air": "airplane fireworks helicopter",
        "around": "rain wind",
    }.items()
    for label in labels.split()
}
MICROPHONES = (
    "a hand-held recorder",
    "a smartphone",
    "a studio microphone",
    "a pair of microphones",
)
# Where no studio microphone stands, one with a wind shield takes its place.
OUTDOORS = (
    "coast",
    "farm",
    "meadow",
    "outdoors",
    "playground",
    "pond",
    "railway",
    "range",
    "site",
    "sky",
    "street",
    "town",
    "woodland",
)
SHIELDED = tuple("a microphone with a wind shield" if "studio" in m else m for m in MICROPHONES)
RESTS = ("with nothing else to be heard", "with a little echo", "without any echo")

# AudioLDM's own advice, then what is a sound of its own class and so unwanted in most others.
NEGATIVE_PROMPT = "low quality, average quality"
UNWANTED = {
    "music": ("street_music", "church_bells"),
    "speech": ("street_music", "children_playing", "laughing", "crying_baby"),
}
# What a recording of a class is easily taken for; a negative prompt may name it.
CONFUSED_WITH = {
    "air_conditioner": ("engine_idling", "wind"),
    "airplane": ("helicopter", "wind"),
    "breathing": ("wind", "snoring"),
    "chainsaw": ("engine", "vacuum_cleaner"),
    "clapping": ("rain", "fireworks"),
    "clock_tick": ("mouse_click", "water_drops"),
    "crackling_fire": ("rain", "clapping"),
    "crickets": ("insects", "chirping_birds"),
    "crow": ("rooster", "dog"),
    "crying_baby": ("cat", "laughing"),
    "cat": ("crying_baby",),
    "dog": ("coughing",),
    "dog_bark": ("children_playing",),
    "door_wood_knock": ("footsteps", "jackhammer"),
    "drilling": ("jackhammer", "chainsaw"),
    "engine": ("train", "airplane"),
    "engine_idling": ("air_conditioner", "jackhammer"),
    "fireworks": ("gun_shot", "thunderstorm"),
    "footsteps": ("door_wood_knock", "clock_tick"),
    "gun_shot": ("fireworks", "door_wood_knock"),
    "hand_saw": ("breathing", "brushing_teeth"),
    "helicopter": ("engine", "airplane"),
    "insects": ("chainsaw", "crickets"),
    "jackhammer": ("drilling", "helicopter"),
    "keyboard_typing": ("mouse_click", "footsteps"),
    "laughing": ("crying_baby", "coughing"),
    "mouse_click": ("keyboard_typing", "clock_tick"),
    "pouring_water": ("toilet_flush", "rain"),
    "rain": ("wind", "crackling_fire"),
    "rooster": ("crow", "crying_baby"),
    "sea_waves": ("wind", "rain"),
    "sneezing": ("coughing",),
    "snoring": ("breathing", "pig"),
    "coughing": ("sneezing", "dog"),
    "thunderstorm": ("wind", "fireworks"),
    "toilet_flush": ("pouring_water", "rain"),
    "train": ("engine", "wind"),
    "vacuum_cleaner": ("washing_machine", "airplane"),
    "washing_machine": ("engine", "vacuum_cleaner"),
    "water_drops": ("clock_tick", "rain"),
    "wind": ("sea_waves", "airplane"),
}
FILE_TYPES = (".csv", ".jsonl")
# CLAP's text towers read 77 tokens; 50 words of English stay below that.
MAX_WORDS = 50


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


def mix_captions(label, scene, seed, n=3):
    """Caption a mix in several manners.

    The first is the form of Gaurav et al. (DCASE 2024 Task 7), the second that of the challenge's
    own development set, the third one of :data:`PARAPHRASES`, drawn by `seed`. Further ones combine
    :data:`CAPTION_FORMS` with the synonyms of the events and of the scene; no two are the same.

    Parameters
    ----------
    label : str or list of str
        Class of the event, or of each event; a class that occurs twice is named once.
    scene : str
        Class of the background.
    seed : int
        Chooses the paraphrases; not negative.
    n : int
        Captions wanted. More captions begin with the same ones as fewer.

    Returns
    -------
    tuple of str
        ``caption``, ``caption_2``, ``caption_3``, …

    Raises
    ------
    ValueError
        No label, `n` below 1 or beyond what the lexicon can say of these labels.

    Examples
    --------
    >>> for caption in mix_captions("dog", "street_traffic", seed=0, n=5):
    ...     print(caption)
    dog barking with the sound of street traffic in background
    a dog is barking with traffic in the background
    one can hear the barks of a dog by a busy road
    the barking of a dog, heard by a busy road
    the yaps of a dog with passing cars in the background
    >>> mix_captions(["dog", "siren"], "street_traffic", seed=0)[1]
    'a dog is barking and an emergency siren is wailing with traffic in the background'
    """
    labels = [label] if isinstance(label, str) else list(label)
    labels = list(dict.fromkeys(labels))
    if not labels or n < 1:
        raise ValueError(f"need at least one label and n of at least 1, got {labels} and n={n}")
    events, place = [event_words(label) for label in labels], scene_words(scene)
    phrase, clause, noun = (_listed(part) for part in zip(*events, strict=True))
    paraphrase = PARAPHRASES[np.random.default_rng(seed).integers(len(PARAPHRASES))]
    first = (
        f"{phrase} with the sound of {tidy(scene)} in background",
        f"{clause} with {place.noun} in the background",
        paraphrase.format(clause=clause, noun=noun, place=place.place),
    )
    return first[:n] if n <= 3 else (*first, *_more_captions(labels, scene, seed, n, first))


def _listed(words):
    # a comma before the last "and" keeps three clauses apart, two need none
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _more_captions(labels, scene, seed, n, first):
    numbers = range(len(labels))
    slots = {f"clause{i}": _clauses(label) for i, label in enumerate(labels)}
    slots |= {f"noun{i}": _nouns(label) for i, label in enumerate(labels)}
    words, more = scene_words(scene), SCENE_VARIANTS.get(scene, SceneVariants((), ()))
    slots |= {"scene": (words.noun, *more.nouns), "place": (words.place, *more.places)}
    lists = {kind: _listed([f"{{{kind}{i}}}" for i in numbers]) for kind in ("clause", "noun")}
    forms = [form.format(**lists, scene="{scene}", place="{place}") for form in CAPTION_FORMS]
    texts = _texts(forms, slots, np.random.default_rng([seed, 1]), set(first))
    more = list(itertools.islice(texts, n - len(first)))
    if len(more) < n - len(first):
        raise ValueError(
            f"{n} captions of {', '.join(labels)} with {scene}: the lexicon knows "
            f"{len(first) + len(more)}; ask for fewer, or read captions from a file"
        )
    return more


def _clauses(label):
    more = EVENT_VARIANTS.get(label)
    return (event_words(label).clause, *(more.clauses if more else ()))


def _nouns(label):
    more = EVENT_VARIANTS.get(label)
    return (event_words(label).noun, *(more.nouns if more else ()))


@lru_cache(maxsize=256)
def _fields(form):
    return [field for _, field, _, _ in string.Formatter().parse(form) if field]


def _n_texts(forms, slots):
    return sum(math.prod(len(slots[field]) for field in _fields(form)) for form in forms)


def _text(forms, slots, rank):
    """Put one of all combinations into words: the `rank`-th."""
    for form in forms:
        size = _n_texts([form], slots)
        if rank < size:
            break
        rank -= size
    chosen = {}
    for field in _fields(form):
        rank, number = divmod(rank, len(slots[field]))
        chosen[field] = slots[field][number]
    return form.format(**chosen)


def _texts(forms, slots, rng, taken=()):
    """Yield every text once, in random order, but for those that are `taken`."""
    total, ranks, taken = _n_texts(forms, slots), set(), set(taken)
    # drawn one by one, so that a longer list begins with the shorter one
    while len(ranks) < total:
        rank = int(rng.integers(total))
        text = None if rank in ranks else _text(forms, slots, rank)
        ranks.add(rank)
        if text is not None and text not in taken:
            taken.add(text)
            yield text


def prompts(labels, family="simple", n=1, seed=0):
    """Write the prompts of each class for a text-to-audio model.

    Parameters
    ----------
    labels : iterable of str
        Class names; each once.
    family : {"label", "simple", "gpt", "varied", "task"} or path
        The bare class name; one of the two fixed templates of Ronchini et al. (with their wording
        for the ten UrbanSound8K classes, and without their "urban" ending for all others);
        "varied", sentences of which none comes twice, first those of :data:`VARIED_TEMPLATES`, then
        those of a grammar over the lexicon (:func:`varied_size` of them a class); "task", sentences
        that name the number of sources, the place, the distance and the microphone, none twice
        before all were used; or a file of prompts, .csv or .jsonl (see :func:`read_prompts`), taken
        in its order, its family the name of the file.
    n : int
        Prompts a class. The fixed families repeat their one sentence.
    seed : int
        Order in which "varied" and "task" use their sentences, for each class of its own.

    Returns
    -------
    pandas.DataFrame
        Columns ``label, prompt, prompt_family``; ``n`` rows a class, in the order of `labels`.
        A larger `n` only adds prompts.

    Raises
    ------
    ValueError
        Unknown family, no labels, a label twice, `n` below 1, or more prompts than "varied" or
        the file has for a class.

    Examples
    --------
    >>> prompts(["dog_bark", "cow"]).prompt.tolist()
    ['A clear sound of a dog barking in a urban context.', 'A clear sound of a cow mooing.']
    >>> prompts(["cow"], "task").prompt[0]
    'a cow is mooing on a farm, a few metres away, recorded with a hand-held recorder'
    """
    labels, path = list(labels), Path(family)
    from_file = path.suffix.lower() in FILE_TYPES
    if family not in ALL_FAMILIES and not from_file:
        raise ValueError(
            f"unknown prompt family {family!r}; choose one of {', '.join(ALL_FAMILIES)}, "
            f"or a file that ends in {' or '.join(FILE_TYPES)}"
        )
    if n < 1 or not labels or len(set(labels)) < len(labels):
        raise ValueError(f"need n of at least 1 and each label once, got n={n}, labels={labels}")
    if from_file:
        return _prompts_from_file(path, labels, n)
    rows = [(label, p, family) for label in labels for p in _prompts(label, family, n, seed)]
    return pd.DataFrame(rows, columns=["label", "prompt", "prompt_family"])


def _prompts(label, family, n, seed):
    if family == "label":
        return [tidy(label)] * n
    if family == "varied":
        return _varied(label, n, seed)
    if family == "task":
        return _task(label, n, seed)
    templates = STUDY_TEMPLATES if label in STUDY_PHRASES else GENERAL_TEMPLATES
    return [templates[family].format(x=STUDY_PHRASES.get(label) or _doing(label))] * n


def _key(label):
    # keyed by the name, so that adding a class changes no other class's prompts
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "little")


def _varied(label, n, seed):
    rng = np.random.default_rng([seed, _key(label)])
    first = [_from_template(label, template) for template in rng.permutation(VARIED_TEMPLATES)]
    first = list(dict.fromkeys(first))
    rng = np.random.default_rng([seed, _key(label), 2])
    more = _texts(GRAMMAR_FORMS, _grammar_slots(label), rng, taken=first)
    found = list(itertools.islice(itertools.chain(first, more), n))
    if len(found) < n:
        raise ValueError(
            f"{label}: there are {len(found)} different prompts of the family varied, {n} are "
            "wanted; ask for fewer, or take a family that repeats its prompts (task)"
        )
    return found


def _from_template(label, template):
    event = event_words(label)
    return template.format(clause=event.clause, noun=event.noun, x=_doing(label))


def distances(label):
    """How far off a class can be, in words.

    Parameters
    ----------
    label : str
        Class name.

    Returns
    -------
    tuple of str
        Three, from near to far (:data:`RANGES`).

    Examples
    --------
    >>> distances("dog")[0], distances("airplane")[0], distances("mouse_click")[2]
    ('close to the microphone', 'low in the sky', 'on the other side of the room')
    """
    return RANGES[RANGE_OF.get(label, "near")]


def microphones(label):
    """With what a class may have been recorded, in words.

    Parameters
    ----------
    label : str
        Class name.

    Returns
    -------
    tuple of str
        Four: :data:`MICROPHONES`, or :data:`SHIELDED` where the class is at home outdoors.

    Examples
    --------
    >>> microphones("keyboard_typing")[2], microphones("sea_waves")[2]
    ('a studio microphone', 'a microphone with a wind shield')
    """
    more = EVENT_VARIANTS.get(label)
    return SHIELDED if more and more.setting in OUTDOORS else MICROPHONES


def _task(label, n, seed):
    more = EVENT_VARIANTS.get(label)
    clauses = (event_words(label).clause, more.several) if more else (event_words(label).clause,)
    slots = {
        "clause": [clause for clause in clauses if clause],
        "place": SETTINGS[more.setting if more else "anywhere"],
        "distance": distances(label),
        "microphone": microphones(label),
    }
    rng = np.random.default_rng([seed, _key(label), 1])
    rounds = itertools.chain.from_iterable(
        _texts(TASK_FORMS, slots, rng) for _ in itertools.count()
    )
    return list(itertools.islice(rounds, n))


def _grammar_slots(label):
    more = EVENT_VARIANTS.get(label)
    several = (more.several,) if more and more.several else ()
    return {
        "clause": (*_clauses(label), *several),
        "noun": _nouns(label),
        "place": ("", *(f" {p}" for p in SETTINGS[more.setting if more else "anywhere"])),
        "distance": ("", *(f", {d}" for d in distances(label))),
        "microphone": ("", *(f", recorded with {m}" for m in microphones(label))),
        "rest": ("", *(f", {r}" for r in RESTS)),
    }


def varied_size(label):
    """Count the different prompts that the "varied" family has for a class.

    Parameters
    ----------
    label : str
        Class name.

    Returns
    -------
    int
        Most that :func:`prompts` can give of it without repeating one.

    Examples
    --------
    >>> varied_size("dog"), varied_size("rain"), varied_size("steam_whistle")
    (7687, 6727, 2246)
    """
    slots, templates = _grammar_slots(label), [_from_template(label, t) for t in VARIED_TEMPLATES]
    made = {_text(GRAMMAR_FORMS, slots, rank) for rank in range(_n_texts(GRAMMAR_FORMS, slots))}
    return len(made.union(templates))


def _doing(label):
    # "a dog is barking" names the sound as "a dog barking"
    words = event_words(label).clause
    for verb in (" is ", " are "):
        words = words.replace(verb, " ", 1)
    return words.removesuffix(" can be heard")


def negative_prompt(label=None, confusions=False):
    """What a class should not sound like: poor recordings, and what it has not in it.

    Parameters
    ----------
    label : str, optional
        Class name; without it only the quality is spoken of.
    confusions : bool
        Also name the sounds that the class is easily taken for (:data:`CONFUSED_WITH`).

    Returns
    -------
    str
        For the ``negative_prompt`` of a plan.

    Examples
    --------
    >>> negative_prompt("siren"), negative_prompt("street_music")
    ('low quality, average quality, music, speech', 'low quality, average quality')
    >>> negative_prompt("dog_bark", confusions=True)
    'low quality, average quality, music, speech, children playing'
    """
    unwanted = [what for what, owners in UNWANTED.items() if label and label not in owners]
    if confusions:
        unwanted += [event_words(other).phrase for other in CONFUSED_WITH.get(label, ())]
    return ", ".join([NEGATIVE_PROMPT, *unwanted])


# --- senses and variety -----------------------------------------------------------------------


def wrong_senses(text, label):
    """Find the words that betray that a class name was taken in its other sense.

    The lexicon's own texts pass; it is meant for those that a person or a language model writes.

    Parameters
    ----------
    text : str
        Caption or prompt.
    label : str
        Class of an event or scene that `text` speaks of.

    Returns
    -------
    list of str
        The entries of :data:`WRONG_SENSES` found in it as whole words; empty if all is well, and
        for a class without such a trap.

    Examples
    --------
    >>> wrong_senses("The mythical sirens lure a sailor.", "siren")
    ['mythical', 'sailor']
    >>> wrong_senses("a police siren passes by", "siren")
    []
    """
    spoken = " ".join(str(text).lower().replace("’", "'").split())
    found = (entry for entry in WRONG_SENSES.get(label, ()) if _as_words(entry).search(spoken))
    return list(found)


@lru_cache(maxsize=1024)
def _as_words(entry):
    words = "[ -]".join(re.escape(word) for word in entry.split())
    return re.compile(rf"(?<![\w-]){words}(?:e?s)?(?![\w-])")


def _tokens(text):
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", str(text).lower())


def vocabulary(captions):
    """Measure how varied captions are.

    Parameters
    ----------
    captions : pandas.DataFrame or iterable of str
        Table of mixes, each of whose caption columns (``caption``, ``caption_2``, …) is measured,
        or any texts.

    Returns
    -------
    pandas.DataFrame
        One row a column (and "all" where there are several): ``column, captions, distinct,
        mean_length`` in words, ``words`` in all, ``vocabulary`` (different words), ``distinct_1``
        and ``distinct_2`` (different over all unigrams and bigrams: Li et al., NAACL 2016;
        ``distinct_1`` is the type-token ratio) and ``root_type_token`` (different words over the
        root of all words: Guiraud), which depends less on how many captions there are.

    Examples
    --------
    >>> table = vocabulary(["a dog is barking", "a dog is yapping"])
    >>> table[["captions", "distinct", "words", "vocabulary", "distinct_1"]].to_numpy().tolist()
    [[2.0, 2.0, 8.0, 5.0, 0.625]]
    """
    if not isinstance(captions, pd.DataFrame):
        captions = pd.DataFrame({"caption": list(captions)})
    names = caption_columns(captions)
    rows = [{"column": name} | _variety(captions[name].dropna()) for name in names]
    if len(names) > 1:
        rows.append({"column": "all"} | _variety(captions[names].melt()["value"].dropna()))
    return pd.DataFrame(rows)


def caption_columns(table):
    """Name the caption columns of a table, in order of their number.

    Parameters
    ----------
    table : pandas.DataFrame
        Table of mixes, or of a split file.

    Returns
    -------
    list of str
        ``caption``, ``caption_2``, …, as far as they are there.

    Examples
    --------
    >>> caption_columns(pd.DataFrame(columns=["caption_10", "path", "caption_2", "caption"]))
    ['caption', 'caption_2', 'caption_10']
    """
    numbers = {name: re.fullmatch(r"caption(?:_(\d+))?", str(name)) for name in table.columns}
    found = {name: int(match[1] or 1) for name, match in numbers.items() if match}
    return sorted(found, key=found.get)


def _variety(texts):
    words = [_tokens(text) for text in texts]
    pairs = {pair for one in words for pair in itertools.pairwise(one)}
    n_words, n_pairs = sum(map(len, words)), sum(max(0, len(one) - 1) for one in words)
    different = {word for one in words for word in one}
    return {
        "captions": len(words),
        "distinct": len(set(texts)),
        "mean_length": n_words / max(1, len(words)),
        "words": n_words,
        "vocabulary": len(different),
        "distinct_1": len(different) / max(1, n_words),
        "distinct_2": len(pairs) / max(1, n_pairs),
        "root_type_token": len(different) / math.sqrt(max(1, n_words)),
    }


def diversity(table, embed=None):
    """Compare prompt families: how varied are the prompts of each?

    Parameters
    ----------
    table : pandas.DataFrame
        From :func:`prompts`, or a generation plan: ``label, prompt, prompt_family``.
    embed : callable, optional
        Takes a list of texts, returns their embeddings as an array of shape (texts, dimensions);
        for example a CLAP text tower. Each different text is embedded once.

    Returns
    -------
    pandas.DataFrame
        One row a family: ``prompt_family, prompts, distinct, mean_length, words, vocabulary,
        distinct_1, distinct_2, root_type_token`` as in :func:`vocabulary`, and with `embed`
        ``embedding_distance``: 1 − cosine over all pairs of one class, repeated prompts included,
        averaged over the classes (NaN where no class has two prompts).

    Raises
    ------
    ValueError
        Embeddings of another number than there are texts, or not finite, or zero.

    Examples
    --------
    >>> both = pd.concat([prompts(["dog"], family, n=4) for family in ("simple", "varied")])
    >>> diversity(both)[["prompt_family", "prompts", "distinct"]].to_numpy().tolist()
    [['simple', 4, 1], ['varied', 4, 4]]
    """
    rows = []
    for family, group in table.groupby("prompt_family", sort=False):
        row = {"prompt_family": family} | _variety(group["prompt"])
        row = {{"captions": "prompts"}.get(key, key): value for key, value in row.items()}
        if embed is not None:
            row["embedding_distance"] = _mean_distance(group, embed)
        rows.append(row)
    return pd.DataFrame(rows)


def _mean_distance(group, embed):
    texts = list(dict.fromkeys(group["prompt"]))
    vectors = np.asarray(embed(texts), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"embed gave an array of shape {vectors.shape} for {len(texts)} texts")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("embed gave a vector that is zero or not finite; check the text model")
    unit = dict(zip(texts, vectors / lengths, strict=True))
    means = []
    for _, prompts_of_class in group.groupby("label")["prompt"]:
        own = np.array([unit[text] for text in prompts_of_class])
        n = len(own)
        if n > 1:
            # the sum over all pairs is the squared length of the sum, less the n pairs with itself
            # and repeated prompts must not end a rounding below zero
            means.append(max(0.0, 1 - (np.sum(own.sum(axis=0) ** 2) - n) / (n * (n - 1))))
    return float(np.mean(means)) if means else float("nan")


# --- texts of others --------------------------------------------------------------------------


def read_prompts(path):
    r"""Read prompts that a person or a language model has written, and check every row.

    Parameters
    ----------
    path : str or Path
        CSV with a header, or JSON Lines (.jsonl): ``label`` and ``prompt``.

    Returns
    -------
    prompts : pandas.DataFrame
        Columns ``label, prompt, prompt_family``: the sound rows in the order of the file; the
        family is the file's name without its ending.
    problems : pandas.DataFrame
        Columns ``row`` (line of the file), ``problem``: rows that are set aside because they are
        incomplete, empty, longer than :data:`MAX_WORDS`, in a wrong sense, or said before.

    Raises
    ------
    ValueError
        No such file, another ending, not in the format, or columns that are missing.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "mine.csv"
    >>> _ = file.write_text("label,prompt\nsiren,a mermaid sings\nsiren,a fire engine passes\n")
    >>> table, problems = read_prompts(file)
    >>> table.prompt.tolist(), problems.to_numpy().tolist()
    (['a fire engine passes'], [[2, "prompt speaks of 'mermaid', another sense of siren"]])
    """
    table, problems = _read_rows(path, [("label", "prompt")])
    good, seen = [], set()
    for row in table.to_dict("records"):
        problem = _text_problem(row["prompt"], [row["label"]])
        if not row["label"]:
            problem = "has no label"
        elif not problem and (row["label"], row["prompt"]) in seen:
            problem = "says the same as one before"
        if problem:
            problems.append((row["row"], f"prompt {problem}"))
            continue
        seen.add((row["label"], row["prompt"]))
        good.append((row["label"], row["prompt"], Path(path).stem))
    return (
        pd.DataFrame(good, columns=["label", "prompt", "prompt_family"]),
        pd.DataFrame(sorted(problems), columns=["row", "problem"]),
    )


def _prompts_from_file(path, labels, n):
    table, problems = read_prompts(path)
    have = table["label"].value_counts()
    short = [label for label in labels if have.get(label, 0) < n]
    if short:
        first = f"; line {problems.row[0]} {problems.problem[0]}" if len(problems) else ""
        raise ValueError(
            f"{path}: {have.get(short[0], 0)} usable prompts for {short[0]}, {n} are wanted "
            f"({len(problems)} rows were set aside{first}); add some, or ask for fewer"
        )
    if len(problems):
        warnings.warn(
            f"{path}: {len(problems)} rows set aside, the first in line {problems.row[0]}: "
            f"{problems.problem[0]} (captions.read_prompts lists them)",
            stacklevel=3,
        )
    parts = [table[table["label"] == label].head(n) for label in labels]
    return pd.concat(parts, ignore_index=True)


def read_captions(path, mixes):
    r"""Read captions that a person or a language model has written for mixes, and check every row.

    Parameters
    ----------
    path : str or Path
        CSV with a header, or JSON Lines (.jsonl). Either ``clip_id`` says which mix a row is for, or
        ``label`` and ``scene``: then it suits every mix of that event (several: joined by "+")
        and scene. ``caption``, ``caption_2``, … hold the texts; several rows for a mix add up.
    mixes : pandas.DataFrame
        Table of mixes that they are for.

    Returns
    -------
    captions : pandas.DataFrame
        Columns ``clip_id, caption``: every sound caption for every mix that it suits, in the order
        of the file; for :func:`use_captions`.
    problems : pandas.DataFrame
        Columns ``row`` (line of the file; 0 for what is missing from it), ``problem``: captions
        that are set aside because they are empty, longer than :data:`MAX_WORDS`, in a wrong sense,
        said before, or for no mix of the table; and mixes that are left without a caption.

    Raises
    ------
    ValueError
        No such file, another ending, not in the format, or columns that are missing.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "mine.csv"
    >>> _ = file.write_text("label,scene,caption\ndog,park,a terrier barks at joggers\ndog,bus,\n")
    >>> mixes = pd.DataFrame({"clip_id": ["m0", "m1"], "label": "dog"})
    >>> found, problems = read_captions(file, mixes.assign(scene=["park", "bus"]))
    >>> found.to_numpy().tolist()
    [['m0', 'a terrier barks at joggers']]
    >>> problems.to_numpy().tolist()
    [[0, 'no caption for mix m1'], [3, 'caption is empty']]
    """
    table, problems = _read_rows(path, [("clip_id", "caption"), ("label", "scene", "caption")])
    by_id = "clip_id" in table
    keys = ["clip_id"] if by_id else ["label", "scene"]
    named, suits = {}, {}
    for mix in mixes.to_dict("records"):
        labels = event_labels(mix)
        named[mix["clip_id"]] = (*labels, mix["scene"])
        key = (str(mix["clip_id"]),) if by_id else ("+".join(labels), str(mix["scene"]))
        suits.setdefault(key, []).append(mix["clip_id"])
    found = {}
    for row in table.to_dict("records"):
        key = tuple(row[name] for name in keys)
        ids = suits.get(key, [])
        if not ids:
            problems.append((row["row"], f"no mix of {' and '.join(keys)} {', '.join(key)}"))
            continue
        for column in caption_columns(table):
            if row[column] is None and column != "caption":
                continue
            problem = _text_problem(row[column], named[ids[0]])
            if not problem and row[column] in found.get(ids[0], ()):
                problem = "says the same as one before"
            if problem:
                problems.append((row["row"], f"{column} {problem}"))
                continue
            for clip_id in ids:
                found.setdefault(clip_id, []).append(row[column])
    bare = [clip_id for clip_id in named if clip_id not in found]
    problems += [(0, f"no caption for mix {clip_id}") for clip_id in bare]
    rows = [(clip_id, text) for clip_id in named for text in found.get(clip_id, [])]
    return (
        pd.DataFrame(rows, columns=["clip_id", "caption"]),
        pd.DataFrame(sorted(problems), columns=["row", "problem"]),
    )


def use_captions(mixes, captions, n=1, add=False):
    """Give mixes the captions of a file, in place of their own or beside them.

    Parameters
    ----------
    mixes : pandas.DataFrame
        Table of mixes; its caption columns may be any number.
    captions : pandas.DataFrame
        From :func:`read_captions`.
    n : int
        Captions of the file for each mix.
    add : bool
        False replaces the first `n` caption columns; True adds `n` more.

    Returns
    -------
    pandas.DataFrame
        The mixes with at least `n` caption columns. A mix for which the file has fewer keeps its
        own captions, and gets paraphrases from the lexicon where these do not suffice; no two
        captions of a mix are the same on that account.

    Raises
    ------
    ValueError
        `n` below 1.

    Examples
    --------
    >>> mixes = pd.DataFrame({"clip_id": ["m0"], "label": "dog", "scene": "park"})
    >>> mixes = mixes.assign(seed=0, caption="dog barking with the sound of park in background")
    >>> given = pd.DataFrame({"clip_id": ["m0"], "caption": ["a terrier barks at joggers"]})
    >>> use_captions(mixes, given, add=True)[["caption", "caption_2"]].to_numpy().tolist()
    [['dog barking with the sound of park in background', 'a terrier barks at joggers']]
    """
    if n < 1:
        raise ValueError(f"n of {n} captions: give at least 1")
    own = caption_columns(mixes)
    kept = len(own) if add else 0
    names = ["caption", *(f"caption_{i}" for i in range(2, max(len(own), kept + n) + 1))]
    given = captions.groupby("clip_id")["caption"].agg(list).to_dict()
    rows = [
        _chosen(mix, [mix[name] for name in own], given.get(mix["clip_id"], []), kept, n)
        for mix in mixes.to_dict("records")
    ]
    return mixes.assign(**dict(zip(names, zip(*rows, strict=True), strict=True)))


def _chosen(mix, own, given, kept, n):
    texts = own[:kept]
    fresh = [text for text in dict.fromkeys([*given, *own[kept:]]) if text not in texts]
    if len(fresh) < n:
        # as many as all of a mix's captions: enough are left when those in use are taken out
        spoken = mix_captions(event_labels(mix), mix["scene"], int(mix["seed"]), kept + n)
        fresh += [text for text in spoken if text not in texts and text not in fresh]
    texts += fresh[:n]
    return texts + own[len(texts) :]


def event_labels(mix):
    """Name the foreground events of a mix.

    Parameters
    ----------
    mix : dict
        Row of a table of mixes: ``label`` and, where there are further events,
        ``events`` (see :func:`~soundscapes_utils.mixing.further_events`).

    Returns
    -------
    list of str
        Class of each event, the first one first.

    Examples
    --------
    >>> event_labels({"label": "dog", "events": '[{"label": "siren"}]'})
    ['dog', 'siren']
    """
    from soundscapes_utils import mixing

    further = mixing.further_events(mix.get("events"))
    return [mix["label"], *(event["label"] for event in further)]


def _text_problem(text, labels):
    if text is None or text == "":
        return "is empty"
    if not isinstance(text, str):
        return "is no text"
    if len(text.split()) > MAX_WORDS:
        return f"has {len(text.split())} words, {MAX_WORDS} at most"
    for label in labels:
        for words in wrong_senses(text, label):
            return f"speaks of {words!r}, another sense of {label}"
    return None


def _read_rows(path, layouts):
    """Rows of a CSV or JSON Lines file as a table of texts, and the lines that are none."""
    path = Path(path)
    if path.suffix.lower() not in FILE_TYPES:
        raise ValueError(f"{path}: cannot be read; give a file that ends in .csv or .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a text file in UTF-8") from error
    rows, problems = (_csv_rows if path.suffix.lower() == ".csv" else _json_rows)(text)
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if not any(set(layout) <= set(names) for layout in layouts):
        wanted = " or ".join(", ".join(layout) for layout in layouts)
        raise ValueError(f"{path}: needs {wanted} in its rows, has {', '.join(names) or 'none'}")
    table = pd.DataFrame(
        [[line, *(_cell(row.get(name), name) for name in names)] for line, row in rows],
        columns=["row", *names],
        dtype=object,
    )
    return table, problems


def _cell(value, name):
    if name in ("label", "scene", "clip_id"):
        return "" if value is None else str(value).strip()
    return " ".join(value.split()) if isinstance(value, str) else value


def _csv_rows(text):
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows, problems = [], []
    for row in reader:
        if None in row:
            problems.append((reader.line_num, "has more cells than the header; quote the text"))
        else:
            rows.append((reader.line_num, row))
    return rows, problems


def _json_rows(text):
    rows, problems = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            problems.append((number, f"is not JSON ({error})"))
            continue
        if isinstance(row, dict):
            rows.append((number, row))
        elif row is not None:
            problems.append((number, "is no JSON object"))
    return rows, problems
