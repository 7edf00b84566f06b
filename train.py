"""Train a GPT on a dataset that prepare.py made; on one process, or on many through torchrun.

    python train.py config/quickstart.py
    python train.py config/quickstart.py --max_iters=5000 --init_from=resume
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

It writes ckpt.pt (the latest), best.pt (the best validation loss), metrics.jsonl and loss.png to out_dir.
"""

import signal
from typing import Literal

from configurator import UserError, configure, override, read_settings

# files
out_dir = "out"  # ckpt.pt, best.pt, metrics.jsonl and loss.png go here
eval_interval = 2000  # steps between evaluations, each with a checkpoint
log_interval = 1  # steps between lines of training loss
eval_iters = 200  # batches of each split in an evaluation, evenly spaced; 0: the whole split
eval_only = False  # evaluate once and stop; nothing is written
patience: int | None = None  # stop after this many evaluations in a row without improvement
always_save_checkpoint = True  # False: write ckpt.pt only when the validation loss improves, or on a signal
init_from = "scratch"  # scratch, resume, auto (resume if there is a run), gpt2..., or a checkpoint
# data
dataset = "pydocs"  # a folder of data/
data_order: Literal["random", "epoch"] = "random"  # random offsets, or shuffled windows without replacement
stride: int | None = None  # tokens from one window's start to the next in an epoch; None: block_size
gradient_accumulation_steps = 1  # micro-batches per step, of all processes together
batch_size = 12  # windows per micro-batch
block_size = 1024  # tokens per window: the longest context
# model, as GPTConfig in model.py
n_layer = 12  # 0: a bigram model
n_head = 12  # heads of attention; divides n_embd
n_embd = 768  # width
dropout = 0.0  # 0 for pretraining, 0.1 or more where the data is small
embd_dropout: float | None = None  # None: as dropout; the same for the next two
attn_dropout: float | None = None  # of the attention weights
resid_dropout: float | None = None  # of the outputs of attention and MLP
bias = True  # biases in Linear and LayerNorm, as GPT-2
qkv_bias: bool | None = None  # None: as bias
tie_weights = True  # the token embedding is also the output layer, as GPT-2
activation = "gelu"  # GPT-2's tanh form; or gelu_erf, relu, relu2
position = "learned"  # position embeddings, as GPT-2; or rope: rotated queries and keys
qk_norm = False  # scale queries and keys to unit root mean square
flash = True  # fused attention; False spells the same attention out
init = "gpt2"  # or zero: as gpt2, but residual projections are 0; or torch: PyTorch's own
# optimizer
optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks; AdamW for the rest
learning_rate = 6e-4  # the peak, of AdamW
muon_learning_rate = 0.02  # the peak, of Muon
max_iters = 600000  # steps
max_epochs: int | None = None  # instead of max_iters: how often to go through the training split
weight_decay = 0.1  # of matrices and embeddings, not of biases and LayerNorm
beta1 = 0.9  # AdamW's, and Muon's momentum
beta2 = 0.95  # AdamW's; use a value nearer to 1 if a step has few tokens
grad_clip = 1.0  # largest norm of the gradient; 0: no clipping
lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"  # after the warmup; wsd: see get_lr
warmup_iters = 2000  # steps of linear warmup
lr_decay_iters: int | None = None  # the step at which min_lr is reached; None: max_iters
min_lr: float | None = None  # the last learning rate; None: a tenth of the peak, or 0 with linear and wsd
# machine
backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed; auto: nccl on CUDA, else gloo
dist_timeout = 600  # seconds of silence after which a process is lost; longer than an evaluation or save
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is; torchrun gives each process its GPU
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest that learns as well
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
seed = 1337  # of weights, batches and dropout
tensorboard = False  # also write the numbers of metrics.jsonl for tensorboard --logdir=out
sample_prompt: str | None = None  # continued at each evaluation; None: val.bin's first tokens; "": no sample

if __name__ == "__main__":
    # until there is something to save, Ctrl-C ends it at once; a script's background command ignores Ctrl-C
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # this sets the names above, from a config file and --key=value; it comes before the slow imports, so that
    # --help answers at once
    given = configure(globals())

import ctypes
import gc
import io
import json
import math
import os
import shlex
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from model import (
    GPT,
    GPTConfig,
    ModelError,
    check_compiler,
    load_checkpoint,
    pick_device,
    pick_dtype,
    value_or,
)
from prepare import (
    bytes_per_token,
    encode_text,
    load_dataset,
    load_mask,
    lock,
    say,
    speak_utf8,
    tokenizer_of,
    user_error,
    weights_path,
    write_file,
)

