"""Train a GPT on a dataset that prepare.py made; on one process, or on many through torchrun.

    python train.py config/quickstart.py
    python train.py config/quickstart.py --max_iters=5000 --init_from=resume
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

It writes ckpt.pt (the latest), best.pt (the best validation loss), metrics.jsonl and loss.png to out_dir.
"""

import signal
from typing import Literal

from configurator import configure, read_settings

# files
out_dir = "out"  # ckpt.pt, best.pt, metrics.jsonl and loss.png go here
eval_interval = 2000  # steps between evaluations, each with a checkpoint
log_interval = 1  # steps between lines of training loss
eval_iters = 200  # batches of each split in an evaluation, evenly spaced; 0: the whole split
eval_only = False  # evaluate once and stop; nothing is written
always_save_checkpoint = True  # False: ckpt.pt only when the validation loss improves (or on a signal)
init_from = "scratch"  # scratch, resume (out_dir's ckpt.pt), gpt2 and its sizes, or the path of a checkpoint
# data
dataset = "pydocs"  # a folder of data/
data_order: Literal["random", "epoch"] = "random"  # random offsets, or shuffled windows without replacement
stride: int | None = None  # tokens between windows of data_order=epoch; None: block_size
gradient_accumulation_steps = 1  # micro-batches a step, of all processes together
batch_size = 12  # windows a micro-batch
block_size = 1024  # tokens a window: the longest context
# model, as GPTConfig in model.py
n_layer = 12  # 0: a bigram model
n_head = 12  # heads of attention; divides n_embd
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more where the data is small
embd_dropout: float | None = None  # None follows dropout, as the next two
attn_dropout: float | None = None  # of the attention weights
resid_dropout: float | None = None  # of what attention and MLP add
bias = True  # biases in Linear and LayerNorm, as GPT-2
qkv_bias: bool | None = None  # None follows bias
tie_weights = True  # the token embedding is the output layer too, as GPT-2
activation: Literal["gelu", "gelu_erf", "relu"] = "gelu"  # gelu is GPT-2's tanh form
flash = True  # fused attention; False: the same spelled out
init: Literal["gpt2", "torch"] = "gpt2"  # first weights: GPT-2's, or PyTorch's own for each layer
# optimizer
learning_rate = 6e-4  # the peak
max_iters = 600000  # steps
max_epochs: int | None = None  # where given, max_iters is this many times through the training split
weight_decay = 0.1  # of matrices and embeddings; biases and LayerNorm are left alone
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's; nearer 1 where a step has few tokens
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warmup
warmup_iters = 2000  # steps of linear warmup
lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
min_lr: float | None = None  # None: a tenth of learning_rate
# machine
backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on CUDA, else gloo
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
seed = 1337  # of weights, batches and dropout
sample_prompt: str | None = None  # continued at each evaluation; None: as validation begins; "": no sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    given = configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import functools
import gc
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig, load_checkpoint, pick_device
from prepare import DataError, load_tokenizer, weights_path

SAMPLE_TOKENS = 100
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them

# -- data ----------------------------------------------------------------------------------------------------


class Shards:
    """Files of token IDs as one sequence, each memory-mapped."""

    def __init__(self, files: list[np.ndarray]):
        self.files = files
        self.starts = np.cumsum([0] + [len(file) for file in files])  # and where the last ends

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        ids, which = np.empty(index.shape, np.uint16), np.searchsorted(self.starts, index, side="right") - 1
        for i in np.unique(which):
            here = which == i
            ids[here] = self.files[i][index[here] - self.starts[i]]
        return ids

    def max(self) -> int:
        return max(file.max() for file in self.files)


