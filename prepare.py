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
import codecs
import difflib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice, product
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError

# requests, tiktoken, torch and tensorflow are imported where they are used: train.py and sample.py
# import this file for its tokenizers, and --help must answer at once.


# -- names and addresses -------------------------------------------------------------------------------------

# (URL, SHA-256 of what is there): a file that has changed since is refused. To add a text, put its address and
# its checksum here.
TINY_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
THE_VERDICT = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch02/01_main-chapter-code/the-verdict.txt",
    "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
)
INSTRUCTIONS = (
    "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/01_main-chapter-code/"
    "instruction-data.json",
    "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
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
    "instructions": ("gpt2", INSTRUCTIONS),
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

# What makes our name of a weight of OpenAI's, step by step: model/h0/attn/c_attn/w is
# transformer.h.0.attn.c_attn.weight, a LayerNorm's gain is its weight, and so is all of an embedding.
GPT2_RENAMES = {
    "model/h": "transformer.h.",
    "model/": "transformer.",
    "/w": ".weight",
    "/g": ".weight",
    "/b": ".bias",
    "wte": "wte.weight",
    "wpe": "wpe.weight",
    "/": ".",
}

# What the command line takes besides paths.
NAMES = [*CORPORA, *GPT2_SIZES]

END_OF_TEXT = "<|endoftext|>"
# With parentheses, split also returns what it splits at.
split_at_end = re.compile(r"(<\|endoftext\|>)").split
UNKNOWN = "<|unk|>"
MAX_VOCAB = 65536  # what uint16 can count
BPE_VOCAB = 4096  # entries of a bpe vocabulary, unless --vocab_size says otherwise

# Characters that are read, and tokenized, at a time: enough work for a thread, and little memory.
PIECE = 1_000_000
# The longest word, the longest line of a .jsonl and the longest .json, in characters, and 16 rows of a
# .parquet, in bytes: all are held in memory.
LONGEST = 100 * PIECE
# Threads that tokenize. More than eight would wait for the thread that reads.
THREADS = min(8, os.cpu_count() or 1)

# Suffixes of text files in a folder. The first one is no suffix, as in README. A file that is named on the
# command line may have any suffix.
SUFFIXES = (
    " .txt .md .rst .tex .org .log .csv .xml .html .css .json .jsonl .ndjson .parquet .yaml .yml .toml .ini "
    ".sh .sql .py .c .h .cpp .hpp .java .kt .js .ts .go .rs .rb .php .swift"
).split(" ")


# -- errors --------------------------------------------------------------------------------------------------


@contextmanager
def user_error(message):
    """Turn any error inside the with block into a UserError that begins with the message.

    This is for data from outside: the packages that read it raise a dozen types of errors.
    """
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise  # these say enough already
    # Packages in Rust, such as tokenizers, panic with an error that is not an Exception.
    except BaseException as error:
        raise UserError(f"{message}: {' '.join(str(error).splitlines())}") from None


# -- downloads -----------------------------------------------------------------------------------------------
#
# Nothing else in this project uses the network. fetch() is one request; download() repeats it until the file is
# complete and right.


def download(url, path, sha256=None):
    """Fetch url to path unless it is there. At any moment, path is complete or absent.

    The mirror PLAINGPT_MIRROR comes first: a folder or an http(s) address with <host>/<path> of each URL.
    A broken transfer is resumed from path.part, in this call or the next. Raises UserError.
    """
    path = Path(path)
    if is_whole(path, sha256):
        return
    addresses = [url]
    mirror = os.environ.get("PLAINGPT_MIRROR")  # for machines without a network, and for the tests
    if mirror:
        addresses = [f"{mirror.rstrip('/')}/{host_and_path(url)}", url]
    part = Path(f"{path}.part")  # it gets its name when it is complete
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent, wait=True):  # another process may be fetching the same file
        if is_whole(path, sha256):
            return
        if part.is_symlink():
            part.unlink()  # otherwise it would overwrite what the link points to
        # Connections break, so there are several tries, with longer and longer pauses.
        reason = None
        for seconds, address in product(range(4), addresses):
            time.sleep(seconds / 2)
            try:
                fetch(address, part)
            except (OSError, ValueError) as error:
                # The network, the disk, or a header that makes no sense. The first reason says most.
                reason = reason or error
                continue
            if is_whole(part, sha256):
                part.replace(path)
                return
            part.unlink()  # an earlier run may have left the beginning of another file
            reason = "it has changed or was damaged on the way: its sha256 is not the expected one"
    raise UserError(
        f"cannot download {url} ({reason}); put it as <host>/<path> into the folder that "
        "PLAINGPT_MIRROR names, or take the embedded corpus: python prepare.py pydocs"
    )


def fetch(address, part):
    """Append to part what is missing, by one request, or copy the file from a folder. Raises OSError."""
    import requests

    if "://" not in address:
        shutil.copyfile(address, part)
        return
    # Of a compressed transfer, a range would count other bytes.
    headers = {"Accept-Encoding": "identity"}
    version = Path(f"{part}.version")  # which version of the file part belongs to
    start = 0
    if part.exists():
        start = part.stat().st_size
        headers["Range"] = f"bytes={start}-"
        if version.exists():  # the server sends the rest of this version, or all of a newer one
            headers["If-Range"] = version.read_text()
    # The timeout is that of the next bytes: a large file may take hours in total.
    with requests.get(address, headers=headers, stream=True, timeout=30) as response:
        # 206: the rest of the file, to be appended. 200: the whole file. 416: part is longer than the file, so
        # it belongs to another one; then the next try begins anew, as after another rest than that asked for.
        status = response.status_code
        asked = f"bytes {start}-"
        rest = status == 206 and response.headers.get("Content-Range", asked).startswith(asked)
        if not rest:
            if status in (200, 206, 416):
                part.unlink(missing_ok=True)
                version.unlink(missing_ok=True)
            if status != 200:
                raise OSError(f"the answer was {status} {response.reason}")
        found = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if found:
            write_file(version, found.encode())
        # Some servers do not say how long the file is. Then only the checksum shows that something is missing.
        length = response.headers.get("Content-Length", "")
        left = int(length) if length.isdecimal() else None  # bytes to come, for the progress bar
        with (
            open(part, "ab") as file,
            tqdm.wrapattr(file, "write", left, desc=part.stem, disable=None) as bar,
        ):
            for chunk in response.iter_content(65536):
                bar.write(chunk)
    version.unlink(missing_ok=True)


def is_whole(path, sha256):
    """Whether the file exists and has the checksum, if one is known."""
    return path.is_file() and (sha256 is None or file_sha256(path) == sha256)


def cached(url, sha256=None):
    """The path of a downloaded file, which is fetched the first time. Raises UserError."""
    path = Path("data/.cache", host_and_path(url))
    download(url, path, sha256)
    return path


def host_and_path(url):
    return url.split("://")[1]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- tokenizers ----------------------------------------------------------------------------------------------


