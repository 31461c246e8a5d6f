"""Where data sets live unless the user says otherwise."""

from pathlib import Path

import music_synth


def default_data_dir() -> Path:
    """Returns `data/` of the repository when the package runs from a checkout, else ~/music_synth_data."""
    root = Path(music_synth.__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file() and (root / "data").is_dir():
        return root / "data"
    return Path.home() / "music_synth_data"