def load_dataset(name: str) -> tuple[np.ndarray | Shards, np.ndarray | Shards, dict[str, Any]]:
    """Token IDs of data/<name>/train*.bin and val*.bin, memory-mapped, and meta.json. Raises ValueError."""
    folder = Path("data", name)
    if not any(folder.glob("train*.bin")):
        others = sorted({path.parent.name for path in Path("data").glob("[!.]*/train*.bin")})
        hint = f" (data/ has {', '.join(others)})" if others else ""
        raise ValueError(f"{folder} is not prepared; run: python prepare.py {name}{hint}")
    if (folder / "meta.json").is_file():
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            meta["tokenizer"], meta["vocab_size"] + 0
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}/meta.json is damaged ({error!r}); run prepare.py again") from None
    else:
        meta = {"dataset": name, "tokenizer": {"type": "gpt2"}, "vocab_size": 50257}
        print(f"{folder} has no meta.json: taken for GPT-2 token IDs", file=sys.stderr)
    splits = []
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"{split}*.bin"))
        sizes = [path.stat().st_size for path in paths] or [0]
        total = sum(sizes)
        if 0 in sizes or any(n % 2 for n in sizes) or total != 2 * meta.get(f"{split}_tokens", total // 2):
            path = paths[0] if len(paths) == 1 else folder / f"{split}*.bin"
            raise ValueError(f"{path} is missing, empty or truncated ({total} bytes); run prepare.py again")
        files = [np.memmap(path, dtype="<u2", mode="r") for path in paths]
        splits.append(files[0] if len(files) == 1 else Shards(files))
    return *splits, meta


def count_windows(tokens: int, block_size: int, stride: int) -> int:
    """How many windows of block_size tokens, and one more to predict, start every stride tokens."""
    return max(0, (tokens - 1 - block_size) // stride + 1)


def batch_starts(
    step: int, rows: int, tokens: int, block_size: int, seed: int, stride: int | None = None
) -> np.ndarray:
    """Where the windows of the global batch of a step start, (rows,): a pure function of seed and step.

    stride None: random offsets. Else an epoch takes the windows that start every stride tokens, each once, in
    a shuffled order; a last short batch is dropped.
    """
    if stride is None:
        return np.random.default_rng((seed, step)).integers(0, tokens - block_size, rows)
    n = count_windows(tokens, block_size, stride)
    epoch, batch = divmod(step, n // rows)
    return shuffled(n, seed, epoch)[batch * rows : (batch + 1) * rows] * stride


@functools.lru_cache(maxsize=1)
def shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def eval_starts(tokens: int, block_size: int, rows: int) -> np.ndarray:
    """Starts of rows evenly spaced windows without overlap; of all there are where rows is 0 or too many."""
    starts = np.arange(count_windows(tokens, block_size, block_size)) * block_size
    if 0 < rows < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, rows).round().astype(int)]
    return starts


def get_batch(
    data: np.ndarray, starts: np.ndarray, block_size: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows at starts, (B, T) int64, and the same one token later."""
    windows = data[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1) uint16
    batch = torch.from_numpy(windows.astype(np.int64))
    if device.startswith("cuda"):
        batch = batch.pin_memory()
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]


# -- pieces of the loop --------------------------------------------------------------------------------------


def get_lr(
    step: int, peak: float, lowest: float, warmup_iters: int, decay_iters: int, schedule: str = "cosine"
) -> float:
    """Linear warmup to the peak; then constant, or half a cosine down to the lowest at step decay_iters."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return peak
    if step >= decay_iters:
        return lowest
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)  # 0 to 1
    return lowest + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - lowest)


def sum_over_processes(value: float) -> float:
    if world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)  # on the CPU, where it does not wait for the GPU's queue
    dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, data: np.ndarray, starts: np.ndarray, device: str, autocast: Any
) -> float:
    """Mean loss over the windows at starts, shared out over the processes; each gets the same value."""
    model.eval()
    total = 0.0
    for i in range(rank * batch_size, len(starts), world_size * batch_size):
        x, y = get_batch(data, starts[i : i + batch_size], block_size, device)
        with autocast:
            total += model(x, y)[1].item() * len(x)
    model.train()
    return sum_over_processes(total) / len(starts)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """write(file), then put the file at path: at any moment there lies the old one or the new one, whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")


def written(path: Path, write: Callable[[], Any]) -> bool:
    """Whether write() went well; if not, that is said, and the run goes on: a full disk may get room."""
    try:
        write()
        return True
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = str(error).splitlines()[0]
        print(f"train.py: {path} not written, what was there stays: {reason}", file=sys.stderr)
        return False


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, but for one that a kill cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            pass
    return lines


def plot_losses(metrics: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss against steps and tokens, the best validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    evals = [line for line in metrics if "val_loss" in line]
    for key, lines, style, label in (
        ("loss", [line for line in metrics if "loss" in line], {"alpha": 0.3}, "training batches"),
        ("train_loss", evals, {"marker": "."}, "training split"),
        ("val_loss", evals, {"marker": "."}, "validation split"),
    ):
        axes.plot([line["step"] for line in lines], [line[key] for line in lines], **style, label=label)
    best = min(evals, key=lambda line: line["val_loss"])
    axes.plot(best["step"], best["val_loss"], "k*", markersize=12, label=f"best, {best['val_loss']:.4f}")
    a_step = max(1, evals[-1]["tokens"]) / max(1, evals[-1]["step"])  # tokens
    axes.secondary_xaxis("top", (lambda s: s * a_step, lambda t: t / a_step)).set_xlabel("tokens seen")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


# -- the run -------------------------------------------------------------------------------------------------


def fail(message: str) -> NoReturn:
    """End with one line on standard error, by one process of each machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        sys.exit(f"train.py: {message}")
    time.sleep(2)  # or torchrun might end the one that says it before it has
    sys.exit(1)


