"""The whole GPT in one file: GPTConfig, GPT, Muon, and load_checkpoint.

Token and position embeddings, blocks of causal self-attention and MLP, a final LayerNorm and an output layer;
loss, generation, optimizer groups and checkpoints. It needs torch alone and knows nothing of datasets,
tokenizers or settings: copy it into your own project and it works.

Shapes in the comments: B batch, T time (tokens), C n_embd, H n_head, D head size C / H, V vocabulary.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's; Hendrycks and Gimpel 2016, section 2
    "gelu_erf": F.gelu,  # the exact form
    "relu": F.relu,
    "relu2": lambda x: (r := F.relu(x)) * r,  # So et al. 2021, Primer
}


@dataclass
class GPTConfig:
    """The architecture; the defaults are GPT-2 124M. Raises ValueError where fields contradict each other."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257 rounded up to a multiple of 64, which multiplies faster
    n_layer: int = 12  # 0: no blocks, a bigram model
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    embd_dropout: float | None = None  # None follows dropout, as the next two
    attn_dropout: float | None = None
    resid_dropout: float | None = None
    bias: bool = True  # of Linear and LayerNorm, as GPT-2
    qkv_bias: bool | None = None  # None follows bias
    tie_weights: bool = True  # the token embedding is the output layer too, as GPT-2
    activation: str = "gelu"
    position: str = "learned"  # an embedding of each position, as GPT-2; "rope": queries and keys are rotated
    qk_norm: bool = False  # queries and keys of unit root mean square
    short_conv: int = 0  # how many tokens before one are mixed into its embedding
    flash: bool = True  # fused scaled_dot_product_attention; False: the same attention spelled out
    init: str = "gpt2"  # N(0, 0.02), residual projections / sqrt(2 n_layer); "zero": 0; "torch": its own

    def __post_init__(self):
        least = {"block_size": 1, "vocab_size": 1, "n_layer": 0, "n_head": 1, "n_embd": 1, "short_conv": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name} must be at least {limit}, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        for name in ("dropout", "embd_dropout", "attn_dropout", "resid_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        known = {"position": ["learned", "rope"], "init": ["gpt2", "zero", "torch"]}
        known["activation"] = list(ACTIVATIONS)
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(choices)}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise ValueError(f"position=rope needs an even n_embd / n_head, not {self.n_embd // self.n_head}")


def value_or(value, default):
    return default if value is None else value


@functools.cache
def cpu_has(*words: str) -> bool:
    """Whether Linux describes the CPU with all of these words: maker and abilities. Elsewhere False."""
    try:
        with open("/proc/cpuinfo") as file:
            return set(words) <= set(file.read().split())
    except OSError:
        return False


