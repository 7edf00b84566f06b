"""Weights from everywhere: OpenAI's TensorFlow files, Hugging Face's folders, nanoGPT's checkpoints.

OpenAI's layout is made small here by TensorFlow itself, served over HTTP, and read by the real command line.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MIRROR, REPO, Server, needs_mirror, refused, run, run_on_a_full_disk

import prepare
from model import GPT, GPTConfig, load_checkpoint

GPT2_VOCABULARY = "openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
HPARAMS = {"n_vocab": 300, "n_ctx": 32, "n_embd": 48, "n_head": 4, "n_layer": 2}


@pytest.fixture(scope="module")
def tf():
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    return pytest.importorskip("tensorflow")


def variables(hparams=HPARAMS, seed=0):
    """Random variables under OpenAI's names, with OpenAI's shapes."""
    rng, C = np.random.default_rng(seed), hparams["n_embd"]
    shapes = {"model/wte": (hparams["n_vocab"], C), "model/wpe": (hparams["n_ctx"], C)}
    for i in range(hparams["n_layer"]):
        h = f"model/h{i}"
        shapes |= {f"{h}/{ln}/{p}": (C,) for ln in ("ln_1", "ln_2") for p in "gb"}
        for name, n_in, n_out in (
            ("attn/c_attn", C, 3 * C),
            ("attn/c_proj", C, C),
            ("mlp/c_fc", C, 4 * C),
            ("mlp/c_proj", 4 * C, C),
        ):
            shapes |= {f"{h}/{name}/w": (1, n_in, n_out), f"{h}/{name}/b": (n_out,)}
    shapes |= {"model/ln_f/g": (C,), "model/ln_f/b": (C,)}
    return {
        name: (name.endswith("/g") + 0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def released(tf, folder, tensors, hparams=HPARAMS):
    """The seven files of a release in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    prefix = str(folder / "model.ckpt")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(tensors[name]) for name in names],
    )
    (folder / "hparams.json").write_text(json.dumps(hparams))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    for name in ("model.ckpt.meta", "vocab.bpe", "encoder.json"):
        (folder / name).write_text("not read")
    assert {path.name for path in folder.iterdir()} == set(prepare.GPT2_FILES.split())
    return folder


