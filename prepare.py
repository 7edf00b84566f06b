"""All that comes in from outside: text -> token IDs in data/<name>/, tokenizers, downloads, GPT-2's weights.

    python prepare.py                              # pydocs: Python's own reference, nothing is downloaded
    python prepare.py shakespeare_char
    python prepare.py books/ more.jsonl.gz --tokenizer=gpt2 --name=books
    python prepare.py fineweb --shards=10          # a billion tokens of web text
    python prepare.py gpt2                         # OpenAI's weights: data/gpt2/ckpt.pt

A dataset is train.bin and val.bin (little-endian uint16 token IDs, no header) and meta.json. Text is read twice,
to count and then to tokenize, a piece at a time: memory does not grow with it.
Downloads go through download() alone, and first to PLAINGPT_MIRROR where that is set.
"""

import argparse
import codecs
import difflib
import errno
import hashlib
import heapq
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import closing, contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"
MAX_VOCAB = 65536  # what uint16 can count
PIECE = 1 << 20  # characters that are read, and tokenized, at a time
SUFFIXES = ".txt .md .rst .tex .py .c .h .cpp .java .js .ts .go .rs .html .css .csv .xml .json .jsonl".split()
UNPACK = {  # .zst only where that package is
    ".gz": lambda: zlib.decompressobj(31),
    ".zst": lambda: import_module("zstandard").ZstdDecompressor().decompressobj(),
}

TINY_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
THE_VERDICT = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
    "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
)
VOCAB_BPE = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
ENCODER_JSON = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)
CORPORA = {  # name: (its tokenizer unless --tokenizer says otherwise, where it is downloaded from)
    "pydocs": ("char", None),
    "shakespeare_char": ("char", TINY_SHAKESPEARE),
    "shakespeare": ("gpt2", TINY_SHAKESPEARE),
    "verdict": ("gpt2", THE_VERDICT),
    "fineweb": ("gpt2", None),
}
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06}.bin"
FINEWEB_HEADER = 256  # int32: a magic number, the version, how many uint16 token IDs follow, zeros

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
GPT2_FILES = "checkpoint encoder.json hparams.json model.ckpt.index model.ckpt.meta vocab.bpe"
GPT2_FILES += " model.ckpt.data-00000-of-00001"
GPT2_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


Documents = Iterable[tuple[str, bool]]  # text as it comes, and whether its document ends there


class DataError(ValueError):
    """A mistake in what was asked for or read, in one line that says what to do."""


# -- downloads -----------------------------------------------------------------------------------------------


