"""``nanobeam analyze`` says in a line what became of each run, and by its exit code of all."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nanobeam_bluesky.cli import app


@pytest.fixture
def nanobeam():
    """Run a command: exit code, and the lines of its output and errors."""

    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "300"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output.splitlines()

    return run


def test_a_folder_is_analysed_once(nanobeam, stored, tmp_path):
    everything = ("analyze", "--catalog", stored.folder, "--to", tmp_path / "results")
    uid = stored.uids["file"][:8]

    code, lines = nanobeam(*everything, "--dry-run", "--where", "sample=film")
    (line,) = (line for line in lines if uid in line)
    assert (code, "pending 42 points, universal, refined, about" in line) == (0, True)

    code, lines = nanobeam(*everything, "--plan-name", "sxdm_fly", "--since", "2026")
    assert code == 0
    (line,) = (line for line in lines if uid in line)
    assert "success → " in line
    assert "42 points" in line
    assert lines[-1] == "2 runs: 2 success"

    code, lines = nanobeam(*everything)
    assert code == 0
    assert lines[-1] in ("3 runs: 2 done, 1 ignored", "3 runs: 1 ignored, 2 done")


def test_one_bad_run_fails_the_command_and_no_other_run(nanobeam, stored, tmp_path):
    code, lines = nanobeam(
        "analyze", stored.uids["count"], "nothing-like-it", stored.uids["embedded"][:8],
        "--catalog", stored.folder, "--to", tmp_path, "--workers", 1, "--method", "network",
    )  # fmt: skip
    text = "\n".join(lines)
    assert code == 1
    assert "no runs whose uid begins with nothing-like-it" in text
    assert "no preset matches" in text
    assert "success → " in text
    assert lines[-1] == "3 runs: 2 fail, 1 success"


def test_methods_are_compared(nanobeam, stored, tmp_path):
    code, lines = nanobeam(
        "analyze", stored.uids["file"], "--catalog", stored.folder, "--to", tmp_path / "results",
        "--method", "refine,network", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    (title,) = (line for line in lines if " against " in line)
    assert "network" in title.partition(" against ")[0]
    (strain,) = (line for line in lines if "strain" in line)
    assert "│ 38 " in strain  # of 42: the network alone flags the strains beyond its range
    (figure,) = tmp_path.glob("*.png")
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_documents_of_a_file_are_analysed(nanobeam, stored, tmp_path):
    lines = (
        json.dumps({"name": n, "doc": d}, default=lambda v: v.tolist()) for n, d in stored.documents
    )
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    code, lines = nanobeam("analyze", tmp_path / "runs.jsonl", "--to", tmp_path / "results")
    assert code == 1  # the count was named, as one of the file's
    assert lines[-1] == "3 runs: 2 success, 1 fail"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say with --catalog"),
        (("x", "--uid", "y", "--catalog", "{folder}"), "not both"),
        (("--catalog", "no-such-profile"), "expected a folder with a catalogue"),
        (("--catalog", "http://127.0.0.1:9/?api_key=secret"), "ConnectError"),
        (("--catalog", "{folder}", "--since", "whenever"), "expected a time such as"),
        (("--catalog", "{folder}", "--where", "sample"), "expected KEY=VALUE"),
        (("--catalog", "{folder}", "--method", "guess"), "must be one of"),
        (("--catalog", "{folder}", "--preset", "none-such"), "none-such"),
        (("{folder}/catalog.db",), "say with --to"),
    ],
)
def test_wrong_usage_is_said_in_a_line(nanobeam, stored, arguments, words, monkeypatch):
    monkeypatch.setattr("tiled.client.utils.TILED_RETRY_ATTEMPTS", 2)  # of 10, which take 25 s
    code, lines = nanobeam("analyze", *(a.format(folder=stored.folder) for a in arguments))
    text = "\n".join(lines)
    assert code == 2
    assert words in text
    assert "secret" not in text
    assert "Traceback" not in text


def test_the_example_plots_every_scan(stored, tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[2] / "examples" / "retrospective.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example), str(stored.folder)])
    runpy.run_path(str(example), run_name="__main__")
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert capsys.readouterr().out.count(" done ") == 2


def test_what_matches_nothing_is_said(nanobeam, stored):
    code, lines = nanobeam("analyze", "--catalog", stored.folder, "--plan-name", "none")
    assert (code, lines[-1]) == (1, "no run matches")
