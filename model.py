"""The whole GPT in one file: GPTConfig, GPT, and load_checkpoint.

Token and position embeddings, blocks of causal self-attention and MLP, a final LayerNorm and an output layer;
loss, generation, optimizer groups and checkpoints. It needs torch alone and knows nothing of datasets,
tokenizers or settings: copy it into your own project and it works.

Shapes in the comments: B batch, T time (tokens), C n_embd, H n_head, D head size C / H, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),  # GPT-2's; Hendrycks and Gimpel 2016, section 2
    "gelu_erf": F.gelu,  # the exact form
    "relu": F.relu,
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
    flash: bool = True  # fused scaled_dot_product_attention; False: the same attention spelled out
    init: str = (
        "gpt2"  # N(0, 0.02), residual projections scaled by 1/sqrt(2 n_layer); "torch": the layers' own
    )

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_layer < 0:
            raise ValueError(f"n_layer must be at least 0, not {self.n_layer}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        for name in ("dropout", "embd_dropout", "attn_dropout", "resid_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if self.init not in ("gpt2", "torch"):
            raise ValueError(f"init={self.init!r} is neither gpt2 nor torch")


def value_or(value, default):
    return default if value is None else value


class CausalSelfAttention(nn.Module):
    """Multi-head attention to oneself and the past (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.flash = config.flash
        self.dropout = value_or(config.attn_dropout, config.dropout)
        # query, key and value of all heads in one matrix
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=value_or(config.qkv_bias, config.bias))
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(value_or(config.resid_dropout, config.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)  # 3 x (B, T, H, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, T)
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            weights = F.softmax(scores.masked_fill(future, -math.inf), dim=-1)
            y = F.dropout(weights, dropout) @ v  # (B, H, T, T) @ (B, H, T, D) -> (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each position on its own: four times wider, a nonlinearity, and back."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(value_or(config.resid_dropout, config.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(
            self.c_proj(self.activation(self.c_fc(x)))
        )  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each with its LayerNorm before it and a shortcut around it (GPT-2's pre-norm)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2-style language model (Radford et al. 2019). Parameters bear GPT-2's names."""

    # fields of GPTConfig that may change under the same weights
    FREE_FIELDS = {"dropout", "embd_dropout", "attn_dropout", "resid_dropout", "flash", "init"}

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(value_or(config.embd_dropout, config.dropout)),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.init == "gpt2":
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    # 2 n_layer projections add up in the residual stream (Radford et al. 2019, 2.3)
                    scale = 1 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                    nn.init.normal_(p, mean=0.0, std=0.02 * scale)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None, all_logits: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the next token, and the loss where targets are given.

        idx: (B, T) int64 token IDs; targets: (B, T) int64, positions of -1 are ignored
        Returns logits (B, T, V) with targets or all_logits, else (B, 1, V) of the last position; and the mean
        cross-entropy in nats, or None. Raises ValueError where T exceeds block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size={self.config.block_size}")
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (T, C) -> (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x if all_logits else x[:, [-1]]), None
        logits = self.lm_head(x)  # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def num_params(self, non_embedding: bool = False) -> int:
        """Count of parameters; non_embedding leaves out embeddings that are no output layer too."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            count -= self.transformer.wpe.weight.numel()
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
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.Optimizer:
        """AdamW, fused where torch has it, that decays matrices and embeddings, not biases and LayerNorm."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))

    @torch.no_grad()
    def generate_stream(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
        vocab_size: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue idx (B, T0), T0 >= 1, yielding each new token as (B, 1) int64. Call eval() first.

        temperature 0 is greedy; top_k and top_p as in next_token_probs. stop: the token ID that ends a
        sequence, which then repeats it until all have ended. vocab_size: IDs from here on are padding, never
        sampled. The context is the last block_size tokens. Raises ValueError where T0 is 0.
        """
        if idx.size(1) == 0:
            raise ValueError("the prompt has no token to continue")
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            idx = idx[:, -self.config.block_size :]
            logits = self(idx)[0][:, -1, :vocab_size]  # (B, V)
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            else:
                probs = next_token_probs(logits, temperature, top_k, top_p)
                token = torch.multinomial(probs, 1, generator=generator)  # (B, 1)
            if stop is not None:
                token = token.masked_fill(ended, stop)
                ended |= token == stop
            yield token
            if stop is not None and ended.all():
                return
            idx = torch.cat((idx, token), dim=1)

    def generate(
        self, idx: torch.Tensor, max_new_tokens: int, *sampling: Any, **options: Any
    ) -> torch.Tensor:
        """idx (B, T0) and up to max_new_tokens more, (B, T0 + N); arguments as generate_stream's."""
        return torch.cat((idx, *self.generate_stream(idx, max_new_tokens, *sampling, **options)), dim=1)

    @classmethod
    def from_checkpoint(cls, path: str, device: str = "cpu") -> "GPT":
        """The model of a checkpoint that train.py wrote. Raises as load_checkpoint."""
        return cls.from_state(load_checkpoint(path), device)

    @classmethod
    def from_state(cls, checkpoint: dict[str, Any], device: str = "cpu", **changes: Any) -> "GPT":
        """The model of a loaded checkpoint, with some GPTConfig fields changed.

        FREE_FIELDS may change, and block_size may shrink: the last position embeddings go. Raises ValueError
        where the weights do not fit.
        """
        args = checkpoint["model_args"] | changes
        weights = dict(checkpoint["model"])
        try:
            model = cls(GPTConfig(**args))
            wpe = weights["transformer.wpe.weight"]
            if args["block_size"] < checkpoint["model_args"]["block_size"]:
                weights["transformer.wpe.weight"] = wpe[: args["block_size"]]
            model.load_state_dict(weights)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the checkpoint's weights do not fit the model: {reason[:300]}") from None
        return model.to(device)


def next_token_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """Probabilities (B, V), float32, to sample the next token from logits (B, V).

    In this order: logits divided by temperature (> 0); the top_k largest kept; of those, the fewest most
    probable tokens whose probabilities sum to at least top_p (nucleus sampling, Holtzman et al. 2019).
    """
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None:
        ordered, order = probs.sort(descending=True, stable=True)
        tail = ordered.cumsum(-1) - ordered >= top_p  # the more probable ones have that mass already
        probs = probs.masked_fill(tail.scatter(-1, order, tail), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def load_checkpoint(path: str, device: str = "cpu") -> dict[str, Any]:
    """A checkpoint of train.py as a dictionary, with at least model (the state dict) and model_args.

    Only tensors and plain data are read; nothing in the file is run. Raises ValueError with one line.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except (
        Exception
    ):  # whatever a damaged zip or a forbidden pickle makes torch raise; its advice is to trust the file
        raise ValueError(f"{path} is damaged, or holds other things than tensors and plain data") from None
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{path} is no GPT checkpoint: it lacks model or model_args")
    return checkpoint


def pick_device(device: str = "auto", dtype: str = "auto") -> tuple[str, str]:
    """What auto stands for: the best device; bfloat16 on a GPU that has it, else float32; or ValueError."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device}, but PyTorch finds no CUDA GPU here; use --device=cpu")
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device} is none of cpu, cuda, cuda:N, mps") from None
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    return device, dtype
