"""Hostile files, two of everything, and surroundings that fail: one line, and nothing lost."""

import copy
import http.server
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from conftest import CONTENT, REPO, TINY, metrics, refused, run, run_limited, run_on_a_full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import train
from configurator import run_config_file
from model import GPT, GPTConfig, ModelError, load_checkpoint
from prepare import UserError, load_dataset, say, visible

# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(trained):
    return torch.load(trained / "ckpt.pt", weights_only=True)


WEIGHT = "transformer.h.0.mlp.c_fc.weight"  # (128, 32)


def put(checkpoint, path, value):
    """A copy of a checkpoint with another value at a path of keys."""
    changed = copy.deepcopy(checkpoint)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place[path[-1]]) if callable(value) else value
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda w: torch.full((1,), 0.01).expand(128, 32),
        lambda w: w.T.contiguous().T,
        lambda w: torch.zeros(200_000)[1 : 1 + 2 * 128 * 32 : 2].view(128, 32),
        lambda w: w.double(),
        lambda w: w.half(),
    ],
)
def test_weights_get_memory_of_their_own(saved, tmp_path, change):
    torch.save(put(saved, ("model", WEIGHT), change), tmp_path / "it.pt")
    weight = GPT.from_checkpoint(tmp_path / "it.pt").state_dict()[WEIGHT]
    assert weight.is_contiguous() and weight.dtype == torch.float32
    assert weight.untyped_storage().nbytes() == 4 * weight.numel()
    torch.testing.assert_close(weight, change(saved["model"][WEIGHT]).float())


def test_tensors_that_share_memory_are_parted(saved, tmp_path):
    shared = saved["model"][WEIGHT]
    changed = put(saved, ("model", WEIGHT), shared)
    changed["model"][WEIGHT.replace("h.0", "h.1")] = changed["model"][WEIGHT]
    torch.save(changed, tmp_path / "it.pt")
    model = GPT.from_checkpoint(tmp_path / "it.pt")
    first, second = (block.mlp.c_fc.weight for block in model.transformer.h)
    first.data.zero_()
    assert torch.equal(second, shared)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", WEIGHT), lambda w: w.to_sparse()),
        (("model", WEIGHT), lambda w: w.long()),
        (("model", WEIGHT), lambda w: w[:1]),
        (("model", WEIGHT), lambda w: w.T),
        (("model", WEIGHT), lambda w: w.flatten()),
        (("model", WEIGHT), lambda w: w.to("meta")),
        (("model", WEIGHT), lambda w: w * math.nan),
        (("model", WEIGHT), lambda w: w / 0),
        (("model", WEIGHT), 3.0),
        (("model", WEIGHT), None),
        (("model",), []),
        (("model",), {}),
        (("model",), {3: torch.zeros(2)}),
        (("model_args",), None),
        (("model_args",), {}),
        (("model_args", "n_layer"), 10**9),
        (("model_args", "n_layer"), -1),
        (("model_args", "n_layer"), 2.0),
        (("model_args", "n_layer"), "2"),
        (("model_args", "n_layer"), None),
        (("model_args", "n_layer"), [2]),
        (("model_args", "n_head"), 0),
        (("model_args", "n_head"), 3),
        (("model_args", "vocab_size"), 1e30),
        (("model_args", "vocab_size"), 38.5),
        (("model_args", "vocab_size"), True),
        (("model_args", "block_size"), "long"),
        (("model_args", "dropout"), math.nan),
        (("model_args", "dropout"), "0.1"),
        (("model_args", "dropout"), 1.0),
        (("model_args", "activation"), "swish"),
        (("model_args", "activation"), {}),
        (("model_args", "position"), 3),
        (("model_args", "init"), None),
        (("model_args", "another"), 3),
        (("step",), "60"),
        (("step",), 60.5),
        (("step",), -1),
        (("tokens",), None),
        (("seconds",), math.nan),
        (("seconds",), -1.0),
        (("best_val_loss",), [2.0]),
        (("measured_by",), "never"),
        (("config",), []),
        (("meta",), "meta"),
        (("optimizer",), {}),
        (("scaler",), 3.0),
    ],
)
def test_a_field_that_makes_no_sense_is_one_line(saved, tmp_path, path, value):
    checkpoint = saved
    if path[-1] == "another":
        checkpoint = put(saved, ("model_args",), saved["model_args"] | {"another": 0})
    torch.save(put(checkpoint, path, value), tmp_path / "it.pt")
    with pytest.raises(ModelError) as error:
        GPT.from_checkpoint(tmp_path / "it.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seconds", [1e308, math.inf])
