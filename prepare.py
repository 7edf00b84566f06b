"""Everything that comes in from outside: text -> token IDs in data/<name>/, tokenizers, downloads.

    python prepare.py                              # pydocs: Python's own reference, nothing is downloaded
    python prepare.py shakespeare_char
    python prepare.py my_book.txt --tokenizer=gpt2 --name=book

A dataset is train.bin and val.bin (little-endian uint16 token IDs, no header) and meta.json.
Downloads go through download() alone, and first to PLAINGPT_MIRROR where that is set.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<|unk|>"
MAX_VOCAB = 65536  # what uint16 can count
TEXT_SUFFIXES = set(
    ".txt .md .rst .tex .py .c .h .cpp .java .js .ts .go .rs .html .css .csv .json .xml".split()
)

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
}


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

    failures = 0
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
                        failures = 0
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
            raise DataError(
                f"cannot download {url} ({reason}); without a network, set PLAINGPT_MIRROR to a folder that "
                f"holds <host>/<path> of it, or take the embedded corpus: python prepare.py pydocs"
            )
        time.sleep(2 ** (failures - 1))


def cached(url: str, sha256: str) -> Path:
    """The path of a downloaded file, fetched the first time."""
    path = Path("data", ".cache", urlsplit(url).netloc + urlsplit(url).path)
    download(url, path, sha256)
    return path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- tokenizers ----------------------------------------------------------------------------------------------


class Tokenizer(Protocol):
    """meta: what meta.json keeps of it. end_of_text: the ID that ends a document, or None."""

    meta: dict[str, Any]
    vocab_size: int
    end_of_text: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


class CharTokenizer:
    """One ID a character, in sorted order; <|endoftext|> comes last where there are documents to end."""

    def __init__(self, chars: list[str]):
        self.meta = {"type": "char", "chars": chars}
        self.chars = chars
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size = len(chars)
        self.end_of_text = self.ids.get(END_OF_TEXT)

    @classmethod
    def from_texts(cls, texts: list[str]) -> "CharTokenizer":
        return cls(sorted(set().union(*texts)) + [END_OF_TEXT] * (len(texts) > 1))

    def encode(self, text: str) -> list[int]:
        pieces = re.split(f"({re.escape(END_OF_TEXT)})", text) if self.end_of_text is not None else [text]
        try:
            return [
                self.ids[char] for piece in pieces for char in ([piece] if piece == END_OF_TEXT else piece)
            ]
        except KeyError as error:
            char = error.args[0]
            raise DataError(f"the character {char!r} (U+{ord(char):04X}) is not in the vocabulary") from None

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)


class WordTokenizer:
    """One ID a word or punctuation mark; white space is not kept and unknown words become <|unk|>."""

    def __init__(self, vocab: list[str]):
        self.meta = {"type": "word", "vocab": vocab}
        self.vocab = vocab
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.vocab_size = len(vocab)
        self.end_of_text = self.ids[END_OF_TEXT]

    @staticmethod
    def words(text: str) -> list[str]:
        return [word.strip() for word in re.split(r"""([,.?_!"()']|--|\s)""", text) if word.strip()]

    @classmethod
    def from_texts(cls, texts: list[str]) -> "WordTokenizer":
        distinct = set().union(*map(cls.words, texts)) - {END_OF_TEXT, UNKNOWN}
        return cls(sorted(distinct) + [END_OF_TEXT, UNKNOWN])

    def encode(self, text: str) -> list[int]:
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(word, unknown) for word in self.words(text)]

    def decode(self, ids: list[int]) -> str:
        return re.sub(r"""\s+([,.?!"()'])""", r"\1", " ".join(self.vocab[i] for i in ids))


class GPT2Tokenizer:
    """GPT-2's byte-level BPE, by tiktoken, from OpenAI's two files."""

    meta = {"type": "gpt2"}
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # ours is the cache
        ranks = data_gym_to_mergeable_bpe_ranks(str(cached(*VOCAB_BPE)), str(cached(*ENCODER_JSON)))
        special = {END_OF_TEXT: self.end_of_text}
        self.bpe = tiktoken.Encoding(
            "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids)


def load_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a meta.json describes. Raises DataError."""
    spec = meta["tokenizer"]
    if spec["type"] == "char":
        return CharTokenizer(spec["chars"])
    if spec["type"] == "word":
        return WordTokenizer(spec["vocab"])
    if spec["type"] == "gpt2":
        return gpt2_tokenizer()
    raise DataError(f"unknown tokenizer type {spec['type']!r}")


@cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    return GPT2Tokenizer()


# -- datasets ------------------------------------------------------------------------------------------------


def read_texts(paths: list[str]) -> tuple[list[str], list[dict[str, str]]]:
    """The texts of files and of folders' text files, and their sources. Raises DataError."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in TEXT_SUFFIXES)
        else:
            files.append(path)
    if not files:
        raise DataError(f"no text file ({' '.join(sorted(TEXT_SUFFIXES))}) in {' '.join(paths)}")
    texts, sources = [], []
    for path in files:
        try:
            texts.append(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        sources.append({"path": str(path), "sha256": file_sha256(path)})
    return texts, sources


def pydocs() -> tuple[list[str], list[dict[str, str]]]:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name].strip() + "\n" for name in sorted(topics))
    version = ".".join(map(str, sys.version_info[:3]))
    return [text], [
        {
            "path": f"pydoc_data.topics of Python {version}",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    ]


def split(texts: list[str], val_fraction: float) -> tuple[list[str], list[str]]:
    """One text is cut, its first part trains. Of many, the first of every 1 / val_fraction validates."""
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - val_fraction))
        return [texts[0][:cut]], [texts[0][cut:]]
    validates = [math.ceil((i + 1) * val_fraction) > math.ceil(i * val_fraction) for i in range(len(texts))]
    train = [text for text, is_val in zip(texts, validates, strict=True) if not is_val]
    return train, [text for text, is_val in zip(texts, validates, strict=True) if is_val]


