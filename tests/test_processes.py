"""Runs of several processes, on one machine and on two: they are the run of one process, and come back."""

import os
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
from conftest import REPO, TINY, metrics, read_until, run, start

TINY = TINY.split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TWO = ["--standalone", "--nproc_per_node=2"]
RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as the README says, with --max-restarts


def workers(torchrun):
    """Process IDs of a torchrun's workers, by rank."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid), "-f", "train.py"], capture_output=True)
    return sorted(int(pid) for pid in found.stdout.split())


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
    # gloo may wait for a connection five times as long as it is told
    for interface, works, seconds in (("veth0", True, 20), (None, False, 4)):
        folder = workdir / "out" / f"networks_{works}"
        flags = " ".join(two_nodes()).replace("127.0.0.1", two_networks[0]).split()
        args = [f"--out_dir={folder}", f"--dist_timeout={seconds}"]
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
