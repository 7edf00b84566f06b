"""On a GPU: the numbers of the CPU, the text of the CPU, and whole runs. Skipped where there is no GPU.

python -m pytest tests/test_cuda.py
"""

import copy
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY, metrics, run

from model import GPT, GPTConfig, load_checkpoint
from prepare import load_tokenizer
from sample import optimize_for_generation

DEVICE = "cuda"
GPUS = torch.cuda.device_count()

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here")

SIZES = dict(block_size=128, vocab_size=320, n_layer=3, n_embd=256)
ARCHITECTURES = {
    "gpt2": dict(SIZES, n_head=4),
    "modern": dict(
        SIZES, n_head=2, position="rope", qk_norm=True, activation="relu2", tie_weights=False, bias=False
    ),
}


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32: its 10 bits are not what the comparisons in float32 allow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def random_model(architecture, **changes):
    """On the CPU; weights large enough that attention is no mean, biases and LayerNorms random too."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**ARCHITECTURES[architecture] | changes)).eval()
    for name, p in model.named_parameters():
        is_scale = "ln_" in name and name.endswith("weight")
        torch.nn.init.normal_(p, mean=float(is_scale), std=0.05)
    return model


def error(actual, expected):
    """The largest difference, as a part of the largest number expected."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


# -- numbers -------------------------------------------------------------------------------------------------


def logits_loss_gradients(model, windows, device, dtype=torch.float32):
    """Of a copy of the model on the device, under autocast where dtype is not float32."""
    model, windows = copy.deepcopy(model).to(device), windows.to(device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        logits, loss = model(windows[:, :-1], windows[:, 1:], all_logits=True)
    scale = 2**12  # what GradScaler is for: in float16 small gradients would vanish
    (loss * scale).backward()
    return logits, loss, {name: p.grad / scale for name, p in model.named_parameters()}


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "spelled_out"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_loss_and_gradients_equal_the_cpus(architecture, flash):
    model = random_model(architecture, flash=flash)
    windows = torch.randint(320, (4, 129), generator=torch.Generator().manual_seed(2))
    expected = logits_loss_gradients(model, windows, "cpu")
    for dtype, near, nearly in (
        (torch.float32, 1e-5, 1e-3),
        (torch.bfloat16, 3e-2, 3e-2),
        (torch.float16, 3e-2, 3e-2),
    ):
        logits, loss, gradients = logits_loss_gradients(model, windows, DEVICE, dtype)
        assert error(logits, expected[0]) <= near and error(loss, expected[1]) <= near, dtype
        errors = {name: error(gradients[name], wanted) for name, wanted in expected[2].items()}
        assert max(errors.values()) <= nearly, (dtype, errors)


@pytest.mark.parametrize("muon_learning_rate", [None, 0.02], ids=["adamw", "muon"])
def test_three_optimizer_steps_equal_the_cpus(muon_learning_rate):
    """The same gradients on both; what the weights have moved by is compared, matrix by matrix."""
    start = random_model("gpt2")
    moved = {}
    for device in ("cpu", DEVICE):
        model = copy.deepcopy(start).to(device)
        optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), muon_learning_rate)
        draws = torch.Generator().manual_seed(3)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=draws).to(device)
            for optimizer in optimizers:
                optimizer.step()
        before = dict(start.named_parameters())
        moved[device] = {name: p.detach().cpu() - before[name] for name, p in model.named_parameters()}
    for name, expected in moved["cpu"].items():
        by_muon = muon_learning_rate and name.startswith("transformer.h.") and expected.dim() == 2
        difference = (moved[DEVICE][name] - expected).norm() / expected.norm()
        # Muon multiplies in bfloat16 on a GPU, and on most CPUs in float32
        assert difference <= (5e-2 if by_muon else 1e-4), name


# -- text ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def recomputed(model, idx, n):
    """n tokens more, greedy, each from the whole context anew."""
    for _ in range(n):
        logits = model(idx[:, -model.config.block_size :])[0][:, -1]
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_with_the_cache_without_and_compiled(architecture):
    """Three times each, on past the end of the context, all the CPU's text."""
    model = random_model(architecture, n_layer=2, block_size=48)
    idx = torch.randint(320, (2, 8), generator=torch.Generator().manual_seed(4))
    expected = recomputed(model, idx, 56)
    model, idx = model.to(DEVICE), idx.to(DEVICE)
    for _ in range(3):
        assert torch.equal(recomputed(model, idx, 56).cpu(), expected)
        assert torch.equal(model.generate(idx, 56, temperature=0).cpu(), expected)
    optimize_for_generation(model, False)
    for _ in range(3):
        assert torch.equal(model.generate(idx, 56, temperature=0).cpu(), expected)
    torch.compiler.reset()
    optimize_for_generation(model, True)
    model.generate(idx[:1], 2)  # its second token compiles a step, which must serve all steps of all texts
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            assert torch.equal(model.generate(idx[:1], 56, temperature=0).cpu(), expected[:1])


