"""Corpora of any size: pieces, processes, every wrapping of documents, FineWeb, interruptions."""

import argparse
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, TINY, Server, needs_mirror, refused, run, run_on_a_full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

MB = 1 << 20


def text_of(size, seed=0):
    """Paragraphs of Python's reference in a random order, size characters of them."""
    paragraphs, rng, text, length = prepare.pydocs().split("\n\n"), random.Random(seed), [], 0
    while length < size:
        text.append(rng.choice(paragraphs) + "\n\n")
        length += len(text[-1])
    return "".join(text)[:size]


def bins(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("train.bin", "val.bin")}


def expected_bins(tokenizer, documents, val_fraction=0.1):
    """What the .bin files must hold, from whole texts, by the plain rule: blank documents are none."""
    documents = [text for text in documents if text.strip()]
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - val_fraction))
        ids = {
            "train.bin": tokenizer.encode(documents[0][:cut]),
            "val.bin": tokenizer.encode(documents[0][cut:]),
        }
    else:
        ids = {"train.bin": [], "val.bin": []}
        for i, text in enumerate(documents):
            val = int((i + 1) * val_fraction) > int(i * val_fraction)
            ids["val.bin" if val else "train.bin"] += tokenizer.encode(text) + [tokenizer.end_of_text]
    return {name: np.array(some, dtype="<u2").tobytes() for name, some in ids.items()}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("gpt2"))
        return prepare.GPT2Tokenizer()


# -- pieces --------------------------------------------------------------------------------------------------

SPACES = " \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\ufeff"
fragments = st.one_of(
    st.text(max_size=8),
    st.text(SPACES, max_size=4),
    st.text(" \n", max_size=6),
    st.sampled_from(
        ["<|endoftext|>", "<|endof", "text|>", "'ll", "'s", "--", "don't", "word", "42", "。", "ß", "\u0301"]
    ),
)
texts = st.lists(fragments, max_size=40).map("".join)


def cut(text, size):
    pieces = list(prepare.whole_words(io.StringIO(text, newline="\n"), size))
    assert "".join(pieces) == text
    return pieces


@needs_mirror
@settings(max_examples=500, deadline=None)
@given(text=texts, size=st.integers(1, 12))
def test_gpt2_ids_of_pieces_are_those_of_the_whole(gpt2, text, size):
    pieces = cut(text, size)
    assert sum(map(gpt2.encode, pieces), []) == gpt2.encode(text)
    assert (
        b"".join(gpt2.encode_array(piece).tobytes() for piece in pieces)
        == np.array(gpt2.encode(text), dtype="<u2").tobytes()
    )


@settings(max_examples=300, deadline=None)
@given(text=texts, size=st.integers(1, 12))
def test_char_and_word_ids_of_pieces_are_those_of_the_whole(text, size):
    for tokenizer in (
        prepare.CharTokenizer(sorted(set(text)) + [prepare.END_OF_TEXT]),
        prepare.WordTokenizer.from_entries(set(prepare.WordTokenizer.words(text))),
    ):
        assert sum(map(tokenizer.encode, cut(text, size)), []) == tokenizer.encode(text)


def test_pieces_are_small_where_they_can_be():
    text = text_of(200_000)
    assert max(map(len, cut(text, 1000))) < 3000
    assert max(map(len, cut("中文。\n" * 10_000, 1000))) < 1100
    assert cut("x" * 10_000 + " y", 100) == ["x" * 10_000, " y"]
    assert cut("a short one", 100) == ["a short one"]


@settings(max_examples=300)
@given(text=texts, size=st.integers(1, 12))
def test_a_text_is_cut_at_the_last_word_end_that_has_been_read(text, size):
    """The plain rule: of all that has been read, from the first block on that holds a place to cut."""
    pieces, start = [], 0
    for read in range(size, len(text) + size, size):
        ends = [
            i
            for i in range(start + 1, min(read, len(text)))
            if text[i] in " \n" and not text[i - 1].isspace()
        ]
        if min(read, len(text)) - start >= size and ends:
            pieces.append(text[start : ends[-1]])
            start = ends[-1]
    assert cut(text, size) == pieces + [text[start:]]


