"""A vocabulary of one's own, losses that compare, and folders that Hugging Face's tools take as is."""

import argparse
import inspect
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import MIRROR, TINY, metrics, needs_mirror, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import prepare
from model import GPT, GPTConfig, ModelError

END = "<|endoftext|>"
KINDS = ["bpe", "char", "english"] if MIRROR else ["bpe", "char"]  # datasets, each with another tokenizer
CHINESE = "人之初,性本善。性相近,习相远。\n苟不教,性乃迁。教之道,贵以专。\n" * 60


RUSSIAN = "Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил.\n" * 40


def prepared(folder, *args):
    run("prepare.py", *args, cwd=folder)
    name = next(arg for arg in args if arg.startswith("--name=")).removeprefix("--name=")
    return json.loads((folder / "data" / name / "meta.json").read_text(encoding="utf-8"))


def ids_of(folder, name, split):
    return np.fromfile(folder / "data" / name / f"{split}.bin", "<u2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """data/bpe and data/char: three documents; data/zh: Chinese; out/bpe and out/char, tiny runs of them."""
    folder = tmp_path_factory.mktemp("bpe")
    topics = prepare.pydocs()
    documents = [
        topics[:150_000],
        topics[150_000:300_000] + "  \n\n\tUmlaute: äöü 🙂\r\n",
        topics[300_000:400_000],
    ]
    for i, text in enumerate(documents):
        (folder / f"{i}.txt").write_bytes(text.encode())
    (folder / "zh.txt").write_text(CHINESE, encoding="utf-8")
    files = ["0.txt", "1.txt", "2.txt"]
    prepared(folder, *files, "--tokenizer=bpe", "--vocab_size=700", "--name=bpe")
    prepared(folder, *files, "--name=char")
    prepared(folder, "zh.txt", "--tokenizer=bpe", "--vocab_size=400", "--name=zh")
    if MIRROR:
        prepared(folder, "0.txt", "zh.txt", "--tokenizer=gpt2", "--name=english")
    for name in KINDS:
        args = [
            f"--dataset={name}",
            f"--out_dir=out/{name}",
            "--max_iters=60",
            "--bias=False",
            "--dropout=0.1",
        ]
        run("train.py", *TINY.split(), *args, cwd=folder)
    return folder


def text_of(folder, i):
    return (folder / f"{i}.txt").read_bytes().decode().replace("\r\n", "\n")


# -- bpe -----------------------------------------------------------------------------------------------------


def test_the_ids_are_those_of_each_whole_document(work):
    meta = json.loads((work / "data" / "bpe" / "meta.json").read_text(encoding="utf-8"))
    assert meta["vocab_size"] == 700 and meta["tokenizer"]["type"] == "bpe"
    tokenizer = prepare.load_tokenizer(meta)
    assert tokenizer.encode(END) == [tokenizer.end_of_text]
    whole = {"train": [*map(lambda i: tokenizer.bpe.encode(text_of(work, i)).ids, (0, 1))]}
    whole["val"] = [tokenizer.bpe.encode(text_of(work, 2)).ids]
    for split, documents in whole.items():
        expected = [token for ids in documents for token in (*ids, tokenizer.end_of_text)]
        assert ids_of(work, "bpe", split).tolist() == expected
        texts = tokenizer.decode(expected).split(END)[:-1]
        assert texts == [text_of(work, i) for i in ((0, 1) if split == "train" else (2,))]


def test_it_learns_from_the_training_text_alone_and_the_same_again(work):
    meta = json.loads((work / "data" / "bpe" / "meta.json").read_text(encoding="utf-8"))
    args = ["0.txt", "1.txt", "2.txt", "--tokenizer=bpe", "--vocab_size=700", "--name=again"]
    assert prepared(work, *args)["tokenizer"] == meta["tokenizer"]
    trained = prepare.BPETokenizer.trained([text_of(work, 0), text_of(work, 1)], 700)
    assert trained.meta == meta["tokenizer"]


def test_it_shortens_chinese(work):
    meta = json.loads((work / "data" / "zh" / "meta.json").read_text(encoding="utf-8"))
    assert len(CHINESE) / (meta["train_tokens"] + meta["val_tokens"]) > 1.5  # characters a token


@pytest.fixture(scope="module")
def learned():
    return prepare.BPETokenizer.trained([prepare.pydocs()[:50_000], CHINESE, RUSSIAN], 600)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text()
    | st.lists(st.sampled_from(["人之初", "душой", " the", "\n\n ", "🙂", "'s", END])).map("".join)
)
def test_any_text_comes_back_from_the_ids_of_the_package(learned, text):
    ids = learned.encode(text)
    assert ids == learned.bpe.encode(text, add_special_tokens=False).ids
    assert learned.decode(ids) == text and max(ids, default=0) < 600
    if ids:
        size = prepare.bytes_per_token({}, learned, np.array(ids)) * len(ids)
        assert round(size) == len(text.replace(END, "").encode())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("language", ["chinese", "russian", "source"])
def test_a_language_from_its_text_to_a_folder_for_others(tmp_path, language):
    """Prepared, trained, resumed, sampled and exported; Hugging Face's tools write the same text."""
    from transformers import pipeline

    text = {"chinese": CHINESE * 5, "russian": RUSSIAN * 20, "source": inspect.getsource(argparse)}[language]
    (tmp_path / "it.txt").write_text(text, encoding="utf-8")
    prepared(tmp_path, "it.txt", "--tokenizer=bpe", "--vocab_size=500", "--name=it")
    args = [*TINY.split(), "--dataset=it", "--out_dir=out/it"]
    run("train.py", *args, "--max_iters=40", cwd=tmp_path)
    run("train.py", "--init_from=resume", "--out_dir=out/it", "--max_iters=60", cwd=tmp_path)
    run("sample.py", "--out_dir=out/it", "--export=hf", cwd=tmp_path)
    prompt = text[:9]
    theirs = pipeline("text-generation", str(tmp_path / "hf"))(prompt, max_new_tokens=15, do_sample=False)
    ours = greedy(tmp_path, "it", prompt, 15)
    assert theirs[0]["generated_text"].rstrip("\N{REPLACEMENT CHARACTER}") == (prompt + ours).rstrip(
        "\N{REPLACEMENT CHARACTER}"  # half a character, where the 15th token ends in its middle
    )


@pytest.mark.parametrize("size", ["0", "256", "65537", "many"])
def test_sizes_that_cannot_be(work, size):
    done = run("prepare.py", "zh.txt", "--tokenizer=bpe", f"--vocab_size={size}", cwd=work, check=False)
    assert done.returncode and "vocab_size" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", [[], ["--tokenizer=word"], ["--tokenizer=bpe"]])
def test_a_size_that_changes_nothing_is_said(work, kind):
    done = run("prepare.py", "zh.txt", *kind, "--vocab_size=512", "--name=sized", cwd=work)
    assert ("changes nothing" in done.stderr) == (kind != ["--tokenizer=bpe"])


@pytest.mark.parametrize("source", ["data/bpe", "out/bpe/ckpt.pt"])
def test_a_new_text_gets_an_earlier_vocabulary(work, source):
    old = json.loads((work / "data" / "bpe" / "meta.json").read_text(encoding="utf-8"))
    new = prepared(work, "zh.txt", f"--tokenizer={source}", "--name=other")
    assert new["tokenizer"] == old["tokenizer"] and new["vocab_size"] == 700
    args = ["--init_from=out/bpe/ckpt.pt", "--out_dir=out/other", "--max_iters=2", "--dataset=other"]
    run("train.py", *TINY.split(), *args, cwd=work)
    shutil.rmtree(work / "out" / "other")


# -- bits per byte -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bpe", "char", "zh"])
def test_bytes_are_those_of_the_text(work, name):
    meta = json.loads((work / "data" / name / "meta.json").read_text(encoding="utf-8"))
    texts = [CHINESE] if name == "zh" else [text_of(work, i) for i in range(3)]
    assert meta["train_bytes"] + meta["val_bytes"] == sum(len(text.encode()) for text in texts)
    if name != "zh":
        assert meta["val_bytes"] == len(texts[2].encode())
    ids = ids_of(work, name, "val")
    tokenizer = prepare.load_tokenizer(meta)
    expected = meta["val_bytes"] / len(ids)
    assert prepare.bytes_per_token(meta, tokenizer, ids) == expected
    assert prepare.bytes_per_token({}, tokenizer, ids) == expected  # from the IDs alone


@needs_mirror
def test_bytes_of_gpt2s_ids(work, monkeypatch):
    monkeypatch.chdir(work)
    meta = json.loads((work / "data" / "english" / "meta.json").read_text(encoding="utf-8"))
    assert meta["train_bytes"] + meta["val_bytes"] == len((text_of(work, 0) + CHINESE).encode())
    expected = meta["val_bytes"] / meta["val_tokens"]
    assert prepare.bytes_per_token({}, prepare.GPT2Tokenizer(), ids_of(work, "english", "val")) == expected


def test_words_have_none(work):
    """White space is lost, so the bytes, which meta.json counts for every text, are not the tokens'."""
    meta = prepared(work, "0.txt", "--tokenizer=word", "--name=word")
    assert prepare.bytes_per_token(meta, prepare.load_tokenizer(meta), ids_of(work, "word", "val")) is None
    args = ["--dataset=word", "--out_dir=out/word", "--max_iters=2"]
    assert "bits per byte" not in run("train.py", *TINY.split(), *args, cwd=work).stdout
    assert set(metrics(work / "out" / "word", "val_bpb").values()) == {None}


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_an_evaluation_says_bits_per_byte(work, name):
    meta = json.loads((work / "data" / name / "meta.json").read_text(encoding="utf-8"))
    losses, bits = (metrics(work / "out" / name, key) for key in ("val_loss", "val_bpb"))
    expected = {
        step: loss / math.log(2) * meta["val_tokens"] / meta["val_bytes"] for step, loss in losses.items()
    }
    assert bits == pytest.approx(expected)
    args = ["--init_from=resume", f"--out_dir=out/{name}", "--eval_only=True", "--eval_iters=2"]
    said = run("train.py", *args, cwd=work).stdout
    assert f", {bits[60]:.4f} bits per byte" in said


# -- Hugging Face --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(work):
    for name in KINDS:
        run("sample.py", f"--out_dir=out/{name}", f"--export=hf/{name}", cwd=work)
    return work / "hf"


def greedy(work, name, prompt, tokens=20):
    args = [f"--out_dir=out/{name}", f"--start={prompt}", "--temperature=0", f"--max_new_tokens={tokens}"]
    return run("sample.py", *args, "--device=cpu", cwd=work).stdout.removesuffix("\n")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_exported_works_as_it_stands(work, exported, name, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    folder, prompt = str(exported / name), "The for "
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = prepare.load_tokenizer(
        json.loads((work / "data" / name / "meta.json").read_text(encoding="utf-8"))
    )
    monkeypatch.chdir(work)
    for text in (prompt, "a  b\n\n\tc\n", f"end{END}begin", text_of(work, 2)[:2000]):
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.end_of_text and len(theirs) == ours.vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == ours.vocab_size and model.config.eos_token_id == ours.end_of_text
    write = pipeline("text-generation", folder)
    text = write(prompt, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert text == prompt + greedy(work, name, prompt)
    # by itself it ends with the context, which is far shorter than what transformers writes otherwise
    text = write(prompt, do_sample=False)[0]["generated_text"]
    assert text == prompt + greedy(work, name, prompt, 32 - len(ours.encode(prompt)))


def test_what_is_exported_comes_back(work, exported):
    prompt = "The for "
    args = [f"--init_from={exported / 'bpe'}", f"--start={prompt}", "--temperature=0", "--max_new_tokens=20"]
    said = run("sample.py", *args, "--device=cpu", cwd=work).stdout.removesuffix("\n")
    assert said == greedy(work, "bpe", prompt)
    assert "is there already" in refused(
        "sample.py", "--out_dir=out/bpe", f"--export={exported / 'bpe'}", cwd=work
    )


def small(folder, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 60, 2, 2, 32, **changes))
    model.save_pretrained(folder)
    return model


def test_absent_biases_are_zeros_elsewhere(tmp_path):
    idx = torch.arange(16)[None]
    for i, changes in enumerate(
        ({"bias": False}, {"qkv_bias": False}, {"bias": False, "tie_weights": False})
    ):
        model = small(tmp_path / str(i), **changes)
        assert torch.equal(GPT.from_pretrained(tmp_path / str(i))(idx)[0], model.eval()(idx)[0])


@pytest.mark.parametrize("shape", ["sharded", "bin"])
def test_other_shapes_of_a_folder(tmp_path, shape):
    model = small(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if shape == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
        for file in set(places.values()):
            save_file({name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    idx = torch.arange(16)[None]
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], model.eval()(idx)[0])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS",
        ),
        ("model.safetensors", b"nonsense", "no GPT-2"),
        ("model.safetensors.index.json", b"{}", "lacks"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "no GPT-2"),
        ("model.safetensors.index.json", b'{"weight_map": {"x": "../../secret"}}', "no GPT-2"),
        ("pytorch_model.bin", b"\x80\x02cos\nsystem\nq\x00.", "no GPT-2"),
    ],
)
def test_damaged_folders_are_one_line(tmp_path, file, content, words):
    small(tmp_path)
    if file != "model.safetensors.index.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ModelError, match=words) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
