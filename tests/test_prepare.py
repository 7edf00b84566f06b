"""From outside to token IDs: corpora, tokenizers, splits, downloads."""

import errno
import hashlib
import json
import re
import socketserver
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CONTENT, Server, needs_mirror, refused, run
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare


def load(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta, *(np.memmap(folder / f"{split}.bin", dtype=np.uint16) for split in ("train", "val"))


# -- corpora -------------------------------------------------------------------------------------------------


def test_pydocs_needs_no_network_and_round_trips(workdir):
    meta, train, val = load(workdir / "data" / "pydocs")
    assert sorted(p.name for p in (workdir / "data" / "pydocs").iterdir()) == [
        "meta.json",
        "train.bin",
        "val.bin",
    ]
    tokenizer = prepare.load_tokenizer(meta)
    text = tokenizer.decode(train) + tokenizer.decode(val)
    assert text == prepare.pydocs() and text.startswith('The "assert" statement')
    assert len(text) > 400_000 and len(train) == int(len(text) * 0.9)
    assert (meta["train_tokens"], meta["val_tokens"], meta["dtype"]) == (len(train), len(val), "uint16")
    assert meta["vocab_size"] == len(set(text)) == tokenizer.vocab_size
    assert meta["sources"][0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@needs_mirror
@pytest.mark.parametrize(
    "name, vocab_size, train_tokens, val_tokens, sha256",
    [
        ("shakespeare_char", 65, 1_003_854, 111_540, prepare.TINY_SHAKESPEARE[1]),
        ("shakespeare", 50257, 301_966, 36_059, prepare.TINY_SHAKESPEARE[1]),
        ("verdict", 50257, 4_612, 534, prepare.THE_VERDICT[1]),
    ],
)
def test_published_corpora(tmp_path, name, vocab_size, train_tokens, val_tokens, sha256):
    run("prepare.py", name, cwd=tmp_path)
    meta, train, val = load(tmp_path / "data" / name)
    assert (meta["vocab_size"], len(train), len(val)) == (vocab_size, train_tokens, val_tokens)
    assert meta["sources"][0]["sha256"] == sha256
    assert {p.name for p in (tmp_path / "data").iterdir()} == {name, ".cache"}


# -- tokenizers ----------------------------------------------------------------------------------------------


def test_word_tokenizer_as_published(verdict, reference):
    published = reference["word_tokenizer"]
    tokenizer = prepare.WordTokenizer.from_entries(set(prepare.WordTokenizer.words(verdict)))
    assert len(tokenizer.words(verdict)) == published["n_tokens"]
    assert tokenizer.vocab_size == published["vocab_size"] == published["n_distinct"] + 2
    tokenizer = prepare.load_tokenizer(json.loads(json.dumps({"tokenizer": tokenizer.meta})))
    for text, ids in published["encode"]:
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == published["decode_of_that"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("gpt2"))
        return prepare.load_tokenizer({"tokenizer": {"type": "gpt2"}})


@needs_mirror
def test_gpt2_tokenizer_as_published(gpt2, verdict, reference):
    published = reference["gpt2_tokenizer"]
    assert len(verdict) == published["the_verdict"]["characters"]
    assert len(gpt2.encode(verdict)) == published["the_verdict"]["tokens"]
    for text, ids in published["encode"]:
        assert gpt2.encode(text) == ids and gpt2.decode(ids) == text
    assert gpt2.vocab_size == 50257 and gpt2.encode("<|endoftext|>") == [gpt2.end_of_text] == [50256]


@needs_mirror
@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_gpt2_round_trips_any_text(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@given(text=st.text(min_size=1))
def test_char_round_trips_its_own_alphabet(text):
    tokenizer = prepare.CharTokenizer(sorted(set(text)))
    again = prepare.load_tokenizer(json.loads(json.dumps({"tokenizer": tokenizer.meta})))
    assert again.decode(again.encode(text)) == text


def test_unknown_character_names_itself():
    tokenizer = prepare.CharTokenizer(["a", "b", "c"])
    for text in ("ab€", "ab€d"):
        with pytest.raises(prepare.UserError, match=r"'€' \(U\+20AC\)"):
            tokenizer.encode(text)
    with pytest.raises(prepare.UserError, match=r"'\\udfff' \(U\+DFFF\)"):
        tokenizer.encode("\udfff")


@settings(max_examples=300)
@given(
    text=st.lists(st.one_of(st.text(max_size=5), st.sampled_from(["<|endoftext|>", "<|endof", "🙂"]))).map(
        "".join
    ),
    ends=st.booleans(),
)
def test_char_ids_are_those_of_a_plain_loop(text, ends):
    chars = sorted(set(text)) + [prepare.END_OF_TEXT] * ends
    tokenizer, ids, parts = prepare.CharTokenizer(chars), [], [text]
    if ends:
        parts = re.split("(" + re.escape(prepare.END_OF_TEXT) + ")", text)
    for part in parts:
        ids += [chars.index(entry) for entry in ([part] if ends and part == prepare.END_OF_TEXT else part)]
    assert tokenizer.encode(text) == ids
    array = tokenizer.encode_array(text)
    assert array.tolist() == ids and array.dtype == np.dtype("<u2")
    assert tokenizer.decode(ids) == text


def words_as_published(text, published):
    """The words by the regular expression of the reference, stripped, without the empty ones."""
    return [part.strip() for part in re.split(published["split_regex"], text) if part.strip()]


@settings(max_examples=1000)
@given(text=st.one_of(st.text(), st.text("ab-,.?_!\"()' \n\t\x1c\x85\u2003\u200b:;"), st.text("a- \n")))
def test_words_are_those_of_the_published_rule(reference, text):
    assert prepare.WordTokenizer.words(text) == words_as_published(text, reference["word_tokenizer"])


# -- your own text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "word", pytest.param("gpt2", marks=needs_mirror)])
def test_many_documents_go_whole_to_one_side(tmp_path, tokenizer):
    (tmp_path / "books" / "deep").mkdir(parents=True)
    for i in range(12):
        folder = tmp_path / "books" / ("deep" if i % 2 else "")
        (folder / f"{i:02}.txt").write_text(f"book {chr(97 + i)} is short", encoding="utf-8")
    (tmp_path / "books" / "cover.png").write_bytes(b"\x89PNG\xff")
    run("prepare.py", "books", f"--tokenizer={tokenizer}", "--val_fraction=0.25", cwd=tmp_path)
    meta, train, val = load(tmp_path / "data" / "books")
    tok = prepare.load_tokenizer(meta)
    documents = {}
    for split, ids in (("train", train), ("val", val)):
        assert ids[-1] == tok.end_of_text
        documents[split] = (
            tok.decode(ids).replace(" <|endoftext|>", "<|endoftext|>").split("<|endoftext|>")[:-1]
        )
    assert (len(documents["train"]), len(documents["val"])) == (9, 3)
    everything = {f"book {chr(97 + i)} is short" for i in range(12)}
    assert {text.strip() for split in documents.values() for text in split} == everything
    assert len(meta["sources"]) == 12


@given(n=st.integers(2, 400), fraction=st.floats(0.01, 0.5))
def test_split_shares_documents_as_asked(n, fraction):
    texts = list(prepare.split_documents([[str(i)] for i in range(n)], n, n, fraction))
    sides = {side: [int(text) for split, text in texts[::2] if split == side] for side in ("train", "val")}
    assert sorted(sides["train"] + sides["val"]) == list(range(n))
    assert len(sides["val"]) == max(1, int(n * fraction)) and sides["train"]
    assert {text for _, text in texts[1::2]} == {prepare.END_OF_TEXT}
    assert [split for split, _ in texts[1::2]] == [split for split, _ in texts[::2]]


def test_prepared_again_is_replaced_whole(tmp_path):
    (tmp_path / "my text.txt").write_text("one " * 100)
    run("prepare.py", "my text.txt", cwd=tmp_path)
    (tmp_path / "my text.txt").write_text("two " * 200)
    assert "replaced" in run("prepare.py", "my text.txt", cwd=tmp_path).stderr
    meta, train, val = load(tmp_path / "data" / "my_text")
    assert prepare.load_tokenizer(meta).decode(train).startswith("two two") and len(train) == 720
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["my_text"]


def test_mistakes_end_in_one_line(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "tiny.txt").write_text("x")
    (tmp_path / "wide.txt").write_text(
        "".join(map(chr, range(0xE000, 0xF8FF))) + "".join(map(chr, range(0x10000, 0x20000)))
    )
    (tmp_path / "bare").mkdir()
    (tmp_path / "verdict.txt").write_text("my own verdict " * 10)
    (tmp_path / "foreign.txt").write_text("of another program " * 10)
    (tmp_path / "data" / "foreign").mkdir(parents=True)
    (tmp_path / "data" / "foreign" / "train.bin").write_bytes(b"precious")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "input.txt").write_text("precious " * 10)
    for words, *args in (
        (["latin.txt", "byte 3", "0xe9"], "latin.txt"),
        (["no text", "data/empty"], "empty.txt"),
        (["train.bin", "more text"], "tiny.txt"),
        (["65536", "--tokenizer=gpt2"], "wide.txt"),
        (["nowhere", "shakespeare_char"], "nowhere"),
        (["did you mean shakespeare_char?"], "shakespeare_cahr"),
        (["name of a corpus", "--name"], "verdict.txt"),
        (["did not write", "--name"], "foreign.txt"),
        (["one corpus at a time"], "verdict", "pydocs"),
        (["no text file"], "bare"),
        (["--val_fraction", "1.5"], "--val_fraction=1.5"),
        (["--name", "../up"], "--name=../up"),
        (["data/mine", "--name"], "data/mine/input.txt", "--name=mine"),
    ):
        line = refused("prepare.py", *args, cwd=tmp_path)
        assert all(word in line for word in words), line
    assert (tmp_path / "data" / "mine" / "input.txt").exists()
    assert {p.name for p in (tmp_path / "data").iterdir()} == {"mine", "foreign"}


def test_full_disk_leaves_no_dataset(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text " * 100)
    monkeypatch.chdir(tmp_path)
    real = json.dumps

    def full(*args, **kwargs):
        if "indent" in kwargs:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(OSError):
        prepare.write_dataset("a", [["text " * 100]], [], "char")
    assert list((tmp_path / "data").iterdir()) == []


# -- downloads -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_mirror(monkeypatch):
    monkeypatch.delenv("PLAINGPT_MIRROR", raising=False)
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)


def test_download_resumes_a_broken_transfer(tmp_path, server, no_mirror):
    Server.breaks = 1
    prepare.download(f"{server}/file", tmp_path / "sub" / "file", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "sub" / "file").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["file"]
    (_, first), (_, second) = Server.requests
    assert first is None and 0 < int(second[6:-1]) <= len(CONTENT) // 2
    prepare.download(f"{server}/file", tmp_path / "sub" / "file")
    assert len(Server.requests) == 2  # it lies there


@pytest.mark.parametrize("part", [CONTENT[:1000], CONTENT, CONTENT + b"more", b"of another file"])
def test_download_goes_on_from_what_another_run_left(tmp_path, server, no_mirror, part):
    (tmp_path / "file.part").write_bytes(part)
    prepare.download(f"{server}/file", tmp_path / "file", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "path, sha256, message",
    [("missing", None, "404"), ("file", "0" * 64, "has changed or was damaged")],
)
def test_download_refuses(tmp_path, server, no_mirror, path, sha256, message):
    with pytest.raises(prepare.UserError, match=message) as error:
        prepare.download(f"{server}/{path}", tmp_path / "file", sha256)
    assert f"{server}/{path}" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "answer",
    [
        b"204 No Content\r\n",
        b"202 Accepted\r\nContent-Length: 4\r\n",
        b"304 Not Modified\r\n",
        b"302 Found\r\nContent-Length: 4\r\n",
        b"302 Found\r\nLocation: http://[::1\r\nContent-Length: 4\r\n",
        b"206 Partial Content\r\nContent-Range: bytes 9-12/13\r\nContent-Length: 4\r\n",
        b"200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n",
    ],
    ids=lambda answer: answer[:40].decode().split("\r")[0],
)
def test_answers_that_are_no_file_are_refused(tmp_path, no_mirror, answer):
    """Statuses other than that of a file, and headers that are no numbers or addresses."""

    class Odd(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 " + answer + b"Connection: close\r\n\r\nbody")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Odd) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        (tmp_path / "file.part").write_bytes(b"half a file")
        with pytest.raises(prepare.UserError, match="cannot download"):
            prepare.download(f"http://127.0.0.1:{httpd.server_address[1]}/file", tmp_path / "file")
        httpd.shutdown()
    assert not (tmp_path / "file").exists()


def test_no_network_names_the_ways_out(tmp_path, no_mirror):
    with pytest.raises(prepare.UserError) as error:
        prepare.download("http://127.0.0.1:9/some/file", tmp_path / "file")
    assert all(word in str(error.value) for word in ("127.0.0.1:9/some/file", "PLAINGPT_MIRROR", "pydocs"))


def test_http_mirror_comes_first(tmp_path, server, no_mirror, monkeypatch):
    monkeypatch.setenv("PLAINGPT_MIRROR", server)
    prepare.download("http://127.0.0.1:9/some/file", tmp_path / "file")
    assert Server.requests == [("/127.0.0.1:9/some/file", None)]
    assert Path(tmp_path / "file").read_bytes() == CONTENT
