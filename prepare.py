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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError

# requests, tiktoken, torch and tensorflow are imported where they are used: train.py and sample.py
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
UNKNOWN = "<|unk|>"
MAX_VOCAB = 65536  # what uint16 can count

# Characters that are read, and tokenized, at a time: enough work for a thread, and little memory.
PIECE = 1_000_000
# The longest text without a space, the longest line of a .jsonl, and the longest .json, in characters.
LONGEST = 100 * PIECE
# Threads that tokenize. More than eight would wait for the one that reads.
THREADS = min(8, os.cpu_count() or 1)

# What is taken for text in a folder: the first is no suffix at all, as of README. A file that is named on the
# command line may be called anything.
SUFFIXES = (
    " .txt .md .rst .tex .org .log .csv .xml .html .css .json .jsonl .parquet .yaml .yml .toml .ini .sh "
    ".sql .py .c .h .cpp .hpp .java .kt .js .ts .go .rs .rb .php .swift"
).split(" ")


# -- errors --------------------------------------------------------------------------------------------------


@contextmanager
def user_error(message):
    """Turns whatever goes wrong inside the with block into a UserError that begins with the message.

    For what comes from outside: the packages that read it raise a dozen types of errors.
    """
    try:
        yield
    except (UserError, MemoryError):  # which say more already, or come from elsewhere
        raise
    except Exception as error:
        raise UserError(f"{message}: {' '.join(str(error).splitlines())}") from None


# -- downloads -----------------------------------------------------------------------------------------------
#
# Nothing else in this project asks the network. download() decides whether a file is the right one, fetch()
# where it comes from, and does not give up; fetch_once() is one request.


def download(url, path, sha256=None):
    """Fetch url to path unless it is there; path is whole or absent, whatever happens.

    The mirror PLAINGPT_MIRROR (a folder or an http(s) base that holds <host>/<path> of each URL) comes first.
    A broken transfer is resumed, now or by the next call, from path.part. Raises UserError.
    """
    path = Path(path)
    if path.is_file() and sha256 in (None, file_sha256(path)):
        return
    # It gets its name when it is complete: until then nobody takes it for the file.
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.parent, wait=True):  # another process may be fetching the same file
        # Twice, because what an earlier run left in path.part may be the beginning of another file.
        for _ in range(2):
            if path.is_file() and sha256 in (None, file_sha256(path)):
                return
            if part.is_symlink():
                part.unlink()  # or somebody's file would be written to
            fetch(url, part)
            version_file(part).unlink(missing_ok=True)
            if sha256 in (None, file_sha256(part)):
                part.replace(path)
                return
            part.unlink()
    raise UserError(f"{url} has changed or was damaged on the way: it has another sha256 than expected")


def fetch(url, part):
    """Append to part what it lacks of url, from the mirror or, where it fails, from there. Raises UserError."""
    import requests

    # A folder or a server of your own, for machines without a network, and for the tests.
    mirror = os.environ.get("PLAINGPT_MIRROR", "").rstrip("/")
    mirrored = f"{mirror}/{host_and_path(url)}"
    if os.path.isfile(mirrored):
        return shutil.copyfile(mirrored, part)
    for address in (mirrored, url) if "://" in mirror else (url,):
        for seconds in range(4):  # so many tries, because connections break
            time.sleep(seconds)  # not at all before the first
            try:
                return fetch_once(address, part)
            except requests.RequestException as error:
                reason = error
                if error.response is not None and 400 <= error.response.status_code < 416:
                    break  # the same question would have the same answer
    raise UserError(
        f"cannot download {url} ({reason}); put it as <host>/<path> into the folder that "
        "PLAINGPT_MIRROR names, or take the embedded corpus: python prepare.py pydocs"
    )


def fetch_once(url, part):
    """Append to part what it lacks of url, by one request. Raises requests.RequestException."""
    import requests

    # Compressed on the way, a range would count other bytes.
    headers = {"Accept-Encoding": "identity"}
    version = version_file(part)
    if part.exists():
        headers["Range"] = f"bytes={part.stat().st_size}-"
        if version.exists():  # the rest of the same version, or else all of the new one
            headers["If-Range"] = version.read_text()
    # Seconds to wait for the server's next bytes: a large file may take hours altogether.
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        # 206: what follows part. 200: the whole file, whatever we asked for. 416: nothing follows part, which
        # may be another file, so the next try begins anew.
        if response.status_code in (200, 416):
            part.unlink(missing_ok=True)
        response.raise_for_status()
        found = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if found:
            write_file(version, found.encode())
        # A server that streams does not say how much is to come: then only the checksum can tell.
        left = int(response.headers.get("Content-Length", 0))
        with open(part, "ab") as file, tqdm.wrapattr(file, "write", left, desc=part.stem) as watched:
            for chunk in response.iter_content(65536):
                watched.write(chunk)


def version_file(part):
    """Where the server's name for the version stands of which part is the beginning."""
    return part.with_name(f"{part.name}.version")


def cached(url, sha256=None):
    """The path of a downloaded file, fetched the first time. Raises UserError."""
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
    """What a tokenizer has. A subclass that stands in TOKENIZERS is a choice of --tokenizer.

    encode(text) -> list of token IDs, decode(IDs) -> text
    encode_array(text) -> the token IDs as uint16, (number of IDs,); several threads call it at the same time
    vocab_size: all IDs are below it
    end_of_text: the ID that ends a document, or None
    meta: what meta.json keeps of it: "type", its name in TOKENIZERS, and the arguments of its __init__

    A subclass has an encode or an encode_array of its own, and inherits the other.
    """

    end_of_text = None

    # Where the vocabulary comes from the text that is prepared: entries(text) are the strings that a text
    # needs in it, and from_entries(set of all entries, several) makes the tokenizer; several: there is more
    # than one document. None where the vocabulary is fixed.
    entries = None

    def byte_lengths(self):
        """Bytes of UTF-8 behind each ID, (vocab_size,), 0 of special ones; None where the text is not kept."""
        return None

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        return np.array(self.encode(text), "<u2")


