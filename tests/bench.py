"""Measurements, not tests: run by hand, on an otherwise idle machine.

    python tests/bench.py train config/train_shakespeare_char_cpu.py --peer=../nanoGPT --steps=300 --rounds=4

Rounds alternate ours and the peer, so that a machine that drifts slows both; medians, ranges and ratios are
printed, and a line of JSON. The dataset must be prepared here.
"""

import argparse
import json
import pickle
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
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
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
