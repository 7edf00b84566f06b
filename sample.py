"""Generate text from a checkpoint. The text alone goes to standard output, as it is generated.

python sample.py --out_dir=out/quickstart --start="The for statement"
python sample.py --init_from=out/quickstart/ckpt.pt --start=FILE:prompt.txt --num_samples=3 --temperature=0
python sample.py --init_from=gpt2 --start="The capital of France is" --show_probs=True
"""

import signal
from typing import Literal

from configurator import configure

out_dir = "out"  # a run of train.py
init_from = "resume"  # resume (out_dir's best.pt, else ckpt.pt), gpt2 and its sizes, or a checkpoint
start = "\n"  # the prompt; FILE:path, the text of a file; -, each line of standard input
num_samples = 1  # how many of a prompt, generated together
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1 more of what is likely, above 1 more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among so many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest that have this probability together; None: all
stop: str | None = None  # end a sample where it has generated this text; end-of-text always ends it
show_probs = False  # instead of a text: a table of the likeliest next tokens at several temperatures
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = "auto"  # torch.compile; auto: no, it takes longer than a sample

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from model import GPT, load_checkpoint, next_token_probs, pick_device
from prepare import DataError, Tokenizer, load_tokenizer, weights_path


def text_stream(
    tokenizer: Tokenizer, ids: Iterable[int], prompt: list[int], stop: str | None
) -> Iterator[str]:
    """The text of token IDs as they come after a prompt, up to a stop text or end-of-text.

    Never half a UTF-8 character: bytes wait for the rest of theirs, as does what may be the start of stop.
    """
    held, waiting = prompt[-1:], ""
    shown = tokenizer.decode(held)
    for token in ids:
        if token == tokenizer.end_of_text:
            break
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        waiting += text[len(shown) :]
        held = held[-1:]  # a word tokenizer needs it to join the next word
        shown = tokenizer.decode(held)
        if stop and stop in waiting:
            yield waiting[: waiting.index(stop)]
            return
        keep = max((n for n in range(1, len(stop or "")) if waiting.endswith(stop[:n])), default=0)
        yield waiting[: len(waiting) - keep]
        waiting = waiting[len(waiting) - keep :]
    waiting += tokenizer.decode(held)[len(shown) :]
    yield waiting.split(stop)[0] if stop else waiting