class CharTokenizer(Tokenizer):
    """One ID a character, in sorted order; <|endoftext|> comes last where there are documents to end."""

    entries = set  # the characters of a text

    # Stands for <|endoftext|> while a text is encoded: half a surrogate pair, which no UTF-8 can hold.
    END = "\udfff"

    def __init__(self, chars):
        self.meta = {"type": "char", "chars": chars}
        self.chars = chars
        self.vocab_size = len(chars)
        if END_OF_TEXT in chars:
            self.end_of_text = chars.index(END_OF_TEXT)
        # The ID of each of Unicode's code points, or -1. With it, NumPy looks up a whole text in one call.
        self.table = np.full(0x110000, -1, np.int32)
        self.table[self.code_points("".join(chars))] = range(len(chars))

    @classmethod
    def from_entries(cls, entries, several):
        return cls(sorted(entries) + [END_OF_TEXT] * several)

    def code_points(self, text):
        """(characters,), of which <|endoftext|> is one, where the vocabulary has it."""
        if self.end_of_text is not None:
            text = text.replace(END_OF_TEXT, self.END)
        # UTF-32 is the code points themselves, 4 bytes each.
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")

    def encode_array(self, text):
        """Raises UserError, which names the first character that has no ID."""
        codes = self.code_points(text)
        ids = self.table[codes]  # (characters,)
        if ids.min(initial=0) < 0:
            code = codes[ids.argmin()]
            raise UserError(f"the character {chr(code)!r} (U+{code:04X}) is not in the vocabulary")
        return ids.astype("<u2")

    def decode(self, ids):
        return "".join(self.chars[i] for i in ids)

    def byte_lengths(self):
        return np.array([0 if char == END_OF_TEXT else len(char.encode()) for char in self.chars])


class WordTokenizer(Tokenizer):
    """One ID a word or punctuation mark; white space is not kept and unknown words become <|unk|>.

    The rule is that of Raschka, "Build a Large Language Model (From Scratch)", chapter 2.
    """

    # words(text): each "--", each punctuation mark, and each longest run of what is neither these nor white
    # space; a single "-" belongs to its run. The book splits at r'([,.?_!"()\']|--|\s)' and throws
    # away what is empty or white space. findall is quicker, and the tests compare the two.
    words = re.compile(r"""--|[,.?_!"()']|(?:[^\s,.?_!"()'-]+|-(?!-))+""").findall
    entries = words

    def __init__(self, vocab):
        self.meta = {"type": "word", "vocab": vocab}
        "".join(vocab)  # raises where one is no text
        self.vocab = vocab
        self.vocab_size = len(vocab)
        self.ids = {word: i for i, word in enumerate(vocab)}
        self.end_of_text = self.ids[END_OF_TEXT]

    @classmethod
    def from_entries(cls, entries, several=True):
        return cls(sorted(entries - {END_OF_TEXT, UNKNOWN}) + [END_OF_TEXT, UNKNOWN])

    def encode(self, text):
        text = text.replace(END_OF_TEXT, f" {END_OF_TEXT} ")  # a word of its own
        # Of the text that was prepared, every word is known; of a prompt, perhaps not.
        unknown = self.ids[UNKNOWN]
        return [self.ids.get(word, unknown) for word in self.words(text)]

    def decode(self, ids):
        text = " ".join(self.vocab[i] for i in ids)
        return re.sub(r"""\s+([,.?!"()'])""", r"\1", text)  # no space before a punctuation mark


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE (Radford et al. 2019, section 2.2), by tiktoken, from OpenAI's two files."""

    # 256 bytes, 50,000 merges, and <|endoftext|>.
    meta = {"type": "gpt2"}
    vocab_size = 50257
    end_of_text = 50256

    @cached_property
    def bpe(self):
        """tiktoken's encoding; its files are fetched when it is first used. Raises UserError."""
        from tiktoken import Encoding
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks
        from tiktoken_ext.openai_public import r50k_pat_str

        os.environ.setdefault("TIKTOKEN_CACHE_DIR", "")  # the two files are in our own cache
        ranks = data_gym_to_mergeable_bpe_ranks(str(cached(*VOCAB_BPE)), str(cached(*ENCODER_JSON)))
        return Encoding(
            "gpt2",
            pat_str=r50k_pat_str,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode_array(self, text):
        # Without Python's lists, which need the interpreter's lock, so that threads work side by side.
        bpe = self.bpe  # outside of the try: a failed download is a ValueError as well
        try:
            return bpe.encode_to_numpy(text, allowed_special="all").astype("<u2")
        except ValueError as error:
            # tiktoken's pattern gives up on some 500,000 white-space characters in a row: cut among them.
            space = re.search(r"\s{100000}(?=\s)", text)
            if not space:
                raise UserError(f"tiktoken cannot read the text: {error}") from None
            cut = space.end()
            return np.concatenate((self.encode_array(text[:cut]), self.encode_array(text[cut:])))

    def decode(self, ids):
        return self.bpe.decode(ids)

    def byte_lengths(self):
        return np.array([*map(len, map(self.bpe.decode_single_token_bytes, range(self.end_of_text))), 0])


class BPETokenizer(Tokenizer):
    """Any tokenizer.json of Hugging Face's, byte-level BPE above all, by their tokenizers package."""

    def __init__(self, json, end_of_text=None):
        """json: the file's content, a dict; end_of_text: its ID, where it is not that of <|endoftext|>."""
        from json import dumps  # json is the argument here, as meta.json names it

        from tokenizers import Tokenizer as AnyTokenizer

        self.meta = {"type": "bpe", "json": json}
        self.bpe = AnyTokenizer.from_str(dumps(json))
        # Not the number of tokens: a vocabulary may have holes.
        self.vocab_size = max(self.bpe.get_vocab().values()) + 1
        self.end_of_text = self.bpe.token_to_id(END_OF_TEXT)
        if end_of_text is not None:
            if self.bpe.id_to_token(end_of_text) is None:
                raise UserError(f"end-of-text has the ID {end_of_text!r:.20}, which the vocabulary lacks")
            # meta holds what was given, or loading it would make another tokenizer.
            self.meta["end_of_text"] = self.end_of_text = end_of_text

    @classmethod
    def trained(cls, texts, vocab_size):
        """A vocabulary of texts: the 256 bytes, <|endoftext|>, and merges within GPT-2's words.

        The same texts give the same vocabulary. Memory grows with the number of different words alone.
        """
        from tokenizers import Tokenizer as AnyTokenizer
        from tokenizers import models, trainers

        bpe = as_byte_level(AnyTokenizer(models.BPE()))
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=bpe.pre_tokenizer.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        # It takes 256 parts at a time, so large ones are cut where a word ends.
        cuts = re.compile(r"(?s).{,100000}\S(?=[ \n])|.+")
        bpe.train_from_iterator((part for text in texts for part in cuts.findall(text)), trainer)
        return cls(json.loads(bpe.to_str()))

    def encode(self, text):
        if text == END_OF_TEXT and self.end_of_text is not None:
            return [self.end_of_text]  # which another vocabulary may write as </s>
        # Of the package's ways the quickest, for it keeps no places in the text.
        return self.bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids):
        return self.bpe.decode(ids, skip_special_tokens=False)

    def byte_lengths(self):
        if "ByteLevel" not in str(self.bpe.decoder):
            return None
        lengths = np.zeros(self.vocab_size, int)
        for token, i in self.bpe.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)  # a character stands for each byte
        lengths[list(self.bpe.get_added_tokens_decoder())] = 0
        return lengths


