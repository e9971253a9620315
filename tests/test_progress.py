"""The progress line: on a terminal what, how far and how long still; elsewhere nothing."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

import train
from runtime import cli, progress
from runtime.progress import Line, progress_bar, say

WORK = """
import sys, time
from dataclasses import dataclass
import train
from runtime import cli, progress

@dataclass(frozen=True)
class Settings:
    pass

def main():
    cli.parse(Settings)
    with progress.Line("work", 10, "passes") as line:
        with line.part("first", 4, dict(inner=4)):
            for _ in progress.progress_bar(range(4), desc="inner"):
                time.sleep(0.6)
            progress.say("said")
        with line.part("second", 6):
            pass

cli.run(main)
"""


def on_terminal(*arguments) -> tuple[subprocess.Popen, int]:
    """A process whose standard error is a terminal of 100 columns, and our end of that."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    return process, ours


def ended(process: subprocess.Popen, ours: int) -> tuple[str, list[str]]:
    """Standard output, and the lines that the terminal was sent."""
    sent = b""
    while True:
        try:
            sent += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    said, _ = process.communicate()
    assert process.returncode == 0, sent
    return said, [line for line in re.split(r"[\r\n]+", sent.decode()) if line.strip()]


def test_a_terminal_shows_one_line_which_bars_inside_move_and_elsewhere_there_is_none():
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    logged = subprocess.Popen([sys.executable, "-c", WORK], cwd=ROOT, **pipes)
    shown, quiet = on_terminal("-c", WORK), on_terminal("-c", WORK, "--quiet")
    assert ended(*quiet) == ("said\n", [])
    assert logged.communicate() == ("said\n", "") and logged.returncode == 0
    said, lines = ended(*shown)
    assert said == "said\n"
    shape = r"work(, \w+)?: (\d+\.\d) of 10 passes, \d\d:\d\d so far, [\d:?]+ to go"
    found = [re.fullmatch(shape, line.strip()) for line in lines]
    assert all(found), lines
    assert [m[2] for m in found if m[1] == ", first"][1:4] == ["1.0", "2.0", "3.0"]
    assert found[-1][1] == ", second" and found[-1][2] == "10.0"


def test_a_line_that_fails_lets_the_next_bar_show_itself(capsys):
    with pytest.raises(ValueError), Line("work", 2, "runs") as line, line.part("one", 1):
        raise ValueError
    assert progress.State.line is None
    assert not isinstance(progress_bar(range(2)), progress.Inside)
    say("still")
    assert capsys.readouterr().out == "still\n"


def test_every_command_takes_quiet_and_no_settings_hold_it(monkeypatch):

    monkeypatch.setattr(progress.State, "quiet", False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    settings = cli.parse(train.Settings, ["--model", "tiny", "--quiet"], presets=train.PRESETS)
    assert progress.State.quiet and not hasattr(settings, "quiet")
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
