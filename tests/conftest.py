"""What the tests share: the scripts run as a user runs them, in a folder of their own, on real text."""

import functools
import http.server
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
MIRROR = os.environ.get("PLAINGPT_MIRROR", "")
if MIRROR and "://" not in MIRROR:
    MIRROR = os.environ["PLAINGPT_MIRROR"] = str(Path(MIRROR).resolve())  # the scripts run in other folders
# What started the tests may ignore these two, as nohup and a script's & do, and the scripts would inherit it.
# They do not inherit a handler, so the tests go on ignoring them by one that does nothing.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)
os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts: tiny models are faster so, and bits depend on it
needs_mirror = pytest.mark.skipif(
    not MIRROR, reason="PLAINGPT_MIRROR is not set: nothing is downloaded in tests"
)

SCRIPTS = {"prepare.py", "train.py", "sample.py"}
FORKS = sys.platform == "linux"  # elsewhere a process that has imported PyTorch may not fork, or nothing can

# a model that trains in seconds; the flags of every run that does not say otherwise
TINY = (
    "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --learning_rate=3e-3 --warmup_iters=5"
)
TINY += (
    " --eval_interval=20 --eval_iters=2 --log_interval=1 --device=cpu --sample_prompt= --lr_decay_iters=60"
)


def run(*args, cwd, check=True, env=None, timeout=300):
    """Run Python with args, in which a script of ours goes by its name; check: it must succeed."""
    args = [str(REPO / arg) if arg in SCRIPTS else str(arg) for arg in args]
    # env may hold what Python and PyTorch read at their start, so it needs a start
    if FORKS and env is None and args[0] in (str(REPO / "train.py"), str(REPO / "sample.py")):
        done = run_forked(args, cwd, timeout)
    else:
        done = subprocess.run(
            [sys.executable, *args],
            cwd=cwd,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def pytest_collection_modifyitems(items):
    """The files that take longest begin first, so that no worker of pytest's is late with one of them."""
    longest = {"test_borders.py", "test_processes.py", "test_runs.py", "test_unbreakable.py"}
    items.sort(key=lambda item: item.path.name not in longest)


@functools.cache
def forked():
    """The process of tests/forked.py, which ends with its standard input; each worker of pytest's has one."""
    command = [sys.executable, REPO / "tests" / "forked.py"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


class Forked:
    """A script in a process that need not import PyTorch; see forked.py, which runs one at a time.

    It has what the tests need of subprocess.Popen. stderr: the path of a file; None: it joins stdout
    """

    def __init__(self, *argv, cwd, stderr=None, timeout=300):
        self.returncode = None
        with tempfile.TemporaryDirectory() as folder:
            pipe = f"{folder}/pipe"
            os.mkfifo(pipe)
            request = {"argv": [str(arg) for arg in argv], "cwd": str(cwd), "env": dict(os.environ)}
            request |= {"stdout": pipe, "stderr": str(stderr or pipe), "timeout": timeout}
            forked().stdin.write(json.dumps(request).encode() + b"\n")
            self.stdout = open(pipe, encoding="utf-8")  # this waits until the script opens it too
            self.pid = int(forked().stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stdout.close()
        self.wait()

    def poll(self):
        if self.returncode is None and select.select([forked().stdout], [], [], 0)[0]:
            self.returncode = int(forked().stdout.readline())
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([forked().stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run_forked(argv, cwd, timeout):
    """Run a script as subprocess.run does, but Forked."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder, "stderr")
        with Forked(*argv, cwd=cwd, stderr=errors, timeout=timeout) as process:
            said = process.stdout.read()
        return subprocess.CompletedProcess(argv, process.returncode, said, errors.read_text("utf-8"))


def start(*command, cwd, env=None):
    """A process that prints to a pipe, and errors too, in the folder cwd: a program's, or train.py's."""
    if command[0] == "train.py":
        command = (sys.executable, REPO / "train.py", *command[1:])
        if FORKS and env is None:  # as in run
            return Forked(*command[1:], cwd=cwd)
    return subprocess.Popen(
        [str(arg) for arg in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, **(env or {})},
    )


def read_until(process, beginning):
    """What a process says up to a line that begins so."""
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith(beginning):
            return said
    raise AssertionError(f"no {beginning!r} in:\n{said}")


def run_limited(kind, limit, script, *args, cwd, env=None):
    """Run a script of ours under a limit of the resource module's, in bytes."""
    path = str(REPO / script)
    code = "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += f"resource.setrlimit(resource.{kind}, ({limit}, {limit}));"
    code += f"sys.path.insert(0, {str(REPO)!r}); sys.argv[0] = {path!r};"
    code += f"runpy.run_path({path!r}, run_name='__main__')"
    return run("-c", code, *args, cwd=cwd, check=False, env=env)


def run_on_a_full_disk(limit, script, *args, cwd, env=None):
    """Run a script of ours whose files may not grow past limit bytes, which stands for a full disk."""
    return run_limited("RLIMIT_FSIZE", limit, script, *args, cwd=cwd, env=env)


def refused(script, *args, cwd, env=None):
    """Run a script that must fail; returns its one line on standard error."""
    done = run(script, *args, cwd=cwd, check=False, env=env)
    assert done.returncode not in (0, -9), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: "), done.stderr
    return lines[0]


def metrics(folder, key):
    """{step: value} of the lines of a run's metrics.jsonl that have the key."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="session")
def reference():
    return json.loads((REPO / "tests" / "reference.json").read_text())


@pytest.fixture(scope="session")
def verdict():
    if not MIRROR:
        pytest.skip("PLAINGPT_MIRROR is not set")
    path = "raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt"
    return Path(MIRROR, path).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A folder with data/pydocs; runs of different tests take different out_dirs in it."""
    path = tmp_path_factory.mktemp("work")
    run("prepare.py", cwd=path)
    return path


@pytest.fixture(scope="session")
def trained(workdir):
    """out/trained: 60 steps of the tiny model on pydocs, with dropout."""
    run("train.py", *TINY.split(), "--max_iters=60", "--dropout=0.1", "--out_dir=out/trained", cwd=workdir)
    return workdir / "out" / "trained"


CONTENT = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves files with ranges, CONTENT where it knows none; breaks off half-way while there are breaks."""

    breaks, requests, files = 0, [], {}

    def do_GET(self):
        type(self).requests.append((self.path, self.headers.get("Range")))
        content = self.files.get(self.path, CONTENT)
        if "missing" in self.path or content is None:
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if type(self).breaks and len(content) > 100_000:
            type(self).breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.breaks, Server.requests, Server.files = 0, [], {}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