def download(url: str, path: str | Path, sha256: str | None = None) -> None:
    """Fetch url to path unless it lies there; path is whole or absent, whatever happens.

    The mirror PLAINGPT_MIRROR (a folder or an http(s) base that holds <host>/<path> of each URL) comes first.
    A broken transfer is resumed, now or by the next call, from path.part. Raises DataError.
    """
    path = Path(path)
    if path.is_file() and sha256 in (None, file_sha256(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    mirror = os.environ.get("PLAINGPT_MIRROR", "").rstrip("/")
    mirrored = f"{mirror}/{urlsplit(url).netloc}{urlsplit(url).path}"
    for _ in range(2):
        if mirror.startswith(("http://", "https://")):
            try:
                fetch(mirrored, part)
            except DataError as error:
                print(f"mirror: {error}", file=sys.stderr)
                fetch(url, part)
        elif mirror and Path(mirrored).is_file():
            shutil.copyfile(mirrored, part)
        else:
            fetch(url, part)
        if sha256 in (None, found := file_sha256(part)):
            os.replace(part, path)
            return
        part.unlink()  # the first time it may have been the rest of something else: start anew
    raise DataError(f"{url} has changed or was damaged on the way: sha256 {found}, expected {sha256}")


def fetch(url: str, part: Path) -> None:
    """Append what is missing of url to part, with retries. Raises DataError."""
    import requests  # here, so that train.py and sample.py start without it
    from tqdm import tqdm

    failures, most = 0, 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
                if response.status_code == 416:  # nothing lies past what we have
                    if response.headers.get("Content-Range") == f"bytes */{have}":
                        return
                    part.unlink()
                    continue
                response.raise_for_status()
                have = have if response.status_code == 206 else 0
                size = response.headers.get("Content-Length")
                total = have + int(size) if size else None
                bar = tqdm(desc=url.rsplit("/", 1)[-1], total=total, initial=have, unit="B", unit_scale=True)
                with bar, open(part, "ab" if have else "wb") as file:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        bar.update(len(chunk))
                        have += len(chunk)
                        if have > most:  # a transfer that gets further is worth another try, however often
                            failures, most = 0, have
            if total is None or part.stat().st_size == total:
                return
            reason = f"ended after {part.stat().st_size} of {total} bytes"
        except requests.HTTPError as error:
            reason = f"the server answers {error.response.status_code} {error.response.reason}"
            if error.response.status_code < 500:
                raise DataError(f"{url}: {reason}") from None
        except requests.RequestException as error:
            reason = type(error).__name__
        failures += 1
        if failures == 4:
            hint = "put it as <host>/<path> into the folder that PLAINGPT_MIRROR names, or take the embedded corpus"
            raise DataError(f"cannot download {url} ({reason}); {hint}: python prepare.py pydocs")
        time.sleep(2 ** (failures - 1))


def cached(url: str, sha256: str | None = None) -> Path:
    """The path of a downloaded file, fetched the first time."""
    path = Path("data", ".cache", urlsplit(url).netloc + urlsplit(url).path)
    download(url, path, sha256)
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- tokenizers ----------------------------------------------------------------------------------------------


class Tokenizer:
    """A subclass has encode(text) -> IDs, decode(IDs) -> text, vocab_size, meta (what meta.json keeps of it) and
    end_of_text: the ID that ends a document, or None.

    boundary: where a text may be cut, so that its pieces have the IDs of the whole. Before a space or newline that
    follows something else, a word ends, and a pre-token of GPT-2 too: no branch of its pattern goes on to white
    space from anything else. <|endoftext|> has no such place.
    """

    boundary = r"(?<=\S)[ \n]"

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype="<u2")


class CharTokenizer(Tokenizer):
    """One ID a character, in sorted order; <|endoftext|> comes last where there are documents to end."""

    boundary = r"[^|>endoftx]"  # anywhere but inside <|endoftext|>

    def __init__(self, chars: list[str]):
        self.meta, self.chars, self.vocab_size = {"type": "char", "chars": chars}, chars, len(chars)
        self.ids = {char: i for i, char in enumerate(chars)}
        self.end_of_text = self.ids.get(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        pieces = [text] if self.end_of_text is None else text.split(END_OF_TEXT)
        try:
            for i, piece in enumerate(pieces):
                ids += [self.end_of_text] * (i > 0) + [self.ids[char] for char in piece]
            return ids
        except KeyError as error:
            char = error.args[0]
            raise DataError(f"the character {char!r} (U+{ord(char):04X}) is not in the vocabulary") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)


class WordTokenizer(Tokenizer):
    """One ID a word or punctuation mark; white space is not kept and unknown words become <|unk|>."""

    def __init__(self, vocab: list[str]):
        self.meta, self.vocab, self.vocab_size = {"type": "word", "vocab": vocab}, vocab, len(vocab)
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.end_of_text = self.ids[END_OF_TEXT]

    @staticmethod
    def words(text: str) -> list[str]:
        return [word.strip() for word in re.split(r"""([,.?_!"()']|--|\s)""", text) if word.strip()]

    @classmethod
    def from_counts(cls, counts: dict[str, int], max_vocab: int = 0) -> "WordTokenizer":
        """Of all words, or of the most frequent ones that make a vocabulary of max_vocab."""
        words = counts.keys() - {END_OF_TEXT, UNKNOWN}
        if max_vocab:
            words = heapq.nsmallest(max_vocab - 2, words, key=lambda word: (-counts[word], word))
        return cls(sorted(words) + [END_OF_TEXT, UNKNOWN])

    def encode(self, text: str) -> list[int]:
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(word, unknown) for word in self.words(text)]

    def decode(self, ids: list[int]) -> str:
        return re.sub(r"""\s+([,.?!"()'])""", r"\1", " ".join(self.vocab[i] for i in ids))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, by tiktoken, from OpenAI's two files."""

    meta, vocab_size, end_of_text = {"type": "gpt2"}, 50257, 50256

    def __init__(self):
        from tiktoken import Encoding
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # ours is the cache
        ranks = data_gym_to_mergeable_bpe_ranks(str(cached(*VOCAB_BPE)), str(cached(*ENCODER_JSON)))
        special = {END_OF_TEXT: self.end_of_text}
        self.bpe = Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special="all")

    def encode_array(self, text: str) -> np.ndarray:  # without the detour of a list
        return self.bpe.encode_to_numpy(text, allowed_special="all").astype("<u2")

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids)


