"""Settings: files, flags, types, and one clear line for each mistake."""

import re
import subprocess
import sys

import pytest
from conftest import REPO, run
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import configure

SCRIPT = '''"""A script."""
from typing import Literal
learning_rate = 1e-3  # the peak
max_iters = 10  # steps
warmup_iters = 5
out_dir = "out"  # a folder, not a # comment
bias = True  # biases
lr_schedule: Literal["cosine", "constant"] = "cosine"
compile: Literal["auto", True, False] = "auto"
min_lr: float | None = None  # None: a tenth
stride: int | None = None
dataset = "pydocs"
size: int | float = 1
'''


def configured(tmp_path, *args, config=None):
    (tmp_path / "script.py").write_text(SCRIPT)
    if config is not None:
        (tmp_path / "config.py").write_text(config)
        args = (str(tmp_path / "config.py"), *args)
    namespace = {"__file__": str(tmp_path / "script.py")}
    exec(SCRIPT, namespace)
    return configure(namespace, list(args)), namespace


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--learning_rate=1e-4", 1e-4),
        ("--learning_rate=3", 3.0),
        ("--max_iters=1_000", 1000),
        ("--out_dir=7", "7"),
        ("--out_dir=a=b", "a=b"),
        ("--bias=false", False),
        ("--bias=True", True),
        ("--compile=True", True),
        ("--compile=auto", "auto"),
        ("--lr_schedule=constant", "constant"),
        ("--min_lr=None", None),
        ("--min_lr=1", 1.0),
        ("--stride=4", 4),
        ("--size=4", 4),
        ("--size=4.0", 4.0),
    ],
)
def test_flag(tmp_path, flag, value):
    given, namespace = configured(tmp_path, flag)
    name = flag[2:].split("=")[0]
    assert given == {name: value} and type(given[name]) is type(value) and namespace[name] == value


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--learning_rat=1", ["learning_rat", "did you mean learning_rate"]),
        ("--xyzzy=1", ["xyzzy", "--help"]),
        ("--max_iters=1.5", ["max_iters", "int", "'1.5'"]),
        ("--max_iters=None", ["max_iters", "int", "'None'"]),
        ("--learning_rate=fast", ["learning_rate", "float", "'fast'"]),
        ("--learning_rate=nan", ["learning_rate", "float", "nan"]),
        ("--bias=1", ["bias", "bool", "'1'"]),
        ("--lr_schedule=cosin", ["lr_schedule", "cosine or constant"]),
        ("--compile=1", ["compile", "auto or True or False"]),
        ("--bias", ["--key=value"]),
        ("-bias=True", ["--key=value"]),
        ("nowhere.py", ["nowhere.py", "No such file"]),
        (".", ["Is a directory: '.'"]),
        ("a" * 300, ["File name too long"]),
        ("a\0b", ["null byte"]),
    ],
)
def test_mistaken_flag(tmp_path, flag, words):
    with pytest.raises(SystemExit) as error:
        configured(tmp_path, flag)
    line = str(error.value)
    assert line.startswith("script.py: ") and "\n" not in line
    assert all(word in line for word in words), line


def test_file_then_flags(tmp_path):
    config = (
        "import time\n_half = 4\nmax_iters = 2 * _half  # more\nlearning_rate = 1 / max_iters\nmin_lr = 0"
    )
    given, _ = configured(tmp_path, "--max_iters=9", config=config)
    assert given == {"max_iters": 9, "learning_rate": 0.125, "min_lr": 0.0}


