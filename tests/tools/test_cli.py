import subprocess
import sys

import pytest
import torch
from torch import nn

from fxstream.tools import catalogue
from fxstream.tools.cli import TARGETS, main

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

# A model of the catalogue's name that takes no time: a feed-forward layer over 64 rows of 16.
TINY = """
from torch import nn, ones
from fxstream.tools import catalogue, cli
model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).requires_grad_(False)
catalogue.build = lambda name, **options: (model, (ones(64, 16),), {})
cli.main(["inspect", "svd-unet", "--quiet"])
"""


@pytest.fixture(scope="module")
def inspected():
    options = "--frames 4 --height 64 --width 96 --batch 1 --dtype bfloat16 --budget min"
    command = [sys.executable, "-m", "fxstream.tools.cli", "inspect", "modelscope-unet", *options.split()]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture
def tiny(monkeypatch):
    """The catalogue's models replaced by a small one; the options that it was built with."""
    given = {}
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16)).requires_grad_(False)

    def build(name, **options):
        given.update(options, name=name)
        return model, (torch.ones(64, 16),), {}

    monkeypatch.setattr(catalogue, "build", build)
    return given


def test_report_of_a_published_model(inspected):
    report = inspected.stdout
    assert report.startswith("modelscope-unet: batch 1, 4 frames of 64 x 96, bfloat16\n")
    places = [report.find(heading) for heading in HEADINGS]
    assert -1 not in places
    assert places == sorted(places)
    assert "transformer_in" in report
    assert report.count("└") == 2


def test_progress_goes_to_stderr(inspected):
    first, second = inspected.stderr.splitlines()[-2:]
    assert first.startswith("building modelscope-unet ...")
    assert second.startswith("capturing and planning ...")
    assert "..." not in inspected.stdout.splitlines()


def test_options_reach_the_model(tiny):
    shape = "--frames 5 --height 64 --width 72 --batch 3 --dtype float32"
    assert main(["inspect", "i2vgenxl-unet", *shape.split()]) == 0
    size = {"frames": 5, "height": 64, "width": 72, "batch": 3}
    assert tiny == {"name": "i2vgenxl-unet", "dtype": torch.float32, **size}


def test_published_sizes_are_the_default(tiny):
    assert main(["inspect", "svd-xt-unet", "--frames", "7"]) == 0
    size = {"frames": 7, "height": 576, "width": 1024, "batch": 2}
    assert tiny == {"name": "svd-xt-unet", "dtype": torch.float16, **size}


def test_quiet(tiny, capsys):
    assert main(["inspect", "svd-unet", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("0.5", "Budget 0.5, which leaves 64.00 KiB to activations: before does not fit, after fits."),
        ("1GiB", "before fits, after fits."),
        (str(2**20), "before fits, after fits."),
        ("min", "Lowest reachable:"),
    ],
)
def test_whether_the_budget_is_met(tiny, capsys, budget, line):
    assert main(["inspect", "svd-unet", "--budget", budget]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["1KiB", "0.001"])
def test_a_budget_that_cannot_be_met(tiny, capsys, budget):
    assert main(["inspect", "svd-unet", "--quiet", "--budget", budget]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"budget of {budget} can't be met: the lowest reachable is " in err
    assert "--budget min" in err


def test_a_model_that_cannot_be_captured(tiny, capsys, monkeypatch):
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x if x.sum() > 0 else -x)
    assert main(["inspect", "svd-unet", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "could not capture Sequential" in err


@pytest.mark.parametrize(
    ("arguments", "name", "remedy"),
    [
        ("inspect nope", "'nope'", "svd-xt-unet"),
        ("inspect svd-unet --dtype int8", "'int8'", "bfloat16"),
        ("inspect svd-unet --budget 6potatoes", "'6potatoes'", '"6GiB"'),
        ("inspect svd-unet --budget 1.5", "1.5", "a float in (0, 1)"),
        ("inspect svd-unet --budget -1", "-1", '"6GiB"'),
        ("inspect svd-unet --budget 0GiB", "'0GiB'", '"6GiB"'),
        ("inspect svd-unet --height 100", "100", "multiple of 8"),
        ("inspect svd-unet --frames 0", "'0'", "1 or more"),
        ("inspect", "TARGET", "--help"),
        ("", "COMMAND", "--help"),
        ("inspect svd-unet --speed 3", "--speed", "--help"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, name, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert name in err
    assert remedy in err


def test_targets_are_those_of_the_catalogue():
    assert list(TARGETS) == list(catalogue.CATALOGUE)


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["inspect", "nope"]])
def test_help_and_usage_errors_import_nothing_heavy(arguments):
    code = f"""
import sys
from fxstream.tools.cli import main
try:
    main({arguments})
except SystemExit:
    pass
sys.exit(any(name in sys.modules for name in ("torch", "diffusers", "tabulate", "networkx")))
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_leaves_early():
    with subprocess.Popen([sys.executable, "-c", TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_without_the_charts_characters():
    environment = {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", TINY], env=environment, capture_output=True, text=True, check=True)
    assert "Capture" in result.stdout
