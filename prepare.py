"""All that comes in from outside: text -> token IDs in data/<name>/, tokenizers, downloads, GPT-2's weights.

    python prepare.py                              # pydocs: Python's own reference, nothing is downloaded
    python prepare.py shakespeare_char
    python prepare.py books/ more.jsonl.gz --tokenizer=gpt2 --name=books
    python prepare.py fineweb --shards=10          # a billion tokens of web text
    python prepare.py gpt2                         # OpenAI's weights: data/gpt2/ckpt.pt

A dataset is train.bin and val.bin (little-endian uint16 token IDs, no header) and meta.json. Text is read
twice, to count and then to tokenize, a piece at a time: memory does not grow with it.
"""

import argparse
import difflib
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from configurator import UserError

# tqdm, requests, tiktoken, torch and tensorflow are imported where they are used: train.py and sample.py
# import this file for its tokenizers, and --help must answer at once.


# -- names and addresses -------------------------------------------------------------------------------------

# (URL, SHA-256 of what is there): a file that has changed since is refused. A text or vocabulary of its own
# goes here.
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

# What can be prepared by name: (tokenizer, unless --tokenizer says otherwise; its text, if it is one file).
# A text for download is one more line here; what is made in another way has a branch in prepare() as well.
CORPORA = {
    "pydocs": ("char", None),  # from Python itself
    "shakespeare_char": ("char", TINY_SHAKESPEARE),
    "shakespeare": ("gpt2", TINY_SHAKESPEARE),
    "verdict": ("gpt2", THE_VERDICT),
    "fineweb": ("gpt2", None),  # token IDs, in shards
}

# 103 shards of 100M token IDs to train, numbered from 1, and number 0 to validate. A shard is a header of 256
# int32 (a magic number, the version, how many IDs follow, zeros) and the IDs as uint16.
FINEWEB_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06}.bin"
FINEWEB_HEADER = 1024  # bytes
FINEWEB_MAGIC = 20240520

# What OpenAI released: the same seven files for each size, in a folder named after its parameters
# (https://github.com/openai/gpt-2, download_model.py). Not all of them are read.
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
GPT2_FILES = (
    "checkpoint encoder.json hparams.json vocab.bpe "
    "model.ckpt.data-00000-of-00001 model.ckpt.index model.ckpt.meta"
)
# Our names, which are Hugging Face's, and OpenAI's.
GPT2_SIZES = {
    "gpt2": "124M",
    "gpt2-medium": "355M",
    "gpt2-large": "774M",
    "gpt2-xl": "1558M",
}

# GPTConfig's names, and those of OpenAI's hparams.json.
GPT2_HPARAMS = {
    "block_size": "n_ctx",
    "vocab_size": "n_vocab",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}

# What the command line takes besides paths.
NAMES = [*CORPORA, *GPT2_SIZES]

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
MAX_VOCAB = 65536  # what uint16 can count

# Characters that are read, and tokenized, at a time: enough work for a thread, and little memory.
PIECE = 1 << 20
# Threads that tokenize. More than eight would wait for the one that reads.
THREADS = min(8, os.cpu_count() or 1)

# What is taken for text in a folder. A file that is named on the command line may be called anything.
SUFFIXES = ".txt .md .rst .tex .py .c .h .cpp .java .js .ts .go .rs .html .css .csv .xml .json .jsonl".split()


# -- downloads -----------------------------------------------------------------------------------------------
#
# Nothing else in this project asks the network. download() decides where a file comes from and whether it is
# the right one, fetch() does not give up, fetch_once() is one request.