def test_a_token_waits_for_nothing():
    """No token's computation copies to the CPU or waits for it; PyTorch raises where one does."""
    model = random_model("gpt2").to(DEVICE)
    idx = torch.zeros(1, 8, dtype=torch.int64, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(5)
    for mode in ("default", "error"):  # the first time warms up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for sampling in ((0.8, 50, 0.9), (0, None, None)):
                model.generate(idx, 8, *sampling, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# -- whole runs ----------------------------------------------------------------------------------------------

FLAGS = [*TINY.split(), f"--gradient_accumulation_steps={max(1, GPUS)}", f"--device={DEVICE}"]
MODERN = (
    "--position=rope --qk_norm=True --activation=relu2 --init=zero --tie_weights=False --bias=False".split()
)


def mean_loss(losses, steps):
    return sum(losses[step] for step in steps) / len(steps)


def assert_learns(folder, steps):
    """A line of each step, once, and a loss that goes down."""
    text = (folder / "metrics.jsonl").read_text()
    losses = metrics(folder, "loss")
    assert list(losses) == list(range(steps)) and text.count('"loss"') == steps
    assert mean_loss(losses, range(steps - 10, steps)) < mean_loss(losses, range(5)) - 0.5


@pytest.fixture(scope="module")
def compiled_run(workdir):
    """A compiled run that SIGTERM ends and that is resumed; its folder and how many steps it has."""
    folder = workdir / "out" / "cuda"
    command = [sys.executable, REPO / "train.py", *FLAGS, "--compile=True", "--max_iters=5000"]
    said = ""
    with subprocess.Popen(
        [*map(str, command), f"--out_dir={folder}"],
        cwd=workdir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as process:
        for line in process.stdout:
            said += line
            if line.startswith("iter 27:"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, said
    step = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    assert 28 <= step < 5000 and f"stopped after {step} steps" in said
    resumed = ["--init_from=resume", f"--max_iters={step + 30}", f"--out_dir={folder}"]
    done = run("train.py", *resumed, cwd=workdir)
    assert f"iter {step}:" in done.stdout and f"iter {step - 1}:" not in done.stdout
    return folder, step + 30


def test_a_compiled_run_stops_resumes_and_learns(compiled_run):
    assert_learns(*compiled_run)


def test_a_compiled_run_has_the_losses_of_the_cpu(compiled_run, workdir):
    args = [*FLAGS, "--device=cpu", "--dtype=float32", "--compile=False", "--max_iters=20"]
    run("train.py", *args, "--out_dir=out/cuda_cpu", cwd=workdir)
    for key in ("loss", "val_loss"):
        ours, expected = metrics(compiled_run[0], key), metrics(workdir / "out" / "cuda_cpu", key)
        assert expected and {step: ours[step] for step in expected} == pytest.approx(expected, rel=3e-2)


def test_its_greedy_text_is_the_cpus(compiled_run, workdir):
    """sample.py on the GPU against the same weights on the CPU."""
    checkpoint = load_checkpoint(compiled_run[0] / "best.pt")
    model, tokenizer = GPT.from_checkpoint(checkpoint), load_tokenizer(checkpoint["meta"])
    prompt = tokenizer.encode("The for statement")
    expected = model.generate(torch.tensor([prompt]), 40, temperature=0)[0, len(prompt) :].tolist()
    args = ["--out_dir=out/cuda", "--start=The for statement", "--temperature=0", "--max_new_tokens=40"]
    done = run("sample.py", *args, f"--device={DEVICE}", "--dtype=float32", cwd=workdir)
    assert done.stdout == tokenizer.decode(expected) + "\n"


def test_float16_muon_and_the_modern_architecture(workdir):
    """On the last GPU, so that nothing may lie on the first by mistake where there are several."""
    folder = workdir / "out" / "cuda_half"
    args = [*FLAGS, *MODERN, "--optimizer=muon", "--dtype=float16", "--compile=False", "--max_iters=40"]
    run("train.py", *args, f"--device={DEVICE}:{GPUS - 1}", f"--out_dir={folder}", cwd=workdir)
    assert_learns(folder, 40)


def test_out_of_memory_is_one_line(workdir):
    """The token embeddings of a micro-batch alone take 283 GB."""
    sizes = ["--n_layer=2", "--n_head=12", "--n_embd=768", "--block_size=1024", "--batch_size=90000"]
    args = [*FLAGS, *sizes, "--gradient_accumulation_steps=1", "--eval_iters=1", "--compile=False"]
    done = run("train.py", *args, "--out_dir=out/cuda_large", cwd=workdir, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1 and lines[0].startswith("train.py: out of memory: halve batch_size=90000"), lines


def test_torchrun_on_all_gpus(compiled_run, workdir):
    """One process for each GPU, compiled, over NCCL where they are several: the losses of one process."""
    folder = workdir / "out" / "cuda_all"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={GPUS}", "train.py"]
    args = [*FLAGS, "--compile=True", "--max_iters=28", f"--out_dir={folder}"]
    done = run(*torchrun, *args, cwd=workdir)
    steps = [int(step) for step in re.findall(r"^iter (\d+):", done.stdout, re.M)]
    assert steps == list(range(28)) and done.stdout.count("step 20:") == 1  # one process speaks
    one, many = metrics(compiled_run[0], "loss"), metrics(folder, "loss")
    assert many == pytest.approx({step: one[step] for step in many}, rel=3e-2)