def as_byte_level(bpe):
    """A BPE of the tokenizers package that cuts text into GPT-2's words, and these into bytes."""
    from tokenizers import decoders, pre_tokenizers

    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def as_hugging_face(tokenizer):
    """The same tokenizer as one of Hugging Face's tokenizers package. Raises UserError for words."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as AnyTokenizer

    if isinstance(tokenizer, BPETokenizer):
        return tokenizer.bpe
    if isinstance(tokenizer, GPT2Tokenizer):
        model = models.BPE.from_file(str(cached(*ENCODER_JSON)), str(cached(*VOCAB_BPE)))
        theirs = as_byte_level(AnyTokenizer(model))
    elif isinstance(tokenizer, CharTokenizer):
        theirs = AnyTokenizer(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}, "none"))
        theirs.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        theirs.decoder = decoders.Fuse()
    else:
        raise UserError("Hugging Face has no tokenizer that is equal to ours of words")
    if tokenizer.end_of_text is not None:
        theirs.add_special_tokens([END_OF_TEXT])
    return theirs


# What meta.json calls "type", and the choices of --tokenizer.
TOKENIZERS = {"char": CharTokenizer, "word": WordTokenizer, "gpt2": GPT2Tokenizer, "bpe": BPETokenizer}

# What meta.json says of GPT-2's IDs. A dataset without meta.json, of nanoGPT or others, is taken to have
# these.
GPT2_META = {"tokenizer": GPT2Tokenizer.meta, "vocab_size": GPT2Tokenizer.vocab_size}


def load_tokenizer(meta):
    """The tokenizer that a meta.json describes. Raises UserError."""
    with user_error("the tokenizer's description is damaged or unknown"):
        arguments = {**meta["tokenizer"]}  # a copy: meta is the caller's
        return TOKENIZERS[arguments.pop("type")](**arguments)


def tokenizer_of(name, checkpoint=None):
    """The tokenizer that belongs to weights, or to whatever else the name is of. Nobody guesses.

    name: the folder of a dataset, a folder or file with a tokenizer.json, or a checkpoint
    checkpoint: what load_checkpoint has read from it, if that has been done
    A checkpoint of ours says it itself; nanoGPT's has that of its dataset. Raises UserError.
    """
    path = Path(name).expanduser()
    if path.name == "tokenizer.json":
        path = path.parent
    if path.is_dir():
        return tokenizer_of_folder(path)
    if checkpoint is None:
        from model import load_checkpoint

        with user_error(f"--tokenizer={name}"):
            checkpoint = load_checkpoint(path)
    if "meta" in checkpoint:
        return load_tokenizer(checkpoint["meta"])
    # nanoGPT's says how many IDs there are, and names its dataset, which must have as many.
    size = checkpoint["model_args"]["vocab_size"]
    if size == 50304:
        size = 50257  # GPT-2's, which nanoGPT rounds up
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
            end_of_text = read_json(folder / "config.json").get("eos_token_id")
            if isinstance(end_of_text, list):  # of which the first is that of a text
                end_of_text = end_of_text[0]
            tokenizer = BPETokenizer(description, end_of_text)
        # With the tokens that were added to it, such as those of a chat: they make another vocabulary.
        vocab = tokenizer.bpe.get_vocab()  # {token: ID}
    else:
        vocab = read_json(folder / "vocab.json")
    # GPT-2's is recognized by its tokens, in the order of their IDs.
    tokens = "\n".join(sorted(vocab, key=vocab.get))
    sha256 = hashlib.sha256(tokens.encode()).hexdigest()
    if sha256 == "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f":
        return GPT2Tokenizer()
    if not description:
        raise UserError(f"{folder} has no tokenizer.json, so nothing says what its IDs mean: add its model's")
    return tokenizer


# -- documents -----------------------------------------------------------------------------------------------
#
#   documents   an iterable of documents, which is read twice
#   document    an iterable of pieces: a file, or a record of a .jsonl, .json or .parquet, or what
#               <|endoftext|> ends in them
#   piece       a str that ends where a word or its document does; of a file, about PIECE characters;
#               a Prompt, where it is read, but not learned
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

    Where there is no space for long, a piece grows until there is one. Raises UserError where there is none
    in LONGEST characters, for the memory would grow with it.
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
        if len(rest) > LONGEST:
            raise UserError(f"{file.name}: no space or newline in {LONGEST:,} characters")
        searched = len(rest) - 1  # the next block may begin with a space
    yield rest


def split_at_ends(pieces):
    """The documents of a text: <|endoftext|> ends one, and what holds white space alone is none."""
    # With the parentheses, split gives what it splits at as well.
    parts = (part for piece in pieces for part in re.split(r"(<\|endoftext\|>)", piece) if part)
    for is_end, document in groupby(parts, lambda part: part == END_OF_TEXT):
        first = next(document)
        # Its first part decides: a piece ends where a word does, so that only the last one can be blank.
        if not is_end and first.strip():
            yield chain([first], document)  # noqa: B031, it goes on after the first


def clean(text):
    """A prompt, or a string of JSON, as a file of this text is read. Raises UserError where it is none."""
    # NUL, or half a surrogate pair, which stands for a byte that is not UTF-8 as well.
    found = re.search("[\0\ud800-\udfff]", text)
    if found:
        raise UserError(f"{text!r:.40} is not UTF-8 text: it has {found[0]!r}")
    return re.sub("\r\n?", "\n", text.removeprefix("\N{BYTE ORDER MARK}"))


class Prompt(str):
    """A piece of a conversation that is read, and not learned."""


# How the messages of a conversation are written: after Taori et al. 2023, Stanford Alpaca. Answers are what
# follows, to an <|endoftext|>.
TEMPLATE = {"system": "{}\n\n", "user": "### Instruction:\n{}\n\n### Response:\n"}
# The same for Hugging Face's tools, in their language, Jinja.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% set text = message.content | trim %}"
    "{% if message.role == 'assistant' %}{{ text }}{{ eos_token }}"
    "{% elif message.role == 'system' %}{{ text }}\n\n"
    "{% else %}### Instruction:\n{{ text }}\n\n### Response:\n{% endif %}{% endfor %}"
)
# What an example of one question and its answer has instead of messages.
EXAMPLE = ("instruction", "input", "output")


def render(messages):
    """The pieces of a conversation: what is read as Prompts, and the answers, <|endoftext|> after each.

    messages: {"role": "system", "user" or "assistant", "content": text} each. Raises UserError.
    """
    pieces = []
    question = ""  # all that is read before an answer, in one piece, for a token may reach over its parts
    for message in messages:
        role, content = message["role"], clean(message["content"]).strip()
        if END_OF_TEXT in content:
            raise UserError(f"{END_OF_TEXT} cannot be part of a message, for it ends an answer")
        if role not in ("assistant", *TEMPLATE):
            raise UserError(f"{role!r:.40} is no role of a message")
        if role == "assistant":
            pieces += [Prompt(question), content, END_OF_TEXT]
            question = ""
        else:
            question += TEMPLATE[role].format(content)
    return [*pieces, Prompt(question)]


def answered(pieces):
    """The pieces of a conversation that ends with an answer, without its end, which every document gets."""
    *pieces, end, question = ["", *pieces]
    if end != END_OF_TEXT or question:
        raise UserError("the conversation does not end with an answer")
    return pieces


def as_messages(example):
    """The conversation of an example: its instruction, with its input if it has one, and its output."""
    question = example["instruction"]
    if example.get("input"):
        question += f"\n\n### Input:\n{example['input']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": example["output"]}]


def unpacked(path):
    """a.txt of a.txt, a.txt.gz and a.txt.zst."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path


