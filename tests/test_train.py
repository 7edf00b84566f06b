"""The training loop: what is pure tested alone, the rest with real processes on real text."""

import importlib.util
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, metrics, needs_mirror, refused, run, run_on_a_full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import model as model_file
import prepare
import train
from model import GPT, GPTConfig, Muon, load_checkpoint

TINY = TINY.split()


# -- schedule, batches ---------------------------------------------------------------------------------------


def test_learning_rate_at_its_corners():
    def lr(step, schedule="cosine"):
        return train.get_lr(step, 1.0, 0.1, 10, 110, schedule)

    assert lr(0) == pytest.approx(1 / 11) and lr(9) == pytest.approx(10 / 11) and lr(10) == 1.0
    assert lr(60) == pytest.approx(0.55) and lr(35) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert lr(110) == lr(10**6) == 0.1
    assert lr(60, "linear") == pytest.approx(0.55) and lr(35, "linear") == pytest.approx(0.775)
    assert lr(73, "wsd") == 1.0 and lr(91.5, "wsd") == pytest.approx(0.55) and lr(110, "wsd") == 0.1
    assert lr(4, "constant") == lr(4) and lr(10, "constant") == lr(10**6, "constant") == 1.0
    for schedule in ("cosine", "linear", "wsd"):
        assert train.get_lr(0, 1.0, 0.1, 0, 0, schedule) == 0.1  # no step is left to decay over
        assert train.get_lr(9, 1.0, 0.1, 9, 10, schedule) == 1.0