TOKENIZERS = {"char": CharTokenizer, "word": WordTokenizer, "gpt2": GPT2Tokenizer}


def load_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a meta.json describes. Raises DataError."""
    try:
        spec = dict(meta["tokenizer"])
        return TOKENIZERS[spec.pop("type")](**spec)
    except DataError:  # its files could not be downloaded
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the tokenizer's description is damaged or unknown: {error!r:.99}") from None


# -- text ----------------------------------------------------------------------------------------------------


def suffix(path: Path) -> str:
    """.txt of a.txt, a.txt.gz and a.txt.zst."""
    return Path(path.stem if path.suffix in UNPACK else path).suffix.lower()


def read_blocks(path: Path, size: int = 4096, bar: Any = None) -> Iterator[bytes]:
    """What a file holds, decompressed; bar counts the bytes on the disk. Raises DataError."""
    unpack, frame = UNPACK.get(path.suffix), None  # a packed file is a row of frames
    with open(path, "rb") as file:
        while block := file.read(1 << 14 if unpack else size):  # which may grow a thousandfold
            if bar is not None:
                bar.update(len(block))
            if not unpack:
                yield block
            while unpack and block:
                try:
                    frame = frame or unpack()
                    content = frame.decompress(block)
                except ImportError as error:
                    raise DataError(f"{path}: {error}; pip install zstandard, or unpack the file") from None
                except Exception as error:  # zlib's own, or zstandard's
                    raise DataError(f"{path} is damaged: {error}") from None
                if content:
                    yield content
                block, frame = (frame.unused_data.lstrip(b"\0"), None) if frame.eof else (b"", frame)
    if frame:
        raise DataError(f"{path} is damaged: its end is missing")


class Texts:
    """Files, and the text files of folders, as documents that can be read more than once. Raises DataError."""

    def __init__(self, paths: list[str], text_key: str = "text", errors: str = "strict"):
        self.files, self.skipped, self.text_key, self.errors = [], 0, text_key, errors
        for path in map(Path, paths):
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
            text = [p for p in files if suffix(p) in SUFFIXES and b"\0" not in next(read_blocks(p), b"")]
            self.files += text if path.is_dir() else [path]
            self.skipped += len(files) - len(text)
        if not self.files:
            raise DataError(f"no text file ({' '.join(SUFFIXES)}) in {' '.join(paths)}")

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        from tqdm import tqdm

        size = sum(path.stat().st_size for path in self.files)
        with tqdm(total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for path in self.files:
                read = self.read_jsonl if suffix(path) == ".jsonl" else self.read_text
                yield from read(path, bar)

    def read_text(self, path: Path, bar: Any) -> Iterator[tuple[str, bool]]:
        decoder, offset = codecs.getincrementaldecoder("utf-8-sig")(self.errors), 0
        for block in chain(read_blocks(path, PIECE, bar), [b""]):
            offset += len(block)
            try:
                yield decoder.decode(block, final=not block), not block
            except UnicodeDecodeError as error:  # its object ends where the block does
                at, byte = offset - len(error.object) + error.start, error.object[error.start]
                message = f"{path} is not UTF-8: byte {at} is {byte:#x}; --errors=replace goes on"
                raise DataError(message) from None

    def read_jsonl(self, path: Path, bar: Any) -> Iterator[tuple[str, bool]]:
        number, line = 0, ""
        for block, ends in self.read_text(path, bar):
            *lines, line = (line + block + "\n" * ends).split("\n")
            for number, whole in enumerate(lines, number + 1):  # noqa: B020
                if not whole.strip():
                    continue
                try:  # half a surrogate pair, which JSON can spell, is no text
                    text = json.loads(whole)[self.text_key].encode("utf-8", self.errors).decode()
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                    message = f"{path}, line {number}: no JSON object with a text under {self.text_key!r}"
                    raise DataError(f"{message}, or name its --text_key ({error!r:.99})") from None
                for i in range(0, max(1, len(text)), PIECE):
                    yield text[i : i + PIECE], i + PIECE >= len(text)


def pydocs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name].strip() + "\n" for name in sorted(topics))


# -- text to token IDs ---------------------------------------------------------------------------------------


def pieces(documents: Documents, boundary: str) -> Iterator[tuple[str, bool]]:
    """The same, cut only where boundary allows it: a piece is as long as that takes."""
    last, rest = re.compile(rf"(?s:.+)(?={boundary})"), ""
    for text, ends in documents:
        seen, rest = max(0, len(rest) - 1), rest + text  # there was no boundary in the rest
        if ends:
            yield rest, True
            rest = ""
        elif found := last.match(rest, seen):
            yield rest[: found.end()], False
            rest = rest[found.end() :]


def chunks(documents: Documents, count: int, characters: int, val_fraction: float) -> Iterator[list]:
    """[(split, text)] of about PIECE characters together.

    One document is cut, its first part trains. Of many, each goes whole to one side, with <|endoftext|>: the last of
    every 1 / val_fraction validates, and one at least.
    """
    number, left = 0, int(characters * (1 - val_fraction))  # of one document, characters that train
    chunk, size = [], 0
    for text, ends in documents:
        if count == 1:
            chunk += [("train", text[:left]), ("val", text[left:])]
            left = max(0, left - len(text))
        else:
            due = [int(i * val_fraction) for i in (number, number + 1, count)]
            split = "val" if due[0] < due[1] or due[2] == 0 and number == count - 1 else "train"
            chunk += [(split, text), (split, END_OF_TEXT)] if ends else [(split, text)]
        number, size = number + ends, size + len(text)
        if size >= PIECE:
            yield chunk
            chunk, size = [], 0
    yield chunk


def encode_chunk(chunk: list[tuple[str, str]], tokenizer: Tokenizer | None = None) -> dict[str, bytes]:
    """{split: token IDs as they go into its .bin}; in a worker, by its own tokenizer."""
    encode = (tokenizer or worker_tokenizer).encode_array
    ids = [(split, encode(text).tobytes()) for split, text in chunk]
    return {split: b"".join(part for to, part in ids if to == split) for split in ("train", "val")}


def start_worker(meta: dict[str, Any]) -> None:
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where it is not inherited
    parent = multiprocessing.parent_process()  # which may be killed: then nobody else would
    threading.Thread(target=lambda: os._exit(parent.join() or 1), daemon=True).start()
    worker_tokenizer = load_tokenizer({"tokenizer": meta})


def encode_chunks(chunks: Iterable[list], tokenizer: Tokenizer, workers: int) -> Iterator[dict[str, bytes]]:
    """encode_chunk of each, in order, by so many processes: tiktoken's threads would wait for each other.

    At most two chunks a worker are under way, which bounds the memory. workers=0: here.
    """
    if workers == 0:
        yield from (encode_chunk(chunk, tokenizer) for chunk in chunks)
        return
    spawn = multiprocessing.get_context("spawn")  # the same on every system
    pool, under_way = ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer.meta,)), deque()
    try:
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all, but is for us alone
        for _ in range(workers):
            pool.submit(int)  # starts a worker, which inherits that
        signal.signal(signal.SIGINT, on_interrupt)
        for chunk in chunks:
            under_way.append(pool.submit(encode_chunk, chunk))
            if len(under_way) > 2 * workers:
                yield under_way.popleft().result()
        yield from (ids.result() for ids in under_way)
    finally:
        pool.shutdown(cancel_futures=True)


def write_dataset(
    name: str, documents: Documents, sources: list, kind: str, val_fraction: float = 0.1, max_vocab: int = 0
) -> dict[str, Any]:
    """Tokenize documents, read twice, into data/<name>/, whole or absent at any time. Raises DataError.

    Returns what meta.json holds, with the number of documents and of characters.
    """
    boundary = TOKENIZERS[kind].boundary
    tokenizer = None if kind in ("char", "word") else TOKENIZERS[kind]()  # it may have to be downloaded
    count, characters, blank, counts = 0, 0, True, Counter()
    for text, ends in pieces(documents, boundary):
        count, characters, blank = count + ends, characters + len(text), blank and not text.strip()
        if not tokenizer:
            counts.update(WordTokenizer.words(text) if kind == "word" else set(text))
        if len(counts) > MAX_VOCAB and not max_vocab:
            break  # it will be refused
    if blank:
        raise DataError(f"there is no text to make data/{name} of")
    if kind == "char":
        tokenizer = CharTokenizer(sorted(counts) + [END_OF_TEXT] * (count > 1))
    elif kind == "word":
        tokenizer = WordTokenizer.from_counts(counts, max_vocab)
    if tokenizer.vocab_size > MAX_VOCAB:
        hint = "try --tokenizer=gpt2, or --max_vocab where it is of words"
        raise DataError(f"{name}: the vocabulary entries are over {MAX_VOCAB}; {hint}")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cpus, 16) if characters > 4 * PIECE else 0  # less is done before they have started
    todo = chunks(pieces(documents, boundary), count, characters, val_fraction)
    with closing(encode_chunks(todo, tokenizer, workers)) as encoded:
        ids = chain.from_iterable(part.items() for part in encoded)
        return write_bins(name, ids, tokenizer, sources) | {"documents": count, "characters": characters}


def prepare_fineweb(name: str, shards: int) -> dict[str, Any]:
    """FineWeb's first shards of 100M GPT-2 IDs, and one to validate, into data/<name>/. Raises DataError."""
    urls = {FINEWEB_URL.format("train", i + 1): "train" for i in range(shards)}
    urls[FINEWEB_URL.format("val", 0)] = "val"
    sources, ids = [], []
    for url, split in urls.items():
        path = cached(url)
        magic, version, tokens = (*np.fromfile(path, "<i4", FINEWEB_HEADER), 0, 0, 0)[:3]
        size = 4 * FINEWEB_HEADER + 2 * int(tokens)
        if (magic, version) != (20240520, 1) or tokens == 0 or path.stat().st_size != size:
            path.unlink()
            raise DataError(f"{url} came as something else than a shard of token IDs; run it again")
        sources.append({"url": url, "sha256": file_sha256(path)})
        ids.append((split, np.memmap(path, "<u2", "r", 4 * FINEWEB_HEADER)))
    return write_bins(name, ids, GPT2Tokenizer, sources)