def opener(path):
    """What opens a file as open() does, and unpacks it where it is .gz or .zst. Raises UserError."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open
    if suffix != ".zst":
        return open
    # Python has it from 3.14 on; backports.zstd is the same for those before.
    try:
        from compression import zstd
    except ImportError:
        with user_error(f"unpack {path}, or pip install backports.zstd"):
            from backports import zstd
    return zstd.open


class NotText(UserError):
    """A file that holds something else than text in UTF-8."""


def check_head(path, head):
    """Raises NotText where a file that begins with these bytes is no UTF-8 text."""
    # The beginning of a PDF, UTF-16's byte order mark, and control characters but for tabs, line ends, escapes
    # and separators.
    if not re.search(rb"\A(?:%PDF|\xff\xfe|\xfe\xff)|[\0-\x07\x0e-\x1a]", head):
        return
    problem = "it is not text"
    # Of the two bytes of a character of UTF-16, one is nearly always the same.
    few, many = sorted((len(set(head[::2])), len(set(head[1::2]))))
    if many > 3 * few or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        problem = "it looks like UTF-16; add --encoding=utf-16, or --encoding=utf-16-le or -be"
    raise NotText(f"{path}: {problem}")


@contextmanager
def open_text(path, errors="strict", encoding="utf-8"):
    """A text file, unpacked, to be read as str inside the with block. Raises UserError, there too.

    Line ends become newlines, and a byte order mark is dropped.
    """
    codec = "utf-8-sig" if encoding == "utf-8" else encoding  # -sig drops the mark
    # Damage shows only while the file is read, inside the with block: each kind of file has its own errors.
    damage = user_error(f"{path} is damaged")
    with opener(path)(path, "rt", encoding=codec, errors=errors) as file, damage:
        try:
            if encoding == "utf-8":
                check_head(path, file.buffer.read(4096))
                file.seek(0)
            yield file
        except UnicodeDecodeError as error:
            # error.object is the bytes that were being decoded: the last that have been read.
            at = file.buffer.tell() - len(error.object) + error.start
            byte = error.object[error.start]
            raise UserError(
                f"{path} is not {encoding.upper()}: byte {at} is {byte:#x}; "
                "name its --encoding, or --errors=replace goes on"
            ) from None


@dataclass
class TextFiles:
    """The documents of files, as often as they are asked for. Raises UserError."""

    files: list
    errors: str = "strict"
    text_key: str | None = None  # None: "text", where a record is no conversation
    encoding: str = "utf-8"

    def __iter__(self):
        # Another format is another branch here, and another suffix in SUFFIXES.
        for path in self.files:
            suffix = unpacked(path).suffix.lower()
            if suffix == ".jsonl":
                records = self.read_jsonl(path)
            elif suffix == ".parquet":
                records = read_parquet(path, {self.text_key or "text", "messages", *EXAMPLE})
            elif suffix == ".json" and self.is_array(path):
                records = self.read_json(path)
            else:
                yield from split_at_ends(self.read_text(path))
                continue
            for number, record in records:
                # Whatever is wrong with a record, its number helps most.
                try:
                    documents = self.documents_of(record)
                except Exception as error:
                    place = "line" if suffix == ".jsonl" else "record"
                    raise UserError(f"{path}, {place} {number}: {error}") from None
                yield from documents

    def read_text(self, path):
        """The pieces of a whole file. Raises UserError where a character is NUL, which no text has."""
        with open_text(path, self.errors, self.encoding) as file:
            at = 0
            for piece in whole_words(file):
                if "\0" in piece:
                    at += piece.index("\0")
                    raise UserError(f"{path} is not text: character {at} is NUL")
                at += len(piece)
                yield piece

    def read_jsonl(self, path):
        """(number, object) of each line that is not blank."""
        with open_text(path, self.errors, self.encoding) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
                if len(line) == LONGEST:
                    raise UserError(f"{path}, line {number} is longer than {LONGEST:,} characters")
                if line.strip():
                    with user_error(f"{path}, line {number}"):
                        record = json.loads(line)
                    yield number, record

    def is_array(self, path):
        """Whether a .json file is an array of objects. Another is text like any other."""
        with open_text(path, self.errors, self.encoding) as file:
            return re.match(r"\s*\[\s*[{\]]", file.read(1000))

    def read_json(self, path):
        """(number, object) of an array."""
        with open_text(path, self.errors, self.encoding) as file, user_error(f"{path} is damaged"):
            text = file.read(LONGEST)
            if len(text) == LONGEST:
                raise UserError(f"{path} is longer than {LONGEST:,} characters: make a .jsonl of it")
            yield from enumerate(json.loads(text), 1)

    def documents_of(self, record):
        """The documents of a record: its conversation, or those of its text. Raises ValueError."""
        try:
            # A table has None where a row lacks something.
            record = {key: value for key, value in record.items() if value is not None}
            if "instruction" in record and self.text_key is None:
                record["messages"] = as_messages(record)
            if "messages" in record and self.text_key is None:
                return [answered(render(record["messages"]))]
            text = record[self.text_key or "text"].encode("utf-8", self.errors).decode()
            return split_at_ends([clean(text)])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"no text under --text_key, and no conversation: {error!r}") from None


def read_parquet(path, columns):
    """(number, {column: value}) of each row, with those of the columns that there are. Raises UserError."""
    with user_error(f"{path} cannot be read"):
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        batches = file.iter_batches(1000, columns=sorted(columns & {*file.schema_arrow.names}))
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from enumerate(rows, 1)


def find_text_files(paths, encoding):
    """The files, and the text files of the folders, in sorted order, each once; says what was left out.

    Names that begin with a dot are passed over. Raises UserError where a path does not exist, or where there
    is no text file.
    """
    # {what the path leads to in the end: path}: links may lead to a file that is there already.
    found = {}
    left_out = 0
    for path in map(Path, paths):
        if path.is_file():
            found[path.resolve()] = path  # asked for by name, so it is text
        elif (path / "meta.json").exists():
            raise UserError(f"{path} is a prepared dataset, not text")
        elif path.is_dir():
            for file in walk(path):
                if file.is_file() and is_text(file, encoding):
                    found[file.resolve()] = file
                else:
                    left_out += 1
        else:
            # A pipe would be empty at the second reading.
            near = difflib.get_close_matches(str(path), NAMES, 1) or NAMES
            raise UserError(
                f"{path} is neither a folder nor a file that can be read twice; "
                f"did you mean {', '.join(near)}?"
            )
    if not found:
        raise UserError("no text file in the folder; a file that you name is taken as it is")
    if left_out:
        say(f"{left_out:,} files are not text, or are links to folders", sys.stdout)
    return found.values()


def walk(folder):
    """The files in a folder and its folders, links to folders, and whatever else there is, in sorted order.

    The same folder gives the same order on every system. Raises UserError where one cannot be read.
    """
    with user_error(f"{folder} cannot be read"):
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir() and not path.is_symlink():
                yield from walk(path)
            else:
                yield path


def is_text(path, encoding):
    """Whether a file of a folder is named as text is, and begins as text does. Raises UserError."""
    suffix = unpacked(path).suffix.lower()
    if suffix not in SUFFIXES:
        return False
    if suffix == ".parquet":  # whose rows hold text, though its bytes are none
        return True
    try:
        with open_text(path, encoding=encoding):
            return True
    except NotText:
        return False


def pydocs():
    """The reference of the Python language, which every CPython has for help(): half a million characters."""
    from pydoc_data.topics import topics

    # Sorted, so that the text does not depend on the order in which Python lists its topics.
    return "\n".join(topics[name].strip() + "\n" for name in sorted(topics))


# -- token IDs -----------------------------------------------------------------------------------------------
#
#   documents -> split_documents -> ("train" or "val", text) -> batches -> lists of them
#             -> encode_batches, in threads -> ("train" or "val", token IDs) -> write_bins


def split_documents(documents, count, characters, val_fraction, ends=True):
    """("train" or "val", text), in order, of count documents that have so many characters altogether.

    One document is cut: its first characters train. Of many, each goes whole to one side, and <|endoftext|>
    follows it, where the vocabulary has it: the last of every 1 / val_fraction validates, and one at least.
    """
    to_train = int(characters * (1 - val_fraction))  # of one document: characters that still go to train.bin
    for i, document in enumerate(documents, 1):
        if count == 1:
            for piece in document:
                yield "train", piece[:to_train]
                yield "val", piece[to_train:]
                to_train = max(0, to_train - len(piece))
            return
        # How many validate of those so far, this one included: of all of them, one at least.
        wanted = max(int(i * val_fraction), i == count)
        split = "val" if wanted > int((i - 1) * val_fraction) else "train"
        for piece in document:
            yield split, piece
        if ends:
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


def encode_batches(batches, tokenizer, masked=False):
    """("train" or "val", token IDs) of each text, in order. Raises UserError.

    masked: after them ("train_mask" or "val_mask", a uint8 for each ID, 1 where it is to be learned)
    Threads encode while this one reads and writes. They are only a few batches ahead, to bound the memory.
    """

    def encode_batch(batch):
        encoded = []
        for split, text in batch:
            ids = tokenizer.encode_array(text)
            encoded.append((split, ids))
            if masked:
                learned = not isinstance(text, Prompt)
                encoded.append((f"{split}_mask", np.full(len(ids), learned, "u1")))
        return encoded

    # Threads suffice, without processes: tiktoken and NumPy work outside of Python's lock.
    under_way = []
    pool = ThreadPoolExecutor(THREADS)
    try:
        for batch in batches:
            under_way.append(pool.submit(encode_batch, batch))
            if len(under_way) > 2 * THREADS:
                yield from under_way.pop(0).result()
        for encoded in under_way:
            yield from encoded.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what has not begun need not be done


# -- datasets ------------------------------------------------------------------------------------------------

# All that we write into data/<name>/. A folder that holds anything else is somebody's, and is not replaced.
DATASET_FILES = {"train.bin", "val.bin", "train_mask.bin", "val_mask.bin", "meta.json", "ckpt.pt"}


def write_file(path, content):
    """Write a file so that path is the complete old file or the complete new one at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(f"{path}.partial")
    try:
        partial.unlink(missing_ok=True)  # what a kill left, or a link to somebody's file
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # onto the disk, before it gets its name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # where that has failed