def download(url: str, path: str | Path, sha256: str | None = None) -> None:
    """Fetch url to path unless it is there; path is whole or absent, whatever happens.

    The mirror PLAINGPT_MIRROR (a folder or an http(s) base that holds <host>/<path> of each URL) comes first.
    A broken transfer is resumed, now or by the next call, from path.part. Raises UserError.
    """
    path = Path(path)
    if path.is_file() and sha256 in (None, file_sha256(path)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # It gets its name when it is complete: until then nobody takes it for the file.
    part = path.with_name(path.name + ".part")
    # Twice, because what an earlier run left in path.part may be the beginning of another file.
    for _ in range(2):
        fetch_from_mirror(url, part)
        found = file_sha256(part)
        if sha256 in (None, found):
            os.replace(part, path)
            return
        part.unlink()
    raise UserError(f"{url} has changed or was damaged on the way: sha256 {found}, expected {sha256}")


def fetch_from_mirror(url, part):
    """Fill part from the mirror, or from url where there is no mirror or it fails. Raises UserError."""
    # A folder or a server of your own, for machines without a network, and for the tests.
    mirror = os.environ.get("PLAINGPT_MIRROR", "").rstrip("/")
    mirrored = f"{mirror}/{host_and_path(url)}"
    if "://" in mirror:
        try:
            return fetch(mirrored, part)
        except UserError as error:
            print(f"mirror: {error}", file=sys.stderr)
    elif mirror and os.path.isfile(mirrored):
        return shutil.copyfile(mirrored, part)
    return fetch(url, part)


def fetch(url, part):
    """Append to part what it lacks of url, and try again where the connection breaks. Raises UserError."""
    import requests

    failures = 0
    longest = 0  # bytes that part has held
    while True:
        try:
            return fetch_once(url, part)
        except requests.RequestException as error:
            reason = f"{error!r:.99}"
        # A transfer that gets further is worth another try, however often it breaks.
        if file_size(part) > longest:
            longest = file_size(part)
            failures = 0
        failures += 1
        if failures == 4:
            raise UserError(
                f"cannot download {url} ({reason}); put it as <host>/<path> into the folder that "
                "PLAINGPT_MIRROR names, or take the embedded corpus: python prepare.py pydocs"
            )
        time.sleep(2**failures / 2)  # 1, 2 and 4 seconds


def fetch_once(url, part):
    """Append to part what it lacks of url, by one request.

    Raises requests.RequestException, or UserError where asking again would not help.
    """
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"}  # compressed on the way, a range would count other bytes
    if part.exists():
        headers["Range"] = f"bytes={file_size(part)}-"
    # Seconds to connect, and to wait for the next bytes: a large file may take hours altogether.
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
        status = response.status_code
        # 206: what follows part. 200: the whole file, whatever we asked for. 416: nothing follows part, which
        # may be another file, so the next try begins anew.
        if status in (200, 416):
            part.unlink(missing_ok=True)
        elif 400 <= status < 500:
            # The same question would have the same answer.
            raise UserError(f"{url}: the server answers {status} {response.reason}")
        response.raise_for_status()
        have = file_size(part)
        # A server that streams does not say how much is to come: then only the checksum can tell.
        size = have + int(response.headers.get("Content-Length", 0))
        bar = tqdm(desc=part.stem, initial=have, total=size, unit="B", unit_scale=True)
        with bar, open(part, "ab") as file:
            for chunk in response.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    if file_size(part) < size:
        raise requests.ConnectionError(f"ended after {file_size(part)} of {size} bytes")


def cached(url: str, sha256: str | None = None) -> Path:
    """The path of a downloaded file, fetched the first time. Raises UserError."""
    path = Path("data", ".cache", host_and_path(url))
    download(url, path, sha256)
    return path


def host_and_path(url):
    address = urlsplit(url)
    return address.netloc + address.path


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_size(path):
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


# -- tokenizers ----------------------------------------------------------------------------------------------


class Tokenizer:
    """What a tokenizer has. A subclass that stands in TOKENIZERS is a choice of --tokenizer.

    encode(text) -> list of token IDs, decode(IDs) -> text
    vocab_size: all IDs are below it
    end_of_text: the ID that ends a document, or None
    meta: what meta.json keeps of it: "type", its name in TOKENIZERS, and the arguments of its __init__
    """

    # Where the vocabulary comes from the text that is prepared: entries(text) are the strings that a text
    # needs in it, and from_entries(set of all entries, several) makes the tokenizer; several: there is more
    # than one document. None where the vocabulary is fixed.
    entries = None

    def encode_array(self, text: str) -> np.ndarray:
        """The token IDs as uint16, (number of IDs,). Several threads call it at the same time."""
        return np.array(self.encode(text), dtype="<u2")


class CharTokenizer(Tokenizer):
    """One ID a character, in sorted order; <|endoftext|> comes last where there are documents to end."""

    entries = set  # the characters of a text

    # Stands for <|endoftext|> while a text is encoded: half a surrogate pair, which no UTF-8 can hold.
    END = "\udfff"

    def __init__(self, chars: list[str]):
        self.meta = {"type": "char", "chars": chars}
        self.chars = chars
        self.vocab_size = len(chars)
        self.end_of_text = None
        # (number of code points,): the ID of each, or -1. With it, NumPy looks up a whole text in one call.
        self.table = np.full(sys.maxunicode + 1, -1, dtype=np.int32)
        for i, char in enumerate(chars):
            if char == END_OF_TEXT:
                self.end_of_text = i
                char = self.END
            self.table[ord(char)] = i

    @classmethod
    def from_entries(cls, entries, several):
        return cls(sorted(entries) + [END_OF_TEXT] * several)

    def encode_array(self, text: str) -> np.ndarray:
        """The token IDs as uint16. Raises UserError, which names the first character that has none."""
        if self.end_of_text is not None:
            text = text.replace(END_OF_TEXT, self.END)
        # UTF-32 is the code points themselves, 4 bytes each.
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")  # (characters,)
        ids = self.table[codes]  # (characters,)
        unknown = np.flatnonzero(ids < 0)
        if len(unknown) > 0:
            char = text[unknown[0]]
            raise UserError(f"the character {char!r} (U+{ord(char):04X}) is not in the vocabulary")
        return ids.astype("<u2")

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)


