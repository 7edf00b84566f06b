"""Conversations: what is read and what is learned, and a model that answers."""

import json
import os
import pty
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, metrics, needs_mirror, refused, run

import prepare
import sample
import train
from model import GPT, GPTConfig

END = "<|endoftext|>"
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2\r\n"},
    {"role": "user", "content": "And {2}+2?"},
    {"role": "assistant", "content": "4, I think."},
]
EXAMPLE = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
PLAIN = {"instruction": "Say yes.", "input": "", "output": "Yes."}
TEXT = {"text": "A text without a question."}
RECORDS = [{"messages": MESSAGES}, EXAMPLE, PLAIN, TEXT]
# what stands in the files by hand: (text, whether it is learned)
RENDERED = [
    [
        ("Be brief.\n\n### Instruction:\nWhat is 1+1?\n\n### Response:\n", 0),
        ("2", 1),
        (END, 1),
        ("### Instruction:\nAnd {2}+2?\n\n### Response:\n", 0),
        ("4, I think.", 1),
        (END, 1),
    ],
    [("### Instruction:\nAdd.\n\n### Input:\n3 and 4\n\n### Response:\n", 0), ("7", 1), (END, 1)],
    [("### Instruction:\nSay yes.\n\n### Response:\n", 0), ("Yes.", 1), (END, 1)],
    [("A text without a question.", 1), (END, 1)],
]


def written(folder, kind, suffix):
    """data/talk of the records, twenty times over, in a file of that kind."""
    records = RECORDS * 20
    path = folder / f"talk{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        import pyarrow

        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [{"id": 1, "text": None, "messages": None, **dict.fromkeys(EXAMPLE), **r} for r in records]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    size = ["--vocab_size=300"] if kind == "bpe" else []
    return run("prepare.py", path.name, f"--tokenizer={kind}", "--name=talk", *size, cwd=folder).stdout


@pytest.mark.parametrize(
    "kind, suffix",
    [
        ("char", ".jsonl"),
        ("char", ".json"),
        ("char", ".parquet"),
        ("word", ".jsonl"),
        ("bpe", ".json"),
        pytest.param("gpt2", ".jsonl", marks=needs_mirror),
    ],
)
def test_masks_are_right_to_the_token(tmp_path, kind, suffix):
    said = written(tmp_path, kind, suffix)
    folder = tmp_path / "data" / "talk"
    meta = json.loads((folder / "meta.json").read_text())
    tokenizer = prepare.load_tokenizer(meta)
    learned_tokens = 0
    for split, records in (("train", 72), ("val", 8)):
        ids, mask = [], []
        rendered = RENDERED * 20
        documents = [d for i, d in enumerate(rendered, 1) if ((i % 10 == 0) == (split == "val"))]
        assert len(documents) == records
        for document in documents:
            whole = tokenizer.encode("".join(text for text, _ in document))
            pieces = [tokenizer.encode(text) for text, _ in document]
            assert sum(pieces, []) == whole  # as if it were encoded in one
            ids += whole
            mask += [learned for piece, (_, learned) in zip(pieces, document, strict=True) for _ in piece]
        assert np.fromfile(folder / f"{split}.bin", "<u2").tolist() == ids
        assert np.fromfile(folder / f"{split}_mask.bin", "u1").tolist() == mask
        learned_tokens += sum(mask) if split == "train" else 0
    assert meta["train_learned"] == learned_tokens
    assert f"{learned_tokens:,} of the training tokens are learned" in said


@needs_mirror
def test_the_corpus_of_instructions(tmp_path):
    done = run("prepare.py", "instructions", cwd=tmp_path).stdout
    assert "1,100 documents" in done and "are learned" in done


BROKEN = [
    {"messages": []},
    {"messages": MESSAGES[:2]},
    {"messages": [{"role": "tool", "content": "x"}, *MESSAGES]},
    {"messages": [{"role": "user"}, *MESSAGES]},
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": 3}, *MESSAGES]},
    {"messages": [{"role": "user", "content": f"a {END} b"}, *MESSAGES]},
    {"messages": [{"role": ["user"], "content": "a"}, *MESSAGES]},
    {"instruction": "no answer"},
    {"instruction": "a", "output": None},
    {"instruction": 7, "output": "a"},
    {"body": "text under another key"},
    {"text": None},
    {"text": "a\0b"},
    [1],
    "text",
    None,
]


@pytest.mark.parametrize("record", BROKEN, ids=str)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_broken_record_is_named_by_its_number(tmp_path, monkeypatch, record, suffix):
    monkeypatch.chdir(tmp_path)
    records = [PLAIN, EXAMPLE, record, TEXT]
    path = tmp_path / f"it{suffix}"
    path.write_text(json.dumps(records) if suffix == ".json" else "\n".join(map(json.dumps, records)))
    place = "record 3" if suffix == ".json" else "line 3"
    with pytest.raises(prepare.UserError, match=f"it{suffix}, {place}: "):
        list(map(list, prepare.TextFiles([path])))


