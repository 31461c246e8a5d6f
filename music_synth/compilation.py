"""What XLA has compiled is kept on disk, so that a command does not compile again what an earlier one did."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax


def keep_compiled() -> Path | None:
    """Turns JAX's persistent compilation cache on, for entry points to call before they compile.

    It lies in ~/.cache/music_synth/jax ($XDG_CACHE_HOME in place of ~/.cache, where set) and may be deleted at any
    time. JAX's own settings have the last word: JAX_COMPILATION_CACHE_DIR=FOLDER moves it,
    JAX_ENABLE_COMPILATION_CACHE=0 turns it off. Where the folder cannot be written there is no cache, and no error.

    Returns:
      The folder in use, or None.
    """
    settings: Any = jax.config  # its attributes are made as JAX is imported
    if not settings.jax_enable_compilation_cache:
        return None
    if settings.jax_compilation_cache_dir:
        return Path(settings.jax_compilation_cache_dir)
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "music_synth" / "jax"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # not writable; no home
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # a command has dozens of quicker programs
    return folder
