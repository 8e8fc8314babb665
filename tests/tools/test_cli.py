import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from fxstream.tools import inspection, text
from fxstream.tools.cli import main

FEEDFORWARD = "tests.tools.targets:feedforward"

HEADINGS = [
    "activation peak",
    "weights",
    "inputs",
    "all",
    "Lowest reachable",
    "Held at the peak before",
    "Held at the peak after",
    "Groups",
    "rule",
    "Activations along the schedule before",
    "Activations along the schedule after",
    "Capture",
]


def one_line(capsys):
    """What was said on standard error, which is one line; nothing on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    return err


def run(*arguments, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "fxstream.tools.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_report_of_a_published_model():
    options = "--frames 4 --height 64 --width 96 --batch 1 --dtype bfloat16 --budget min"
    done = run("inspect", "modelscope-unet", *options.split(), check=True)
    assert done.stdout.startswith("modelscope-unet: UNet3DConditionModel, sample 1x4x4x8x12 bfloat16, ")
    places = [done.stdout.find(heading) for heading in HEADINGS]
    assert -1 not in places
    assert places == sorted(places)
    assert "transformer_in" in done.stdout
    assert done.stdout.count("└") == 2
    # What diffusers imports where it is installed, for quantized weights, tells of itself.
    libraries = ("torchao", "_pytree", "kernels-community")
    assert not [line for line in done.stderr.splitlines() if not any(name in line for name in libraries)]


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("0.5", "Budget 0.5, which leaves 64.00 KiB to activations: before does not fit, after fits."),
        ("1GiB", "before fits, after fits."),
        (str(2**20), "before fits, after fits."),
        ("min", "Lowest reachable:"),
    ],
)
def test_whether_the_budget_is_met(capsys, budget, line):
    assert main(["inspect", FEEDFORWARD, "--budget", budget]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["1KiB", "0.001"])
def test_a_budget_that_cannot_be_met(capsys, budget):
    assert main(["inspect", FEEDFORWARD, "--quiet", "--budget", budget]) == 2
    err = one_line(capsys)
    assert f"budget of {budget} can't be met: the lowest reachable is " in err
    assert "--budget min" in err


def test_a_model_that_cannot_be_captured(capsys):
    assert main(["inspect", "tests.tools.targets:branching", "--quiet"]) == 2
    assert "could not capture Branching" in one_line(capsys)


def test_measured_beside_predicted(capsys):
    assert main(["inspect", FEEDFORWARD, "--quiet", "--measure"]) == 0
    out = capsys.readouterr().out
    (row,) = (line for line in out.splitlines() if line.startswith("captured"))
    assert row.split()[1:5] == ["128.00", "KiB", "128.00", "KiB"]


def test_a_model_without_memory_is_not_run(capsys):
    assert main(["inspect", "tests.tools.targets:on_meta", "--quiet", "--measure"]) == 2
    assert "leave --measure" in one_line(capsys)


@pytest.mark.parametrize("form", ["--json", "--csv", "--dot", "--code"])
def test_text_goes_to_standard_output_in_place_of_the_report(capsys, form):
    assert main(["inspect", FEEDFORWARD, "--quiet", form]) == 0
    out = capsys.readouterr().out
    assert {"--json": '{"format"', "--csv": "schedule,", "--dot": "digraph", "--code": "def forward"}[form] in out
    assert "Lowest reachable:" not in out or form == "--json"


def test_files(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    forms = "--html --png --trace --svg o.svg --csv o.csv --json -"
    assert main(["inspect", FEEDFORWARD, *forms.split()]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["target"] == "feedforward"
    names = {"feedforward.html", "feedforward.png", "feedforward.trace.json", "o.svg", "o.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(f"wrote {name}\n" in err for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--html missing/o.html", "there is no folder missing"),
        ("--json .", "is a folder"),
        ("--json o --csv o", "--json and --csv would both write o"),
        ("--json --csv", "--json and --csv can't both go to standard output"),
        ("--json - --code -", "--json and --code can't both go to standard output"),
    ],
)
def test_files_are_looked_at_before_the_work(capsys, monkeypatch, options, message):
    monkeypatch.setattr(inspection, "inspect", None)
    assert main(["inspect", FEEDFORWARD, *options.split()]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "name", "remedy"),
    [
        ("inspect nope", "'nope'", "svd-xt-unet"),
        ("inspect svd-unett", "'svd-unett'", "did you mean svd-unet?"),
        ("inspect no/such/folder", "no/such/folder", "config.json"),
        ("inspect svd-unet --dtype int8", "'int8'", "bfloat16"),
        ("inspect svd-unet --budget 6potatoes", "'6potatoes'", '"6GiB"'),
        ("inspect svd-unet --budget 1.5", "1.5", "a float in (0, 1)"),
        ("inspect svd-unet --budget -1", "-1", '"6GiB"'),
        ("inspect svd-unet --budget 0GiB", "'0GiB'", '"6GiB"'),
        ("inspect svd-unet --height 100", "100", "multiple of 8"),
        ("inspect svd-unet --frames 0", "'0'", "1 or more"),
        ("inspect", "TARGET", "--help"),
        ("inspect --html svd-unet", "TARGET", "before options that take a FILE"),
        ("", "COMMAND", "--help"),
        ("inspect svd-unet --speed 3", "--speed", "--help"),
        ("fit svd-unet", "--memory", '"8GiB"'),
        ("fit svd-unet --memory half", "'half'", '"6GiB"'),
        ("fit svd-unet --memory 0.5", "'0.5'", '"8GiB"'),
        ("fit svd-unet --memory 8GiB --height 64", "--height", "--width"),
        ("fit svd-unet --memory 8GiB --measure", "--measure", "--frames"),
        ("compare svd-unet", "B", "--help"),
        ("completion fish", "'fish'", "zsh"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, name, remedy):
    try:
        code = main(arguments.split())
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    err = one_line(capsys)
    assert name in err
    assert remedy in err


def test_a_traceback_where_it_is_asked_for(capsys):
    assert main(["inspect", "tests.tools.targets:broken", "--quiet"]) == 2
    assert "raised ValueError: no luck" in one_line(capsys)
    assert main(["inspect", "tests.tools.targets:broken", "--quiet", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_fxstreams_own(capsys, monkeypatch):
    monkeypatch.setattr(inspection, "load", lambda *args, **options: 1 / 0)
    assert main(["inspect", FEEDFORWARD, "--quiet"]) == 1
    assert "ZeroDivisionError: division by zero" in one_line(capsys)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["inspect", "nope"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments):
    code = f"""
