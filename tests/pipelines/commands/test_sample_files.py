"""`ldm sample`: what prompts files say, where pictures go, and what is shown meanwhile."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from sampled import facts_of, ldm_sample, pixels_of, sampled, write_models

from pipelines.commands.sample import run
from pipelines.commands.sample.request import Request
from pipelines.commands.sample.writing import check_places, write
from pipelines.errors import EXIT_USAGE, Interrupted
from pipelines.terminal.live import TerminalReport

STEPS = ["--steps", 2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


# -- prompts files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", '\ufeffprompt,negative_prompt,seed\na,,\n"b, c",d,5\n'),
        ("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": "b, c", "negative_prompt": "d", "seed": 5}\n'),
    ],
)
def test_a_row_of_a_prompts_file_wins_over_the_options(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows = ["--prompts-file", tmp_path / name, "--count", 2, "--seed", 70, *STEPS]
    made, told = sampled(capsys, tmp_path / "rows", *rows)
    facts = [facts_of(file) for file in made]
    keys = ("prompt", "negative_prompt", "seed")
    expected = [("a", None, "70"), ("a", None, "71"), ("b, c", "d", "5"), ("b, c", "d", "6")]
    assert [tuple(each.get(key) for key in keys) for each in facts] == expected
    assert ("empty lines are skipped, 1 of 3" in told) == (name == "rows.jsonl")

    made, _ = sampled(capsys, tmp_path / "options", *rows, "--negative-prompt", "of all")
    assert [facts_of(file)["negative_prompt"] for file in made] == ["of all", "of all", "d", "d"]


def test_a_row_without_a_negative_prompt_goes_away_from_no_words_beside_one_that_has_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SDXL's empty condition is zeros, and not the empty prompt."""
    monkeypatch.chdir(models)
    (tmp_path / "rows.csv").write_text("prompt,negative_prompt\na,\na,b\n")
    mixed, _ = sampled(capsys, tmp_path / "mixed", "--prompts-file", tmp_path / "rows.csv", *STEPS, model="xl")
    alone, _ = sampled(capsys, tmp_path / "alone", "--prompt", "a", *STEPS, model="xl")
    empty, _ = sampled(capsys, tmp_path / "empty", "--prompt", "a", "--negative-prompt", "", *STEPS, model="xl")
    assert np.array_equal(pixels_of(mixed[0]), pixels_of(alone[0]))
    assert not np.array_equal(pixels_of(empty[0]), pixels_of(alone[0]))


def test_a_text_file_has_a_prompt_a_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "prompts.txt").write_text("  a, with commas \r\n\nb\n", newline="")
    made, told = sampled(capsys, tmp_path / "made", "--prompts-file", tmp_path / "prompts.txt", *STEPS)
    assert [facts_of(file)["prompt"] for file in made] == ["a, with commas", "b"]
    assert "prompts.txt: empty lines are skipped, 1 of 3" in told


# -- where pictures go -------------------------------------------------------------------------------------------------


def test_pictures_are_replaced_only_when_that_is_asked_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    made, _ = sampled(capsys, tmp_path / "out", "--prompt", "a", *STEPS, "--grid", tmp_path / "out/grid.png")
    before = {file: file.read_bytes() for file in made}
    again = ["text", "--prompt", "a", "--seed", 1, *STEPS, "--out", tmp_path / "out"]
    code, _, err = ldm_sample(capsys, *again)
    assert code == EXIT_USAGE
    assert "00000.png is there already: give another place, or --overwrite" in err
    assert {file: file.read_bytes() for file in made} == before
    code, _, err = ldm_sample(capsys, *again, "--overwrite")
    assert code == 0, err
    assert facts_of(made[0])["seed"] == "1"
    assert sorted((tmp_path / "out").iterdir()) == sorted(made)


def test_pictures_are_written_as_they_are_made_and_lines_say_how_far_it_is(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(models)
    prompts = ["--prompt", "a", "--count", 3, "--batch-size", 2, *STEPS]
    _, told = sampled(capsys, tmp_path / "out", *prompts)
    lines = told.splitlines()
    assert lines[1:3] == ["loading text", "sample: started"]
    assert any(line.startswith("sample: 4/4 steps  100%") for line in lines)
    assert lines[-1] == "sample: 3/3 pictures"

    (tmp_path / "late").mkdir()
    sizes = sampled_until(tmp_path / "late", capsys, *prompts)
    assert sizes == ["00000.png", "00001.png"]


def sampled_until(out: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What is there when the third picture finds its place taken by another."""
    taken = out / "00002.png"
    with pytest.MonkeyPatch.context() as patch:

        def check_then_take(request: Request, count: int) -> None:
            check_places(request, count)
            taken.write_bytes(b"another's")

        patch.setattr(run, "check_places", check_then_take)
        code, _, err = ldm_sample(capsys, "text", *arguments, "--out", out)
    assert code == EXIT_USAGE
    assert "00002.png has been written by another meanwhile" in err
    assert taken.read_bytes() == b"another's"
    return sorted(file.name for file in out.iterdir() if file != taken)


def test_stopped_it_says_how_many_pictures_there_are(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(image: torch.Tensor, file: Path, facts: dict[str, object], *, overwrite: bool) -> None:
        if file.name == "00001.png":
            raise KeyboardInterrupt
        write(image, file, facts, overwrite=overwrite)

    monkeypatch.setattr(run, "write", stopped)
    request = Request(str(models / "text"), tmp_path / "out", prompts=["a"], count=3, steps=2)
    with pytest.raises(Interrupted, match="interrupted; 1 of 3 pictures are in"):
        run.sample(request, TerminalReport(StringIO(), watch=False))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["00000.png"]


def test_on_a_terminal_a_bar_shows_steps_and_pictures(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    run.sample(Request(str(models / "text"), tmp_path / "out", prompts=["a"], steps=2), TerminalReport(stream))
    assert "\x1b[" in stream.getvalue()
    assert "2/2 steps" in stream.getvalue()
    assert "sample: 1/1 pictures" not in stream.getvalue()  # a line of plain output