def write_bins(name: str, ids: Iterable[tuple[str, Any]], tokenizer: Any, sources: list) -> dict[str, Any]:
    """data/<name>/ of (split, uint16 token IDs) as they come; returns what meta.json holds. Raises DataError."""
    vocab_size = tokenizer.vocab_size
    meta = {"dataset": name, "tokenizer": tokenizer.meta, "vocab_size": vocab_size, "dtype": "uint16"}
    with new_folder(name, {"train.bin", "val.bin", "meta.json"}) as folder:
        for split, some in ids:
            with open(folder / f"{split}.bin", "ab") as file:
                file.write(some)
        for split in ("train", "val"):
            meta[f"{split}_tokens"] = (folder / f"{split}.bin").stat().st_size // 2
            if meta[f"{split}_tokens"] == 0:
                hint = "give more text or another --val_fraction"
                raise DataError(f"{name}: nothing is left for {split}.bin; {hint}")
        meta["sources"] = sources
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


@contextmanager
def new_folder(name: str, files: set[str]) -> Iterator[Path]:
    """A folder to fill, which becomes data/<name>/ when all is done; until then the old one, or none, is there.

    files: what data/<name>/ may hold to be replaced. Raises DataError where it holds more.
    """
    folder, new, old = Path("data", name), Path("data", f".{name}.new"), Path("data", f".{name}.old")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there and not {"meta.json"} <= there <= files:
        raise DataError(f"{folder} holds files that prepare.py did not write; choose another --name")
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)  # what a killed run left
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            print(f"{folder} is replaced", file=sys.stderr)
            folder.rename(old)
        new.rename(folder)
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