# torchrun says which process this is: its number among all, and among those of this machine
try:
    rank = int(os.getenv("RANK", 0))
    local_rank = int(os.getenv("LOCAL_RANK", 0))
    world_size = int(os.getenv("WORLD_SIZE", 1))
except ValueError:
    sys.exit("train.py: RANK, LOCAL_RANK and WORLD_SIZE, which torchrun sets, must be whole numbers")
distributed = world_size > 1

# -- data ----------------------------------------------------------------------------------------------------


def count_windows(tokens, block_size, stride):
    """How many windows there are if one begins every stride tokens.

    A window has block_size inputs, and one more token for the last target. The last window may reach beyond
    the end of the data, but it must have a target that no other window has.
    """
    return math.ceil((tokens - 1 - max(block_size, stride)) / stride) + 1


def batch_starts(step, rows, tokens, block_size, seed, stride=None):
    """Where the windows of a step's whole batch start, (rows,): a pure function of seed and step.

    With stride=None the offsets are random. Otherwise an epoch takes each of the windows that start every
    stride tokens once, in a shuffled order, and drops a last short batch.
    """
    if stride is None:
        return np.random.default_rng((seed, step)).integers(0, tokens - block_size, rows)
    n = count_windows(tokens, block_size, stride)
    epoch, batch = divmod(step, n // rows)
    return shuffled(n, seed, epoch)[batch * rows : (batch + 1) * rows] * stride


@lru_cache(1)
def shuffled(n, seed, epoch):
    """The order of an epoch's n windows, kept from step to step."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def eval_starts(tokens, block_size, rows):
    """Starts of evenly spaced windows without overlap: rows of them, or all that there are if rows is 0."""
    if rows == 0:
        return np.arange(0, tokens - 1, block_size)
    n = (tokens - 1) // block_size
    return np.linspace(0, n - 1, min(rows, n)).round().astype(int) * block_size


def learned_places(mask, starts, block_size):
    """Whether each target of the windows at starts counts in the loss, (B, T).

    Masked targets do not, and neither do places beyond the end of the data.
    """
    places = starts[:, None] + 1 + np.arange(block_size)
    return (places < len(mask)) & (mask[np.minimum(places, len(mask) - 1)] > 0)


def get_batch(data, mask, starts, block_size, device):
    """Inputs (B, T) int64 of the windows at starts, their targets (B, T), and how many targets count.

    Targets are the inputs one token later. Those that do not count are -1, which the loss ignores.
    """
    if isinstance(data, np.memmap) and data.base.size() < data.nbytes:  # reading on would kill the process
        raise UserError(f"{data.filename} has become shorter while it is read")
    places = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    windows = np.take(data, places, mode="clip").astype(np.int64)
    x, y = windows[:, :-1], windows[:, 1:]
    learned = learned_places(mask, starts, block_size)
    if learned.any():  # if none counts, the loss weighs 0 later; the mean over no targets would be NaN
        y = np.where(learned, y, -1)
    batch = torch.from_numpy(np.stack((x, y)))  # (2, B, T)
    pinned = device == "cuda"
    if pinned:
        batch = batch.pin_memory()  # then the copy need not wait for the GPU, which is still busy
    # without pinned memory the copy must be waited for, or it may read what Python has freed by then
    return *batch.to(device, non_blocking=pinned), int(learned.sum())


# -- pieces of the loop --------------------------------------------------------------------------------------


def get_lr(step, peak, lowest, warmup_iters, decay_iters, schedule="cosine"):
    """The learning rate of a step: linear warmup to the peak, then down to the lowest at decay_iters.

    cosine: down along half a cosine. linear: down in a straight line. wsd (warmup, stable, decay): constant,
    then in a straight line over the last third of decay_iters (Hu et al. 2024, MiniCPM, section 4).
    constant: not down at all.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if schedule == "constant":
        return peak
    start = warmup_iters  # the step at which the decay begins
    if schedule == "wsd":
        start = max(start, decay_iters * 2 // 3)
    height = float(np.interp(step, [start, decay_iters], [1, 0]))  # 1 until the start, 0 from decay_iters on
    if schedule == "cosine":
        height = 0.5 * (1 - math.cos(math.pi * height))
    return lowest + height * (peak - lowest)


def sum_over_processes(numbers, device):
    """Each of the numbers, summed over all processes. Every process must call this."""
    if not distributed:
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)  # NCCL sums on GPUs, gloo on CPUs
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad
def evaluate(model, data, mask, device):
    """Mean loss over eval_iters batches of a split. The processes share the work and get the same result."""
    starts = eval_starts(len(data), block_size, eval_iters * batch_size)
    # fill the last batch with windows beyond the end, where no target counts: a new shape would be compiled
    starts = np.pad(starts, (0, -len(starts) % batch_size), constant_values=len(data))
    loss_sum, count = 0.0, 0
    for batch in starts.reshape(-1, batch_size)[rank::world_size]:  # this process's share
        x, y, learned = get_batch(data, mask, batch, block_size, device)
        loss_sum += model(x, y)[1].item() * learned
        count += learned
    loss_sum, count = sum_over_processes([loss_sum, count], device)
    if count == 0:
        raise UserError(
            "the windows of the evaluation hold no token that counts; --eval_iters=0 takes all windows"
        )
    return loss_sum / count


def warn(message):
    """Print on standard error what does not end the run, from process 0 only."""
    if rank == 0:
        say(f"train.py: {message}", sys.stderr)


def print0(line):
    """Print a line on standard output, above the progress bar, from process 0 only."""
    if rank == 0:
        say(line, sys.stdout)


# -- files ---------------------------------------------------------------------------------------------------


def save_or_warn(path, state):
    """Write a checkpoint; returns whether that worked. Training goes on, because space may become free."""
    try:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_file(path, buffer.getbuffer())
    except (OSError, MemoryError, RuntimeError) as error:  # the last is torch.save's for a lack of memory
        warn(f"{path} not written, what was there stays: {error}")
        return False
    return True


class Metrics:
    """The lines of a run's metrics.jsonl, one JSON object each; with --tensorboard its events too."""

    def __init__(self, run, step):
        """Keep the lines before the step at which the run begins: a resumed run does later steps again.

        Raises UserError if another process is using the folder.
        """
        self.path, self.lines = run / "metrics.jsonl", []
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
        run.mkdir(parents=True, exist_ok=True)
        self.alone = lock(run)  # kept, or Python would release it
        self.alone.__enter__()  # until the process ends
        if tensorboard:
            self.board = SummaryWriter(run, purge_step=step)
        old = self.path.read_bytes() if self.path.is_file() else b""
        for text in old.splitlines():
            with suppress(Exception):  # a kill may have cut a line short
                line = json.loads(text)
                np.array([*line.values()], float)  # fails if a value is not a number
                # an evaluation at that very step stays too
                if 0 <= line["step"] < step + ("val_loss" in line):
                    self.lines.append(line)

    def write_all(self):
        """Write all lines; an evaluation that was made again replaces the earlier one. Raises OSError."""
        self.lines = [*{(line["step"], "val_loss" in line): line for line in self.lines}.values()]
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def log(self, **line):
        self.lines.append(line)
        try:
            with open(self.path, "a") as file:
                print(json.dumps(line), file=file)
            for name, value in line.items():
                if tensorboard and value is not None:
                    self.board.add_scalar(name, value, line["step"])
        except Exception as error:  # TensorFlow, which may write for tensorboard, has its own types of errors
            warn(f"metrics.jsonl is not written, or TensorBoard's file; its lines will follow: {error}")

    def plot(self):
        """Draw loss.png: the losses over the steps, with a star at the best validation loss."""
        try:
            self.write_all()  # with the lines that could not be appended before
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").add_subplot(xlabel="step", ylabel="loss (nats per token)")
            for key in ("loss", "train_loss", "val_loss"):  # of the training batches, and of both splits
                losses = {line["step"]: line[key] for line in self.lines if key in line}
                axes.plot(losses.keys(), losses.values(), label=key)
            evaluations = [line for line in self.lines if "val_loss" in line]
            best = min(evaluations, key=lambda line: line["val_loss"])
            label = f"best: {best['val_loss']:.4f}"
            if best.get("val_bpb"):
                label += f", {best['val_bpb']:.4f} bits per byte"
            axes.plot(best["step"], best["val_loss"], "k*", label=label)
            axes.legend()
            picture = io.BytesIO()
            axes.figure.savefig(picture)  # a PNG
            write_file(self.path.with_name("loss.png"), picture.getvalue())
        except Exception as error:  # no matplotlib, no space, no font: the run goes on without a picture
            warn(f"loss.png is not drawn: {error}")


# -- settings and signals ------------------------------------------------------------------------------------

SETTINGS = read_settings(globals())  # {name: (type, comment)}
# All numbers must be at least 0, and these at least 1.
AT_LEAST_1 = (
    "eval_interval",
    "log_interval",
    "gradient_accumulation_steps",
    "batch_size",
    "stride",
    "max_epochs",
    "patience",
    "dist_timeout",
)
# Upper limits, which a number must stay below.
BELOW = {
    "beta1": 1,
    "beta2": 1,
    "seed": sys.maxsize,
    "stride": sys.maxsize,
    "batch_size": 100_000,
    "gradient_accumulation_steps": 1_000_000,
}

# Settings that cannot differ from those of a checkpoint, because its weights or its optimizer depend on them.
FIXED = {
    "block_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "qkv_bias",
    "tie_weights",
    "activation",
    "position",
    "qk_norm",
    "optimizer",
}
# {setting: another} of settings whose default follows from another. If a resumed run is given the other, they
# follow it again.
FOLLOWS = {
    "embd_dropout": "dropout",
    "attn_dropout": "dropout",
    "resid_dropout": "dropout",
    "min_lr": "learning_rate",
}
# The tensors that an optimizer keeps for each parameter.
STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def check_settings(given):
    """All settings of the run, {name: value}. Raises UserError if they cannot work."""
    config = {name: globals()[name] for name in SETTINGS}
    for name, value in config.items():
        # without a limit of its own, a number must at least fit into a float
        least, limit = int(name in AT_LEAST_1), BELOW.get(name, 1e300)
        if isinstance(value, int | float) and not least <= value < limit:
            raise UserError(f"{name} must be at least {least} and less than {limit}, not {value}")
    if "max_iters" in given and max_epochs:
        if "max_epochs" not in given:
            raise UserError(f"max_iters or {max_epochs=}? For max_iters, add --max_epochs=None")
        warn(f"{max_epochs=} decides how long the run is, not max_iters")
    if stride and data_order != "epoch":
        raise UserError("stride needs --data_order=epoch")
    if not 0 <= rank < world_size or gradient_accumulation_steps % world_size:
        raise UserError(
            f"{rank=} of {world_size=} processes, as torchrun sets them: "
            f"{gradient_accumulation_steps=} must be a multiple of their number"
        )
    return config


def load_start(run, given):
    """The checkpoint to start from, its path, and whether the run is resumed from it; or None, None, False.

    Settings that are not given take the checkpoint's values: the architecture, and in a resumed run all.
    Raises UserError if a given setting does not fit the checkpoint.
    """
    path = run / "ckpt.pt"
    resume = path.exists() if init_from == "auto" else init_from == "resume"
    if any(run.glob("*.pt")) and not resume and not eval_only:
        raise UserError(f"{run} holds a run: add --init_from=resume, choose another --out_dir, or delete it")
    if not resume and init_from in ("scratch", "auto"):
        return None, None, False
    weights = path if resume else weights_path(init_from)
    checkpoint = load_checkpoint(weights)
    saved, taken = checkpoint["model_args"], FIXED
    if resume:
        saved = checkpoint.get("config", {}) | saved
        taken = SETTINGS.keys() - {"out_dir", "init_from"}
    for name in sorted(saved.keys() & taken):
        old, new = saved[name], given.get(name, saved[name])
        if new != old:
            # unless the run is resumed, the context may become shorter
            if name in FIXED and (resume or name != "block_size" or new > old):
                raise UserError(f"{name}={new!r}, but the checkpoint has {name}={old!r}")
            warn(f"from here on {name}={new!r}, not {old!r}")
        # the checkpoint's value is taken, unless this setting is given, or a new value of the one it follows
        leader = FOLLOWS.get(name, name)
        if leader not in given or given[leader] == saved.get(leader):
            globals().update(override(name, new, SETTINGS))
    return checkpoint, weights, resume


stop_requested = 0.0  # the time.monotonic() of the first signal; 0 before it


def on_signal(number, _frame):
    """The first signal lets the run save and end. Another one, a second later or more, ends it at once."""
    global stop_requested
    if not stop_requested:
        stop_requested = time.monotonic()
        if rank == 0:
            with suppress(OSError):  # os.write, because the signal may have come in the middle of a print
                os.write(2, b"\ntrain.py: saves and stops after the next step; again: stops at once\n")
    # torchrun sends a terminal's Ctrl-C a second time, but sooner
    elif "RANK" not in os.environ or time.monotonic() > stop_requested + 1:
        raise SystemExit(128 + number)


# -- the machine ---------------------------------------------------------------------------------------------


def start_machine():
    """Connect to the other processes of torchrun, if any. Returns device and dtype. Raises UserError."""
    use_device = device
    if distributed:
        if device != "cpu" and torch.cuda.is_available():
            use_device = f"cuda:{local_rank}"  # each process has a GPU of its own
        elif device == "auto":
            use_device = "cpu"  # several processes cannot share an Apple GPU
    use_device = torch.device(pick_device(use_device)).type  # "cuda" is the GPU that pick_device has chosen
    if distributed:
        chosen = backend
        if backend == "auto":
            chosen = dist.get_default_backend_for_device(use_device)  # nccl for CUDA, gloo for CPUs
        # DDP would import it later, and its default arguments would keep the process group to the last
        from torch.distributed.nn import functional  # noqa: F401

        with user_error("cannot connect to the other processes; start them all with torchrun"):
            dist.init_process_group(chosen, timeout=timedelta(seconds=dist_timeout))
    use_dtype = pick_dtype(dtype, use_device, training=True)
    if use_device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for products that are left in float32
    else:
        # this switch also applies to CPUs, where the backward pass of fused attention is slow in bfloat16
        torch.backends.cuda.enable_flash_sdp(use_dtype == "float32")
        if sys.platform == "linux":
            # let glibc keep freed memory for the next step: page faults took up to 30% of a step elsewhere
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 32_000_000)  # M_MMAP_THRESHOLD, which may be 32 MiB at most
            libc.mallopt(-1, 2_000_000_000)  # M_TRIM_THRESHOLD
    return use_device, use_dtype