@pytest.mark.parametrize("given", [0, False, True, ["a"], {"k": None}], ids=str)
def test_an_input_that_is_no_text_is_refused(given):
    with pytest.raises(TypeError):
        prepare.as_messages({"instruction": "Add.", "input": given, "output": "3"})
    for none in (None, "", " \n"):
        first, _ = prepare.as_messages({"instruction": "Add.", "input": none, "output": "3"})
        assert first["content"] == "Add."


def test_documents_without_end_of_text_are_said(tmp_path):
    (tmp_path / "one.txt").write_text("abc def " * 9)
    (tmp_path / "two.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n{"text": "fab"}\n')
    run("prepare.py", "one.txt", cwd=tmp_path)
    done = run("prepare.py", "two.jsonl", "--tokenizer=data/one", cwd=tmp_path)
    assert "no end-of-text" in done.stderr


def test_a_key_that_is_asked_for_is_text(tmp_path):
    path = tmp_path / "it.jsonl"
    path.write_text(json.dumps(EXAMPLE) + "\n" + json.dumps(EXAMPLE | {"text": "both"}))
    texts = [[*map(list, prepare.TextFiles([path], text_key=key))] for key in ("output", None)]
    assert texts[0] == [["7"], ["7"]]  # the explicit key
    assert [document[-1] for document in texts[1]] == ["7", "7"]  # else a conversation


def test_another_end_of_text_ends_answers_and_documents(tmp_path):
    """A vocabulary of Hugging Face's that calls it </s>."""
    bpe = prepare.BPETokenizer.trained(["the text of a vocabulary " * 50], 300).meta["json"]
    text = json.dumps(bpe).replace(END, "</s>")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text(text)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    (tmp_path / "it.jsonl").write_text("\n".join(map(json.dumps, [PLAIN, EXAMPLE] * 10)))
    run("prepare.py", "it.jsonl", "--tokenizer=hf", "--name=it", cwd=tmp_path)
    ids = np.fromfile(tmp_path / "data" / "it" / "train.bin", "<u2")
    mask = np.fromfile(tmp_path / "data" / "it" / "train_mask.bin", "u1")
    assert (ids == 0).sum() == 18 and mask[ids == 0].all()


@pytest.mark.parametrize("given", [{}, {"eos_token_id": 50256}, {"eos_token_id": "0"}, {"eos_token_id": []}])
@pytest.mark.parametrize("token", [None, END, {"content": "vocab"}])
def test_an_end_of_text_that_the_model_does_not_know(tmp_path, given, token):
    """transformers writes GPT-2's ID where nobody has set one; then the tokenizer's files tell."""
    bpe = prepare.BPETokenizer.trained(["text of vocabulary " * 50], 300)
    assert bpe.bpe.token_to_id("vocab") and bpe.end_of_text == 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(bpe.meta["json"]))
    (tmp_path / "config.json").write_text(json.dumps(given))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    tokenizer = prepare.tokenizer_of(tmp_path)
    name = token["content"] if isinstance(token, dict) else END
    assert tokenizer.end_of_text == tokenizer.bpe.token_to_id(name)
    assert prepare.load_tokenizer({"tokenizer": tokenizer.meta}).end_of_text == tokenizer.end_of_text


@pytest.mark.parametrize("end_of_text", ["0", 10**6, -1, 0.5])
def test_an_end_of_text_that_is_no_id(end_of_text):
    """In a meta.json or a checkpoint, which are ours."""
    bpe = prepare.BPETokenizer.trained(["the text of a vocabulary " * 50], 300).meta
    with pytest.raises(prepare.UserError):
        prepare.load_tokenizer({"tokenizer": bpe | {"end_of_text": end_of_text}})