class WordTokenizer(Tokenizer):
    """One ID a word or punctuation mark; white space is not kept and unknown words become <|unk|>.

    The rule is that of Raschka, "Build a Large Language Model (From Scratch)", chapter 2.
    """

    # words(text): each "--", each punctuation mark, and each longest run of what is neither these nor white
    # space; a single "-" belongs to its run. The book splits at r'([,.?_!"()\']|--|\s)' and throws
    # away what is empty or white space. findall is quicker, and the tests compare the two.
    words = re.compile(r"""--|[,.?_!"()']|(?:[^\s,.?_!"()'-]+|-(?!-))+""").findall
    entries = words

    def __init__(self, vocab: list[str]):
        self.meta = {"type": "word", "vocab": vocab}
        self.vocab = vocab
        self.vocab_size = len(vocab)
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.end_of_text = self.ids[END_OF_TEXT]

    @classmethod
    def from_entries(cls, entries, several=True):
        return cls(sorted(entries - {END_OF_TEXT, UNKNOWN}) + [END_OF_TEXT, UNKNOWN])

    def encode(self, text: str) -> list[int]:
        # Of the text that was prepared, every word is known; of a prompt, perhaps not.
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(word, unknown) for word in self.words(text)]

    def decode(self, ids: list[int]) -> str:
        text = " ".join(self.vocab[i] for i in ids)
        return re.sub(r"""\s+([,.?!"()'])""", r"\1", text)  # no space before a punctuation mark


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), by tiktoken, from OpenAI's two files."""

    # 256 bytes, 50,000 merges, and <|endoftext|>.
    meta = {"type": "gpt2"}
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        from tiktoken import Encoding
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # the two files are in our own cache
        ranks = data_gym_to_mergeable_bpe_ranks(str(cached(*VOCAB_BPE)), str(cached(*ENCODER_JSON)))
        self.bpe = Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode(text, allowed_special="all")

    def encode_array(self, text: str) -> np.ndarray:
        # Without Python's lists, which need the interpreter's lock, so that threads work side by side.
        return self.bpe.encode_to_numpy(text, allowed_special="all").astype("<u2")

    def decode(self, ids: list[int]) -> str:
        return self.bpe.decode(ids)


# The choices of --tokenizer, which meta.json calls "type".
TOKENIZERS = {"char": CharTokenizer, "word": WordTokenizer, "gpt2": GPT2Tokenizer}