# -- OpenAI's weights ----------------------------------------------------------------------------------------


def prepare_gpt2(name: str) -> None:
    """OpenAI's TensorFlow checkpoint of a size of GPT-2 -> data/<name>/ckpt.pt and meta.json. Raises DataError."""
    import torch

    cache = Path("data", ".cache", f"gpt2-{GPT2_SIZES[name]}")
    urls = [f"{GPT2_URL}/{GPT2_SIZES[name]}/{file}" for file in GPT2_FILES.split()]
    for url in urls:
        download(url, cache / url.rsplit("/", 1)[1])
    checkpoint = read_gpt2(cache)
    sources = [{"url": url, "sha256": file_sha256(cache / url.rsplit("/", 1)[1])} for url in urls]
    meta = {"dataset": name, "tokenizer": {"type": "gpt2"}, "sources": sources}
    checkpoint["meta"] = meta | {"vocab_size": checkpoint["model_args"]["vocab_size"]}
    with new_folder(name, {"ckpt.pt", "meta.json"}) as folder:
        try:
            torch.save(checkpoint, folder / "ckpt.pt")
        except RuntimeError as error:  # which torch makes of a full disk
            raise OSError(f"cannot write data/{name}/ckpt.pt: {str(error).splitlines()[0]}") from None
        (folder / "meta.json").write_text(json.dumps(checkpoint["meta"], indent=1), encoding="utf-8")
    shutil.rmtree(cache)  # as large again, and of no more use


