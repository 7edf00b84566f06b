"""Nothing is silently wrong: which tokenizer, which text, which checkpoint is best, and what follows what."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MIRROR, REPO, TINY, metrics, needs_mirror, refused, run

import prepare
from model import GPT, GPTConfig, load_checkpoint

TINY = TINY.split()
SHORT = [*TINY, "--max_iters=4", "--eval_interval=2"]
TEXT = "to be or not to be, that is the question\n"


def dataset(folder, name="it"):
    """(meta, text of train.bin and val.bin together) of a dataset."""
    meta = json.loads((folder / "data" / name / "meta.json").read_text())
    ids = [np.fromfile(folder / "data" / name / f"{split}.bin", "<u2") for split in ("train", "val")]
    return meta, prepare.load_tokenizer(meta).decode(np.concatenate(ids).tolist())


def prepared(folder, content, *args, name="it", file="it.txt"):
    """The dataset of a file with this content."""
    (folder / file).write_bytes(content)
    run("prepare.py", file, f"--name={name}", *args, cwd=folder)
    return dataset(folder, name)


# -- who knows its tokenizer ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """hf: a Hugging Face folder with its own BPE. bare: the same without. nano.pt: nanoGPT's, of 103 IDs."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("foreign")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([prepare.pydocs()], 300, special_tokens=["<|endoftext|>"], show_progress=False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32))
    for name in ("hf", "bare"):
        model.save_pretrained(str(folder / name))
    bpe.save(str(folder / "hf" / "tokenizer.json"))
    args = dict(block_size=32, vocab_size=103, n_layer=2, n_head=2, n_embd=32, bias=False, dropout=0.0)
    nano = {"model": GPT(GPTConfig(**args)).state_dict(), "model_args": args, "iter_num": 1}
    torch.save(nano | {"config": {"dataset": "pydocs"}}, folder / "nano.pt")
    run("prepare.py", cwd=folder)
    (folder / "other.txt").write_text(TEXT * 100)
    run("prepare.py", "other.txt", cwd=folder)
    return folder


def test_a_hugging_face_folder_brings_its_own_tokenizer(foreign):
    """A new text gets that vocabulary, the run keeps it, and its sample is text again."""
    run("prepare.py", "other.txt", "--tokenizer=hf", "--name=mine", cwd=foreign)
    meta, text = dataset(foreign, "mine")
    assert meta["tokenizer"]["type"] == "bpe" and meta["vocab_size"] == 300 and text == TEXT * 100
    args = ["--init_from=hf", "--dataset=mine", "--max_iters=2", "--eval_iters=2", "--device=cpu"]
    run("train.py", *args, "--batch_size=2", "--out_dir=out/mine", "--sample_prompt=to be", cwd=foreign)
    for name in ("hf", "out/mine/best.pt"):
        args = [
            f"--init_from={name}",
            "--start=to be",
            "--max_new_tokens=40",
            "--temperature=0",
            "--device=cpu",
        ]
        out = run("sample.py", *args, cwd=foreign).stdout
        checkpoint = load_checkpoint(foreign / name)
        tokenizer = prepare.tokenizer_of(str(foreign / name), checkpoint)
        prompt = tokenizer.encode("to be")
        expected = GPT.from_checkpoint(checkpoint).generate(torch.tensor([prompt]), 40, temperature=0)[0]
        assert out == tokenizer.decode(expected[len(prompt) :].tolist()) + "\n"
    for path in ("data/mine", "hf/tokenizer.json", "out/mine/best.pt"):
        run("prepare.py", "other.txt", f"--tokenizer={path}", "--name=again", cwd=foreign)
        assert dataset(foreign, "again")[0]["tokenizer"] == meta["tokenizer"]


TOKENIZER_SETTINGS = {
    "truncation": {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 5,
        "pad_type_id": 0,
        "pad_token": "x",
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    },
    "dropout": 0.5,
}


