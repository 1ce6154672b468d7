"""Two things that the vision tower of transformers 5.5 does slowly: attention by image, and patches by convolution.

Without flash-attention, transformers 5 splits the patches of a batch by image and attends to each image on its own
(``VisionAttention.forward`` of Qwen2-VL, Qwen2.5-VL and Qwen3-VL): 512 crops in 32 layers are 16,384 calls. Images
never attend to each other, so those of the same number of patches can share a call, with the images as its batch.

transformers passes all images at once, with their boundaries, to an implementation whose name contains "flash". So
this one is registered under such a name through the public ``AttentionInterface`` and set on the vision configuration
of the loaded model alone; no code of transformers is replaced, and real flash-attention is left as it is.

The first layer is a ``Conv3d`` whose kernel is as large as its input, one patch: a matrix product. As a convolution it
took a third of the evaluator's time for new images on a CPU, and on GPUs some versions of torch and cuDNN have no fast
one in bf16 (pytorch issue 174051; transformers pull request 45041, which later versions offer as an option).
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.utils import generic

from .errors import UpstreamError
from .upstream import TESTED_VERSIONS, get_upstream


# Model family -> the class of its vision attention, all of them with the same forward in transformers 5.5.
ATTENTION_CLASSES = {
    "qwen2_vl": "VisionAttention",
    "qwen2_5_vl": "Qwen2_5_VLVisionAttention",
    "qwen3_vl": "Qwen3VLVisionAttention",
}
# Stock implementation -> the name under which it is batched.
BATCHED_NAMES = {"sdpa": "chatreid_flash_sdpa", "eager": "chatreid_flash_eager"}


def attend_by_size(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    stock: str,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each image, images of the same number of patches in one call.

    Args:
        module: the attention layer.
        query: [1, heads, patches of all images, head size]; key and value alike.
        key: see query.
        value: see query.
        attention_mask: None; images are not masked.
        stock: the implementation that computes, ``sdpa`` or ``eager``.
        cu_seq_lens_q: [images + 1], where each image's patches begin, and the end.
        options: what else transformers passes; handed on.

    Returns:
        [1, patches of all images, heads, head size] in the order of the query, and no weights.

    Raises:
        UpstreamError: transformers no longer tells where images begin; attending on would mix them.
    """
    if cu_seq_lens_q is None:
        raise UpstreamError(
            "transformers passes no cu_seq_lens_q to the vision attention, so images cannot be told apart. "
            f"Install transformers=={TESTED_VERSIONS['transformers']} or a newer chatreid-plugin."
        )
    # Eager attention is each model file's own function and is registered nowhere.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = partial(AttentionInterface().get(stock, eager), module, attention_mask=attention_mask, **options)
    lengths: list[int] = cu_seq_lens_q.diff().tolist()
    if len(set(lengths)) == 1:
        return _attend_equal(attend, (query, key, value), lengths[0]), None
    parts = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    outputs: dict[int, torch.Tensor] = {}
    for length in sorted(set(lengths)):
        members = [image for image, other in enumerate(lengths) if other == length]
        chosen = tuple(torch.cat([part[image] for image in members], dim=2) for part in parts)
        outputs |= zip(members, _attend_equal(attend, chosen, length).split(length, dim=1), strict=True)
    return torch.cat([outputs[image] for image in range(len(lengths))], dim=1), None


def _attend_equal(attend: Callable[..., Any], states: tuple[torch.Tensor, ...], length: int) -> torch.Tensor:
    """Attend within images of ``length`` patches each: [1, heads, patches, size] to [1, patches, heads, size]."""
    folded = (tensor[0].unflatten(1, (-1, length)).transpose(0, 1) for tensor in states)
    output: torch.Tensor = attend(*folded)[0]
    return output.flatten(0, 1).unsqueeze(0)


def batch_vision_attention(model: torch.nn.Module) -> int:
    """Make the vision tower of a loaded model attend by image size; return how many layers do.

    Models of other families, flash-attention and a tower that is batched already are left as they are: 0.

    Raises:
        UpstreamError: this version of transformers calls no attention with all images at once; nothing is changed.
    """
    config: Any = getattr(model, "config", None)
    name = ATTENTION_CLASSES.get(getattr(config, "model_type", ""))
    if name is None:
        return 0
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == name]
    layers = [layer for layer in layers if layer.config._attn_implementation in BATCHED_NAMES]
    passes_all_images = get_upstream(generic, "is_flash_attention_requested")
    for stock, batched in BATCHED_NAMES.items():
        if not passes_all_images(requested_attention_implementation=batched):
            raise UpstreamError(
                f"transformers does not take {batched!r} for an attention that gets all images at once."
            )
        AttentionInterface.register(batched, partial(attend_by_size, stock=stock))
    for layer in layers:  # the layers of a tower share one configuration
        stock = layer.config._attn_implementation
        layer.config._attn_implementation = BATCHED_NAMES.get(stock, stock)
    return len(layers)


class PatchProjection(torch.nn.Conv3d):
    """A convolution whose input is as large as its kernel, as a matrix product; weights and their names stay."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # torch's name
        """Return [patches, width, 1, 1, 1] for [patches, channels, frames, rows, columns]."""
        if tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        projected = torch.nn.functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return projected[:, :, None, None, None]


def project_patches(model: torch.nn.Module) -> int:
    """Make the patch embeddings of a loaded model matrix products; return how many are, 0 for other families."""
    layers = [module for name, module in model.named_modules() if name.endswith("patch_embed.proj")]
    layers = [layer for layer in layers if type(layer) is torch.nn.Conv3d and layer.groups == 1]
    for layer in layers:
        # The class and not the method of one object: a copy of the model must not use the weights of this one.
        layer.__class__ = PatchProjection
    return len(layers)


def speed_up_vision_tower(model: torch.nn.Module) -> int:
    """Do both to a loaded model, for training and scoring alike; return how many layers attend by image size.

    Raises:
        UpstreamError: see ``batch_vision_attention``; patches are projected all the same.
    """
    project_patches(model)
    return batch_vision_attention(model)