def read_gpt2(folder: Path) -> dict[str, Any]:
    """model and model_args of a GPT-2 that TensorFlow saved, read tensor by tensor. Raises DataError."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow is loud
    try:
        import tensorflow as tf
    except ImportError:
        raise DataError("OpenAI's files are TensorFlow's; install it: pip install tensorflow") from None
    import torch

    from model import GPT, GPTConfig

    try:
        hparams = json.loads((folder / "hparams.json").read_text())
        args = {"block_size": hparams["n_ctx"], "vocab_size": hparams["n_vocab"]}
        args |= {key: hparams[key] for key in ("n_layer", "n_head", "n_embd")}
        with torch.device("meta"):
            shapes = {key: tuple(t.shape) for key, t in GPT(GPTConfig(**args)).state_dict().items()}
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    except (KeyError, TypeError, ValueError, tf.errors.OpError) as error:
        raise DataError(f"{folder} is no GPT-2, or damaged; delete it and try again: {error!r:.99}") from None
    stored = dict(reader.get_variable_to_shape_map())
    weights: dict[str, torch.Tensor] = {}
    shapes.pop("lm_head.weight")
    for key, shape in shapes.items():
        # transformer.h.0.attn.c_attn.weight is model/h0/attn/c_attn/w, stored (1, in, out) as a convolution
        theirs = re.sub(r"^transformer\.", "model/", key).replace("h.", "h", 1).replace(".", "/")
        if "/wte/" in theirs or "/wpe/" in theirs:
            theirs, expected = theirs.removesuffix("/weight"), shape
        elif len(shape) == 2:
            theirs, expected = theirs.replace("/weight", "/w"), (1, shape[1], shape[0])
        else:
            theirs, expected = theirs.replace("/weight", "/g").replace("/bias", "/b"), shape
        found = stored.pop(theirs, None)
        if found is None or tuple(found) != expected:
            raise DataError(f"{folder}: the tensor {theirs} has the shape {found}, not {expected}")
        try:
            tensor = torch.from_numpy(reader.get_tensor(theirs))
        except (tf.errors.OpError, IndexError) as error:
            message = f"{folder} is damaged at {theirs}; delete it and try again: {error!r:.99}"
            raise DataError(message) from None
        weights[key] = tensor[0].T.contiguous() if expected != shape else tensor
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one tensor, as GPT-2 ties them
    if stored:
        raise DataError(f"{folder}: tensors that GPT-2 does not have: {', '.join(sorted(stored))[:200]}")
    return {"model": weights, "model_args": args}


def weights_path(init_from: str) -> str:
    """The checkpoint that init_from names: GPT-2's weights, or a path as it stands. Raises DataError."""
    if init_from not in GPT2_SIZES:
        return init_from
    path = f"data/{init_from}/ckpt.pt"
    if not Path(path).exists():
        raise DataError(f"{path} is not there; run: python prepare.py {init_from}")
    return path


