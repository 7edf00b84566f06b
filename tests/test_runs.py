"""Runs that go wrong, with real processes: kills, signals, numbers that overflow."""

import math
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO, TINY, metrics, read_until, run, run_limited, start

TINY = TINY.split()


def same_run(a, b):
    """Whether two runs ended with the same bits and wrote the same numbers, but for times."""
    for name in ("ckpt.pt", "best.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (a, b))
        # of names, which assert_close does not take, those of the optimizer's state must be the same
        names = [
            [group.pop("param_names") for opt in saved.get("optimizer", []) for group in opt["param_groups"]]
            for saved in (one, other)
        ]
        assert names[0] == names[1]
        for key in one.keys() - {"seconds", "config", "model_args", "meta", "measured_by"}:
            torch.testing.assert_close(one[key], other[key], atol=0, rtol=0)
    return all(
        metrics(a, key) == metrics(b, key) for key in ("loss", "val_loss", "train_loss", "grad_norm", "lr")
    )


# -- kills ---------------------------------------------------------------------------------------------------

RESUMED = [*TINY, "--dropout=0.2", "--gradient_accumulation_steps=2", "--max_iters=150"]


def test_a_killed_run_resumes_to_the_same_bits(workdir):
    """kill -9 at some step past a checkpoint, then resume without a word on the settings."""
    run("train.py", *RESUMED, "--out_dir=out/whole", cwd=workdir)
    killed = workdir / "out" / "killed"
    with start("train.py", *RESUMED, f"--out_dir={killed}", cwd=workdir) as process:
        read_until(process, "iter 27:")
        process.kill()
    step = torch.load(killed / "ckpt.pt", weights_only=True)["step"]
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 28, "lo')  # a line that the kill cut
    done = run("train.py", "--init_from=resume", f"--out_dir={killed}", cwd=workdir)
    assert 20 <= step < 150 and f"iter {step}:" in done.stdout and f"iter {step - 1}:" not in done.stdout
    assert same_run(workdir / "out" / "whole", killed)


def test_twenty_kills_leave_no_trace(workdir):
    """kill -9 at 20 random moments, every other one inside a save; the end is the unbroken run's."""
    args = [*RESUMED, "--max_iters=300", "--eval_interval=6", "--data_order=epoch"]
    args.append("--optimizer=muon")
    run("train.py", *args, "--out_dir=out/unbroken", cwd=workdir)
    folder = workdir / "out" / "twenty"
    partial = [str(folder / f"{name}.pt.partial") for name in ("best", "ckpt")]
    draw, kills, in_saves = random.Random(20), 0, 0
    while kills < 20:
        resume = ["--init_from=resume"] if (folder / "ckpt.pt").exists() else args
        with start("train.py", *resume, f"--out_dir={folder}", cwd=workdir) as process:
            for _ in range(draw.randint(1, 9)):
                read_until(process, "iter ")
            if kills % 2:
                while process.poll() is None and not any(map(os.path.exists, partial)):
                    pass
            else:
                time.sleep(draw.random() / 50)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        kills, in_saves = kills + 1, in_saves + any(map(os.path.exists, partial))
    assert in_saves >= 5
    run("train.py", "--init_from=resume", f"--out_dir={folder}", cwd=workdir)
    assert same_run(workdir / "out" / "unbroken", folder)
    files = {"ckpt.pt", "best.pt", "metrics.jsonl", "loss.png"}
    assert {path.name for path in folder.iterdir()} == files


def test_best_weights_are_written_as_soon_as_there_is_room(workdir):
    """A folder where the new file begins stands for a full disk; the loss stays what it was."""
    folder = workdir / "out" / "room"
    (folder / "best.pt.partial").mkdir(parents=True)
    args = [*TINY, "--learning_rate=0", "--eval_interval=1", "--max_iters=20", f"--out_dir={folder}"]
    with start("train.py", *args, cwd=workdir) as process:
        read_until(process, f"train.py: {folder}/best.pt not written")
        (folder / "best.pt.partial").rmdir()
        process.stdout.read()
    assert process.returncode == 0 and torch.load(folder / "best.pt", weights_only=True)["step"] > 0


# -- signals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(workdir, number):
    folder = f"out/signal_{number}"
    with start("train.py", *RESUMED, f"--out_dir={folder}", cwd=workdir) as process:
        read_until(process, "iter 7:")
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == 0
    step = torch.load(workdir / folder / "ckpt.pt", weights_only=True)["step"]
    assert 8 <= step < 150 and f"stopped after {step} steps" in said.splitlines()[-1]
    run("train.py", *said.splitlines()[-1].split("python train.py ")[1].split(), cwd=workdir)
    if not (workdir / "out" / "whole").exists():
        run("train.py", *RESUMED, "--out_dir=out/whole", cwd=workdir)
    assert same_run(workdir / "out" / "whole", workdir / folder)


def test_a_signal_saves_though_nobody_reads(workdir):
    folder = workdir / "out" / "unread"
    args = [*RESUMED, "--max_iters=100000", "--eval_interval=100000", f"--out_dir={folder}"]
    with start("train.py", *args, cwd=workdir) as process:
        read_until(process, "iter 7:")
        process.stdout.close()
        process.terminate()
        process.wait(timeout=60)
    assert process.returncode == 0 and torch.load(folder / "ckpt.pt", weights_only=True)["step"] >= 8


def test_patience_counts_each_evaluation_once_though_signals_come_before_them(workdir):
    """A stop at a step that is due for an evaluation leaves it to the resumed run, which counts it."""
    args = [*TINY, "--learning_rate=0", "--eval_interval=1", "--patience=12", "--max_iters=1000"]
    folder = workdir / "out" / "patient"
    for at in (2, 5):
        resume = ["--init_from=auto", f"--out_dir={folder}"]
        with start("train.py", *args, *resume, cwd=workdir) as process:
            read_until(process, f"iter {at}:")
            process.terminate()
            process.wait(timeout=60)
    done = run("train.py", *args, *resume, cwd=workdir)
    assert "no better validation loss for 12 evaluations" in done.stdout
    assert list(metrics(folder, "val_loss")) == list(range(13))


def test_a_kill_between_the_two_checkpoints_costs_nothing(workdir):
    """ckpt.pt is there and best.pt is not: the resumed run evaluates again, and writes it."""
    args = [*RESUMED, "--max_iters=40", "--out_dir=out/between"]
    run("train.py", *args, cwd=workdir)
    folder = workdir / "out" / "between"
    best, lines = torch.load(folder / "best.pt", weights_only=True), (folder / "metrics.jsonl").read_text()
    (folder / "best.pt").unlink()
    run("train.py", *args, "--init_from=auto", cwd=workdir)
    again = torch.load(folder / "best.pt", weights_only=True)
    assert all(torch.equal(tensor, again["model"][name]) for name, tensor in best["model"].items())
    assert (folder / "metrics.jsonl").read_text() == lines  # not the same evaluation twice


@pytest.mark.parametrize("init_from", ["scratch", "auto", "resume"])
def test_a_run_that_another_process_made_meanwhile_is_not_overwritten(workdir, tmp_path, init_from):
    """Between a look into the folder and its lock, a slow process may stand still for minutes."""
    out = workdir / "out" / f"meanwhile_{init_from}"
    args = [*TINY, "--max_iters=3", f"--out_dir={out}"]
    if init_from == "resume":
        run("train.py", *args, cwd=workdir)
    (tmp_path / "slow.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(REPO)!r})\nimport prepare\n"
        "load = prepare.load_dataset\n"
        "def slow(*args):\n"
        "    print('looks', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    return load(*args)\n"
        "prepare.load_dataset = slow\n"
        f"sys.argv[0] = {str(REPO / 'train.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, tmp_path / "slow.py", *args, f"--init_from={init_from}", "--max_iters=9"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=workdir, **pipes) as process:
        assert process.stdout.readline() == "looks\n"
        run("train.py", *args, "--max_iters=5", "--init_from=auto", cwd=workdir)
        before = (out / "ckpt.pt").read_bytes()
        _, err = process.communicate("go\n", timeout=60)
    assert process.returncode == 1 and "another process" in err and (out / "ckpt.pt").read_bytes() == before


@pytest.mark.parametrize("pause", [0, 2])
def test_a_second_signal_exits_at_once(workdir, pause):
    args = [*TINY, "--gradient_accumulation_steps=100000", "--max_iters=2", f"--out_dir=out/second_{pause}"]
    with start("train.py", *args, cwd=workdir) as process:
        read_until(process, "step 0:")
        process.terminate()
        read_until(process, "train.py: saves and stops")
        time.sleep(pause)
        assert process.poll() is None  # in the middle of a step of minutes
        process.terminate()
        assert "iter 0:" not in process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM


# -- numbers and memory --------------------------------------------------------------------------------------


def test_float16_passes_over_the_steps_that_overflow(workdir):
    """A scale far too large: each step that overflows halves it and changes nothing else."""
    folder = workdir / "out" / "half"
    args = ["--dtype=float16", "--max_iters=20", "--log_interval=7", f"--out_dir={folder}"]
    args.append("--optimizer=muon")
    run("train.py", *TINY, *args, cwd=workdir)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    assert checkpoint["scaler"]["scale"] == 2**16
    checkpoint["scaler"]["scale"] = 2.0**30
    torch.save(checkpoint, folder / "ckpt.pt")
    run("train.py", "--init_from=resume", "--max_iters=57", f"--out_dir={folder}", cwd=workdir)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    skipped = 30 - round(math.log2(checkpoint["scaler"]["scale"]))
    assert 5 < skipped < 25 and checkpoint["scaler"]["scale"] == 2.0 ** (30 - skipped)
    assert checkpoint["optimizer"][0]["state"][0]["step"] == 57 - skipped
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


def test_out_of_memory_on_a_cpu_is_one_line(workdir):
    """A matrix of 480 GB; the limit is for machines that promise more memory than they have."""
    args = [*TINY, "--n_embd=200000", "--out_dir=out/huge"]
    done = run_limited("RLIMIT_AS", 2**36, "train.py", *args, cwd=workdir)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("train.py: out of memory: halve batch_size=4"), done.stderr
    assert not (workdir / "out" / "huge").exists()


def test_weights_that_are_not_finite_are_never_saved(workdir):
    """Not by a signal either, while no line of the log has looked at a loss."""
    args = [*TINY, "--learning_rate=1e30", "--grad_clip=0", "--warmup_iters=0", "--max_iters=1000000"]
    args += ["--log_interval=1000000", "--eval_interval=1000000", "--out_dir=out/unseen"]
    with start("train.py", *args, cwd=workdir) as process:
        read_until(process, "iter 0:")
        process.terminate()
        said = process.stdout.read()
    assert process.returncode == 1
    assert re.search(r"^train.py: iter \d+: loss nan, .* learning rate .*out/unseen/ckpt.pt", said, re.M), (
        said
    )
    good = torch.load(workdir / "out" / "unseen" / "ckpt.pt", weights_only=True)
    assert good["step"] == 0 and all(tensor.isfinite().all() for tensor in good["model"].values())


def test_no_step_waits_for_the_garbage_collector(workdir):
    """Once the loop has begun, garbage is collected at evaluations alone: steps 0, 10 and 20."""
    code = (
        "import gc, runpy, sys; seen = []\n"
        "gc.callbacks.append(lambda phase, _: seen.append(gc.isenabled()) if phase == 'start' else None)\n"
        f"sys.path.insert(0, {str(REPO)!r}); sys.argv[0] = {str(REPO / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(seen.count(False), gc.get_freeze_count() > 100_000)"
    )
    args = [*TINY, "--max_iters=20", "--eval_interval=10", "--out_dir=out/garbage"]
    assert run("-c", code, *args, cwd=workdir).stdout.splitlines()[-1] == "3 True"