class Tokenizer:
    """What every tokenizer has. Those listed in TOKENIZERS are the choices of --tokenizer.

    encode(text) -> list of token IDs; decode(IDs) -> text
    encode_array(text) -> the token IDs as uint16, (number of IDs,); several threads call it at the same time
    vocab_size: all IDs are below it
    end_of_text: the ID that ends a document, or None
    meta: its description in meta.json: "type", its name in TOKENIZERS, and the arguments of its __init__

    A subclass defines encode or encode_array, and inherits the other.
    """

    end_of_text = None
    keeps_text = True  # whether decode(encode(text)) is the text; if not, unknown is the ID of what is lost

    # If the vocabulary comes from the text itself, entries(text) are the entries that the text needs, and
    # from_entries(set of all entries, several) makes the tokenizer. several: whether there are several
    # documents. None if the vocabulary is fixed.
    entries = None

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        return np.array(self.encode(text), "<u2")


class CharTokenizer(Tokenizer):
    """One ID per character, in sorted order. <|endoftext|> comes last if there are several documents."""

    entries = set  # the characters of a text

    # This character stands for <|endoftext|> during encoding. It is half a surrogate pair, never in UTF-8 text.
    END = "\udfff"

    def __init__(self, chars):
        self.meta = {"type": "char", "chars": chars}
        self.chars = chars
        self.vocab_size = len(chars)
        if END_OF_TEXT in chars:
            self.end_of_text = chars.index(END_OF_TEXT)
        # The ID of each Unicode code point, or -1. With this table, NumPy looks up a whole text in one call.
        self.table = np.full(0x110000, -1, np.int32)
        self.table[self.code_points("".join(chars))] = range(len(chars))

    @classmethod
    def from_entries(cls, entries, several):
        # Sorted, so that the same characters always get the same IDs.
        return cls(sorted(entries) + [END_OF_TEXT] * several)

    def code_points(self, text):
        """(characters,); <|endoftext|> is one character if the vocabulary has it."""
        if self.end_of_text is not None:
            text = text.replace(END_OF_TEXT, self.END)
        # UTF-32 holds the code points themselves, 4 bytes each.
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

    def encode_array(self, text):
        """Raises UserError, which names the first character that has no ID."""
        codes = self.code_points(text)
        ids = self.table[codes]  # (characters,)
        unknown = codes[ids < 0]
        if len(unknown):
            raise not_in_vocabulary(chr(unknown[0]))
        return ids.astype("<u2")

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)


class WordTokenizer(Tokenizer):
    """One ID per word or punctuation mark. White space is lost, and unknown words become <|unk|>.

    The rule is from Raschka, "Build a Large Language Model (From Scratch)", chapter 2.
    """

    keeps_text = False

    # words(text): each "--", each punctuation mark, and each longest run of other characters that are not
    # white space. A single "-" belongs to such a run. The book splits at r'([,.?_!"()\']|--|\s)' and drops
    # what is empty or white space. findall is faster, and the tests compare the two.
    words = re.compile(r"""--|[,.?_!"()']|(?:[^\s,.?_!"()'-]+|-(?!-))+""").findall
    entries = words

    def __init__(self, vocab):
        self.meta = {"type": "word", "vocab": vocab}
        "".join(vocab)  # raises if an entry is not a string
        self.vocab = vocab
        self.vocab_size = len(vocab)
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.end_of_text = self.ids[END_OF_TEXT]
        self.unknown = self.ids[UNKNOWN]

    @classmethod
    def from_entries(cls, entries, several=True):
        # These two come last, as in the book.
        return cls(sorted(entries - {END_OF_TEXT, UNKNOWN}) + [END_OF_TEXT, UNKNOWN])

    def encode(self, text):
        text = text.replace(END_OF_TEXT, f" {END_OF_TEXT} ")  # so that it is a separate word
        return [self.ids.get(word, self.unknown) for word in self.words(text)]

    def decode(self, ids):
        text = " ".join(self.vocab[i] for i in ids)
        return re.sub(r"""\s+([,.?!"()'])""", r"\1", text)  # no space before a punctuation mark


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), by tiktoken, from OpenAI's two files."""

    # The vocabulary is 256 bytes, 50,000 merges, and <|endoftext|>.
    meta = {"type": "gpt2"}
    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def bpe(self):
        """tiktoken's encoding. Its files are fetched when it is first used. Raises UserError."""
        from tiktoken import Encoding
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # our own cache has the two files
        ranks = data_gym_to_mergeable_bpe_ranks(str(cached(*VOCAB_BPE)), str(cached(*ENCODER_JSON)))
        return Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode_array(self, text):
        # encode_to_numpy makes no Python lists, which need the interpreter's lock, so threads work in parallel.
        bpe = self.bpe  # outside of the try, because a failed download is a ValueError too
        try:
            return bpe.encode_to_numpy(text, allowed_special="all").astype("<u2")
        except ValueError:
            # tiktoken fails at about 500,000 white-space characters in a row, so cut the text among them.
            cut = re.search(r"\s{100000}(?=\s)", text).end()
            return np.concatenate((self.encode_array(text[:cut]), self.encode_array(text[cut:])))

    def decode(self, ids):
        return self.bpe.decode(ids)


class BPETokenizer(Tokenizer):
    """Any tokenizer.json of Hugging Face, mostly byte-level BPE, by the tokenizers package."""

    def __init__(self, json, end_of_text=None):
        """json: the content of the file, a dict. end_of_text: its ID, if it is not that of <|endoftext|>."""
        from json import dumps  # json is the name of an argument here, as in meta.json

        from tokenizers import Tokenizer as AnyTokenizer

        # A file may say that a text is to be cut, filled up, put between tokens, or tokenized at random.
        model = {**json["model"], "dropout": None}
        json = {**json, "model": model, "truncation": None, "padding": None, "post_processor": None}
        self.meta = {"type": "bpe", "json": json}
        self.bpe = AnyTokenizer.from_str(dumps(json))
        # The number of tokens would be wrong, because a vocabulary may have holes.
        self.vocab_size = max(self.bpe.get_vocab().values()) + 1
        self.end_of_text = self.bpe.token_to_id(END_OF_TEXT)
        # Unigram models have the ID of what is unknown, the others its token.
        self.unknown = model.get("unk_id", self.bpe.token_to_id(model.get("unk_token") or ""))
        if end_of_text not in (None, self.end_of_text):
            if self.bpe.id_to_token(end_of_text) is None:
                raise UserError("end-of-text has an ID that the vocabulary lacks")
            # meta must hold it too, so that the same tokenizer is loaded again.
            self.meta["end_of_text"] = self.end_of_text = end_of_text
        if self.unknown == self.end_of_text:  # then its ID does not show that something is unknown
            self.unknown = None

    @classmethod
    def trained(cls, texts, vocab_size):
        """Learn a vocabulary from texts: 256 bytes, <|endoftext|>, and merges within words as GPT-2 cuts them.

        The same texts give the same vocabulary. Memory grows only with the number of different words.
        """
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        # The package takes 256 texts at a time, so cut long ones at the end of a word. A word of 10,000
        # characters is cut as well: the time to learn from it grows with the square of its length.
        cuts = re.compile(r"(?s).{,10000}\S(?=[ \n])|.{1,10000}")
        # Meanwhile Python would not see a Ctrl-C, and nothing is written yet: so it ends the program at once.
        handler = on_ctrl_c(signal.SIG_DFL)
        bpe.train_from_iterator(
            (part for text in texts for part in cuts.findall(text)),
            vocab_size,
            min_frequency=0,
            special_tokens=[END_OF_TEXT],
            show_progress=sys.stderr.isatty(),
        )
        on_ctrl_c(handler)
        return cls(json.loads(bpe.to_str()))

    def encode(self, text):
        if text == END_OF_TEXT and self.end_of_text is not None:
            return [self.end_of_text]  # another vocabulary may write it as </s>
        with user_error(f"{text[:40]!r} has something that this vocabulary lacks"):
            # The package's fastest method: it does not track places in the text.
            ids = self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if self.unknown in ids:
            encoding = self.bpe.encode(text, add_special_tokens=False)
            start, end = encoding.offsets[ids.index(self.unknown)]
            raise UserError(f"{text[start:end]!r:.40} is not in the vocabulary")
        return ids

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)