def main() -> None:
    names = [*CORPORA, *GPT2_SIZES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"NAME: {', '.join(names)}")
    add = parser.add_argument
    add("what", nargs="*", default=["pydocs"], metavar="NAME|PATH", help="a corpus, or your own files")
    add("--tokenizer", choices=list(TOKENIZERS), help="default: the corpus's own; char for yours")
    add("--val_fraction", type=float, default=0.1, help="share of the text that validates (%(default)s)")
    add("--name", help="the folder in data/; default: the corpus's or the first file's name")
    add("--shards", type=int, default=1, help="of fineweb, 100M tokens each (%(default)s)")
    add("--text_key", default="text", help="what a line of .jsonl calls its text (%(default)s)")
    add("--errors", choices=["strict", "replace"], default="strict", help="where text is not UTF-8")
    add("--max_vocab", type=int, default=0, help="of --tokenizer=word: as many, the frequent words")
    args = parser.parse_args()
    try:
        print(prepare(args, names))
    except (DataError, OSError, BrokenExecutor) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; make room and run it again, nothing half-done is left" if full else ""
        sys.exit(f"prepare.py: {error}{hint}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing half-done is left, run it again")


def prepare(args: argparse.Namespace, names: list[str]) -> str:
    """Do what was asked; returns what to say of it. Raises DataError."""
    first, alone = args.what[0], len(args.what) == 1
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    stem = Path(re.sub(r"\.(gz|zst)$", "", first)).resolve().stem
    name = args.name or re.sub(r"[^\w.-]+", "_", stem).lstrip(".")
    if name in names and args.what != [name] and Path(first).exists():
        raise DataError(f"{name} is the name of a corpus; choose another --name for your own text")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"--name={name} is no folder name: letters, digits, '_', '-' and '.' only")
    sizes = {name: name for name in GPT2_SIZES} | {size: name for name, size in GPT2_SIZES.items()}
    if alone and first in sizes:
        name = sizes[first]
        if Path("data", name, "ckpt.pt").exists():
            return f"data/{name}/ckpt.pt is there already"
        prepare_gpt2(name)
        return f"data/{name}/ckpt.pt: --init_from={name} takes it"
    own_kind, url = CORPORA.get(first, ("char", None))
    kind = args.tokenizer or own_kind
    if args.max_vocab and (kind != "word" or not 2 < args.max_vocab <= MAX_VOCAB):
        raise DataError(f"--max_vocab is for --tokenizer=word, from 3 to {MAX_VOCAB}")
    if args.what == ["fineweb"]:
        if args.shards < 1 or kind != "gpt2":
            raise DataError("fineweb comes as GPT-2 token IDs, in one shard or more: see --help")
        meta, said = prepare_fineweb(name, args.shards), ""
    else:
        if alone and url:
            documents, sources = Texts([str(cached(*url))]), [{"url": url[0], "sha256": url[1]}]
        elif args.what == ["pydocs"]:
            documents = [(pydocs(), True)]
            path = f"pydoc_data.topics of Python {'.'.join(map(str, sys.version_info[:3]))}"
            sources = [{"path": path, "sha256": hashlib.sha256(documents[0][0].encode()).hexdigest()}]
        else:
            for path in args.what:
                if path in names and not alone:
                    raise DataError(f"one corpus at a time: python prepare.py {path}")
                if not Path(path).exists():
                    near = difflib.get_close_matches(path, names, n=1)
                    hint = f"; did you mean {near[0]}?" if near else ""
                    known = f"a file nor a folder nor one of {', '.join(names)}"
                    raise DataError(f"{path} is neither {known}{hint}")
            documents = Texts(args.what, args.text_key, args.errors)
            sources = [{"path": str(path), "sha256": file_sha256(path)} for path in documents.files]
        meta = write_dataset(name, documents, sources, kind, args.val_fraction, args.max_vocab)
        said = f"{meta['documents']:,} documents, {meta['characters']:,} characters, "
        said += f"{meta['characters'] / (meta['train_tokens'] + meta['val_tokens']):.2f} a token"
        said += f"; {documents.skipped:,} files are not text\n" if getattr(documents, "skipped", 0) else "\n"
    train, val = meta["train_tokens"], meta["val_tokens"]
    said += f"data/{name}: {train:,} train ({train / (train + val):.1%}) and {val:,} validation tokens "
    return said + f"({val / (train + val):.1%}), {meta['vocab_size']:,} in the vocabulary"


if __name__ == "__main__":
    main()