def read_json(path):
    """The object in a JSON file; an empty one where there is no such file. Raises UserError."""
    if not path.is_file():
        return {}
    with user_error(f"{path} is damaged, or no JSON object"):
        return {**json.loads(path.read_bytes())}


def load_dataset(name, block_size, vocab_size=None, check_ids=True):
    """Token IDs of data/<name>/train.bin and val.bin, memory-mapped, meta.json and the tokenizer.

    vocab_size: of the model that is to read them, where it is not the dataset's
    check_ids: whether to read all of them, for one that is beyond it
    Raises UserError.
    """
    name = Path(name).name  # of data/mine too
    folder = Path("data", name)
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
    vocab_size = vocab_size or meta["vocab_size"]
    splits = []
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        size = path.stat().st_size
        tokens = meta.get(f"{split}_tokens", size // 2)
        # A window is block_size tokens, and the one that follows them.
        if tokens != size / 2 or tokens <= block_size:
            raise UserError(
                f"{path} is truncated, or {tokens} tokens are too few for {block_size=}: prepare it anew"
            )
        data = np.memmap(path, "<u2", "r")  # (tokens,), read when it is used
        # Where nothing says their size: IDs of four bytes or eight, read as two, are 0 every second time.
        dtype = meta.get("dtype")
        if dtype != "uint16" and (dtype or not data[1:100_000:2].any()):
            raise UserError(f"{path} does not hold uint16 token IDs; prepare its text here")
        if check_ids and data.max() >= vocab_size:  # it would crash a GPU without a word
            raise UserError(f"{path} has the ID {data.max()}, which is beyond the vocabulary")
        splits.append(data)
    return *splits, meta, tokenizer


def load_mask(name, split, data):
    """The mask of data/<name>/<split>.bin: a uint8 for each ID, 1 where it is to be learned, as all are
    where there is no mask.

    data: the IDs, as load_dataset returns them. Raises UserError.
    """
    path = Path("data", Path(name).name, f"{split}_mask.bin")
    if not path.exists():
        return np.broadcast_to(np.uint8(1), len(data))  # which takes no memory
    if path.stat().st_size != len(data):
        raise UserError(f"{path} does not belong to {split}.bin: prepare both anew")
    return np.memmap(path, "u1", "r")


@contextmanager
def new_folder(name, tokenizer, sources):
    """(a folder to fill, what its meta.json is to hold), inside the with block.

    It becomes data/<name>/ when all is done; until then that is the old one, or none.
    tokenizer: has meta and vocab_size
    sources: {"url" or "path": where the content is from, "sha256": ...} each
    Raises UserError where data/<name>/ holds anything that is not ours.
    """
    folder = Path("data", name).resolve()  # where a link points to, which stays as it is
    new = folder.with_name(f".{name}.new")
    old = folder.with_name(f".{name}.old")
    if folder.exists():
        found = set(os.listdir(folder))
        # What we write has a meta.json: a train.bin alone is another program's. An empty folder is nobody's.
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
            shutil.rmtree(old, ignore_errors=True)
            yield new, meta
            (new / "meta.json").write_text(json.dumps(meta, indent=1))
            # A folder cannot be renamed to one that holds files, so the old one makes room first.
            if folder.exists():
                say(f"data/{name} is replaced", sys.stderr)
                folder.rename(old)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def bytes_per_token(meta, tokenizer, ids):
    """Bytes of UTF-8 behind a validation token, by which losses of tokenizers compare; None if unknown.

    meta: says it for what prepare.py has tokenized; else the ids themselves do
    """
    if "train_learned" in meta:  # a loss of the answers alone compares with no other
        return None
    counted = meta.get("val_bytes")
    if not isinstance(counted, int):
        lengths = tokenizer.byte_lengths()
        if lengths is None:
            return None
        counted = sum(lengths[part].sum() for part in np.array_split(ids, len(ids) // PIECE + 1))
    return counted / len(ids)


def write_bins(name, arrays, tokenizer, sources, lengths=None):
    """Write data/<name>/, say how it is split, and return how many token IDs it holds. Raises UserError.

    arrays: ("train" or "val", array of uint16 token IDs), in order, and masks, as encode_batches gives them
    tokenizer, sources: as in new_folder
    lengths: bytes of each token ID, if meta.json is to count them
    """
    sizes = dict.fromkeys(("train", "val"), 0)  # {file: how many numbers it has}
    learned = 0
    with new_folder(name, tokenizer, sources) as (folder, meta), ExitStack() as stack:
        files = {}
        for split, array in arrays:
            if split not in files:
                files[split] = stack.enter_context(open(folder / f"{split}.bin", "wb"))
            files[split].write(array)
            sizes[split] = sizes.get(split, 0) + len(array)
            if split == "train_mask":
                learned += int(array.sum())
            elif lengths is not None and split in ("train", "val"):
                key = f"{split}_bytes"
                meta[key] = meta.get(key, 0) + int(lengths[array].sum())
        # train.py draws windows of both.
        if 0 in sizes.values():
            raise UserError("train.bin or val.bin would be empty; give more text or another --val_fraction")
        meta |= {"train_tokens": sizes["train"], "val_tokens": sizes["val"]}
        if learned:
            meta["train_learned"] = learned  # of the tokens

    tokens = sizes["train"] + sizes["val"]
    say(
        f"data/{name}: {sizes['train']:,} train ({sizes['train'] / tokens:.1%}) and "
        f"{sizes['val']:,} validation tokens ({sizes['val'] / tokens:.1%})",
        sys.stdout,
    )
    if learned:
        say(f"{learned:,} of the training tokens are learned, the others are read alone", sys.stdout)
    return tokens


def write_dataset(name, documents, sources, kind, val_fraction=0.1, vocab_size=4096):
    """Tokenize documents, read twice, into data/<name>/, whole or absent at any time. Raises UserError.

    sources: as in new_folder
    kind: a name in TOKENIZERS, or what tokenizer_of takes
    vocab_size: of bpe, which reads the training text once more to learn so many entries
    """
    entries_of = TOKENIZERS.get(kind, Tokenizer).entries
    if kind != "bpe" and not entries_of:
        if kind in TOKENIZERS:
            tokenizer = load_tokenizer({"tokenizer": {"type": kind}})
        else:
            tokenizer = tokenizer_of(kind)
        # Fetches its files, which may fail, before the text is read, and before several threads want them.
        tokenizer.encode("")
    # First reading: a character tokenizer needs all characters, a split needs to know where nine tenths are.
    count = 0
    characters = 0
    entries = set()
    masked = False
    for document in tqdm(documents, "documents", disable=None):  # None: a bar on a terminal alone
        count += 1
        for piece in document:
            characters += len(piece)
            masked |= isinstance(piece, Prompt)
            # Where there are too many already, more of them would only fill the memory.
            if entries_of and len(entries) <= MAX_VOCAB and piece != END_OF_TEXT:
                entries.update(entries_of(piece))
    if count == 0:
        raise UserError(f"there is no text to make data/{name} of")
    if masked and count == 1:
        raise UserError(f"a single conversation cannot be cut in two: data/{name} needs several")
    if entries_of:
        tokenizer = TOKENIZERS[kind].from_entries(entries, count > 1)
    if kind == "bpe":
        texts = split_documents(documents, count, characters, val_fraction, ends=False)
        learned_from = (text for split, text in texts if split == "train" and text != END_OF_TEXT)
        tokenizer = BPETokenizer.trained(learned_from, vocab_size)
    if tokenizer.vocab_size > MAX_VOCAB:
        raise UserError("a vocabulary of over 65536 entries; try --tokenizer=gpt2")
    ends = tokenizer.end_of_text is not None
    if masked and not ends:
        raise UserError("this vocabulary has no end-of-text, by which an answer ends")
    # Second reading, in which a text knows its side. All of these are generators: nothing is read before
    # write_bins asks for it.
    texts = split_documents(documents, count, characters, val_fraction, ends)
    progress = tqdm(batches(texts), "tokenizing", characters // PIECE + 1, unit="M chars", disable=None)
    arrays = encode_batches(progress, tokenizer, masked)
    tokens = write_bins(name, arrays, tokenizer, sources, tokenizer.byte_lengths())
    say(f"{count:,} documents, {characters:,} characters, {characters / tokens:.2f} a token", sys.stdout)


def prepare_fineweb(name, shards):
    """FineWeb's first shards of 100M GPT-2 IDs, and one to validate, into data/<name>/. Raises UserError."""
    sources = []
    ids = []
    for i in [*range(1, shards + 1), 0]:
        split = "train" if i else "val"
        url = FINEWEB_URL.format(split, i)
        path = cached(url)
        tokens = (path.stat().st_size - FINEWEB_HEADER) / 2
        if np.fromfile(path, "<i4", 3).tolist() != [FINEWEB_MAGIC, 1, tokens]:
            path.unlink()  # the next run downloads it again
            raise UserError(f"{url} came as something else than a shard of token IDs; run it again")
        sources.append({"url": url, "sha256": file_sha256(path)})
        # On the disk until it is written: a hundred shards would not fit into memory.
        ids.append((split, np.memmap(path, "<u2", "r", FINEWEB_HEADER)))
    write_bins(name, ids, GPT2Tokenizer, sources)


# -- OpenAI's weights ----------------------------------------------------------------------------------------


def prepare_gpt2(name, size):
    """OpenAI's checkpoint -> data/<name>/ckpt.pt and meta.json. size: OpenAI's name of it, such as 124M.

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
        sources.append({"url": url, "sha256": file_sha256(path)})
    # TensorFlow wants all files of a checkpoint in one folder, as they are at OpenAI's.
    weights, model_args = read_gpt2(path.parent)
    with new_folder(name, GPT2Tokenizer, sources) as (folder, meta):
        with user_error(f"cannot write {checkpoint}, is the disk full?"):
            torch.save({"model": weights, "model_args": model_args, "meta": meta}, folder / "ckpt.pt")
    shutil.rmtree(path.parent)  # as large again, and no longer needed
    say(f"{checkpoint} is ready for --init_from={name}", sys.stdout)


def read_gpt2(folder):
    """The weights of a GPT-2 that TensorFlow saved, by our names, and its model_args. Raises UserError."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow prints a lot
    with user_error("OpenAI's files are TensorFlow's; install it: pip install tensorflow"):
        import tensorflow as tf
    import torch

    from model import GPT

    weights = {}
    with user_error(f"{folder} is no GPT-2, or damaged; delete it and try again"):
        # n_layer, n_head and n_embd have the same names.
        model_args = json.loads((folder / "hparams.json").read_text())
        model_args["block_size"] = model_args.pop("n_ctx")
        model_args["vocab_size"] = model_args.pop("n_vocab")
        reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
        # One at a time, so that the largest size needs its memory once.
        for name in reader.get_variable_to_shape_map():
            tensor = torch.from_numpy(reader.get_tensor(name))
            if name.endswith("/w"):
                tensor = tensor[0].T.contiguous()  # a convolution of width 1: (1, in, out) -> (out, in)
            for theirs, ours in GPT2_RENAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # GPT-2 ties the two
        # Raises where a name or shape differs.
        GPT.from_checkpoint({"model": weights, "model_args": model_args})
    return weights, model_args


def weights_path(init_from):
    """The checkpoint that init_from names: GPT-2's weights, or a path as it is. Raises UserError."""
    if init_from not in GPT2_SIZES:
        return init_from
    path = f"data/{init_from}/ckpt.pt"
    if not Path(path).exists():
        raise UserError(f"{path} is not there; run: python prepare.py {init_from}")
    return path


# -- the machine ---------------------------------------------------------------------------------------------


def speak_utf8():
    """Let the standard streams be UTF-8 everywhere; what is none is spelled out, and ends no run."""
    for name in ("stdin", "stdout", "stderr"):
        # None where it is closed; a file that is opened would take its place, and what is printed
        stream = getattr(sys, name) or open(os.devnull, "r+")
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
        setattr(sys, name, stream)


def say(line, stream):
    """Write a line, above a progress bar. A stream that fails is given up: what is printed ends no run."""
    try:
        tqdm.write(visible(line, stream), stream)
        stream.flush()
    except OSError:  # a full disk, a closed terminal, or nobody reads any more
        give_up(stream)


def give_up(stream):
    """What is written to a stream from here on goes nowhere, so that Python's last flush cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def visible(text, stream):
    """The text for a stream; a terminal gets control characters spelled out, for it would obey them."""
    if not stream.isatty():
        return text
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


@contextmanager
def lock(folder, wait=False):
    """Keep other processes out of a folder inside the with block. Raises UserError where one is in it.

    wait: until that one has ended, instead of an error
    A lock of the system's on what is there anyway: it leaves nothing behind, however the process ends.
    """
    if sys.platform == "win32":  # which cannot lock a folder
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process is at work in {folder}: wait, or choose another") from None
        yield
    finally:
        os.close(handle)


# -- command line --------------------------------------------------------------------------------------------


def dataset_name(args):
    """The folder in data/: --name, or that of the corpus or the first file. Raises UserError."""
    stem = unpacked(Path(args.what[0])).resolve().stem
    # What a shell or a URL would trip over becomes "_".
    name = args.name or re.sub(r"[^\w.-]+", "_", stem)
    # train.py --dataset=verdict is to mean the corpus, not somebody's verdict.txt.
    if name in NAMES and args.what != [name]:
        raise UserError(f"{name} is the name of a corpus; choose another --name for your own text")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name={name} is no folder name: letters, digits, '_', '-' and '.' only")
    return name


def prepare(args):
    """Do what the command line asks for, and say what was done. Raises UserError."""
    if not 0 < args.val_fraction < 1:
        raise UserError(f"--val_fraction must lie between 0 and 1, not {args.val_fraction}")
    if not 257 <= args.vocab_size <= MAX_VOCAB:  # the bytes and <|endoftext|> at least
        raise UserError(f"--vocab_size must lie between 257 and {MAX_VOCAB}, not {args.vocab_size}")
    what = args.what[0]
    if len(args.what) > 1 and set(args.what) & set(NAMES):
        raise UserError("one corpus at a time, and no files beside it")
    # Weights, not text.
    for name, size in GPT2_SIZES.items():
        if what in (name, size):
            return prepare_gpt2(name, size)

    # Token IDs, not text: there is nothing to tokenize.
    name = dataset_name(args)
    kind, file = CORPORA.get(what, ("char", None))
    kind = args.tokenizer or kind
    if what == "fineweb":
        if not 1 <= args.shards <= 103 or kind != "gpt2":
            raise UserError("fineweb comes as GPT-2 token IDs, in 1 to 103 shards: see --help")
        return prepare_fineweb(name, args.shards)

    with user_error(f"--encoding={args.encoding}"):
        codecs.lookup(args.encoding)
    # Text: what its documents are, and where they are from.
    if what == "pydocs":
        text = pydocs()
        documents = [[text]]
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        sources = [{"path": f"pydoc_data.topics of Python {sys.version.split()[0]}", "sha256": sha256}]
    elif file:
        url, sha256 = file
        documents = TextFiles([cached(url, sha256)])
        sources = [{"url": url, "sha256": sha256}]
    else:
        files = find_text_files(args.what, args.encoding)
        documents = TextFiles(files, args.errors, args.text_key, args.encoding)
        sources = [{"path": str(path), "sha256": file_sha256(path)} for path in files]
    write_dataset(name, documents, sources, kind, args.val_fraction, args.vocab_size)


def interrupt(_number, _frame):
    """The first Ctrl-C ends the program; cleaning up takes a moment, which no other may interrupt."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"NAME: {', '.join(NAMES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="*", default=["pydocs"], metavar="NAME|PATH", help="a corpus, or your own files")
    add(
        "--tokenizer",
        help="char, word, gpt2, bpe, or whose to take: a folder or a checkpoint; default: the corpus's",
    )
    add("--vocab_size", type=int, default=4096, help="entries of bpe, trained on the text (%(default)s)")
    add("--val_fraction", type=float, default=0.1, help="share of the text that validates (%(default)s)")
    add("--name", help="the folder in data/; default: the corpus's or the first file's name")
    add("--shards", type=int, default=1, help="of fineweb, 100M tokens each (%(default)s)")
    add("--text_key", help="what a record calls its text (text, where it is no conversation)")
    add("--encoding", default="utf-8", help="of the text (%(default)s)")
    add("--errors", choices=["strict", "replace"], default="strict", help="where text is of another encoding")
    speak_utf8()
    signal.signal(signal.SIGINT, interrupt)
    # Every mistake travels to here, and ends in one line and an exit status of 1.
    try:
        prepare(parser.parse_args())
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
    except MemoryError:
        sys.exit("prepare.py: out of memory; nothing half-done is left")
    except OSError as error:
        sys.exit(f"prepare.py: {error}; nothing half-done is left; if the disk is full, make room for it")
    except KeyboardInterrupt:
        sys.exit("prepare.py: interrupted; nothing half-done is left, run it again")


if __name__ == "__main__":
    main()
