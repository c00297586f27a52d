from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from featherweight import cli, cost_table, passes, search, targets
from featherweight.measure import Measurement
from tests.made_up import measurement
from tests.test_search import QUICK

TINY = Path(__file__).parent / "gratings.py"
ROOT = Path(__file__).parent.parent
RECIPE = "steps: [fold_batchnorm, quantize_static]\ntarget: onnxruntime\n"


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Short timings and one candidate."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in QUICK:
            patch.setattr(f"{module}.{name}", value)
        yield


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    """What is said on standard error by a command that ends with 2; one paragraph in any case, and no traceback."""
    capsys.readouterr()
    try:
        code: object = run(*arguments)
    except SystemExit as ending:
        code = ending.code
    out, err = capsys.readouterr()
    assert code == 2, (code, out, err)
    (line,) = [line for line in err.splitlines() if "featherweight: error" in line]
    assert line.startswith("featherweight: error: ") and err.endswith(line + "\n")
    assert "Traceback" not in err and out == ""
    return line.removeprefix("featherweight: error: ")


# ------------------------------------------------------------------------------------------------ what works


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("applied")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert run("apply", folder / "recipe.yaml", TINY, "--out", folder / "out") == 0
    return folder / "out"


def test_apply_says_what_it_wrote(applied, tmp_path, capsys):
    (tmp_path / "plain.yaml").write_text("steps: []\ntarget: onnxruntime\n")
    assert run("apply", tmp_path / "plain.yaml", TINY, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert re.fullmatch(r".*/out: [\d,]+ bytes, 0 layers changed, for onnxruntime\n", out)
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) > 2 * sum(
        p.stat().st_size for p in applied.iterdir()
    )


def test_verify_tells_good_from_bad(applied, tmp_path, capsys):
    assert run("verify", applied) == 0
    assert "as it was written" in capsys.readouterr().out
    for path in applied.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.onnx").write_bytes(content)
    assert run("verify", tmp_path) == 1
    assert "model.onnx has another content" in capsys.readouterr().out


