"""Any module as a LightningModule: loss, scores, optimiser and schedule."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from hopdeq_lwpf._types import unknown
from hopdeq_lwpf.training.madam import Madam
from hopdeq_lwpf.training.scores import area_under_curve, gather, hits, loss_of, margins
from hopdeq_lwpf.training.spec import LOSSES, OPTIMIZERS, SCHEDULES

TARGETS = ("target", "label", "targets", "labels")


@dataclass(frozen=True)
class Learning:
    """How a model learns.

    The defaults are those of the published bit-pattern study: AdamW, 1e-3, weight decay 0.01 (clipping, with
    norm 1, is an option of the Trainer). loss: see `scores.loss_of`. schedule: "constant", or down to
    final_rate (a share of learning_rate, 0 by default) at the last step as a "cosine" or a "linear" ramp; warmup: steps
    in which the rate grows linearly before that.
    Raises ValueError for a name or a number that makes no sense.
    """

    loss: str = "cross_entropy"
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "constant"
    final_rate: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number above 0, got {self.learning_rate!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be a number of at least 0, got {self.weight_decay!r}")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate must be a share from 0 to 1, got {self.final_rate!r}")
        if isinstance(self.warmup, bool) or not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number of steps of at least 0, got {self.warmup!r}")


class Learner(LightningModule):
    """A model with what it needs to learn, for any Lightning Trainer and any loader.

    model: an nn.Module whose output the loss takes. learning: see `Learning`.
    A batch is a tuple or list, the last entry the target and the others the positional arguments of the
    model; or a dict with the target under "target" or "label" and the arguments of the model under the names
    they have there (see `split_batch`). split: a function batch -> (arguments, keywords, target) for others.

    Logs train/loss, val/loss and test/loss an epoch, weighted by the samples of a batch; accuracy where the
    loss has classes, auc where there are two. Equilibrium layers inside keep their `last_solution`; the
    callbacks of `training.monitors` record it.
    """

    def __init__(
        self,
        model: nn.Module,
        learning: Learning = Learning(),  # noqa: B008 (frozen)
        *,
        split: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        self.model = model
        self.learning = learning
        self._split = split or partial(split_batch, names=argument_names(model))
        self._course = {stage: _Course() for stage in ("train", "val", "test")}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's takes anything, and may run code of the file
        cls,
        checkpoint_path: str | os.PathLike[str],
        model: nn.Module,
        learning: Learning = Learning(),  # noqa: B008 (frozen)
        *,
        split: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any], Tensor]] | None = None,
    ) -> Learner:
        """A learner of `model` with the weights of a checkpoint that `WholeFiles` wrote; runs no code of the file.

        model, learning, split: as for a new learner. Raises CheckpointError for a file that is no such checkpoint,
        or of another model.
        """
        from hopdeq_lwpf.training.checkpoints import WholeFiles, check_weights

        learner = cls(model, learning, split=split)
        checkpoint = WholeFiles().load_checkpoint(checkpoint_path)
        check_weights(checkpoint_path, checkpoint, learner)
        learner.load_state_dict(checkpoint["state_dict"])
        return learner

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        """What the model returns."""
        return self.model(*arguments, **keywords)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train", batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step("test", batch)

    def _step(self, stage: str, batch: Any) -> Tensor:
        arguments, keywords, target = self._split(batch)
        output = self.model(*arguments, **keywords)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must return a tensor for the loss, got {type(output).__name__}")
        loss = loss_of(self.learning.loss, output, target)
        self._course[stage].add(self.learning.loss, loss, output.detach(), target)
        return loss

    def on_train_epoch_start(self) -> None:
        self._course["train"] = _Course()

    def on_validation_epoch_start(self) -> None:
        self._course["val"] = _Course()

    def on_test_epoch_start(self) -> None:
        self._course["test"] = _Course()

    def on_train_epoch_end(self) -> None:
        self._log_course("train")

    def on_validation_epoch_end(self) -> None:
        self._log_course("val")

    def on_test_epoch_end(self) -> None:
        self._log_course("test")

    def _log_course(self, stage: str) -> None:
        for name, value in self._course[stage].scores().items():
            self.log(f"{stage}/{name}", value, on_epoch=True, on_step=False)
        self._course[stage] = _Course()

    def configure_optimizers(self) -> Any:
        """The optimiser over all that requires grad, and the schedule, a factor a step."""
        options = self.learning
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("the model has no parameter that requires grad: there is nothing to train")
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "sgd": partial(torch.optim.SGD, momentum=0.9),
            "madam": Madam,
        }
        optimizer = kinds[options.optimizer](
            trained, lr=options.learning_rate, weight_decay=options.weight_decay
        )
        if options.schedule == "constant" and not options.warmup:
            return optimizer
        total = self.trainer.estimated_stepping_batches if options.schedule != "constant" else 0
        factor = partial(
            rate_factor,
            schedule=options.schedule,
            warmup=options.warmup,
            total=int(total),
            final=options.final_rate,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class _Course:
    """What an epoch of one stage has seen; sums stay tensors, so that no step waits for a device."""

    loss: list[Tensor] = field(default_factory=list)
    count: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    positive: list[Tensor] = field(default_factory=list)

    def add(self, kind: str, loss: Tensor, output: Tensor, target: Tensor) -> None:
        self.loss.append(loss.detach() * target.shape[0])
        self.count.append(torch.tensor(target.shape[0]))
        right = hits(kind, output, target)
        if right is not None:
            self.right.append(right.float().mean() * target.shape[0])
        margin = margins(kind, output, target)
        if margin is not None:
            self.margin.append(margin)
            self.positive.append(target > 0.5)

    def scores(self) -> dict[str, float]:
        """loss, accuracy and auc of the epoch over all processes, as far as they are defined."""
        # Every process gathers the same things, also one that saw no batch.
        loss, count, right = (gather(part) for part in (self.loss, self.count, self.right))
        margin, positive = gather(self.margin), gather(self.positive)
        total = float(count.sum())
        if not total:
            return {}
        scores = {"loss": float(loss.sum()) / total}
        if len(right):
            scores["accuracy"] = float(right.sum()) / total
        if len(margin):
            scores["auc"] = area_under_curve(margin, positive)
        return scores


def argument_names(model: nn.Module) -> frozenset[str] | None:
    """The arguments that the forward of a model has by name; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


