"""What an image tokenizer of LlamaGen's family costs: operations of one image, by formula. Imports no torch.

    convolution   2 k^2 C_in C_out side^2                      k x k, of C_in to C_out channels, side of the output
    attention     8 C^2 cells + 4 C cells^2                    four 1 x 1 convolutions, scores and values
    codes         2 cells entries C                            the nearest entry of the codebook, for each cell

A multiply-add counts two. No norms, activations, biases and interpolation, as ``torch.utils.flop_counter`` has it
(tests/tokenizers/test_tokenizer_flops.py).
"""

from __future__ import annotations

from oar_scale.config.schema import ImageTokenizerConfig


def encoder_flops(config: ImageTokenizerConfig, grid: int) -> int:
    """An image to codes (``ImageTokenizer.encode``)."""
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    side = grid * 2 ** (len(widths) - 1)
    width, operations = config.channels, _convolution(3, 3, config.channels, side)
    for out in widths:
        operations += _residuals(width, out, config.res_blocks, side)
        width = out
        if side > grid:
            side //= 2
            operations += _convolution(3, width, width, side)
    operations += config.res_blocks * _attention(width, grid) + _middle(width, grid)
    operations += _convolution(3, width, width, grid) + _convolution(1, width, config.codebook_dim, grid)
    return operations + 2 * grid * grid * config.codebook_size * config.codebook_dim


def decoder_flops(config: ImageTokenizerConfig, grid: int) -> int:
    """Codes to an image (``ImageTokenizer.decode``)."""
    widths = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
    side, width, blocks = grid, widths[0], config.res_blocks + 1
    operations = _convolution(1, config.codebook_dim, width, side) + _convolution(3, width, width, side)
    operations += _middle(width, side) + blocks * _attention(width, side)
    for level, out in enumerate(widths):
        operations += _residuals(width, out, blocks, side)
        width = out
        if level < len(widths) - 1:
            side *= 2
            operations += _convolution(3, width, width, side)
    return operations + _convolution(3, width, 3, side)


def _convolution(kernel: int, channels: int, out: int, side: int) -> int:
    return 2 * kernel * kernel * channels * out * side * side


def _residuals(width: int, out: int, blocks: int, side: int) -> int:
    """Residual blocks of two convolutions; the first one changes the width, on its shortcut, too."""
    first = _convolution(3, width, out, side) + _convolution(3, out, out, side) + (width != out) * _convolution(1, width, out, side)
    return first + (blocks - 1) * 2 * _convolution(3, out, out, side)


def _middle(width: int, side: int) -> int:
    """A residual block, attention, a residual block."""
    return _residuals(width, width, 2, side) + _attention(width, side)


def _attention(width: int, side: int) -> int:
    return 4 * _convolution(1, width, width, side) + 4 * width * side**4