def find_meta(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What describes a checkpoint's tokenizer: itself; of nanoGPT, its dataset; else GPT-2's if that fits."""
    if "meta" in checkpoint:
        return checkpoint["meta"]
    dataset = checkpoint.get("config", {}).get("dataset")
    path = Path("data", str(dataset), "meta.json")
    if dataset and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if checkpoint["model_args"]["vocab_size"] < 50257:
        hint = f"; prepare its dataset, for {path}" if dataset else ", and its vocabulary is not GPT-2's"
        raise ValueError(f"the checkpoint does not hold its tokenizer{hint}")
    return {"tokenizer": {"type": "gpt2"}}


def prompts() -> Iterator[str]:
    """The one that start is, that of a file, or, for "-", each line of standard input."""
    if start == "-":
        while True:
            print("> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.readline()):
                return
            yield line.rstrip("\n")
    yield Path(start[5:]).read_text(encoding="utf-8") if start.startswith("FILE:") else start


def encode_prompt(model: GPT, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's last block_size token IDs, or end-of-text where there are none. Raises DataError."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]
    if len(ids) > (longest := model.config.block_size):
        print(f"the prompt is cropped to its last {longest} of {len(ids)} tokens", file=sys.stderr)
    return ids[-longest:]


@torch.no_grad()
def print_probs(model: GPT, tokenizer: Tokenizer, prompt: str, device: str) -> None:
    """Print what may come after a prompt: the ten likeliest tokens, their probabilities, and bars."""
    idx = torch.tensor([encode_prompt(model, tokenizer, prompt)], device=device)
    logits = model(idx)[0][:, -1, : tokenizer.vocab_size]  # (1, V)
    temperatures = (0.5, 1.0, 1.5)
    probs = [next_token_probs(logits, t)[0][0] for t in temperatures]  # 3 x (V,)
    print("".join(f"temperature {t:<18}" for t in temperatures) + "next token")
    for token in logits[0].topk(min(10, logits.size(-1))).indices.tolist():
        columns = (f"{p[token]:6.1%} {'█' * round(20 * p[token].item()):22}" for p in probs)
        print(f"{' '.join(columns)} {tokenizer.decode([token])!r}")


def complete(model: GPT, tokenizer: Tokenizer, prompt: str, generator: torch.Generator) -> None:
    """Print num_samples continuations of a prompt, made as one batch, the first as it comes; or DataError."""
    ids = encode_prompt(model, tokenizer, prompt)
    idx = torch.tensor([ids] * num_samples, device=generator.device)
    options = (temperature, top_k, top_p, generator, tokenizer.end_of_text, tokenizer.vocab_size)
    rows: list[list[int]] = [[] for _ in range(num_samples)]

    def first_row() -> Iterator[int]:
        for tokens in model.generate_stream(idx, max_new_tokens, *options):
            for row, token in zip(rows, tokens[:, 0].tolist(), strict=True):
                row.append(token)
            yield rows[0][-1]

    started = time.perf_counter()
    print(prompt, end="", file=sys.stderr, flush=True)
    stream = first_row()
    for text in text_stream(tokenizer, stream, ids, stop):
        print(text, end="", flush=True)
    print(flush=True)
    if num_samples > 1:
        for _ in stream:  # the others may go on where the first has ended
            if stop and all(tokenizer.end_of_text in row or stop in tokenizer.decode(row) for row in rows):
                break
    seconds = time.perf_counter() - started
    for row in rows[1:]:
        print(f"---\n{prompt}", end="", file=sys.stderr, flush=True)
        print("".join(text_stream(tokenizer, row, ids, stop)), flush=True)
    count = sum(map(len, rows))
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def main() -> None:
    for name, least in (("num_samples", 1), ("max_new_tokens", 0), ("temperature", 0), ("seed", 0)):
        if not least <= globals()[name] < 2**63:
            sys.exit(f"sample.py: {name} cannot be {globals()[name]}")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        sys.exit("sample.py: top_k must be at least 1, and top_p above 0 and at most 1")
    try:
        use_device, use_dtype = pick_device(device, dtype)
        path = weights_path(init_from)
        if init_from == "resume":
            best, latest = Path(out_dir, "best.pt"), Path(out_dir, "ckpt.pt")
            path = str(latest if latest.exists() and not best.exists() else best)
            if not Path(path).exists():
                raise ValueError(f"there is no {path}; train a run first, or name one by --out_dir")
        checkpoint = load_checkpoint(path)
        model = GPT.from_state(checkpoint)
        tokenizer = load_tokenizer(find_meta(checkpoint))
        if tokenizer.vocab_size > (size := model.config.vocab_size):
            raise ValueError(f"the model's vocabulary of {size} is not that of its tokenizer")
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    model.eval().to(use_device, getattr(torch, use_dtype))
    model.optimize_for_generation(compile is True)
    generator = torch.Generator(use_device).manual_seed(seed)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        for prompt in prompts():
            try:
                if show_probs:
                    print_probs(model, tokenizer, prompt, use_device)
                else:
                    complete(model, tokenizer, prompt, generator)
            except DataError as error:
                if start != "-":
                    sys.exit(f"sample.py: {error}; choose another --start than {prompt!r:.40}")
                print(error, file=sys.stderr)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, UnicodeDecodeError) as error:
        what = "the prompt is not UTF-8: " if isinstance(error, UnicodeDecodeError) else ""
        sys.exit(f"sample.py: {what}{error}")


if __name__ == "__main__":
    main()