def test_a_text_without_spaces_takes_linear_time():
    def seconds(size):
        started = time.process_time()
        assert len(cut("x" * size, 10_000)) == 1
        return time.process_time() - started

    assert seconds(16_000_000) < 5


# -- threads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "word", pytest.param("gpt2", marks=needs_mirror)])
def test_one_large_text_through_threads(tmp_path, kind):
    text = ("naïve 中文 🙂 <|endoftext|> 'tis\r\n" + text_of(50_000)) * 100
    (tmp_path / "big.txt").write_text(text, encoding="utf-8", newline="")
    done = run("prepare.py", "big.txt", f"--tokenizer={kind}", "--val_fraction=0.6", cwd=tmp_path)
    meta = json.loads((tmp_path / "data" / "big" / "meta.json").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        tokenizer = prepare.load_tokenizer(meta)
    documents = text.replace("\r\n", "\n").split(prepare.END_OF_TEXT)  # which ends one, wherever it stands
    assert bins(tmp_path / "data" / "big") == expected_bins(tokenizer, documents, 0.6)
    assert f"101 documents, {sum(map(len, documents)):,} characters" in done.stdout


@needs_mirror
def test_many_documents_through_threads_in_order(tmp_path, gpt2):
    whole, rng = text_of(6_000_000, seed=1), random.Random(1)
    sizes = [0, 1, 2_500_000] + [rng.choice([10, 1000, 100_000]) for _ in range(200)]
    ends = np.cumsum(sizes).tolist()
    documents = [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    documents = [text for text in documents if text.strip()] + [""]  # which is none
    assert sum(map(len, documents)) > 4 * MB
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / "docs" / f"{i:04}.txt").write_text(text, encoding="utf-8", newline="")
    done = run("prepare.py", "docs", "--tokenizer=gpt2", "--val_fraction=0.2", cwd=tmp_path)
    expected = expected_bins(gpt2, documents, 0.2)
    assert bins(tmp_path / "data" / "docs") == expected
    tokens = [len(expected[name]) // 2 for name in ("train.bin", "val.bin")]
    each = sum(map(len, documents)) / sum(tokens)
    assert (
        f"{len(documents) - 1} documents, {sum(map(len, documents)):,} characters, {each:.2f} a token"
        in done.stdout
    )
    assert f"{tokens[0]:,} train (" in done.stdout and f"{tokens[1]:,} validation tokens (" in done.stdout


def test_few_batches_are_under_way_at_a_time():
    taken = 0

    def batches():
        nonlocal taken
        for i in range(100):
            taken += 1
            yield [("train", "ab" * i), ("val", "b")]

    tokenizer = prepare.CharTokenizer(["a", "b"])
    encoded = prepare.encode_batches(batches(), tokenizer)
    first = next(encoded)
    assert taken <= 2 * prepare.THREADS + 1
    found = [(split, text, ids.tolist()) for split, text, ids in [first, *encoded]]
    assert found == [
        (split, text, tokenizer.encode(text))
        for i in range(100)
        for split, text in (("train", "ab" * i), ("val", "b"))
    ]


@given(sizes=st.lists(st.integers(0, 10), max_size=30))
def test_batches_hold_every_text_in_order(sizes):
    texts = [(("train", "val")[i % 2], "x" * size) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PIECE", 12)
        batches = list(prepare.batches(texts))
    assert sum(batches, []) == texts
    lengths = [sum(len(text) for _, text in batch) for batch in batches]
    assert all(12 <= length < 22 for length in lengths[:-1])


def test_a_threads_error_is_the_users():
    batches = iter([[("train", "ab")], [("train", "a€")], [("train", "ab")]])
    with pytest.raises(prepare.UserError, match="€"):
        list(prepare.encode_batches(batches, prepare.CharTokenizer(["a", "b"])))


def test_memory_does_not_grow_with_the_text(tmp_path):
    with open(tmp_path / "big.txt", "w") as file:
        for i in range(60):
            file.write(text_of(MB, seed=i % 3))
    code = "import resource, subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]], check=True);"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    done = run("-c", code, REPO / "prepare.py", "big.txt", cwd=tmp_path)
    assert "62,914,560 characters" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 200  # MB, of the largest process


# -- documents in every wrapping -----------------------------------------------------------------------------


def wrapped(folder, documents):
    """{path: argument} of the same documents as a folder, and as .jsonl, plain and compressed."""
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(documents))
    lines = lines.encode()
    (folder / "txt").mkdir()
    for i, text in enumerate(documents):
        (folder / "txt" / f"{i:03}.txt").write_bytes(text.encode())
    (folder / "gz" / "deep").mkdir(parents=True)
    for i, text in enumerate(documents):
        (folder / "gz" / f"{i:03}.md.gz").write_bytes(gzip.compress(text.encode()))
    half = len(lines) // 2
    (folder / "plain.jsonl").write_bytes(lines)
    (folder / "zipped.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    (folder / "packed.jsonl.zst").write_bytes(zstd.compress(lines[:half]) + zstd.compress(lines[half:]))
    return ["txt", "gz", "plain.jsonl", "zipped.jsonl.gz", "packed.jsonl.zst"]


def test_the_same_documents_in_every_wrapping(tmp_path):
    documents = ["first\nline", "", "zwölf 中文 🙂", *(text_of(40_000, seed) for seed in range(30)), "last"]
    results = []
    for path in wrapped(tmp_path, documents):
        run("prepare.py", path, "--name=it", cwd=tmp_path)
        results.append(bins(tmp_path / "data" / "it"))
    meta = json.loads((tmp_path / "data" / "it" / "meta.json").read_text())
    assert [source["path"] for source in meta["sources"]] == ["packed.jsonl.zst"]
    assert results == [expected_bins(prepare.load_tokenizer(meta), documents)] * 5


def test_jsonl_takes_another_key_and_names_a_bad_line(tmp_path):
    good = json.dumps({"body": "one text", "text": 1})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{good}\n")
    run("prepare.py", "a.jsonl", "--text_key=body", cwd=tmp_path)
    meta = json.loads((tmp_path / "data" / "a" / "meta.json").read_text())
    tokenizer = prepare.load_tokenizer(meta)
    assert bins(tmp_path / "data" / "a") == {
        name: np.array([*tokenizer.encode("one text"), tokenizer.end_of_text], dtype="<u2").tobytes()
        for name in ("train.bin", "val.bin")
    }
    for bad in ('{"text": 1}', '{"other": "x"}', "[]", "nonsense", '"text"', '{"text": "half \\ud83d"}'):
        (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n' + bad + '\n{"text": "fine"}\n')
        assert "bad.jsonl, line 3: " in refused("prepare.py", "bad.jsonl", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["a"]


def test_bytes_that_are_not_utf8_are_named_or_replaced(tmp_path):
    content = text_of(2 * MB + 1000).encode()
    at = 2 * MB + 77  # in the third block
    (tmp_path / "latin.txt").write_bytes(content[:at] + b"\xe9" + content[at:])
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc\xff")
    (tmp_path / "end.txt").write_bytes("abc€".encode()[:-1])
    (tmp_path / "zipped.txt.gz").write_bytes(gzip.compress(content[:at] + b"\xe9" + content[at:]))
    for name, byte in (("latin.txt", at), ("bom.txt", 6), ("end.txt", 3), ("zipped.txt.gz", at)):
        line = refused("prepare.py", name, cwd=tmp_path)
        assert f"{name} is not UTF-8: byte {byte} is 0x" in line and "--errors=replace" in line
    assert not list((tmp_path / "data").glob("*"))
    run("prepare.py", "latin.txt", "--errors=replace", cwd=tmp_path)
    meta = json.loads((tmp_path / "data" / "latin" / "meta.json").read_text())
    ids = np.frombuffer(b"".join(bins(tmp_path / "data" / "latin").values()), dtype="<u2")
    text = content[:at].decode() + "\ufffd" + content[at:].decode()
    assert prepare.load_tokenizer(meta).decode(ids) == text


def test_a_folder_as_its_files_would_be(tmp_path):
    """Undecodable bytes, LaTeX that begins like a PDF, a meta.json of somebody else's; options anywhere."""
    texts = tmp_path / "texts"
    (texts / "more").mkdir(parents=True)
    (texts / "latin.txt").write_bytes(b"caf\xe9 " * 20)
    (texts / "paper.tex").write_text("%PDF options of hyperref\nSome text. " * 20)
    (texts / "more" / "meta.json").write_text('{"title": "notes"}')
    (texts / "more" / "b.txt").write_text("some notes " * 20)
    (tmp_path / "last.txt").write_text("the last text " * 20)
    assert "latin.txt is not UTF-8: byte 3 is 0xe9" in refused("prepare.py", "texts", cwd=tmp_path)
    done = run("prepare.py", "texts", "--errors=replace", "last.txt", "--name=it", cwd=tmp_path)
    assert "not text" not in done.stdout
    meta = json.loads((tmp_path / "data" / "it" / "meta.json").read_text())
    assert [source["path"] for source in meta["sources"]] == [
        "texts/latin.txt",
        "texts/more/b.txt",
        "texts/more/meta.json",
        "texts/paper.tex",
        "last.txt",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "u8", "utf-16", "utf-16-le", "UTF-16BE", "utf-32-le"])
@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl.gz"])
def test_a_bom_is_no_text(tmp_path, monkeypatch, encoding, suffix):
    """However the encoding is spelled, and whether or not it writes one by itself."""
    monkeypatch.chdir(tmp_path)
    text = {".txt": "abc", ".json": '[{"text": "abc"}]'}.get(suffix, '{"text": "abc"}')
    mark = "" if encoding == "utf-16" else "\ufeff"
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(f"bom{suffix}", "wb") as file:
        file.write((mark + text).encode(encoding))
    args = argparse.Namespace(what=[f"bom{suffix}"], name="bom", tokenizer=None, val_fraction=0.4)
    args.__dict__ |= {"vocab_size": 4096, "encoding": encoding, "errors": "strict", "text_key": None}
    prepare.prepare(args)
    assert json.loads(Path("data/bom/meta.json").read_text())["tokenizer"]["chars"] == list("abc")


def test_binary_files_of_a_folder_are_skipped_and_counted(tmp_path):
    (tmp_path / "mixed" / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.MD"):
        (tmp_path / "mixed" / name).write_text("some text")
    (tmp_path / "mixed" / "utf16.txt").write_text("some text", encoding="utf-16")
    (tmp_path / "mixed" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "mixed" / "deep" / "archive.tar.gz").write_bytes(gzip.compress(b"some text"))
    done = run("prepare.py", "mixed", cwd=tmp_path)
    assert "2 documents" in done.stdout and "3 files are not text" in done.stdout
    meta = json.loads((tmp_path / "data" / "mixed" / "meta.json").read_text())
    assert [Path(source["path"]).name for source in meta["sources"]] == ["a.txt", "b.MD"]
    assert meta["sources"][0]["sha256"] == prepare.file_sha256(tmp_path / "mixed" / "a.txt")


def test_prepared_datasets_in_a_folder_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "data" / "gpt2").mkdir(parents=True)  # weights, which have no val.bin
    (tmp_path / "data" / "gpt2" / "meta.json").write_text("{}")
    for _ in range(2):
        done = run("prepare.py", ".", "--name=it", cwd=tmp_path)
    assert "2 files are not text" in done.stdout and "data/gpt2, data/it" in done.stdout
    assert len(json.loads((tmp_path / "data" / "it" / "meta.json").read_text())["sources"]) == 1
    assert "empty" in refused("prepare.py", "", cwd=tmp_path)
    (tmp_path / "data" / "it" / ".DS_Store").write_text("a stray file")
    assert "is a prepared dataset" in refused("prepare.py", "data/it", "--name=more", cwd=tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives_are_refused(tmp_path, suffix):
    text = os.urandom(1_200_000).hex(" ", 8).encode()  # the end is found missing in the third piece
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    content = gzip.compress(text) if suffix == ".gz" else zstd.compress(text, options=checked)
    for i, damaged in enumerate((content[:-1], content[:9000] + b"?" * 99 + content[9099:], b"plain text")):
        (tmp_path / f"{i}.txt{suffix}").write_bytes(damaged)
        assert f"{i}.txt{suffix} is damaged" in refused("prepare.py", f"{i}.txt{suffix}", cwd=tmp_path)
    assert not list((tmp_path / "data").glob("*"))


def test_without_zstandard_one_line_says_so(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zstd.compress(b"text " * 100))
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "backports.py").write_text("raise ImportError('No module named backports')")
    (tmp_path / "without" / "compression.py").write_text("raise ImportError('No module named compression')")
    env = {"PYTHONPATH": str(tmp_path / "without")}
    assert "pip install backports.zstd" in refused("prepare.py", "a.txt.zst", cwd=tmp_path, env=env)
    run("prepare.py", "a.txt.zst", cwd=tmp_path)
    assert (tmp_path / "data" / "a").is_dir()


# -- vocabularies --------------------------------------------------------------------------------------------


def test_more_words_than_uint16_counts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(65_535))))
    line = refused("prepare.py", "a.txt", "--tokenizer=word", cwd=tmp_path)
    assert all(words in line for words in ("65536", "--tokenizer=gpt2"))
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(65_534))))
    run("prepare.py", "a.txt", "--tokenizer=word", cwd=tmp_path)
    assert json.loads((tmp_path / "data" / "a" / "meta.json").read_text())["vocab_size"] == 65_536


