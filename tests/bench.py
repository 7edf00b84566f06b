"""Measurements, not tests: run by hand, on an otherwise idle machine.

    python tests/bench.py train config/train_shakespeare_char_cpu.py --peer=../nanoGPT --steps=300 --rounds=4
    python tests/bench.py sample --peer=../nanoGPT --dtype=float32
    python tests/bench.py tokenize --mb=1000

Rounds alternate ours and the peer, so that a machine that drifts slows both; medians, ranges and ratios are
printed, and a line of JSON. The dataset must be prepared here.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pickle
import platform
import random
import re
import resource
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
    tokenize = commands.add_parser(
        "tokenize", help="MB/s and memory of prepare.py --tokenizer=gpt2, on Linux"
    )
    tokenize.add_argument(
        "--mb", type=int, default=1000, help="of 20,000 documents; one file has 0.3 times as many"
    )
    tokenize.add_argument("--rounds", type=int, default=3)
    tokenize.set_defaults(run=bench_tokenize)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