@pytest.mark.parametrize("key", TOKENIZER_SETTINGS)
def test_a_tokenizer_json_changes_no_text(foreign, key):
    """Some hold settings of a past use, which would cut a text, fill it up, or make it random."""
    clean = json.loads((foreign / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    changed = json.loads(json.dumps(clean))
    (changed["model"] if key == "dropout" else changed)[key] = TOKENIZER_SETTINGS[key]
    expected = prepare.BPETokenizer(clean)
    tokenizer = prepare.BPETokenizer(changed)
    assert tokenizer.encode(TEXT * 20) == expected.encode(TEXT * 20)
    assert tokenizer.meta == expected.meta  # one vocabulary, one description
    assert prepare.as_hugging_face(tokenizer).encode(TEXT * 20).ids == expected.encode(TEXT * 20)


STRIP = {"type": "Replace", "pattern": {"Regex": "[^a-z ,\n]"}, "content": "x"}


def lacking(kind):
    """The JSON of a vocabulary of the letters of TEXT alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    chars = sorted(set(TEXT))
    if kind == "exported":
        return json.loads(prepare.as_hugging_face(prepare.CharTokenizer(chars)).to_str())
    if kind == "bytes":
        full = prepare.BPETokenizer.trained([TEXT], 257).meta["json"]
        keep = {char.replace(" ", "\u0120").replace("\n", "\u010a") for char in chars}
        full["model"]["vocab"] = {char: i for i, char in enumerate(sorted(keep))}
        full["model"]["merges"], full["added_tokens"] = [], []
        return full
    if kind == "lower":
        full = prepare.BPETokenizer.trained([TEXT + "Zé中"], 300).meta["json"]
        return full | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, STRIP]}}
    vocab = {char: i for i, char in enumerate(chars)} | {"<unk>": len(chars)}
    if kind == "unigram":
        model = models.Unigram([(token, -1.0) for token in vocab], len(chars))
    elif kind == "words":
        model = models.WordLevel(vocab, "<unk>")
    else:
        model = models.BPE(vocab, [], unk_token={"unk": "<unk>", "none": None}[kind])
    tokenizer = Tokenizer(model)
    if kind == "words":
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("kind", ["exported", "bytes", "unigram", "words", "unk", "none", "lower"])
@pytest.mark.parametrize("char", ["Z", "\u00e9", "\u4e2d"])
def test_what_a_vocabulary_cannot_express_is_named(tmp_path, monkeypatch, kind, char):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(json.dumps(lacking(kind)))
    document = [TEXT * 3, f"to {char} be"]
    with pytest.raises(prepare.UserError, match=f"'{char}'|vocabulary lacks"):
        prepare.write_dataset("never", [document], [], "tokenizer.json")
    assert not Path("data/never").exists()
    prepare.write_dataset("it", [[TEXT * 30]], [], "tokenizer.json")
    assert dataset(tmp_path)[1].replace(" ", "") == (TEXT * 30).replace(" ", "")


@pytest.mark.parametrize("pattern, other", [("\n", " "), (" ", ""), (" {2,}", " ")])
def test_a_vocabulary_that_loses_white_space_is_refused(tmp_path, monkeypatch, pattern, other):
    """T5's makes spaces of line breaks, and one space of several, if there are any."""
    monkeypatch.chdir(tmp_path)
    description = prepare.BPETokenizer.trained([TEXT], 300).meta["json"]
    description["normalizer"] = {"type": "Replace", "pattern": {"Regex": pattern}, "content": other}
    Path("tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(prepare.UserError, match=re.escape(repr(pattern[0])[:-1])):
        prepare.write_dataset("never", [[TEXT * 30 + "to  be"]], [], "tokenizer.json")
    with pytest.raises(prepare.UserError, match=re.escape(repr(pattern[0])[:-1])):
        prepare.encode_text(prepare.tokenizer_of("."), "to  be\nor not")
    if "2" in pattern:
        prepare.write_dataset("it", [[TEXT * 30]], [], "tokenizer.json")
        assert dataset(tmp_path)[1] == TEXT * 30


def test_a_prompt_is_whole_or_refused(tmp_path):
    """Where a vocabulary knows no sign for what it lacks, and where it writes end-of-text as </s>."""
    with pytest.raises(prepare.UserError, match="'Z'"):
        prepare.encode_text(prepare.BPETokenizer(lacking("none")), "to Z be")
    described = prepare.BPETokenizer.trained([TEXT], 300).meta["json"]
    described = json.loads(json.dumps(described).replace("<|endoftext|>", "</s>"))
    tokenizer = prepare.BPETokenizer(described, 0)
    ids = [0, *tokenizer.encode("to"), 0, *tokenizer.encode("be")]
    assert prepare.encode_text(tokenizer, "<|endoftext|>to<|endoftext|>be") == ids
    model = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=1, n_head=1, n_embd=8))
    model.save_pretrained(str(tmp_path / "hf"))
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(lacking("none")))
    line = refused("sample.py", "--init_from=hf", "--start=to Z be", "--device=cpu", cwd=tmp_path)
    assert "'Z'" in line
    (tmp_path / "it.txt").write_text(TEXT * 99)
    run("prepare.py", "it.txt", cwd=tmp_path)
    line = refused("train.py", *SHORT, "--dataset=it", "--sample_prompt=to Z be", cwd=tmp_path)
    assert "'Z'" in line and not (tmp_path / "out").exists()


def test_ids_that_the_weights_have_and_the_vocabulary_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids(
        tmp_path,
        "x",
        meta={"tokenizer": ABC | {"chars": ABC["chars"][:90]}, "vocab_size": 90, "dtype": "uint16"},
    )
    with pytest.raises(prepare.UserError, match="the ID 99, which is beyond the vocabulary of 90"):
        prepare.load_dataset("x", 8, 128)
    ids(tmp_path, "y", meta={"tokenizer": ABC, "vocab_size": 100, "dtype": "uint16"})
    assert prepare.load_dataset("y", 8, 128)[3].vocab_size == 100
    with pytest.raises(prepare.UserError, match="the ID 99, which is beyond the vocabulary of 99"):
        prepare.load_dataset("y", 8, 99)


def test_a_mask_is_there_and_stays(tmp_path, monkeypatch):
    """Without it the questions would be learned too; a file that gets shorter would kill the process."""
    monkeypatch.chdir(tmp_path)
    talk = {"instruction": "say it", "output": TEXT.strip()}
    Path("talk.jsonl").write_text(f"{json.dumps(talk)}\n" * 40)
    run("prepare.py", "talk.jsonl", cwd=tmp_path)
    data, _, meta, _ = prepare.load_dataset("talk", 8)
    path = Path("data/talk/train_mask.bin")
    mask = prepare.load_mask("talk", "train", data, meta)
    os.truncate(path, 0)
    assert mask.sum() == meta["train_learned"] > 0
    path.unlink()
    line = refused("train.py", *SHORT, "--dataset=talk", cwd=tmp_path)
    assert "train_mask.bin is missing" in line


