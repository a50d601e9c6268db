"""Named configurations: the paper's, under names that begin with `paper-`, and ours.

Where the paper and its reference code, tensor2tensor (T2T), leave a choice, these are T2T's hyperparameter sets, which
stand beside the presets. Training settings (dropout apart) are not part of a preset.
"""

from dataclasses import replace

from .config import Config

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# The paper's block: post-norm, ReLU, positions added to the input. Unconditional, as T2T's sets are.
_PAPER = Config(
    family="paper", output="categorical", position_encoding="sinusoid", width=512, ffn=2048, layers=12, heads=4,
    query_block=256, memory_block=256,
)
_PAPER_SR = replace(_PAPER, source_size=8, encoder_layers=4, layers=8, heads=8, dropout=0.1)

PAPER_PRESETS = {
    # imagetransformer_cifar10_base: 2.90 bits/dim
    "paper-cifar10-cat": replace(_PAPER, dropout=0.3),
    # imagetransformer_cifar10_base_dmol: 2.90 bits/dim; 14 layers as in the paper (T2T's set: 12)
    "paper-cifar10-dmol": replace(
        _PAPER, output="dmol", position_encoding="learned", width=256, attention_width=512, ffn=512, layers=14, heads=8,
        dropout=0.1,
    ),
    # imagetransformer_imagenet32_base: 3.77 bits/dim
    "paper-imagenet32-cat": replace(_PAPER, dropout=0.1),
    # img2img_transformer_b3
    "paper-sr-1d": replace(_PAPER_SR, query_block=128, memory_block=128),
    # img2img_transformer2d_q3: query 8 x 16 and flange 8 x 32 sub-pixels, which cut through pixels; here whole ones
    "paper-sr-2d": replace(_PAPER_SR, layout="2d", query_block=(8, 4), memory_block=(8, 11)),
}

# Ours: pre-norm RMSNorm, QK-norm, SwiGLU, rotary positions, a neighbourhood as input. Sizes are our own.
MODERN_PRESETS = {
    # A minute on two CPU cores; for tests and for a first look.
    "tiny": Config(classes=CIFAR10_CLASSES, width=64, layers=2, heads=2, ffn=128, query_block=128, memory_block=128),
    "tiny-categorical": Config(
        output="categorical", classes=CIFAR10_CLASSES, width=64, layers=2, heads=2, ffn=128,
        query_block=192, memory_block=192,
    ),
    "tiny-2d": Config(
        layout="2d", classes=CIFAR10_CLASSES, width=64, layers=2, heads=2, ffn=128, query_block=(8, 8), memory_block=(8, 8)
    ),
    "tiny-sr": Config(
        source_size=8, encoder_layers=1, width=64, layers=2, heads=2, ffn=128, query_block=128, memory_block=128
    ),
    # What a CPU can train in hours: what the bundled weights are of.
    "cifar10-dmol-1d-small": Config(classes=CIFAR10_CLASSES, query_block=64, memory_block=128),
    "cifar10-dmol-1d-small-deep": Config(classes=CIFAR10_CLASSES, query_block=64, memory_block=128, layers=12),
    "cifar10-cat-1d-small": Config(output="categorical", classes=CIFAR10_CLASSES, query_block=128, memory_block=256),
    "faces-sr-1d-small": Config(source_size=8, encoder_layers=2, layers=5, query_block=64, memory_block=128),
    "cifar10-sr-1d-small": Config(source_size=8, encoder_layers=2, layers=5, query_block=64, memory_block=128),
    "faces-sr-2d-small": Config(
        layout="2d", source_size=8, encoder_layers=2, layers=5, query_block=(8, 8), memory_block=(4, 8)
    ),
    # For one GPU.
    "cifar10-dmol-1d": Config(classes=CIFAR10_CLASSES, width=256, layers=14, heads=8, ffn=768, dropout=0.1),
    "faces-sr-1d": Config(source_size=8, encoder_layers=4, width=256, layers=8, heads=8, ffn=768, dropout=0.1),
    "faces-sr-2d": Config(
        layout="2d", source_size=8, encoder_layers=4, width=256, layers=8, heads=8, ffn=768, dropout=0.1,
        query_block=(8, 8), memory_block=(8, 8),
    ),
}

# The paper's comparison of block sizes (8, 16, 64 and 256 sub-pixels), with its block, in a size for a CPU.
ABLATION_PRESETS = {
    f"ablation-{block}": replace(
        _PAPER, classes=CIFAR10_CLASSES, width=64, heads=2, ffn=256, layers=3, query_block=block, memory_block=block
    )
    for block in (8, 16, 64, 256)
}

PRESETS = PAPER_PRESETS | MODERN_PRESETS | ABLATION_PRESETS