class Linear(nn.Linear):
    """nn.Linear, but for two cases on a CPU where PyTorch does not take the fastest way that it has.

    On an AMD with AVX-512 it has first derivatives alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        plain = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        many = not torch.compiler.is_compiling() and rows > 16
        if not plain and many and x.dtype == self.weight.dtype == torch.float32:
            # PyTorch asks MKL, which uses AVX-512 on Intel's CPUs alone; oneDNN uses it on AMD's
            faster = torch.backends.mkldnn.is_available() and cpu_has("AuthenticAMD", "avx512f")
            if faster and self.weight.is_contiguous():
                return torch._C._nn.mkldnn_linear(x.to_mkldnn(), self.weight, self.bias).to_dense()
        if not plain and rows <= 16 and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            y = x.reshape(-1, self.in_features).T.squeeze(1)  # (in,) where it is one row, else (in, rows)
            y = self.weight @ y
            y = (y if rows == 1 else y.T.contiguous()).view(*x.shape[:-1], self.out_features)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Embedding(nn.Embedding):
    """nn.Embedding, but on the meta device it does not load the compiler, for a second, to draw nothing."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class KVCache:
    """Keys and values of the tokens that each block has seen: only the next token is left to compute.

    size: how many tokens it can hold; length: how many it holds. static: attention runs over all size places,
    the empty ones masked, so that no shape changes from token to token and the step compiles once.
    """

    def __init__(self, n_layer: int, size: int, static: bool = False):
        self.layers: list[Tensor | None] = [None] * n_layer  # each (2, B, H, size, D)
        self.recent: Tensor | None = None  # (B, width, C): the last embeddings, for ShortConvolution
        self.size, self.length, self.static = size, 0, static

    def extend(self, positions: Tensor) -> None:
        """The tokens at positions (T,) come next: settle which of the first S places each may look at."""
        start, self.length = self.length, self.length + len(positions)
        self.prompt = start == 0  # nothing was there before: plain attention among the new tokens
        self.positions, self.mask, self.shown = positions, None, self.size if self.static else self.length
        if start > 0 and (self.static or len(positions) > 1):
            places = torch.arange(self.shown, device=positions.device)
            self.mask = places <= positions[:, None]  # (T, S)

    def new_zeros(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zeros of x's type, to be filled in place: where static, a CUDA graph may rely on their address."""
        zeros = x.new_zeros(shape)
        if self.static:
            torch._dynamo.mark_static_address(zeros, guard=False)
        return zeros

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values (B, H, T, D) of the new tokens; return those to look at, (B, H, S, D)."""
        if self.layers[layer] is None:
            self.layers[layer] = self.new_zeros(k, (2, *k.shape[:2], self.size, k.size(-1)))
        kv = self.layers[layer]
        kv[0].index_copy_(2, self.positions, k)
        kv[1].index_copy_(2, self.positions, v)
        return (k, v) if self.prompt else kv[:, :, :, : self.shown].unbind()


def rotary(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (T, 1, 1, size) of the angles at positions (T,) (Su et al. 2021, 3.2.2)."""
    frequencies = 10000 ** (-torch.arange(0, size, 2, device=positions.device) / size)
    angles = positions[:, None, None, None] * frequencies
    sin = angles.sin()
    return angles.cos().repeat(1, 1, 1, 2), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D / 2]) of x (..., T, 2, H, D): q @ k tells how far apart they are."""
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)


class ShortConvolution(nn.Module):
    """Add to each token's embedding those of the few before it, each channel in its own proportions.

    A causal depthwise convolution (So et al. 2021, Primer), whose tap at the token itself is 1.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 1, channels))  # no matrix: GPT's init leaves it at 0

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        (B, T, C), width = x.shape, len(self.weight)
        if cache and cache.recent is None:
            cache.recent = cache.new_zeros(x, (B, width, C))
        before = cache.recent if cache else x.new_zeros(B, width, C)
        x_before = torch.cat((before, x), dim=1)  # (B, width + T, C)
        if cache:
            cache.recent.copy_(x_before[:, -width:])
        return sum((w * x_before[:, i : i + T] for i, w in enumerate(self.weight)), start=x)