def fetch_gpt2_vocabulary():
    """Fetch GPT-2's vocabulary for later, because the machine that trains may have no network."""
    try:
        GPT2Tokenizer().encode("")
    except (ImportError, OSError, UserError) as error:
        say(f"GPT-2's vocabulary is still missing: {error}", sys.stderr)


def not_in_vocabulary(char):
    return UserError(f"the character {char!r} (U+{ord(char[0]):04X}) is not in the vocabulary")


def characters_of(text):
    """The characters of a text, and its doubled white space, of which some vocabularies make one."""
    return {*text, *(found[0] for found in re.finditer(r"(\s)\1", text))}


def check_characters(tokenizer, characters):
    """Raises UserError, which names the character, if a vocabulary from elsewhere would lose one of a text.

    characters: what characters_of returns
    """
    for chars in sorted(characters):  # one, or two of a kind
        # Their IDs are taken three times, because some vocabularies drop the spaces before a text. A character
        # may be lost, or become another, such as its lower case. A word would be <|unk|>, which is counted.
        kept = tokenizer.decode(3 * tokenizer.encode(chars))
        lost = kept.count(chars[0]) < 2 * len(chars)
        if tokenizer.keeps_text and (lost or kept.replace(chars[0], "").strip()):
            raise not_in_vocabulary(chars)


def encode_text(tokenizer, text):
    """The token IDs of a text that is not in a file, such as a prompt. Raises UserError if any would be lost."""
    ids = []
    # A vocabulary from elsewhere may have another name for <|endoftext|>, which it knows only if it is alone.
    for part in filter(None, split_at_end(clean(text))):
        if part != END_OF_TEXT or tokenizer.end_of_text is None:
            check_characters(tokenizer, characters_of(part))
        ids += tokenizer.encode(part)
    return ids


def as_hugging_face(tokenizer):
    """The same tokenizer as an object of Hugging Face's tokenizers package. Raises UserError for words."""
    from tokenizers import ByteLevelBPETokenizer, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as AnyTokenizer

    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.bpe
    if isinstance(tokenizer, GPT2Tokenizer):
        copy = ByteLevelBPETokenizer.from_file(str(cached(*ENCODER_JSON)), str(cached(*VOCAB_BPE)))
    elif isinstance(tokenizer, CharTokenizer):
        copy = AnyTokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}, "none"))
        copy.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        copy.decoder = decoders.Fuse()
    else:
        raise UserError("Hugging Face has no tokenizer that is equal to our word tokenizer")
    if tokenizer.end_of_text is not None:
        copy.add_special_tokens([END_OF_TEXT])
    return copy


# The choices of --tokenizer, and the "type" in meta.json.
TOKENIZERS = {"char": CharTokenizer, "word": WordTokenizer, "gpt2": GPT2Tokenizer, "bpe": BPETokenizer}

# The description of GPT-2's IDs in meta.json. A dataset without meta.json, such as nanoGPT's, is assumed to
# have these.
GPT2_META = {"tokenizer": GPT2Tokenizer.meta, "vocab_size": GPT2Tokenizer.vocab_size}


def load_tokenizer(meta):
    """The tokenizer that a meta.json describes. Raises UserError."""
    with user_error("the tokenizer's description is damaged or unknown"):
        arguments = {**meta["tokenizer"]}  # a copy, because pop changes it
        return TOKENIZERS[arguments.pop("type")](**arguments)


def tokenizer_of(name, checkpoint=None):
    """The tokenizer that belongs to a checkpoint, a dataset or a folder. Raises UserError rather than guess.

    name: the folder of a dataset, a folder or file with a tokenizer.json, or a checkpoint
    checkpoint: what load_checkpoint has read from it, if it has been read already
    Our checkpoints contain their tokenizer; a checkpoint of nanoGPT has that of its dataset.
    """
    path = Path(os.path.expanduser(name))
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_dir():
        return tokenizer_of_folder(path)
    if checkpoint is None:
        from model import load_checkpoint

        with user_error(f"--tokenizer={name} is neither one of those in --help nor a checkpoint"):
            checkpoint = load_checkpoint(path)
    if "meta" in checkpoint:
        return load_tokenizer(checkpoint["meta"])
    # A checkpoint of nanoGPT names its dataset, whose vocabulary must have the same size.
    size = checkpoint["model_args"]["vocab_size"]
    if size == 50304:
        size = 50257  # GPT-2's size, which nanoGPT rounds up
    dataset = checkpoint.get("config", {}).get("dataset")
    meta = read_json(Path(f"data/{dataset}/meta.json")) or GPT2_META
    if meta.get("vocab_size") != size:
        raise UserError(
            f"{name} does not say what its {size} token IDs mean; prepare its text as data/{dataset}"
        )
    return load_tokenizer(meta)


def tokenizer_of_folder(folder):
    """The tokenizer of a folder with meta.json, tokenizer.json or GPT-2's vocab.json. Raises UserError."""
    meta = read_json(folder / "meta.json")
    if meta:
        return load_tokenizer(meta)
    description = read_json(folder / "tokenizer.json")
    if description:
        with user_error(f"{folder}/tokenizer.json is damaged"):
            tokenizer = BPETokenizer(description)
            vocab = tokenizer.bpe.get_vocab()  # {token: ID}, with added tokens such as those of a chat
            # The model's configuration has the ID that ends a text. Where nobody has set it, the
            # tokenizer's configuration may have the token.
            end = read_json(folder / "config.json").get("eos_token_id")
            if isinstance(end, list) and end:  # the first one ends a text
                end = end[0]
            if end not in vocab.values():
                token = read_json(folder / "tokenizer_config.json").get("eos_token")
                end = vocab.get(token["content"] if isinstance(token, dict) else token)
            if end not in (None, tokenizer.end_of_text):
                tokenizer = BPETokenizer(description, end)
    else:
        vocab = read_json(folder / "vocab.json")
    # GPT-2's vocabulary, {token: ID}, is recognized by its checksum.
    sha256 = hashlib.sha256(json.dumps(vocab, sort_keys=True).encode()).hexdigest()
    if sha256 == "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2":
        return GPT2Tokenizer()
    if not description:
        raise UserError(f"{folder} has no tokenizer.json, so nothing says what its IDs mean: add that file")
    return tokenizer


# -- documents -----------------------------------------------------------------------------------------------
#
#   documents   an iterable of documents, which is read twice
#   document    an iterable of pieces: a file, or a record of a .jsonl, .json or .parquet, or the part of these
#               that <|endoftext|> ends
#   piece       a str of about PIECE characters, which ends at the end of a word or of its document;
#               a Prompt, if it is only read and not learned
#
# A document must be read to its end before the next one. Its token IDs are those of its pieces, one after the
# other, so that a file need not fit into memory.

