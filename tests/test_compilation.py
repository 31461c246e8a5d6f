"""What XLA compiled is kept: where, when not, and that it is found again."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from music_synth.compilation import keep_compiled

SETTINGS = ("jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def as_in_a_new_process():
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def compile_something():
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) + 1)(jnp.ones(3)).block_until_ready()


def test_programs_are_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_compiled()
    assert folder == tmp_path / "music_synth" / "jax" and folder.is_dir()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    hits = []

    def listener(event, **_):
        if event.endswith("cache_hits"):
            hits.append(event)

    jax.monitoring.register_event_listener(listener)
    try:
        compile_something()
        kept = sorted(folder.iterdir())
        assert kept and not hits
        compile_something()
        assert hits
    finally:
        jax.monitoring.unregister_event_listener(listener)


def test_the_settings_of_jax_have_the_last_word(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "elsewhere"))
    assert keep_compiled() == tmp_path / "elsewhere"
    jax.config.update("jax_enable_compilation_cache", False)
    assert keep_compiled() is None
    assert not (tmp_path / "cache").exists()


def test_a_home_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert keep_compiled() is None
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert keep_compiled() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert keep_compiled() == tmp_path / "home" / ".cache" / "music_synth" / "jax"