class CausalSelfAttention(nn.Module):
    """Multi-head attention to oneself and the past (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.layer = layer
        self.n_head, self.qk_norm, self.flash = config.n_head, config.qk_norm, config.flash
        self.dropout = value_or(config.attn_dropout, config.dropout)
        # query, key and value of all heads in one matrix
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=value_or(config.qkv_bias, config.bias))
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(value_or(config.resid_dropout, config.dropout))

    def forward(self, x: Tensor, angles: tuple[Tensor, ...] = (), cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qk, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).split((2, 1), dim=2)
        if self.qk_norm:
            qk = F.rms_norm(qk, qk.shape[-1:], eps=1e-6).type_as(v)
        if angles:
            qk = rotate(qk, *angles)
        q, k, v = (t.transpose(1, 2) for t in (*qk.unbind(2), v.squeeze(2)))  # each (B, H, T, D)
        if cache:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D): S tokens so far; without a cache S is T
        mask = cache.mask if cache else None  # (T, S); None: at itself and all before
        causal = mask is None and T > 1
        dropout = self.dropout if self.training else 0.0
        if self.flash:
            if x.device.type == "cpu" and q.element_size() == 2 and torch.is_grad_enabled():
                q, k, v = q.float(), k.float(), v.float()  # in half precision the backward is slow there
            with torch.autocast(x.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)  # (B, H, T, D)
            y = y.to(qk.dtype)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
            if causal:
                mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            weights = F.softmax(scores, dim=-1)
            y = F.dropout(weights, dropout) @ v  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position on its own: four times wider, a nonlinearity, and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(value_or(config.resid_dropout, config.dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each with its LayerNorm before it and a shortcut around it (GPT-2's pre-norm)."""

    def __init__(self, config: GPTConfig, layer: int = 0):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, ...] = (), cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), angles, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2-style language model (Radford et al. 2019). Parameters bear GPT-2's names."""

    decode: Callable | None = None  # hidden, compiled, for the tokens after a prompt
    # fields of GPTConfig that may change under the same weights
    FREE_FIELDS = {"dropout", "embd_dropout", "attn_dropout", "resid_dropout", "flash", "init"}

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules: dict[str, nn.Module] = {"wte": Embedding(config.vocab_size, config.n_embd)}
        if config.short_conv:
            modules["conv"] = ShortConvolution(config.short_conv, config.n_embd)
        if config.position == "learned":
            modules["wpe"] = Embedding(config.block_size, config.n_embd)
        modules["drop"] = nn.Dropout(value_or(config.embd_dropout, config.dropout))
        modules["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        modules["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.init != "torch" and not self.lm_head.weight.is_meta:
            # 2 n_layer projections add up in the residual stream (Radford et al. 2019, section 2.3)
            residual = 0.0 if config.init == "zero" else 1 / math.sqrt(2 * max(1, config.n_layer))
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    scale = residual if name.endswith("c_proj.weight") else 1.0
                    nn.init.normal_(p, mean=0.0, std=0.02 * scale)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        all_logits: bool = False,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of the next token, and the loss where targets are given.

        idx: (B, T) int64 token IDs; targets: (B, T) int64, positions of -1 are ignored; cache: holds the
        tokens before idx, and then idx as well
        Returns logits (B, T, V) with targets or all_logits, else (B, 1, V) of the last position; and the mean
        cross-entropy in nats, or None. Raises ValueError where T exceeds block_size.
        """
        start = cache.length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}")
        positions = torch.arange(start, end, device=idx.device)
        if cache:
            cache.extend(positions)
        x = ((self.decode if start else None) or self.hidden)(idx, positions, cache)  # (B, T, C)
        if targets is None:
            return self.lm_head(x if all_logits else x[:, [-1]]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden(self, idx: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        """What the output layer reads of idx (B, T) at positions (T,): embeddings and blocks, (B, T, C)."""
        x, angles = self.transformer.wte(idx), ()
        if self.config.short_conv:
            x = self.transformer.conv(x, cache)
        if self.config.position == "rope":
            angles = rotary(positions, self.config.n_embd // self.config.n_head)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, angles, cache)
        return self.transformer.ln_f(x)

    def optimize_for_generation(self, compile: bool = False) -> None:
        """Make generation faster, once the model is where it stays; training would be slower.

        compile: the step of one token by torch.compile, on a GPU as a CUDA graph; its first use takes long.
        """
        weight = self.lm_head.weight
        if compile:
            mode = "reduce-overhead" if weight.is_cuda else None
            self.decode = torch.compile(self.hidden, mode=mode, dynamic=False)
        elif weight.device.type == "cpu" and weight.dtype == torch.float32:
            for module in self.modules():
                if isinstance(module, Linear):  # input-major, as GPT-2's own files: few rows multiply faster
                    module.weight.data = module.weight.data.T.contiguous().T

    def num_params(self, non_embedding: bool = False) -> int:
        """Count of parameters; non_embedding leaves out embeddings that are no output layer too."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            count -= self.transformer.wpe.weight.numel() if self.config.position == "learned" else 0
            count -= 0 if self.config.tie_weights else self.transformer.wte.weight.numel()
        return count

    def estimate_mfu(self, tokens_per_second: float, peak_flops: float) -> float:
        """Model FLOPs utilization in training, 0 to 1, of hardware that does peak_flops a second.

        A token costs 6 N + 12 n_layer n_embd T FLOPs forward and backward (Chowdhery et al. 2022, app. B).
        """
        c = self.config
        flops_per_token = 6 * self.num_params(non_embedding=True) + 12 * c.n_layer * c.n_embd * c.block_size
        return tokens_per_second * flops_per_token / peak_flops

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple, muon_learning_rate: float | None = None
    ) -> list[torch.optim.Optimizer]:
        """AdamW, which decays all but biases and LayerNorms.

        With muon_learning_rate, Muon (Jordan et al. 2024) takes the matrices of the blocks.
        """
        params = [p for p in self.parameters() if p.requires_grad]
        hidden = set()
        if muon_learning_rate is not None:
            hidden = {p for p in self.transformer.h.parameters() if p.dim() == 2}
        groups = [
            {"params": [p for p in params if p.dim() >= 2 and p not in hidden], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = params[0].device.type in ("cuda", "cpu")
        optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
        if hidden:
            hidden = [p for p in params if p in hidden]
            optimizers.append(Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay))
        return optimizers

    @torch.no_grad()
    def generate_stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
        vocab_size: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue idx (B, T0), T0 >= 1, yielding each new token as (B, 1) int64. Call eval() first.

        temperature 0 is greedy; top_k and top_p as in next_token_probs. stop: the token ID that ends a
        sequence, which then repeats it until all have ended. vocab_size: IDs from here on are padding, never
        sampled. The context is the last block_size tokens. Raises ValueError where T0 is 0.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt has no token to continue")
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        longest = self.config.block_size
        size = longest if self.decode else min(longest, idx.size(1) + max_new_tokens)
        cache = KVCache(self.config.n_layer, size, static=self.decode is not None)
        new = idx  # the prompt at once, then token by token
        for _ in range(max_new_tokens):
            if idx.size(1) <= longest:
                logits = self(new, cache=cache)[0]
            else:  # the window slides, and with it the position of each token: no key or value is the same
                idx = idx[:, -longest:]
                logits = self(idx)[0]
            logits = logits[:, -1, :vocab_size]  # (B, V)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs, ids = next_token_probs(logits, temperature, top_k, top_p)
                new = ids.gather(-1, torch.multinomial(probs, 1, generator=generator))  # (B, 1)
            if stop is not None:
                new = new.masked_fill(ended, stop)
                ended |= new == stop
            yield new
            if stop is not None and ended.all():
                return
            idx = torch.cat((idx, new), dim=1)

    def generate(self, idx: Tensor, max_new_tokens: int, *sampling: Any, **options: Any) -> Tensor:
        """idx (B, T0) and up to max_new_tokens more, (B, T0 + N); arguments as generate_stream's."""
        return torch.cat((idx, *self.generate_stream(idx, max_new_tokens, *sampling, **options)), dim=1)

    @classmethod
    def from_checkpoint(cls, path: str, device: str = "cpu") -> "GPT":
        """The model of a checkpoint of train.py or of nanoGPT. Raises as load_checkpoint."""
        return cls.from_state(load_checkpoint(path), device)

    from_pretrained = from_checkpoint  # a folder that save_pretrained or transformers wrote is one, too

    @classmethod
    def from_state(cls, checkpoint: dict[str, Any], device: str = "cpu", **changes: Any) -> "GPT":
        """The model of a loaded checkpoint, whose tensors it takes over, with some GPTConfig fields changed.

        FREE_FIELDS may change, and block_size may shrink: the last position embeddings go. Raises ValueError
        where the weights do not fit.
        """
        weights = dict(checkpoint["model"])
        try:
            config = GPTConfig(**(checkpoint["model_args"] | changes))
            if config.position == "learned" and config.block_size < checkpoint["model_args"]["block_size"]:
                wpe = weights["transformer.wpe.weight"]
                weights["transformer.wpe.weight"] = wpe[: config.block_size].clone()
            with torch.device("meta"):  # no memory, no random numbers
                model = cls(config)
            model.load_state_dict(weights, assign=True)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the checkpoint's weights do not fit the model: {reason[:300]}") from None
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        return model.to(device, torch.float32)

    def save_pretrained(self, folder: str) -> None:
        """Write config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them.

        Raises ValueError where the architecture is not GPT-2's, naming the field.
        """
        from safetensors.torch import save_file

        c = self.config
        gpt2s_own = {"bias": True, "qkv_bias": True, "position": "learned", "qk_norm": False, "short_conv": 0}
        for name, gpt2s in gpt2s_own.items():
            if value_or(getattr(c, name), c.bias) != gpt2s:
                raise ValueError(f"Hugging Face's GPT-2 cannot express {name}={getattr(c, name)}")
        if c.activation not in HF_ACTIVATIONS:
            raise ValueError(f"Hugging Face's GPT-2 cannot express activation={c.activation}")
        settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size}
        settings |= {"n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd}
        settings |= {"n_layer": c.n_layer, "n_head": c.n_head, "tie_word_embeddings": c.tie_weights}
        settings |= {theirs: value_or(getattr(c, ours), c.dropout) for ours, theirs in HF_DROPOUTS.items()}
        settings |= {"activation_function": HF_ACTIVATIONS[c.activation], "layer_norm_epsilon": 1e-5}
        end_of_text = 50256 if c.vocab_size > 50256 else None
        settings |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        weights = {
            name: (t.T if name.endswith(HF_TRANSPOSED) else t).contiguous()
            for name, t in self.state_dict().items()
            if not (c.tie_weights and name == "lm_head.weight")
        }
        os.makedirs(folder, exist_ok=True)
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(settings, file, indent=2)


def next_token_probs(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """Probabilities of the K tokens to choose among, (B, K) float32, and their IDs, from logits (B, V).

    In this order: logits divided by temperature (> 0); the top_k largest kept; of those, the fewest most
    probable tokens whose probabilities sum to at least top_p (nucleus sampling, Holtzman et al. 2019).
    """
    logits = (logits - logits.amax(-1, keepdim=True)).float() / temperature  # no overflow, however cold
    if top_k is not None and top_k < logits.size(-1):
        ids = logits.topk(top_k).indices.sort().values  # in the order of IDs, which rounding cannot change
        logits = logits.gather(-1, ids)
    else:
        ids = torch.arange(logits.size(-1), device=logits.device).expand_as(logits)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True, stable=True)
        tail = ordered.cumsum(-1) - ordered >= top_p  # the more probable ones have that mass already
        probs = probs.masked_fill(tail.scatter(-1, order, tail), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs, ids


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T, nearly, of each matrix (N, rows, columns) = U S V^T: its singular values become about 1.

    The Newton-Schulz iteration and the coefficients of Jordan et al. 2024. In bfloat16 where the hardware
    has it, else in float32: a CPU without takes 80 times as long in bfloat16.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda or cpu_has("avx512_bf16") else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon at its defaults, but with orthogonalize for all matrices of one shape at once.

    A matrix three times as tall as wide is taken for query, key and value, each orthogonalized apart.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))  # Nesterov's
                parts = torch.stack(updates)  # (N, rows, columns)
                if rows == 3 * columns:
                    parts = parts.view(-1, columns, columns)
                scale = math.sqrt(max(1, parts.size(1) / parts.size(2)))
                parts = orthogonalize(parts).reshape(-1, rows, columns)
                for p, update in zip(params, parts, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)


