"""The README's changes and Python programs, typed in as they stand there."""

import re
import shutil

from conftest import REPO, SCRIPTS, TINY, metrics, run

README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_what_is_to_be_read_is_there():
    """Each function and class that the reading order names, in the script that it names last before."""
    order = README.split("## How to read it")[1].split("\n## ")[0]
    script = None
    found = 0
    for name in re.findall(r"`([\w./]+)`", order):
        if name.endswith(".py"):
            script = REPO / name
        else:
            last = name.split(".")[-1]
            assert re.search(rf"^ *(def|class) {last}\b", script.read_text(encoding="utf-8"), re.M), name
            found += 1
    assert found > 15


def test_five_changes_and_a_program(tmp_path):
    """All of them together, in a copy of the scripts."""
    for name in SCRIPTS | {"model.py", "configurator.py"}:
        shutil.copy(REPO / name, tmp_path)
    for part in re.split("^--- ", "".join(blocks("diff")), flags=re.M)[1:]:
        name, changes = part.split("\n", 1)
        text = (tmp_path / name).read_text(encoding="utf-8")
        for hunk in changes.split("@@\n"):
            old, new = ("".join(re.findall(rf"^[ {sign}](.*\n)", hunk, re.M)) for sign in "-+")
            assert text.count(old) == 1, f"{name}:\n{old}"
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def python(*args):
        return run(tmp_path / args[0], *args[1:], cwd=tmp_path).stdout

    python("prepare.py", "--tokenizer=byte", "--name=bytes")
    sums, program = blocks("python")
    (tmp_path / "sums.py").write_text(sums)
    python("sums.py")
    args = [*TINY.split(), "--activation=silu", "--position=sine", "--optimizer=nadam", "--max_iters=60"]
    for dataset in ("bytes", "sums"):
        python("train.py", *args, f"--dataset={dataset}", f"--out_dir=out/{dataset}")
        losses = metrics(tmp_path / "out" / dataset, "val_loss")
        assert losses[60] < losses[0] - 0.3
    (tmp_path / "program.py").write_text(program.replace("out/quickstart", "out/bytes"))
    assert python("program.py").startswith("The for statement")