def test_files_of_records_that_are_damaged(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"te')
    assert "a.json" in refused("prepare.py", "a.json", cwd=tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    assert "a.parquet" in refused("prepare.py", "a.parquet", cwd=tmp_path)
    (tmp_path / "one.json").write_text(json.dumps([PLAIN]))
    assert "single conversation" in refused("prepare.py", "one.json", cwd=tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_json_that_is_no_array_of_objects_is_text(tmp_path):
    package = {"name": "package", "versions": [{"number": i} for i in range(20)]}
    texts = [json.dumps(package), json.dumps(package, indent=1), "[1, 2, 3]\n" * 20, '"just a string"\n' * 20]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.json").write_text(text)
    assert "4 documents" in run("prepare.py", ".", "--name=it", cwd=tmp_path).stdout


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n "])
def test_a_json_of_an_object_a_line_is_jsonl(tmp_path, end):
    """Many a dataset has this form under this name; read as text, a model would learn JSON."""
    records = [{"text": "a" * length} for length in (2000, 10, 30)]
    lines = end.join(map(json.dumps, records))
    for name, before in (("a.json", "\N{BYTE ORDER MARK}"), ("b.ndjson", ""), ("c.json", end + " ")):
        (tmp_path / name).write_bytes((before + lines).encode())
        assert "3 documents, 2,040 characters" in run("prepare.py", name, cwd=tmp_path).stdout


@pytest.mark.parametrize("content", [{"text": "one"}, {"data": [{"text": "one"}]}, ["one", "two"]])
def test_a_key_that_no_json_can_have_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "--text_key" in refused("prepare.py", "a.json", "--text_key=text", cwd=tmp_path)


def test_parquet_in_a_folder_is_read_by_its_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i} has a text of its own" for i in range(2500)]
    table = pyarrow.table({"body": texts, "other": [b"\xff"] * 2500})
    parquet.write_table(table, tmp_path / "part-0.parquet", row_group_size=700)
    run("prepare.py", ".", "--text_key=body", "--name=rows", cwd=tmp_path)
    folder = tmp_path / "data" / "rows"
    tokenizer = prepare.load_tokenizer(json.loads((folder / "meta.json").read_text()))
    found = {
        text
        for split in ("train", "val")
        for text in tokenizer.decode(np.fromfile(folder / f"{split}.bin", "<u2")).split(END)
    }
    assert found == {*texts, ""}


# -- training ------------------------------------------------------------------------------------------------


def test_masked_targets_are_left_out_of_the_loss():
    rng = np.random.default_rng(0)
    data, mask = rng.integers(0, 11, 200).astype("<u2"), rng.integers(0, 2, 200).astype("u1")
    starts = np.array([0, 17, 190])  # the last goes on behind the end
    x, y, learned = train.get_batch(data, mask, starts, 16, "cpu")
    for row, start in enumerate(starts):
        for t in range(16):
            place = start + t + 1
            expected = data[place] if place < 200 and mask[place] else -1
            assert y[row, t] == expected
            if start + t < 200:
                assert x[row, t] == data[start + t]
    assert learned == (y >= 0).sum()


def test_a_batch_without_anything_to_learn_has_a_loss():
    data, mask = np.arange(100).astype("<u2"), np.zeros(100, "u1")
    x, y, learned = train.get_batch(data, mask, np.array([3]), 8, "cpu")
    assert learned == 0 and GPT(GPTConfig(8, 100, 1, 1, 8))(x, y)[1].isfinite()


def test_an_evaluation_that_has_nothing_to_learn_says_so(tmp_path):
    """Long questions, short answers, and one small batch of windows between them."""
    record = {"instruction": "abc " * 200, "output": "x"}
    (tmp_path / "it.jsonl").write_text("\n".join([json.dumps(record)] * 40))
    run("prepare.py", "it.jsonl", "--name=it", cwd=tmp_path)
    args = [*TINY.split(), "--dataset=it", "--batch_size=1", "--out_dir=out/it", "--max_iters=9"]
    line = refused("train.py", *args, "--eval_iters=1", cwd=tmp_path)
    assert "--eval_iters=0" in line
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run("train.py", *args, "--eval_iters=0", cwd=tmp_path)  # steps without a learned token among them


def test_losses_are_those_of_the_learned_tokens_however_they_are_shared_out(tmp_path):
    """1, 2 and 4 processes, and micro-batches of other sizes: the losses are those of one large batch."""
    written(tmp_path, "char", ".jsonl")
    args = [*TINY.split(), "--dataset=talk", "--max_iters=6", "--eval_interval=3", "--grad_clip=0.5"]
    results = {}
    for name, processes, batch, micro in (
        ("one", 1, 8, 1),
        ("four", 1, 2, 4),
        ("two-processes", 2, 2, 4),
        ("four-processes", 4, 1, 8),
    ):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launch = launch if processes > 1 else []
        sizes = [f"--batch_size={batch}", f"--gradient_accumulation_steps={micro}", "--eval_iters=0"]
        run(*launch, "train.py", *args, *sizes, f"--out_dir=out/{name}", cwd=tmp_path)
        folder = tmp_path / "out" / name
        results[name] = {key: metrics(folder, key) for key in ("loss", "val_loss", "train_loss", "grad_norm")}
        assert set(metrics(folder, "val_bpb").values()) == {None}
    for name, found in results.items():
        for key, values in found.items():
            for step, value in values.items():
                assert value == pytest.approx(results["one"][key][step], rel=1e-5), (name, key, step)


# -- chat ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    """out/parrot: a model that has learned to answer with the word it was given."""
    folder = tmp_path_factory.mktemp("parrot")
    words = ["ape", "bee", "cat", "dog"]
    with open(folder / "words.jsonl", "w") as file:
        for word in random.Random(0).choices(words, k=600):
            print(json.dumps({"instruction": word, "output": word.upper()}), file=file)
    run("prepare.py", "words.jsonl", "--tokenizer=word", "--name=words", cwd=folder)
    flags = "--n_embd=32 --n_layer=2 --n_head=2 --block_size=24 --batch_size=8 --max_iters=100 --init=zero"
    flags += " --learning_rate=1e-2 --warmup_iters=10 --eval_interval=100 --eval_iters=0 --log_interval=50"
    flags += " --position=rope --qk_norm=True --optimizer=muon --lr_schedule=linear --device=cpu"
    flags += " --dataset=words --out_dir=out/parrot --sample_prompt="
    run("train.py", *flags.split(), cwd=folder)
    return folder


CHAT = [sys.executable, str(REPO / "sample.py"), "--out_dir=out/parrot", "--chat=True", "--temperature=0"]


def test_chat_in_a_pipe(parrot):
    lines = "dog\n\ncat\n/new\nape\nbee\ncat\ndog\nape\n"
    done = subprocess.run(CHAT, input=lines, cwd=parrot, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DOG", "CAT", "APE", "BEE", "CAT", "DOG", "APE"]
    assert "cropped" not in done.stderr  # whole turns made room


def test_a_line_that_cannot_be_read_is_said_and_the_next_is_answered(parrot):
    lines = f"dog\n a {END}\nbee\n".encode() + b"\xff\xfe\ncat\n"
    done = subprocess.run(CHAT, input=lines, cwd=parrot, capture_output=True)
    assert done.stdout.decode().split() == ["DOG", "BEE", "CAT"] and done.returncode == 0
    assert END in done.stderr.decode() and "Traceback" not in done.stderr.decode()


def test_what_a_model_wrote_spoils_no_chat(monkeypatch):
    """A NUL, or end-of-text in characters, which no message may hold."""
    tokenizer = prepare.CharTokenizer(sorted(set("\0 ab#:\nInstructionRespe")) + [END])
    model = GPT(GPTConfig(block_size=200, vocab_size=tokenizer.vocab_size, n_layer=0, n_head=1, n_embd=8))
    monkeypatch.setattr(sample, "max_new_tokens", 3)
    monkeypatch.setattr(model, "generate_stream", lambda *args, **more: iter([torch.tensor([[0]])] * 3))
    messages = sample.answer(model.eval(), tokenizer, [{"role": "user", "content": "a"}])
    assert messages[-1] == {"role": "assistant", "content": ""}
    sample.answer(model, tokenizer, [*messages, {"role": "user", "content": "b"}])


def test_chat_needs_an_end_of_text(trained, workdir):
    line = refused("sample.py", "--out_dir=out/trained", "--chat=True", cwd=workdir)
    assert "end-of-text" in line


def test_chat_on_a_terminal(parrot):
    ours, theirs = pty.openpty()
    chat = subprocess.Popen(CHAT, stdin=theirs, stdout=theirs, stderr=theirs, cwd=parrot)
    os.close(theirs)
    try:
        answer_before = b""
        for line, answer in ((b"dog\n", b"DOG"), (b"ape\n", b"APE"), (b"\x04", b"")):  # Ctrl-D
            shown = b""
            while not shown.endswith(b"> "):
                shown += os.read(ours, 1000)
            assert answer_before in shown
            os.write(ours, line)
            answer_before = answer
        assert chat.wait(60) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)


def test_the_exported_folder_writes_conversations_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    written(tmp_path, "bpe", ".jsonl")
    run("train.py", *TINY.split(), "--dataset=talk", "--max_iters=20", "--out_dir=out/t", cwd=tmp_path)
    run("sample.py", "--out_dir=out/t", "--export=hf", cwd=tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for messages in (MESSAGES, MESSAGES[:2], MESSAGES[1:2], MESSAGES[:4]):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False)
        assert theirs.replace("\r\n", "\n") == "".join(prepare.render(messages))
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"), tokenizer=tokenizer)
    answer = pipe([{"role": "user", "content": "Add."}], max_new_tokens=4, do_sample=False)
    told = ["--out_dir=out/t", "--chat=True", "--temperature=0", "--max_new_tokens=4"]
    ours = subprocess.run(
        [sys.executable, REPO / "sample.py", *told],
        input="Add.\n",
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert answer[0]["generated_text"][-1]["content"].split(END)[0] == ours.stdout.removesuffix("\n")