def numpy_gpt2(v, idx, n_head):
    """GPT-2's forward pass of one sequence (T,) -> logits (T, V), from these variables alone."""

    def norm(x, g, b):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    x = v["model/wte"][idx] + v["model/wpe"][: len(idx)]
    T, C = x.shape
    future = np.triu(np.full((T, T), -np.inf), 1)
    for i in range(HPARAMS["n_layer"]):
        p = {name.removeprefix(f"model/h{i}/"): t for name, t in v.items() if name.startswith(f"model/h{i}/")}
        qkv = norm(x, p["ln_1/g"], p["ln_1/b"]) @ p["attn/c_attn/w"][0] + p["attn/c_attn/b"]
        heads = []
        for h in range(n_head):
            q, k, u = (qkv[:, j * C + h * C // n_head : j * C + (h + 1) * C // n_head] for j in range(3))
            heads.append(softmax(q @ k.T / np.sqrt(C // n_head) + future) @ u)
        x = x + np.concatenate(heads, -1) @ p["attn/c_proj/w"][0] + p["attn/c_proj/b"]
        m = norm(x, p["ln_2/g"], p["ln_2/b"]) @ p["mlp/c_fc/w"][0] + p["mlp/c_fc/b"]
        m = 0.5 * m * (1 + np.tanh(np.sqrt(2 / np.pi) * (m + 0.044715 * m**3)))
        x = x + m @ p["mlp/c_proj/w"][0] + p["mlp/c_proj/b"]
    return norm(x, v["model/ln_f/g"], v["model/ln_f/b"]) @ v["model/wte"].T


# -- OpenAI --------------------------------------------------------------------------------------------------


def serve(folder, size="124M"):
    Server.files = {
        f"/openaipublic.blob.core.windows.net/gpt-2/models/{size}/{path.name}": path.read_bytes()
        for path in folder.iterdir()
    }


def test_openais_release_by_the_command_line(tf, tmp_path, server):
    """One broken connection on the way; then our logits are NumPy's, and so is each greedy token."""
    v = variables()
    serve(released(tf, tmp_path / "release", v))
    Server.breaks = 1
    offline = {"PLAINGPT_MIRROR": server, "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = run("prepare.py", "124M", cwd=tmp_path, env=offline)
    assert "data/gpt2/ckpt.pt" in done.stdout
    assert sum("data-00000" in path for path, _ in Server.requests) == 2
    assert {path.name for path in (tmp_path / "data" / "gpt2").iterdir()} == {"ckpt.pt", "meta.json"}
    model = GPT.from_checkpoint(str(tmp_path / "data" / "gpt2" / "ckpt.pt")).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    idx = np.random.default_rng(1).integers(0, 300, 20)
    with torch.no_grad():
        logits = model(torch.tensor(idx)[None], all_logits=True)[0][0].numpy()
    np.testing.assert_allclose(logits, numpy_gpt2(v, idx, 4), atol=1e-4)
    sequence = idx.tolist()[:10]
    for token in model.generate(torch.tensor([sequence]), 20, temperature=0)[0, 10:].tolist():
        assert token == numpy_gpt2(v, np.array(sequence), 4)[-1].argmax()
        sequence.append(token)
    meta = json.loads((tmp_path / "data" / "gpt2" / "meta.json").read_text())
    assert len(meta["sources"]) == 7 and meta["tokenizer"] == {"type": "gpt2"}
    Server.requests.clear()
    run("prepare.py", "gpt2", cwd=tmp_path, env=offline)
    # it is there, and only the vocabulary, which this server has not, is asked for again
    assert all("/encodings/" in path for path, _ in Server.requests)

    # finetune from it on IDs that its vocabulary has, with a shorter context and dropout
    (tmp_path / "data" / "ids").mkdir()
    for split in ("train", "val"):
        np.random.default_rng(2).integers(0, 300, 2000).astype("<u2").tofile(
            tmp_path / "data" / "ids" / f"{split}.bin"
        )
    args = "--init_from=gpt2 --dataset=ids --block_size=16 --dropout=0.1 --max_iters=2 --batch_size=2"
    run(
        "train.py",
        *args.split(),
        "--device=cpu",
        "--eval_iters=2",
        "--sample_prompt=",
        "--out_dir=out/tuned",
        cwd=tmp_path,
    )
    assert load_checkpoint(str(tmp_path / "out" / "tuned" / "ckpt.pt"))["model_args"]["block_size"] == 16


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model/h1/mlp/c_fc/b": None}, ["Missing", "transformer.h.1.mlp.c_fc.bias"]),
        (
            {"model/h1/mlp/c_fc/w": np.zeros((1, 192, 48), np.float32)},
            ["transformer.h.1.mlp.c_fc.weight", "[48, 192]", "[192, 48]"],
        ),
        ({"model/h2/ln_1/g": np.zeros(48, np.float32)}, ["Unexpected", "transformer.h.2.ln_1.weight"]),
        ({"model/wpe": np.zeros((16, 48), np.float32)}, ["transformer.wpe.weight", "[16, 48]", "[32, 48]"]),
        ({"optimizer/step": np.zeros(1, np.float32)}, ["Unexpected", "optimizer.step"]),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(tf, tmp_path, change, words):
    tensors = {name: t for name, t in (variables() | change).items() if t is not None}
    released(tf, tmp_path / "release", tensors)
    with pytest.raises(prepare.UserError) as error:
        prepare.read_gpt2(tmp_path / "release")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("damage", ["cut", "hparams", "heads"])
def test_damaged_releases_are_refused(tf, tmp_path, damage):
    release = released(tf, tmp_path / "release", variables())
    if damage == "cut":
        data = release / "model.ckpt.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:-50_000])
    elif damage == "hparams":
        (release / "hparams.json").write_text("{")
    else:
        (release / "hparams.json").write_text(json.dumps(HPARAMS | {"n_head": 5}))
    with pytest.raises(prepare.UserError, match="release"):
        prepare.read_gpt2(release)


def test_failures_leave_nothing_that_looks_complete(tf, tmp_path, server):
    """A file that is not there; a full disk while it is converted; then a try that goes through."""
    release = released(tf, tmp_path / "release", variables())
    serve(release)
    data = "/openaipublic.blob.core.windows.net/gpt-2/models/124M/model.ckpt.data-00000-of-00001"
    content, Server.files[data] = Server.files[data], None
    offline = {"PLAINGPT_MIRROR": server, "HTTPS_PROXY": "http://127.0.0.1:9"}  # no way round the mirror
    done = run("prepare.py", "gpt2", cwd=tmp_path, check=False, env=offline)
    assert done.returncode and "Traceback" not in done.stderr
    assert data.split("/")[-1] in done.stderr and not (tmp_path / "data" / "gpt2").exists()
    Server.files[data] = content
    done = run_on_a_full_disk(len(content) + 1000, "prepare.py", "gpt2", cwd=tmp_path, env=offline)
    assert done.returncode and "Traceback" not in done.stderr and not (tmp_path / "data" / "gpt2").exists()
    run("prepare.py", "gpt2", cwd=tmp_path, env=offline)
    assert [path.name for path in (tmp_path / "data").iterdir() if path.name != ".cache"] == ["gpt2"]
    assert not [path for path in (tmp_path / "data" / ".cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_not_prepared_and_no_tensorflow(tmp_path, script):
    assert "python prepare.py gpt2-xl" in refused(script, "--init_from=gpt2-xl", "--device=cpu", cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(REPO)!r}); import {script[:-3]}; "
    code += "assert not {'tensorflow', 'requests', 'transformers', 'safetensors'} & sys.modules.keys()"
    run("-c", code, cwd=tmp_path)


def test_without_tensorflow_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(prepare.UserError, match="pip install tensorflow"):
        prepare.read_gpt2(tmp_path)


# -- Hugging Face --------------------------------------------------------------------------------------------


def small(**changes):
    torch.manual_seed(0)
    args = dict(block_size=16, vocab_size=60, n_layer=2, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**(args | changes))).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


IDX = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_weights": False}, {"activation": "gelu_erf"}, {"activation": "relu", "dropout": 0.2}],
)
def test_transformers_reads_what_we_save(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    ours = small(**changes)
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(ours(IDX, all_logits=True)[0], theirs(IDX).logits, atol=1e-5, rtol=1e-5)
    again = GPT.from_pretrained(dir=str(tmp_path))
    assert torch.equal(again(IDX)[0], ours(IDX)[0])
    assert again.config.dropout == 0.0


@pytest.mark.parametrize("tied", [True, False])
def test_we_read_what_transformers_saves(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    torch.testing.assert_close(ours(IDX, all_logits=True)[0], theirs(IDX).logits, atol=1e-5, rtol=1e-5)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied


def test_the_hubs_old_layout(tmp_path):
    """Files of the first years: no transformer. prefix, masks among the weights, no output layer."""
    from safetensors.torch import load_file, save_file

    small().save_pretrained(str(tmp_path))
    tensors = {
        name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).eval()(IDX)[0], small()(IDX)[0])


@pytest.mark.parametrize(
    "field, value",
    [("activation", "relu2"), ("position", "rope"), ("qk_norm", True)],
)
def test_what_gpt2_cannot_express_is_not_saved(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        small(**{field: value}).save_pretrained(str(tmp_path / "never"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "gptj"}, "model_type"),
        ({"activation_function": "silu"}, "activation_function"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, "n_inner"),
        ({"n_layer": 3}, "do not fit"),
        ({"n_embd": 64}, "do not fit"),
        (None, "config.json lacks"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change, words):
    small().save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({} if change is None else config | change))
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_a_folder_without_our_vocabulary(tmp_path):
    small().save_pretrained(str(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] is None
    line = refused("sample.py", "--init_from=hf", "--device=cpu", cwd=tmp_path)
    assert "hf has no tokenizer.json" in line


@needs_mirror
def test_a_hugging_face_folder_trains_and_samples(tmp_path):
    small(vocab_size=50257).save_pretrained(str(tmp_path / "hf"))
    shutil.copy(Path(MIRROR, GPT2_VOCABULARY), tmp_path / "hf" / "vocab.json")
    run("prepare.py", "verdict", cwd=tmp_path)
    args = "--init_from=hf --dataset=verdict --max_iters=1 --batch_size=2 --device=cpu --eval_iters=1"
    run("train.py", *args.split(), "--sample_prompt=", cwd=tmp_path)
    assert load_checkpoint(str(tmp_path / "out" / "ckpt.pt"))["model_args"]["n_embd"] == 32
    assert run(
        "sample.py", "--init_from=hf", "--max_new_tokens=5", "--start=I had", cwd=tmp_path
    ).stdout.strip()


# -- nanoGPT -------------------------------------------------------------------------------------------------


def test_nanogpts_checkpoints(trained, workdir):
    """Its format: iter_num, model_args without an activation, a compiled model's prefix, masks as buffers."""
    model = small(activation="gelu_erf", bias=False, vocab_size=103)
    names = "n_layer n_head n_embd block_size bias vocab_size dropout".split()
    weights = {f"_orig_mod.{name}": t for name, t in model.state_dict().items()}
    masks = {f"_orig_mod.transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    checkpoint = {
        "model": weights | masks,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: getattr(model.config, name) for name in names},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "pydocs", "wandb_log": False},
    }
    path = workdir / "nanogpt.pt"
    torch.save(checkpoint, path)
    again = GPT.from_checkpoint(str(path)).eval()
    assert again.config.activation == "gelu_erf"
    torch.testing.assert_close(again(IDX)[0], model(IDX)[0], atol=1e-5, rtol=1e-5)
    assert len(run("sample.py", f"--init_from={path}", "--max_new_tokens=9", cwd=workdir).stdout) == 10
    args = f"--init_from={path} --max_iters=1 --batch_size=2 --device=cpu --eval_iters=1 --sample_prompt="
    run("train.py", *args.split(), "--out_dir=out/from_nanogpt", cwd=workdir)
    assert Path(workdir, "out", "from_nanogpt", "ckpt.pt").exists()