def check_settings(given: dict[str, Any]) -> None:
    """End where the settings cannot work, before anything is begun."""
    at_least_1 = "eval_interval log_interval gradient_accumulation_steps batch_size block_size stride"
    at_least_0 = "max_iters max_epochs eval_iters warmup_iters lr_decay_iters seed grad_clip weight_decay"
    at_least_0 += " learning_rate min_lr beta1 beta2"
    for least, names in enumerate((at_least_0, at_least_1)):
        for name in names.split():
            if globals()[name] is not None and globals()[name] < least:
                fail(f"{name} must be at least {least}, not {globals()[name]}")
    for name, limit in (("beta1", 1), ("beta2", 1), ("seed", 2**63)):
        if globals()[name] >= limit:
            fail(f"{name} must be less than {limit}, not {globals()[name]}")
    if "max_iters" in given and max_epochs is not None:
        fail(f"max_iters={max_iters} or max_epochs={max_epochs}? For the former, add --max_epochs=None")
    if stride is not None and data_order != "epoch":
        fail("stride has a meaning with --data_order=epoch alone")
    if gradient_accumulation_steps % world_size:
        fail(f"{gradient_accumulation_steps=} must be a multiple of the {world_size} processes")


def restore_settings(checkpoint: dict[str, Any], given: dict[str, Any]) -> None:
    """Take what is not given from the checkpoint; end where what is given does not fit its weights."""
    model_args = checkpoint["model_args"]
    saved = (checkpoint["config"] if init_from == "resume" else {}) | model_args
    for name in read_settings(globals()):
        if name in saved and name not in given and name not in ("out_dir", "init_from"):
            globals()[name] = saved[name]
    for name in sorted(given.keys() & model_args.keys() - GPT.FREE_FIELDS):
        crops = name == "block_size" and init_from != "resume" and given[name] < model_args[name]
        if given[name] != model_args[name] and not crops:
            fail(f"{name}={given[name]}, but the checkpoint has {name}={model_args[name]}")


