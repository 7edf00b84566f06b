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
keep_checkpoints = 0  # how many of the latest stay as ckpt_<step>.pt, beside ckpt.pt and best.pt
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
activation: Literal["gelu", "gelu_erf", "relu", "relu2"] = "gelu"  # gelu is GPT-2's tanh form
position: Literal["learned", "rope"] = "learned"  # position embeddings, as GPT-2, or rotated queries and keys
qk_norm = False  # queries and keys of unit root mean square
short_conv = 0  # how many tokens before one are mixed into its embedding
flash = True  # fused attention; False: the same spelled out
init: Literal["gpt2", "zero", "torch"] = "gpt2"  # zero: as gpt2, residual projections 0; torch: PyTorch's own
# optimizer
optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks; AdamW for the rest
learning_rate = 6e-4  # the peak, of AdamW
muon_learning_rate = 0.02  # the peak, of Muon
max_iters = 600000  # steps
max_epochs: int | None = None  # where given, max_iters is this many times through the training split
weight_decay = 0.1  # of matrices and embeddings; biases and LayerNorm are left alone
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's; nearer 1 where a step has few tokens
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warmup; wsd: see get_lr
warmup_iters = 2000  # steps of linear warmup
lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
min_lr: float | None = None  # where learning_rate ends; None: a tenth of it, or 0 with linear and wsd
# machine
backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on CUDA, else gloo
dist_timeout = 600  # seconds until a silent process is given up; an evaluation or a save must fit in
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
seed = 1337  # of weights, batches and dropout
tensorboard = False  # write the numbers of metrics.jsonl for tensorboard --logdir=out as well
sample_prompt: str | None = None  # continued at each evaluation; None: as validation begins; "": no sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    given = configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import ctypes
import functools
import gc
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import GPT, GPTConfig, load_checkpoint, pick_device
from prepare import CORPORA, DataError, load_tokenizer, weights_path

WRITER = ThreadPoolExecutor(1)  # writes checkpoints while training goes on
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
        own = "" if name in CORPORA else "YOUR_TEXT --name="
        raise ValueError(f"{folder} is not prepared; run: python prepare.py {own}{name}{hint}")
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
    """Linear warmup to the peak; then down to the lowest at step decay_iters, or constant.

    cosine: along half a cosine; linear: in a straight line; wsd: constant, and in a straight line over the
    last third of decay_iters (warmup, stable, decay; Hu et al. 2024, MiniCPM, section 4).
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return peak
    if step >= decay_iters:
        return lowest
    start = max(warmup_iters, decay_iters * 2 // 3) if schedule == "wsd" else warmup_iters
    left = min(1.0, (decay_iters - step) / (decay_iters - start))  # 1 to 0
    if schedule == "cosine":
        left = 0.5 * (1 - math.cos(math.pi * left))
    return lowest + left * (peak - lowest)


def sum_over_processes(value: float) -> float:
    if world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)  # on the CPU, where it does not wait for the GPU's queue
    dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def evaluate(model: GPT, data: np.ndarray, starts: np.ndarray, device: str, autocast: Any) -> float:
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


def on_cpu(state: Any, copies: dict[Any, torch.Tensor]) -> Any:
    """A copy in CPU memory of tensors in dicts and lists; what is one tensor stays one, found in copies."""
    if isinstance(state, dict):
        return {key: on_cpu(value, copies) for key, value in state.items()}
    if isinstance(state, list):
        return [on_cpu(value, copies) for value in state]
    if not isinstance(state, torch.Tensor):
        return state
    key = state.data_ptr(), state.shape
    copies[key] = copies[key] if key in copies else state.detach().to("cpu", copy=True)
    return copies[key]


def write_checkpoint(run: Path, state: dict[str, Any], improved: bool, keep: int) -> bool:
    """Write best.pt where improved, without the optimizer, and ckpt.pt; return whether that went well.

    The latest keep files of ckpt.pt stay as ckpt_<step>.pt too, older ones go.
    """

    def write(path: Path, state: dict[str, Any]) -> bool:
        return written(path, lambda: write_atomically(path, lambda file: torch.save(state, file)))

    if improved:
        write(run / "best.pt", {key: state[key] for key in state if key not in ("optimizer", "scaler")})
    saved = write(run / "ckpt.pt", state)
    if saved and keep:
        path = run / f"ckpt_{state['step']}.pt"
        path.unlink(missing_ok=True)
        try:
            os.link(run / "ckpt.pt", path)
        except OSError:  # a filesystem without hard links
            write(path, state)
        kept = [path for path in run.glob("ckpt_*.pt") if path.stem[5:].isdigit()]
        for old in sorted(kept, key=lambda path: path.stat().st_mtime_ns)[:-keep]:
            written(old, old.unlink)
    return saved


def written(path: Path, write: Callable[[], Any]) -> bool:
    """Whether write() went well; if not, that is said, and the run goes on: a full disk may get room."""
    try:
        write()
        return True
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = str(error).splitlines()[0]
        tqdm.write(f"train.py: {path} not written, what was there stays: {reason}", file=sys.stderr)
        return False


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, but for one that a kill cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
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
    """End with one line on standard error, by one process of each machine: the first that is alive."""
    if local_rank := int(os.environ.get("LOCAL_RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the others when one has said it
        time.sleep(2 * local_rank)
    tqdm.write(f"train.py: {message}", file=sys.stderr)
    WRITER.shutdown()
    sys.stdout.flush()
    os._exit(1)  # sys.exit might wait for processes that are lost


def fail_if_known(error: Exception) -> None:
    """End with advice where the error in the middle of a run is not the fault of our code."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory|ALLOC_FAILED", text):
        change = "halve the one and double the other, and a step sees the same windows; or lower block_size"
        fail(f"out of memory with {batch_size=} and {gradient_accumulation_steps=}: {change}")
    if isinstance(error, dist.DistError) or re.search("gloo|NCCL", text):
        cause = text.split("] ", 1)[-1].split(". ")[0][:200]
        what = f"another process died, or was silent for {dist_timeout=} seconds ({cause})"
        fail(f"{what}; go on from {out_dir}/ckpt.pt with --init_from=resume")


