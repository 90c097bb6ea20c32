"""The command line: its verbs and options are frozen, its exit statuses a contract."""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as some

import quadriga
from quadriga import cli, console
from quadriga.arguments import parse_budget, parse_families, parse_limits
from quadriga.console import Progress, describe
from quadriga.core import cuda
from quadriga.core.errors import BadInput, Diverged, NotApplicable
from quadriga.core.quiet import quiet
from quadriga.doctor import examine
from quadriga.report.schema import empty_result

FROZEN = {
    "run": {"--floor", "--minimize", "--limit", "--budget", "--out", "--only", "--families", "--seed", "--json"}
    | {"--engine", "--address", "--target", "--live", "--gpus", "--ranks"},
    "train": {"--recipe", "--out", "--track", "--nproc", "--restarts", "--seed", "--json"},
    "profile": {"--batch", "--lr", "--out", "--seed", "--json"},
    "compare": {"--workload", "--batch", "--out", "--seed", "--json"},
    "verify": {"--json"},
    "report": {"--json"},
    "fetch": {"--json"},
    "methods": {"--json"},
    "doctor": {"--json"},
}
LAYER = {"layer": "fc", "kind": "Linear", "seconds": 0.5, "share": 0.25, "parameters": 9, "flops": 100, "bytes": 40}
PROFILE = {
    "workload": "w", "batch": 2, "seconds": 2.0, "threads": 1, "ceilings": {"flops": 1e3, "bytes": 1e3}, "bounds": [],
    "layers": [LAYER, {**LAYER, "layer": "(between layers)", "seconds": 1.5, "share": 0.75, "flops": 0, "bytes": 0}],
}  # fmt: skip
CARD = {"name": "openvino", "family": "hardware", "numerics": "close", "source": "a page", "about": "x", "fields": {}}


def call(*words: str) -> int:
    """The exit status of `quadriga WORDS`."""
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return int(end.value.code or 0)