def split_batch(
    batch: Any, *, names: frozenset[str] | None = None
) -> tuple[Sequence[Any], Mapping[str, Any], Tensor]:
    """(arguments, keywords, target) of a batch.

    A tuple or list: the last entry is the target, the others are arguments in their order. A dict: "target" or
    "label" is the target, the others are keywords; with `names` only those among them, and "data" is the first
    argument if it is not. What the model has no name for (the number of a sample, say) is left out; a "mask"
    must not be, unless nothing is masked.
    Raises TypeError for any other batch, ValueError for a mask that would be lost.
    """
    if isinstance(batch, Mapping):
        found = [name for name in TARGETS if name in batch]
        if len(found) != 1:
            raise TypeError(
                f"a batch that is a dict needs one of the keys {list(TARGETS)} for the target, got {sorted(batch)}; "
                "or give Learner a split function"
            )
        rest = {name: value for name, value in batch.items() if name != found[0]}
        keywords = {name: value for name, value in rest.items() if names is None or name in names}
        first = (rest["data"],) if "data" in rest and "data" not in keywords else ()
        if "mask" in rest and "mask" not in keywords and bool(rest["mask"].any()):
            raise ValueError("the batch has a mask, and the forward of the model no argument 'mask': add one")
        return first, keywords, batch[found[0]]
    if isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[-1], Tensor):
        return batch[:-1], {}, batch[-1]
    raise TypeError(
        f"a batch must be a tuple (inputs ..., target) or a dict, got {type(batch).__name__}; or give Learner a "
        "split function"
    )


def rate_factor(step: int, *, schedule: str, warmup: int, total: int, final: float = 0.0) -> float:
    """What the learning rate is multiplied by at this step, counted from 0; see `Learning`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return final + (1 - final) * left
