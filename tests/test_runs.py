"""Runs that go wrong, with real processes: kills, signals, lost peers, memory; and on many processes."""

import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FORKS, REPO, TINY, Forked, metrics, run

TINY = TINY.split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--standalone", "--nproc_per_node=2"]
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says, with --max-restarts


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


def start(*command, cwd, env=None):
    """A process that prints to a pipe, and errors too, in the folder cwd: a program's, or train.py's."""
    if command[0] == "train.py":
        command = (sys.executable, REPO / "train.py", *command[1:])
        if FORKS and env is None:  # as in conftest.run
            return Forked(*command[1:], cwd=cwd)
    return subprocess.Popen(
        [str(arg) for arg in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )


def workers(torchrun):
    """Process IDs of a torchrun's workers, by rank."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid), "-f", "train.py"], capture_output=True)
    return sorted(int(pid) for pid in found.stdout.split())


def read_until(process, beginning):
    """What a process says up to a line that begins so."""
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(f"no {beginning!r} in:\n{said}")


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


# -- any number of processes and machines --------------------------------------------------------------------

SHARED = [*TINY, "--gradient_accumulation_steps=4", "--max_iters=100", "--eval_iters=3"]


@pytest.fixture(scope="session")
def alone(workdir):
    """out/alone: one process's run, which any number of processes must repeat."""
    run("train.py", *SHARED, "--out_dir=out/alone", cwd=workdir)
    return workdir / "out" / "alone"


def assert_close(run, alone, rel=1e-4):
    for key in ("loss", "val_loss", "train_loss"):
        many, one = metrics(run, key), metrics(alone, key)
        assert {step: many.get(step) for step in one} == pytest.approx(one, rel=rel)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_same_run_on_any_number_of_processes(workdir, alone, processes):
    """The one-process losses and evaluations; half-way on, another number of processes takes over."""
    folder = workdir / "out" / f"on_{processes}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"]
    done = run(*torchrun, *SHARED, f"--out_dir={folder}", "--max_iters=50", cwd=workdir)
    assert done.stdout.count("step 50:") == 1  # one process speaks
    assert metrics(folder, "val_loss")[0] == pytest.approx(metrics(alone, "val_loss")[0], rel=1e-6)
    other = ["train.py"] if processes == 4 else [*torchrun[:3], "--nproc_per_node=4", "train.py"]
    run(*other, "--init_from=resume", "--max_iters=100", "--eval_iters=3", f"--out_dir={folder}", cwd=workdir)
    assert_close(folder, alone)


THREADS_AT_THE_END = """
import os, runpy, sys
sys.path[0] = {repo!r}
runpy.run_path({repo!r} + "/train.py", run_name="__main__")
for thread in os.listdir("/proc/self/task"):
    print("thread", open(f"/proc/self/task/{{thread}}/comm").read().strip())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="lists the threads of /proc")
@pytest.mark.parametrize("compiled", [True, False])
def test_no_thread_of_the_process_group_outlives_the_run(workdir, tmp_path, compiled):
    """One that meets the end of the interpreter aborts the process, now and then, after all is done."""
    (tmp_path / "train.py").write_text(THREADS_AT_THE_END.format(repo=str(REPO)))
    args = [*SHARED, "--max_iters=3", f"--compile={compiled}", f"--out_dir={tmp_path / 'out'}"]
    done = run(*TORCHRUN[1:], *TWO, tmp_path / "train.py", *args, cwd=workdir)
    assert done.stdout.count("thread") >= 2 and "gloo" not in done.stdout, done.stdout


def test_muon_on_two_processes(workdir):
    args = ["train.py", *SHARED, "--optimizer=muon", "--max_iters=40"]
    run(*args, "--out_dir=out/muon_1", cwd=workdir)
    run("-m", "torch.distributed.run", *TWO, *args, "--out_dir=out/muon_2", cwd=workdir)
    assert_close(workdir / "out" / "muon_2", workdir / "out" / "muon_1", rel=1e-3)  # bfloat16 rounds


@pytest.mark.parametrize("to", ["torchrun", "worker"])
def test_a_signal_stops_all_processes_together(workdir, alone, to):
    folder = workdir / "out" / f"signal_{to}"
    with start(*TORCHRUN, *TWO, REPO / "train.py", *SHARED, f"--out_dir={folder}", cwd=workdir) as process:
        read_until(process, "iter 7:")
        os.kill(process.pid if to == "torchrun" else workers(process)[1], signal.SIGTERM)
        said = process.stdout.read()
    assert to == "torchrun" or process.returncode == 0  # torchrun itself makes a failure of a signal to it
    step = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    command = re.search(rf"^stopped after {step} steps, saved; go on with: torchrun (.*)$", said, re.M)
    assert 8 <= step < 100 and not re.search(rf"^iter {step}:", said, re.M)
    run(*TORCHRUN[1:], *shlex.split(command[1]), cwd=workdir)  # the command as it is written
    assert_close(folder, alone)


def two_nodes():
    """torchrun's flags in the README's command for several machines, for this one twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    flags = re.search(r"^torchrun (--nnodes=2 .*) train.py", readme, re.M)[1]
    return flags.replace("FIRST_HOST:29500", f"127.0.0.1:{port}").replace("node=4", "node=1").split()


def test_two_machines(workdir, alone):
    folder = workdir / "out" / "nodes"
    command = [*TORCHRUN, *two_nodes(), REPO / "train.py", *SHARED, f"--out_dir={folder}"]
    with start(*command, cwd=workdir) as one, start(*command, cwd=workdir) as two:
        said = one.communicate()[0], two.communicate()[0]
    assert one.returncode == two.returncode == 0, said
    assert sum("iter 0:" in text for text in said) == 1
    assert_close(folder, alone)


