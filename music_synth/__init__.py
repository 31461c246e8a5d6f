"""MIDI in, music out. What is named here is imported when it is first asked for, so that `import music_synth` is free.

from music_synth import MidiProcessor, SpectrogramDiffusionPipeline
"""

__version__ = "0.1.0"  # read by setup.py and the docs; CHANGELOG.md says what is in it

__all__ = ["MidiProcessor", "SpectrogramDiffusionPipeline"]


def __getattr__(name: str):
    if name in __all__:
        from music_synth import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