def test_ends_of_documents_are_no_unknown_words(tmp_path, monkeypatch, capsys):
    """Some vocabularies write what they do not know as end-of-text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    vocab = {char: i for i, char in enumerate([*sorted(set(TEXT)), "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save("tokenizer.json")
    prepare.write_dataset("it", [[TEXT * 30], [TEXT]], [], "tokenizer.json")
    assert "lacks" not in capsys.readouterr().out
    for char in "Z<|":  # the last two stand in the name of end-of-text
        with pytest.raises(prepare.UserError, match=re.escape(repr(char))):
            prepare.write_dataset("never", [[TEXT * 30], [char]], [], "tokenizer.json")


def test_unknown_words_are_counted(tmp_path):
    for name, text in (("a", "to be or not " * 20), ("b", "to be or nought " * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
    run("prepare.py", "a.txt", "--tokenizer=word", cwd=tmp_path)
    done = run("prepare.py", "b.txt", "--tokenizer=data/a", cwd=tmp_path)
    assert "20 tokens are words that the vocabulary lacks: <|unk|>" in done.stdout


@pytest.mark.parametrize("vocab", ['{"a": 1, "b": "x"}', '{"a": null, "b": 2}', '{"\\ud800": 1}', "[]"])
def test_a_damaged_vocab_json_is_one_line(tmp_path, vocab):
    (tmp_path / "vocab.json").write_text(vocab)
    with pytest.raises(prepare.UserError):
        prepare.tokenizer_of(tmp_path)


def test_an_export_fits_the_dataset_that_it_came_from(tmp_path):
    """bpe knows its end-of-text without config.json's word, so its description is the same."""
    bpe = prepare.BPETokenizer.trained([TEXT * 9], 300)
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe.meta["json"]))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": bpe.end_of_text}))
    assert prepare.tokenizer_of(tmp_path).meta == bpe.meta


def test_a_word_without_end_is_learned_from_in_parts():
    """The time to learn from a word grows with the square of its length; this one would take minutes."""
    word = "".join(random.Random(1).choices("acgt", k=400_000))
    bpe = prepare.BPETokenizer.trained([f"start {word}"], 300)
    assert bpe.decode(bpe.encode(word[:1000])) == word[:1000] and bpe.vocab_size == 300


def test_a_dataset_elsewhere_is_not_one_of_this_folder(foreign, tmp_path):
    shutil.copytree(foreign / "data" / "pydocs", tmp_path / "pydocs")
    line = refused("train.py", *SHORT, f"--dataset={tmp_path / 'pydocs'}", "--out_dir=out/never", cwd=foreign)
    assert "datasets lie in data/" in line
    run("train.py", *SHORT, f"--dataset={foreign / 'data' / 'pydocs'}", "--eval_only=True", cwd=foreign)


@needs_mirror
def test_gpt2s_vocabulary_is_recognized_by_its_content(foreign):
    """Whatever its size in the model; one merge less, and it is another one."""
    shutil.copytree(foreign / "bare", foreign / "two")
    path = Path(MIRROR, "openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json")
    shutil.copy(path, foreign / "two" / "vocab.json")
    assert prepare.tokenizer_of(str(foreign / "two")).meta == {"type": "gpt2"}
    vocab = json.loads(path.read_text(encoding="utf-8"))
    vocab["xyzzy"] = vocab.pop("Ġthe")
    (foreign / "two" / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(prepare.UserError, match="tokenizer.json"):
        prepare.tokenizer_of(str(foreign / "two"))


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("sample.py", ["--init_from=bare"], ["bare has no tokenizer.json"]),
        ("train.py", ["--init_from=bare", "--dataset=pydocs"], ["bare has no tokenizer.json"]),
        ("train.py", ["--init_from=hf", "--dataset=pydocs"], ["another tokenizer", "--tokenizer=hf"]),
        (
            "train.py",
            ["--init_from=nano.pt", "--dataset=other"],
            ["another tokenizer", "--tokenizer=nano.pt"],
        ),
        ("prepare.py", ["other.txt", "--tokenizer=bare"], ["bare has no tokenizer.json"]),
        ("prepare.py", ["other.txt", "--tokenizer=nowhere"], ["--tokenizer=nowhere", "No such file"]),
        ("prepare.py", ["other.txt", "--tokenizer=other.txt"], ["other.txt is damaged"]),
    ],
)
def test_weights_never_meet_ids_of_another_vocabulary(foreign, script, args, words):
    more = [*SHORT[5:], "--out_dir=out/never"] if script == "train.py" else []
    line = refused(script, *args, *more, cwd=foreign)
    assert all(word in line for word in words), line
    assert not (foreign / "out" / "never").exists()


def test_nanogpts_checkpoint_wants_the_text_that_it_was_trained_on(foreign):
    """data/pydocs is replaced by a text of other characters: no sample, no training."""
    (foreign / "moved").mkdir()
    shutil.copy(foreign / "nano.pt", foreign / "moved")
    shutil.copytree(foreign / "data" / "other", foreign / "moved" / "data" / "pydocs")
    for script in ("sample.py", "train.py"):
        more = ["--max_iters=1", "--eval_iters=1", "--batch_size=1"] if script == "train.py" else []
        line = refused(script, "--init_from=nano.pt", "--device=cpu", *more, cwd=foreign / "moved")
        assert "103 token IDs" in line and "data/pydocs" in line