@pytest.mark.parametrize(
    "config, words",
    [
        ("max_iter = 3", ["max_iter", "did you mean max_iters"]),
        ("max_iters = '3'", ["max_iters", "int", "'3'"]),
        ("max_iters = True", ["max_iters", "int", "True"]),
        ("bias = 1", ["bias", "bool"]),
        ("block = 16", ["block", "a helper's name begins with _"]),
        ("from math import sqrt\n\ndef schedule(step): pass", ["config.py", "sets nothing"]),
        ("max_iters: 3", ["sets nothing", "name = value"]),
        ("out_dir = 'x'\nmax_iters: 3", ["sets nothing", "name = value"]),
        ("max_iters = lambda: 3", ["max_iters", "int"]),
        ("def max_iters(): pass", ["max_iters", "int"]),
        ("import json\njson.loads('{')", ["config.py", "line 2", "JSONDecodeError"]),
        ("out_dir = ''", ["out_dir", "a path"]),
        ("out_dir = 'x'\nmax_iters = missing", ["config.py", "line 2", "NameError"]),
        ("max_iters = (", ["config.py", "line 1", "SyntaxError"]),
        ("max_iters = 3\nraise SystemExit", ["config.py, line 2", "SystemExit"]),
        (
            "max_iters = len(open('words.txt').read())",
            ["config.py, line 1", "FileNotFoundError"],
        ),
    ],
)
def test_mistaken_file(tmp_path, config, words):
    with pytest.raises(SystemExit) as error:
        configured(tmp_path, config=config)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_nanogpt_file(tmp_path, capsys):
    """Keys that have no use here are passed over in one line; its decay_lr is our lr_schedule."""
    config = "wandb_log = False\nwandb_project = 'owt'\nmax_iters = 600000\ndecay_lr = False\n"
    given, namespace = configured(tmp_path, config=config)
    assert given == {
        "max_iters": 600000,
        "lr_schedule": "constant",
        "warmup_iters": 0,
    }
    assert namespace["dataset"] == "openwebtext"  # nanoGPT's default, but a resumed run keeps its own
    said = capsys.readouterr().err
    assert "wandb_run_name" not in said
    assert said.count("\n") == 1 and "wandb_log, wandb_project" in said and "openwebtext" in said


def test_nanogpt_flags(tmp_path, capsys):
    """As in a file, but a flag says nothing of the dataset."""
    given, namespace = configured(tmp_path, "--wandb_log=True", "--wandb_run_name=x", "--max_iters=3")
    assert given == {"max_iters": 3} and namespace["dataset"] == "pydocs"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "wandb_log, wandb_run_name passed over" in said


@settings(max_examples=300, deadline=None)
@given(flag=st.text(), key=st.sampled_from(["max_iters", "learning_rate", "bias", "compile", "min_lr"]))
def test_any_input_ends_in_a_value_or_a_line(tmp_path_factory, flag, key):
    path = tmp_path_factory.getbasetemp()
    for argument in (flag, f"--{key}={flag}"):
        try:
            configured(path, argument)
        except SystemExit:
            pass


@settings(max_examples=200, deadline=None)
@given(config=st.text() | st.builds("{} = {}".format, st.sampled_from(["bias", "min_lr", "x"]), st.text()))
def test_any_config_file_ends_in_a_value_or_a_line(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp()
    (path / "any.py").write_bytes(config.encode("utf-8", "surrogatepass"))
    try:
        configured(path, str(path / "any.py"))
    except SystemExit:
        pass


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_lists_settings_without_torch(tmp_path, script):
    """Not a timing: what would make it slow is not imported."""
    done = run("-X", "importtime", script, "--help", cwd=tmp_path)
    assert "--out_dir='out'" in done.stdout and "--seed=1337" in done.stdout
    assert re.search(r"^  --dtype='auto' .* \[auto, float32, bfloat16, float16\]$", done.stdout, re.M)
    bare = [line for line in done.stdout.splitlines() if re.fullmatch(r"  --\w+=\S+", line)]
    assert not bare, bare  # each has a comment, which a setting of several lines would lose
    assert "torch" not in done.stderr and "numpy" not in done.stderr


def test_help_can_be_read_by_head(tmp_path):
    """Whose end closes the pipe while most is still to come."""
    command = f"set -o pipefail; {sys.executable} {REPO / 'train.py'} --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("Train a GPT")


@pytest.mark.parametrize("config", sorted(path.name for path in (REPO / "config").glob("*.py")))
def test_config_files_hold_known_settings(config):
    namespace = {"__file__": str(REPO / "train.py"), "__name__": "train"}
    source = (REPO / "train.py").read_text().split("if __name__")[0]
    exec(compile(source, "train.py", "exec"), namespace)
    assert configure(namespace, [str(REPO / "config" / config)])
