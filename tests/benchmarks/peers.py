"""Other people's autoregressive transformers, in sampling.py's run: each in the width, depth and heads of one of our models,
with a feed-forward layer as wide as makes the parameters equal, random weights, float32.

They draw 1,024 tokens of 512 colours, as ImageGPT does, one a pixel, each seeing all before it. A token in the middle of
the sequence stands for all: after 448 tokens they draw 129 with their cache and, to be subtracted, one, which takes as long
as reading those 448.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from imtx import Config

COLOURS, PIXELS = 512, 1024
BEFORE, TOKENS = 448, 128
PACKAGES = {"transformers": "transformers", "x_transformers": "x-transformers"}


@dataclass
class Peer:
    name: str
    parameters: int
    generate: Callable[[Tensor, int], Tensor]  # (1, n) tokens -> (1, n + new or new)
    seconds: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)  # threads: of TOKENS + 1 tokens, of one

    @torch.inference_mode()
    def run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        prompt = torch.arange(BEFORE)[None] % COLOURS
        for seconds, tokens in zip(self.seconds.setdefault(threads, ([], [])), (TOKENS + 1, 1)):
            begin = time.perf_counter()
            self.generate(prompt, tokens)
            seconds.append(time.perf_counter() - begin)

    @property
    def token_seconds(self) -> dict[int, float]:
        """By threads."""
        return {threads: (min(many) - min(one)) / TOKENS for threads, (many, one) in self.seconds.items()}


def missing() -> list[str]:
    """Packages to install."""
    return [package for module, package in PACKAGES.items() if not find_spec(module)]


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES.values()}


def peers(config: Config, parameters: int) -> list[Peer]:
    """ImageGPT, GPT-2 and x-transformers in the size of a model."""
    found = []
    for name, build in {"ImageGPT": _image_gpt, "GPT-2": _gpt2, "x-transformers": _x_transformers}.items():
        # The feed-forward layer's width is what is left to choose: its parameters are linear in it.
        sizes = [sum(p.numel() for p in build(config, ffn)[0].parameters()) for ffn in (config.width, 2 * config.width)]
        slope = (sizes[1] - sizes[0]) / config.width
        model, generate = build(config, round(config.width + (parameters - sizes[0]) / slope))
        found.append(Peer(name, sum(p.numel() for p in model.parameters()), generate))
    return found


def _image_gpt(config: Config, ffn: int) -> tuple[nn.Module, Callable]:
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    return _transformers(ImageGPTForCausalImageModeling, ImageGPTConfig, config, ffn)


def _gpt2(config: Config, ffn: int) -> tuple[nn.Module, Callable]:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _transformers(GPT2LMHeadModel, GPT2Config, config, ffn)


def _transformers(model_class, config_class, config: Config, ffn: int) -> tuple[nn.Module, Callable]:
    import transformers

    transformers.logging.set_verbosity_error()
    model = model_class(config_class(
        vocab_size=COLOURS + 1, n_positions=PIXELS, n_embd=config.width, n_layer=config.layers, n_head=config.heads,
        n_inner=ffn, bos_token_id=COLOURS, eos_token_id=None,
    )).eval()

    def generate(prompt: Tensor, tokens: int) -> Tensor:  # top_k=0: from the whole distribution, as ours
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=True, top_k=0, use_cache=True,
        )

    return model, generate


def _x_transformers(config: Config, ffn: int) -> tuple[nn.Module, Callable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    layers = Decoder(
        dim=config.width, depth=config.layers, heads=config.heads, attn_dim_head=config.width // config.heads,
        ff_mult=(ffn + 0.5) / config.width,  # it rounds down
    )
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=COLOURS + 1, max_seq_len=PIXELS, attn_layers=layers)).eval()

    def generate(prompt: Tensor, tokens: int) -> Tensor:
        return model.generate(prompt, tokens, filter_logits_fn=lambda logits: logits, cache_kv=True)

    return model, generate