# This finds the last place where a word ends before a space or newline. A pre-token of GPT-2 ends there too,
# because none continues from other characters into white space, and <|endoftext|> has no such place in it. So
# every tokenizer gives the two parts the same IDs as the whole.
TO_LAST_WORD_END = re.compile(r"(?s:.*)\S(?=[ \n])")


def check_length(text, file, what):
    """Raises UserError if a file would fill the memory; a small one may unpack to gigabytes."""
    if len(text) >= LONGEST:
        raise UserError(
            f"{file.name}: {what} is longer than {LONGEST:,} characters and could fill the memory"
        )


def whole_words(file, size=PIECE):
    """The text of a file, read size characters at a time, in pieces that end with a word.

    A piece grows until a word ends. Raises UserError if a word has LONGEST characters.
    """
    # CPython extends a str in place, so it need not be a list.
    rest = ""  # what has been read and is not in a piece yet
    searched = 0  # no word ends before this place in rest, so it need not be searched again
    while block := file.read(size):
        rest += block
        if len(rest) < size:  # a short document is one piece
            continue
        found = TO_LAST_WORD_END.match(rest, searched)
        if found:
            yield rest[: found.end()]
            rest = rest[found.end() :]
        check_length(rest, file, "a word")
        searched = len(rest) - 1  # the next block may begin with a space
    yield rest


def split_at_ends(pieces):
    """The documents of a text: <|endoftext|> ends a document, and blank documents are left out."""
    parts = (part for piece in pieces for part in split_at_end(piece) if part)
    for is_end, document in groupby(parts, lambda part: part == END_OF_TEXT):
        first = next(document)
        # If the first part is blank, so is the document: a piece ends with a word, unless it is the last.
        if not is_end and first.strip():
            yield chain([first], document)  # noqa: B031, it goes on after the first


def clean(text):
    """A prompt or a string of JSON, treated like the text of a file. Raises UserError if it is not text."""
    # NUL, or half a surrogate pair, which also stands for a byte that is not UTF-8.
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        raise UserError(f"{text!r:.40} is not UTF-8 text: it has {found[0]!r}")
    return re.sub("\r\n?", "\n", text.removeprefix("\N{BYTE ORDER MARK}"))


class Prompt(str):
    """A piece of a conversation that is only read, not learned."""


# How messages are written, after Taori et al. 2023, Stanford Alpaca. An answer follows, and <|endoftext|>.
TEMPLATE = {"system": "{}\n\n", "user": "### Instruction:\n{}\n\n### Response:\n"}
# The same template for Hugging Face, in Jinja.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = message.content | trim %}"
    "{% if message.role == 'assistant' %}{{ text }}{{ eos_token }}"
    "{% elif message.role == 'system' %}{{ text }}\n\n"
    "{% else %}### Instruction:\n{{ text }}\n\n### Response:\n{% endif %}{% endfor %}"
)


def render(messages):
    """The pieces of a conversation: questions as Prompts, and answers, each followed by <|endoftext|>.

    messages: each is {"role": "system", "user" or "assistant", "content": text}. Raises UserError.
    """
    pieces = []
    question = ""  # all text before an answer, in one piece, because a token may reach over two messages
    for message in messages:
        role, content = message["role"], clean(message["content"]).strip()
        if END_OF_TEXT in content:
            raise UserError("<|endoftext|> cannot be part of a message, because it ends an answer")
        if role == "assistant":
            pieces += [Prompt(question), content, END_OF_TEXT]
            question = ""
        elif role in TEMPLATE:
            question += TEMPLATE[role].format(content)
        else:
            raise UserError(f"{role!r:.40} is no role of a message")
    return [*pieces, Prompt(question)]


def as_messages(example):
    """The conversation of an example: its instruction, its input if there is one, and its output."""
    question = example["instruction"]
    context = example.get("input")
    if context is not None and clean(context).strip():
        question += f"\n\n### Input:\n{context}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]


def unpacked(path):
    """a.txt for a.txt, a.txt.gz and a.txt.zst."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


def opener(path):
    """A function that opens a file as open() does, but unpacks .gz and .zst. Raises UserError."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open
    if suffix != ".zst":
        return open
    # Python has zstd from 3.14 on; backports.zstd is the same for older versions.
    try:
        from compression import zstd
    except ImportError:
        with user_error(f"unpack {path}, or pip install backports.zstd"):
            from backports import zstd
    return zstd.open


class NotText(UserError):
    """A file that is not UTF-8 text."""


def check_head(path, head):
    """Raises NotText if a file that begins with these bytes is not UTF-8 text."""
    # A PDF, the byte order marks of UTF-16, or NUL.
    found = re.search(rb"\A(?:%PDF-|\xff\xfe|\xfe\xff)|\0", head)
    if not found:
        return
    problem = "it is not text"
    # In UTF-16, one of the two bytes of a character takes few values.
    few, many = sorted((len(set(head[::2])), len(set(head[1::2]))))
    if many > 3 * few or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        problem = "it looks like UTF-16; add --encoding=utf-16, or --encoding=utf-16-le or -be"
    at = found.start()
    raise NotText(f"{path}: byte {at} is {head[at]:#x}, so {problem}")


