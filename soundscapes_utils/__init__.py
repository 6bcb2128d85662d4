"""Soundscapes: mix, generate, fine-tune, measure and augment environmental sound.

One module a stage, named as its notebook's subject; import the one that you need::

    from soundscapes_utils import audio, mixing
"""

__version__ = "0.1.0"
