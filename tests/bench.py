"""Measurements, not tests: run by hand, on an otherwise idle machine.

    python tests/bench.py train config/train_shakespeare_char_cpu.py --peer=../nanoGPT --steps=300 --rounds=4
    python tests/bench.py train config/quickstart.py --to_loss=1.2 --plot=curve.png
    python tests/bench.py sample --peer=../nanoGPT
    python tests/bench.py tokenize --mb=1000
    python tests/bench.py ladder --plot=assets/ladder.png
    python tests/bench.py gpu --peer=../nanoGPT

Rounds alternate ours and the peer, so that a machine that drifts slows both; medians, ranges and ratios are
printed, and a line of JSON. The dataset must be prepared here.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from configurator import override, read_settings, run_config_file  # noqa: E402


def our_settings(config: str, flags: list[str]) -> dict:
    """What a config file and flags make of train.py's settings, defaults included."""
    namespace = {"__file__": str(REPO / "train.py")}
    exec((REPO / "train.py").read_text().split("if __name__")[0], namespace)
    known = read_settings(namespace)
    settings = {name: namespace[name] for name in known} | run_config_file(config, known)
    for flag in flags:
        key, value = flag.removeprefix("--").split("=", 1)
        settings |= override(key, value, known, is_text=True)
    return settings


# in the place of `python script`: what PyTorch had allocated on the GPU at most becomes the last line
WITH_GPU_MEMORY = """
import atexit, os, runpy, sys, torch
del sys.argv[0]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
atexit.register(lambda: print(torch.cuda.max_memory_allocated()))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def finished(command: list, cwd: Path | None = None, gpu: bool = False) -> tuple[str, float]:
    """A Python command's standard output and its peak memory in bytes, on the GPU if it runs there."""
    if gpu:
        command = [command[0], "-c", WITH_GPU_MEMORY, *command[1:]]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(part) for part in command], cwd=cwd, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{command} failed: {(err.seek(0), err.read())[1][-2000:]}")
        said = (out.seek(0), out.read())[1]
        if gpu:
            return said, int(said.splitlines()[-1])
        return said, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def train_ours(config: str, own: list[str], seed: int, flags: list[str]) -> dict:
    """ms of a step, (seconds of training, whole-split loss) of each evaluation, and bytes at the peak."""
    with tempfile.TemporaryDirectory() as out:
        flags = [*own, *flags, f"--seed={seed}", "--log_interval=1", "--sample_prompt=", f"--out_dir={out}"]
        on_gpu = "--device=cuda" in flags
        _, memory = finished([sys.executable, REPO / "train.py", config, *flags], gpu=on_gpu)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    ms = [1000 * (after - before) for before, after in zip([0, *seconds], seconds, strict=False)]
    return {
        "ms": median_ms(ms),
        "curve": [(e["seconds"], e["val_loss"]) for e in lines if "val_loss" in e],
        "memory": memory,
    }


