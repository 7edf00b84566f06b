"""Settings: the plain variables at the top of a script, a Python config file and --key=value flags on top.

    python train.py config/quickstart.py --batch_size=32

The config file runs first, in a namespace of its own; flags win over it. It is a Python program and runs with
your rights, so run only config files that you have read. A setting has the type of its default, or of its
annotation if it has one (`min_lr: float | None = None`).
"""

# Config files are compiled with this too: so Python 3.14 keeps their annotations as the older ones do.
from __future__ import annotations

import difflib
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args, get_origin

# nanoGPT's config files run here. These keys are passed over.
UNUSED = ("wandb_log", "wandb_project", "wandb_run_name")
# This is what nanoGPT's decay_lr means here.
DECAY_LR = {
    True: {"lr_schedule": "cosine"},
    False: {"lr_schedule": "constant", "warmup_iters": 0},
}

# Settings that are paths, in which ~ is the home folder.
PATHS = {"out_dir", "init_from"}

# Words that a flag may have as its value.
WORDS = {"None": None, "True": True, "true": True, "False": False, "false": False}


class UserError(ValueError):
    """A mistake of the user: one line that says what is wrong and what to do."""


def configure(settings, argv=None):
    """Override a script's settings in place with a config file and flags.

    settings: the script's globals(), whose first variables are its settings
    argv: the command line without the script's name; None means sys.argv[1:]
    Returns what was overridden. Raises SystemExit with one line that names the mistake, or 0 after --help.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = read_settings(settings)
    if "--help" in argv or "-h" in argv:
        # in one piece, because its reader may be head, which closes the pipe early
        sys.stdout.write(help_text(settings, known))
        sys.exit()
    given = {}
    try:
        # files come first, so that flags win wherever they stand on the line
        for argument in sorted(argv, key=lambda argument: argument.startswith("-")):
            if argument.startswith("-"):
                given |= read_flag(argument, known)
            else:
                given |= run_config_file(argument, known)
                if given.keys() & UNUSED:
                    settings["dataset"] = "openwebtext"  # nanoGPT's default
    except UserError as error:
        # the text of an error may have several lines
        message = " ".join(str(error).split())
        raise SystemExit(f"{Path(settings['__file__']).name}: {message}") from None
    unused = [key for key in UNUSED if given.pop(key, None) is not None]
    if unused:
        print(
            f"{', '.join(unused)} passed over: there is no such logging here "
            "(a file that has them, and no dataset, means openwebtext, as in nanoGPT)",
            file=sys.stderr,
        )
    settings.update(given)
    return given


def read_flag(flag, known):
    """{key: value} of --key=value. Raises UserError."""
    key, equals, text = flag.removeprefix("--").partition("=")  # the text may hold more = signs
    if not (flag.startswith("--") and equals):
        raise UserError(f"flags are written --key=value, not {flag!r}")
    return override(key, text, known, is_text=True)


# name = default  # comment; or name: type = default  # comment
SETTING = re.compile(r"([a-z]\w*)(?:: (.+?))? = .*?(?:  # (.*))?")


def read_settings(settings):
    """{name: (type, comment)} of a script's settings, in the order of its source.

    Settings are the lines above `if __name__` that match SETTING, so each must stand on one line.
    """
    source = Path(settings["__file__"]).read_text(encoding="utf-8")
    known = {}
    for line in source.split("\nif __name__")[0].splitlines():
        found = SETTING.fullmatch(line)
        if found:
            name, annotation, comment = found.groups(default="")
            kind = eval(annotation, settings) if annotation else type(settings[name])
            known[name] = (kind, comment)
    return known


def help_text(settings, known):
    """The script's docstring, and a line for each setting with its default, comment and choices."""
    lines = [settings["__doc__"] or "", "Settings, each with its default:"]  # python -OO has no docstring
    for key, (kind, comment) in known.items():
        if get_origin(kind) is Literal:
            comment += f" [{', '.join(map(str, get_args(kind)))}]"
        flag = f"--{key}={settings[key]!r}"
        lines.append(f"  {flag:38} {comment}".rstrip())
    return "\n".join([*lines, ""])


def run_config_file(path, known):
    """Run a config file and return the settings that it makes. Raises UserError, with file and line."""
    try:
        source = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # the latter: no path can have such characters
        raise UserError(f"{error} (flags are written --key=value)") from None
    namespace = {"__file__": path}  # not the script's
    try:
        exec(compile(source, path, "exec"), namespace)
    except BaseException as error:  # a config file is a program and can raise any error, or end itself
        # the frame after this one is the config file's; there is none if it could not be compiled
        line = getattr(error.__traceback__.tb_next, "tb_lineno", getattr(error, "lineno", None))
        raise UserError(f"{path}, line {line}: {error!r}") from None
    given = {}
    try:
        for key, value in namespace.items():
            # a helper's name begins with _; imports, functions and classes, which have names, are none either
            if key in known or not (key.startswith("_") or hasattr(value, "__name__")):
                given |= override(key, value, known)
        # of name: value, Python keeps only an annotation
        if not given or namespace.get("__annotations__", {}).keys() - namespace.keys():
            raise UserError("a line of it sets nothing; settings are written name = value")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return given


def override(key, value, known, is_text=False):
    """{key: value}, checked and converted; for decay_lr of nanoGPT, the settings that it means here.
    nanoGPT's keys that have no use come back as they are; configure takes them out.

    known: what read_settings returns; is_text: whether value is the text of a flag, still to be converted
    Raises UserError, with the key, the wanted type and the value.
    """
    if key in UNUSED:
        return {key: value}
    if key == "decay_lr" and "lr_schedule" in known:
        return DECAY_LR[convert(key, value, bool, is_text)]
    if key not in known:
        near = difflib.get_close_matches(key, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists them all"
        if not is_text:
            hint += " (a helper's name begins with _)"
        raise UserError(f"unknown setting {key!r}; {hint}")
    value = convert(key, value, known[key][0], is_text)
    if key in PATHS:
        value = os.path.expanduser(value)
        if not value:
            raise UserError(f"{key} wants a path, not nothing")
    return {key: value}


def convert(key, value, kind, is_text):
    """A value as the type kind wants it: bool, int, float, str, a union with None, or one of a Literal."""
    wanted = get_args(kind) or (kind,)  # the types of a union, or the choices of a Literal
    names = [getattr(one, "__name__", str(one)).removesuffix("Type") for one in wanted]
    if is_text:
        value = read_text(value, wanted)
    if get_origin(kind) is Literal:
        fits = repr(value) in map(repr, wanted)  # 1 equals True, but is not what is wanted
    else:
        # a whole number can stand for a float if that loses no digit
        if type(value) is int and float in wanted and int not in wanted and abs(value) < 2**53:
            value = float(value)
        # types are compared exactly, because isinstance takes True for an int
        fits = type(value) in wanted and (type(value) is not float or math.isfinite(value))
    if not fits:
        raise UserError(f"{key} wants {' or '.join(names)}, not {value!r}")
    return value


def read_text(text, wanted):
    """A flag's text as one of the wanted values or types, or the text itself if it fits none of them."""
    word = WORDS.get(text, text)
    if word in wanted or type(word) in wanted:
        return word
    for number in (int, float):  # in this order, so that 3 becomes an int if both are wanted
        with suppress(ValueError):  # convert refuses what stays text
            if number in wanted:
                return number(text)
    return text