@pytest.fixture
def two_networks():
    """Two hosts on a network of their own, whose names lead to themselves, as Ubuntu has it: their names."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("network namespaces need root, and the programs ip, unshare and hostname")
    names = [f"gpt{os.getpid()}{letter}" for letter in "ab"]
    try:
        for i, name in enumerate(names):
            if subprocess.run(["ip", "netns", "add", name]).returncode:
                pytest.skip("this machine does not let us make network namespaces")
            hosts = Path("/etc/netns", name, "hosts")  # ip netns exec puts it in place of /etc/hosts
            hosts.parent.mkdir(parents=True)
            other = f"10.77.0.{2 - i} {names[1 - i]}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{other}\n")
        link = ["ip", "link", "add", "veth0", "netns", names[0]]
        subprocess.run([*link, "type", "veth", "peer", "veth0", "netns", names[1]], check=True)
        for i, name in enumerate(names, 1):
            for command in (f"addr add 10.77.0.{i}/24 dev veth0", "link set veth0 up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def test_two_machines_whose_names_lead_to_themselves(workdir, alone, two_networks):
    """gloo finds the network by the host's name; README says how to name the interface instead."""
    assert "GLOO_SOCKET_IFNAME=eth0 torchrun" in (REPO / "README.md").read_text(encoding="utf-8")
    for interface, works in (("veth0", True), (None, False)):
        folder = workdir / "out" / f"networks_{works}"
        flags = " ".join(two_nodes()).replace("127.0.0.1", two_networks[0]).split()
        args = [f"--out_dir={folder}", "--dist_timeout=20"]
        processes = []
        for name in two_networks:
            command = [
                "unshare",
                "--uts",
                "sh",
                "-c",
                f'hostname {name} && exec "$@"',
                "sh",
                *TORCHRUN,
                *flags,
            ]
            command += [REPO / "train.py", *SHARED, *args]
            env = {"GLOO_SOCKET_IFNAME": interface} if interface else {}
            processes.append(start("ip", "netns", "exec", name, *command, cwd=workdir, env=env))
        said = [process.communicate()[0] for process in processes]
        assert all((process.returncode == 0) == works for process in processes), said
        if works:
            assert_close(folder, alone)
        else:
            lines = [line for text in said for line in text.splitlines() if line.startswith("train.py: ")]
            assert any("GLOO_SOCKET_IFNAME" in line or "connect" in line for line in lines), said


@pytest.mark.parametrize("victim", [0, 1])
def test_two_machines_come_back_after_either_loses_its_process(workdir, alone, victim):
    folder = workdir / "out" / f"nodes_{victim}"
    lines = folder / "metrics.jsonl"
    args = ["--max-restarts=3", REPO / "train.py", *SHARED, "--init_from=auto", f"--out_dir={folder}"]
    command = [*TORCHRUN, *two_nodes(), *args]
    with (
        start(*command, cwd=workdir, env=RESTARTS) as one,
        start(*command, cwd=workdir, env=RESTARTS) as two,
    ):
        deadline = time.monotonic() + 120
        while not lines.exists() or lines.read_text().count("\n") < 27:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(workers((one, two)[victim])[0], signal.SIGKILL)
        said = one.communicate()[0], two.communicate()[0]
    assert one.returncode == two.returncode == 0, said
    assert any(re.search(r"^from step [1-9]\d* to 100", text, re.M) for text in said), said
    assert_close(folder, alone)


def test_torchrun_brings_a_killed_run_back(workdir, alone):
    folder = workdir / "out" / "elastic"
    args = ["--max-restarts=3", REPO / "train.py", *SHARED, "--init_from=auto", f"--out_dir={folder}"]
    with start(*TORCHRUN, *TWO, *args, cwd=workdir, env=RESTARTS) as process:
        for beginning, victim in (("iter 25:", 1), ("iter 45:", 0)):
            read_until(process, beginning)
            os.kill(workers(process)[victim], signal.SIGKILL)
        said = process.stdout.read()
    assert process.returncode == 0, said
    assert re.findall(r"^from step [1-9]\d* to 100", said, re.M), said
    assert_close(folder, alone)


def test_another_runs_folder_is_not_resumed(trained, workdir):
    """However often torchrun tries."""
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    args = ["--standalone", "--max-restarts=1", REPO / "train.py", *TINY, f"--out_dir={trained}"]
    done = run(*TORCHRUN[1:], *args, cwd=workdir, check=False)
    assert done.returncode and done.stderr.count("holds a run: add --init_from=resume") == 2
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before


@pytest.mark.parametrize("number, victim", [(signal.SIGSTOP, 0), (signal.SIGKILL, 1)])
def test_a_lost_process_ends_the_run(workdir, number, victim):
    """One hangs, or is gone: the other says so, once, and how to go on."""
    folder = workdir / "out" / f"lost_{number}"
    args = [*SHARED, "--max_iters=100000", "--dist_timeout=10", f"--out_dir={folder}"]
    with start(*TORCHRUN, *TWO, REPO / "train.py", *args, cwd=workdir) as process:
        read_until(process, "iter 7:")
        pid = workers(process)[victim]
        os.kill(pid, number)
        said = read_until(
            process, "train.py: another process died, or was silent for dist_timeout=10 seconds"
        )
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGCONT)  # or torchrun would wait half a minute for it
        after = process.stdout.read()
    assert process.returncode and f"go on from {folder}/ckpt.pt with --init_from=resume" in said
    assert 'train.py", line' not in said + after  # the one traceback is torchrun's own


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