def median_ms(ms: list[float]) -> float:
    """The first fifth, in which the machine warms up, left out."""
    return statistics.median(ms[len(ms) // 5 :])


# put in the place of nanoGPT's estimate_loss: the whole split, its own time left out, and no checkpoint
PEER_EVALUATION = """
began = evaluated = 0.0
@torch.no_grad()
def estimate_loss():
    global began, evaluated
    started = time.time()
    began = began or started
    data = torch.from_numpy(np.fromfile(os.path.join(data_dir, "val.bin"), dtype=np.uint16).astype(np.int64))
    n = (len(data) - 1) // block_size
    x, y = data[: n * block_size].view(n, -1).to(device), data[1 : n * block_size + 1].view(n, -1).to(device)
    model.eval()
    with ctx:
        batches = zip(x.split(12), y.split(12))
        loss = sum(model(a, b)[1].item() * len(a) for a, b in batches) / n
    model.train()
    print("full", started - began - evaluated, loss)
    evaluated += time.time() - started
    return {"train": math.inf, "val": math.inf}
"""


def train_peer(peer: Path, settings: dict, own: list[str], seed: int, flags: list[str]) -> dict:
    """As train_ours, of a nanoGPT checkout at the same settings, on the same data."""
    source, folder = Path("data", settings["dataset"]), peer / "data" / settings["dataset"]
    meta = json.loads((source / "meta.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin"):
        shutil.copy(source / name, folder / name)
    with open(folder / "meta.pkl", "wb") as file:  # all that its train.py reads of it
        pickle.dump({"vocab_size": meta["vocab_size"]}, file)
    code = (peer / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    code = code.replace("@torch.no_grad()\ndef estimate_loss", f"{PEER_EVALUATION}\ndef its_own_estimate")
    same = "dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias"
    same += " learning_rate weight_decay beta1 beta2 grad_clip warmup_iters max_iters"
    known = {name: settings[name] for name in same.split()}
    known["lr_decay_iters"] = settings["lr_decay_iters"] or settings["max_iters"]
    known["min_lr"] = settings["learning_rate"] / 10 if settings["min_lr"] is None else settings["min_lr"]
    flags = [*(f"--{name}={value}" for name, value in known.items()), *own, *flags, "--log_interval=1"]
    flags = [*flags, "--always_save_checkpoint=False", f"--out_dir={tempfile.gettempdir()}"]
    with tempfile.NamedTemporaryFile("w", dir=peer, suffix=".py") as script:
        script.write(code)
        script.flush()
        said, memory = finished([sys.executable, script.name, *flags], peer, "--device=cuda" in flags)
    curve = [(float(t), float(loss)) for t, loss in re.findall(r"^full (\S+) (\S+)$", said, re.M)]
    return {
        "ms": median_ms([float(ms) for ms in re.findall(r"time ([\d.]+)ms", said)]),
        "curve": curve,
        "memory": memory,
    }


# dense bfloat16 (V100, T4: float16) tensor FLOP/s, as the makers give them
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "L4": 121e12}
PEAK_FLOPS |= {"RTX 4090": 165e12, "RTX 5090": 210e12, "MI300X": 1307e12, "V100": 125e12, "T4": 65e12}
# bytes of GPU memory a second, as the makers give them; A100: the one of 80 GB
BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8e12}


def of_card(table: dict[str, float], gpu: str) -> float | None:
    """A table's entry for the GPU that PyTorch calls so, as in "NVIDIA H100 80GB HBM3"."""
    return next((value for name, value in table.items() if re.search(rf"\b{name}\b", gpu)), None)


def utilization(settings: dict, tokens_per_second: float, device: str) -> str:
    """Model FLOPs utilization where the peak of the device is known, else FLOP/s."""
    import torch

    from model import GPT, GPTConfig

    meta = json.loads(Path("data", settings["dataset"], "meta.json").read_text(encoding="utf-8"))
    names = {field.name for field in fields(GPTConfig)} & settings.keys()
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=meta["vocab_size"], **{name: settings[name] for name in names}))
    gpu = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    peak = of_card(PEAK_FLOPS, gpu)
    flops = tokens_per_second * model.flops_per_token()
    if device == "cuda" and peak:
        return f"MFU {100 * flops / peak:.1f}% of {gpu}"
    return f"{flops / 1e9:,.0f} GFLOP/s (the peak of {gpu} is not known here)"


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def bench_train(args: argparse.Namespace) -> None:
    """Time a step, or with --to_loss whole runs up to a loss, of ours and of nanoGPT in turns."""
    flags = [f"--device={args.device}", f"--compile={args.device == 'cuda'}"]
    flags += [f"--dataset={args.dataset}"] if args.dataset else []
    runners = {}  # name: (settings, train(seed, flags))
    for i, pairs in enumerate(args.set or [[]]):
        name = args.names[i] if i < len(args.names) else " ".join(["plainGPT", *pairs])
        own = [*flags, *(f"--{pair}" for pair in pairs)]
        train = functools.partial(train_ours, args.config, own)
        runners[name] = our_settings(args.config, own), train
    if args.peer:
        own = [*flags, *(f"--{pair}" for pair in args.peer_set)]
        settings = our_settings(args.peer_config or args.config, own)
        runners["nanoGPT"] = settings, functools.partial(train_peer, Path(args.peer).resolve(), settings, own)
    elif args.to_loss == "peer":
        sys.exit("--to_loss=peer needs --peer, a checkout of nanoGPT")
    results: dict[str, list[dict]] = {name: [] for name in runners}
    for seed in range(1337, 1337 + args.rounds):
        for name, (settings, train) in runners.items():
            length = [f"--max_iters={args.steps}", "--eval_interval=1000000", "--eval_iters=1"]
            if args.to_loss:
                val = Path("data", settings["dataset"], "val.bin").stat().st_size // 2
                whole = math.ceil(val / settings["block_size"] / settings["batch_size"])
                every = max(1, settings["max_iters"] // args.evaluations)
                length = [f"--eval_interval={every}", f"--eval_iters={whole}"]
            results[name].append(train(seed, length))
    for name, (settings, _) in runners.items():
        tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
        ms = [run["ms"] for run in results[name]]
        speed = 1000 * tokens / statistics.median(ms)
        memory = max(run["memory"] for run in results[name]) / 1e9
        print(f"{name:9} {spread(ms)} ms a step, {speed:,.0f} tokens/s, {memory:.2f} GB, ", end="")
        print(utilization(settings, speed, args.device))
    rivals = results.get("nanoGPT")
    for name, runs in results.items() if rivals and not args.to_loss else ():
        ratios = [theirs["ms"] / ours["ms"] for ours, theirs in zip(runs, rivals, strict=True)]
        print(f"{name:9} steps {spread(ratios)} times as fast as nanoGPT")
    if args.to_loss:
        report_losses(results, args.to_loss)
    if args.plot:
        plot_curves(results, args.plot)
    print(json.dumps({"bench": "train", **vars(args), "run": None, "results": results}))


def report_losses(results: dict[str, list[dict]], goal: str) -> None:
    """goal: a loss, or "peer": the final loss of nanoGPT's run of the same round."""
    rivals = results.get("nanoGPT")
    for name, runs in results.items():
        final = [run["curve"][-1] for run in runs]
        print(f"{name:9} ends at {spread([loss for _, loss in final], 4)} after ", end="")
        print(f"{spread([seconds for seconds, _ in final], 1)} s")
        if name == "nanoGPT":
            continue
        seconds, shares, then = [], [], []
        for i, run in enumerate(runs):
            wanted = rivals[i]["curve"][-1][1] if goal == "peer" else float(goal)
            seconds.append(next((t for t, loss in run["curve"] if loss <= wanted), math.inf))
            if rivals:
                limit = rivals[i]["curve"][-1][0]
                shares.append(seconds[-1] / limit)
                then.append(min(loss for t, loss in run["curve"] if t <= limit))
        print(
            f"  reaches {'that of nanoGPT' if goal == 'peer' else goal} after {spread(seconds, 1)} s", end=""
        )
        print(f", {spread(shares)} of its time; within its full time {spread(then, 4)}" if rivals else "")


def plot_curves(results: dict[str, list[dict]], path: str) -> None:
    """Validation losses over the seconds of training: a color for each contender, a line for each round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="seconds of training", ylabel="loss on the whole validation split (nats)"
    )
    for c, (name, runs) in enumerate(results.items()):
        for i, run in enumerate(runs):
            axes.plot(
                *zip(*run["curve"], strict=True),
                color=f"C{c}",
                marker=".",
                label="" if i else textwrap.fill(name, 44),
            )
    axes.set_ylim(top=2.6)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


LADDER = {  # what each idea of GPT adds to the one before, at equal steps; heads of 32
    "bigram": "--n_layer=0 --tie_weights=False --learning_rate=1e-2",
    "one head": "--n_layer=1 --n_head=1 --n_embd=32",
    "four heads": "--n_layer=1",
    "four layers": "",
    "dropout 0.1": "--dropout=0.1",
    "Muon": "--optimizer=muon --learning_rate=5e-3 --lr_schedule=linear --min_lr=0",
    "Muon, modern": "--optimizer=muon --learning_rate=5e-3 --lr_schedule=linear --min_lr=0 --position=rope"
    " --qk_norm=True --activation=relu2 --init=zero --tie_weights=False",
}


def bench_ladder(args: argparse.Namespace) -> None:
    """Train each rung, print its whole-split validation loss, and draw all curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss on the whole validation split (nats)")
    for name, flags in LADDER.items():
        common = [f"--max_iters={args.steps}", f"--eval_interval={args.steps // 10}", "--eval_iters=150"]
        run = train_ours(args.config, ["--device=cpu", *flags.split()], 1337, common)
        steps = [i * (args.steps // 10) for i in range(len(run["curve"]))]
        seconds, loss = run["curve"][-1]
        axes.plot(steps, [loss for _, loss in run["curve"]], marker=".", label=f"{name}, {loss:.3f}")
        print(f"{name:14} {loss:.4f} after {seconds:.0f} s", flush=True)
    axes.set_ylim(top=3.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.plot, dpi=120)


def generators(args: argparse.Namespace) -> dict:
    """{name: (model, generate(idx, n))} of one GPT-2: ours in each --dtype, others in the first of them."""
    import torch
    import transformers

    from model import GPT, GPTConfig, load_checkpoint
    from prepare import weights_path
    from sample import optimize_for_generation

    torch.manual_seed(0)
    if args.init_from == "random":
        checkpoint = {"model_args": asdict(GPTConfig(vocab_size=50257))}
        checkpoint["model"] = GPT(GPTConfig(vocab_size=50257)).state_dict()
    else:
        checkpoint = load_checkpoint(weights_path(args.init_from))
    config = GPTConfig(**checkpoint["model_args"])
    dtypes, models = args.dtype.split(","), {}

    def ours(dtype, compile):
        model = GPT.from_checkpoint(checkpoint).to(args.device, getattr(torch, dtype))
        optimize_for_generation(model, compile)
        return model, lambda idx, n: model.generate(idx, n, top_k=200, vocab_size=config.vocab_size)

    def transformers_model():
        sizes = {"vocab_size": config.vocab_size, "n_positions": config.block_size, "n_embd": config.n_embd}
        c = transformers.GPT2Config(**sizes, n_layer=config.n_layer, n_head=config.n_head)
        model = transformers.GPT2LMHeadModel(c).eval().to(args.device, getattr(torch, dtypes[0]))
        model.generation_config.eos_token_id = None
        options = {"do_sample": True, "top_k": 200, "pad_token_id": 0}
        return model, lambda idx, n: model.generate(
            idx, max_new_tokens=n, attention_mask=torch.ones_like(idx), **options
        )

    def nanogpt():
        model = peer_model(args.peer, config).eval().to(args.device, getattr(torch, dtypes[0]))
        return model, lambda idx, n: model.generate(idx, n, top_k=200)

    for dtype in dtypes:
        for compile in (False, True) if args.compile else (False,):
            name = f"plainGPT {dtype}{' compiled' * compile}"
            models[name] = functools.partial(ours, dtype, compile)
    models[f"transformers {dtypes[0]}"] = transformers_model
    if args.peer:
        models[f"nanoGPT {dtypes[0]}"] = nanogpt
    return models


def peer_model(peer: str, config: Any) -> Any:
    """nanoGPT's model of our configuration, from a checkout of it."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(peer, "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    same = "block_size vocab_size n_layer n_head n_embd dropout bias"
    with contextlib.redirect_stdout(None):
        return module.GPT(module.GPTConfig(**{name: getattr(config, name) for name in same.split()}))


def token_times(model: Any, generate: Callable, idx: Any, n: int) -> list[float]:
    """Seconds to the first token, and from each to the next, by when the model is called."""
    times: list[float] = []

    def note(*_: Any) -> None:
        if idx.is_cuda:
            import torch

            torch.cuda.synchronize()
        times.append(time.perf_counter())

    hook = model.transformer.wte.register_forward_pre_hook(note)  # called once for a token by all of them
    generate(idx, n + 1)
    hook.remove()
    return [after - before for before, after in zip(times, times[1:], strict=False)]


def bench_sample(args: argparse.Namespace) -> None:
    import torch

    makers = generators(args)
    if args.only:  # a process of its own, for its peak memory
        model, generate = makers[args.only]()
        generate(torch.randint(1000, (8, 900), device=args.device), 8)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # Linux alone
        print(torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * int(peak[1]))
        return
    models, results = {name: make() for name, make in makers.items()}, []
    mine = models[next(iter(models))][0]
    if mine.config.block_size < 900 + args.tokens or mine.config.vocab_size < 1000:
        sys.exit("bench.py sample measures up to 900 tokens of prompt; take a model of GPT-2's size")
    weights = sum(p.numel() for name, p in mine.named_parameters() if "wpe" not in name)
    if args.device == "cpu":
        block = torch.ones(2**27)  # 0.5 GB, more than any cache
        reads = [timed(lambda: torch.mv(block.view(-1, 1024), block[:1024])) for _ in range(5)]
        speed = 4 * len(block) / statistics.median(reads) / 1e9
        print(f"memory is read at {speed:.1f} GB/s; a token needs {weights / 1e6:.1f}M weights")
    print(
        f"{'':28} {'batch':>6} {'context':>8} {'first token, s':>15} {'tokens/s a sequence':>20} {'GB/s':>6}"
    )
    for batch in (1, 8):
        for context in (8, 256, 900):
            idx = torch.randint(1000, (batch, context), device=args.device)
            first: dict[str, list[float]] = {name: [] for name in models}
            each: dict[str, list[float]] = {name: [] for name in models}
            for i in range(args.rounds + 1):
                for name, (model, generate) in models.items():
                    n = 3 if "nanoGPT" in name else args.tokens  # it computes the whole context for each
                    times = token_times(model, generate, idx, n)
                    if i > 0:  # the first round warms up
                        first[name].append(times[0])
                        each[name] += times[1:]
            for name in models:
                seconds, token = statistics.median(first[name]), statistics.median(each[name])
                read = weights * (4 if "float32" in name else 2) / token / 1e9
                print(f"{name:28} {batch:6} {context:8} {seconds:15.3f} {1 / token:20.1f} {read:6.1f}")
                results.append([name, batch, context, seconds, 1 / token])
    memory = {}
    for name in models:
        said, _ = finished([sys.executable, *sys.argv, "--only", name])
        memory[name] = int(said.split()[-1])
        print(f"{name:28} {memory[name] / 1e9:.2f} GB at the peak: batch 8 after 900 tokens, alone")
    print(json.dumps({"bench": "sample", **vars(args), "run": None, "results": results, "memory": memory}))


def loss_past_the_context(model: Any, ids: Any, slide: int) -> float:
    """Mean loss of tokens whose context is full, when it moves on by slide tokens at once.

    ids: (tokens,) int64. Then each context begins at a multiple of slide, and its last slide places predict.
    """
    import torch
    import torch.nn.functional as F

    size = model.config.block_size
    starts = range(0, len(ids) - size, slide)
    losses = []
    with torch.no_grad():
        for some in range(0, len(starts), 16):
            places = torch.tensor(starts[some : some + 16])[:, None] + torch.arange(size)
            logits = model(ids[places], all_logits=True)[0][:, -slide:]
            targets = ids[places + 1][:, -slide:]
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def bench_slide(args: argparse.Namespace) -> None:
    """Speed within the context and past it, and the loss, when a full context moves on by more or less."""
    import torch

    from model import GPT, GPTConfig, load_checkpoint
    from prepare import load_dataset, weights_path
    from sample import optimize_for_generation

    ids = None
    torch.manual_seed(0)
    if args.init_from == "random":
        model = GPT(GPTConfig(vocab_size=50257)).eval()
    else:
        checkpoint = load_checkpoint(weights_path(args.init_from))
        model = GPT.from_checkpoint(checkpoint)
        val = load_dataset(checkpoint["meta"]["dataset"], model.config.block_size)[1]
        ids = torch.tensor(val[: args.score].astype("int64"))
    optimize_for_generation(model, False)
    size = model.config.block_size
    rates: dict[int, list[float]] = {}
    for _ in range(args.rounds):  # in turns; 0 stands for the rate within the context
        for slide in (0, 1, size // 8, size // 4, size // 2):
            idx = torch.zeros(1, size - args.tokens if slide == 0 else size + 1, dtype=torch.int64)
            # whole turns, so that each pays for its computations of the cache
            n = args.tokens if slide == 0 else max(1, args.tokens // slide) * slide
            n = 4 if slide == 1 else n
            model.generate(idx, 1)
            start = time.perf_counter()
            model.generate(idx, n, slide=max(1, slide))
            taken = time.perf_counter() - start
            if slide == 0:  # without the prompt, which is as long for one token
                start = time.perf_counter()
                model.generate(idx, 1)
                taken -= time.perf_counter() - start
                n -= 1
            rates.setdefault(slide, []).append(n / taken)
    within = statistics.median(rates[0])
    print(f"{'slide':>10} {'tokens/s':>10} {'of the rate within':>20} {'loss':>8}")
    for slide, values in rates.items():
        rate = statistics.median(values)
        loss = f"{loss_past_the_context(model, ids, slide):.4f}" if ids is not None and slide else ""
        print(f"{slide or 'within':>10} {rate:10.1f} {rate / within:20.2f} {loss:>8}", flush=True)
    print(json.dumps({"bench": "slide", **vars(args), "run": None, "rates": rates}))


# -- a GPU ---------------------------------------------------------------------------------------------------

GPT2_SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "1558M": (48, 25, 1600)}
# seconds for each part of bench gpu; what one does not need, the next may take
GPU_SECONDS = {"train": 240, "sample": 115, "baby": 125}
GPU_TRAIN = [("124M", 12), ("124M", 64), ("355M", 16)]  # sizes and windows a micro-batch, of 1024 tokens
GPU_SAMPLE = ["124M", "1558M"]


def gpt2_config(size: str, **others: Any) -> Any:
    from model import GPTConfig

    n_layer, n_head, n_embd = GPT2_SIZES[size]
    return GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, **others)


def training_step(model: Any, optimizers: list, x: Any, y: Any) -> Callable:
    """A function that does what train.py does in a step of one micro-batch, or nanoGPT's train.py."""
    import torch

    compiled = torch.compile(model)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            logits, loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


def time_gpu_training(size: str, rows: int, peer: str | None) -> Iterator[dict]:
    """A row of figures of ours; then, in turns with nanoGPT, of both. Compiled, in bfloat16.

    Without biases, as nanoGPT's train.py has it. The tokens are random and on the GPU from the start.
    """
    import torch

    from model import GPT

    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")  # as both do, in other words
    config = gpt2_config(size, bias=False)
    x, y = torch.randint(50257, (2, rows, config.block_size), device="cuda")
    with torch.device("meta"):
        tflop = GPT(config).flops_per_token() / 1e12
    steps, counts, seconds, figures = {}, {}, {}, {}

    def add(name):
        """Compile a contender's step, and see what memory it takes beside what was there before."""
        before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        if name == "nanoGPT":
            model = peer_model(peer, config).to("cuda")
            with contextlib.redirect_stdout(None):
                optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")]
        else:
            with torch.device("cuda"):
                model = GPT(config)
            optimizers = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95))
        figures[name] = {"name": name, "size": size, "rows": rows, "tflop_a_token": tflop}
        steps[name] = training_step(model, optimizers, x, y)
        run_steps(name, 1)
        figures[name]["first_step_s"] = time.perf_counter() - started
        torch.cuda.reset_peak_memory_stats()  # compiling is over
        run_steps(name, 3)
        figures[name]["memory"] = torch.cuda.max_memory_allocated() - before
        counts[name] = max(3, round(1.5 / run_steps(name, 3)))
        seconds[name] = []

    def run_steps(name, n):
        """Seconds of a step, the mean of n."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(n):
            steps[name]()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / n

    def turn(name):
        torch.cuda.empty_cache()  # the other's activations have other shapes
        run_steps(name, 2)
        seconds[name].append(run_steps(name, counts[name]))
        speeds = [rows * config.block_size / each for each in seconds[name]]
        return figures[name] | {"tokens_per_second": speeds}

    add("plainGPT")
    if peer:
        yield turn("plainGPT")  # should the time be over before the other is compiled
        seconds["plainGPT"].clear()
        add("nanoGPT")
    for _ in range(3):
        measured = [turn(name) for name in steps]
    yield from measured


def time_gpu_generation(size: str, _peer: str | None) -> Iterator[dict]:
    """A row of figures of sample.py's loop for one sample in bfloat16: step by step from Python, then as
    sample.py does it, with a CUDA graph, and of the small size compiled as well.
    """
    import torch

    from model import GPT
    from sample import optimize_for_generation

    torch.manual_seed(1337)
    with torch.device("cuda"):  # drawn there, or 1558M would take a minute
        model = GPT(gpt2_config(size, vocab_size=50257)).eval().to(torch.bfloat16)
    # each token reads all weights but the position embeddings, of which it takes one row
    weights = sum(p.nbytes for name, p in model.named_parameters() if "wpe" not in name)
    idx = torch.randint(50257, (1, 16), device="cuda")
    generator = torch.Generator("cuda").manual_seed(1337)
    for name in ("eager", "graph", "compiled") if size == "124M" else ("eager", "graph"):
        if name != "eager":
            optimize_for_generation(model, name == "compiled")
        speeds, starts = [], []
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):  # the first warms up, and compiles
            times = [time.perf_counter()]
            for tokens in model.generate_stream(idx, 256, 0.8, 200, None, generator, 50256, 50257):
                tokens[:, 0].tolist()  # as sample.py takes them
                times.append(time.perf_counter())
            starts.append(times[16] - times[0])
            speeds.append((len(times) - 17) / (times[-1] - times[16]))
        yield {
            "name": name,
            "size": size,
            "tokens_per_second": speeds[1:],
            "bytes_a_token": weights,
            "first_16_tokens_s": starts,
            "memory": torch.cuda.max_memory_allocated(),
        }


def lines_until(deadline: float, command: list, number: int) -> Iterator[str]:
    """A process's lines as they come. At the deadline it gets the signal of that number; 20 s later it ends.

    Its errors go to our standard error.
    """
    command = [str(part) for part in command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    ) as process:

        def end():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the processes that compile for it too

        left = max(0, deadline - time.monotonic())
        timers = [threading.Timer(left, process.send_signal, [number]), threading.Timer(left + 20, end)]
        for timer in timers:
            timer.start()
        yield from process.stdout
        process.wait()
        for timer in timers:
            timer.cancel()
    if process.returncode:
        print(f"ended with {process.returncode}: {' '.join(command[1:])}", flush=True)


def gpu_row(row: dict, gpu: str) -> str:
    """A line of the table; adds to the row what follows from the card's peaks."""
    speed = statistics.median(row["tokens_per_second"])
    line = f"{row['size']:>6} {row['name']:9} "
    if "rows" in row:
        row["tflops"] = speed * row["tflop_a_token"]
        line += f"{row['rows']:3} x 1024 {spread(row['tokens_per_second'], 0):>30} tokens/s "
        line += f"{row['tflops']:6.1f} TFLOP/s"
        if peak := of_card(PEAK_FLOPS, gpu):
            row["share_of_peak"] = row["tflops"] * 1e12 / peak
            line += f", {row['share_of_peak']:5.1%} of peak"
        line += f", first step after {row['first_step_s']:.0f} s"
    else:
        line += f"{spread(row['tokens_per_second'], 1):>30} tokens/s"
        if bandwidth := of_card(BANDWIDTH, gpu):
            row["share_of_bytes_bound"] = speed * row["bytes_a_token"] / bandwidth
            line += f", {row['share_of_bytes_bound']:5.1%} of {bandwidth / row['bytes_a_token']:.0f}"
        starts = row["first_16_tokens_s"]
        line += f", 16 tokens after {starts[0]:.1f} s, then {starts[-1]:.2f} s"
    return f"{line}, {row['memory'] / 2**30:.2f} GiB"


def run_baby(deadline: float) -> dict | None:
    """train.py on the baby GPT, as its config has it; its best validation loss and its times."""
    config = "config/train_shakespeare_char.py"
    if not Path("data/shakespeare_char/meta.json").exists():
        print("data/shakespeare_char is not prepared: no baby GPT", flush=True)
        return None
    with tempfile.TemporaryDirectory() as out:
        flags = ["--device=cuda", "--sample_prompt=", f"--out_dir={out}"]
        started = time.perf_counter()
        for line in lines_until(
            deadline, [sys.executable, REPO / "train.py", REPO / config, *flags], signal.SIGTERM
        ):
            if line.startswith(("step ", "stopped")):
                print(f"{time.perf_counter() - started:5.0f} s, {line}", end="", flush=True)
        wall = time.perf_counter() - started
        path = Path(out, "metrics.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    evaluations = [line for line in lines if "val_loss" in line]
    if not evaluations:
        return None
    best = min(evaluations, key=lambda line: line["val_loss"])
    training = [line for line in lines if "loss" in line]
    speeds = [line["tokens_per_second"] for line in training[len(training) // 5 :]]
    row = {"best_val_loss": best["val_loss"], "step": best["step"], "seconds_to_best": best["seconds"]}
    row |= {"steps": evaluations[-1]["step"], "seconds": evaluations[-1]["seconds"], "wall_seconds": wall}
    row["tokens_per_second"] = statistics.median(speeds) if speeds else 0.0
    print(
        f"baby GPT: best validation loss {row['best_val_loss']:.4f} at step {row['step']} after "
        f"{row['seconds_to_best']:.0f} s of training; {row['steps']} steps in {row['seconds']:.0f} s, "
        f"{row['tokens_per_second']:,.0f} tokens/s; {wall:.0f} s with start, compiling and evaluations",
        flush=True,
    )
    return row


def bench_gpu(args: argparse.Namespace) -> None:
    """Each measurement in a process of its own, which gives its memory back and can be stopped."""
    import torch

    if args.only:
        kind, size, *rows = args.only.split(":")
        if kind == "train":
            figures = time_gpu_training(size, int(rows[0]), args.peer)
        else:
            figures = time_gpu_generation(size, args.peer)
        for row in figures:
            print(json.dumps(row), flush=True)
        return
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA GPU here")
    gpu = torch.cuda.get_device_name()
    results: dict[str, Any] = {"bench": "gpu", "gpu": gpu, "torch": torch.__version__, "peer": args.peer}
    print(f"{gpu}, torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    deadline = time.monotonic()
    for part in args.parts.split(","):
        started = time.monotonic()
        deadline += GPU_SECONDS[part]
        print(f"-- {part}: at most {deadline - started:.0f} s", flush=True)
        if part == "baby":
            results[part] = run_baby(deadline)
        else:
            tasks = [f"train:{size}:{rows}" for size, rows in GPU_TRAIN]
            if part == "sample":
                tasks = [f"sample:{size}" for size in GPU_SAMPLE]
            results[part] = []
            for task in tasks:
                if time.monotonic() > deadline - 20:
                    print(f"no time left for {task}", flush=True)
                    continue
                command = [sys.executable, __file__, "gpu", f"--only={task}"]
                command += [f"--peer={args.peer}"] if args.peer else []
                for line in lines_until(deadline, command, signal.SIGKILL):
                    row = json.loads(line)
                    print(gpu_row(row, gpu), flush=True)
                    # a later row of the same contender has more rounds
                    key = ("name", "size", "rows")
                    same = [all(old.get(k) == row.get(k) for k in key) for old in results[part]]
                    results[part] = [
                        old for old, is_same in zip(results[part], same, strict=True) if not is_same
                    ]
                    results[part].append(row)
            if part == "train":
                print_gpu_ratios(results[part])
        results[f"{part}_seconds"] = time.monotonic() - started
        print(json.dumps(results), flush=True)


def print_gpu_ratios(rows: list[dict]) -> None:
    """Ours to nanoGPT's tokens a second, turn by turn."""
    for theirs in (row for row in rows if row["name"] == "nanoGPT"):
        for ours in rows:
            if ours["name"] != "nanoGPT" and all(ours[key] == theirs[key] for key in ("size", "rows")):
                pairs = zip(ours["tokens_per_second"], theirs["tokens_per_second"], strict=False)
                ours["times_nanogpt"] = [a / b for a, b in pairs]
                print(
                    f"{ours['size']:>6} {ours['rows']} x 1024: {spread(ours['times_nanogpt'])} times nanoGPT,"
                    f" {ours['memory'] / theirs['memory']:.2f} of its memory",
                    flush=True,
                )


def timed(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def write_corpus(folder: Path, mb: int) -> dict[str, list[str]]:
    """docs/, 20,000 documents, and file.txt, 0.3 times as large; {what prepare.py is given: its parts}."""
    import prepare

    rng, paragraphs = random.Random(0), prepare.pydocs().split("\n\n")

    def text(size):
        drawn = []
        while size > 0:
            drawn.append(rng.choice(paragraphs))
            size -= len(drawn[-1]) + 2
        return "\n\n".join(drawn)

    documents = [text(rng.uniform(0.2, 1.8) * mb * 1e6 / 20_000) for _ in range(20_000)]
    (folder / "docs").mkdir()
    for i, document in enumerate(documents):
        (folder / "docs" / f"{i:05}.txt").write_bytes(document.encode())
    parts = [text(1e6) for _ in range(round(0.3 * mb))]
    (folder / "file.txt").write_bytes("\n\n".join(parts).encode())
    return {"docs": documents, "file.txt": parts}


def prepare_watched(path: str) -> tuple[float, float, float]:
    """Seconds of prepare.py, and the most memory, in MB, of its own process and of all its processes."""
    own = most = 0.0
    started = time.perf_counter()
    command = [sys.executable, REPO / "prepare.py", path, "--tokenizer=gpt2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        resident = []
        try:  # Linux; a process may be gone by now
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (process.pid, *children):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                resident.append(pages * resource.getpagesize() / 1e6)
        except OSError:
            pass
        own, most = max([own, *resident[:1]]), max(most, sum(resident))
        time.sleep(0.05)
    assert process.returncode == 0
    return time.perf_counter() - started, own, most


def bench_tokenize(args: argparse.Namespace) -> None:
    import prepare

    def bare(encode, parts):
        """Seconds of encode(texts) for all parts, already in memory, ten or so MB at a time."""
        step, started = max(1, round(len(parts) * 1e7 / sum(map(len, parts)))), time.perf_counter()
        for i in range(0, len(parts), step):
            encode(parts[i : i + step])
        return time.perf_counter() - started

    if "://" not in (mirror := os.environ.get("PLAINGPT_MIRROR", "")) and mirror:
        os.environ["PLAINGPT_MIRROR"] = str(Path(mirror).resolve())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        corpora, bpe = write_corpus(Path(folder), args.mb), prepare.GPT2Tokenizer().bpe
        results: dict[str, dict[str, list[float]]] = {name: {} for name in corpora}
        for _ in range(args.rounds):
            for name, parts in corpora.items():
                seconds, own, most = prepare_watched(name)
                mb = sum(len(part.encode()) for part in parts) / 1e6
                for key, value in {
                    "prepare.py, MB/s": mb / seconds,
                    "tiktoken, one thread, MB/s": mb
                    / bare(lambda t: [bpe.encode_ordinary(s) for s in t], parts),
                    "tiktoken, two threads, MB/s": mb
                    / bare(lambda t: bpe.encode_ordinary_batch(t, num_threads=2), parts),
                    "memory of its process, MB": own,
                    "memory of all its processes, MB": most,
                }.items():
                    results[name].setdefault(key, []).append(value)
    for name, measured in results.items():
        for key, values in measured.items():
            print(
                f"{name:9} {key:32} {statistics.median(values):7.1f} ({min(values):.1f} to {max(values):.1f})"
            )
        ours, two = measured["prepare.py, MB/s"], measured["tiktoken, two threads, MB/s"]
        ratios = [a / b for a, b in zip(ours, two, strict=True)]
        print(f"{name:9} {'prepare.py to two threads':32} {statistics.median(ratios):7.2f} times")
    print(json.dumps({"bench": "tokenize", "mb": args.mb, "cpus": os.cpu_count(), "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="a training step, or a race to a loss")
    train.add_argument("config")
    train.add_argument("--peer", help="a checkout of nanoGPT to run beside ours, in turns")
    train.add_argument("--peer_config", help="the config whose sizes it takes; default: the same")
    train.add_argument("--dataset", help="of both; default: the config's")
    train.add_argument("--steps", type=int, default=300, help="of a run that is timed")
    train.add_argument(
        "--to_loss", help="whole runs: seconds to this validation loss, or to the peer's final one"
    )
    train.add_argument("--evaluations", type=int, default=40, help="in a whole run")
    train.add_argument(
        "--set", nargs="*", action="append", metavar="KEY=VALUE", help="of ours; again: one more contender"
    )
    train.add_argument("--names", nargs="*", default=[], help="of our contenders, for the legend of the plot")
    train.add_argument(
        "--peer_set", nargs="*", default=[], metavar="KEY=NUMBER", help="settings of the peer alone"
    )
    train.add_argument("--plot", help="draw the validation losses over time into this file")
    train.add_argument("--rounds", type=int, default=3, help="each with another seed")
    train.add_argument("--device", default="cpu")
    train.set_defaults(run=bench_train)
    ladder = commands.add_parser("ladder", help="what each idea of GPT buys, in one picture")
    ladder.add_argument("--config", default="config/train_shakespeare_char_cpu.py")
    ladder.add_argument("--steps", type=int, default=1000)
    ladder.add_argument("--plot", default="ladder.png")
    ladder.set_defaults(run=bench_ladder)
    sample = commands.add_parser("sample", help="tokens a second of GPT-2")
    sample.add_argument("--init_from", default="random", help="random weights of 124M, or as sample.py's")
    sample.add_argument("--peer", help="a checkout of nanoGPT to run beside ours, in turns")
    sample.add_argument("--tokens", type=int, default=24)
    sample.add_argument("--rounds", type=int, default=3)
    sample.add_argument("--device", default="cpu")
    sample.add_argument("--dtype", default="float32,bfloat16", help="ours in each, the others in the first")
    sample.add_argument("--compile", action="store_true", help="ours compiled as well")
    sample.add_argument("--only", help=argparse.SUPPRESS)
    sample.set_defaults(run=bench_sample)
    slide = commands.add_parser("slide", help="generation past the context: its speed and its loss")
    slide.add_argument("--init_from", default="random", help="random weights of 124M, or a run's checkpoint")
    slide.add_argument("--tokens", type=int, default=64, help="generated in each measurement, and more")
    slide.add_argument("--score", type=int, default=10_000, help="tokens of validation text to score")
    slide.add_argument("--rounds", type=int, default=3)
    slide.set_defaults(run=bench_slide)
    tokenize = commands.add_parser(
        "tokenize", help="MB/s and memory of prepare.py --tokenizer=gpt2, on Linux"
    )
    tokenize.add_argument(
        "--mb", type=int, default=1000, help="of 20,000 documents; one file has 0.3 times as many"
    )
    tokenize.add_argument("--rounds", type=int, default=3)
    tokenize.set_defaults(run=bench_tokenize)
    gpu = commands.add_parser("gpu", help="one CUDA GPU: training, generation, the baby GPT; 8 minutes")
    gpu.add_argument("--parts", default="train,sample,baby", help="some of them, in this order")
    gpu.add_argument("--peer", help="a checkout of nanoGPT to train beside ours, in turns")
    gpu.add_argument("--only", help=argparse.SUPPRESS)
    gpu.set_defaults(run=bench_gpu)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