def write_dataset(
    name: str,
    texts: list[str],
    sources: list[dict[str, str]],
    kind: str,
    val_fraction: float = 0.1,
) -> dict[str, Any]:
    """Tokenize documents into data/<name>/, whole or absent at any time; returns what meta.json holds."""
    if not any(text.strip() for text in texts):
        raise DataError(f"{name}: there is no text in it")
    tokenizer = {
        "char": CharTokenizer.from_texts,
        "word": WordTokenizer.from_texts,
        "gpt2": lambda _: gpt2_tokenizer(),
    }[kind](texts)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise DataError(
            f"{name}: {tokenizer.vocab_size} vocabulary entries are over {MAX_VOCAB}; try --tokenizer=gpt2"
        )
    ending = [tokenizer.end_of_text] if len(texts) > 1 else []
    folder = Path("data", name)
    if folder.exists() and not {p.name for p in folder.iterdir()} <= {"train.bin", "val.bin", "meta.json"}:
        raise DataError(f"{folder} holds files that prepare.py did not write; choose another --name")
    new, old = Path("data", f".{name}.new"), Path("data", f".{name}.old")
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)  # what a killed run left
    new.mkdir(parents=True)
    try:
        counts = {}
        for part, documents in zip(("train", "val"), split(texts, val_fraction), strict=True):
            ids = np.array([i for text in documents for i in tokenizer.encode(text) + ending], dtype="<u2")
            if len(ids) == 0:
                raise DataError(
                    f"{name}: nothing is left for {part}.bin; give more text or another --val_fraction"
                )
            ids.tofile(new / f"{part}.bin")
            counts[f"{part}_tokens"] = len(ids)
        meta = {"dataset": name, "tokenizer": tokenizer.meta, "vocab_size": tokenizer.vocab_size}
        meta |= {"dtype": "uint16", **counts, "sources": sources}
        (new / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():
            print(f"{folder} is replaced", file=sys.stderr)
            folder.rename(old)
        new.rename(folder)
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)
    return meta


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=f"NAME is one of: {', '.join(CORPORA)}"
    )
    parser.add_argument(
        "what", nargs="*", default=["pydocs"], metavar="NAME|PATH", help="a corpus, or your own files"
    )
    parser.add_argument(
        "--tokenizer", choices=["char", "word", "gpt2"], help="default: the corpus's own; char for yours"
    )
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="share of the text that validates (%(default)s)"
    )
    parser.add_argument("--name", help="the folder in data/; default: the corpus's or the first file's name")
    args = parser.parse_args()
    try:
        if not 0 < args.val_fraction < 1:
            raise DataError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
        name = args.name or re.sub(r"[^\w.-]+", "_", Path(args.what[0]).resolve().stem).lstrip(".")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"--name={name} is no folder name: letters, digits, '_', '-' and '.' only")
        kind, url = CORPORA.get(args.what[0], ("char", None))
        if len(args.what) == 1 and url:
            path = cached(*url)
            texts, sources = [path.read_bytes().decode("utf-8")], [{"url": url[0], "sha256": url[1]}]
        elif args.what == ["pydocs"]:
            texts, sources = pydocs()
        else:
            for path in args.what:
                if not Path(path).exists():
                    raise DataError(f"{path} is neither a file nor a folder nor one of {', '.join(CORPORA)}")
            texts, sources = read_texts(args.what)
        meta = write_dataset(name, texts, sources, args.tokenizer or kind, args.val_fraction)
        print(
            f"data/{name}: {meta['train_tokens']:,} train and {meta['val_tokens']:,} validation tokens, "
            f"{meta['vocab_size']:,} in the vocabulary"
        )
    except (DataError, OSError) as error:
        sys.exit(f"prepare.py: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing half-done is left, run it again")


if __name__ == "__main__":
    main()