def test_measure_prints_a_table_or_json(applied, capsys, monkeypatch):
    assert run("measure", applied, TINY, "--threads", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "onnxruntime" and found["test_drop"] is not None and found["threads"] == 1
    assert found["versus_runtime_ratio"] > 0
    monkeypatch.setattr("featherweight.measure.baseline", lambda *_, **__: SimpleNamespace(measurement=measurement()))
    monkeypatch.setattr("featherweight.measure.best_runtime", lambda *_, **__: None)
    monkeypatch.setattr("featherweight.measure.measure", lambda *_, **__: Measurement.from_json(json.dumps(found)))
    assert run("measure", applied, TINY, "--threads", 1) == 0
    out = capsys.readouterr().out
    assert "score on test data" in out and "times smaller, drop of the score" in out


def test_inspect_a_workload_and_an_artifact(applied, capsys):
    assert run("inspect", TINY) == 0
    out = capsys.readouterr().out
    assert re.search(r"features\.0 +Conv2d +16×1×3×3 +float32 +576\n", out)
    assert "input x: float32 [batch, 1, 12, 12]" in out and "46,772 parameters" in out
    assert run("inspect", applied) == 0
    out = capsys.readouterr().out
    assert "model.onnx" in out and "quantize_static" in out and re.search(r"features\.0 +int8 per channel", out)
    assert "inputs: x float32 [batch, 1, 12, 12]" in out


def test_list_shows_every_pass_and_target_with_its_settings(capsys):
    assert run("list", "passes") == 0
    out = capsys.readouterr().out
    for name in passes.names():
        assert re.search(rf"^{name}: [A-Z0-9].+$", out, re.MULTILINE), name
    assert "    bits: int = 8 (2 to 8)" in out and "    epochs: float = 1.0 (0.01 to 1000)" in out
    assert run("list", "targets") == 0
    out = capsys.readouterr().out
    assert [line.partition(":")[0] for line in out.splitlines()] == list(targets.names())


def test_a_target_that_is_not_installed_says_how_to_install_it(capsys, monkeypatch):
    kind = type(targets.find("openvino"))
    monkeypatch.setattr(kind, "installed", classmethod(lambda cls: False))
    targets.find.cache_clear()
    assert run("list", "targets") == 0
    targets.find.cache_clear()
    assert "openvino: not installed." in (out := capsys.readouterr().out) and "featherweight[openvino]" in out


def test_compress_ends_with_files_and_a_page(tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "out", search.compress
    results = []
    monkeypatch.setattr(search, "compress", lambda *a, **k: results.append(real(*a, **k)) or results[0])
    arguments = ("compress", TINY, "--max-drop", "5%", "--target", "onnxruntime", "--threads", 1, "--out", out)
    assert run(*arguments) == 0
    said, meanwhile = capsys.readouterr()
    assert re.search(r"^accepted: .* smaller, drop of the score", said, re.MULTILINE)
    assert re.search(r"^score +0\.\d{4} \(0\.\d{4} to 0\.\d{4}\) +0\.\d{4} \(", said, re.MULTILINE)
    assert re.search(r"^latency of the original over this .*\(.* to .*\)", said, re.MULTILINE)
    assert re.search(r"^peak memory ", said, re.MULTILINE) and re.search(r"^seconds +\w", said, re.MULTILINE)
    assert f"artifact  {out}/best" in said and f"report    {out}/report.html" in said
    told = ["the original", "compressing is", *["fold_batchnorm"] * 2, *["prune_channels"] * 2, "it runs best"]
    lines = [re.sub(r"^ *\d+ s +", "", line) for line in meanwhile.splitlines()]
    assert len(lines) == len(told) and all(map(str.startswith, lines, told)), lines  # one quiet line each
    assert {path.name for path in out.iterdir()} == {
        *(
            "baseline.json",
            "best",
            "costs.json",
            "recipe.yaml",
            "report.html",
            "report.md",
            "result.json",
            "shapes.json",
        ),
        "trials",
    }
    # everything that takes a folder takes this one, too
    assert run("verify", out) == 0 and run("inspect", out) == 0 and run("report", out) == 0
    # as it would end if the budget could not be met
    capsys.readouterr()
    infeasible = dataclasses.replace(results[0], verdict="infeasible", binding="max_bytes")
    monkeypatch.setattr(search, "compress", lambda *_, **__: infeasible)
    assert run(*arguments, "--resume") == 3
    said, _ = capsys.readouterr()
    assert re.search(r"^infeasible: no trial keeps to the budget, max_bytes binds; the nearest is ", said, re.MULTILINE)
    # and not without being told to
    assert "--resume" in refused(capsys, *arguments)


def test_bench_machine_measures_layers_once_and_shows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FEATHERWEIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(cost_table, "_profiled", lambda entries, *_: (dict.fromkeys(entries, 0.25), {}))
    arguments = ("bench-machine", TINY, "--target", "onnxruntime,torch", "--threads", 1, "--batch", 2)
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    heads = re.findall(r"^.*gratings\.py on (\w+), 1 thread, batch 2: (\d+) shapes, (\d+) entries", said, re.MULTILINE)
    assert [name for name, *_ in heads] == ["onnxruntime", "torch"] and "layer " in said
    times = len(cost_table.SHARES)
    assert re.search(rf"^16→64 Conv2d on \d.* int8( +0\.250){{{times}}}$", said, re.MULTILINE)
    assert run(*arguments) == 0
    assert "(0 measured now)" in capsys.readouterr().out
    assert len(list((tmp_path / "costs").iterdir())) == 2

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cost_table, "_profiled", interrupted)
    assert run(*arguments[:-1], 3) == 130
    assert f"what was measured is kept in {tmp_path}/costs" in capsys.readouterr().err


def test_bench_machine_refuses_what_it_cannot_measure(capsys):
    assert "the following arguments are required: WORKLOAD" in refused(capsys, "bench-machine")
    assert "no target 'abacus'" in refused(capsys, "bench-machine", TINY, "--target", "abacus")
    assert "no whole number above zero" in refused(capsys, "bench-machine", TINY, "--threads", 0)
    assert "There is no file nowhere.py" in refused(capsys, "bench-machine", "nowhere.py", "--target", "torch")


def test_on_a_terminal_there_is_a_bar_with_the_time_left(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = cli._progress()
    progress.count(3, 7)
    progress.stage("2/4 distill_soft")
    progress.line("one\n  trial")
    progress.count(4, 7)
    progress.close()
    said = terminal.getvalue()
    assert "4 of about 7 trials" in said and " left]" in said and "2/4 distill_soft" in said and "one trial" in said


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("2h", 7200), ("0.5m", 30)])
def test_durations(text, seconds):
    assert cli.duration(text) == seconds


