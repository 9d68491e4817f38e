"""Runs that are killed by the system and resumed: the small edition of `python -m benchmarks.kill`."""

import pytest

from benchmarks import disturbed, kill


@pytest.mark.slow
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """One while a checkpoint is written, one while an old one is removed, one anywhere; two models in turn."""
    rows = kill.run(3, tmp_path, seed=1)
    assert [row["equal"] for row in rows] == [True] * 3
    assert rows[0]["moment"].startswith("writing a checkpoint")
    assert rows[1]["moment"] == "removing an old checkpoint"


def test_the_table_says_what_was_not_equal():
    row = {"model": "LLaVA", "step": 4, "moment": "between steps", "from": 0, "equal": False}
    assert kill.table([row, row | {"from": 2, "equal": True}]).splitlines()[2:] == [
        "| 1 | LLaVA | 4 | between steps | the start | no |",
        "| 2 | LLaVA | 4 | between steps | step 2 | yes |",
    ]


def test_a_table_takes_the_place_of_the_one_below_its_heading_alone(tmp_path, monkeypatch):
    document = tmp_path / "faults.md"
    document.write_text("# Title\n\n## One\n\ntext\n\n| a |\n| 1 |\n\n## Two\n\n| b |\n| 2 |\n\nend\n")
    monkeypatch.setattr(disturbed, "DOCUMENT", document)
    disturbed.put_table("One", "| new |\n")
    assert document.read_text() == "# Title\n\n## One\n\ntext\n\n| new |\n\n## Two\n\n| b |\n| 2 |\n\nend\n"
    assert disturbed.table_rows("Two") == {"b |": "| b |", "2 |": "| 2 |"}
