"""Measurements, not tests: run by hand, on an otherwise idle machine.

    python tests/bench.py train config/train_shakespeare_char_cpu.py --peer=../nanoGPT --steps=300 --rounds=4
    python tests/bench.py sample --peer=../nanoGPT --dtype=float32

Rounds alternate ours and the peer, so that a machine that drifts slows both; medians, ranges and ratios are
printed, and a line of JSON. The dataset must be prepared here.
"""

import argparse
import importlib.util
import json
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from configurator import read_settings, run_config_file  # noqa: E402


def our_settings(config: str) -> dict:
    """What a config file makes of train.py's settings, defaults included."""
    namespace = {"__file__": str(REPO / "train.py")}
    exec((REPO / "train.py").read_text().split("if __name__")[0], namespace)
    known = read_settings(namespace)
    kinds = {name: kind for name, (kind, _) in known.items()}
    return {name: namespace[name] for name in known} | run_config_file(config, kinds)


def our_steps(config: str, steps: int, extra: list[str]) -> list[float]:
    """Milliseconds of each training step of train.py."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--max_iters={steps}", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1"]
        command = [
            sys.executable,
            REPO / "train.py",
            config,
            *flags,
            "--sample_prompt=",
            f"--out_dir={out}",
            *extra,
        ]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    return [1000 * (after - before) for before, after in zip(seconds, seconds[1:], strict=False)]


def nanogpt_steps(peer: Path, settings: dict, steps: int, extra: list[str]) -> list[float]:
    """Milliseconds of each step of a nanoGPT checkout at the same settings, on the same data."""
    source, folder = Path("data", settings["dataset"]), peer / "data" / settings["dataset"]
    meta = json.loads((source / "meta.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin"):
        shutil.copy(source / name, folder / name)
    with open(folder / "meta.pkl", "wb") as file:  # all that its train.py reads of it
        pickle.dump({"vocab_size": meta["vocab_size"]}, file)
    same = "dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias"
    same += " learning_rate weight_decay beta1 beta2 grad_clip warmup_iters"
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--max_iters={steps}", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1"]
        flags += [f"--{name}={settings[name]}" for name in same.split()] + [f"--out_dir={out}", *extra]
        command = [sys.executable, "train.py", *flags]
        done = subprocess.run(command, cwd=peer, check=True, capture_output=True, encoding="utf-8")
    return [float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)]


def bench_train(args: argparse.Namespace) -> None:
    settings = our_settings(args.config)
    extra = [f"--device={args.device}", f"--compile={args.device == 'cuda'}"]
    medians: dict[str, list[float]] = {"plainGPT": [], "nanoGPT": []}
    for _ in range(args.rounds):
        warm = args.steps // 5  # steps left out at the start
        medians["plainGPT"].append(statistics.median(our_steps(args.config, args.steps, extra)[warm:]))
        if args.peer:
            peer = nanogpt_steps(Path(args.peer), settings, args.steps, extra)
            medians["nanoGPT"].append(statistics.median(peer[warm:]))
    tokens = settings["gradient_accumulation_steps"] * settings["batch_size"] * settings["block_size"]
    for name, ms in medians.items():
        if ms:
            middle = statistics.median(ms)
            print(
                f"{name:9} {middle:8.2f} ms/step ({min(ms):.2f} to {max(ms):.2f}), "
                f"{1000 * tokens / middle:,.0f} tokens/s"
            )
    result = {
        "bench": "train",
        "config": args.config,
        "machine": platform.processor(),
        "ms_per_step": medians,
    }
    if args.peer:
        ratios = [b / a for a, b in zip(*medians.values(), strict=True)]
        result["speedup"] = ratios
        print(f"speedup   {statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps(result))


def generators(args: argparse.Namespace) -> dict:
    """{name: generate(idx, n)} of random GPT-2 124M models, ours and others."""
    import torch
    import transformers

    from model import GPT, GPTConfig

    dtype = getattr(torch, args.dtype)
    ours = GPT(GPTConfig(vocab_size=50257)).eval().to(args.device, dtype)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval().to(args.device, dtype)
    theirs.generation_config.eos_token_id = None

    def transformers_generate(idx, n):
        mask = torch.ones_like(idx)
        theirs.generate(idx, max_new_tokens=n, do_sample=True, top_k=200, attention_mask=mask, pad_token_id=0)

    models = {
        "plainGPT": lambda idx, n: ours.generate(idx, n, top_k=200, vocab_size=50257),
        "transformers": transformers_generate,
    }
    if args.peer:
        spec = importlib.util.spec_from_file_location("nanogpt", Path(args.peer, "model.py"))
        nanogpt = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(nanogpt)
        peer = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=50257)).eval().to(args.device, dtype)
        models["nanoGPT"] = lambda idx, n: peer.generate(idx, n, top_k=200)
    return models


def bench_sample(args: argparse.Namespace) -> None:
    import torch

    def seconds(generate, idx, n):
        started = time.perf_counter()
        generate(idx, n)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    models, results = generators(args), []
    print(f"{'':14} {'batch':>6} {'context':>8} {'first token, s':>15} {'tokens/s a sequence':>20}")
    for batch in (1, 8):
        for context in (8, 256, 900):
            idx = torch.randint(50257, (batch, context), device=args.device)
            first, speed = {}, {}
            for _ in range(args.rounds):
                for name, generate in models.items():
                    n = 4 if name == "nanoGPT" else args.tokens  # it computes the whole context for each
                    one = seconds(generate, idx, 1)
                    more = seconds(generate, idx, 1 + n)
                    first.setdefault(name, []).append(one)
                    speed.setdefault(name, []).append(n / (more - one))
            for name in models:
                row = [statistics.median(first[name]), statistics.median(speed[name])]
                print(f"{name:14} {batch:6} {context:8} {row[0]:15.3f} {row[1]:20.1f}")
                results.append([name, batch, context, *row])
    print(json.dumps({"bench": "sample", "dtype": args.dtype, "device": args.device, "results": results}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="milliseconds a training step")
    train.add_argument("config")
    train.add_argument("--peer", help="a checkout of nanoGPT to run beside ours, in turns")
    train.add_argument("--steps", type=int, default=300)
    train.add_argument("--rounds", type=int, default=4)
    train.add_argument("--device", default="cpu")
    train.set_defaults(run=bench_train)
    sample = commands.add_parser("sample", help="tokens a second of a random GPT-2 124M")
    sample.add_argument("--peer", help="a checkout of nanoGPT to run beside ours, in turns")
    sample.add_argument("--tokens", type=int, default=32)
    sample.add_argument("--rounds", type=int, default=3)
    sample.add_argument("--device", default="cpu")
    sample.add_argument("--dtype", default="float32")
    sample.set_defaults(run=bench_sample)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
