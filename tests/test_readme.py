"""The README's changes and Python programs, typed in as they stand there."""

import re
import shutil

from conftest import REPO, SCRIPTS, TINY, metrics, run

README = (REPO / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


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
    _, sums, program = blocks("python")
    (tmp_path / "sums.py").write_text(sums)
    python("sums.py")
    args = [*TINY.split(), "--activation=silu", "--position=sine", "--optimizer=nadam", "--max_iters=60"]
    for dataset in ("bytes", "sums"):
        python("train.py", *args, f"--dataset={dataset}", f"--out_dir=out/{dataset}")
        losses = metrics(tmp_path / "out" / dataset, "val_loss")
        assert losses[60] < losses[0] - 0.3
    (tmp_path / "program.py").write_text(program.replace("out/quickstart", "out/bytes"))
    assert python("program.py").startswith("The for statement")
