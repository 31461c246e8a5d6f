"""What an entry point says of what goes wrong: one line, status 1, and the work goes on where it can."""

import subprocess
import sys
import textwrap

import pytest

from music_synth.errors import LONGEST_LINE, UserError, needing, one_line, telling


def command(tmp_path, body, shell="exec {python} {script}", **options):
    """A command whose `main` has this body, run by a shell."""
    script = tmp_path / "command.py"
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    script.write_text(f"import os, sys\nfrom music_synth import errors\ndef main(argv):\n{lines}\nerrors.run(main)\n")
    line = shell.format(python=sys.executable, script=script)
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise errors.UserError('no\\n  such thing')", "error: no such thing\n"),
        ("open('/nowhere/' + 'x' * 10)", "error: /nowhere/xxxxxxxxxx: No such file or directory\n"),
        ("os.mkdir('x' * 256)", f"error: {'x' * 256}: File name too long\n"),
        ("open('/dev/full', 'w', buffering=1).write('x\\n')", "error: No space left on device\n"),
        ("raise errors.UserError(os.fsdecode(b'no \\xff.mid'))", "error: no \\udcff.mid\n"),
        ("open('x', 'w', encoding='utf-8').write(os.fsdecode(b'\\xff'))", "error: a name or text is no UTF-8 ("),
        ("raise KeyboardInterrupt", "error: interrupted\n"),
        ("bytearray(1 << 62)", "error: there is not enough memory for this\n"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path, body, said):
    done = command(tmp_path, body, cwd=tmp_path)
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert done.returncode == 1


def test_an_error_of_the_program_keeps_its_traceback(tmp_path):
    assert "Traceback" in command(tmp_path, "{}['x']").stderr
    assert "Traceback" in command(tmp_path, "raise errors.UserError('x')", "exec {python} {script} --debug").stderr


def test_a_refusal_and_a_missing_package_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write notes: No such file or directory; choose another folder$"):
        with telling("cannot write notes", "; choose another folder"):
            (tmp_path / "none" / "notes").touch()
    with pytest.raises(UserError, match=r"^a chart needs .*no_such_package.*: pip install 'music_synth\[charts\]'$"):
        with needing("a chart needs a package", "charts"):
            import no_such_package  # noqa: F401
    with pytest.raises(KeyError), telling("cannot write notes"), needing("a chart needs a package", "charts"):
        raise KeyError("an error of the program")


def test_long_lines_are_cut():
    line = one_line("bad value " + "[" * 300_000 + " choose another")
    assert line.startswith("bad value [[[") and line.endswith("[ choose another") and len(line) < LONGEST_LINE + 10


WORK = (
    "print('begun', flush=True)\nprint('more')\nprint('told', file=sys.stderr, flush=True)\nopen('done', 'w').close()"
)


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        ("exec {python} {script} > /dev/full", 1, "stdout cannot be written (No space left on device)"),
        ("exec {python} {script} >&-", 0, "told"),
        ("exec {python} {script} 2> /dev/full > /dev/null", 1, ""),
        ("exec {python} {script} 2>&-", 0, ""),
        ("{python} {script} | true; exit ${{PIPESTATUS[0]}}", 1, "stdout cannot be written (Broken pipe)"),
    ],
)
def test_work_is_done_although_nobody_can_read_of_it(tmp_path, shell, status, said):
    body = "import time; time.sleep(0.5)\n" * ("true" in shell) + WORK
    done = command(tmp_path, body, shell, cwd=tmp_path)
    assert (tmp_path / "done").exists()
    assert said in done.stderr and "Exception ignored" not in done.stderr
    assert done.returncode == status


def test_a_folder_that_is_gone_is_said(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = command(tmp_path, "print('x')", f"cd {gone} && rmdir {gone} && exec {{python}} {{script}}")
    assert done.stderr == "error: the current folder is gone: change to one that is there\n"
    assert done.returncode == 1
