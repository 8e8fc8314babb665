"""The manual: each page's code runs, from top to bottom; commands are parsed, and run on a small model.

What a page takes as given, such as ``pipe``, is small here. A block behind ``<!-- not run: why -->`` is only compiled,
and what it names has to exist.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import shlex
import sys
import tomllib
from functools import cache
from types import ModuleType

import diffusers
import pytest
import torch

import fxstream
import fxstream.api  # registers the rules, which a test takes a copy of
from fxstream.module import StreamedModule
from fxstream.passes.operators import axes
from fxstream.tools import cli, pipelines
from fxstream.tools.targets import NAMES, check
from tests.manual import PAGES, ROOT, Block, blocks, given, small_pipeline

LANGUAGES = {"python", "sh", "text", "mermaid"}
BLOCKS = [block for page in PAGES for block in blocks(page)]
PYTHON = [page for page in PAGES if any(block.page == page and block.language == "python" for block in BLOCKS)]
COMMANDS = [block for block in BLOCKS if block.language == "sh"]
SMALL = "tests.tools.targets:video"
"""Stands where a page names a model of the catalogue."""


def name(value):
    return value.where if isinstance(value, Block) else str(value.relative_to(ROOT))


def test_blocks_say_their_language():
    """Else nothing would run them."""
    wrong = [f"{block.where} is {block.language or 'of no language'}" for block in BLOCKS]
    wrong = [found for found, block in zip(wrong, BLOCKS, strict=True) if block.language not in LANGUAGES]
    assert not wrong


def test_there_is_code_on_the_pages():
    assert {"README.md", "docs/tutorial.md", "docs/pipelines.md", "docs/models.md"} <= set(map(name, PYTHON))
    assert len(COMMANDS) >= 8
    run = [block for block in BLOCKS if block.language == "python" and not block.not_run]
    assert len(run) >= 25


@pytest.fixture
def small_world(monkeypatch, tmp_path):
    """Small models wherever a page would load a published one, and a folder for what pages write."""
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", small_pipeline)
    call = {"height": 576, "width": 1024, "num_frames": 14}
    monkeypatch.setattr(pipelines, "build", lambda *_: (small_pipeline(), call))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(axes, "_RULES", dict(axes._RULES))  # the page of rules adds to it
    torch._dynamo.reset()
    yield
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("page", PYTHON, ids=name)
@pytest.mark.usefixtures("small_world")
def test_code(page, capsys):
    names = given()
    for block in blocks(page):
        if block.language == "python" and not block.not_run:
            exec(block.compiled(), names)
        elif block.language == "python":
            check_names(block, names)
    CHECKS.get(name(page), lambda names, printed: None)(names, capsys.readouterr().out)


def check_pipelines(names, printed):
    assert printed.count("vae.decode") >= 3
    assert str(names["plan"].peak_bytes) in printed
    assert torch.is_tensor(names["video"])
    assert type(vars(names["pipe"])["unet"]) is not StreamedModule  # restored


def check_models(names, printed):
    assert isinstance(names["streamed"], StreamedModule) and len(names["streamed"].plans) == 2
    assert printed.count("can't be met") == 1


def check_rehash(names, printed):
    stats = names["stats"]
    assert stats.full_steps == stats.skipped_steps == 2


def check_rules(names, printed):
    assert not names["plan"].barriers and names["plan"].groups


CHECKS = {
    "docs/pipelines.md": check_pipelines,
    "docs/models.md": check_models,
    "docs/rules.md": check_rules,
    "docs/step-rehash.md": check_rehash,
    "docs/tutorial.md": lambda names, printed: printed.count("vae.decode") >= 3 or pytest.fail(printed),
}
"""What is to be seen when a page's code has run."""


def check_names(block, names):
    """Every name of a block that is not run is bound, and what is read of a module or class exists."""
    tree = ast.parse(block.code)
    known = dict(names)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), block.where, "exec"), known)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            assert node.id in known or node.id in bound or hasattr(builtins, node.id), f"{block.where}: {node.id}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id not in bound:
            owner = known.get(node.value.id)
            if isinstance(owner, (ModuleType, type)):
                assert hasattr(owner, node.attr), f"{block.where}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("fxstream.optimise(pipe)", "fxstream.optimise"),
        ("video = pip(image)", "pip"),
        ("from diffusers import VideoPipeline", "VideoPipeline"),
    ],
)
def test_names_that_do_not_exist_are_found(code, problem):
    block = Block(PAGES[0], 1, "python", code, "a test")
    with pytest.raises((AssertionError, ImportError), match=problem):
        check_names(block, {**given(), "fxstream": fxstream})


@pytest.mark.parametrize("block", COMMANDS, ids=name)
@pytest.mark.usefixtures("small_world")
def test_commands(block, tmp_path, capsys):
    for written in blocks(block.page):  # a function that a command is pointed at stands in a file
        if title := re.match(r"# (\w+\.py)\n", written.code):
            (tmp_path / title[1]).write_text(written.code)
    for line in block.code.splitlines():
        words = shlex.split(line.replace("<(", "").replace(")", "").removeprefix("source "), comments=True)
        if words:
            check_command(block, words, capsys)


def check_command(block, words, capsys):
    """The command exists, with these options; one of fxstream's runs."""
    program, *rest = words[: words.index("|")] if "|" in words else words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        assert set(targets) <= makefile_targets(), block.where
    elif program == "pip":
        extras = [extra for word in rest for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")]
        assert rest[0] == "install" and set(extras) <= package()["optional-dependencies"].keys(), block.where
    else:
        assert program == "fxstream", f"{block.where}: what is {program}?"
        args = cli.parser().parse_args(rest)
        for target in args.targets(args):
            check(target)
        if not block.not_run:
            assert cli.main(small(rest)) == cli.OK, f"{block.where}: {capsys.readouterr().err}"


def small(words):
    """A command with a small model in the place of the catalogue's, at a small size."""
    sizes = {"--frames": "2", "--height": "64", "--width": "64"}
    made = [SMALL if word in NAMES else word for word in words]
    return [sizes.get(made[place - 1], word) for place, word in enumerate(made) if word != "--small"]


@cache
def makefile_targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@cache
def package():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_option_is_in_the_reference():
    """The tables of the command line's page have all options of each command, and none besides."""
    text = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    sections = dict(re.findall(r"^## fxstream (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    commands = next(action.choices for action in cli.parser()._actions if action.dest == "command")
    assert set(sections) == set(commands)
    shared = options_in(text.split("## fxstream")[0])
    for command, parser in commands.items():
        taken = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
        told = options_in(sections[command]) | shared
        assert taken - told == set(), command
        assert told - taken - {"--version"} == set(), command


def options_in(text):
    """Options that a table's first column names."""
    cells = re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
    return {option for cell in cells for option in re.findall(r"--[a-z]+", cell)}


def test_every_public_name_is_in_the_reference():
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    told = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert {f"fxstream.{public}" for public in fxstream.__all__} <= set(told)
    for path in told:
        module, _, attribute = path.removeprefix("fxstream.").rpartition(".")
        home = importlib.import_module(f"fxstream.{module}" if module else "fxstream")
        assert hasattr(home, attribute), path


def test_the_backends_options_are_told():
    from fxstream.compile.backend import OPTIONS

    told = (ROOT / "docs" / "torch-compile.md").read_text()
    assert set(re.findall(r"^- `(\w+)`:", told, re.MULTILINE)) == set(OPTIONS)