def test_nanogpts_configs_mean_its_default_dataset(workdir):
    (workdir / "gpt2_config.py").write_text("wandb_log = True\nbatch_size = 2\nblock_size = 32\n")
    line = run("train.py", "gpt2_config.py", "--device=cpu", cwd=workdir, check=False).stderr.splitlines()[-1]
    assert "data/openwebtext is not prepared" in line


def test_nanogpts_keys_change_no_dataset_of_a_run_or_a_sample(trained, workdir):
    (workdir / "nano_config.py").write_text("wandb_log = False\nseed = 5\n")
    shutil.copytree(trained, workdir / "out" / "nano")
    args = ["nano_config.py", "--out_dir=out/nano", "--device=cpu"]
    done = run("train.py", *args, "--init_from=resume", "--max_iters=61", cwd=workdir)
    assert "data/pydocs/train.bin" in done.stdout and "wandb_log passed over" in done.stderr
    assert run("sample.py", *args, "--max_new_tokens=5", cwd=workdir).stdout
    assert "decay_lr" in refused("sample.py", "--decay_lr=False", "--out_dir=out/nano", cwd=workdir)


def ids(folder, name, dtype="<u2", meta=None, high=100):
    (folder / "data" / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        rng.integers(0, high, 3000).astype(dtype).tofile(folder / "data" / name / f"{split}.bin")
    if meta is not None:
        (folder / "data" / name / "meta.json").write_text(json.dumps(meta))


ABC = {"type": "char", "chars": [chr(256 + i) for i in range(100)]}


@pytest.mark.parametrize(
    "dtype, meta, words",
    [
        ("<u4", None, ["not hold uint16"]),
        ("<i8", None, ["not hold uint16"]),
        ("<u4", {"tokenizer": ABC, "vocab_size": 100}, ["not hold uint16"]),
        ("<u2", {"tokenizer": ABC, "vocab_size": 100, "dtype": "uint32"}, ["not hold uint16"]),
        ("<u2", {"vocab_size": 100}, ["tokenizer"]),
        ("<u2", {"tokenizer": ABC, "vocab_size": 65}, ["vocab_size"]),
        ("<u2", {"tokenizer": ABC, "vocab_size": "100"}, ["vocab_size"]),
        ("<u2", {"tokenizer": {"type": "char", "chars": "abc"}, "vocab_size": 3}, ["the ID 99"]),
        ("<u2", {"tokenizer": {"type": "morse"}, "vocab_size": 3}, ["tokenizer"]),
        ("<u2", [], ["no JSON object"]),
    ],
)
def test_datasets_from_elsewhere_are_looked_at(tmp_path, dtype, meta, words):
    ids(tmp_path, "x", dtype, meta)
    line = run("train.py", *SHORT, "--dataset=x", cwd=tmp_path, check=False).stderr.splitlines()[-1]
    assert line.startswith("train.py: ") and all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_nanogpts_data_folder_is_not_gpt2s(tmp_path):
    ids(tmp_path, "x")
    (tmp_path / "data" / "x" / "meta.pkl").write_bytes(b"never read")
    assert "nanoGPT's" in refused("train.py", *SHORT, "--dataset=x", cwd=tmp_path)


def test_a_prepared_dataset_is_no_text_and_its_path_is_its_name(tmp_path):
    prepared(tmp_path, (TEXT * 200).encode())
    assert "prepared dataset" in refused("prepare.py", "data/it", cwd=tmp_path)
    assert "data/it/train.bin\n" in run("train.py", *SHORT, "--dataset=data/it", cwd=tmp_path).stdout


# -- what follows another setting ----------------------------------------------------------------------------


@pytest.mark.parametrize("from_hf", [True, False])
def test_dropout_means_all_of_it_over_other_weights(foreign, from_hf):
    """A Hugging Face folder says 0.1 three times; a checkpoint of ours 0.4 for attention."""
    run("prepare.py", "other.txt", "--tokenizer=hf", "--name=mine", cwd=foreign)
    args = ["--dataset=mine", "--max_iters=1", "--eval_iters=1", "--batch_size=2", "--device=cpu"]
    args += ["--sample_prompt=", "--out_dir=out/drop"]
    shutil.rmtree(foreign / "out" / "drop", ignore_errors=True)
    start = "--init_from=hf"
    if not from_hf:
        run("train.py", *args, start, "--dropout=0.2", "--attn_dropout=0.4", cwd=foreign)
        start = "--init_from=resume"
    done = run("train.py", *args, start, "--dropout=0.3", "--max_iters=2", cwd=foreign)
    checkpoint = load_checkpoint(foreign / "out" / "drop" / "ckpt.pt")
    model = GPT.from_checkpoint(checkpoint)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.3} and checkpoint["config"]["dropout"] == 0.3
    assert from_hf or "dropout=0.3, not 0.2" in done.stderr