def main(given: dict[str, Any]) -> None:
    """The whole run. given: the settings that are not left at their defaults, as configure returns them."""
    run, resume, checkpoint = Path(out_dir), init_from == "resume", None
    try:
        if init_from != "scratch":
            checkpoint = load_checkpoint(str(run / "ckpt.pt") if resume else weights_path(init_from))
            if resume and not {"optimizer", "step", "config", "meta"} <= checkpoint.keys():
                fail(f"{run}/ckpt.pt is no run to resume; take its weights by --init_from={run}/ckpt.pt")
            restore_settings(checkpoint, given)
        check_settings(given)
        if world_size > 1 and device != "cpu" and torch.cuda.is_available():
            gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if gpu >= gpus:
                fail(f"cuda:{gpu} is not there: start no more processes than {gpus}")
            torch.cuda.set_device(gpu)  # before the first tensor, or each process would hold memory of cuda:0
        use_device, use_dtype = pick_device(device, dtype)
        train_data, val_data, meta = load_dataset(dataset)
    except (OSError, ValueError) as error:
        fail(str(error))
    if (run / "ckpt.pt").exists() and not resume and not eval_only:
        fail(f"{run} holds a run: go on with --init_from=resume, or choose another --out_dir, or delete it")
    if checkpoint and checkpoint.get("meta", meta)["tokenizer"] != meta["tokenizer"]:
        theirs = checkpoint["meta"].get("dataset")
        fail(f"data/{dataset} has another tokenizer than the checkpoint's dataset; use --dataset={theirs}")
    config = {name: globals()[name] for name in read_settings(globals())}

    # machine
    device_type = use_device.split(":")[0]
    if world_size > 1:
        if device_type == "cuda":
            use_device = f"cuda:{os.environ['LOCAL_RANK']}"
        elif device_type == "mps":
            fail("several processes need CUDA or the CPU, not mps; use --device=cpu, or start one alone")
        elif backend == "nccl":
            fail(f"backend=nccl needs CUDA GPUs, the device is {use_device}; use --backend=gloo")
        # tensors on a GPU go by nccl, the few numbers on the CPU by gloo
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" and backend != "gloo" else "gloo"
        )
    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is left
    autocast = nullcontext()
    if use_dtype != "float32":
        autocast = torch.autocast(device_type, getattr(torch, use_dtype))
    scaler = torch.amp.GradScaler(device_type, enabled=use_dtype == "float16")

    # model and optimizer
    torch.manual_seed(seed)
    args = {field.name: config[field.name] for field in fields(GPTConfig) if field.name != "vocab_size"}
    try:
        if checkpoint:
            model = GPT.from_state(checkpoint, **args)
        else:
            # a large vocabulary is rounded up to a multiple of 64, which multiplies faster on a GPU
            vocab_size = meta["vocab_size"]
            vocab_size = vocab_size if vocab_size < 1024 else math.ceil(vocab_size / 64) * 64
            model = GPT(GPTConfig(vocab_size=vocab_size, **args))
    except ValueError as error:
        fail(str(error))
    model.to(use_device).train()
    optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
    step, tokens, seconds, best_val_loss = 0, 0, 0.0, math.inf
    if resume:
        step, tokens, seconds = (checkpoint[key] for key in ("step", "tokens", "seconds"))
        best_val_loss = checkpoint["best_val_loss"]
        settled = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group, options in zip(optimizer.param_groups, settled, strict=True):
            group.update(options)  # what is given now wins over what was saved
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    checkpoint = None  # give its memory back
    compiled = (
        torch.compile(model) if compile is True or (compile, device_type) == ("auto", "cuda") else model
    )
    parallel = DistributedDataParallel(compiled) if world_size > 1 else compiled

    # batches and schedule
    rows = gradient_accumulation_steps * batch_size
    tokens_per_step = rows * block_size
    window_stride = (stride or block_size) if data_order == "epoch" else None
    for name, data in ((f"data/{dataset}/train.bin", train_data), (f"data/{dataset}/val.bin", val_data)):
        if len(data) <= block_size:
            fail(f"{name} has {len(data)} tokens, too few for {block_size=}: prepare more text, or lower it")
        if rank == 0 and data.max() >= model.config.vocab_size:
            fail(f"{name} has the ID {data.max()}, but the model's vocabulary is {model.config.vocab_size}")
    steps_per_epoch = count_windows(len(train_data), block_size, window_stride or block_size) // rows
    if steps_per_epoch == 0 and (data_order == "epoch" or max_epochs):
        fail(f"a step of {rows} windows of {block_size} tokens is more than data/{dataset}/train.bin holds")
    last_step = max_iters if max_epochs is None else max_epochs * steps_per_epoch
    decay_step = last_step if lr_decay_iters is None else lr_decay_iters
    lowest_lr = learning_rate / 10 if min_lr is None else min_lr
    splits = [(d, eval_starts(len(d), block_size, eval_iters * batch_size)) for d in (train_data, val_data)]

    # what comes out; a resume cuts metrics.jsonl to its checkpoint's step
    writes = rank == 0 and not eval_only
    metrics = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] < step] if resume else []
    if writes:
        kept = "".join(json.dumps(line) + "\n" for line in metrics).encode()
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / "metrics.jsonl", lambda file: file.write(kept))
        except OSError as error:
            fail(f"cannot write to {run}: {error}")
    bar = tqdm(total=last_step, initial=step, unit="step", disable=None if writes else True)
    prompt: list[int] = []
    if rank == 0 and sample_prompt != "":
        try:
            tokenizer = load_tokenizer(meta)
            prompt = tokenizer.encode(sample_prompt) if sample_prompt else val_data[:8].tolist()
        except DataError as error:
            print(f"train.py: no samples: {error}", file=sys.stderr)

    def say(line: str) -> None:
        if rank == 0:
            with tqdm.external_write_mode():
                try:
                    print(line, flush=True)
                except BrokenPipeError:  # whoever read our output is gone; the run goes on
                    sys.stdout = open(os.devnull, "w")

    def log(line: dict[str, float | None]) -> None:
        if writes:
            metrics.append(line)
            written(run / "metrics.jsonl", lambda: append_line(run / "metrics.jsonl", json.dumps(line)))

    def save(name: str) -> bool:
        """Write ckpt.pt, or best.pt, which goes without the optimizer; whether that went well."""
        if not writes:
            return True
        state = {
            "model": model.state_dict(),
            "model_args": asdict(model.config),
            "config": config,
            "meta": meta,
        }
        state |= {"step": step, "tokens": tokens, "seconds": seconds, "best_val_loss": best_val_loss}
        if name == "ckpt.pt":
            state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        return written(run / name, lambda: write_atomically(run / name, lambda file: torch.save(state, file)))

    def sample() -> str:
        model.eval()
        generator = torch.Generator(use_device).manual_seed(seed)
        idx = torch.tensor([prompt], device=use_device)
        with autocast:
            idx = model.generate(idx, SAMPLE_TOKENS, 0.8, generator=generator, vocab_size=meta["vocab_size"])
        model.train()
        return tokenizer.decode(idx[0].tolist())

    # the first SIGTERM or Ctrl-C lets the step end and saves; another, a second later or more, kills
    signalled = 0.0

    def on_signal(number: int, _frame: Any) -> None:
        nonlocal signalled
        if signalled and time.monotonic() > signalled + 1:  # sooner, it is torchrun repeating a terminal's
            os._exit(128 + number)
        signalled = signalled or time.monotonic()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    say(f"{model.num_params():,} parameters on {use_device}, {use_dtype}; {tokens_per_step:,} tokens a step")
    if step >= last_step and not eval_only:
        say(f"the run is at step {step} already; to go on, raise max_iters")
    logged_step, logged_seconds, stopping, saved = step, seconds, False, True
    while True:
        if step % eval_interval == 0 or step >= last_step or eval_only:
            train_loss, val_loss = (
                evaluate(compiled, data, starts, use_device, autocast) for data, starts in splits
            )
            losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            say(f"step {step}: {losses}, perplexity {math.exp(min(val_loss, 700)):.2f}")
            if not math.isfinite(train_loss + val_loss):
                fail(f"step {step}: the loss is not finite; the last good state is {run}/ckpt.pt")
            line = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
            log(line | {"tokens": tokens, "seconds": seconds})
            improved = val_loss < best_val_loss
            if improved:
                best_val_loss = val_loss
                save("best.pt")
            if improved or always_save_checkpoint:
                saved = save("ckpt.pt")
            if writes:
                written(run / "loss.png", lambda: plot_losses(metrics, run / "loss.png"))
            if prompt:
                say(sample())
        if step >= last_step or stopping or eval_only:
            break

        started = time.perf_counter()
        lr = get_lr(step, learning_rate, lowest_lr, warmup_iters, decay_step, lr_schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # dropout is a function of (seed, step, rank) as batches are of (seed, step): no random state to lose
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))
        starts = batch_starts(step, rows, len(train_data), block_size, seed, window_stride)
        shares = starts.reshape(-1, batch_size)[rank::world_size]  # this process's micro-batches
        loss_sum = torch.zeros((), device=use_device)
        for i, share in enumerate(shares):
            x, y = get_batch(train_data, share, block_size, use_device)
            if world_size > 1:  # gradients are averaged over the processes once, after the last micro-batch
                parallel.require_backward_grad_sync = i == len(shares) - 1
            with autocast:
                loss = parallel(x, y)[1] / len(shares)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += tokens_per_step
        bar.update()
        stopping = sum_over_processes(float(signalled > 0)) > 0
        logs = (step - 1) % log_interval == 0 or stopping
        if logs:
            mean_loss, norm = sum_over_processes(loss_sum.item()) / world_size, grad_norm.item()
            if not math.isfinite(mean_loss) or not (math.isfinite(norm) or scaler.is_enabled()):
                fail(
                    f"iter {step - 1}: loss {mean_loss}, gradient norm {norm} at learning rate {lr:.3g}; "
                    f"the last good state is {run}/ckpt.pt, go on from it with a lower learning_rate"
                )
        elif device_type == "cuda" and step % eval_interval == 0:
            torch.cuda.synchronize()  # or the rest of this step's time would go to the evaluation
        seconds += time.perf_counter() - started
        if logs:
            speed = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
            logged_step, logged_seconds = step, seconds
            say(f"iter {step - 1}: loss {mean_loss:.4f}, lr {lr:.3g}, {speed:,.0f} tokens/s")
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            line = {"step": step - 1, "loss": mean_loss, "lr": lr}
            line["grad_norm"] = norm if math.isfinite(norm) else None  # where float16 overflowed
            log(line | {"tokens": tokens, "tokens_per_second": speed, "seconds": seconds})
        if stopping:
            saved = save("ckpt.pt")

    bar.close()
    if not saved:
        fail(f"the end of the run is lost: {run}/ckpt.pt could not be written")
    if stopping:
        arguments = [arg for arg in sys.argv[1:] if not arg.startswith("--init_from=")] + [
            "--init_from=resume"
        ]
        command = f"python train.py {shlex.join(arguments)}"
        if world_size > 1:
            command = "the same torchrun command and --init_from=resume"
        say(f"stopped after {step} steps, saved; go on with: {command}")
    if world_size > 1:
        del (
            parallel
        )  # while it holds the process group, gloo's threads outlive the interpreter: an abort at exit
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(given)
