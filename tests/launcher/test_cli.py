"""The command line as a person and as a script meet it: exit codes, streams, help, errors, completion, imports."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.cli import VERBS, main
from launcher.ending_signals import heard
from strategies.errors import ClusterError
from tests.support.cli import end, start

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "ray", "deepspeed", "numpy", "wandb", "tokenizers"}
Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Calls ``phalanx`` in this process; returns exit code, stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, invoke: Invoke) -> None:
    code, out, _ = invoke(verb, "--help")
    assert code == 0
    assert "Example" in out
    assert f"phalanx {verb}" in out.split("Example")[1]


def test_help_lists_every_verb(invoke: Invoke) -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)
    assert invoke("-h")[1] == out
    assert invoke("--version")[1].startswith("phalanx, version")


def test_unknown_verb_and_option_get_the_nearest(invoke: Invoke) -> None:
    code, out, err = invoke("sbumit")
    assert (code, out) == (2, "")
    assert "Did you mean 'submit'?" in err
    code, _, err = invoke("plan", "--jsno")
    assert code == 2
    assert "--json" in err


def test_no_words_show_the_help_as_a_usage_error(invoke: Invoke) -> None:
    code, out, _ = invoke()
    assert code == 2
    assert "Usage: phalanx" in out


def test_plan_json_is_the_only_thing_on_stdout(invoke: Invoke) -> None:
    code, out, err = invoke("plan", "--json", "experiment=quickstart")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["schema_version"] == 1
    assert document["plan"]["tp"] == 2
    assert document["violations"] == []
    assert document["parameters"] == 1_334_016
    stage = document["memory"][1]
    assert stage["total"] == stage["weights"] + stage["gradients"] + stage["optimizer"]
    assert document["deepspeed"]["zero_optimization"]["stage"] == 1


def test_infeasible_plan_is_a_document_too(invoke: Invoke) -> None:
    code, out, _ = invoke("plan", "--json", "strategy.tp=3", "strategy.stages=[1]")
    document = json.loads(out)
    assert code == 3
    assert {"rule", "message", "hint"} == set(document["violations"][0])
    assert document["memory"] is None
    code, out, _ = invoke("plan", "strategy.tp=3")
    assert code == 3
    assert "heads_divisible_by_tp" in out
    code, _, err = invoke("submit", "strategy.tp=3")
    assert code == 3
    assert "heads_divisible_by_tp" in err


def test_deepspeed_configuration_alone(invoke: Invoke) -> None:
    code, out, _ = invoke("plan", "--deepspeed", "strategy.dp=2")
    assert code == 0
    assert json.loads(out)["train_micro_batch_size_per_gpu"] == 1


def test_errors_in_both_forms(invoke: Invoke) -> None:
    code, out, err = invoke("plan", "model=gpt_tin")
    assert (code, out) == (2, "")
    assert err.startswith("error: model=gpt_tin: there is no model 'gpt_tin'.\n  next: Did you mean")
    code, out, err = invoke("plan", "--json", "model=gpt_tin")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["kind"] == "ConfigError"
    assert "gpt_tiny" in error["hint"]
    code, out, _ = invoke("plan", "--json", "--nope")
    assert json.loads(out)["error"]["exit_code"] == code == 2


def test_not_found(invoke: Invoke, tmp_path: Path) -> None:
    for verb in ("status", "logs", "cancel", "resume"):
        code, out, err = invoke(verb, "nope", "--dir", str(tmp_path))
        assert (code, out) == (5, "")
        assert "no runs in" in err
    code, out, _ = invoke("status", "nope", "--json", f"run.dir={tmp_path}")
    assert code == json.loads(out)["error"]["exit_code"] == 5


def test_run_is_required_and_only_one(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("logs", "--dir", str(tmp_path))[0] == 2
    code, _, err = invoke("status", "a", "b")
    assert code == 2
    assert "One RUN" in err
    assert invoke("status", "train.steps=3")[0] == 2


def test_detach_needs_a_cluster_that_outlives_us(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("submit", "--detach", f"run.dir={tmp_path}")
    assert code == 2
    assert "cluster=existing" in err


def test_other_errors_keep_their_codes(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*unused: Any, **more: Any) -> None:
        raise ClusterError("No cluster there.", hint="Start one.")

    monkeypatch.setattr(cli.cli, "main", unreachable)
    code, _, err = invoke("plan")
    assert code == 4
    assert err == "error: No cluster there.\n  next: Start one.\n"


def test_internal_errors_are_short_and_saved(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*unused: Any, **more: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli.cli, "main", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PHALANX_DEBUG", raising=False)
    code, out, err = invoke("plan", "--json")
    assert code == json.loads(out)["error"]["exit_code"] == 1
    assert "Internal error: ZeroDivisionError: oops" in err
    assert "Traceback" not in err
    (saved,) = tmp_path.glob("phalanx-error-*.txt")
    assert str(saved) in err
    assert "ZeroDivisionError: oops" in saved.read_text()
    monkeypatch.setenv("PHALANX_DEBUG", "1")
    assert "Traceback" in invoke("plan")[2]


def test_unwritable_parent_is_a_storage_error(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = invoke("submit", f"run.dir={tmp_path}/file/runs", "--dry-run")
    assert code == 7
    assert "run.dir" in err


def test_corpus_errors(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    where = f"run.dir={tmp_path}/runs"
    code, _, err = invoke("submit", where, "data=text", f"data.path={tmp_path}/nope", "--dry-run")
    assert code == 7
    assert "data.path" in err
    code, _, err = invoke("submit", where, "data=text", f"data.path={tmp_path}/empty", "--dry-run")
    assert code == 2
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_a_script_is_what_would_be_sent(invoke: Invoke, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "big").write_bytes(b"x" * 1000)
    (project / "train.py").write_text("print(1)\n")
    words = ["job=script", "job.command=python train.py", f"job.workdir={project}", "run.name=dry"]
    code, out, _ = invoke("submit", "--dry-run", f"run.dir={tmp_path}/runs", *words)
    document = json.loads(out)
    assert code == 0
    assert document["request"]["job"]["command"] == "python train.py"
    assert document["request"]["job"]["workdir"] == str(tmp_path / "runs" / "dry" / "user")
    assert document["ship"]["files"] == ["train.py"]
    assert not (tmp_path / "runs" / "dry").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell: str, invoke: Invoke) -> None:
    code, out, _ = invoke("completion", shell)
    assert code == 0
    assert "_PHALANX_COMPLETE" in out


def phalanx(*words: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "launcher.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "strategy.t"], {"strategy.tp="}),
        (["plan", "model=llama2"], {"model=llama2_7b", "model=llama2_13b", "model=llama2_70b"}),
        (["st"], {"status"}),
        (["status", "on"], {"one"}),
        (["resume", "on"], {"one"}),
    ],
)
def test_completion_of_words(words: list[str], expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "request.json").write_text("{}")
    typed = {"COMP_WORDS": " ".join(["phalanx", *words]), "COMP_CWORD": str(len(words))}
    done = phalanx(cwd=tmp_path, _PHALANX_COMPLETE="bash_complete", **typed)
    assert {line.partition(",")[2] for line in done.stdout.splitlines()} == expected


IMPORTS = """
import sys
sys.argv = ["phalanx", *{words!r}]
from launcher.cli import main
try:
    main()