@pytest.fixture
def fake(monkeypatch):
    """Stand-ins for the modules behind the verbs; the study's `run` may be replaced."""
    importlib.import_module("quadriga.engine.opening")  # the real one, before what it imports is replaced
    calls: list[dict] = []

    def run(workload, **given):
        calls.append({"workload": workload, **given})
        return {**empty_result("verified", "w"), "status": "infeasible"}

    weights = SimpleNamespace(fetch=lambda name, say: {"name": name, "bytes": 5}, present=lambda: {"some_task": False})
    parts = {
        "study": SimpleNamespace(
            run=run,
            train=lambda w, track=None, **_: {"quality": 1.0} | ({"track": track} if track else {}),
            compare=lambda a, b, **_: {"verdict": "faster"},
            profile=lambda w, out=None, **_: {**PROFILE, **({"report": "profile.html"} if out else {})},
            learning_rates=lambda w, **_: {"series": [{"rate": float(k)} for k in range(40)]},
        ),
        "workloads": SimpleNamespace(load=lambda name: f"<{name}>", fetch=weights),
        "methods": SimpleNamespace(cards=lambda: [CARD]),
        "artifact": SimpleNamespace(verify=lambda path: {"ok": str(path) == "good"}),
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, f"quadriga.{name}", part)
        monkeypatch.setattr(quadriga, name, part, raising=False)
    return SimpleNamespace(calls=calls, **parts)


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_line_is_frozen(capsys):
    """A new verb or option is a decision: it is made here, not by a method."""
    assert call("--help") == 0
    verbs = re.findall(r"^│ (\w+) ", capsys.readouterr().out, re.M)
    assert sorted(verbs) == sorted(FROZEN)
    for verb, options in FROZEN.items():
        assert call(verb, "--help") == 0
        assert set(re.findall(r"(?<=[ │])--[a-z][a-z-]*(?=[ │\n])", capsys.readouterr().out)) - {"--help"} == options, verb


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["--version"], ["run", "w", "--budget", "never"]])
def test_nothing_heavy_is_imported_before_a_verb_runs(words):
    code = (
        "import sys\nfrom quadriga.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'optuna', 'numpy', 'scipy', 'jinja2'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_import_of_the_package_is_light_and_its_names_are_there():
    code = "import sys, quadriga; quadriga.Recipe, quadriga.step; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert set(quadriga.__all__) <= set(dir(quadriga))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quadriga.nothing


def test_run_hands_over_what_was_typed(fake, tmp_path):
    words = ["run", "lenet", "--floor", "-0.5pt", "--limit", "bytes=0.2", "--limit", "parameters=0.5", "--minimize", "bytes"]
    assert call(*words, "--budget", "1m30s", "--only", "structure,hardware", "--out", str(tmp_path), "--seed", "3") == 1
    given = fake.calls[0]
    assert given["workload"] == "<lenet>" and given["floor"] == "-0.5pt" and given["budget"] == 90.0 and given["seed"] == 3
    assert given["limits"] == {"bytes": 0.2, "parameters": 0.5} and given["families"] == ("structure", "hardware")
    assert given["minimize"] == "bytes" and given["out"] == tmp_path


def test_the_recorded_command_says_the_same_again(fake):
    call("run", "my model.py:f", "--floor=-1%rel", "--limit", "bytes=0.2", "--budget", "90s", "--only", "training")
    import shlex

    call(*shlex.split(fake.calls[0]["command"])[1:])
    assert fake.calls[0] == {**fake.calls[1], "progress": fake.calls[0]["progress"]}


@pytest.mark.parametrize(
    ("status", "artifact", "code"),
    [
        ("verified", "artifact", 0),
        ("verified", None, 1),
        ("infeasible", "artifact", 1),
        ("unmeasured", "artifact", 1),
        ("failed", None, 1),
        ("interrupted", None, 130),
    ],
)
def test_status_decides_the_exit_status(fake, capsys, status, artifact, code):
    result = {**empty_result(status, "w"), "artifact": artifact, "report": "report.html", "seconds": float("nan")}
    fake.study.run = lambda workload, **_: result
    assert call("run", "w", "--json") == code
    assert last_json(capsys) == {**result, "seconds": None}
    assert call("run", "w") == code
    assert "out/report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (BadInput("the split is empty", "give examples"), 2, "the split is empty; give examples"),
        (NotApplicable("openvino is missing", "pip install it"), 2, "openvino is missing; pip install it"),
        (Diverged(7, 0.5, float("nan")), 1, "the loss was nan at step 7"),
        (KeyboardInterrupt(), 130, "resume with the same command: quadriga run w --json"),
        (RuntimeError("oops"), 1, "an error inside Quadriga: RuntimeError: oops"),
    ],
)
def test_errors_are_a_message_a_status_and_an_object(fake, capsys, error, code, message):
    def run(workload, **_):
        raise error

    fake.study.run = run
    assert call("run", "w", "--json") == code
    out, err = capsys.readouterr()
    assert message in err.replace("\n", " ") and ("Traceback" in err) == isinstance(error, RuntimeError)
    said = json.loads(out.splitlines()[-1])
    assert (
        said["status"] == ("interrupted" if code == 130 else "failed") and said["winner"] is None and said["error"]["message"]
    )