def test_seconds_without_end_spoil_no_numbers(saved, workdir, seconds):
    folder = workdir / "out" / f"long_{seconds}"
    folder.mkdir()
    torch.save(saved | {"seconds": seconds}, folder / "ckpt.pt")
    run("train.py", "--init_from=resume", "--max_iters=62", f"--out_dir={folder}", cwd=workdir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [line[key] for line in lines for key in line if line[key] is not None]
    assert any("loss" in line for line in lines) and all(map(math.isfinite, numbers))


def restored(checkpoint, optimizer="adamw"):
    """What train.py makes of a checkpoint's optimizers."""
    model = GPT.from_checkpoint(checkpoint)
    muon = 0.02 if optimizer == "muon" else None
    optimizers = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), muon)
    train.restore(optimizers, torch.amp.GradScaler("cpu"), checkpoint)
    return model, optimizers


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((0, "state", 0, "exp_avg"), torch.zeros(1)),
        ((0, "state", 0, "exp_avg"), lambda t: t.T),
        ((0, "state", 1, "exp_avg_sq"), lambda t: t[:-1]),
        ((0, "state", 1, "exp_avg_sq"), lambda t: t.flatten()),
        ((0, "state", 0, "step"), torch.zeros(3)),
        ((0, "state", 0, "step"), 3),
        ((0, "state", 0, "exp_avg"), None),
        ((0, "state", 0), {"exp_avg": torch.zeros(1)}),
        ((0, "state", 0), "state"),
        ((0, "state"), []),
        ((0, "param_groups"), [{}]),
        ((0, "param_groups"), None),
        ((0, "param_groups", 0, "params"), [0]),
        ((0, "param_groups", 0, "params"), {"x": 0}),
        ((0,), None),
    ],
)
def test_an_optimizers_state_must_fit_its_parameters(saved, path, value):
    with pytest.raises(UserError) as error:
        restored(put(saved, ("optimizer", *path), value))
    assert "optimizer" in str(error.value) and "\n" not in str(error.value)


def test_strides_of_an_optimizers_state_do_not_matter(saved):
    changed = put(
        saved, ("optimizer", 0, "state", 0, "exp_avg"), lambda t: torch.full((1,), 0.5).expand(t.shape)
    )
    _, (opt,) = restored(changed)
    state = opt.state[opt.param_groups[0]["params"][0]]["exp_avg"]
    assert state.is_contiguous() and state.untyped_storage().nbytes() == 4 * state.numel()
    assert (state == 0.5).all()


def test_an_optimizers_state_is_found_by_name(saved):
    # as if lines of the model's definition were swapped after the checkpoint was written
    changed = copy.deepcopy(saved)
    state = changed["optimizer"][0]["state"]
    changed["optimizer"][0]["state"] = {place + 1000: kept for place, kept in state.items()}
    for group in changed["optimizer"][0]["param_groups"]:
        named = sorted(zip(group["param_names"], group["params"], strict=True))
        group["param_names"] = [name for name, _ in named]
        group["params"] = [place + 1000 for _, place in named]
    for checkpoint in (saved, changed):
        model, (opt,) = restored(checkpoint)
        places = {}
        for group in saved["optimizer"][0]["param_groups"]:
            places |= zip(group["param_names"], group["params"], strict=True)
        for name, p in model.named_parameters():
            for key, value in saved["optimizer"][0]["state"][places[name]].items():
                assert torch.equal(opt.state[p][key], value), (name, key)


def test_a_hostile_checkpoint_neither_crashes_training_nor_resuming(saved, workdir):
    out = workdir / "out" / "hostile"
    out.mkdir()
    torch.save(put(saved, ("model", WEIGHT), lambda w: torch.full((1,), 0.01).expand(128, 32)), out / "w.pt")
    args = ["--init_from=out/hostile/w.pt", "--out_dir=out/hostile-on", "--max_iters=3"]
    run("train.py", *TINY.split(), *args, cwd=workdir)
    torch.save(put(saved, ("optimizer", 0, "state", 0, "exp_avg"), torch.zeros(1)), out / "ckpt.pt")
    line = refused("train.py", "--init_from=resume", "--out_dir=out/hostile", cwd=workdir)
    assert "exp_avg" in line