# -- interruptions -------------------------------------------------------------------------------------------


def processes_of(group):
    """The process IDs of a process group that still run."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has just gone
            continue
        if int(of_group) == group and state != "Z":
            alive.append(int(stat.parent.name))
    return alive


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("kill", ["Ctrl-C", "SIGKILL"])
def test_interrupted_it_leaves_nothing_and_runs_again(tmp_path, kill):
    text = text_of(500_000)
    (tmp_path / "big.txt").write_text(text * 40)
    command = [sys.executable, REPO / "prepare.py", "big.txt", "--tokenizer=word"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run with a &
    )
    partial = tmp_path / "data" / ".big.new" / "train.bin"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    if kill == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    errors = process.communicate(timeout=60)[1]
    deadline = time.monotonic() + 60
    while processes_of(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "data" / "big").exists()
    if kill == "Ctrl-C":
        assert process.returncode == 1 and list((tmp_path / "data").iterdir()) == []
        assert errors == "prepare.py: interrupted; nothing half-done is left, run it again\n"
    (tmp_path / "big.txt").write_text(text)
    run("prepare.py", "big.txt", "--tokenizer=word", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["big"]
    tokenizer = prepare.load_tokenizer(json.loads((tmp_path / "data" / "big" / "meta.json").read_text()))
    assert bins(tmp_path / "data" / "big") == expected_bins(tokenizer, [text])


def test_full_disk_ends_in_one_line(tmp_path):
    (tmp_path / "big.txt").write_text(text_of(500_000) * 12)
    done = run_on_a_full_disk(3 * MB, "prepare.py", "big.txt", cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "File too large" in done.stderr and "make room" in done.stderr
    assert list((tmp_path / "data").iterdir()) == []


# -- FineWeb -------------------------------------------------------------------------------------------------

PLACE = "/huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_"


def shard(ids, magic=20240520, version=1, tokens=None):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if tokens is None else tokens
    return header.tobytes() + np.array(ids, dtype="<u2").tobytes()


@pytest.fixture
def fineweb(server):
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 50257, 100_000) for name in ("train_000001", "train_000002", "val_000000")}
    Server.files = {f"{PLACE}{name}.bin": shard(some) for name, some in ids.items()}
    return {"PLAINGPT_MIRROR": server, "HTTPS_PROXY": "http://127.0.0.1:9"}, ids  # no way round the mirror


def test_fineweb_goes_on_where_it_was_interrupted(tmp_path, fineweb, monkeypatch):
    env, ids = fineweb
    second, Server.files[f"{PLACE}train_000002.bin"] = Server.files[f"{PLACE}train_000002.bin"], None
    Server.breaks = 1
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(prepare.time, "sleep", lambda seconds: None)
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(prepare.UserError, match="train_000002.bin"):
            prepare.prepare_fineweb("fineweb", 2)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".cache"]
    first = [asked for path, asked in Server.requests if path.endswith("train_000001.bin")]
    assert first[0] is None and re.fullmatch(r"bytes=\d+-", first[1])  # broken off, and resumed
    Server.files[f"{PLACE}train_000002.bin"] = second
    Server.requests.clear()
    done = run("prepare.py", "fineweb", "--shards=2", cwd=tmp_path, env=env)
    assert {path.split("fineweb_")[1] for path, _ in Server.requests if "fineweb" in path} == {
        "train_000002.bin",
        "val_000000.bin",
    }
    assert "GPT-2's vocabulary is still missing" in done.stderr  # this server has something else in its place
    folder = tmp_path / "data" / "fineweb"
    written = bins(folder)
    whole = np.concatenate([ids["train_000001"], ids["train_000002"]])
    assert written["train.bin"] == whole.astype("<u2").tobytes()
    assert written["val.bin"] == ids["val_000000"].astype("<u2").tobytes()
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["train_tokens"], meta["val_tokens"], meta["vocab_size"]) == (200_000, 100_000, 50257)
    assert meta["tokenizer"] == {"type": "gpt2"} and len(meta["sources"]) == 3
    assert all(set(source) == {"url", "sha256"} for source in meta["sources"])
    assert "200,000 train (66.7%) and 100,000 validation tokens (33.3%)" in done.stdout
    Server.requests.clear()
    run("prepare.py", "fineweb", cwd=tmp_path, env=env)
    assert not [path for path, _ in Server.requests if "fineweb" in path]
    assert (folder / "train.bin").stat().st_size == 200_000


@pytest.mark.parametrize(
    "damage",
    [
        {"magic": 1},
        {"version": 2},
        {"tokens": 99_999},
        None,
    ],
)
def test_fineweb_refuses_what_is_no_shard(tmp_path, fineweb, damage):
    env, ids = fineweb
    path, good = f"{PLACE}train_000001.bin", Server.files[f"{PLACE}train_000001.bin"]
    Server.files[path] = b"<html>" if damage is None else shard(ids["train_000001"], **damage)
    done = run("prepare.py", "fineweb", cwd=tmp_path, env=env, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train_000001.bin came as something else" in done.stderr.splitlines()[-1]
    Server.files[path] = good
    run("prepare.py", "fineweb", cwd=tmp_path, env=env)  # fetched anew
    assert (tmp_path / "data" / "fineweb" / "train.bin").stat().st_size == 200_000


def test_fineweb_is_gpt2s(tmp_path):
    for flag in ("--shards=0", "--tokenizer=char"):
        assert "GPT-2" in refused("prepare.py", "fineweb", flag, cwd=tmp_path)


# -- token IDs of others -------------------------------------------------------------------------------------


@needs_mirror
def test_token_ids_of_others_become_text(workdir):
    """No meta.json: taken for GPT-2's. Where its vocabulary is out of reach, that is what is said."""
    folder = workdir / "data" / "bare"
    folder.mkdir()
    for split in ("train", "val"):
        np.arange(100, dtype="<u2").tofile(folder / f"{split}.bin")
    args = [*TINY.split(), "--dataset=bare", "--max_iters=1", "--out_dir=out/bare"]
    assert "taken for GPT-2" in run("train.py", *args, cwd=workdir).stderr
    args = ["--out_dir=out/bare", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    offline = {"HTTPS_PROXY": "http://127.0.0.1:9", "PLAINGPT_MIRROR": "", "NO_PROXY": ""}
    done = run("sample.py", *args, cwd=workdir, check=False, env=offline)
    assert done.returncode
    assert done.stderr.splitlines()[-1].startswith("sample.py: cannot download https://openaipublic")
    assert run("sample.py", *args, cwd=workdir).stdout