def test_debug_shows_the_trace_of_bad_input(fake, capsys, monkeypatch):
    monkeypatch.setenv("QUADRIGA_DEBUG", "1")
    assert call("run", "w", "--budget", "0s") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["rnu"], "run"),
        (["run"], "WORKLOAD"),
        (["run", "w", "--minimise", "bytes"], "--minimize"),
        (["run", "w", "--minimize", "size"], "latency"),
        (["run", "w", "--seed", "x"], "--seed"),
        (["run", "w", "--budget", "soon"], "90s"),
        (["run", "w", "--limit", "byte=0.2"], '"bytes"'),
        (["run", "w", "--limit", "bytes=-1"], "bytes=0.2"),
        (["run", "w", "--only", "hardwear"], '"hardware"'),
        (["report", "/no/such/folder"], "records.json does not exist"),
        (["train", "w", "--recipe", "/no/such.toml"], "no recipe file"),
    ],
)
def test_bad_words_are_status_2_with_the_remedy(fake, capsys, words, names):
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert names in err and "Traceback" not in err and not out
    assert not fake.calls


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_130_and_says_how_to_go_on(number):
    code = (
        "import sys, types, time, quadriga, quadriga.engine.opening\n"
        "def run(*a, **k):\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "for n, p in {'study': types.SimpleNamespace(run=run), 'workloads': types.SimpleNamespace(load=str)}.items():\n"
        "    sys.modules['quadriga.' + n] = p; setattr(quadriga, n, p)\n"
        "from quadriga.cli import main\nmain(['run', 'w', '--json'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["status"] == "interrupted" and "resume with the same command" in err


def test_report_writes_again_what_the_records_say(tmp_path, records, capsys):
    (tmp_path / "records.json").write_text(json.dumps(records))
    assert call("report", str(tmp_path), "--json") == 0
    assert len(last_json(capsys)["written"]) == 4 and (tmp_path / "report.html").stat().st_size > 10_000


def test_other_verbs_show_what_they_found(fake, capsys):
    assert call("verify", "good", "--json") == 0 and last_json(capsys) == {"ok": True}
    assert call("verify", "bad") == 1
    assert call("compare", "a", "b", "--batch", "1", "--batch", "64", "--json") == 0 and last_json(capsys) == {
        "verdict": "faster"
    }
    assert call("train", "w", "--json") == 0 and last_json(capsys) == {"quality": 1.0}
    assert call("fetch", "some", "--json") == 0 and last_json(capsys) == {"name": "some", "bytes": 5}
    assert call("methods", "--json") == 0 and last_json(capsys) == [CARD]
    assert call("methods") == 0 and "openvino" in capsys.readouterr().out


def test_doctor_names_what_a_missing_runtime_removes(fake, monkeypatch):
    def probe():
        good = SimpleNamespace(ok=True, version="2.13", reason="", remedy="")
        return {"eager": good, "openvino": SimpleNamespace(ok=False, version="", reason="not installed", remedy="")}

    monkeypatch.setitem(sys.modules, "quadriga.runtime", SimpleNamespace(probe=probe))
    gpu = {"name": "A GPU", "capability": "8.0", "memory": 10**9, "bf16": True, "fp16": True, "tf32": True}
    monkeypatch.setattr(cuda, "found", lambda: cuda.Found((gpu,)))
    found = examine()
    assert found["ok"] and found["removed"] == [{"runtime": "openvino", "methods": "openvino"}]
    line = next(c for c in found["checks"] if c["check"] == "runtime openvino")
    assert line["detail"] == "not installed" and "quadriga[openvino]" in line["remedy"]
    line = next(c for c in found["checks"] if c["check"] == "weights some_task")
    assert not line["ok"] and not line["needed"] and line["remedy"] == "quadriga fetch some_task"


@given(some.integers(0, 99), some.integers(0, 99), some.integers(1, 99))
def test_a_budget_is_the_sum_of_its_parts(hours, minutes, seconds):
    assert parse_budget(f"{hours}h{minutes}m{seconds}s") == hours * 3600 + minutes * 60 + seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5s", "5 s", "s", "m5", "5d", "1s1m", "nan", "inf", "1e400"])
def test_other_budgets_are_refused(text):
    with pytest.raises(BadInput, match="budget"):
        parse_budget(text)


def test_empty_lists_of_families_and_repeated_limits():
    with pytest.raises(BadInput, match="no family"):
        parse_families(" , ")
    assert parse_families("training,training") == ("training",) and parse_families(None) is None
    assert parse_limits(["bytes=.5", "bytes=.25"]) == {"bytes": 0.25}


def test_progress_off_a_terminal_is_a_plain_line_every_few_seconds(capsys):
    now = [0.0]
    with Progress(terminal=False, clock=lambda: now[0]) as progress:
        for second in range(12):
            now[0] = float(second)
            progress({"stage": "search", "done": second, "text": "[red]x[/red]\nnext"})
        progress({"stage": "verify", "text": "last"})
    out, err = capsys.readouterr()
    assert not out and [line.split(" ·")[0] for line in err.splitlines()] == [
        "[search] trial 0", "[search] trial 5", "[search] trial 10", "[verify] last"
    ]  # fmt: skip
    assert "[red]x[/red] next" in err


@pytest.fixture
def quiet_phase(capsys):
    """Progress without a thread under a clock of the test's, and the lines that a second brings."""
    now = [0.0]
    made: list[Progress] = []  # in the test, not here: it keeps the stderr that it finds

    def after(second, event=None):
        progress = made[0] if made else Progress(terminal=False, clock=lambda: now[0], look=None)
        made[:] = [progress]
        now[0] = float(second)
        if event:
            progress(event)
        progress.beat()
        return capsys.readouterr().err.splitlines()

    return after


def test_a_phase_that_says_nothing_is_shown_every_five_seconds_with_its_length(quiet_phase):
    assert quiet_phase(0, {"stage": "load", "text": "reading", "limit": 90, "left": 60}) == [
        "[load] reading · at most 1 min 30 s · 1 min left"
    ]
    assert quiet_phase(4) == []
    assert quiet_phase(5) == ["[load] reading · for 5 s, at most 1 min 30 s · 55 s left"]
    assert quiet_phase(9) == []
    assert quiet_phase(11) == ["[load] reading · for 11 s, at most 1 min 30 s · 49 s left"]


def test_what_was_held_back_for_being_too_soon_is_shown_later_and_what_has_to_be_seen_at_once(quiet_phase):
    assert quiet_phase(0, {"stage": "train", "text": "10%"}) == ["[train] 10%"]
    assert quiet_phase(1, {"stage": "train", "text": "20%"}) == []
    assert quiet_phase(2, {"stage": "train", "text": "note: little data", "keep": True}) == ["[train] note: little data"]
    assert quiet_phase(3, {"stage": "train", "text": "30%"}) == []
    assert quiet_phase(7) == ["[train] 30%"]
    assert quiet_phase(12) == ["[train] 30% · for 9 s"]


def test_a_silenced_phase_is_heard_all_the_same(capsys):
    """Exports silence sys.stderr for many seconds, which is when somebody waits."""
    now = [0.0]
    with Progress(terminal=False, clock=lambda: now[0], look=None) as progress:
        progress({"stage": "train", "text": "exporting"})
        with quiet():
            now[0] = 6.0
            progress.beat()
    assert capsys.readouterr().err.splitlines() == ["[train] exporting", "[train] exporting · for 6 s"]
    progress.beat()
    assert not capsys.readouterr().err  # it is over


def test_progress_beats_by_itself(capsys):
    """By its own thread; the clock leaps, so that nothing has to wait."""
    ticks = iter(range(0, 6000, 6))
    with Progress(terminal=False, clock=lambda: float(next(ticks)), look=0.001) as progress:
        progress({"stage": "load", "text": "reading"})
        lines: list[str] = []
        while len(lines) < 3:
            lines += capsys.readouterr().err.splitlines()
    assert lines[0] == "[load] reading" and all(line.startswith("[load] reading · for ") for line in lines[1:])


def test_progress_on_a_terminal_shows_names_as_they_are(capsys):
    with Progress(terminal=True) as progress:
        progress({"stage": "search", "text": "[/] [bold]name"})
    assert "[bold]name" in capsys.readouterr().err


WIDE_ROWS = [
    ("a_method_with_a_long_name", "hardware", "one two three " * 20, "pip install 'quadriga[executorch]'"),
    ("b", "x", "y", "–"),
]


@pytest.mark.parametrize("columns", [80, 100])
def test_a_table_fits_and_no_short_name_is_broken(capsys, monkeypatch, columns):
    monkeypatch.setattr(console, "WIDE", columns)
    console.table(("name", "family", "about", "remedy"), WIDE_ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns and any("a_method_with_a_long_name   hardware" in line for line in lines)


def test_where_a_table_would_break_its_words_each_row_is_a_paragraph(capsys, monkeypatch):
    monkeypatch.setattr(console, "WIDE", 60)
    names = ("layer", *(f"quantity{k}" for k in range(6)))
    console.table(names, [("conv1", *(f"{k}.12 ms" for k in range(5)), "–"), ("fc", *["1 s"] * 6)], "Layers")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 60 and "Layers\nconv1\n  quantity0 0.12 ms · quantity1 1.12 ms" in out
    assert "–" not in out and out.count("quantity5") == 1


def test_a_terminals_width_is_kept_and_a_pipe_has_a_pages(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    assert console.width() == console.WIDE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert console.width() == 77


def test_all_methods_fit_a_pipe_and_one_method_shows_its_fields(capsys):
    """The list was 400 columns wide; a field's facts are those of its class."""
    assert call("methods") == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= console.WIDE and "prune_channels" in out and "quantize_int8" in out
    assert call("methods", "prune_channels") == 0
    out = capsys.readouterr().out
    assert "arXiv:2301.12900" in out and "ratio\n  float · default 0.5 · searched 0.5" in out and "one of 'magnitude'" in out
    assert call("methods", "prune_chanels") == 2 and 'did you mean "prune_channels"' in capsys.readouterr().err
    assert call("methods", "prune_channels", "--json") == 0 and last_json(capsys)["fields"]["ratio"]["default"] == 0.5


COMPARED = {
    "status": "complete", "a": "one", "b": "two.toml", "workload": "w", "split": "test", "fakes": ["zeros"],
    "latency_ratio": {"1": {"value": 2.0, "low": 1.9, "high": 2.1, "verdict": "faster", "level": 0.99}},
    "latency": {"1": {"a": 0.002, "b": 0.001}}, "bytes": {"a": 2000, "b": 1000}, "bytes_ratio": 0.5,
    "quality": {"metric": "accuracy", "unit": "pt", "value": 87.5, "baseline": 87.0, "difference": 0.5, "low": -0.1, "n": 300,
                "disagreement": 0.02},
}  # fmt: skip


def test_a_comparison_is_shown_as_tables(fake, capsys):
    fake.study.compare = lambda a, b, **_: COMPARED
    assert call("compare", "one", "two.toml") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "1 2 ms 1 ms 2.00× [1.90, 2.10] faster" in out and "bytes 2 kB 1 kB 0.50×" in out and "Note: zeros." in out
    assert "accuracy on 300 examples of test 87.00 pt 87.50 pt +0.50 pt, at least −0.10 pt" in out and "2 %" in out


def test_what_failed_is_said_on_stderr_and_is_status_1(fake, capsys):
    failed = {"status": "failed", "artifact": None, "error": {"message": "there is no artifact: x", "remedy": "do y"}}
    fake.study.train = lambda w, **_: failed
    for words in (("train", "w"), ("train", "w", "--json")):
        assert call(*words) == 1
        assert "quadriga: there is no artifact: x; do y" in capsys.readouterr().err
    fake.artifact.verify = lambda path: {"ok": False, "message": "FAILED: model.onnx is damaged"}
    assert call("verify", "bad") == 1 and "quadriga: FAILED: model.onnx is damaged" in capsys.readouterr().err


def test_something_is_said_before_anything_heavy_is_imported():
    """The first line came after seconds of imports."""
    code = (
        "import os, sys, builtins\nfrom quadriga import cli\nplain = builtins.__import__\n"
        "def traced(name, *a, **k):\n"
        "    if name == 'torch': print('importing torch', file=sys.stderr, flush=True); os._exit(0)\n"
        "    return plain(name, *a, **k)\n"
        "builtins.__import__ = traced\ncli.main(sys.argv[1:])"
    )
    for words in (["run", "w"], ["train", "w"], ["profile", "w"], ["compare", "a", "b"], ["verify", "x"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines() == ["[start] loading PyTorch, a few seconds", "importing torch"], words


def test_an_event_needs_nothing_but_a_stage():
    assert describe({"stage": "report"}) == "[report] "


def test_training_may_be_tracked(fake, capsys):
    assert call("train", "w", "--track", "tensorboard", "--json") == 0
    assert last_json(capsys)["track"] == "tensorboard"
    assert call("train", "w", "--track", "nowhere") == 2


def test_profile_shows_layers_or_rates(fake, capsys):
    """People see every tenth row of the series, programs see all."""
    assert call("profile", "w", "--json") == 0
    assert last_json(capsys) == PROFILE
    assert call("profile", "w", "--lr", "--json") == 0
    assert len(last_json(capsys)["series"]) == 40
    assert call("profile", "w", "--lr") == 0
    assert len(re.findall(r"^ *\d+\.?\d* *$", capsys.readouterr().out, re.M)) == 4


def test_profile_shows_the_layers_the_bounds_and_where_its_page_is(fake, capsys, tmp_path):
    assert call("profile", "w", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert re.search(r"fc +Linear +500 ms +25 % .* 1\.33×", out)  # Amdahl: 1 / (1 − ¼)
    assert re.search(r"hardware +nothing were between the layers +500 ms +4\.00×", out)
    assert re.search(r"hardware +also every layer were at its roofline in fp32 +100 ms +20\.00×", out)
    assert f"report: {tmp_path / 'profile.html'}" in out
    assert call("profile", "w", "--lr", "--out", str(tmp_path)) == 2