# -- the run -------------------------------------------------------------------------------------------------


def build_model(checkpoint, config, vocab_size):
    """The model of a checkpoint, or a new one for a vocabulary of vocab_size."""
    torch.manual_seed(seed)
    model_args = {name: config[name] for name in vars(GPTConfig()) if name in config}
    if checkpoint:
        return GPT.from_checkpoint(checkpoint, **model_args)
    if vocab_size >= 1024:
        vocab_size += -vocab_size % 64  # round up to a multiple of 64, which is faster on a GPU
    return GPT(GPTConfig(vocab_size=vocab_size, **model_args))


def compiled_or_not(model, use_device):
    """The model, compiled if that is wanted and works. Raises ModelError if --compile=True does not work."""
    if compile is True or (compile == "auto" and use_device == "cuda"):
        try:
            check_compiler(use_device)
            return torch.compile(model)
        except ModelError as error:
            if compile is True:
                raise
            warn(f"training without torch.compile: {error}")
    return model


def compile_now(model, use_device, autocast):
    """Let torch.compile work in a step that changes nothing, so that no timed step contains it."""
    x, y = torch.zeros(2, batch_size, block_size, dtype=torch.int64, device=use_device)
    with autocast:
        model(x, y)[1].backward()
    model.zero_grad()


def restore(optimizers, scaler, checkpoint):
    """Load the state of a run's optimizers and scaler; returns its meta, step, tokens and seconds.

    The state is found by the names of the parameters, because their order may change with the model's code.
    Fused optimizers do not check sizes, so each tensor must have the shape of its parameter and is copied.
    Raises UserError.
    """
    with user_error(f"{out_dir}/ckpt.pt is no run to resume, or its optimizer's state is damaged"):
        for opt, saved in zip(optimizers, checkpoint["optimizer"], strict=True):
            for group, old in zip(opt.param_groups, saved["param_groups"], strict=True):
                places = dict(zip(old["param_names"], old["params"], strict=True))
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    state = saved["state"].get(places[name])
                    if not state:  # there is none before the first step
                        continue
                    for key in STATE.get(type(opt).__name__, state):
                        # mu_product is NAdam's, the optimizer that the README adds
                        shape = () if key in ("step", "mu_product") else p.shape
                        if state[key].shape != shape:
                            raise ValueError(f"{key} of {name} has another shape")
                        opt.state[p][key] = p.new_empty(shape).copy_(state[key])
        # the scaler's state is empty in a run of another precision
        old, fresh = checkpoint["scaler"], scaler.state_dict()
        scaler.load_state_dict({key: type(fresh[key])(old.get(key, fresh[key])) for key in fresh})
        seconds = min(checkpoint["seconds"], 1e9)  # a damaged number would swallow the seconds to come
        return checkpoint["meta"], checkpoint["step"], checkpoint["tokens"], seconds


