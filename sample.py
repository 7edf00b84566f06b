"""Generate text from a checkpoint. The text alone goes to standard output, as it is generated.

python sample.py --out_dir=out/quickstart --start="The for statement"
python sample.py --init_from=out/quickstart/ckpt.pt --start=FILE:prompt.txt --num_samples=3 --temperature=0
"""

from typing import Literal

from configurator import configure

out_dir = "out"  # a run of train.py
init_from = "resume"  # resume: out_dir's best.pt, else its ckpt.pt; or the path of a checkpoint
start = "\n"  # the prompt, or FILE:path of one
num_samples = 1  # how many, one after the other
max_new_tokens = 500  # tokens in each
temperature = 0.8  # below 1 more of what is likely, above 1 more variety; 0: always the likeliest token
top_k: int | None = 200  # choose among so many likeliest tokens; None: all
top_p: float | None = None  # choose among the likeliest that have this probability together; None: all
stop: str | None = None  # end a sample where it has generated this text; end-of-text always ends it
seed = 1337  # the same seed, the same text
device = "auto"  # cpu, cuda, cuda:1, mps; auto: the best there is
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on a GPU that has it
compile: Literal["auto", True, False] = (
    "auto"  # torch.compile; auto: no, the compiler takes longer than a sample
)

if __name__ == "__main__":
    configure(globals())  # before the slow imports: --help and a mistyped key answer at once

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from model import GPT, load_checkpoint, pick_device
from prepare import DataError, Tokenizer, load_tokenizer


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
    yield waiting + tokenizer.decode(held)[len(shown) :]


def main() -> None:
    path = init_from
    if init_from == "resume":
        path = next(
            (p for p in (f"{out_dir}/best.pt", f"{out_dir}/ckpt.pt") if Path(p).exists()),
            f"{out_dir}/best.pt",
        )
    for name in ("num_samples", "max_new_tokens", "temperature", "seed"):
        if globals()[name] < 0:
            sys.exit(f"sample.py: {name} cannot be negative")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        sys.exit("sample.py: top_k must be at least 1, and top_p above 0 and at most 1")
    try:
        use_device, use_dtype = pick_device(device, dtype)
        checkpoint = load_checkpoint(path)
        tokenizer = load_tokenizer(checkpoint.get("meta", {"tokenizer": {"type": "gpt2"}}))
        model = GPT.from_state(checkpoint)
        prompt = Path(start[5:]).read_text(encoding="utf-8") if start.startswith("FILE:") else start
        ids = tokenizer.encode(prompt)
        if not ids:
            ids = tokenizer.encode("<|endoftext|>")
    except DataError as error:
        sys.exit(f"sample.py: {error}; choose another --start")
    except (OSError, ValueError) as error:
        sys.exit(f"sample.py: {error}")
    if len(ids) > model.config.block_size:
        print(
            f"the prompt is cropped to its last {model.config.block_size} of {len(ids)} tokens",
            file=sys.stderr,
        )
        ids = ids[-model.config.block_size :]
    model.eval().to(use_device, getattr(torch, use_dtype))
    if compile is True:
        model.compile(dynamic=True)
    generator = torch.Generator(use_device).manual_seed(seed)
    tokens = torch.tensor([ids], device=use_device)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    for i in range(num_samples):
        print(
            f"{'' if num_samples == 1 else f'--- {i + 1} of {num_samples}: '}{prompt}",
            end="",
            file=sys.stderr,
            flush=True,
        )
        stream = model.generate_stream(
            tokens,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            generator,
            tokenizer.end_of_text,
            tokenizer.vocab_size,
        )
        for text in text_stream(tokenizer, (token.item() for token in stream), ids, stop):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
