"""What somebody does wrong in the first hour, and what is said: the key, the value, what was expected, what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY, Run

from retrace.cli import main
from retrace.core.claims import load_claims
from retrace.core.config import CONFIGS
from retrace.core.plan import load_ablation, plan
from retrace.usage import teach

Said = Callable[..., tuple[int, str, str]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Said]:
    """The command line within this process: (exit code, stdout, stderr). A process for each would take minutes."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main changes it, and the umask
    before = os.umask(0o077)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["retrace", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    yield call
    os.umask(before)


CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and newline


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "retrace run: missing argument 'TARGET|KEY=VALUE'; see `retrace run --help`"),
        ("hardware=cpu", "no target given: name a paper (deepscalelm, mm1, quietstar) or paper/ablation"),
        ("quietstar scale smoke", "scale: a key without a value; write scale=VALUE, without spaces around ="),
        ("quietstar scale = smoke", "scale: a key without a value"),
        ("quietstar =3", "=3: no key before =; write key=value"),
        ("quietstar --scale smoke", "no such option: --scale; a key of the config is written scale=VALUE, without da"),
        ("quietstar/thoughts --seed 1", "a key of the config is written seed=VALUE"),
        ("Quietstar", "Quietstar: no such paper; did you mean 'quietstar'?"),
        ("thoughts", "thoughts: no such paper; did you mean 'quietstar/thoughts'?"),
        ("quietstar connector", "connector: no such paper; did you mean 'mm1/connector'?"),
        ("configs/quietstar/ablations/thoughts.yaml", "no such paper; the papers are: deepscalelm, mm1, quietstar"),
        ("quietstar//none", "quietstar//none: expected paper, paper/ablation or paper/ablation/arm"),
        ("quietstar/thoughts/none/s0", "the label of a run; as a target it is quietstar/thoughts/none seed=0"),
        ("quietstar/thoughts/none/s0/x", "expected paper, paper/ablation or paper/ablation/arm"),
        ("quietstar/zzzzzz", "quietstar/zzzzzz: no such ablation; the ablations are: main, c4, "),
        ("quietstar/thoughts/zzzzzz", "quietstar/thoughts/zzzzzz: no such arm; the arms are: none, thoughts"),
        ("quietstar/thoughts foo=1", "foo=1: no such key; the keys are: hardware, tracking, seed, thoughts, "),
        ("quietstar/thoughts eval.qqqqqqqq=1", "eval.qqqqqqqq=1: no such key; the keys are: eval.tasks, eval.limit, "),
        ("quietstar/thoughts thoughts=2", "thoughts=2: expected keys with values; set one of them"),
        ("quietstar/thoughts eval.tasks=gsm8k", "eval.tasks='gsm8k': expected a list, as in [a,b] or [a]"),
        ("quietstar/thoughts seed=0,", "is not an override: mismatched input end; write key=value"),
        ("deepscalelm/trainability method.name=zz", "method='zz': no such method; the methods are: "),
        ("quietstar hardware=laptop", "hardware=laptop: no such hardware for quietstar; there are: cpu, gpu1, "),
        (
            "quietstar tracking.wandb=true",
            "tracking.wandb=True: input should be 'auto', ",
        ),
    ],
)
def test_a_wrong_command_is_one_sentence_and_starts_nothing(words: str, expected: str, said: Said) -> None:
    code, out, error = said("run", *words.split())
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert len(error) < 600, "a screenful is no sentence"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["lsit"], "retrace: no such command 'lsit'. Did you mean 'list'?"),
        (["--verison"], "retrace: no such option: --verison"),
        (
            ["doctor", "please"],
            "retrace doctor: got unexpected extra argument(s) (please); see `retrace doctor --help`",
        ),
        (
            ["report", "scale=gpu"],
            "scale=gpu: `report` takes papers and --scale, as in retrace report quietstar --scale",
        ),
        (["report", "quietstar/thoughts"], "quietstar/thoughts: `report` takes papers and --scale"),
        (["report", "mm1", "--scale", "huge"], "--scale huge: mm1 has no such scale; there are: smoke, laptop"),
        (["status", "--every", "0"], "retrace status: invalid value for '--every'"),
        (["list", "mm2"], "mm2: no such paper; did you mean 'mm1'?"),
        (["cancel"], "retrace cancel: missing argument 'RUN|TARGET|KEY=VALUE'; see `retrace cancel --help`"),
    ],
)
def test_every_command_says_what_is_wrong_in_one_sentence(command: list[str], expected: str, said: Said) -> None:
    code, out, error = said(*command)
    assert (code, out) == (2, "")
    assert f"error: {expected}" in error
    assert error.count("\n") == 1