def load_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a meta.json describes. Raises UserError."""
    try:
        arguments = dict(meta["tokenizer"])  # a copy: meta is the caller's
        tokenizer_class = TOKENIZERS[arguments.pop("type")]
        return tokenizer_class(**arguments)
    except UserError:  # its files could not be downloaded
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the tokenizer's description is damaged or unknown: {error!r:.99}") from None


# -- documents -----------------------------------------------------------------------------------------------
#
#   documents   an iterable of documents, which is read twice
#   document    an iterable of pieces: a file, or a line of a .jsonl
#   piece       a str that ends where a word or its document does; of a file, about PIECE characters
#
# A document is taken to its end before the next one is asked for. Its token IDs are those of its pieces, one
# after the other, so that a file need not fit into memory.

# The longest beginning of a text that is followed by a space or newline and does not end with white space.
# A word ends there, and so does a pre-token of GPT-2: no branch of its pattern goes on from anything else to
# white space. And <|endoftext|> has no such place in it. So every tokenizer gives both parts the IDs of the
# whole.
TO_LAST_WORD_END = re.compile(r"(?s:.*)\S(?=[ \n])")


def whole_words(file, size=PIECE):
    """The text of a file, read size characters at a time, in pieces that end where a word does.

    Where there is no space for long, a piece grows until there is one, and the memory that it takes with it.
    """
    # One str that grows, not a list: CPython extends it in place.
    rest = ""  # what has been read and does not belong to a piece yet
    searched = 0  # no word ends before this place of it, so that no character is looked at again and again
    while block := file.read(size):
        rest += block
        if len(rest) < size:  # a short document is one piece
            continue
        found = TO_LAST_WORD_END.match(rest, searched)
        if found:
            yield rest[: found.end()]
            rest = rest[found.end() :]
        searched = len(rest) - 1  # the next block may begin with a space
    yield rest


def unpacked(path):
    """a.txt of a.txt, a.txt.gz and a.txt.zst."""
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


@contextmanager
def open_text(path, errors):
    """A text file, unpacked, to be read as str inside the with block. Raises UserError, there too."""
    open_file = open
    damages = ()  # what reading raises where the file is damaged
    if path.suffix == ".gz":
        open_file = gzip.open
        damages = (EOFError, gzip.BadGzipFile, zlib.error)
    elif path.suffix == ".zst":
        zstd = import_zstd(path)
        open_file = zstd.open
        damages = (EOFError, zstd.ZstdError)
    # Truncated and damaged archives raise while they are read, so the try goes round all that reads it.
    with open_file(path, "rb") as file:
        try:
            # -sig drops a byte order mark. newline: a line ends at "\n" alone, and "\r" stays as it is.
            yield io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="\n")
        except damages as error:
            raise UserError(f"{path} is damaged: {error}") from None
        except UnicodeDecodeError as error:
            # error.object is the bytes that were being decoded: the last that have been read.
            at = file.tell() - len(error.object) + error.start
            byte = error.object[error.start]
            message = f"{path} is not UTF-8: byte {at} is {byte:#x}; --errors=replace goes on"
            raise UserError(message) from None


def import_zstd(path):
    # Python has it from 3.14 on; backports.zstd is the same for those before.
    try:
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise UserError(f"{path}: {error}; pip install backports.zstd, or unpack the file") from None
    return zstd


@dataclass
class TextFiles:
    """The documents of files, as often as they are asked for. Raises UserError."""

    files: list[Path]
    errors: str = "strict"
    text_key: str = "text"

    def __iter__(self):
        # Another format is another branch here, and another suffix in SUFFIXES.
        for path in self.files:
            if unpacked(path).suffix.lower() == ".jsonl":
                yield from self.read_jsonl(path)
            else:
                yield self.read_text(path)

    def read_text(self, path):
        """The whole file as one document."""
        with open_text(path, self.errors) as file:
            yield from whole_words(file)

    def read_jsonl(self, path):
        """A document of each line, an object that has it under text_key; blank lines are passed over."""
        with open_text(path, self.errors) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                # Whatever is wrong with a line, its number helps most.
                try:
                    text = json.loads(line)[self.text_key]
                    # JSON can spell half a surrogate pair, which is no text: refused, or replaced.
                    yield [text.encode("utf-8", self.errors).decode()]
                except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                    message = f"{path}, line {number}: no JSON object with a text under {self.text_key!r}"
                    raise UserError(f"{message}, or name its --text_key ({error!r:.99})") from None


def find_text_files(paths):
    """The files, and the text files of the folders, in sorted order; how many others the folders hold.

    Raises UserError where a path does not exist, or where there is no text file.
    """
    text_files = []
    skipped = 0
    for path in paths:
        if os.path.isdir(path):
            # Sorted, so that the same folder gives the same dataset on every system.
            files = [file for file in sorted(Path(path).rglob("*")) if file.is_file()]
            found = [file for file in files if is_text(file)]
            text_files += found
            skipped += len(files) - len(found)
        elif os.path.exists(path):
            text_files.append(Path(path))  # asked for by name, so it is text
        else:
            near = difflib.get_close_matches(path, NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{path} is neither a file nor a folder nor one of {', '.join(NAMES)}{hint}")
    if not text_files:
        raise UserError(f"no text file ({' '.join(SUFFIXES)}) in {' '.join(paths)}")
    return text_files, skipped


def is_text(path):
    """Whether a file of a folder is named as text is, and does not begin as binary data or UTF-16 does."""
    if unpacked(path).suffix.lower() not in SUFFIXES:
        return False
    with open_text(path, errors="replace") as file:
        return "\0" not in file.read(4096)  # UTF-16 has one for each letter of English


def pydocs() -> str:
    """The reference of the Python language, which every CPython has for help(): half a million characters."""
    from pydoc_data.topics import topics

    # Sorted, so that the text does not depend on the order in which Python lists its topics.
    return "\n".join(topics[name].strip() + "\n" for name in sorted(topics))


# -- token IDs -----------------------------------------------------------------------------------------------
#
#   documents -> split_documents -> ("train" or "val", text) -> batches -> lists of them
#             -> encode_batches, in threads -> ("train" or "val", token IDs) -> write_bins


# First reading: a character tokenizer needs all characters, a split needs to know where nine tenths are.


def count_text(name, documents, tokenizer_class):
    """How many documents and characters there are, and what a vocabulary needs. Raises UserError."""
    from tqdm import tqdm

    count = 0
    characters = 0
    blank = True  # white space alone is no text
    entries = set()
    for document in tqdm(documents, desc="counting", unit=" documents", leave=False, disable=None):
        count += 1
        for piece in document:
            characters += len(piece)
            blank = blank and not piece.strip()
            if tokenizer_class.entries:
                entries.update(tokenizer_class.entries(piece))
                check_vocab_size(name, len(entries))  # the rest of the text would not help
    if blank:
        raise UserError(f"there is no text to make data/{name} of")
    return count, characters, entries


def check_vocab_size(name, vocab_size):
    if vocab_size > MAX_VOCAB:
        raise UserError(f"{name}: the vocabulary entries are over {MAX_VOCAB}; try --tokenizer=gpt2")


def validates(i: int, count: int, val_fraction: float) -> bool:
    """Whether document i of count validates: the last of every 1 / val_fraction does, and one at least."""
    if int(count * val_fraction) == 0:
        return i == count - 1
    return int((i + 1) * val_fraction) > int(i * val_fraction)


# Second reading: from here on, a text knows its side.


def split_documents(documents, count, characters, val_fraction):
    """("train" or "val", text), in order, of count documents that have so many characters altogether.

    One document is cut: its first characters train. Of many, each goes whole to one side, and <|endoftext|>
    follows it.
    """
    to_train = int(characters * (1 - val_fraction))  # of one document: characters that still go to train.bin
    for i, document in enumerate(documents):
        if count == 1:
            for piece in document:
                yield "train", piece[:to_train]
                yield "val", piece[to_train:]
                to_train = max(0, to_train - len(piece))
            return
        split = "val" if validates(i, count, val_fraction) else "train"
        for piece in document:
            yield split, piece
        yield split, END_OF_TEXT


def batches(texts):
    """The same in lists of about PIECE characters: enough work for a thread, however short a text is."""
    batch = []
    size = 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= PIECE:
            yield batch
            batch = []
            size = 0
    yield batch


def encode_batches(batches, tokenizer):
    """("train" or "val", token IDs) of each text, in order. Raises UserError.

    Threads encode while this one reads and writes. They are only a few batches ahead, to bound the memory.
    """

    def encode_batch(batch):
        return [(split, tokenizer.encode_array(text)) for split, text in batch]

    # Threads suffice, without processes: tiktoken and NumPy work outside of Python's lock.
    under_way = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in batches:
            under_way.append(pool.submit(encode_batch, batch))
            if len(under_way) > 2 * THREADS:
                yield from under_way.popleft().result()
        for encoded in under_way:
            yield from encoded.result()


# -- datasets ------------------------------------------------------------------------------------------------

# All that we write into data/<name>/. A folder that holds anything else is somebody's, and is not replaced.
DATASET_FILES = {"train.bin", "val.bin", "meta.json", "ckpt.pt"}


@contextmanager
def new_folder(name):
    """A folder to fill, which becomes data/<name>/ when all is done; until then that is the old one, or none.

    Raises UserError where data/<name>/ holds anything that is not ours.
    """
    data = Path("data")
    folder = data / name
    new = data / f".{name}.new"
    old = data / f".{name}.old"
    if folder.exists():
        found = {path.name for path in folder.iterdir()}
        # What we write has a meta.json: a train.bin alone is another program's. An empty folder is nobody's.
        if found and not {"meta.json"} <= found <= DATASET_FILES:
            raise UserError(f"{folder} holds files that prepare.py did not write; choose another --name")
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)  # what a killed run left
    new.mkdir(parents=True)
    try:
        yield new
        # A folder cannot be renamed to one that holds files, so the old one makes room first.
        if folder.exists():
            print(f"{folder} is replaced", file=sys.stderr)
            folder.rename(old)
        new.rename(folder)
    finally:
        for path in (new, old):
            shutil.rmtree(path, ignore_errors=True)


def write_bins(name, ids, tokenizer, sources):
    """Write data/<name>/; returns what meta.json holds. Raises UserError.

    ids: ("train" or "val", array of uint16 token IDs), in order
    tokenizer: has meta and vocab_size
    sources: {"url" or "path": where the text is from, "sha256": ...} each
    """
    meta = {
        "dataset": name,
        "tokenizer": tokenizer.meta,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
    }
    with new_folder(name) as folder:
        with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
            files = {"train": train, "val": val}
            for split, part in ids:
                files[split].write(part)
        # train.py draws windows of both, so neither may be empty.
        for split in files:
            tokens = file_size(folder / f"{split}.bin") // 2
            if tokens == 0:
                hint = "give more text or another --val_fraction"
                raise UserError(f"{name}: nothing is left for {split}.bin; {hint}")
            meta[f"{split}_tokens"] = tokens
        # The list of sources may be long, so it is the last to read.
        meta["sources"] = sources
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return meta


def write_dataset(
    name: str,
    documents: Iterable[Iterable[str]],
    sources: list[dict[str, str]],
    kind: str,
    val_fraction: float = 0.1,
) -> dict[str, Any]:
    """Tokenize documents, read twice, into data/<name>/, whole or absent at any time. Raises UserError.

    kind: a name in TOKENIZERS
    sources: as in write_bins
    Returns what meta.json holds, and how many documents and characters there were.
    """
    from tqdm import tqdm

    tokenizer_class = TOKENIZERS[kind]
    if tokenizer_class.entries is None:
        tokenizer = tokenizer_class()  # before the text is read, for it may fail to download its files
    count, characters, entries = count_text(name, documents, tokenizer_class)
    if tokenizer_class.entries:
        tokenizer = tokenizer_class.from_entries(entries, count > 1)
    check_vocab_size(name, tokenizer.vocab_size)
    # All of these are generators: nothing is read before write_bins asks for it.
    texts = split_documents(documents, count, characters, val_fraction)
    progress = tqdm(
        batches(texts),
        desc="tokenizing",
        total=characters // PIECE + 1,
        unit="M chars",
        leave=False,
        disable=None,  # only on a terminal
    )
    meta = write_bins(name, encode_batches(progress, tokenizer), tokenizer, sources)
    return meta | {"documents": count, "characters": characters}


def prepare_fineweb(name, shards):
    """FineWeb's first shards of 100M GPT-2 IDs, and one to validate, into data/<name>/. Raises UserError.

    Returns what meta.json holds.
    """
    urls = {FINEWEB_URL.format("train", i + 1): "train" for i in range(shards)}
    urls[FINEWEB_URL.format("val", 0)] = "val"
    sources = []
    ids = []
    for url, split in urls.items():
        path = cached(url)
        tokens = (file_size(path) - FINEWEB_HEADER) / 2
        if tokens <= 0 or np.fromfile(path, "<i4", 3).tolist() != [FINEWEB_MAGIC, 1, tokens]:
            path.unlink()  # the next run downloads it again
            raise UserError(f"{url} came as something else than a shard of token IDs; run it again")
        sources.append({"url": url, "sha256": file_sha256(path)})
        # On the disk until it is written: a hundred shards would not fit into memory.
        ids.append((split, np.memmap(path, "<u2", "r", FINEWEB_HEADER)))
    return write_bins(name, ids, GPT2Tokenizer, sources)


# -- OpenAI's weights ----------------------------------------------------------------------------------------


def prepare_gpt2(name):
    """OpenAI's checkpoint of a size of GPT-2 -> data/<name>/ckpt.pt and meta.json; returns what to say of it.

    Raises UserError, and OSError where the disk is full.
    """
    path = Path("data", name, "ckpt.pt")
    if path.exists():
        return f"{path} is there already"
    import torch

    # TensorFlow wants all files of a checkpoint in one folder.
    cache = Path("data", ".cache", f"gpt2-{GPT2_SIZES[name]}")
    sources = []
    for file in GPT2_FILES.split():
        url = f"{GPT2_URL}/{GPT2_SIZES[name]}/{file}"
        download(url, cache / file)
        sources.append({"url": url, "sha256": file_sha256(cache / file)})
    checkpoint = read_gpt2(cache)
    meta = {
        "dataset": name,
        "tokenizer": GPT2Tokenizer.meta,
        "vocab_size": checkpoint["model_args"]["vocab_size"],
        "sources": sources,
    }
    with new_folder(name) as folder:
        try:
            torch.save(checkpoint | {"meta": meta}, folder / "ckpt.pt")
        except RuntimeError as error:  # torch's only error for a full disk
            raise OSError(f"cannot write {path}; is the disk full? {error!r:.99}") from None
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    shutil.rmtree(cache)  # as large again, and no longer needed
    return f"{path}: --init_from={name} takes it"


def read_gpt2(folder: Path) -> dict[str, Any]:
    """model and model_args of a GPT-2 that TensorFlow saved, read tensor by tensor. Raises UserError."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow prints a lot
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError("OpenAI's files are TensorFlow's; install it: pip install tensorflow") from None
    import torch

    from model import GPT, GPTConfig

    try:
        hparams = json.loads((folder / "hparams.json").read_text())
        model_args = {ours: hparams[theirs] for ours, theirs in GPT2_HPARAMS.items()}
        with torch.device("meta"):  # names and shapes, no memory
            state = GPT(GPTConfig(**model_args)).state_dict()
        del state["lm_head.weight"]  # GPT-2 ties it to the token embedding
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
        # One at a time, so that the largest size needs its memory once.
        weights = {key: read_tensor(reader, key, list(ours.shape)) for key, ours in state.items()}
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, tf.errors.OpError) as error:
        raise UserError(f"{folder} is no GPT-2, or damaged; delete it and try again: {error!r:.99}") from None
    # What we did not ask for would be missing from our model.
    others = reader.get_variable_to_shape_map().keys() - map(openai_name, state)
    if others:
        raise UserError(f"{folder}: tensors that GPT-2 does not have: {', '.join(sorted(others))[:200]}")
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"model": weights, "model_args": model_args}