def loss_to_beat(path, measured_by):
    """The validation loss of best.pt if it was measured on this data and in this way; else infinity."""
    if path.exists():
        best = load_checkpoint(path)
        if best.get("measured_by") == measured_by:
            return best.get("best_val_loss", math.inf)
        if not eval_only:
            warn("best.pt was measured on other data or in another way, so the next evaluation replaces it")
    return math.inf


def check_unchanged(run, resume, step):
    """Raises UserError if another process has saved in the folder of the run since load_start looked."""
    changed = any(run.glob("*.pt"))
    if resume:
        changed = load_checkpoint(run / "ckpt.pt")["step"] != step
    if changed:
        raise UserError(f"another process has worked on {run} in the meantime: start again")


def main(given):
    """The whole run. given: the settings that the user has given, as configure returns them."""
    # -- what is given: a checkpoint to start from, settings, a dataset
    speak_utf8()
    run = Path(out_dir)
    checkpoint, weights, resume = load_start(run, given)
    config = check_settings(given)  # now that load_start has taken the checkpoint's settings
    # one process of each machine reads all IDs, to check them
    train_data, val_data, meta, tokenizer = load_dataset(
        dataset, block_size, checkpoint and checkpoint["model_args"]["vocab_size"], local_rank == 0
    )
    train_mask = load_mask(dataset, "train", train_data, meta)
    val_mask = load_mask(dataset, "val", val_data, meta)
    if checkpoint and tokenizer_of(weights, checkpoint).meta != tokenizer.meta:
        raise UserError(
            f"data/{dataset} has another tokenizer than the weights; prepare your text with that one: "
            f"python prepare.py TEXT --tokenizer={weights} --name=NAME, then --dataset=NAME"
        )

    # -- the machine
    use_device, use_dtype = start_machine()
    autocast = torch.autocast(use_device, getattr(torch, use_dtype), enabled=use_dtype != "float32")
    # small gradients would vanish in float16: so the loss is scaled up, and the gradients down again
    scaler = torch.amp.GradScaler(use_device, enabled=use_dtype == "float16")

    # -- the model and its optimizers
    model = build_model(checkpoint, config, tokenizer.vocab_size).to(use_device).train()
    for_muon = muon_learning_rate if optimizer == "muon" else None
    optimizers = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), for_muon)
    measured_by = [meta, eval_iters * batch_size, use_dtype]  # losses compare only if these are the same
    step, tokens, seconds, best_val_loss, waited = 0, 0, 0.0, math.inf, 0
    last_evaluation = 0  # its step
    if resume:
        old_meta, step, tokens, seconds = restore(optimizers, scaler, checkpoint)
        last_evaluation = checkpoint.get("last_evaluation", step)
        waited = checkpoint.get("evaluations_since_best", 0)
        if old_meta != meta:
            warn("the dataset has changed since the run began: it goes on with other data")
        best_val_loss = loss_to_beat(run / "best.pt", measured_by)
    del checkpoint  # give its memory back
    # if all have the same step, the sum is that step times their number
    if sum_over_processes([step], use_device)[0] != step * world_size:
        raise UserError("the machines find different checkpoints: all of them must share the folder out_dir")
    compiled = compiled_or_not(model, use_device)
    parallel = DistributedDataParallel(compiled) if distributed else compiled

    # -- batches and schedule
    rows = gradient_accumulation_steps * batch_size  # windows a step, of all processes together
    steps_per_epoch = count_windows(len(train_data), block_size, stride or block_size) // rows
    if not steps_per_epoch and (data_order == "epoch" or max_epochs):
        raise UserError(f"data/{dataset}/train.bin holds less than one step of {rows} windows")
    apart = (stride or block_size) if data_order == "epoch" else None  # None: windows start anywhere
    last_step = max_epochs * steps_per_epoch if max_epochs else max_iters
    decay_iters = value_or(lr_decay_iters, last_step)
    lowest_lr = value_or(min_lr, learning_rate / 10 if lr_schedule == "cosine" else 0.0)

    # -- what comes out
    prompt, token_bytes = val_data[:8].tolist(), None
    if sample_prompt is not None:
        prompt = sample_prompt and encode_text(tokenizer, sample_prompt)
    if prompt or "val_bytes" in meta:  # otherwise the vocabulary may have to be downloaded
        token_bytes = bytes_per_token(meta, tokenizer, val_data)
    metrics = None
    if not (rank or eval_only):
        metrics = Metrics(run, step)
        check_unchanged(run, resume, step)
        metrics.write_all()  # a run that cannot write ends here
    for number in signal.valid_signals() & {1, 2, 15}:  # SIGHUP (not on Windows), SIGINT and SIGTERM
        if signal.getsignal(number) != signal.SIG_IGN and not eval_only:  # nohup ignores SIGHUP
            signal.signal(number, on_signal)
    print0(f"{model.num_params():,} parameters on {use_device}, {use_dtype}")
    print0(f"from step {step} to {last_step}, {rows * block_size:,} tokens a step, of {train_data.filename}")
    if warmup_iters >= last_step > 0:
        warn(f"{warmup_iters=} is the whole run: --learning_rate is never reached")
    if compiled is not model and not eval_only:
        compile_now(parallel, use_device, autocast)
    gc.freeze()  # what exists now stays, and garbage is collected only at evaluations: it could delay a step
    gc.disable()
    bar = tqdm(total=last_step, initial=step, disable=None if metrics else True)  # None: on a terminal only

    # -- the loop: evaluate, save, step, log
    stopping, saved = False, True  # saved: False if the last checkpoint could not be written
    logged_tokens, logged_seconds = tokens, seconds
    while True:
        # evaluate: at the start, every eval_interval steps and at the end, always on the same windows
        improved = False
        ends = step >= last_step or stopping or eval_only
        evaluates = (step % eval_interval == 0 or ends) and not stopping
        if evaluates:
            gc.collect()
            compiled.eval()  # no dropout
            with autocast:
                train_loss = evaluate(compiled, train_data, train_mask, use_device)
                val_loss = evaluate(compiled, val_data, val_mask, use_device)
            report = (
                f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, "
                f"perplexity {math.exp(min(val_loss, 700)):.2f}"
            )
            # bits per byte can be compared between tokenizers, nats per token cannot; None if unknown
            val_bpb = token_bytes and val_loss / math.log(2) / token_bytes
            if val_bpb:
                report += f", {val_bpb:.4f} bits per byte"
            print0(report)
            stop_if_not_finite(train_loss + val_loss, report)
            improved = val_loss < best_val_loss
            if improved:
                best_before, best_val_loss, waited = best_val_loss, val_loss, 0
            elif step > last_evaluation:  # otherwise it was counted before the run was resumed
                waited += 1
            last_evaluation = step
            if patience and waited >= patience:
                print0(f"no better validation loss for {waited} evaluations: --patience ends the run")
                ends = True
            if metrics:
                metrics.log(
                    step=step,
                    train_loss=train_loss,
                    val_loss=val_loss,
                    val_bpb=val_bpb,
                    tokens=tokens,
                    seconds=seconds,
                )
                metrics.plot()
            if prompt:
                torch.manual_seed(seed)  # the same draws each time; each step of training sets its own seed
                idx = torch.tensor([prompt], device=use_device)  # (1, T)
                idx = model.generate(idx, 100, 0.8, vocab_size=tokenizer.vocab_size)
                print0(tokenizer.decode(idx[0].tolist()))
            compiled.train()

        # save, but never weights that are not finite
        if improved or stopping or (evaluates and always_save_checkpoint):
            stop_if_not_finite(get_total_norm(model.parameters()), f"step {step}: the weights are not finite")
            if metrics:
                state = {
                    "model": model.state_dict(),
                    "model_args": vars(model.config),
                    "config": config,
                    "meta": meta,
                    "step": step,
                    "tokens": tokens,
                    "seconds": seconds,
                    "best_val_loss": best_val_loss,
                    "evaluations_since_best": waited,
                    "last_evaluation": last_evaluation,
                    "measured_by": measured_by,
                }
                rest = {"optimizer": [opt.state_dict() for opt in optimizers], "scaler": scaler.state_dict()}
                if stopping:
                    metrics.plot()  # otherwise the evaluation has done so
                # best.pt does without the rest; it comes second, because a resumed run evaluates again
                saved = save_or_warn(run / "ckpt.pt", state | rest)
                if improved and not save_or_warn(run / "best.pt", state):
                    saved = False
                    if not distributed:  # try again as soon as a loss is below that of the file
                        best_val_loss = best_before
        if ends:
            if not saved:
                raise UserError("the end of the run is lost, because ckpt.pt or best.pt could not be written")
            break

        # step: its learning rate, batch and dropout depend only on the seed and the step
        started = time.perf_counter()
        lr = get_lr(step, learning_rate, lowest_lr, warmup_iters, decay_iters, lr_schedule)
        for opt in optimizers:
            for group in opt.param_groups:
                # an optimizer's default is its peak; Muon's rate follows the curve of AdamW's
                group["lr"] = opt.defaults["lr"] * lr / (learning_rate or 1)
        # each process draws different dropout, and no random state has to be saved
        torch.manual_seed(np.random.default_rng((seed, step, rank)).integers(2**63))
        starts = batch_starts(step, rows, len(train_data), block_size, seed, apart)
        micro_batches = starts.reshape(-1, batch_size)[rank::world_size]  # this process's share
        learned_tokens = learned_places(train_mask, starts, block_size).sum()  # in all processes together
        loss_sum = 0.0
        for i, micro_batch in enumerate(micro_batches):
            x, y, learned = get_batch(train_data, train_mask, micro_batch, block_size, use_device)
            # DDP averages the gradients over the processes only once, after the last micro-batch
            parallel.require_backward_grad_sync = i == len(micro_batches) - 1
            with autocast:
                # weighted so that DDP's mean over processes is the mean over all targets that count
                loss = parallel(x, y)[1] * (learned * world_size / max(1, learned_tokens))
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        for opt in optimizers:
            scaler.unscale_(opt)
        grad_norm = clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if not scaler.is_enabled() or grad_norm.isfinite():  # float16 skips a step that overflowed
            for opt in optimizers:
                scaler.step(opt)
        scaler.update()  # which lowers the scale after an overflow
        model.zero_grad()
        tokens += rows * block_size
        bar.update()

        # log; several processes agree to stop only here
        logs = step % log_interval == 0 or (stop_requested and not distributed)
        if logs or (step + 1) % eval_interval == 0 or step + 1 == last_step:
            norm = grad_norm.item()  # wait for the GPU now: the time of logs and evaluations does not count
        seconds += time.perf_counter() - started
        if logs:
            mean_loss, stopping = sum_over_processes(
                [loss_sum.item() / world_size, bool(stop_requested)], use_device
            )
            speed = (tokens - logged_tokens) / (seconds - logged_seconds)  # tokens a second
            report = (
                f"iter {step}: loss {mean_loss:.4f}, lr {lr:.3g}, "
                f"{speed:,.0f} tokens/s, {speed * model.flops_per_token() / 1e12:.3g} TFLOP/s"
            )
            print0(report)
            # float16 skips a step whose gradient overflows, and lowers its scale, which is 1 without float16
            must_be_finite = mean_loss if scaler.get_scale() > 1 else mean_loss + norm
            stop_if_not_finite(must_be_finite, f"{report}, gradient norm {norm:.3g}")
            if metrics:
                metrics.log(
                    step=step,
                    loss=mean_loss,
                    lr=lr,
                    grad_norm=norm if math.isfinite(norm) else None,  # JSON has no infinity
                    tokens=tokens,
                    tokens_per_second=speed,
                    seconds=seconds,
                )
            logged_tokens, logged_seconds = tokens, seconds
        step += 1

    # -- the end
    if stopping:
        print0(f"stopped after {step} steps, saved; go on with: {resume_command()}")
    elif not eval_only:
        print0(f"{seconds:.0f} s of training; now: python sample.py --out_dir={shlex.quote(out_dir)}")