@dataclass
class TextFiles:
    """The documents of files; it can be iterated several times. Raises UserError."""

    files: list
    errors: str = "strict"
    text_key: str | None = None  # None: "text", unless a record is a conversation
    encoding: str = "utf-8"

    def __iter__(self):
        # For another format, add a line here and a suffix to SUFFIXES.
        readers = {
            ".jsonl": self.read_jsonl,
            ".ndjson": self.read_jsonl,
            ".json": self.read_json,
            ".parquet": self.read_parquet,
        }
        for path in self.files:
            read = readers.get(unpacked(path).suffix.lower(), self.read_text)
            yield from read(path)

    @contextmanager
    def open(self, path):
        """A text file, unpacked, to be read inside the with block. Raises UserError, also inside the block.

        Line ends become newlines, and a byte order mark is dropped.
        """
        with (
            opener(path)(path, "rt", encoding=self.encoding, errors=self.errors) as file,
            user_error(f"{path} is damaged"),  # which is found only when the file is read
        ):
            try:
                if self.encoding == "utf-8":
                    check_head(path, file.buffer.read(4096))
                    file.seek(0)
                if file.read(1) != "\N{BYTE ORDER MARK}":
                    file.seek(0)
                yield file
            except UnicodeDecodeError as error:
                # error.object holds the bytes that were read last.
                at = file.buffer.tell() - len(error.object) + error.start
                raise UserError(
                    f"{path} is not {self.encoding.upper()}: byte {at} is {error.object[error.start]:#x}; "
                    "name its --encoding (such as latin-1), or add --errors=replace"
                ) from None

    def read_text(self, path):
        """The documents of a plain text."""
        return split_at_ends(self.read_pieces(path))

    def read_pieces(self, path):
        """The pieces of a plain text. Raises UserError if a character is NUL, which no text has."""
        with self.open(path) as file:
            at = 0  # the piece begins with this character of the file
            for piece in whole_words(file):
                nul = piece.find("\0")
                if nul >= 0:
                    raise UserError(f"{path} is not text: character {at + nul} is NUL")
                at += len(piece)
                yield piece

    def read_jsonl(self, path):
        """The documents of each line that is not blank."""
        with self.open(path) as file:
            # readline returns "" at the end of the file, and of a line that is too long its beginning.
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
                check_length(line, file, f"line {number}")
                if line.strip():
                    yield from self.documents_of(line, f"{path}, line {number}")

    def read_json(self, path):
        """The documents of an array of objects, or of an object a line; any other file is plain text.

        Raises UserError if plain text should have a --text_key.
        """
        with self.open(path) as file:
            text = file.readline(LONGEST)
            while text.isspace():
                text = file.readline(LONGEST)
            text += file.read(1000)
            if re.match(r"\s*\{[^\n]*\}\s*\n\s*\{", text):  # an object a line: a .jsonl under another name
                yield from self.read_jsonl(path)
            elif re.match(r"\s*\[\s*[{\]]", text):
                text += file.read(LONGEST)
                check_length(text, file, "the array")
                for number, record in enumerate(json.loads(text), 1):
                    yield from self.documents_of(record, f"{path}, record {number}")
            elif self.text_key:
                raise UserError(f"{path} has no objects for --text_key: no array of them, nor one a line")
            else:
                yield from self.read_text(path)

    def read_parquet(self, path):
        """The documents of each row."""
        with user_error(f"{path} cannot be read"):
            from pyarrow.parquet import ParquetFile

            # Few rows at a time, because a text may be long. A column that the file lacks is passed over.
            columns = ["text", "messages", "instruction", "input", "output"]
            if self.text_key:
                columns = [self.text_key]
            number = 1
            for batch in ParquetFile(path).iter_batches(16, columns=columns):
                if batch.nbytes > LONGEST:  # a small file may unpack to gigabytes
                    raise UserError(
                        f"{path}: 16 rows are longer than {LONGEST:,} bytes and could fill the memory; "
                        "put long texts into files of their own"
                    )
                for row in batch.to_pylist():
                    yield from self.documents_of(row, f"{path}, record {number}")
                    number += 1

    def documents_of(self, record, place):
        """The documents of a record: a conversation, or those of its text. Raises UserError, with the place."""
        try:
            if isinstance(record, str):  # a line of a .jsonl
                record = json.loads(record)
            if self.text_key is None:
                messages = record.get("messages")
                if record.get("instruction") is not None:  # a table has None if a row lacks a value
                    messages = as_messages(record)
                if messages:
                    if messages[-1]["role"] != "assistant":
                        raise UserError("the conversation does not end with an answer")
                    # Without its last two pieces, the end, which split_documents adds, and an empty Prompt.
                    return [render(messages)[:-2]]
            text = record[self.text_key or "text"]
            return split_at_ends([clean(text.encode("utf-8", self.errors).decode())])
        except Exception as error:
            raise UserError(
                f"{place}: no text under --text_key, and no conversation: {error!s:.300}"
            ) from None


def find_text_files(paths, encoding):
    """The files, and the text files of the folders, in sorted order, each once. Prints what is left out.

    Hidden names, which begin with a dot, are passed over. Raises UserError if a path does not exist.
    """
    found = {}  # {resolved path: path}: two links may lead to the same file
    left_out = []  # what in the folders is not read
    for path in map(Path, paths):
        if path.is_file():
            found[path.resolve()] = path  # the user says that it is text
        elif is_dataset(path):
            raise UserError(f"{path} is a prepared dataset, not text")
        elif path.is_dir():
            for file in walk(path):
                if file.is_file() and is_text(file, encoding):
                    found[file.resolve()] = file
                else:
                    left_out.append(str(file))
        else:
            near = difflib.get_close_matches(str(path), NAMES, 1) or NAMES
            raise UserError(
                f"{path} does not exist, or cannot be read twice as a file can; "
                f"did you mean {', '.join(near)}?"
            )
    if left_out:
        say(
            f"{len(left_out):,} files are not text, or are links to folders, or prepared datasets, such as "
            f"{', '.join(left_out[:5])}",
            sys.stdout,
        )
    return found.values()


def is_dataset(folder):
    """Whether prepare.py has made a folder, which then holds meta.json and other files of ours, but no text."""
    if not (folder / "meta.json").exists():
        return False
    # A stray file beside ours, such as a .DS_Store, makes no text of it; meta.json alone may be somebody else's.
    names = set(os.listdir(folder))
    return names <= DATASET_FILES or bool(names & {"val.bin", "ckpt.pt"})


def walk(folder):
    """All files in a folder and its subfolders, in the same order on every system.

    Links to folders and prepared datasets are not entered, but are among the files.
    Raises UserError if a folder cannot be read.
    """
    with user_error(f"{folder} cannot be read"):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            # A link may lead back to where it stands.
            if path.is_dir() and not path.is_symlink() and not is_dataset(path):
                yield from walk(path)
            else:
                yield path


def is_text(path, encoding):
    """Whether a file in a folder has the suffix of text, and begins like text. Raises UserError."""
    suffix = unpacked(path).suffix.lower()
    if suffix not in SUFFIXES:
        return False
    if suffix == ".parquet":  # its rows hold text, although its bytes are not text
        return True
    try:
        with TextFiles([path], "replace", encoding=encoding).open(path):  # undecodable bytes are told later
            return True
    except NotText:
        return False


def pydocs():
    """The language reference that ships with CPython for help(): half a million characters."""
    from pydoc_data.topics import topics

    # Sorted, so that the text does not depend on the order of Python's list.
    return "\n".join(topics[name].strip() + "\n" for name in sorted(topics))


# -- token IDs -----------------------------------------------------------------------------------------------
#
#   documents -> split_documents -> ("train" or "val", text) -> batches -> lists of them
#             -> encode_batches, in threads -> ("train" or "val", text, token IDs) -> write_bins


def split_documents(documents, count, characters, val_fraction, ends=True):
    """("train" or "val", text), in order, of count documents with this number of characters in total.

    A single document is cut: its beginning trains. Of several, each goes whole to one side: the last of every
    1 / val_fraction validates, and at least one. With ends, <|endoftext|> follows each of them.
    """
    to_train = int(characters * (1 - val_fraction))  # characters of a single document that still train
    for i, document in enumerate(documents, 1):
        if count == 1:
            for piece in document:
                yield "train", piece[:to_train]
                yield "val", piece[to_train:]
                to_train = max(0, to_train - len(piece))
            return
        # The number of documents so far, with this one, that validate; in the end at least one.
        wanted = max(int(i * val_fraction), i == count)
        split = "val" if wanted > int((i - 1) * val_fraction) else "train"
        for piece in document:
            yield split, piece
        if ends:
            yield split, END_OF_TEXT


def batches(texts):
    """The same in lists of about PIECE characters: enough work for a thread, however short the texts are."""
    batch = []
    size = 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= PIECE:
            yield batch
            batch = []
            size = 0
    yield batch  # the rest