@pytest.mark.parametrize(
    "setting",
    [
        ("dtype", "int8"),
        ("max_iters", math.nan),
        ("max_iters", "many"),
        ("batch_size", 0),
        ("learning_rate", None),
        ("grad_clip", -1.0),
        ("seed", 2.5),
        ("data_order", ["random"]),
        ("dataset", 3),
        ("compile", "perhaps"),
    ],
)
def test_a_checkpoints_settings_are_checked_as_flags_are(saved, tmp_path, monkeypatch, setting):
    for name in train.read_settings(vars(train)):  # undone at the end
        monkeypatch.setattr(train, name, getattr(train, name))
    name, value = setting
    torch.save(put(saved, ("config", name), value), tmp_path / "ckpt.pt")
    train.init_from = "resume"
    with pytest.raises(UserError, match=name):
        train.load_start(tmp_path, {})
        train.check_settings({})


def test_a_compressed_checkpoint_is_refused(saved, tmp_path):
    # a few MB of it would become GBs
    torch.save(saved, tmp_path / "it.pt")
    with zipfile.ZipFile(tmp_path / "it.pt") as plain:
        with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for file in plain.infolist():
                packed.writestr(file.filename, plain.read(file))
    with pytest.raises(ModelError, match="damaged"):
        load_checkpoint(tmp_path / "small.pt")


def test_a_checkpoint_that_says_more_than_it_holds_takes_no_memory(tmp_path):
    # 26 billion weights of one number
    args = {"vocab_size": 9_000_000, "n_embd": 2880, "n_head": 1, "n_layer": 0, "block_size": 8}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(GPTConfig(**args)).state_dict().items()}
    weights = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save({"model": weights, "model_args": args}, tmp_path / "it.pt")
    with pytest.raises(ModelError, match="larger than the file"):
        GPT.from_checkpoint(tmp_path / "it.pt")


def test_what_is_no_regular_file_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ModelError, match="regular file"):
            load_checkpoint(path)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_change_of_a_checkpoint_is_harmless_or_one_line(saved, tmp_path_factory, data):
    checkpoint = copy.deepcopy(saved)
    place, path = checkpoint, []
    while isinstance(place, dict | list) and place and (not path or data.draw(st.booleans() | st.just(True))):
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        path.append(key)
        parent, place = place, place[key]
    tensors = st.sampled_from(
        [torch.zeros(1), torch.zeros(0), torch.ones(3, 3).T, torch.zeros(1).expand(9, 9)]
    )
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    anything = st.recursive(scalars | tensors, lambda x: st.lists(x, max_size=3), max_leaves=4)
    parent[key] = data.draw(anything | st.dictionaries(st.text(max_size=3), anything, max_size=2))
    file = tmp_path_factory.mktemp("fuzz") / "ckpt.pt"
    torch.save(checkpoint, file)
    try:
        model, optimizers = restored(load_checkpoint(file))
    except (ModelError, UserError) as error:
        assert "\n" not in str(error)
        return
    x = torch.zeros(2, 8, dtype=torch.int64)
    model(x, x)[1].backward()
    for opt in optimizers:
        opt.step()  # with sizes that do not fit it would write into other memory
    for name, p in model.named_parameters():
        assert p.shape == saved["model"][name].shape and p.is_contiguous()


# -- metrics, datasets, folders of others --------------------------------------------------------------------

LINES = [
    b"[1, 2]",
    b"3",
    b"null",
    b'"text"',
    b"{",
    b"{}",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"step": "3", "loss": 1.0}',
    b'{"step": null, "loss": 1.0}',
    b'{"step": -5, "loss": 1.0}',
    b'{"step": NaN, "loss": 1.0}',
    b'{"step": -Infinity, "loss": 1.0}',
    b'{"step": 3, "loss": "low"}',
    b'{"step": 3, "loss": [1]}',
    b'{"step": 3, "val_loss": {}}',
    b'{"step": 99999, "loss": 1.0}',
]