@settings(max_examples=200)
@given(
    block_size=st.integers(1, 9),
    stride=st.integers(1, 12),
    tokens=st.integers(20, 200),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_an_epoch_takes_each_window_once(block_size, stride, tokens, rows, seed):
    windows = [s for s in range(0, tokens, stride) if s + block_size + 1 <= tokens]
    if windows[-1] + block_size + 1 < tokens and windows[-1] + stride < tokens - 1:
        windows.append(windows[-1] + stride)  # so that no token is left out
    assert train.count_windows(tokens, block_size, stride) == len(windows)
    steps = len(windows) // rows
    if steps == 0:
        return
    for epoch in range(3):
        args = (rows, tokens, block_size, seed, stride)
        seen = np.concatenate([train.batch_starts(epoch * steps + s, *args) for s in range(steps)])
        assert len(seen) == steps * rows == len(set(seen)) and set(seen) <= set(windows)
        targets = train.get_batch(np.zeros(tokens, np.uint16), np.ones(tokens), seen, block_size, "cpu")[1]
        assert (targets >= 0).any(1).all()  # a loss of nothing would not be a number
    if stride <= block_size:
        assert set().union(*(range(s, s + block_size + 1) for s in windows)) >= set(range(tokens))


def test_random_batches_are_a_function_of_seed_and_step():
    draw = [train.batch_starts(step, 5000, 100, 10, seed) for step, seed in ((3, 1), (3, 1), (4, 1), (3, 2))]
    assert np.array_equal(draw[0], draw[1])
    assert not np.array_equal(draw[0], draw[2]) and not np.array_equal(draw[0], draw[3])
    assert (draw[0].min(), draw[0].max()) == (0, 89)  # the last target is the last token


def test_evaluation_windows_are_even_and_cover_the_split():
    whole = train.eval_starts(1001, 10, 0)
    assert whole.tolist() == list(range(0, 1000, 10))
    assert np.array_equal(train.eval_starts(1001, 10, 10**6), whole)
    some = train.eval_starts(1001, 10, 12)
    assert len(some) == 12 and set(some) <= set(whole) and (some[0], some[-1]) == (0, 990)
    assert np.diff(some).max() - np.diff(some).min() <= 10


@settings(max_examples=100)
@given(tokens=st.integers(20, 200), block_size=st.integers(1, 19))
def test_the_whole_split_predicts_each_token_once(tokens, block_size):
    data = np.arange(tokens, dtype=np.uint16)
    starts = train.eval_starts(tokens, block_size, 0)
    x, y, _ = train.get_batch(data, np.ones(tokens), starts, block_size, "cpu")
    assert y[y >= 0].tolist() == list(range(1, tokens))
    assert torch.equal(x[y >= 0] + 1, y[y >= 0]) and (x >= 0).all()


@pytest.mark.parametrize("device", ["mps", "cpu"])
def test_a_copy_that_is_not_pinned_is_waited_for(monkeypatch, device):
    """On an Apple GPU, a copy that goes on behind Python's back would read memory that is free again."""
    calls = []

    def to(tensor, *args, **options):
        calls.append((args, options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    train.get_batch(np.arange(100, dtype=np.uint16), np.ones(100), np.array([0, 1]), 4, device)
    assert calls == [((device,), {"non_blocking": False})]


def test_windows_as_published(reference):
    published = reference["windows"]
    firsts = published["block_size_4_stride_4_first_eight_inputs"]
    data = np.array([i for row in firsts for i in row], dtype=np.uint16)
    x, y, _ = train.get_batch(data, np.ones(len(data)), np.array([0, 1]), 4, "cpu")
    expected = published["block_size_4_stride_1_first_two"]
    assert [[a.tolist(), b.tolist()] for a, b in zip(x, y, strict=True)] == expected
    starts = np.sort(train.batch_starts(0, 7, len(data), 4, 0, stride=4))
    assert train.get_batch(data, np.ones(len(data)), starts, 4, "cpu")[0].tolist() == firsts[:7]
    counts = published["split_90_10_by_characters_block_256_stride_256_batch_2"]
    for tokens, split in ((4612, "train_batches"), (534, "val_batches")):
        assert train.count_windows(tokens, 256, 256) // 2 == counts[split]


# -- whole runs ----------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_what_it_should(trained):
    assert {p.name for p in trained.iterdir()} == {"ckpt.pt", "best.pt", "metrics.jsonl", "loss.png"}
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    val_loss = metrics(trained, "val_loss")
    assert list(val_loss) == [0, 20, 40, 60] and list(metrics(trained, "loss")) == list(range(60))
    assert val_loss[0] == pytest.approx(math.log(103), abs=0.1) and val_loss[60] < 3.6
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].keys() == {"step", "train_loss", "val_loss", "val_bpb", "tokens", "seconds"}
    assert lines[1].keys() == {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"}
    assert lines[1]["tokens"] == 4 * 32 and lines[-1]["tokens"] == 60 * 4 * 32
    ckpt, best = (torch.load(trained / name, weights_only=True) for name in ("ckpt.pt", "best.pt"))
    assert ckpt["step"] == 60 and ckpt["best_val_loss"] == best["best_val_loss"] == min(val_loss.values())
    assert ckpt["meta"]["tokenizer"]["type"] == "char" and ckpt["config"]["dropout"] == 0.1
    assert ckpt.keys() - best.keys() == {"optimizer", "scaler"}
    (adamw,) = ckpt["optimizer"]  # and no Muon
    assert len(adamw["state"]) == len(ckpt["model"]) - 1  # the output layer is the token embedding


@pytest.mark.parametrize("rate, saved", [("0", 0), ("3e-3", 20)])
def test_a_checkpoint_for_each_improvement_alone(workdir, rate, saved):
    args = [
        "--always_save_checkpoint=False",
        f"--learning_rate={rate}",
        "--max_iters=20",
        "--eval_interval=10",
    ]
    run("train.py", *TINY, *args, f"--out_dir=out/improved_{rate}", cwd=workdir)
    for name in ("ckpt.pt", "best.pt"):
        assert load_checkpoint(workdir / "out" / f"improved_{rate}" / name)["step"] == saved


def test_standard_output_and_samples(workdir):
    args = [*TINY, "--max_iters=3", "--eval_interval=2", "--sample_prompt=The", "--out_dir=out/said"]
    out = run("train.py", *args, cwd=workdir).stdout
    assert re.findall(r"^step (\d+): train loss \d\.\d+, val loss \d\.\d+", out, re.M) == ["0", "2", "3"]
    assert re.findall(r"^iter (\d+): loss \d\.\d+, ", out, re.M) == ["0", "1", "2"]
    said, last = out.removesuffix("\n").rsplit("\n", 1)
    assert re.fullmatch(r"\d+ s of training; now: python sample.py --out_dir=out/said", last)
    samples = re.split(r"^(?:step|iter) .*\n", f"{said}\n", flags=re.M)
    assert len([text for text in samples if text.startswith("The") and len(text) == 3 + 100 + 1]) == 3


def test_the_picture_names_the_best_evaluation(tmp_path, monkeypatch):
    """Its loss, and its bits per byte where they are known."""
    labels = []
    draw = Figure.savefig

    def savefig(figure, *args):
        labels.append(figure.axes[0].get_legend().get_texts()[-1].get_text())
        draw(figure, *args)

    monkeypatch.setattr(Figure, "savefig", savefig)
    drawn = train.Metrics(tmp_path / "run", 0)
    drawn.log(step=0, train_loss=4.1, val_loss=4.0, val_bpb=None)
    drawn.plot()
    drawn.log(step=5, train_loss=2.1, val_loss=2.0, val_bpb=2.885)
    drawn.log(step=10, train_loss=2.1, val_loss=3.0, val_bpb=4.328)
    drawn.plot()
    assert labels == ["best: 4.0000", "best: 2.0000, 2.8850 bits per byte"]


def test_muon_takes_the_matrices_of_the_blocks():
    """Its first step changes each matrix by one that is nearly orthogonal, scaled as its shape asks for."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 2, 2, 32))
    adamw, muon = model.configure_optimizers(0.0, 1e-3, (0.9, 0.95), 0.02)
    names = {p: name for name, p in model.named_parameters()}
    taken = {names[p] for group in muon.param_groups for p in group["params"]}
    assert taken == {
        name
        for name in names.values()
        if ".h." in name and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
    }
    assert len(taken) == 8 and sum(len(group["params"]) for group in adamw.param_groups) == len(names) - 8
    idx = torch.randint(65, (4, 33))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    before = {name: p.detach().clone() for p, name in names.items()}
    muon.step()
    for p, name in names.items():
        change = (p.detach() - before[name]) / 0.02
        if name in taken:
            parts = change.split(32) if "c_attn" in name else [change]
            scale = max(1, parts[0].size(0) / parts[0].size(1)) ** 0.5
            for part in parts:
                assert 0.5 < torch.linalg.svdvals(part).median() / scale < 1.3, name
        else:
            assert not change.any()


def muon_steps(rank, processes, folder):
    """Three steps of Muon on the same gradients; saves the weights and how many matrices this process did."""
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    done = []
    whole = model_file.newton_schulz
    model_file.newton_schulz = lambda x: done.append(len(x)) or whole(x)
    draws = torch.Generator().manual_seed(1)
    shapes = [(32, 32), (96, 32), (128, 32), (32, 128), (32, 32), (96, 32), (64, 32)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in shapes]
    muon = model_file.Muon(parameters, 0.02)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=draws)
        muon.step()
    state = [muon.state[p]["momentum_buffer"] for p in parameters]
    torch.save(([p.detach() for p in parameters], state, len(done)), f"{folder}/{processes}-{rank}.pt")
    model_file.newton_schulz = whole
    if processes > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 4])
def test_muon_is_shared_out(tmp_path, processes):
    muon_steps(0, 1, tmp_path)
    torch.multiprocessing.spawn(muon_steps, (processes, tmp_path), nprocs=processes)
    alone, momentum, all_matrices = torch.load(tmp_path / "1-0.pt")
    shares = []
    for rank in range(processes):
        weights, state, matrices = torch.load(tmp_path / f"{processes}-{rank}.pt")
        shares.append(matrices)
        torch.testing.assert_close(weights, alone)
        torch.testing.assert_close(state, momentum)  # any of them can save it
    assert sum(shares) == all_matrices and max(shares) <= math.ceil(all_matrices / 3 / processes) * 3


@pytest.mark.parametrize("processes, used", [(1, "mps"), (2, "cpu")])
def test_processes_do_not_share_an_apple_gpu(monkeypatch, processes, used):
    """As on a Mac, whose GPU is found, but is only one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("mps"))
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(train, "distributed", processes > 1)
    assert train.start_machine() == (used, "float32")


def test_an_evaluation_has_batches_of_one_shape(monkeypatch):
    """The last is filled up, so that nothing is compiled anew; the loss stays that of the split."""
    for name, value in {"block_size": 8, "batch_size": 4, "eval_iters": 0}.items():
        monkeypatch.setattr(train, name, value)
    model = GPT(GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16))
    data = np.random.default_rng(0).integers(0, 20, 8 * 9 + 4).astype("<u2")  # two batches and a bit
    shapes = []

    class Watched(torch.nn.Module):
        def forward(self, x, y):
            shapes.append(x.shape)
            return model(x, y)

    loss = train.evaluate(Watched(), data, np.ones(len(data)), "cpu")
    assert shapes == [(4, 8)] * 3
    losses = []
    for start in range(0, len(data) - 1, 8):
        window = torch.from_numpy(data[start : start + 9].astype(np.int64))[None]
        losses += [model(window[:, :-1], window[:, 1:])[1].item()] * (window.size(1) - 1)
    assert len(losses) == len(data) - 1 and loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_without_a_compiler_one_line_says_so(workdir, tmp_path):
    env = {"PATH": str(tmp_path), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    args = [*TINY, "--compile=True", "--out_dir=out/uncompiled"]
    assert "torch.compile does not work here" in refused("train.py", *args, cwd=workdir, env=env)
    assert not (workdir / "out" / "uncompiled").exists()


@pytest.mark.parametrize("momentum", [0.95, 0.8])
def test_muon_is_pytorchs(momentum):
    """Several steps change the matrices as torch.optim.Muon does, but for its rounding to bfloat16."""
    torch.manual_seed(0)
    shapes = [(96, 32), (32, 32), (128, 32), (32, 128)] * 2
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    ours = Muon(params, lr=0.02, momentum=momentum)
    rows = [32 if shape == (96, 32) else shape[0] for shape in shapes]  # of query, key and value apart
    pieces = [[q.clone() for q in p.detach().split(n)] for p, n in zip(params, rows, strict=True)]
    theirs = torch.optim.Muon([q for qs in pieces for q in qs], lr=0.02, momentum=momentum)
    start = [p.detach().clone() for p in params]
    for _ in range(4):
        for p, qs in zip(params, pieces, strict=True):
            p.grad = torch.randn_like(p)
            for q, grad in zip(qs, p.grad.split(len(qs[0])), strict=True):
                q.grad = grad.clone()
        ours.step()
        theirs.step()
    for p, qs, p0 in zip(params, pieces, start, strict=True):
        expected = torch.cat(qs) - p0
        assert torch.linalg.norm(p.detach() - p0 - expected) < 0.02 * torch.linalg.norm(expected)


def test_from_a_checkpoints_weights(trained, workdir):
    """A start from a path keeps the architecture, and may change dropout and shorten the context."""
    args = [
        "--init_from=out/trained/best.pt",
        "--block_size=16",
        "--dropout=0.3",
        "--max_iters=2",
        "--batch_size=2",
    ]
    args += [
        "--device=cpu",
        "--eval_iters=2",
        "--sample_prompt=",
        "--learning_rate=1e-4",
        "--out_dir=out/tuned",
    ]
    run("train.py", *args, cwd=workdir)
    tuned = torch.load(workdir / "out" / "tuned" / "ckpt.pt", weights_only=True)
    assert tuned["model_args"]["n_embd"] == 32 and tuned["model_args"]["block_size"] == 16
    assert tuned["model_args"]["dropout"] == 0.3 and tuned["step"] == 2
    assert metrics(workdir / "out" / "tuned", "val_loss")[0] < 3.6


def test_evaluation_alone_writes_nothing(trained, workdir):
    before = {p.name: p.stat().st_mtime_ns for p in trained.iterdir()}
    args = [
        "--out_dir=out/trained",
        "--eval_only=True",
        "--eval_iters=2",
        "--batch_size=4",
        "--sample_prompt=",
    ]
    done = run("train.py", "--init_from=resume", *args, cwd=workdir)
    assert f"val loss {metrics(trained, 'val_loss')[60]:.4f}" in done.stdout
    assert {p.name: p.stat().st_mtime_ns for p in trained.iterdir()} == before


def test_a_resumed_run_takes_what_is_given_now(trained, workdir):
    """Optimizer settings, another precision, another batch: used, saved, and counted from there on."""
    shutil.copytree(trained, workdir / "out" / "changed")
    args = "--init_from=resume --out_dir=out/changed --max_iters=62 --weight_decay=0.5 --beta2=0.5"
    run("train.py", *args.split(), "--batch_size=8", "--dtype=bfloat16", "--sample_prompt=", cwd=workdir)
    checkpoint = torch.load(workdir / "out" / "changed" / "ckpt.pt", weights_only=True)
    groups = checkpoint["optimizer"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0] and groups[0]["betas"][1] == 0.5
    assert checkpoint["config"]["dtype"] == "bfloat16" and checkpoint["config"]["n_layer"] == 2
    assert checkpoint["tokens"] == 60 * 4 * 32 + 2 * 8 * 32
    args = "--init_from=resume --out_dir=out/changed --eval_only=True --max_iters=9 --sample_prompt="
    assert "step 62: train loss" in run("train.py", *args.split(), cwd=workdir).stdout


def test_tensorboard_is_optional_and_takes_the_numbers(workdir):
    """Without the package one clear line; with it, an event file."""
    args = [*TINY, "--max_iters=2", "--tensorboard=True"]
    if importlib.util.find_spec("tensorboard") is None:
        assert "pip install tensorboard" in refused("train.py", *args, "--out_dir=out/board", cwd=workdir)
        assert not (workdir / "out" / "board").exists()
    else:
        run("train.py", *args, "--out_dir=out/board", cwd=workdir)
        assert len(list((workdir / "out" / "board").glob("events.out.tfevents.*"))) == 1


def test_epochs_settle_the_steps(workdir):
    (workdir / "small.txt").write_text("to be or not to be " * 40)
    run("prepare.py", "small.txt", cwd=workdir)
    args = [
        *TINY,
        "--dataset=small",
        "--data_order=epoch",
        "--max_epochs=3",
        "--stride=16",
        "--out_dir=out/epochs",
    ]
    run("train.py", *args, cwd=workdir)
    steps_per_epoch = train.count_windows(int(19 * 40 * 0.9), 32, 16) // 4
    assert len(metrics(workdir / "out" / "epochs", "loss")) == 3 * steps_per_epoch
    # a run of epochs is not extended by steps without a word, nor does a config's max_iters shorten one
    args_of_steps = ["--init_from=resume", "--max_iters=9", "--out_dir=out/epochs"]
    done = run("train.py", *args_of_steps, cwd=workdir, check=False)
    assert done.returncode == 1 and "For max_iters, add --max_epochs=None" in done.stderr
    (workdir / "steps.py").write_text("max_iters = 2")
    done = run("train.py", "steps.py", *args[:-1], "--out_dir=out/both", cwd=workdir)
    assert "max_epochs=3 decides" in done.stderr
    assert len(metrics(workdir / "out" / "both", "loss")) == 3 * steps_per_epoch


def test_half_precision_compiled_and_constant(workdir):
    """bfloat16 autocast, and torch.compile where a C++ compiler is at hand, learn as float32 does."""
    losses = {}
    for name, args in {
        "float32": ["--dtype=float32"],
        "bfloat16": ["--dtype=bfloat16"],
        "compiled": ["--compile=True"] if shutil.which("g++") else [],
    }.items():
        args += ["--optimizer=muon", "--max_iters=20", "--sample_prompt=The"]
        run("train.py", *TINY, *args, f"--out_dir=out/{name}", cwd=workdir)
        losses[name] = metrics(workdir / "out" / name, "val_loss")[20]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert losses["compiled"] == pytest.approx(losses["float32"], rel=1e-4)


def test_best_weights_that_could_not_be_written_are_written_later(workdir):
    """A folder where the new file begins stands for a disk that is full for a while."""
    folder = workdir / "out" / "later"
    (folder / "best.pt.partial").mkdir(parents=True)
    done = run("train.py", *TINY, "--max_iters=2", f"--out_dir={folder}", cwd=workdir, check=False)
    assert done.returncode == 1 and "best.pt could not be written" in done.stderr
    (folder / "best.pt.partial").rmdir()
    run("train.py", "--init_from=resume", f"--out_dir={folder}", cwd=workdir)
    best, latest = (load_checkpoint(folder / name) for name in ("best.pt", "ckpt.pt"))
    assert best["best_val_loss"] == latest["best_val_loss"] == metrics(folder, "val_loss")[2]


def test_full_disk_keeps_the_old_checkpoint_and_trains_on(workdir):
    """torch.save fails in the middle."""
    run("train.py", *TINY, "--max_iters=5", "--out_dir=out/full", cwd=workdir)
    old = (workdir / "out" / "full" / "best.pt").read_bytes()
    args = ["--init_from=resume", "--max_iters=20", "--out_dir=out/full"]
    done = run_on_a_full_disk(100_000, "train.py", *args, cwd=workdir)
    assert "best.pt not written, what was there stays" in done.stderr and "step 20:" in done.stdout
    assert done.returncode == 1 and "the end of the run is lost" in done.stderr.splitlines()[-1]
    assert (workdir / "out" / "full" / "best.pt").read_bytes() == old
    assert not list((workdir / "out" / "full").glob("*.partial"))


@needs_mirror
def test_the_verdict_before_training_as_published(tmp_path, monkeypatch, reference):
    """The seeded 124M model's loss over the 9 training batches, through our windows and our evaluation."""
    run("prepare.py", "verdict", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "batch_size", 2)
    monkeypatch.setattr(train, "block_size", 256)
    monkeypatch.setattr(train, "eval_iters", 9)
    data, _, meta, _ = prepare.load_dataset("verdict", 256)
    torch.manual_seed(123)
    model = GPT(GPTConfig(**(reference["gpt_124m"]["config"] | {"block_size": 256}))).eval()
    assert meta["vocab_size"] == 50257 and len(train.eval_starts(len(data), 256, 18)) == 18
    loss = train.evaluate(model, data, prepare.load_mask("verdict", "train", data), "cpu")
    assert loss == pytest.approx(reference["loss_before_training"]["the_verdict_train_loss"], abs=1e-5)


# -- mistakes ------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(trained, workdir):
    data = workdir / "data"
    for name, change in {
        "cut": lambda folder: (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-3]),
        "short": lambda folder: (folder / "train.bin").write_bytes(
            (folder / "train.bin").read_bytes()[:-2000]
        ),
        "torn": lambda folder: (folder / "meta.json").write_text('{"tokenizer": 1'),
        "wild": lambda folder: np.full(46505, 999, dtype="<u2").tofile(folder / "val.bin"),
    }.items():
        shutil.copytree(data / "pydocs", data / name)
        change(data / name)
    (workdir / "other.txt").write_text("another alphabet " * 100)
    run("prepare.py", "other.txt", cwd=workdir)
    shutil.copytree(trained, workdir / "out" / "broken")
    (workdir / "out" / "broken" / "ckpt.pt").write_bytes(b"PK\3\4 damaged")
    shutil.copytree(trained, workdir / "out" / "weights")
    shutil.copy(trained / "best.pt", workdir / "out" / "weights" / "ckpt.pt")
    files = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    for words, *args in (
        (["data/nothing", "prepare.py nothing, or YOUR_TEXT --name=nothing"], "--dataset=nothing"),
        (["n_head=5", "n_embd=32"], "--n_head=5"),
        (["data/cut/val.bin", "truncated"], "--dataset=cut"),
        (["data/short/train.bin", "truncated"], "--dataset=short"),
        (["data/wild/val.bin", "the ID 999"], "--dataset=wild"),
        (["val.bin", "46505", "block_size=50000"], "--block_size=50000"),
        (["40000 windows", "train.bin"], "--data_order=epoch", "--batch_size=40000"),
        (["batch_size", "at least 1"], "--batch_size=0"),
        (["eval_iters", "at least 0"], "--eval_iters=-1"),
        (["CUDA", "--device=cpu"], "--device=cuda"),
        (["device=abacus"], "--device=abacus"),
        (["out/trained", "--init_from=resume"], "--out_dir=out/trained"),
        (["out/none/ckpt.pt"], "--init_from=resume", "--out_dir=out/none"),
        (["n_layer=2", "n_layer=3"], "--init_from=resume", "--out_dir=out/trained", "--n_layer=3"),
        (["block_size=64", "block_size=32"], "--init_from=out/trained/ckpt.pt", "--block_size=64"),
        (
            ["data/other has another tokenizer", "--tokenizer=out/trained/ckpt.pt"],
            "--init_from=out/trained/ckpt.pt",
            "--dataset=other",
        ),
        (["out/broken/ckpt.pt", "damaged"], "--init_from=resume", "--out_dir=out/broken"),
        (["no run to resume"], "--init_from=resume", "--out_dir=out/weights"),
        (["nowhere.pt"], "--init_from=nowhere.pt"),
        (["optimizer='muon'", "adamw"], "--init_from=resume", "--out_dir=out/trained", "--optimizer=muon"),
        (["stride", "data_order"], "--stride=3"),
        (["beta2", "less than 1"], "--beta2=1.5"),
        (["learning_rate", "at least 0"], "--learning_rate=-1"),
        (["out/trained/best.pt"], "--init_from=out/trained"),
        (["data/torn/meta.json", "damaged"], "--dataset=torn"),
        (["optimiser", "unknown setting"], "--optimiser=adam"),
        (["cannot write", "other.txt"], "--out_dir=other.txt"),
    ):
        resumes = any("init_from" in arg for arg in args)
        base = [] if resumes else [*TINY, "--out_dir=out/never"]
        if torch.cuda.is_available() and "--device=cuda" in args:
            continue
        line = refused("train.py", *base, *args, cwd=workdir)
        assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == files


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(workdir):
    args = [*TINY, "--max_iters=60", "--learning_rate=1e30", "--grad_clip=0", "--out_dir=out/nan"]
    line = refused("train.py", *args, cwd=workdir)
    assert "out/nan/ckpt.pt" in line and re.search(r"(iter|step) \d+", line)
    good = torch.load(workdir / "out" / "nan" / "ckpt.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in good["model"].values())


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is(workdir):
    """Of weights that undo each other, so that only a gradient is large: its square is beyond float32."""
    meta = json.loads((workdir / "data" / "pydocs" / "meta.json").read_text(encoding="utf-8"))
    model = GPT(GPTConfig(32, meta["vocab_size"], 2, 2, 32, activation="relu"))
    block = model.transformer.h[0]
    block.ln_2.weight.data *= 1e17
    block.mlp.c_fc.weight.data *= 1e17
    block.mlp.c_proj.weight.data *= 1e-34
    checkpoint = {"model": model.state_dict(), "model_args": vars(model.config), "meta": meta}
    torch.save(checkpoint, workdir / "steep.pt")
    args = ["--init_from=steep.pt", "--max_iters=5", "--out_dir=out/steep", "--device=cpu", "--eval_iters=2"]
    done = run("train.py", *args, "--sample_prompt=", cwd=workdir, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.search(r"iter 0: loss \d.*gradient norm inf", last) and "out/steep/ckpt.pt" in last


def test_ranks_must_divide_the_micro_batches(workdir):
    env = {"RANK": "0", "WORLD_SIZE": "4"}
    line = refused("train.py", *TINY, "--gradient_accumulation_steps=6", cwd=workdir, env=env)
    assert "gradient_accumulation_steps=6" in line and "4" in line


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU it trains")
def test_without_a_gpu_and_a_config_it_says_what_to_type(workdir):
    assert "python train.py config/quickstart.py" in refused("train.py", cwd=workdir)