def read_tensor(reader, key, shape):
    """The tensor that OpenAI's checkpoint has for a weight of ours, in our shape. Raises UserError."""
    import torch

    name = openai_name(key)
    is_matrix = name.endswith("/w")
    if is_matrix:
        shape = [1, *reversed(shape)]  # theirs are the kernels of convolutions of width 1: (1, in, out)
    found = reader.get_variable_to_shape_map().get(name)
    if found != shape:
        raise UserError(f"the tensor {name} has the shape {found}, not {tuple(shape)}")
    tensor = torch.from_numpy(reader.get_tensor(name))
    return tensor[0].T.contiguous() if is_matrix else tensor  # (1, in, out) -> (out, in)


def openai_name(key):
    """OpenAI's name of a weight: transformer.h.0.attn.c_attn.weight is model/h0/attn/c_attn/w."""
    name = key.replace("transformer.", "model/").replace("h.", "h", 1).replace(".", "/")
    name = re.sub("(wte|wpe)/weight", r"\1", name)  # the embeddings: model/wte
    name = re.sub(r"(ln_\w)/weight", r"\1/g", name)  # a LayerNorm's gain: model/ln_f/g
    return name.replace("/weight", "/w").replace("/bias", "/b")


def weights_path(init_from: str) -> str:
    """The checkpoint that init_from names: GPT-2's weights, or a path as it is. Raises UserError."""
    if init_from not in GPT2_SIZES:
        return init_from
    path = f"data/{init_from}/ckpt.pt"
    if not Path(path).exists():
        raise UserError(f"{path} is not there; run: python prepare.py {init_from}")
    return path


