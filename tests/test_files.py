"""Files appear whole, and only when they are on the disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from music_synth.files import locked, replacing, whole_folder, write_whole


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "notes.txt"
    write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with replacing(path) as part:
        assert part.parent == tmp_path and part.suffix == ".txt"
        part.write_text("new")
        assert path.read_text() == "é\n"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_breaks_off_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "notes.txt"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_it_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_whole(tmp_path / "notes.txt", "")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_link_keeps_pointing_to_what_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    write_whole(link, "text")
    assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == "text"


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    write_whole(tmp_path / ("n" * 255), "text")
    assert (tmp_path / ("n" * 255)).read_text() == "text"


def test_devices_are_written_to_and_not_replaced():
    write_whole("/dev/null", "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(OSError, match="No space left"):
        write_whole("/dev/full", "text")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    with whole_folder(folder) as part:
        (part / "below").mkdir()
        (part / "below" / "file").write_text("text")
        assert not folder.exists()
    assert (folder / "below" / "file").read_text() == "text"
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other") as part:
        (part / "file").write_text("text")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="not empty"), whole_folder(folder) as part:
        (part / "file").write_text("text")
    assert list(folder.iterdir()) == [folder / "below"]
    with whole_folder(tmp_path / ("n" * 255)):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"new", "n" * 255}
    assert list(folder.parent.iterdir()) == [folder]


def test_what_killed_processes_left_of_a_folder_is_removed(tmp_path):
    code = (
        "import os, sys\nfrom music_synth.files import whole_folder\n"
        "with whole_folder(sys.argv[1]) as part:\n    (part / 'file').write_text('text')\n"
        "    print(part.name, flush=True)\n    sys.stdin.read()\n    os._exit(9)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "folder")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        left = tmp_path / process.stdout.readline().strip()
        with whole_folder(tmp_path / "folder"):
            assert left.is_dir()  # it is alive
        (tmp_path / "folder").rmdir()
        process.stdin.close()
    assert left.is_dir()
    with whole_folder(tmp_path / "other"):
        assert left.is_dir()  # of another folder
    with whole_folder(tmp_path / "folder"):
        assert not left.exists()


def test_a_locked_folder_is_refused_to_others(tmp_path):
    with locked(tmp_path), pytest.raises(OSError, match="unavailable"), locked(tmp_path, wait=False):
        pass
    with locked(tmp_path, wait=False):
        pass