def load_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint as a dictionary with at least model (the state dict) and model_args (GPTConfig's fields).

    path: a file of train.py or of nanoGPT, or a Hugging Face GPT-2 folder. Only tensors and plain data are
    read; nothing in the file is run. Raises ValueError with one line.
    """
    if os.path.exists(os.path.join(path, "ckpt.pt")):
        raise ValueError(f"{path} is a run's folder; name the file {os.path.join(path, 'best.pt')}")
    if os.path.isdir(path):
        return load_hugging_face(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception:
        # a damaged zip or a forbidden pickle raises all sorts; torch's own advice is to trust the file
        raise ValueError(f"{path} is damaged, or holds other things than tensors and plain data") from None
    parts = [checkpoint.get(key) for key in ("model", "model_args")] if isinstance(checkpoint, dict) else []
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is no GPT checkpoint: it lacks model or model_args")
    if "iter_num" in checkpoint:
        # nanoGPT's, whose GELU is exact; compiled perhaps, and with masks as buffers
        weights = {name.removeprefix("_orig_mod."): t for name, t in checkpoint["model"].items()}
        checkpoint["model"] = {name: t for name, t in weights.items() if not name.endswith(".attn.bias")}
        checkpoint["model_args"].setdefault("activation", "gelu_erf")
    return checkpoint


# Hugging Face's names for what GPTConfig has, and the matrices that its Conv1D holds input-major
HF_DROPOUTS = {"embd_dropout": "embd_pdrop", "attn_dropout": "attn_pdrop", "resid_dropout": "resid_pdrop"}
HF_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "relu": "relu"}
HF_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HF_FIXED = {  # settings of which we have one value alone, and that value, which is the default too
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def load_hugging_face(folder: str) -> dict[str, Any]:
    """A folder with config.json and model.safetensors of a GPT-2, as load_checkpoint. Raises ValueError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(os.path.join(folder, "config.json")) as file:
            settings = json.load(file)
        tensors = load_file(os.path.join(folder, "model.safetensors"))
        for name, value in HF_FIXED.items():
            if settings.get(name, value) != value:
                raise ValueError(f"{name} is {settings[name]!r}, GPT-2's is {value!r}")
        if settings.get("n_inner") not in (None, 4 * settings["n_embd"]):
            raise ValueError(f"n_inner is {settings['n_inner']}, GPT-2's is 4 n_embd")
        activations = {theirs: ours for ours, theirs in HF_ACTIVATIONS.items()}
        activations["gelu_pytorch_tanh"] = "gelu"
        activation = settings.get("activation_function", "gelu_new")
        if activation not in activations:
            raise ValueError(f"activation_function is {activation!r}, none of {', '.join(activations)}")
        args = {name: settings[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        args |= {ours: settings.get(theirs, 0.1) for ours, theirs in HF_DROPOUTS.items()}
        args |= {"block_size": settings["n_positions"], "activation": activations[activation]}
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} is no GPT-2 of Hugging Face's: {error}") from None
    weights = {}
    for name, t in tensors.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks, in files of old
            weights[name] = t.T.contiguous() if name.endswith(HF_TRANSPOSED) else t
    args["tie_weights"] = settings.get("tie_word_embeddings", True)
    if args["tie_weights"] and "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {"model": weights, "model_args": args}


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """What auto stands for: the best device; bfloat16 on a GPU that has it, else float32; or ValueError."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but PyTorch finds no CUDA GPU here; use --device=cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device={device} is not to be had here; use --device=cpu") from None
    if dtype == "auto":
        has_bfloat16 = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bfloat16 else "float32"
    return device, dtype