def encode_batches(batches, tokenizer):
    """("train" or "val", text, its token IDs) of each text, in order. Raises UserError.

    Threads encode a few batches at a time, so that memory does not grow.
    """

    def encode_batch(batch):
        return [(split, text, tokenizer.encode_array(text)) for split, text in batch]

    # Threads are enough, because tiktoken and NumPy work outside of Python's lock.
    with ThreadPoolExecutor(THREADS) as pool:
        while group := list(islice(batches, 2 * THREADS)):
            # After an error or Ctrl-C, map cancels what has not begun.
            for encoded in pool.map(encode_batch, group):
                yield from encoded


# -- datasets ------------------------------------------------------------------------------------------------

# All files that we write into data/<name>/. A folder with any other file is never replaced.
DATASET_FILES = {"train.bin", "val.bin", "train_mask.bin", "val_mask.bin", "meta.json", "ckpt.pt"}


def write_file(path, content):
    """Write a file. At any moment, path is the complete old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    try:
        partial.unlink(missing_ok=True)  # what a kill left, or a link to somebody's file
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # it must be on the disk before it gets its name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # if that has failed


def read_json(path):
    """The object in a JSON file, or an empty one if there is no such file. Raises UserError."""
    if not path.exists():
        return {}
    if not path.is_file():  # reading a pipe could wait for ever
        raise UserError(f"{path} is no file")
    with user_error(f"{path} is damaged, or no JSON object"):
        return {**json.loads(path.read_bytes())}


def load_dataset(name, block_size, vocab_size=None, check_ids=True):
    """The token IDs in data/<name>/train.bin and val.bin (memory-mapped), meta.json and the tokenizer.

    vocab_size: the model's, if it differs from the dataset's
    check_ids: whether to read all IDs, and look for one that is too large
    Raises UserError.
    """
    given = Path(name)
    name = given.name  # data/mine means mine
    folder = Path("data", name)
    if len(given.parts) > 1 and given.resolve() != folder.resolve():
        raise UserError(f"datasets lie in data/, and --dataset={given} does not")
    if not (folder / "val.bin").is_file():
        raise UserError(f"{folder} is not prepared; run python prepare.py {name}, or YOUR_TEXT --name={name}")
    meta = read_json(folder / "meta.json")
    if not meta:
        if (folder / "meta.pkl").exists():
            raise UserError(f"{folder} is nanoGPT's; prepare its text: python prepare.py FILE --name=NAME")
        say(f"{folder} has no meta.json: taken for GPT-2 token IDs", sys.stderr)
        meta = {"dataset": name, **GPT2_META}
    tokenizer = load_tokenizer(meta)
    if meta.get("vocab_size") != tokenizer.vocab_size:
        raise UserError(f"{folder}/meta.json is damaged: vocab_size is not its tokenizer's")
    vocab_size = min(vocab_size or MAX_VOCAB, tokenizer.vocab_size)  # an ID must be below both
    splits = []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        tokens = meta.get(f"{split}_tokens", size // 2)
        # A window is block_size tokens, and the token after them.
        if tokens != size / 2 or tokens <= block_size:
            raise UserError(
                f"{path} is truncated, or {tokens} tokens are too few for {block_size=}: prepare more text"
            )
        data = np.memmap(path, "<u2", "r")  # (tokens,), read only when it is used
        # Without a dtype in meta.json: larger integers, read as uint16, are 0 at every second place.
        dtype = meta.get("dtype")
        if dtype != "uint16" and (dtype or not data[1:100_000:2].any()):
            raise UserError(f"{path} does not hold uint16 token IDs; prepare its text here")
        if check_ids and data.max() >= vocab_size:  # a GPU would crash without a reason
            raise UserError(
                f"{path} has the ID {data.max()}, which is beyond the vocabulary of {vocab_size}: it is damaged, "
                "or was not made for these weights"
            )
        splits.append(data)
    return *splits, meta, tokenizer


def load_mask(name, split, data, meta=()):
    """The mask of data/<name>/<split>.bin: a uint8 for each ID, 1 if it is to be learned.

    Without a mask, all IDs are, unless meta says that there was one. data, meta: as load_dataset returns them.
    Raises UserError.
    """
    path = Path("data", Path(name).name, f"{split}_mask.bin")
    if not path.exists() and f"{split}_learned" not in meta:
        return np.broadcast_to(np.uint8(1), len(data))  # this takes no memory
    if not path.exists() or path.stat().st_size != len(data):
        raise UserError(f"{path} is missing, or does not belong to its token IDs: prepare both anew")
    return np.fromfile(path, "u1")


@contextmanager
def new_folder(name, tokenizer, sources):
    """Gives the with block a folder to fill, and the content of its meta.json.

    The folder becomes data/<name>/ when the block has ended without an error. Until then the old one stays.
    tokenizer: has meta and vocab_size
    sources: where the content comes from, each {"url" or "path": ..., "sha256": ...}
    Raises UserError if data/<name>/ holds files that are not ours.
    """
    folder = Path(os.path.realpath(f"data/{name}"))  # if it is a link, the link stays as it is
    new = folder.with_name(f".{name}.new")
    old = folder.with_name(f".{name}.old")
    if folder.exists():
        found = set(os.listdir(folder))
        # Without meta.json, a train.bin is from another program. An empty folder may be replaced.
        if found and not {"meta.json"} <= found <= DATASET_FILES:
            raise UserError(f"{folder} holds files that prepare.py did not write; choose another --name")
    meta = {
        "dataset": name,
        "tokenizer": tokenizer.meta,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
        "sources": sources,
    }
    if new.is_symlink():
        new.unlink()
    new.mkdir(parents=True, exist_ok=True)
    with lock(new):
        try:
            for path in new.iterdir():
                path.unlink()  # what a killed run left
            yield new, meta
            (new / "meta.json").write_text(json.dumps(meta, indent=1))
            # A folder cannot be renamed over one with files, so the old one is moved away first.
            if folder.exists():
                say(f"data/{name} is replaced", sys.stderr)
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if old.exists() and not folder.exists():
                old.rename(folder)  # this run, or one that was killed, ended between the two renames
            shutil.rmtree(old, ignore_errors=True)


def bytes_per_token(meta, tokenizer, ids):
    """The mean number of UTF-8 bytes per validation token, or None if unknown.

    prepare.py has counted the bytes of its texts in meta. Otherwise ids are decoded, without end-of-text.
    """
    # The loss of answers alone cannot be compared with that of whole texts.
    if "train_learned" in meta or not tokenizer.keeps_text:
        return None
    counted = meta.get("val_bytes")
    if not (isinstance(counted, int) and 0 < counted < 2**53):
        counted = 0
        # In parts, because the decoded text takes more memory than the IDs.
        for part in np.array_split(ids, len(ids) // PIECE + 1):
            text = tokenizer.decode(part[part != tokenizer.end_of_text].tolist())
            counted += len(text.encode())
    return counted / len(ids)


def write_bins(name, encoded, tokenizer, sources, masked=False):
    """Write data/<name>/, print how it is split, and return its meta.json. Raises UserError.

    encoded: ("train" or "val", text or None, array of uint16 token IDs), in order
    tokenizer, sources: as in new_folder
    masked: whether some texts are Prompts; then masks are written too
    """
    names = ["train", "val"]
    if masked:
        names += ["train_mask", "val_mask"]
    counts = Counter()
    unknown = 0
    with new_folder(name, tokenizer, sources) as (folder, meta), ExitStack() as stack:
        files = {file: stack.enter_context(open(folder / f"{file}.bin", "wb")) for file in names}
        for split, text, ids in encoded:
            files[split].write(ids)
            if not tokenizer.keeps_text:
                unknown += np.count_nonzero(ids == tokenizer.unknown)
            counts[f"{split}_tokens"] += len(ids)
            if masked:
                learned = not isinstance(text, Prompt)
                files[f"{split}_mask"].write(np.full(len(ids), learned, "u1"))
                counts[f"{split}_learned"] += len(ids) * learned
            if text and text != END_OF_TEXT:
                counts[f"{split}_bytes"] += len(text.encode())
        meta |= counts
        train, val = counts["train_tokens"], counts["val_tokens"]
        if 0 in (train, val):  # train.py needs both
            raise UserError("train.bin or val.bin would be empty; give more text or another --val_fraction")

    say(
        f"data/{name}: {train:,} train ({train / (train + val):.1%}) and "
        f"{val:,} validation tokens ({val / (train + val):.1%})",
        sys.stdout,
    )
    if unknown:
        say(f"{unknown:,} tokens are words that the vocabulary lacks: <|unk|>", sys.stdout)
    if masked:
        say(
            f"{meta['train_learned']:,} of the training tokens are learned, the others are only read",
            sys.stdout,
        )
    return meta


def write_dataset(name, documents, sources, kind, val_fraction=0.1, vocab_size=BPE_VOCAB):
    """Tokenize documents into data/<name>/. They are read twice. Raises UserError.

    sources: as in new_folder; kind: a name in TOKENIZERS, or what tokenizer_of takes
    vocab_size: entries of a bpe vocabulary, for which the training text is read a third time
    """
    if kind not in TOKENIZERS:
        tokenizer = tokenizer_of(kind)
        entries_of = characters_of  # to see whether this vocabulary has all of them
    else:
        entries_of = TOKENIZERS[kind].entries
        if kind != "bpe" and not entries_of:  # a fixed vocabulary
            tokenizer = TOKENIZERS[kind]()
            tokenizer.encode("")  # this fetches its files, which may fail, before the text is read
    # First reading: a tokenizer may need all characters, and the split the number of documents or characters.
    count = 0
    characters = 0
    entries = set()  # of the whole text
    masked = False
    for document in tqdm(documents, "documents", disable=None):  # None: a bar only on a terminal
        count += 1
        for piece in document:
            characters += len(piece)
            masked |= isinstance(piece, Prompt)
            # If there are too many already, more of them would only fill the memory.
            if entries_of and len(entries) <= MAX_VOCAB and piece != END_OF_TEXT:
                entries.update(entries_of(piece))
    if not count:
        raise UserError(
            f"there is no text for data/{name}: no text file, or only blank ones (a file that you name itself "
            "is taken as text)"
        )
    if masked and count == 1:
        raise UserError("a single conversation cannot be split: give several")
    if kind not in TOKENIZERS:
        check_characters(tokenizer, entries)
    elif kind == "bpe":
        texts = split_documents(documents, count, characters, val_fraction)
        learned_from = (text for split, text in texts if split == "train" and text != END_OF_TEXT)
        tokenizer = BPETokenizer.trained(learned_from, vocab_size)
    elif entries_of:
        tokenizer = TOKENIZERS[kind].from_entries(entries, count > 1)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise UserError("a vocabulary of over 65536 entries; try --tokenizer=gpt2")
    ends = tokenizer.end_of_text is not None
    if masked and not ends:
        raise UserError("this vocabulary has no end-of-text, which must end an answer")
    if count > 1 and not ends:
        say("this vocabulary has no end-of-text, so nothing marks the end of a document", sys.stderr)
    # Second reading. All of these are generators, so nothing is read before write_bins asks for it.
    texts = split_documents(documents, count, characters, val_fraction, ends)
    progress = tqdm(batches(texts), "tokenizing", characters // PIECE + 1, unit="M chars", disable=None)
    meta = write_bins(name, encode_batches(iter(progress), tokenizer), tokenizer, sources, masked)
    tokens = meta["train_tokens"] + meta["val_tokens"]
    say(
        f"{count:,} documents, {characters:,} characters, {characters / tokens:.2f} a token, "
        f"vocabulary of {tokenizer.vocab_size:,}",
        sys.stdout,
    )


def prepare_fineweb(name, shards):
    """Write the first shards of FineWeb and one to validate, 100M GPT-2 IDs each. Raises UserError."""
    sources = []
    ids = []  # of each shard: split, no text, token IDs
    for i in [*range(1, shards + 1), 0]:
        split = "train" if i else "val"
        url = FINEWEB_URL.format(split, i)
        path = cached(url)
        tokens = (path.stat().st_size - FINEWEB_HEADER) / 2
        if np.fromfile(path, "<i4", 3).tolist() != [FINEWEB_MAGIC, 1, tokens]:
            path.unlink()  # the next run downloads it again
            raise UserError(f"{url} came as something else than a shard of token IDs; run it again")
        sources.append({"url": url, "sha256": file_sha256(path)})
        # Memory-mapped, because a hundred shards would not fit into memory.
        ids.append((split, None, np.memmap(path, "<u2", "r", FINEWEB_HEADER)))
    write_bins(name, ids, GPT2Tokenizer, sources)


# -- OpenAI's weights ----------------------------------------------------------------------------------------


def prepare_gpt2(name, size):
    """Turn OpenAI's checkpoint into data/<name>/ckpt.pt. size: OpenAI's name, such as 124M.

    Raises UserError.
    """
    checkpoint = Path("data", name, "ckpt.pt")
    if checkpoint.exists():
        say(f"{checkpoint} is there already", sys.stdout)
        return
    import torch

    sources = []
    for file in GPT2_FILES.split():
        url = f"{GPT2_URL}/{size}/{file}"
        path = cached(url)
        # What was converted can be told later, although these files are deleted.
        sources.append({"url": url, "sha256": file_sha256(path)})
    # TensorFlow needs all files of a checkpoint in one folder, as OpenAI has them.
    weights, model_args = read_gpt2(path.parent)
    with (
        new_folder(name, GPT2Tokenizer, sources) as (folder, meta),
        user_error("the weights cannot be written, is the disk full?"),
    ):
        torch.save({"model": weights, "model_args": model_args, "meta": meta}, folder / "ckpt.pt")
    shutil.rmtree(path.parent)  # these files are as large, and no longer needed
    say(f"{checkpoint} is ready for --init_from={name}", sys.stdout)


def read_gpt2(folder):
    """The weights of a GPT-2 that TensorFlow has saved, under our names, and model_args. Raises UserError."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow prints a lot
    with user_error("only TensorFlow reads OpenAI's files; install it: pip install tensorflow"):
        import tensorflow as tf
    import torch

    from model import GPT

    weights = {}
    with user_error(f"{folder} is no GPT-2, or damaged; delete it and try again"):
        # n_layer, n_head and n_embd have the same names as ours.
        model_args = json.loads((folder / "hparams.json").read_text())
        model_args["block_size"] = model_args.pop("n_ctx")
        model_args["vocab_size"] = model_args.pop("n_vocab")
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
        # One tensor at a time, so that the largest model is in memory only once.
        for name in reader.get_variable_to_shape_map():
            tensor = torch.from_numpy(reader.get_tensor(name))
            if name.endswith("/w"):
                tensor = tensor[0].T.contiguous()  # a convolution of width 1: (1, in, out) -> (out, in)
            for theirs, ours in GPT2_RENAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # GPT-2 ties these two
        # This raises if a name or a shape differs.
        GPT.from_checkpoint({"model": weights, "model_args": model_args})
    return weights, model_args


