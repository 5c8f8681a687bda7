"""A small vision transformer, timm's, whose attention is associative recall with partial forgetting."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor, nn

from hopdeq_lwpf._types import check_float_tensor
from hopdeq_lwpf.forgetting import Forgetting
from hopdeq_lwpf.models.conversion import ConversionReport, convert_attention
from hopdeq_lwpf.separation import Separation
from hopdeq_lwpf.solvers.adjoints import Adjoint
from hopdeq_lwpf.solvers.base import Solver
from hopdeq_lwpf.solvers.termination import Termination


class VisionTransformer(nn.Module):
    """timm's VisionTransformer for small images, converted by `convert_attention` (needs the extra `vision`).

    image_size: height and width, or one number for both; 28 is that of Fashion-MNIST, 8 that of the digits of
        `hopdeq_lwpf.data`. patch_size: must divide them; 4 makes 49 patches of 28 x 28 (the digits: 2, 16
        patches).
    channels, classes: of the images, and how many logits. width, depth, heads: of the model; width must be a
        multiple of heads. mlp_ratio: width of the hidden layers over that of the model.
    dropout: of the associations at the read-out, of projections and of the head, in training.
    The other arguments are those of `convert_attention`; steps=1 without forgetting is timm's model.

    forward: (B, channels, *image_size) -> logits (B, classes). `vit` is the converted model of timm,
    `conversion_report` says what was converted.
    Raises ImportError where timm cannot be imported, ValueError for sizes that do not fit.
    """

    def __init__(  # noqa: PLR0913 (sizes and dials of a model)
        self,
        *,
        image_size: int | tuple[int, int] = 28,
        patch_size: int = 4,
        channels: int = 1,
        classes: int = 10,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        steps: int | None = 1,
        forgetting: None | str | Forgetting = None,
        separation: str | Separation = "softmax",
        beta: None | float | Tensor = None,
        inject: str = "start",
        inject_weight: float | Tensor = 1.0,
        solver: str | Solver = "auto",
        stop: Termination = Termination(),  # noqa: B008 (frozen)
        adjoint: str | Adjoint = "implicit",
        on_failure: str = "warn",
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        counts = {"patch_size": patch_size, "channels": channels, "classes": classes, "width": width}
        counts |= {"depth": depth, "heads": heads, "image_size": min(size)}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {count!r}")
        if len(size) != 2 or any(side % patch_size for side in size):
            raise ValueError(f"image_size {size} must be two multiples of patch_size {patch_size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width} and heads={heads}")
        self.image_shape = (channels, *size)
        plain = _timm().VisionTransformer(
            img_size=size,
            patch_size=patch_size,
            in_chans=channels,
            num_classes=classes,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            drop_rate=dropout,
            proj_drop_rate=dropout,
            attn_drop_rate=dropout,
        )
        self.vit = convert_attention(
            plain,
            steps=steps,
            forgetting=forgetting,
            separation=separation,
            beta=beta,
            inject=inject,
            inject_weight=inject_weight,
            solver=solver,
            stop=stop,
            adjoint=adjoint,
            on_failure=on_failure,
        )

    @property
    def conversion_report(self) -> ConversionReport:
        """What was converted: the attention of each block."""
        report: ConversionReport = self.vit.conversion_report  # type: ignore[assignment]
        return report

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> logits (B, classes)."""
        check_float_tensor("images", images)
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must be (B, {expected}), got {tuple(images.shape)}")
        logits: Tensor = self.vit(images)
        return logits


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm.models")
    except ImportError as error:
        raise ImportError(
            f"VisionTransformer needs timm, which cannot be imported ({error}): pip install 'hopdeq-lwpf[vision]'"
        ) from error
    except RuntimeError as error:
        # What torchvision, which timm imports, raises where its binaries are for another torch.
        raise ImportError(
            f"VisionTransformer needs timm, and timm torchvision, which does not fit this torch ({error}): "
            "install the torchvision of this torch's version and from the same index"
        ) from error