def new_store(timeout: timedelta) -> dist.Store:
    """torchrun's key-value store, under a prefix of this start alone, which process 0 tells the others.

    After a restart the store still has the addresses of the processes before: who read those would hang.
    """
    store, prefix = next(dist.rendezvous("env://", timeout=timeout))[0], os.urandom(8).hex()
    if rank > 0:
        store.set(f"question {rank}", prefix)
        prefix = store.get(f"answer {prefix}").decode()
        store.add(f"{prefix} known", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    while rank == 0 and store.add(f"{prefix} known", 0) < world_size - 1:
        for question in (f"question {other}" for other in range(1, world_size)):
            if store.check([question]):
                store.set(f"answer {store.get(question).decode()}", prefix)
        if time.monotonic() > deadline:
            raise dist.DistStoreError("not all of them have started")
        time.sleep(0.05)
    return dist.PrefixStore(prefix, store)


def check_settings(given: dict[str, Any]) -> None:
    """End where the settings cannot work, before anything is begun."""
    at_least_1 = "eval_interval log_interval gradient_accumulation_steps batch_size block_size stride"
    at_least_1 += " dist_timeout"
    at_least_0 = "max_iters max_epochs eval_iters warmup_iters lr_decay_iters seed grad_clip weight_decay"
    at_least_0 += " learning_rate muon_learning_rate min_lr beta1 beta2 keep_checkpoints"
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
    model_args = asdict(GPTConfig()) | checkpoint["model_args"]
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
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
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
        config = {name: globals()[name] for name in read_settings(globals())}
        if (run / "ckpt.pt").exists() and not resume and not eval_only:
            if restarted:  # by torchrun, after a process died
                checkpoint = load_checkpoint(str(run / "ckpt.pt"))
                resume = checkpoint.get("config") == config  # else it is another run's
            if not resume:
                fail(f"{run} holds a run: add --init_from=resume, or choose another --out_dir, or delete it")
    except (OSError, ValueError) as error:
        fail(str(error))
    if checkpoint and checkpoint.get("meta", meta)["tokenizer"] != meta["tokenizer"]:
        theirs = checkpoint["meta"].get("dataset")
        fail(f"data/{dataset} has another tokenizer than the checkpoint's dataset; use --dataset={theirs}")

    # machine
    device_type = use_device.split(":")[0]
    if device_type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, and M_TRIM_THRESHOLD: keep the memory that is freed,
        libc.mallopt(-1, 2**31 - 1)  # for page faults took up to a tenth of a step
    if world_size > 1:
        if device_type == "cuda":
            use_device = f"cuda:{os.environ['LOCAL_RANK']}"
        elif device_type == "mps":
            fail("several processes need CUDA or the CPU, not mps; use --device=cpu, or start one alone")
        elif backend == "nccl":
            fail(f"backend=nccl needs CUDA GPUs, the device is {use_device}; use --backend=gloo")
        # tensors on a GPU go by nccl, the few numbers on the CPU by gloo
        both = "cpu:gloo,cuda:nccl" if device_type == "cuda" and backend != "gloo" else "gloo"
        wait = timedelta(seconds=dist_timeout)
        dist.init_process_group(both, timeout=wait, store=new_store(wait), rank=rank, world_size=world_size)
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
    optimizers = model.configure_optimizers(
        weight_decay, learning_rate, (beta1, beta2), muon_learning_rate if optimizer == "muon" else None
    )
    for group in (group for one in optimizers for group in one.param_groups):
        group["initial_lr"] = group["lr"]  # its peak
    step, tokens, seconds, best_val_loss = 0, 0, 0.0, math.inf
    if resume:
        step, tokens, seconds = (checkpoint[key] for key in ("step", "tokens", "seconds"))
        best_val_loss = checkpoint["best_val_loss"]
        if (theirs := checkpoint["config"].get("optimizer", "adamw")) != optimizer:
            fail(f"{optimizer=}, but the checkpoint has optimizer={theirs}")
        for one, state in zip(optimizers, checkpoint["optimizer"], strict=True):
            settled = one.state_dict()["param_groups"]  # what is given now wins over what was saved
            one.load_state_dict(state | {"param_groups": settled})
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
    checkpoint = None  # give its memory back
    if sum_over_processes(step) != step * world_size:
        fail(f"not every machine finds the same checkpoint in {run}: it must be one folder that all share")
    compiles = compile is True or (compile, device_type) == ("auto", "cuda")
    compiled = torch.compile(model) if compiles else model
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
    lowest_lr = min_lr
    if min_lr is None:
        lowest_lr = 0.0 if lr_schedule in ("linear", "wsd") else learning_rate / 10
    splits = [(d, eval_starts(len(d), block_size, eval_iters * batch_size)) for d in (train_data, val_data)]

    # what comes out; a resume cuts metrics.jsonl to its checkpoint's step
    writes = rank == 0 and not eval_only
    metrics = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] < step] if resume else []
    board = None
    if writes:
        kept = "".join(json.dumps(line) + "\n" for line in metrics).encode()
        try:
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(run / "metrics.jsonl", lambda file: file.write(kept))
            board = SummaryWriter(str(run), purge_step=step) if tensorboard else None
        except ImportError:
            fail("tensorboard=True needs a package that is not there: pip install tensorboard")
        except OSError as error:
            fail(f"cannot write to {run}: {error}")
    bar = tqdm(total=last_step, initial=step, unit="step", disable=None if writes else True)
    prompt: list[int] = []
    if rank == 0 and sample_prompt != "":
        try:
            tokenizer = load_tokenizer(meta)
            prompt = tokenizer.encode(sample_prompt or "") or val_data[:8].tolist()
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
        def append() -> None:
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

        if writes:
            metrics.append(line)
            written(run / "metrics.jsonl", append)
        for name in line.keys() - {"step", "seconds"} if board else ():
            if line[name] is not None:
                written(run, lambda name=name: board.add_scalar(name, line[name], line["step"]))

    def save(improved: bool) -> None:
        """Copy the state and let it be written, to best.pt too where improved, while training goes on."""
        nonlocal saving
        if not torch.nn.utils.get_total_norm(model.parameters()).isfinite():
            stop_not_finite(f"step {step}: weights that are not finite")
        if not writes:
            return
        saving.result()  # one copy in memory, and one file on its way, at a time
        state = {"model": model.state_dict(), "model_args": asdict(model.config)}
        state |= {"config": config, "meta": meta}
        state |= {"optimizer": [one.state_dict() for one in optimizers], "scaler": scaler.state_dict()}
        state |= {"step": step, "tokens": tokens, "seconds": seconds, "best_val_loss": best_val_loss}
        saving = WRITER.submit(write_checkpoint, run, on_cpu(state, {}), improved, keep_checkpoints)

    def stop_not_finite(what: str) -> NoReturn:
        saving.result()
        good = f"{run}/ckpt.pt, go on from it with" if (run / "ckpt.pt").exists() else "none yet, try"
        fail(f"{what} at learning rate {lr:.3g}; the last good state is {good} a lower learning_rate")

    def sample() -> str:
        model.eval()
        generator = torch.Generator(use_device).manual_seed(seed)
        idx = torch.tensor([prompt], device=use_device)
        with autocast:
            idx = model.generate(idx, 100, 0.8, generator=generator, vocab_size=meta["vocab_size"])
        model.train()
        return tokenizer.decode(idx[0].tolist())

    # the first SIGTERM or Ctrl-C lets the step end and saves; another, a second later or more, kills
    signalled = 0.0

    def on_signal(number: int, _frame: Any) -> None:
        nonlocal signalled
        if signalled and time.monotonic() > signalled + 1:  # sooner, it is torchrun repeating a terminal's
            os._exit(128 + number)
        if not signalled and rank == 0:  # not print: a signal may come in the middle of one
            with suppress(OSError):  # Ctrl-C has ended the tee that read it, too
                os.write(2, b"\ntrain.py: ends after this step or evaluation, and saves; again: at once\n")
        signalled = signalled or time.monotonic()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)

    say(f"{model.num_params():,} parameters on {use_device}, {use_dtype}; {tokens_per_step:,} tokens a step")
    if step >= last_step and not eval_only:
        say(f"the run is at step {step} already; to go on, raise max_iters")
    if restarted and resume:
        say(f"started again by torchrun: goes on from step {step} of {run}/ckpt.pt")
    logged_step, logged_seconds, lr, stopping = step, seconds, learning_rate, False
    saving = WRITER.submit(bool, True)
    skipped = torch.zeros((), dtype=torch.int64, device=use_device)  # steps whose gradient was not finite
    while True:
        if step % eval_interval == 0 or step >= last_step or eval_only:
            bar.set_postfix_str("evaluating")
            train_loss, val_loss = (evaluate(compiled, *split, use_device, autocast) for split in splits)
            losses = f"train loss {train_loss:.4f}, val loss {val_loss:.4f}"
            say(f"step {step}: {losses}, perplexity {math.exp(min(val_loss, 700)):.2f}")
            if not math.isfinite(train_loss + val_loss):
                stop_not_finite(f"step {step}: {losses}")
            line = {"step": step, "train_loss": train_loss, "val_loss": val_loss}
            log(line | {"tokens": tokens, "seconds": seconds})
            improved = val_loss < best_val_loss
            best_val_loss = min(val_loss, best_val_loss)
            if improved or always_save_checkpoint:
                save(improved)
            if writes:
                written(run / "loss.png", lambda: plot_losses(metrics, run / "loss.png"))
            if prompt:
                say(sample())
        if step >= last_step or eval_only:
            break

        started = time.perf_counter()
        lr = get_lr(step, learning_rate, lowest_lr, warmup_iters, decay_step, lr_schedule)
        for group in (group for one in optimizers for group in one.param_groups):
            group["lr"] = group["initial_lr"] * lr / (learning_rate or 1)
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
        for one in optimizers:
            scaler.unscale_(one)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        skipped += ~grad_norm.isfinite()
        for one in optimizers if not scaler.is_enabled() or grad_norm.isfinite() else ():
            scaler.step(one)  # float16 passes over a step that overflowed, and its scale is lowered
        scaler.update()
        model.zero_grad(set_to_none=True)
        step += 1
        tokens += tokens_per_step
        bar.update()
        stopping = sum_over_processes(float(signalled > 0)) > 0
        logs = (step - 1) % log_interval == 0 or stopping
        if logs:
            mean_loss, norm = sum_over_processes(loss_sum.item()) / world_size, grad_norm.item()
            skips, skipped = skipped.item(), torch.zeros_like(skipped)
            if not math.isfinite(mean_loss) or skips and not scaler.is_enabled():
                stop_not_finite(f"iter {step - 1}: loss {mean_loss}, gradient norm {norm}")
        elif device_type == "cuda" and step % eval_interval == 0:
            torch.cuda.synchronize()  # or the rest of this step's time would go to the evaluation
        seconds += time.perf_counter() - started
        if logs:
            speed = (step - logged_step) * tokens_per_step / (seconds - logged_seconds)
            logged_step, logged_seconds = step, seconds
            also = f", float16 overflowed: {skips} skipped" if skips else ""
            say(f"iter {step - 1}: loss {mean_loss:.4f}, lr {lr:.3g}, {speed:,.0f} tokens/s{also}")
            bar.set_postfix_str(f"loss {mean_loss:.4f}, {speed:,.0f} tokens/s", refresh=False)
            line = {"step": step - 1, "loss": mean_loss, "lr": lr}
            line["grad_norm"] = norm if math.isfinite(norm) else None  # where float16 overflowed
            line |= {"skipped": skips} if skips else {}
            log(line | {"tokens": tokens, "tokens_per_second": speed, "seconds": seconds})
        if stopping:
            save(False)
            break

    bar.close()
    if board:
        written(run, board.close)
    if not saving.result():
        fail(f"the end of the run is lost: {run}/ckpt.pt could not be written")
    if stopping:
        arguments = [arg for arg in sys.argv[1:] if not arg.startswith("--init_from=")]
        launch, nodes = "python", os.environ.get("GROUP_WORLD_SIZE", "1")
        if world_size > 1:
            several = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=FIRST_HOST:29500"
            launch = f"torchrun {'--standalone' if nodes == '1' else several}"
            launch += f" --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world_size)}"
        command = f"{launch} train.py {shlex.join([*arguments, '--init_from=resume'])}"
        say(f"stopped after {step} steps, saved; go on with: {command}")
    elif not eval_only:
        say(f"{seconds:.0f} s of training; now: python sample.py {shlex.quote(f'--out_dir={out_dir}')}")
    if world_size > 1:
        # while it holds the process group, gloo's threads outlive the interpreter: an abort at exit
        del parallel
        gc.collect()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(given)
    except (MemoryError, RuntimeError) as error:
        fail_if_known(error)
        raise