def weights_path(init_from):
    """The path of the checkpoint that init_from names: GPT-2's weights, or a path. Raises UserError."""
    if init_from not in GPT2_SIZES:
        return init_from
    path = f"data/{init_from}/ckpt.pt"
    if not Path(path).exists():
        raise UserError(f"{path} is not there; run: python prepare.py {init_from}")
    return path


# -- the machine ---------------------------------------------------------------------------------------------


def speak_utf8():
    """Make the standard streams UTF-8 on every system. Other characters are escaped, and end no run."""
    for name in ("stdin", "stdout", "stderr"):
        # A closed stream is None; without a substitute, the next file that is opened would take its number.
        stream = getattr(sys, name) or open(os.devnull, "r+")
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        setattr(sys, name, stream)


def say(line, stream, end="\n"):
    """Print a line above the progress bar. If the stream fails, it is given up, and the run goes on."""
    try:
        tqdm.write(visible(line, stream), stream, end)
        stream.flush()
    except OSError:  # a full disk, a closed terminal, or a reader that has ended
        give_up(stream)


def give_up(stream):
    """From now on, what is written to the stream goes nowhere, so that Python's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def visible(text, stream):
    """The text to print. For a terminal, control characters are escaped, because it would obey them."""
    if not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def on_ctrl_c(handler):
    """Set what Ctrl-C does, unless it is ignored, as by a script's background command; returns what it did."""
    old = signal.getsignal(signal.SIGINT)
    if old != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)
    return old


