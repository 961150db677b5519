"""Signs of life of long work."""
import io

import common.progress as progress
from common.progress import Bar


def test_a_line_at_least_every_half_minute_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    seen = []
    for part in Bar("ranking", 100, " parts").over(range(100)):
        seen.append(part)
        now[0] += 7
    assert seen == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ranking: 5 of 100 parts, 35 s"
    assert len(lines) == 20    # in 700 seconds


def test_quick_work_prints_nothing_and_unknown_totals_are_left_out(monkeypatch, capsys):
    for _ in Bar("quick", 1000).over(range(1000)):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(progress, "EVERY", 0)
    Bar("fetching", None, " bytes", start=5).update(3)
    assert capsys.readouterr().out.startswith("fetching: 8 bytes, 0 s")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_it_is_a_bar(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "EVERY", 0)
    assert list(Bar("ranking", 3).over("abc")) == ["a", "b", "c"]
    assert "ranking" in terminal.getvalue() and capsys.readouterr().out == ""
