"""A process that has imported PyTorch already, and runs our scripts in children of its own, one at a time.

Importing PyTorch, and its compiler, which every optimizer asks for, takes five seconds, and the tests start
train.py and sample.py some hundred times. A child of this process is a process like any other, with its own
memory, signals and exit; of our own modules nothing is imported before. conftest.py talks to it: for each
request on standard input, a JSON object in a line, the child answers on standard output with its process ID,
when its own streams are open, and this process with the child's exit status, as subprocess gives it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys

import numpy as np

IMPORTED = "tqdm torch torch._dynamo torch.nn.parallel safetensors.torch matplotlib.figure"
IMPORTED += " matplotlib.backends.backend_agg"


def become(request):
    """Make this child what Python is when it starts a script in a new process."""
    answers = os.dup(1)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # what the streams of this process know of their old files is wrong for the new ones, so they are new too
    for name in ("stdin", "stdout", "stderr"):
        path, mode = (request[name], "w") if name in request else (os.devnull, "r")
        number = getattr(sys, name).fileno()
        with open(path, mode) as file:
            os.dup2(file.fileno(), number)
        buffering = 1 if name == "stderr" else -1  # a line at a time, or Python's default
        setattr(sys, name, open(number, mode, buffering, closefd=False))
    os.write(answers, b"%d\n" % os.getpid())
    os.close(answers)
    sys.argv = request["argv"]
    sys.path[0] = os.path.dirname(request["argv"][0])
    np.random.seed()  # or all children would draw the same numbers
    signal.alarm(request["timeout"])


def main():
    for name in IMPORTED.split():
        importlib.import_module(name)
    gc.freeze()  # so that a child, when it ends, need not take apart what it has not made
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            become(request)
            runpy.run_path(request["argv"][0], run_name="__main__")
            return
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


if __name__ == "__main__":
    main()