def interrupt(_number, _frame):
    """The first Ctrl-C ends the program. Further ones are ignored, so that it can clean up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def lock(folder, wait=False):
    """Keep other processes out of a folder during the with block. Raises UserError if one is in it.

    wait: wait for the other process instead
    The operating system locks the folder itself, so nothing is left behind, however the process ends.
    """
    if sys.platform == "win32":  # Windows cannot lock a folder
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"another process is at work in {folder}: wait, or choose another") from None
            say(f"another process is at work in {folder}: waiting for it", sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which releases the lock


# -- command line --------------------------------------------------------------------------------------------


def dataset_name(args):
    """The name of the folder in data/: --name, or that of the corpus or the first file. Raises UserError."""
    path = Path(os.path.realpath(args.what[0]))  # resolve() would raise another error for a loop of links
    stem = path.name if path.is_dir() else unpacked(path).stem
    # Characters that trouble a shell or a URL become "_".
    name = args.name or re.sub(r"[^\w.-]+", "_", stem)
    # train.py --dataset=verdict must mean the corpus, not your verdict.txt.
    if name in NAMES and args.what != [name]:
        raise UserError(f"{name} is the name of a corpus; choose another --name for your own text")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"give a --name of letters, digits, '_', '-' and '.', not {name!r}")
    return name


def prepare(args):
    """Do what the command line asks for. Raises UserError."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    what = args.what[0]
    if "" in (*args.what, args.tokenizer, args.name):
        raise UserError("a name or path is empty; is a variable of the shell not set?")
    if len(args.what) > 1 and set(args.what) & {*NAMES, *GPT2_SIZES.values()}:
        raise UserError("one corpus at a time, and no files beside it")
    # These are weights, not text.
    for name, size in GPT2_SIZES.items():
        if what in (name, size):
            prepare_gpt2(name, size)
            return fetch_gpt2_vocabulary()

    name = dataset_name(args)
    kind, file = CORPORA.get(what, ("char", None))
    kind = args.tokenizer or kind
    if args.vocab_size != BPE_VOCAB and kind != "bpe":
        say("--vocab_size is only for --tokenizer=bpe: here it changes nothing", sys.stderr)
    if not 257 <= args.vocab_size <= MAX_VOCAB:  # at least the 256 bytes and <|endoftext|>
        raise UserError("--vocab_size must lie between 257 and 65536")
    # These are token IDs already.
    if what == "fineweb":
        if not 1 <= args.shards <= 103 or kind != "gpt2":
            raise UserError("fineweb comes as GPT-2 token IDs, in 1 to 103 shards: see --help")
        prepare_fineweb(name, args.shards)
        return fetch_gpt2_vocabulary()

    with user_error(f"--encoding={args.encoding}"):
        "".encode(args.encoding)  # raises if there is no such encoding
        args.encoding = codecs.lookup(args.encoding).name  # utf-8, however it is spelled
    # The rest is text.
    if what == "pydocs":
        text = pydocs()
        documents = [[text]]
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        sources = [{"path": "pydoc_data.topics", "sha256": sha256}]
    elif file:
        url, sha256 = file
        documents = TextFiles([cached(url, sha256)])
        sources = [{"url": url, "sha256": sha256}]
    else:
        files = find_text_files(args.what, args.encoding)
        documents = TextFiles(files, args.errors, args.text_key, args.encoding)
        sources = [{"path": str(path), "sha256": file_sha256(path)} for path in files]
    write_dataset(name, documents, sources, kind, args.val_fraction, args.vocab_size)


def refuse(message):
    """What argparse calls for a mistake: one line, as for all others."""
    raise UserError(f"{message}; --help lists all options")


def main():
    # The docstring of this file begins the help.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = refuse
    add = parser.add_argument
    add(
        "what",
        nargs="*",
        default=["pydocs"],
        metavar="NAME|PATH",
        help=f"your own files, or one of {', '.join(NAMES)}",
    )
    add(
        "--tokenizer",
        help="char, word, gpt2, bpe, or whose to take: a dataset's folder, a checkpoint or a tokenizer.json; "
        "default: the corpus's, else char",
    )
    add("--vocab_size", type=int, default=BPE_VOCAB, help="entries of a bpe vocabulary (%(default)s)")
    add("--val_fraction", type=float, default=0.1, help="part of the text for validation (%(default)s)")
    add("--name", help="name of the folder in data/; default: the name of the corpus or of the first file")
    add("--shards", type=int, default=1, help="shards of fineweb, 100M tokens each (%(default)s)")
    add("--text_key", help="the key of the text in a record; default: text, unless it is a conversation")
    add("--encoding", default="utf-8", help="encoding of the text (%(default)s)")
    add("--errors", choices=["strict", "replace"], default="strict", help="what to do with undecodable bytes")
    speak_utf8()  # before --help or a mistake is printed
    on_ctrl_c(interrupt)
    # Every mistake ends here, in one line and an exit status of 1.
    try:
        return prepare(parser.parse_intermixed_args())  # options may stand between paths
    except UserError as error:
        reason = error
    except ImportError as error:
        reason = f"{error}; pip install {error.name}"
    except MemoryError:
        reason = "out of memory; nothing half-done is left"
    except OSError as error:
        reason = f"{error}; nothing half-done is left; if the disk is full, make room for it"
    except KeyboardInterrupt:
        reason = "interrupted; nothing half-done is left, run it again"
    say(f"prepare.py: {reason}", sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