ABLATION = "question: Q\nlocus: ours\nbase: quietstar/main\nseeds: [0, 1, 2]\nbaseline: one\narms:\n  one: []\n"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (ABLATION, "", "odd.yaml: expected keys and values, found nothing"),
        ("one: []", "one: [a=1", "odd.yaml, line 8: not readable as YAML: .*expected ',' or ']'"),
        ("  one: []", "\tone: []", "odd.yaml, line 7: not readable as YAML: .* indent with spaces, not with a tab"),
        ("Q\n", "Is it: so\n", 'odd.yaml, line 1: not readable as YAML: .* put a text that holds ": " in quotes'),
        ("one: []", "one: a=1", "odd.yaml: arms.one='a=1': expected a list, as in"),
        ("one: []", "one: [{a: 1}]", "odd.yaml: arms.one.0: expected text"),
        ("[0, 1, 2]", "3", "odd.yaml: seeds=3: expected a list, as in"),
        ("[0, 1, 2]", "[]", r"odd.yaml: seeds=\[\]: expected one or more"),
        ("seeds", "seed", "odd.yaml: no value for seeds; seed: no such key; did you mean 'seeds'?"),
        ("baseline: one", "baseline: two", "odd.yaml: baseline 'two' is not an arm; the arms are: one"),
        ("quietstar/main", "quietstar", r"odd.yaml: base='quietstar': expected the form .* \(a regular expression\)"),
        ("seeds", "scales: [tiny]\nseeds", "odd.yaml: scales.0='tiny': input should be 'smoke', .* or 'paper'$"),
    ],
)
def test_a_wrong_ablation_is_one_sentence(old: str, new: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(ABLATION)
    load_ablation(path)
    path.write_text(ABLATION.replace(old, new))
    with pytest.raises(ValueError, match=expected) as caught:
        load_ablation(path)
    assert "\n" not in str(caught.value)


CLAIM = (
    "- id: c\n  says: s\n  locus: ours\n  ablation: a\n  metric: m\n  compare: [x, y]\n  expect: {direction: up}\n"
    "  testable_at: [laptop]\n"
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("a\n", "b\n", "claim c: ablation='b': no such ablation; there are: a"),
        ("[x, y]", "[x, z]", "claim c: arm 'z' is not in ablation a; its arms are: x, y"),
        ("[x, y]", "[x]", "claim c: no value for compare.1"),
        ("[x, y]", "x", "claim c: compare='x': expected a list"),
        ("up", "higher", "claim c: expect.direction='higher': input should be 'up', 'down' or 'none'"),
        ("{direction: up}", "up", "claim c: expect='up': expected keys with values"),
        ("  testable_at: [laptop]\n", "", "claim c: no value for testable_at"),
        ("[laptop]", "laptop", "claim c: testable_at='laptop': expected a list"),
        ("id: c", "id: My claim", "claim My claim: id='My claim': expected the form"),
        ("- id", "  id", "expected a list of claims, each beginning with '- id: ...'"),
    ],
)
def test_a_wrong_claim_is_one_sentence(old: str, new: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(CLAIM)
    load_claims(path, arms={"a": ["x", "y"]})
    path.write_text(CLAIM.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load_claims(path, arms={"a": ["x", "y"]})
    assert "\n" not in str(caught.value)


def test_a_scale_without_its_first_line_is_told_so(retrace: Run, tmp_path: Path) -> None:
    """A paper's first scale is written by hand, and Hydra puts it under `scale` where the line is forgotten."""
    subprocess.run(["cp", "-r", str(CONFIGS), str(tmp_path / "configs")], check=True)
    (tmp_path / "configs" / "mm1" / "scale" / "smoke.yaml").write_text("scale: smoke\n")
    done = retrace("plan", "mm1", "scale=smoke", RETRACE_CONFIGS=str(tmp_path / "configs"))
    assert done.returncode == 2
    assert "a file of scale/ begins with the line '# @package _global_' and has a line" in done.stderr


@pytest.mark.parametrize(
    "command", ["", "list", "plan", "run", "status", "cancel", "report", "publish", "dashboard", "doctor"]
)
def test_help_teaches_by_examples_that_work(command: str, said: Said) -> None:
    code, shown, _ = said(*command.split(), "--help")
    assert code == 0
    assert "Examples" in shown
    assert "Exit codes: 0" in shown
    for line in teach(command).splitlines():
        example = line.partition("#")[0].strip()
        if example.startswith("retrace "):
            assert example in shown
            asked = re.findall(r'"[^"]*"|\S+', example.removeprefix("retrace "))
            if asked[0] in ("plan", "run"):
                targets = [word for word in asked[1:] if "=" not in word]
                overrides = [word.strip('"') for word in asked[1:] if "=" in word]
                assert plan(targets, overrides if "seed=" in example else [*overrides, "seed=0"])


@pytest.mark.parametrize(
    "command", [["list"], ["doctor"], ["plan", "quietstar/thoughts"], ["--help"], ["run", "--help"]]
)
def test_a_pipe_gets_plain_lines(command: list[str], retrace: Run) -> None:
    done = retrace(*command)
    assert done.returncode == 0
    assert not CONTROL.search(done.stdout + done.stderr)


def test_a_sweep_into_a_pipe_is_plain_lines_with_an_eta(retrace: Run) -> None:
    done = retrace("run", "deepscalelm/moments_pre/vanilla_12", *TINY, "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
    assert "sweep ETA" in done.stdout


@pytest.mark.parametrize("command", ["list", "run deepscalelm/moments_pre/vanilla_12 scale=smoke tracking.wandb=off"])
def test_a_reader_that_goes_away_ends_a_command_quietly(command: str, home: Path) -> None:
    script = f'"{sys.executable}" -m retrace.cli {command} | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "RETRACE_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "141", done.stdout


def test_no_color_is_heeded_on_a_terminal(home: Path) -> None:
    script = f"script -qec '\"{sys.executable}\" -m retrace.cli list mm2' /dev/null"
    for more, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        environment = {**os.environ, "RETRACE_HOME": str(home), "TERM": "xterm", **more}
        environment = {k: v for k, v in environment.items() if k != "NO_COLOR" or more}
        shown = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stdout
        assert ("\x1b[3" in shown) == coloured


def test_doctor_says_how_to_get_what_is_missing(retrace: Run, tmp_path: Path) -> None:
    done = retrace("doctor", RETRACE_DATA=str(tmp_path / "nowhere"), PATH="/nowhere", WANDB_MODE="")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    for what, remedy in {
        "missing local datasets: RETRACE_DATA=": "unset RETRACE_DATA",
        "none    Chromium": "apt-get install chromium",
        "none    NVIDIA GPU": "not needed for scale=smoke and scale=laptop",
        "none    Slurm": "login node",
        "none    git: no commit known": "install git",
        "none    W&B: offline": "WANDB_API_KEY",
    }.items():
        place = next(number for number, line in enumerate(lines) if line.startswith(what))
        assert remedy in lines[place + 1]
    assert "missing; 'none' is something that only some commands need" in lines[-1]


def test_doctor_is_content_with_a_machine_that_has_what_is_needed(retrace: Run) -> None:
    done = retrace("doctor", RETRACE_DATA="")
    assert done.returncode == 0, done.stdout
    assert "scale=laptop: data and models are at hand" in done.stdout
    assert "all that is needed is there; try: retrace run " in done.stdout


def test_doctor_names_a_folder_that_cannot_be_written_and_goes_on(retrace: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = retrace("doctor", RETRACE_HOME=str(tmp_path / "file" / "home"))
    assert done.returncode == 1
    assert "set RETRACE_HOME to a folder of yours" in done.stdout
    assert "hardware=cpu" in done.stdout