# ------------------------------------------------------------------------------------------------ what is refused

COMPRESS = ("--max-drop", "0.01", "--target", "onnxruntime", "--threads", "1", "--time-limit", "1s")
HEAD = """
import torch
from torch import nn
from featherweight import Workload
x = torch.randn(4, 8)
def score(predict): return [1.0] * 4
def made(**changes):
    values = {"model": nn.Linear(8, 2).eval(), "example": (x,), "calibration": [(x,)], "score": score}
    return Workload(**{**values, **changes})
"""
BAD_WORKLOADS = {
    "no function": ("", "has no function workload().*Add `def workload"),
    "raises": ("def workload(): return 1 / 0", "raised ZeroDivisionError"),
    "syntax": ("def workload(:", "could not be imported: SyntaxError"),
    "wrong type": ("def workload(): return 3", "returned a int, not a Workload"),
    "score is NaN": ("def workload(): return made(score=lambda p: float('nan'))", "NaN or infinite.*finite numbers"),
    "score raises": ("def workload(): return made(score=lambda p: p(y))", r"score\(predict\) raised NameError"),
    "score is text": ("def workload(): return made(score=lambda p: 'good')", "returned a str, but one number"),
    "score is empty": ("def workload(): return made(score=lambda p: [])", "returned no values"),
    "train mode": ("def workload(): return made(model=nn.Sequential(nn.Dropout()))", r"in train mode.*model\.eval\(\)"),
    "no calibration": ("def workload(): return made(calibration=[])", "calibration is empty"),
    "no batch": ("def workload(): return made(example=x)", "example is not a batch.*written \\(x,\\)"),
    "wrong shapes": ("def workload(): return made(calibration=[(x[:, :3],)])", r"calibration\[0\].*must agree"),
    "wrong input": ("def workload(): return made(example=(x, x), calibration=[(x, x)])", "failed on calibration"),
    "no batch in the output": (
        "class M(nn.Module):\n    def forward(self, x): return x.sum()\ndef workload(): return made(model=M().eval())",
        "dim 0 must be",
    ),
    "data decides": (
        "class M(nn.Module):\n    def forward(self, x): return x * 2 if x.sum() > 0 else x\n"
        "def workload(): return made(model=M().eval())",
        "cannot be traced.*branches on the data",
    ),
}