def test_lines_of_metrics_that_are_not_ours_are_left_out(tmp_path):
    good = [{"step": 0, "val_loss": 3.0}, {"step": 2, "loss": 2.0, "grad_norm": None}]
    lines = [json.dumps(good[0]).encode(), *LINES, json.dumps(good[1]).encode(), b'{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    kept = train.Metrics(tmp_path, 40)
    kept.write_all()
    assert kept.lines == good
    kept.log(step=40, loss=1.0)
    kept.plot()
    assert [json.loads(line)["step"] for line in open(tmp_path / "metrics.jsonl")] == [0, 2, 40]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_lose_no_line_and_no_folder(tmp_path, capsys):
    out = tmp_path / "out"
    lines = train.Metrics(out, 0)
    lines.write_all()
    lines.log(step=0, val_loss=3.0)
    shutil.rmtree(out)
    out.write_text("in the way")
    lines.log(step=1, loss=2.0)
    assert "metrics.jsonl is not written" in capsys.readouterr().err
    out.unlink()
    lines.log(step=2, loss=1.0)  # the folder is made again
    lines.plot()
    assert [json.loads(line)["step"] for line in open(out / "metrics.jsonl")] == [0, 1, 2]
    assert (out / "loss.png").exists()


@pytest.mark.parametrize(
    "meta",
    [
        b"",
        b"[]",
        b"3",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        {"vocab_size": 1e30},
        {"vocab_size": True},
        {"vocab_size": 38.5},
        {"vocab_size": "91"},
        {"vocab_size": None},
        {"tokenizer": None},
        {"tokenizer": "char"},
        {"tokenizer": {}},
        {"tokenizer": {"type": "char"}},
        {"tokenizer": {"type": "char", "chars": 5}},
        {"tokenizer": {"type": "char", "chars": [1, 2]}},
        {"tokenizer": {"type": "char", "chars": ["a", "bc"]}},
        {"tokenizer": {"type": "char", "chars": [["a"]]}},
        {"tokenizer": {"type": "word", "vocab": [1, 2]}},
        {"tokenizer": {"type": "word", "vocab": ["a"]}},
        {"tokenizer": {"type": "bpe", "json": {}}},
        {"tokenizer": {"type": ["char"]}},
        {"tokenizer": {"type": "gpt2", "more": 1}},
        {"train_tokens": None},
        {"train_tokens": "many"},
        {"train_tokens": 1e300},
        {"val_tokens": [3]},
        {"dtype": 16},
    ],
)
def test_a_meta_that_makes_no_sense_is_one_line(workdir, tmp_path, monkeypatch, meta):
    shutil.copytree(workdir / "data" / "pydocs", tmp_path / "data" / "it")
    path = tmp_path / "data" / "it" / "meta.json"
    if isinstance(meta, dict):
        meta = json.dumps(json.loads(path.read_text()) | meta).encode()
    path.write_bytes(meta)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load_dataset("it", 32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"3", b"\xff", b"[" * 100_000, {"n_embd": "32"}, {"n_layer": 10**9}, {"n_layer": 1.5}]
    + [{"vocab_size": True}, {"n_embd": None}, {"n_head": {}}, {"activation_function": ["gelu"]}]
    + [{"n_positions": -1}, {"layer_norm_epsilon": "small"}, {"n_inner": []}],
)
def test_a_hugging_face_config_that_makes_no_sense_is_one_line(tmp_path, config):
    GPT(GPTConfig(8, 64, 1, 2, 32)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(config, dict):
        config = json.dumps(json.loads(path.read_text()) | config).encode()
    path.write_bytes(config)
    with pytest.raises(ModelError) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


# -- links, locks, signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "vocab.json"])
def test_a_pipe_in_a_hugging_face_folder_is_refused(tmp_path, name):
    GPT(GPTConfig(16, 60, 1, 2, 32)).save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ModelError, match="is no file"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_meta_json_that_is_no_file_is_not_as_if_there_were_none(tmp_path, monkeypatch, make):
    """The IDs would be taken for GPT-2's."""
    (tmp_path / "data" / "it").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "data" / "it" / f"{split}.bin").write_bytes(b"\1\0" * 99)
    make(tmp_path / "data" / "it" / "meta.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="meta.json is no file"):
        load_dataset("it", 8)


@pytest.mark.parametrize("kind", ["expanded", "compressed"])
def test_a_pytorch_model_bin_that_says_more_than_it_holds(tmp_path, kind):
    model = GPT(GPTConfig(16, 60, 1, 2, 32))
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights, path = model.state_dict(), tmp_path / "pytorch_model.bin"
    if kind == "expanded":
        weights["more"] = torch.zeros(1).expand(10**6)
    torch.save(weights, path)
    if kind == "compressed":
        with (
            zipfile.ZipFile(path) as old,
            zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        (tmp_path / "new").replace(path)
    with pytest.raises(ModelError, match="larger than the file|compressed"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("field", ["n_layer", "vocab_size", "dropout"])
def test_true_is_no_number(field):
    with pytest.raises(ModelError, match=field):
        GPTConfig(**{field: True})


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64])
def test_weights_that_are_no_real_numbers_are_refused(saved, kind):
    weights = {name: tensor.to(kind) for name, tensor in saved["model"].items()}
    with pytest.raises(ModelError, match="is of torch"):
        GPT.from_checkpoint(saved | {"model": weights})


def test_a_full_disk_leaves_no_half_an_export(trained, tmp_path):
    args = ["sample.py", f"--out_dir={trained}", "--device=cpu", f"--export={tmp_path / 'hf'}"]
    done = run_on_a_full_disk(20_000, *args, cwd=tmp_path)
    assert done.returncode and "Traceback" not in done.stderr and "hf cannot be written" in done.stderr
    assert not list(tmp_path.iterdir())
    run(*args, cwd=tmp_path)
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_nothing_is_written_through_a_link(workdir, tmp_path):
    out = tmp_path / "out" / "it"
    out.mkdir(parents=True)
    (tmp_path / "data").symlink_to(workdir / "data")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    written = ("metrics.jsonl", "best.pt", "ckpt.pt", "loss.png")
    for name in (*(f"{name}.partial" for name in written), "metrics.jsonl", "loss.png"):
        (out / name).symlink_to(victim)
    run("train.py", *TINY.split(), "--max_iters=3", "--out_dir=out/it", cwd=tmp_path)
    assert victim.read_text() == "mine"
    assert sorted(path.name for path in out.iterdir()) == sorted(written)
    assert not any(path.is_symlink() for path in out.iterdir())


begun = []


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """A test that fails must not leave a run behind, which would take a core for hours."""
    yield
    while begun:
        process = begun.pop()
        process.kill()
        process.communicate()


def begin(*args, cwd, **options):
    """A training run that has begun to log."""
    command = [sys.executable, REPO / "train.py", *TINY.split(), "--max_iters=100000", *args]
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    begun.append(process)
    for line in process.stdout:
        if line.startswith("iter 3"):
            return process
    raise AssertionError(process.stderr.read())


def test_two_runs_in_one_folder(workdir):
    first = begin("--out_dir=out/two", cwd=workdir)
    line = refused("train.py", "--init_from=resume", "--out_dir=out/two", cwd=workdir)
    assert "another process" in line and "out/two" in line
    first.kill()  # which releases the lock
    first.wait()
    run("train.py", "--init_from=resume", "--out_dir=out/two", "--max_iters=4", cwd=workdir)
    steps = metrics(workdir / "out" / "two", "loss")
    assert list(steps) == sorted(set(steps))


@pytest.mark.parametrize("ignored", [False, True])
def test_a_lost_connection_saves_unless_nohup_was_there_before(workdir, ignored):
    out = f"out/hangup{ignored}"
    nohup = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = begin(f"--out_dir={out}", cwd=workdir, preexec_fn=nohup if ignored else None)
    process.send_signal(signal.SIGHUP)
    if ignored:
        time.sleep(1)
        assert process.poll() is None
        process.terminate()
    said, _ = process.communicate()
    assert process.returncode == 0 and "--init_from=resume" in said
    step = torch.load(workdir / out / "ckpt.pt", weights_only=True)["step"]
    assert step > 3 and f"stopped after {step} steps" in said


def test_a_folder_that_is_removed_is_made_again(workdir):
    process = begin("--out_dir=out/removed", cwd=workdir)
    process.send_signal(signal.SIGSTOP)
    shutil.rmtree(workdir / "out" / "removed")
    process.send_signal(signal.SIGCONT)
    process.terminate()
    process.communicate()
    assert process.returncode == 0
    assert list(metrics(workdir / "out" / "removed", "loss"))[:3] == [0, 1, 2]
    assert (workdir / "out" / "removed" / "ckpt.pt").exists()


# -- surroundings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "first"},
        {"WORLD_SIZE": "abc"},
        {"LOCAL_RANK": "0.5"},
        {"RANK": "3"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999999"},
        {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
    ],
)
def test_torchruns_variables_that_make_no_sense(workdir, env):
    args = [*TINY.split(), "--gradient_accumulation_steps=2", "--out_dir=out/never"]
    refused("train.py", *args, cwd=workdir, env=env)


@pytest.mark.parametrize(
    "redirect", [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&- 2>&-", "<&- >&- 2>&-"]
)
def test_what_cannot_be_printed_ends_no_run(workdir, redirect):
    out = f"out/print{abs(hash(redirect))}"
    flags = f"{TINY.replace('--sample_prompt=', '')} --max_iters=3 --out_dir={out}"
    done = subprocess.run(f"{sys.executable} {REPO}/train.py {flags} {redirect}", shell=True, cwd=workdir)
    assert done.returncode == 0
    assert list(metrics(workdir / out, "loss")) == [0, 1, 2]
    checkpoint = torch.load(workdir / out / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 3


@pytest.mark.parametrize("flag", ["", "--show_probs=True"])
def test_sample_says_in_one_line_that_it_cannot_write(trained, workdir, flag):
    flags = f"--out_dir={trained} --max_new_tokens=5 --device=cpu {flag}"
    done = subprocess.run(
        f"{sys.executable} {REPO}/sample.py {flags} >/dev/full",
        shell=True,
        cwd=workdir,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("sample.py: ")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "flag", ["--max_new_tokens=5", "--show_probs=True", "--max_new_tokens=0 --page=p.html"]
)
def test_numbers_that_overflow_are_one_line(saved, tmp_path, flag):
    torch.save(put(saved, ("model", WEIGHT), lambda w: w * 1e7), tmp_path / "w.pt")
    args = [f"--init_from={tmp_path}/w.pt", "--start=The", "--device=cpu", "--dtype=float16", *flag.split()]
    done = run("sample.py", *args, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.endswith("the model's numbers overflow in this precision; try --dtype=float32\n")
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("script", ["prepare.py book.txt --tokenizer=gpt2", "sample.py --init_from=hf"])
def test_a_package_that_is_missing_is_one_line(tmp_path, script):
    for name in ("tiktoken", "safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"raise ImportError('No module named {name}', name={name!r})"
        )
    (tmp_path / "hf").mkdir()
    (tmp_path / "book.txt").write_text("some text " * 100)
    line = refused(*script.split(), cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert "No module named" in line


def test_an_export_that_is_interrupted_leaves_nothing(saved, tmp_path):
    """Ctrl-C in the middle: a slow safetensors stands for a large model."""
    torch.save(saved, tmp_path / "w.pt")
    (tmp_path / "safetensors").mkdir()
    (tmp_path / "safetensors" / "__init__.py").write_text("")
    slow = "import sys, time\ndef save_file(*args, **more): print('saves', flush=True); time.sleep(60)\n"
    (tmp_path / "safetensors" / "torch.py").write_text(slow)
    args = [
        REPO / "sample.py",
        f"--init_from={tmp_path}/w.pt",
        f"--export={tmp_path}/new/folder",
        "--device=cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout.readline() == "saves\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and errors == "sample.py: interrupted; nothing half-done is left\n"
    assert not list((tmp_path / "new").iterdir())


def test_a_background_command_ignores_ctrl_c(workdir, tmp_path):
    """A shell script starts commands with & so that SIGINT is ignored, which must stay so."""
    (tmp_path / "book.txt").write_text("some text " * 100)
    flags = f"{TINY} --max_iters=300 --out_dir={tmp_path}/out"
    commands = [f"train.py {flags}"] + [
        f"prepare.py {tmp_path}/book.txt --name=background_{kind} --tokenizer={kind}"
        for kind in ("char", "bpe")
    ]
    for command in commands:
        process = subprocess.Popen(
            [sys.executable, *f"{REPO}/{command}".split()],
            cwd=workdir,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert process.returncode == 0
    assert len(metrics(tmp_path / "out", "loss")) == 300


def test_without_matplotlib_there_is_no_picture(workdir, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no matplotlib')")
    args = [*TINY.split(), "--max_iters=3", "--out_dir=out/no-picture"]
    done = run("train.py", *args, cwd=workdir, env={"PYTHONPATH": str(tmp_path)})
    assert "loss.png is not drawn: no matplotlib" in done.stderr
    assert (workdir / "out" / "no-picture" / "ckpt.pt").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py", "prepare.py"])
def test_without_docstrings_and_assertions(workdir, script):
    done = run("-OO", REPO / script, "--help", cwd=workdir)
    assert "--" in done.stdout and "None\n" not in done.stdout[:5]


def test_a_dataset_that_shrinks_is_said(workdir, tmp_path):
    shutil.copytree(workdir / "data" / "pydocs", tmp_path / "data" / "pydocs")
    process = begin("--out_dir=out/it", cwd=tmp_path)
    with open(tmp_path / "data" / "pydocs" / "train.bin", "r+b") as file:
        file.truncate(1000)
    _, errors = process.communicate()
    assert process.returncode == 1 and "train.bin has become shorter" in errors and "Traceback" not in errors


def test_a_terminal_is_shown_control_characters_and_does_not_obey_them(tmp_path):
    text = "red \x1b[31m bell \a tab\t nel\x85 back\b\r\n"
    main, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        assert visible(text, stream) == "red \\x1b[31m bell \\x07 tab\t nel\\x85 back\\x08\\r\n"
        say("\x1b[2J", stream)
    assert b"\x1b[2J" not in os.read(main, 100)
    with open(tmp_path / "file", "w") as stream:
        assert visible(text, stream) == text


# -- prepare.py ----------------------------------------------------------------------------------------------


def test_two_prepares_of_one_name(tmp_path):
    text = "".join(f"{i} words and numbers {i * i}\n" for i in range(200_000))
    (tmp_path / "it.txt").write_text(text)
    for _ in range(3):
        command = [sys.executable, REPO / "prepare.py", "it.txt"]
        both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        errors = [process.communicate()[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes in ([0, 0], [0, 1]), errors
        if codes == [0, 1]:
            assert any("another process is at work" in error for error in errors), errors
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["it"]
        sizes = [(tmp_path / "data" / "it" / f"{split}.bin").stat().st_size for split in ("train", "val")]
        assert sum(sizes) == 2 * len(text)


def test_two_ctrl_c_end_it_at_once_and_leave_nothing(tmp_path):
    text = "".join(f"{i % 999} words and numbers {i % 77}\n" for i in range(100_000))
    (tmp_path / "it.txt").write_text(text * 5)
    for i in range(4):
        process = subprocess.Popen(
            [sys.executable, REPO / "prepare.py", "it.txt", "--tokenizer=word"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        partial = tmp_path / "data" / ".it.new" / "train.bin"
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        for _ in range(2 + i):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02 * i)
        _, errors = process.communicate(timeout=30)
        assert errors == "prepare.py: interrupted; nothing half-done is left, run it again\n"
        assert process.returncode == 1 and list((tmp_path / "data").iterdir()) == []


def test_two_downloads_of_one_file(tmp_path, server):
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from prepare import download; download(*sys.argv[1:3])"
    )
    command = [sys.executable, "-c", code, f"{server}/file", "a/file", str(REPO)]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "a" / "file").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


class Versions(http.server.BaseHTTPRequestHandler):
    """A file that changes: the first request breaks off in version 1, later ones get version 2."""

    count = 0

    def do_GET(self):
        type(self).count += 1
        version = min(self.count, 2)
        body = bytes([version]) * 100_000
        start = 0
        if self.headers.get("If-Range") == f'"{version}"' or "If-Range" not in self.headers:
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{version}"')
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : 50_000 if version == 1 else None])

    def log_message(self, *args):
        pass


def test_parts_of_two_versions_are_not_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("PLAINGPT_MIRROR", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Versions) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        prepare.download(f"http://127.0.0.1:{httpd.server_port}/file", tmp_path / "file")
        httpd.shutdown()
    assert (tmp_path / "file").read_bytes() == b"\2" * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_part_of_another_server_is_not_joined(tmp_path, server):
    """A server that names no version begins anew, and then nobody may go on by the version of before."""
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.part.version").write_text('"old"')
    with pytest.raises(OSError):
        prepare.fetch(f"{server}/file", tmp_path / "file.part")  # the answer is 416
    assert not list(tmp_path.iterdir())


def test_a_download_is_not_written_through_a_link(tmp_path, server):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "file.part").symlink_to(tmp_path / "victim")
    prepare.download(f"{server}/file", tmp_path / "file")
    assert (tmp_path / "victim").read_text() == "mine" and (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("suffix", [".txt.gz", ".txt.zst", ".jsonl.gz"])
def test_a_small_file_that_unpacks_to_much_takes_little_memory(tmp_path, suffix):
    path = tmp_path / f"it{suffix}"
    with prepare.opener(path)(path, "wb") as file:
        for _ in range(400):
            file.write(b"a" * 1_000_000)
    assert path.stat().st_size < 1_000_000
    done = run_limited("RLIMIT_AS", 2 << 30, "prepare.py", str(path), cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "100,000,000 characters" in done.stderr


def test_rows_that_unpack_to_much_are_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    monkeypatch.setattr(prepare, "LONGEST", 1000)
    for name, texts in (("short", ["a" * 50] * 40), ("long", ["a" * 50] * 20 + ["a" * 2000])):
        path = tmp_path / f"{name}.parquet"
        write_table(pyarrow.table({"text": texts}), path, compression="zstd")
        read = prepare.TextFiles([path])
        if name == "short":
            assert [[*document] for document in read] == [[text] for text in texts]
        else:
            with pytest.raises(prepare.UserError, match="1,000 bytes and could fill the memory"):
                list(read)


def test_what_stops_between_two_renames_loses_no_dataset(tmp_path, monkeypatch):
    """The old dataset comes back at once, and after a kill with the next run, even if that one fails."""
    monkeypatch.chdir(tmp_path)

    def contents():
        return {path.name: path.read_bytes() for path in (tmp_path / "data" / "it").iterdir()}

    def write(text):
        prepare.write_dataset("it", [[text]], [], "char")

    def interrupted(path, target):
        if path.name == ".it.new":
            raise KeyboardInterrupt
        return os.rename(path, target)

    write("the first text " * 10)
    old = contents()
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write("another text " * 10)
    assert contents() == old and os.listdir("data") == ["it"]
    (tmp_path / "data" / "it").rename(tmp_path / "data" / ".it.old")  # a kill in between
    with pytest.raises(UserError, match="would be empty"):
        write("a")
    assert contents() == old and os.listdir("data") == ["it"]
    write("another text " * 10)
    assert contents() != old and os.listdir("data") == ["it"]


def test_links_to_folders_are_counted_and_folders_that_cannot_be_read_are_said(tmp_path):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "more" / "a.txt").write_text("some text " * 20)
    (tmp_path / "texts" / "link").symlink_to(tmp_path)
    assert "1 files are not text, or are links to folders" in run("prepare.py", "texts", cwd=tmp_path).stdout
    (tmp_path / "texts" / "more").chmod(0)
    if os.access(tmp_path / "texts" / "more", os.R_OK):
        pytest.skip("root reads every folder")
    assert "texts/more cannot be read" in refused("prepare.py", "texts", cwd=tmp_path)


def test_pipes_are_no_prompts(trained, workdir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    args = [f"--out_dir={trained}", f"--start=FILE:{tmp_path}/pipe", "--device=cpu"]
    assert "no such file" in refused("sample.py", *args, cwd=workdir)


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """{tokenizer: (a folder with data/<tokenizer>, its meta.json as an object)}"""
    folder = tmp_path_factory.mktemp("described")
    (folder / "text.txt").write_text("A few words, again and again. " * 100)
    found = {}
    for kind in ("char", "word", "bpe"):
        args = [f"--tokenizer={kind}", "--vocab_size=270", f"--name={kind}"]
        run("prepare.py", "text.txt", *args, cwd=folder)
        found[kind] = json.loads((folder / "data" / kind / "meta.json").read_text())
    return folder, found


def test_a_panic_of_the_tokenizers_package_is_one_line(described):
    meta = copy.deepcopy(described[1]["bpe"])
    meta["tokenizer"]["json"]["model"]["continuing_subword_prefix"] = "longer than any entry"
    with pytest.raises(UserError, match="damaged or unknown"):
        prepare.load_tokenizer(meta)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_meta_json_is_read_or_refused_in_one_line(described, monkeypatch, data):
    folder, found = described
    monkeypatch.chdir(folder)
    kind = data.draw(st.sampled_from(sorted(found)))
    meta = parent = copy.deepcopy(found[kind])
    key = data.draw(st.sampled_from(sorted(meta)))
    while isinstance(parent[key], dict | list) and parent[key] and data.draw(st.integers(0, 3)):
        parent = parent[key]
        key = data.draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
    words = st.sampled_from(["char", "word", "bpe", "gpt3", "uint16", "uint32"]) | st.text(max_size=3)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | words
    anything = st.recursive(
        plain, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=2), max_leaves=5
    )
    if data.draw(st.booleans()):
        parent[key] = data.draw(anything)
    else:
        del parent[key]
    (folder / "data" / kind / "meta.json").write_text(json.dumps(meta))
    try:
        train_data, val_data, meta, tokenizer = load_dataset(kind, 8)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert max(train_data.max(), val_data.max()) < tokenizer.vocab_size
    assert isinstance(tokenizer.decode(val_data.tolist()), str)
    prepare.bytes_per_token(meta, tokenizer, val_data)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_metrics_file_is_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3), st.lists
    )
    names = st.sampled_from(["step", "loss", "val_loss", "grad_norm", "x"])
    line = st.dictionaries(names, values, max_size=3).map(lambda line: json.dumps(line).encode())
    lines = data.draw(st.lists(line | st.binary(max_size=20), max_size=6))
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    kept = train.Metrics(folder, 5)
    kept.write_all()
    assert all(0 <= line["step"] < 5 for line in kept.lines)
    kept.log(step=5, loss=1.0, val_loss=2.0)
    kept.plot()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_config_file_sets_settings_or_is_one_line(tmp_path_factory, data):
    names = st.sampled_from(
        ["batch_size", "learning_rate", "dtype", "min_lr", "compile", "x", "_x", "out_dir"]
    )
    values = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=4)
        | st.lists(st.integers())
    )
    text = data.draw(st.dictionaries(names, values.map(repr)) | st.text(max_size=30))
    if isinstance(text, dict):
        text = "".join(f"{name} = {value}\n" for name, value in text.items())
    path = tmp_path_factory.mktemp("fuzz") / "config.py"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    known = train.read_settings(vars(train))
    try:
        found = run_config_file(str(path), known)
    except UserError:
        return
    assert found.keys() <= known.keys()