def resume_command():
    """The command that goes on with this run. On several machines, torchrun's other flags stay the same."""
    launch = "python"
    if distributed:
        launch = f"torchrun --nproc_per_node={os.getenv('LOCAL_WORLD_SIZE')}"
    return f"{launch} {shlex.join(['train.py', *sys.argv[1:], '--init_from=resume'])}"


def stop_if_not_finite(number, what):
    """Raises UserError if a number is not finite. what: the text that says which one."""
    if not math.isfinite(number):
        raise UserError(f"{what}; is the learning rate too high? {out_dir}/ckpt.pt is as it was before")


def end(message):
    """End the run with one line on standard error."""
    # the first process of a machine prints first; torchrun then ends the others, before they print the same
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2 * local_rank)
    say(f"train.py: {message}", sys.stderr)
    if distributed:
        os._exit(1)  # an orderly end would wait for a lost process
    sys.exit(1)


if __name__ == "__main__":
    try:
        if not given and not torch.accelerator.is_available():
            raise UserError(
                "GPT-2's size is too much without a GPU; try python train.py config/quickstart.py"
            )
        main(given)
        if distributed:
            gc.unfreeze()
            gc.collect()  # frees DDP, which holds the process group, whose threads could abort Python's end
            dist.destroy_process_group()
    except (ModelError, UserError) as error:
        end(error)
    except ImportError as error:
        end(f"{error}; pip install {error.name}")
    except OSError as error:
        end(f"cannot write or read: {error}")
    except (MemoryError, RuntimeError) as error:
        # a CPU's lack of memory has no type of its own in PyTorch, only the name of its allocator
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            end(
                f"out of memory: halve {batch_size=} and double {gradient_accumulation_steps=}, "
                "or make the model smaller"
            )
        # a lost process raises the same type of error as any bug; if a barrier fails too, one is lost
        try:
            if dist.is_initialized():
                dist.barrier()
        except RuntimeError:
            end(
                f"another process died, or was silent for {dist_timeout=} seconds ({error!r:.99}); "
                f"go on from {out_dir}/ckpt.pt with --init_from=resume"
            )
        raise