import sys
from fxstream.tools.cli import main
try:
    main({arguments})
except SystemExit:
    pass
heavy = {{"torch", "diffusers", "tabulate", "networkx", "matplotlib", "numpy", "shtab"}} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_leaves_early():
    command = [sys.executable, "-m", "fxstream.tools.cli", "inspect", FEEDFORWARD, "--quiet", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_without_the_charts_characters():
    result = run("models", env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert "svd-unet" in result.stdout
    result = run("inspect", FEEDFORWARD, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=True)
    assert "Capture" in result.stdout


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_colours(monkeypatch, environment, coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (text.styled("fits", text.GOOD) != "fits") == coloured


def test_no_colours_in_a_file(capsys):
    assert main(["inspect", FEEDFORWARD, "--budget", "0.5"]) == 0
    assert "\033" not in capsys.readouterr().out


def test_models(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^i2vgenxl-unet +I2VGenXLUNet +I2VGenXLPipeline.unet +16 x 704 x 1280 ", out, re.MULTILINE)


def test_env(capsys):
    import torch

    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^memory +\d+\.\d\d GiB$", out, re.MULTILINE)


def completed(script, line):
    """What bash offers for a line that ends at the cursor."""
    words = line.split(" ")
    program = f"{script}\nCOMP_WORDS=({' '.join(word or chr(39) * 2 for word in words)})\n"
    program += f'COMP_CWORD={len(words) - 1}\n_shtab_fxstream\necho "${{COMPREPLY[@]}}"\n'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(capsys, tmp_path, monkeypatch):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "svd.json").touch()
    assert {"inspect", "fit", "compare", "models", "env"} <= set(completed(script, "fxstream "))
    assert "--budget" in completed(script, "fxstream inspect --b")
    assert set(completed(script, "fxstream inspect sv")) == {"svd-unet", "svd-xt-unet", "svd-vae", "svd.json"}


def test_completion_in_zsh(capsys, tmp_path):
    assert main(["completion", "zsh"]) == 0
    script = capsys.readouterr().out
    assert script.startswith("#compdef fxstream")
    assert "svd-xt-unet" in script
    if shutil.which("zsh"):
        (tmp_path / "_fxstream").write_text(script)
        subprocess.run(["zsh", "-n", str(tmp_path / "_fxstream")], check=True)