def test_weights_bring_their_shape_and_nothing_else(foreign):
    """Neither dropout nor flash nor init of the checkpoint."""
    config = json.loads((foreign / "hf" / "config.json").read_text())
    (foreign / "hf" / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.5}))
    run("prepare.py", "other.txt", "--tokenizer=hf", "--name=mine", cwd=foreign)
    args = ["--dataset=mine", "--max_iters=1", "--eval_iters=1", "--batch_size=2", "--device=cpu"]
    run("train.py", *args, "--init_from=hf", "--sample_prompt=", "--out_dir=out/shape", cwd=foreign)
    saved = load_checkpoint(foreign / "out" / "shape" / "ckpt.pt")
    assert saved["model_args"]["attn_dropout"] is None and saved["model_args"]["n_embd"] == 32


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        (TEXT * 50).replace("\n", "\r\n").encode(),
        (TEXT * 50).replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + (TEXT * 50).encode(),
    ],
    ids=["CRLF", "CR", "BOM"],
)
def test_line_ends_and_marks_are_not_trained_on(tmp_path, content):
    plain = prepared(tmp_path, (TEXT * 50).encode(), name="plain")
    assert prepared(tmp_path, content)[1] == plain[1] == TEXT * 50
    lines = [{"text": content.decode()}]
    (tmp_path / "it.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run("prepare.py", "it.jsonl", "--name=lines", cwd=tmp_path)
    assert dataset(tmp_path, "lines")[1] == TEXT * 50


@pytest.mark.parametrize(
    "content, words",
    [
        (("\ufeff" + TEXT).encode("utf-16-le"), ["UTF-16", "--encoding=utf-16"]),
        (("\ufeff" + TEXT).encode("utf-16-be"), ["UTF-16", "--encoding=utf-16"]),
        (TEXT.encode("utf-16-le"), ["UTF-16", "--encoding=utf-16-le"]),
        (TEXT.encode("utf-16-be"), ["UTF-16", "-be"]),
        (
            ("Быть или не быть, вот в чём вопрос. " * 9).encode("utf-16-le"),
            ["UTF-16", "--encoding=utf-16-le"],
        ),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + bytes(range(256)), ["not text"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + os.urandom(999), ["not text", "byte 8 is 0x0"]),
        (b"BZh91AY&SY" + bytes(range(256)), ["not text", "byte 10 is 0x0"]),
        (TEXT.encode() * 500 + b"\0", ["character 20500 is NUL"]),
        (gzip.compress(TEXT.encode("utf-16")), ["UTF-16"]),
    ],
    ids=["UTF-16-LE", "UTF-16-BE", "LE bare", "BE bare", "Russian", "PDF", "PNG", "bz2", "late NUL", "gz"],
)
def test_what_is_no_text_is_said(tmp_path, content, words):
    """And replacing what cannot be read is neither advised nor done."""
    name = "it.txt.gz" if content.startswith(b"\x1f\x8b") else "it.txt"
    (tmp_path / name).write_bytes(content)
    for errors in ([], ["--errors=replace"])[len(content) % 2 :]:
        line = refused("prepare.py", name, *errors, cwd=tmp_path)
        assert all(word in line for word in [name, *words]) and "replace" not in line, line
    assert not list((tmp_path / "data").glob("[!.]*"))


def test_control_characters_are_text(tmp_path):
    """A log has a bell, a form feed, a colour; only NUL is in no text."""
    log = "done\a\n\x01\x1b[31mred\x1b[0m\f\n" * 20
    (tmp_path / "it.log").write_text(log)
    run("prepare.py", ".", "--name=it", cwd=tmp_path)
    assert dataset(tmp_path)[1] == log


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1", "cp1251"])
def test_another_encoding_is_named(tmp_path, encoding):
    text = "Быть или не быть?\n" * 20 if encoding == "cp1251" else "déjà vu, naïve\n" * 20
    (tmp_path / "it.txt").write_bytes(text.encode(encoding))
    run("prepare.py", "it.txt", f"--encoding={encoding}", cwd=tmp_path)
    assert dataset(tmp_path)[1] == text
    assert "--encoding=morse" in refused("prepare.py", "it.txt", "--encoding=morse", cwd=tmp_path)


@pytest.mark.parametrize("kind", ["char", "word", pytest.param("gpt2", marks=needs_mirror)])
def test_end_of_text_ends_a_document_for_every_tokenizer(tmp_path, kind, monkeypatch):
    """With a space before it or without; blank documents are none."""
    monkeypatch.chdir(tmp_path)
    parts = ["one text", "two texts.", " \n", "", "three texts ", "four"]
    (tmp_path / "it.txt").write_text("<|endoftext|>".join(parts) + "<|endoftext|>")
    done = run("prepare.py", "it.txt", f"--tokenizer={kind}", "--val_fraction=0.25", cwd=tmp_path)
    assert "4 documents" in done.stdout
    meta, _ = dataset(tmp_path)
    tokenizer = prepare.load_tokenizer(meta)
    train, val = (np.fromfile(f"data/it/{split}.bin", "<u2").tolist() for split in ("train", "val"))
    assert train.count(tokenizer.end_of_text) == 3 and val.count(tokenizer.end_of_text) == 1
    assert train[-1] == val[-1] == tokenizer.end_of_text
    assert tokenizer.decode(val[:-1]).strip() == "four"
    assert tokenizer.encode("texts.<|endoftext|>one").count(tokenizer.end_of_text) == 1


def test_blank_documents_are_none(tmp_path):
    lines = ["some text", "", "  \n", "more text", "\t"]
    (tmp_path / "it.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert "2 documents" in run("prepare.py", "it.jsonl", cwd=tmp_path).stdout
    (tmp_path / "blank.txt").write_text(" \n" * 99)
    assert "no text" in refused("prepare.py", "blank.txt", cwd=tmp_path)


def test_hidden_names_are_passed_over_and_each_file_counts_once(tmp_path):
    for name in (".git/config.txt", ".venv/lib/a.py", "deep/.ipynb_checkpoints/b.py", ".hidden.txt"):
        (tmp_path / "it" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "it" / name).write_text("hidden text")
    for name in ("README", "Makefile", "deep/a.txt", "b.yaml"):
        (tmp_path / "it" / name).write_text(f"the text of {name}")
    (tmp_path / "it" / "LINK.txt").symlink_to("README")
    done = run("prepare.py", "it", "it/b.yaml", cwd=tmp_path)
    assert "4 documents" in done.stdout and "hidden" not in dataset(tmp_path)[1]


def test_what_can_be_read_once_only_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "read twice" in refused("prepare.py", "pipe.txt", "--name=it", cwd=tmp_path)
    (tmp_path / "it").mkdir()
    os.mkfifo(tmp_path / "it" / "pipe.txt")
    (tmp_path / "it" / "a.txt").write_text(TEXT)
    run("prepare.py", "it", cwd=tmp_path)
    command = f"{sys.executable} {REPO}/prepare.py <(echo text) --name=it"
    for text in (command, f"echo text | {command.replace('<(echo text)', '/dev/stdin')}"):
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 1 and "read twice" in done.stderr and "Traceback" not in done.stderr


@needs_mirror
@pytest.mark.parametrize("space", [" ", "\n", " \n\t"])
def test_a_million_white_space_characters(tmp_path, space, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "some" + space * (2_000_000 // len(space)) + "text" + "\n" * 9
    assert prepared(tmp_path, text.encode(), "--tokenizer=gpt2")[1] == text
    assert prepare.GPT2Tokenizer().decode(prepare.GPT2Tokenizer().encode(text)) == text


@pytest.mark.parametrize(
    "prompt",
    ["The for\r\nstatement", "\ufeffThe for\nstatement", "The for\rstatement"],
    ids=["CRLF", "BOM", "CR"],
)
def test_prompts_are_read_as_corpora_are(trained, workdir, prompt):
    args = ["--out_dir=out/trained", "--max_new_tokens=20", "--device=cpu"]
    expected = run("sample.py", *args, "--start=The for\nstatement", cwd=workdir).stdout
    (workdir / "prompt.txt").write_bytes(prompt.encode())
    assert run("sample.py", *args, "--start=FILE:prompt.txt", cwd=workdir).stdout == expected
    assert run("sample.py", *args, f"--start={prompt}", cwd=workdir).stdout == expected


def test_prompts_by_line_end_as_windows_ends_them(trained, workdir):
    """And a line that is no UTF-8 is said, while the next is answered."""
    command = [sys.executable, REPO / "sample.py", "--out_dir=out/trained", "--max_new_tokens=9", "--start=-"]
    command += ["--temperature=0", "--device=cpu"]
    texts = {}
    for lines in (b"The for\nThe if\n", b"\xef\xbb\xbfThe for\r\ncaf\xe9\r\nThe if\r\n"):
        done = subprocess.run(command, cwd=workdir, input=lines, capture_output=True)
        assert done.returncode == 0, done.stderr
        texts[lines] = done.stdout
    assert len(set(texts.values())) == 1 and b"not UTF-8" in done.stderr
    for bad in (b"caf\xe9", "The for".encode("utf-16")):
        (workdir / "bad.txt").write_bytes(bad)
        assert "bad.txt" in refused("sample.py", "--out_dir=out/trained", "--start=FILE:bad.txt", cwd=workdir)


# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["cp1252"])
def test_no_character_ends_a_run(tmp_path, encoding):
    env = {"PYTHONIOENCODING": encoding}
    content = ("déjà vu, “Быть или не быть”, 中文 🙂\n" * 50).encode()
    (tmp_path / "текст \udce9.txt").write_bytes(content)
    done = run("prepare.py", "текст \udce9.txt", "--name=it", cwd=tmp_path, env=env)
    args = [*SHORT, "--dataset=it", "--out_dir=out/это"]
    args[args.index("--sample_prompt=")] = "--sample_prompt=中文 🙂"
    done = run("train.py", *args, cwd=tmp_path, env=env)
    assert done.stdout.count("中文 🙂") >= 3
    args = ["--out_dir=out/это", "--start=Быть", "--max_new_tokens=50", "--device=cpu"]
    assert len(run("sample.py", *args, cwd=tmp_path, env=env).stdout) == 51
    assert "это\\udce9" in refused("sample.py", "--out_dir=это\udce9", cwd=tmp_path, env=env)


# -- which is best -------------------------------------------------------------------------------------------


def resumed(folder, *args):
    args = ["--init_from=resume", "--out_dir=out/it", "--sample_prompt=", *args]
    return run("train.py", *args, cwd=folder)


@pytest.fixture
def begun(tmp_path):
    """out/it: a run of 4 steps, evaluated at 0, 2 and 4, on data/it."""
    prepared(tmp_path, (TEXT * 200).encode())
    run("train.py", *SHORT, "--dataset=it", "--out_dir=out/it", cwd=tmp_path)
    return tmp_path


def best(folder):
    return torch.load(folder / "out" / "it" / "best.pt", weights_only=True)


@pytest.mark.parametrize("change", ["another dataset", "prepared anew", "other eval_iters"])
def test_best_belongs_to_its_data_and_its_evaluation(begun, change):
    """It begins anew where either changes, so that a harder text, too, gets a best.pt."""
    text = "the question is to be not that, or to be\n" * 150
    args = ["--eval_iters=3"] if change == "other eval_iters" else []
    if change == "another dataset":
        prepared(begun, text.encode(), "--tokenizer=data/it", name="new")
        args = ["--dataset=new"]
    elif change == "prepared anew":
        prepared(begun, text.encode(), "--tokenizer=data/it")
    checkpoint = torch.load(begun / "out" / "it" / "ckpt.pt", weights_only=True)
    for name in ("ckpt.pt", "best.pt"):  # as if the old text had been far easier
        torch.save(checkpoint | {"best_val_loss": 0.1}, begun / "out" / "it" / name)
    done = resumed(begun, *args, "--max_iters=6", "--always_save_checkpoint=False")
    assert "best.pt was measured on other data or in another way" in done.stderr
    assert ("goes on with other data" in done.stderr) == (change in ("another dataset", "prepared anew"))
    assert best(begun)["best_val_loss"] > 1 and best(begun)["step"] in (4, 6)


@pytest.mark.parametrize("same", [["--dtype=float32"], ["--batch_size=2", "--eval_iters=4"]])
def test_best_stays_where_the_evaluation_is_the_same(begun, same):
    """The precision of auto by its name, or as many windows in other batches."""
    path = begun / "out" / "it" / "best.pt"
    torch.save(best(begun) | {"best_val_loss": 0.1}, path)
    before = path.read_bytes()
    done = resumed(begun, *same, "--max_iters=6")
    assert "was measured" not in done.stderr and path.read_bytes() == before


def test_going_back_replaces_best_only_by_a_better_one(begun):
    shutil.copy(begun / "out" / "it" / "ckpt.pt", begun / "old.pt")
    resumed(begun, "--max_iters=60", "--eval_interval=20")
    good = best(begun)
    shutil.copy(begun / "old.pt", begun / "out" / "it" / "ckpt.pt")
    resumed(begun, "--max_iters=6", "--eval_interval=2")
    assert best(begun)["step"] == good["step"] and best(begun)["best_val_loss"] == good["best_val_loss"]


def test_sample_says_what_it_reads(begun):
    args = ["--out_dir=out/it", "--max_new_tokens=1", "--device=cpu"]
    done = run("sample.py", *args, cwd=begun)
    saved = best(begun)
    first = f"out/it/best.pt: step {saved['step']}, best validation loss {saved['best_val_loss']:.4f}"
    assert done.stderr.splitlines()[0] == first
    (begun / "out" / "it" / "best.pt").unlink()
    assert run("sample.py", *args, cwd=begun).stderr.startswith("out/it/ckpt.pt: step 4, ")


@pytest.mark.parametrize("text", ["acgt" * 400, "some words and " * 90])
def test_the_closing_line_works_for_every_text(tmp_path, text):
    """Without a newline in its vocabulary, and with a space in the folder's name."""
    prepared(tmp_path, text.encode())
    out = run("train.py", *SHORT, "--dataset=it", "--out_dir=out/my run", cwd=tmp_path).stdout
    command = re.search(r"now: python (.*)$", out)[1]
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {REPO}/{command} --max_new_tokens=30"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and len(done.stdout) == 31, done.stderr


def test_a_deleted_checkpoint_is_no_reason_to_begin_anew(begun):
    """Neither best.pt nor metrics.jsonl is lost then."""
    (begun / "out" / "it" / "ckpt.pt").unlink()
    files = {path: path.read_bytes() for path in (begun / "out" / "it").iterdir()}
    for start in ("auto", "out/it/best.pt"):
        line = refused(
            "train.py", *SHORT, "--dataset=it", "--out_dir=out/it", f"--init_from={start}", cwd=begun
        )
        assert "holds a run" in line
    assert files == {path: path.read_bytes() for path in (begun / "out" / "it").iterdir()}


# -- the small ones ------------------------------------------------------------------------------------------


def test_the_home_folder_and_no_folder(tmp_path):
    prepared(tmp_path, (TEXT * 200).encode())
    home = {"HOME": str(tmp_path / "home")}
    run("train.py", *SHORT, "--dataset=it", "--out_dir=~/run", cwd=tmp_path, env=home)
    assert (tmp_path / "home" / "run" / "best.pt").exists() and not (tmp_path / "~").exists()
    args = ["--max_new_tokens=3", "--device=cpu"]
    run("sample.py", "--out_dir=~/run", *args, cwd=tmp_path, env=home)
    (tmp_path / "home" / "prompt.txt").write_text("to be")
    args += ["--init_from=~/run/best.pt", "--start=FILE:~/prompt.txt"]
    run("sample.py", *args, cwd=tmp_path, env=home)
    assert "out_dir wants a path" in refused("train.py", *SHORT, "--out_dir=", cwd=tmp_path)


def test_a_linked_dataset_stays_a_link(tmp_path):
    """Prepared three times over, its place is where the link points."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "it").symlink_to(tmp_path / "disk" / "it")
    for i in range(3):
        prepared(tmp_path, (TEXT * (50 + i)).encode())
        assert (tmp_path / "data" / "it").is_symlink() and (tmp_path / "disk" / "it" / "meta.json").exists()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["it"]


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "1"}])
def test_torchruns_variables_by_half(workdir, env):
    args = [*SHORT, "--gradient_accumulation_steps=2", "--out_dir=out/half_set"]
    done = run("train.py", *args, cwd=workdir, env=env, check=False)
    assert done.returncode and "Traceback" not in done.stderr and "torchrun" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("field", ["scaler", "tokens", "meta"])
def test_a_checkpoint_that_lacks_a_field(trained, workdir, field):
    folder = workdir / "out" / f"lacks_{field}"
    shutil.copytree(trained, folder)
    checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
    del checkpoint[field]
    torch.save(checkpoint, folder / "ckpt.pt")
    assert "no run to resume" in refused("train.py", "--init_from=resume", f"--out_dir={folder}", cwd=workdir)


def test_a_stop_that_never_comes_is_refused(tmp_path):
    """The word tokenizer writes no newline; a character may be unknown."""
    prepared(tmp_path, (TEXT * 200).encode(), "--tokenizer=word", name="words")
    run("train.py", *SHORT, "--dataset=words", "--out_dir=out/words", cwd=tmp_path)
    args = ["--out_dir=out/words", "--device=cpu"]
    for stop in ("\n", "be.\n", "\t"):
        assert "--stop" in refused("sample.py", *args, f"--stop={stop}", cwd=tmp_path)
    run("sample.py", *args, "--stop=question", "--max_new_tokens=50", cwd=tmp_path)


def test_a_run_that_is_extended_with_other_settings(workdir):
    """What changed is said, min_lr follows the learning rate again, and no evaluation is lost."""
    args = [
        *TINY,
        "--max_iters=5",
        "--eval_interval=4",
        "--lr_decay_iters=4",
        "--min_lr=1e-3",
        "--out_dir=out/more",
    ]
    said = run("train.py", *args, "--warmup_iters=2000", cwd=workdir).stderr
    assert "warmup_iters=2000 is the whole run" in said
    args = [
        "--init_from=resume",
        "--out_dir=out/more",
        "--max_iters=9",
        "--warmup_iters=2",
        "--learning_rate=1e-4",
    ]
    said = run("train.py", *args, cwd=workdir).stderr
    for words in ("max_iters=9, not 5", "warmup_iters=2, not 2000", "learning_rate=0.0001, not 0.003"):
        assert f"from here on {words}" in said
    assert "whole run" not in said
    folder = workdir / "out" / "more"
    assert metrics(folder, "lr")[8] == pytest.approx(1e-5)
    assert list(metrics(folder, "val_loss")) == [0, 4, 5, 8, 9] and list(metrics(folder, "loss")) == list(
        range(9)
    )


def test_patience_ends_a_run_that_does_not_improve(workdir):
    """Killed and resumed on the way, it ends at the same step."""
    args = [
        *TINY,
        "--eval_interval=2",
        "--max_iters=40",
        "--patience=3",
        "--learning_rate=0",
        "--out_dir=out/wait",
    ]
    done = run("train.py", *args, cwd=workdir)
    assert "patience" in done.stdout and list(metrics(workdir / "out" / "wait", "val_loss")) == [0, 2, 4, 6]
    shutil.rmtree(workdir / "out" / "wait")
    run("train.py", *args, "--max_iters=4", cwd=workdir)
    run("train.py", "--init_from=resume", "--out_dir=out/wait", "--max_iters=40", cwd=workdir)
    assert list(metrics(workdir / "out" / "wait", "val_loss")) == [0, 2, 4, 6]
    assert "patience" in refused("train.py", *args, "--patience=0", "--out_dir=out/no", cwd=workdir)


@pytest.mark.parametrize("number", [10**6, 10**8, 10**12])
def test_sizes_that_cannot_work_are_refused_before_they_are_tried(foreign, number):
    line = refused("sample.py", "--init_from=hf", f"--num_samples={number}", "--device=cpu", cwd=foreign)
    assert f"num_samples={number}" in line and "memory" in line


@pytest.mark.parametrize(
    "setting",
    ["batch_size", "gradient_accumulation_steps", "n_layer", "n_embd", "block_size", "stride"],
)
def test_absurd_settings_are_refused_too(workdir, setting):
    line = refused("train.py", *TINY, f"--{setting}={10**20}", "--out_dir=out/never", cwd=workdir)
    assert setting in line and not (workdir / "out" / "never").exists()


def test_an_output_layer_that_is_not_tied_after_all(tmp_path):
    """Hugging Face says that it is, and the file has another one: transformers takes that."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    GPT(GPTConfig(16, 65, 1, 2, 16)).save_pretrained(str(tmp_path / "hf"))
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    wte = weights["transformer.wte.weight"]
    save_file(weights | {"lm_head.weight": wte.clone()}, tmp_path / "hf" / "model.safetensors")
    GPT.from_pretrained(str(tmp_path / "hf"))
    save_file(weights | {"lm_head.weight": wte + 1}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match="tie_weights"):
        GPT.from_pretrained(str(tmp_path / "hf"))