# -- command line --------------------------------------------------------------------------------------------


def dataset_name(args):
    """The folder in data/: --name, or that of the corpus or the first file. Raises UserError."""
    first = Path(args.what[0])
    stem = unpacked(first).resolve().stem
    # What a shell or a URL would trip over becomes "_".
    name = args.name or re.sub(r"[^\w.-]+", "_", stem).lstrip(".")
    # train.py --dataset=verdict is to mean the corpus, not somebody's verdict.txt.
    if name in NAMES and args.what != [name] and first.exists():
        raise UserError(f"{name} is the name of a corpus; choose another --name for your own text")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name={name} is no folder name: letters, digits, '_', '-' and '.' only")
    return name


def prepare(args):
    """Do what the command line asks for; returns what to say of it. Raises UserError."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    for path in args.what:
        if path in NAMES and len(args.what) > 1:
            raise UserError(f"one corpus at a time: python prepare.py {path}")
    name = dataset_name(args)
    # Weights, not text.
    for gpt2, size in GPT2_SIZES.items():
        if args.what in ([gpt2], [size]):
            return prepare_gpt2(gpt2)

    # Token IDs, not text: there is nothing to tokenize.
    kind, file = CORPORA.get(args.what[0], ("char", None))
    kind = args.tokenizer or kind
    if args.what == ["fineweb"]:
        if args.shards < 1 or kind != "gpt2":
            raise UserError("fineweb comes as GPT-2 token IDs, in one shard or more: see --help")
        return describe_split(prepare_fineweb(name, args.shards))

    # Text: what its documents are, and where they are from.
    skipped = 0
    if args.what == ["pydocs"]:
        text = pydocs()
        documents = [[text]]
        path = f"pydoc_data.topics of Python {sys.version.split()[0]}"
        sources = [{"path": path, "sha256": hashlib.sha256(text.encode()).hexdigest()}]
    elif file:
        url, sha256 = file
        documents = TextFiles([cached(url, sha256)])
        sources = [{"url": url, "sha256": sha256}]
    else:
        files, skipped = find_text_files(args.what)
        documents = TextFiles(files, args.errors, args.text_key)
        sources = [{"path": str(path), "sha256": file_sha256(path)} for path in files]
    meta = write_dataset(name, documents, sources, kind, args.val_fraction)

    characters = meta["characters"]
    each = characters / (meta["train_tokens"] + meta["val_tokens"])
    text = f"{meta['documents']:,} documents, {characters:,} characters, {each:.2f} a token"
    if skipped:
        text += f"; {skipped:,} files are not text"
    return f"{text}\n{describe_split(meta)}"


def describe_split(meta):
    """How many tokens train and validate, of what meta.json holds."""
    train = meta["train_tokens"]
    val = meta["val_tokens"]
    share = train / (train + val)
    return (
        f"data/{meta['dataset']}: {train:,} train ({share:.1%}) and {val:,} validation tokens "
        f"({1 - share:.1%}), {meta['vocab_size']:,} in the vocabulary"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=f"NAME: {', '.join(NAMES)}")
    add = parser.add_argument
    add("what", nargs="*", default=["pydocs"], metavar="NAME|PATH", help="a corpus, or your own files")
    add("--tokenizer", choices=list(TOKENIZERS), help="default: the corpus's own; char for yours")
    add("--val_fraction", type=float, default=0.1, help="share of the text that validates (%(default)s)")
    add("--name", help="the folder in data/; default: the corpus's or the first file's name")
    add("--shards", type=int, default=1, help="of fineweb, 100M tokens each (%(default)s)")
    add("--text_key", default="text", help="what a line of .jsonl calls its text (%(default)s)")
    add("--errors", choices=["strict", "replace"], default="strict", help="where text is not UTF-8")
    # Every mistake travels to here, and ends in one line and an exit status of 1.
    try:
        print(prepare(parser.parse_args()))
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
    except OSError as error:
        # Quota and file size limits are full disks to whoever meets them.
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "; make room and run it again, nothing half-done is left"
        sys.exit(f"prepare.py: {error}{hint}")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing half-done is left, run it again")


if __name__ == "__main__":
    main()