except SystemExit as ended:
    assert ended.code == 0, ended.code
print("MODULES", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--help"], HEAVY | {"hydra", "omegaconf", "rich", "yaml"}),
        (["submit", "--help"], HEAVY | {"hydra", "omegaconf", "rich", "yaml"}),
        (["status"], HEAVY | {"hydra", "omegaconf", "rich", "yaml"}),
        (["completion", "bash"], HEAVY | {"hydra", "omegaconf", "rich", "yaml"}),
        (["plan", "experiment=quickstart"], HEAVY | {"rich"}),
        (["plan", "--json", "job=script", "job.command=x"], HEAVY | {"rich"}),
    ],
)
def test_reading_verbs_are_light(words: list[str], without: set[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", IMPORTS.format(words=words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stdout.rpartition("MODULES")[2].split())
    assert "click" in modules
    assert not modules & without


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -P -m launcher.cli plan --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "{\n0\n"
    assert done.stderr == ""


def test_an_output_that_is_full_is_a_reason_and_no_bug() -> None:
    """The interpreter itself has nothing to add when it ends."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-P", "-m", "launcher.cli", "plan", "--json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    assert done.stderr.splitlines()[0] == "error: the output cannot be written."
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_what_the_system_refuses_is_named(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", closed)
    code, out, err = invoke("status", "--json", "--dir", str(tmp_path))
    assert code == 7
    assert f"error: {tmp_path} cannot be read or written." in err
    assert json.loads(out)["error"]["why"] == "Permission denied"


def test_an_interrupted_command_says_so_in_both_forms(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*unused: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.build.outline", interrupted)
    code, out, err = invoke("plan", "--json")
    assert (code, err) == (130, "\nInterrupted.\n")
    assert json.loads(out)["error"]["kind"] == "Interrupted"


def test_folders_of_the_user_do_not_shadow_ours(tmp_path: Path) -> None:
    for name in ("jobs", "conf", "launcher", "strategies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('shadowed')\n")
    done = phalanx("plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_bad_input_of_plan_is_explained(invoke: Invoke) -> None:
    """What submit would refuse is refused by plan, and one letter of two may be wrong."""
    code, out, err = invoke("plan", 'faults=["rank_kil@rank=3,step=12"]')
    assert (code, out) == (2, "")
    assert "Did you mean 'rank_kill'?" in err
    code, out, err = invoke("plan", "strategy.tq=2")
    assert (code, out) == (2, "")
    assert "Did you mean 'tp'?" in err


def test_a_word_that_is_no_verb_of_a_group_gets_the_nearest(invoke: Invoke) -> None:
    code, _, err = invoke("checkpoint", "verfy")
    assert code == 2
    assert "Did you mean 'verify'?" in err
    assert invoke("cluster", "prob")[0] == 2


def test_a_run_that_cannot_be_made_is_refused_before_the_data_are_prepared(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    for name, said in (("demo", "A run named 'demo' exists"), ("x" * 300, "Use at most")):
        code, _, err = invoke("submit", f"run.dir={tmp_path}", f"run.name={name}")
        assert code == 2
        assert said in err
        assert "data:" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_folder_of_runs_that_does_not_exist(invoke: Invoke, tmp_path: Path) -> None:
    """A folder that was typed and is not there is a mistake; that nothing was ever run here is none."""
    code, _, err = invoke("status", "--dir", str(tmp_path / "nowhere"))
    assert code == 5
    assert "There is no folder" in err
    assert invoke("status", "--dir", str(tmp_path))[0] == 0
    assert "there is no such folder" in invoke("status", str(tmp_path / "nowhere"))[2]


def test_a_drill_of_no_fault(invoke: Invoke) -> None:
    code, _, err = invoke("drill", "--faults", "")
    assert code == 2
    assert "names no fault" in err


def test_a_drill_that_is_refused_writes_nothing(invoke: Invoke, tmp_path: Path) -> None:
    code, _, err = invoke("drill", "--faults", "node_kil", f"run.dir={tmp_path / 'runs'}")
    assert code == 2
    assert "node_kill" in err
    assert list(tmp_path.iterdir()) == []


def test_rehearsals_are_planned_as_text_and_as_a_document(invoke: Invoke) -> None:
    words = ("plan", "--rehearse", "experiment=gpt3_175b")
    code, out, _ = invoke(*words)
    assert code == 0
    assert out.startswith("rehearsal of gpt3_175b: TP2 x PP2 x DP2")
    code, out, _ = invoke(*words, "--json")
    assert code == 0
    (fault,) = json.loads(out)["rehearsal"]["faults"]
    assert fault.startswith("node_kill@node=")
    assert invoke(*words, "--why", "tp=2")[0] == 2


@pytest.mark.parametrize("verb", ["plan", "submit"])
def test_what_cannot_be_rehearsed_says_why(verb: str, invoke: Invoke, tmp_path: Path) -> None:
    words = (verb, "--rehearse", f"run.dir={tmp_path}")
    assert invoke(*words, "strategy.tp=3")[0] == 3
    code, _, err = invoke(*words, "job=script", "job.command=true")
    assert code == 2
    assert "its model is its own" in err
    code, _, err = invoke(*words, 'faults=["node_kill@node=9,step=3000"]')
    assert code == 2
    assert "there are nodes 0 to 1" in err
    assert "the run has 20 steps" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_data_are_prepared_leaves_nothing_half_made(number: signal.Signals, tmp_path: Path) -> None:
    process = start("submit", f"run.dir={tmp_path / 'runs'}", "cluster=process", cwd=tmp_path)  # stdlib takes a while
    assert process.stderr is not None
    while "data:" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    done = end(process)
    assert done.code == 130, done.err
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == []


def test_hanging_up_is_not_heard_under_nohup() -> None:
    assert {*heard()} == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert {*heard()} == {signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGHUP, before)
