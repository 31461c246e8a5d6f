"""The commands under one name: `music_synth play in.mid`, or `python -m music_synth play in.mid`."""

from __future__ import annotations

import importlib

from music_synth import __version__, errors
from music_synth.errors import UserError

COMMANDS = {  # name: (module, what it does); a module is imported when its command is called
    "play": ("synthesize", "MIDI files to audio"),
    "studio": ("studio.__main__", "play, change and compare in a browser"),
    "train": ("train", "train a decoder or an inverter"),
    "evaluate": ("evaluate", "score checkpoints on held-out pieces"),
    "prepare": ("prepare_data", "build data sets and arrays to train on"),
    "adopt": ("adopt", "an instrument of your own recordings"),
    "convert": ("convert", "checkpoints from one form to another"),
}


def main(argv: list[str]) -> None:
    """Hands the arguments after the command's name to the command."""
    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        importlib.import_module(f"music_synth.{COMMANDS[name][0]}").main(rest)
    elif name in ("-h", "--help"):
        print("usage: music_synth COMMAND [FLAGS]\n")
        for command, (_, about) in COMMANDS.items():
            print(f"  {command:<10}{about}")
        print("\nmusic_synth COMMAND --help lists the flags of a command.")
    elif name == "--version":
        print(__version__)
    else:
        raise UserError(f"no command {name!r}: choose from {', '.join(COMMANDS)} (music_synth --help)")


def run() -> None:
    """Runs the command line of this process."""
    errors.run(main)


if __name__ == "__main__":
    run()
