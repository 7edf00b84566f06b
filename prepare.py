"""All that comes in from outside: text -> token IDs in data/<name>/, tokenizers, downloads, GPT-2's weights.

    python prepare.py                              # pydocs: Python's own reference, nothing is downloaded
    python prepare.py shakespeare_char
    python prepare.py my_book.txt --tokenizer=gpt2 --name=book
    python prepare.py gpt2                         # OpenAI's weights: data/gpt2/ckpt.pt

A dataset is train.bin and val.bin (little-endian uint16 token IDs, no header) and meta.json.
Downloads go through download() alone, and first to PLAINGPT_MIRROR where that is set.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
GPT2_FILES = "checkpoint encoder.json hparams.json model.ckpt.index model.ckpt.meta vocab.bpe"
GPT2_FILES += " model.ckpt.data-00000-of-00001"
GPT2_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


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
            raise DataError(
                f"cannot download {url} ({reason}); without a network, put it as <host>/<path> into the folder that "
                f"PLAINGPT_MIRROR names, or take the embedded corpus: python prepare.py pydocs"
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
    try:
        spec = meta["tokenizer"]
        if spec["type"] == "char":
            return CharTokenizer(spec["chars"])
        if spec["type"] == "word":
            return WordTokenizer(spec["vocab"])
        if spec["type"] == "gpt2":
            return gpt2_tokenizer()
    except (KeyError, TypeError) as error:
        raise DataError(f"the tokenizer's description is damaged: {error!r}") from None
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
            content = path.read_bytes()
            texts.append(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}"
            ) from None
        sources.append({"path": str(path), "sha256": hashlib.sha256(content).hexdigest()})
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
    """One text is cut, its first part trains. Of many, the last of every 1 / val_fraction validates."""
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - val_fraction))
        return [texts[0][:cut]], [texts[0][cut:]]
    validates = [int((i + 1) * val_fraction) > int(i * val_fraction) for i in range(len(texts))]
    validates[-1] |= not any(validates)
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
        raise DataError(f"there is no text to make data/{name} of")
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
    with new_folder(name, {"train.bin", "val.bin", "meta.json"}) as folder:
        counts = {}
        for part, documents in zip(("train", "val"), split(texts, val_fraction), strict=True):
            ids = np.array([i for text in documents for i in tokenizer.encode(text) + ending], dtype="<u2")
            if len(ids) == 0:
                raise DataError(
                    f"{name}: nothing is left for {part}.bin; give more text or another --val_fraction"
                )
            ids.tofile(folder / f"{part}.bin")
            counts[f"{part}_tokens"] = len(ids)
        meta = {"dataset": name, "tokenizer": tokenizer.meta, "vocab_size": tokenizer.vocab_size}
        meta |= {"dtype": "uint16", **counts, "sources": sources}
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

    size = GPT2_SIZES[name]
    cache = Path("data", ".cache", f"gpt2-{size}")
    urls = [f"{GPT2_URL}/{size}/{file}" for file in GPT2_FILES.split()]
    for url in urls:
        download(url, cache / url.rsplit("/", 1)[1])
    checkpoint = read_gpt2(cache)
    sources = [{"url": url, "sha256": file_sha256(cache / url.rsplit("/", 1)[1])} for url in urls]
    meta = {
        "dataset": name,
        "tokenizer": {"type": "gpt2"},
        "vocab_size": checkpoint["model_args"]["vocab_size"],
    }
    checkpoint["meta"] = meta | {"sources": sources}
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
        raise DataError(
            f"{folder} is no GPT-2, or damaged; delete it and try again: {error!r:.200}"
        ) from None
    stored = dict(reader.get_variable_to_shape_map())
    weights: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        if key == "lm_head.weight":
            weights[key] = weights["transformer.wte.weight"]  # one tensor, as GPT-2 ties them
            continue
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
            raise DataError(
                f"{folder}: the tensor {theirs} should have the shape {expected}, and has {found}"
            )
        try:
            tensor = torch.from_numpy(reader.get_tensor(theirs))
        except (tf.errors.OpError, IndexError) as error:
            raise DataError(
                f"{folder} is damaged at {theirs}; delete it and try again: {error!r:.200}"
            ) from None
        weights[key] = tensor[0].T.contiguous() if expected != shape else tensor
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
        if name in names and args.what != [name] and Path(args.what[0]).exists():
            raise DataError(f"{name} is the name of a corpus; choose another --name for your own text")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise DataError(f"--name={name} is no folder name: letters, digits, '_', '-' and '.' only")
        sizes = {name: name for name in GPT2_SIZES} | {size: name for name, size in GPT2_SIZES.items()}
        if len(args.what) == 1 and args.what[0] in sizes:
            name = sizes[args.what[0]]
            if Path("data", name, "ckpt.pt").exists():
                print(f"data/{name}/ckpt.pt is there already")
            else:
                prepare_gpt2(name)
                print(f"data/{name}/ckpt.pt: --init_from={name} takes it")
            return
        kind, url = CORPORA.get(args.what[0], ("char", None))
        if len(args.what) == 1 and url:
            path = cached(*url)
            texts, sources = [path.read_bytes().decode("utf-8")], [{"url": url[0], "sha256": url[1]}]
        elif args.what == ["pydocs"]:
            texts, sources = pydocs()
        else:
            for path in args.what:
                if path in names and len(args.what) > 1:
                    raise DataError(f"one corpus at a time: python prepare.py {path}")
                if not Path(path).exists():
                    near = "".join(
                        f"; did you mean {n}?" for n in difflib.get_close_matches(path, names, n=1)
                    )
                    raise DataError(
                        f"{path} is neither a file nor a folder nor one of {', '.join(names)}{near}"
                    )
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
