"""Settings: the plain variables at the top of a script, a Python config file and --key=value flags on top.

    python train.py config/quickstart.py --batch_size=32

The config file runs first, in a namespace of its own; flags win over it. It is a Python program and runs with
your rights, so run only those that you have read. A setting has the type of its default, or that of its
annotation where it has one (`min_lr: float | None = None`).
"""

import ast
import difflib
import math
import sys
import traceback
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

# nanoGPT's config files run here: keys that we have no use for, and one that we say in two settings
UNUSED = {"wandb_log", "wandb_project", "wandb_run_name"}
DECAY_LR = {True: {"lr_schedule": "cosine"}, False: {"lr_schedule": "constant", "warmup_iters": 0}}

WORDS = {"None": None, "True": True, "true": True, "False": False, "false": False}


def configure(settings: dict[str, Any], argv: list[str] | None = None) -> dict[str, Any]:
    """Override a script's settings in place with a config file and flags.

    settings: the script's globals(), whose lower-case variables so far are its settings
    argv: the command line without the script's name; sys.argv[1:] where None
    Returns what was overridden. Raises SystemExit with one line that names the mistake (or 0 after --help).
    """
    argv = sys.argv[1:] if argv is None else argv
    known = read_settings(settings)
    if "--help" in argv or "-h" in argv:
        print(settings["__doc__"] or "", "Settings, each with its default:", sep="\n")
        for key, (kind, comment) in known.items():
            choices = f" [{', '.join(map(str, get_args(kind)))}]" if get_origin(kind) is Literal else ""
            print(f"  {f'--{key}={settings[key]!r}':38} {comment}{choices}".rstrip())
        raise SystemExit(0)
    kinds = {key: kind for key, (kind, _) in known.items()}
    given: dict[str, Any] = {}
    try:
        for path in [arg for arg in argv if not arg.startswith("-")]:
            given |= run_config_file(path, kinds)
        for flag in [arg for arg in argv if arg.startswith("-")]:
            key, equals, text = flag.removeprefix("--").partition("=")
            if not (flag.startswith("--") and equals):
                raise ValueError(f"flags are written --key=value, not {flag!r}")
            given |= override(key, text, kinds, is_text=True)
    except ValueError as error:
        message = " ".join(str(error).split())
        raise SystemExit(f"{Path(settings['__file__']).name}: {message}") from None
    if unused := [key for key in given if key in UNUSED]:
        print(f"{', '.join(unused)} passed over: there is no such logging here", file=sys.stderr)
    given = {key: value for key, value in given.items() if key not in UNUSED}
    settings.update(given)
    return given


def read_settings(settings: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """{name: (type, comment)} of the lower-case variables in a script's source, in its order."""
    source, known = Path(settings["__file__"]).read_text(encoding="utf-8"), {}
    lines = source.encode().split(b"\n")  # ast counts bytes
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            name, kind = ast.unparse(node.target), eval(ast.unparse(node.annotation), dict(settings))
        elif isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            kind = type(settings.get(name))
        else:
            continue
        if name in settings and name.islower() and not name.startswith("_"):
            known[name] = (kind, lines[node.end_lineno - 1][node.end_col_offset :].decode().lstrip("# "))
    return known


def run_config_file(path: str, kinds: dict[str, Any]) -> dict[str, Any]:
    """Run a config file and return the settings that it makes. Raises ValueError naming file and line."""
    namespace = {"__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
    except OSError as error:
        raise ValueError(f"no config file {path}: {error.strerror} (flags are written --key=value)") from None
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", None)  # a SyntaxError has its own
        raise ValueError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    given: dict[str, Any] = {}
    for key, value in namespace.items():
        if not key.startswith("_") and not isinstance(value, types.ModuleType):
            try:
                given |= override(key, value, kinds)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return given


def override(key: str, value: Any, kinds: dict[str, Any], is_text: bool = False) -> dict[str, Any]:
    """{key: value}, checked and of the wanted type; a key of nanoGPT's unchecked, or what it means here.

    is_text: a flag's text, read as the wanted type. Raises ValueError naming key, wanted type and value.
    """
    if key in UNUSED:
        return {key: value}
    decay_lr = key == "decay_lr" and "lr_schedule" in kinds
    if key not in kinds and not decay_lr:
        near = difflib.get_close_matches(key, kinds, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them all"
        raise ValueError(f"unknown setting {key!r}; {hint}")
    kind = bool if decay_lr else kinds[key]
    choices = get_args(kind) if get_origin(kind) is Literal else None
    wanted = {type(choice) for choice in choices} if choices else set(get_args(kind) or (kind,))
    if is_text:
        value = read_text(value, wanted)
    if type(value) is int and float in wanted and int not in wanted and abs(value) < 2**53:
        value = float(value)
    fits = type(value) in wanted and (not choices or value in choices)
    if not fits or type(value) is float and not math.isfinite(value):
        names = choices or sorted("None" if kind is type(None) else kind.__name__ for kind in wanted)
        raise ValueError(f"{key} wants {' or '.join(map(str, names))}, not {value!r}")
    return DECAY_LR[value] if decay_lr else {key: value}


def read_text(text: str, wanted: set[type]) -> Any:
    """A flag's text as a value of one of the wanted types; the text itself where it is none of them."""
    if text in WORDS and type(WORDS[text]) in wanted:
        return WORDS[text]
    for number in (int, float):
        if number in wanted:
            try:
                return number(text)
            except ValueError:
                pass
    return text
