"""The bars that a person sees."""

import io

from rich.console import Console

from stagewise.run.progress import progress_bars, silent


def shown(*updates):
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    with progress_bars(console) as progress:
        for update in updates:
            progress(*update)
    return console.file.getvalue().rpartition("\x1b[2K")[2]  # every drawing erases the one before


def test_every_kind_of_work_has_one_bar_with_what_is_done_of_all():
    final = shown(("sampling", 0, 6), ("sampling", 6, 6), ("retraining windows", 2, 3))
    assert "6/6" in final
    assert final.index("retraining windows") < final.index("2/3")
    assert (final.count("sampling"), final.count("retraining windows")) == (1, 1)
    assert "left" in final


def test_a_total_that_is_known_only_later_is_shown():
    assert "3/8" in shown(("sampling", 1, 2), ("sampling", 3, 8))


def test_silence_prints_nothing(capsys):
    assert silent("sampling", 1, 2) is None
    assert capsys.readouterr().out == ""