@pytest.mark.parametrize("name", BAD_WORKLOADS)
def test_workloads_that_break_the_contract(name, tmp_path, capsys):
    code, message = BAD_WORKLOADS[name]
    (tmp_path / "bad.py").write_text(HEAD + code)
    limit = ("--time-limit", "60s") if name == "data decides" else ()
    said = refused(capsys, "compress", tmp_path / "bad.py", *COMPRESS, *limit, "--out", tmp_path / "out")
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-drop", "-0.5", "zero or more"),
        ("--max-drop", "nan", "zero or more"),
        ("--max-drop", "lots", "is no number.*0.01"),
        ("--max-bytes", "-3", "no whole number above zero"),
        ("--max-bytes", "1e6", "no whole number above zero"),
        ("--max-latency-ms", "nan", "no number above zero"),
        ("--objective", "beauty", "There are: latency, bytes"),
        ("--target", "abacus", "no target 'abacus'. There are: onnxruntime"),
        ("--target", "onnxruntime,abacus", "no target 'abacus'"),
        ("--threads", "0", "no whole number above zero"),
        ("--batch", "two", "no whole number above zero"),
        ("--time-limit", "soon", "no duration above zero: write 90s, 15m or 2h"),
        ("--time-limit", "0m", "no duration above zero"),
        ("--speed", "11", "unrecognized arguments: --speed"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_the_workload_is_loaded(option, value, message, tmp_path, capsys):
    (tmp_path / "never.py").write_text("raise SystemExit('was loaded')")
    said = refused(capsys, "compress", tmp_path / "never.py", *COMPRESS, f"{option}={value}", "--out", tmp_path / "out")
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_places_that_cannot_be_used(tmp_path, capsys):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    (tmp_path / "never.py").write_text("raise SystemExit('was loaded')")
    for out, message in [(note, "is a file"), (note / "out", "cannot be written"), (tmp_path, "not empty")]:
        said = refused(capsys, "compress", tmp_path / "never.py", *COMPRESS, "--out", out)
        assert message in said
    said = refused(capsys, "compress", tmp_path / "never.py", *COMPRESS, "--pool", "sea", "--out", tmp_path / "new")
    assert "no pool 'sea'" in said and not (tmp_path / "new").exists()
    said = refused(capsys, "compress", tmp_path / "never.py", *COMPRESS, "--resume", "--out", tmp_path)
    assert "no search to go on with" in said
    assert note.read_text() == "mine"


def test_missing_things_are_named(tmp_path, capsys, applied):
    there_is_no = tmp_path / "nothing"
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for arguments, message in [
        (("compress", f"{there_is_no}.py", *COMPRESS, "--out", tmp_path / "a"), "There is no file"),
        (("compress", "no_such.module:workload", *COMPRESS, "--out", tmp_path / "b"), "could not be imported"),
        (("apply", f"{there_is_no}.yaml", TINY, "--out", tmp_path / "c"), "There is no file"),
        (("apply", tmp_path, TINY, "--out", tmp_path / "c"), "cannot be read"),
        (("measure", there_is_no, TINY), "There is no folder"),
        (("measure", tmp_path, TINY), "is no artifact"),
        (("verify", there_is_no), "There is no folder"),
        (("inspect", there_is_no), "could not be imported"),
        (("report", there_is_no), "holds no search"),
        (("report", applied), "holds no search"),
        (("list", "wishes"), "invalid choice: 'wishes'"),
        (("compress",), "are required: WORKLOAD, --max-drop, --out"),
        ((), "required: COMMAND"),
        (("conquer",), "invalid choice: 'conquer'"),
    ]:
        assert message in refused(capsys, *arguments), arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [", "is no YAML in line"),
        ("steps: [melt]\ntarget: onnxruntime", "no pass 'melt'"),
        ("steps: [quantize_weights: {bits: 9}]\ntarget: onnxruntime", "bits=9 is out of range"),
        ("steps: [quantize_weights: {bit: 4}]\ntarget: onnxruntime", "no setting 'bit'. Did you mean 'bits'"),
        ("steps: []\ntarget: abacus", "no target 'abacus'"),
        (
            "steps: [quantize_static: {where: 'blocks.*'}]\ntarget: onnxruntime",
            r"where='blocks.\*' matches none of the 4",
        ),
        ("steps: [quantize_static, quantize_weights]\ntarget: onnxruntime", r"[Ss]tep 2.*Leave one of the two"),
    ],
)
def test_recipes_that_cannot_be_run(text, message, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(text)
    said = refused(capsys, "apply", tmp_path / "recipe.yaml", TINY, "--out", tmp_path / "out")
    assert re.search(message, said), said


def test_apply_does_not_overwrite(applied, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert "not empty" in refused(capsys, "apply", tmp_path / "recipe.yaml", TINY, "--out", applied)


def test_a_corrupt_artifact_is_not_run(applied, tmp_path, capsys):
    for path in applied.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "model.onnx").open("ab") as file:
        file.write(b"more")
    for command in (("measure", tmp_path, TINY), ("inspect", tmp_path)):
        assert "is not as it was written" in refused(capsys, *command)


# ------------------------------------------------------------------------------------------------ the process


def shell(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(("-c", code) if code else ("-m", "featherweight")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_needs_nothing_heavy():
    code = (
        "import sys; from featherweight.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'numpy', 'yaml', 'tqdm'} & set(sys.modules), 'heavy'"
    )
    found = shell(code=code)
    assert found.returncode == 0 and found.stderr == ""
    for command in ("compress", "apply", "measure", "verify", "report", "inspect", "list"):
        assert re.search(rf"^    {command} ", found.stdout, re.MULTILINE)


def test_as_a_module_with_the_exit_code_of_the_command():
    assert shell("--help").returncode == 0
    found = shell("report", "/nowhere")
    assert found.returncode == 2 and found.stderr.startswith("featherweight: error: ") and found.stdout == ""


def test_nothing_is_sent_home(monkeypatch):
    for name in cli.SILENCED:
        monkeypatch.delenv(name, raising=False)
    assert run("list", "targets") == 0
    assert {name: os.environ.get(name) for name in cli.SILENCED} == cli.SILENCED
