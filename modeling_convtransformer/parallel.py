"""Pipeline parallelism: a detector cut into stages, one a process, by torch.distributed.pipelining.

    torchrun --nproc_per_node 2 ...                           # examples/train_pipeline_parallel.py is such a script
    pipeline = Pipeline(detector, device, microbatches=4)     # keeps the weights of this process's stage only
    optimizer = torch.optim.AdamW(parameter_groups(pipeline.stage, 0.05), lr=1e-4)
    loss = pipeline.step(batch)                               # forward and backward; the loss on every process
    optimizer.step(), optimizer.zero_grad()
    pipeline.save_pretrained(folder)                          # one checkpoint, which from_pretrained loads anywhere

With two processes, the first usually has the embedding and the stem, the second the branch, the neck and the heads. What
travels between stages is the pyramid so far. The other ways to use many devices (data parallel, FSDP2, tensor parallel)
need nothing from here: see docs/parallel.md.
"""

import os
from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from .modeling_convtransformer import ConvTransformerForTemporalActionLocalization

__all__ = ["DetectorStage", "Pipeline", "balanced_cuts"]


def balanced_cuts(detector: ConvTransformerForTemporalActionLocalization, stages: int) -> list[int]:
    """
    Where to cut a detector such that all stages have about the same work: for each stage but the first, the number of its
    first block (those of the stem, then those of the branch). Embedding, and neck with heads, cannot be cut.

    Raises:
        ValueError: there are fewer parts than stages.
    """
    model, config = detector.model, detector.config

    def weights(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    # A part's work is about its weights times the steps that they meet. The heads meet those of every level.
    strides = [*(1 for _ in model.stem), *config.strides[1:]]
    work = [weights(model.embedding)]
    work += [weights(block) / stride for block, stride in zip([*model.stem, *model.branch], strides, strict=True)]
    heads = weights(detector.class_head) + weights(detector.segment_head)
    work += [heads * sum(1 / stride for stride in config.detector_strides)]
    if stages > len(work):
        raise ValueError(
            f"{stages} processes for {len(work)} parts (embedding, {len(work) - 2} blocks of arch {tuple(config.arch)}, neck "
            f"with heads); start at most {len(work)}."
        )
    # The cut that lies nearest to each equal share of the work, with a part left for every stage.
    done, cuts = list(accumulate(work)), []
    for stage in range(1, stages):
        share = done[-1] * stage / stages
        place = bisect_left(done, share)
        place += share - (done[place - 1] if place else 0) > done[place] - share
        cuts.append(min(max(place, cuts[-1] + 1 if cuts else 1), len(work) - stages + stage))
    return [cut - 1 for cut in cuts]  # the embedding is part 0


class DetectorStage(nn.Module):
    """
    Some consecutive parts of a detector; the others' weights are given up. Parameters keep their names behind "detector.".

    Args:
        detector: of which this becomes a part. It is changed and cannot be used alone afterwards.
        cuts: as from `balanced_cuts`.
        index: number of this stage, 0 to `len(cuts)`.
    """

    def __init__(self, detector: ConvTransformerForTemporalActionLocalization, cuts: list[int], index: int):
        super().__init__()
        model = detector.model
        count = len(model.stem) + len(model.branch)
        bounds = [0, *cuts, count]
        if bounds != sorted(bounds) or not 0 <= index <= len(cuts):
            raise ValueError(
                f"cuts {cuts} and index {index}; expected rising numbers from 0 to {count}, 0 to {len(cuts)}."
            )
        self.start, self.stop = bounds[index], bounds[index + 1]
        self.is_first, self.is_last = index == 0, index == len(cuts)
        self.detector = detector
        self.labels: list[dict] = []
        self.num_items_in_batch: torch.Tensor | None = None

        blocks = [(part, place) for part in (model.stem, model.branch) for place in range(len(part))]
        for number, (part, place) in enumerate(blocks):
            if not self.start <= number < self.stop:
                part[place] = nn.Identity()
        if not self.is_first:
            model.embedding = nn.Identity()
        if not self.is_last:
            detector.neck, detector.class_head, detector.segment_head = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, *inputs: torch.Tensor, attention_mask: torch.Tensor, samples: torch.Tensor):
        """
        Args:
            inputs: features (batch, time, n_in) into the first stage; else the levels of the pyramid so far.
            attention_mask: (batch, time) bool, True = valid.
            samples: (batch,), which of `self.labels` these are.

        Returns:
            the levels after this stage; of the last stage the loss, (1,), of which those of all microbatches add up to the
            loss of the batch.
        """
        model, feature_maps = self.detector.model, list(inputs)
        if self.is_first:
            features = inputs[0].to(model.dtype)
            feature_maps = [model.embedding(features, ~attention_mask[..., None])]
        feature_maps, valids = model.run_blocks(feature_maps, attention_mask, self.start, self.stop)
        if not self.is_last:
            return tuple(x.contiguous() for x in feature_maps)
        labels = [self.labels[sample] for sample in samples.tolist()]
        return self.detector.detect(feature_maps, valids, labels, self.num_items_in_batch).loss[None]


class Pipeline:
    """
    A detector over all processes of `torch.distributed`, a stage each, that trains on batches cut into microbatches, with
    the loss and the gradients of the whole batch in one process. Batches are the same on every process.

    Args:
        detector: with the same weights on every process. It is changed and cannot be used alone afterwards.
        device: of this process.
        microbatches: into which each batch is cut; more of them leave the processes idle for less of the time. A schedule
            in which all run forward, then all backward, is idle for (processes - 1) / (microbatches + processes - 1) of it.
        cuts: number of the first block of each stage but the first; default: `balanced_cuts`.

    Raises:
        RuntimeError: `torch.distributed` does not run.
        ValueError: there are more processes than parts to cut into, `cuts` are not for this number of processes, or the
            model's loss or batch norm cannot be had from microbatches.
    """

    def __init__(
        self,
        detector: ConvTransformerForTemporalActionLocalization,
        device: torch.device,
        microbatches: int,
        cuts: list[int] | None = None,
    ):
        if not distributed.is_initialized():
            raise RuntimeError(
                "torch.distributed does not run. Start the script with torchrun, and call "
                "torch.distributed.init_process_group() before this."
            )
        config = detector.config
        if config.use_batch_norm or config.loss_weight <= 0:
            raise ValueError(
                f"use_batch_norm is {config.use_batch_norm} and loss_weight {config.loss_weight}: statistics and weights of a "
                "whole batch, which microbatches do not have. Use use_batch_norm=False and a loss_weight above 0, or DDP."
            )
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.device, self.microbatches = device, microbatches
        self.cuts = balanced_cuts(detector, self.size) if cuts is None else cuts
        if len(self.cuts) != self.size - 1:
            raise ValueError(
                f"cuts {self.cuts} make {len(self.cuts) + 1} stages; expected one for each of {self.size} processes."
            )
        detector.criterion.batch_copies = self.size
        self.stage = DetectorStage(detector, self.cuts, self.rank).to(device).train()
        self.schedules: dict[tuple[int, int], ScheduleGPipe] = {}

    def step(self, batch: Mapping) -> torch.Tensor:
        """
        Forward and backward of one batch. Gradients are added to those that the parameters have.

        Args:
            batch: input_features (batch, time, n_in), attention_mask (batch, time) or None, and labels, as the detector
                takes them. Every new length costs one more forward and backward; pad to one, or to a few.

        Returns:
            the loss, float32, the same on every process.

        Raises:
            ValueError: the batch cannot be cut into as many microbatches of one size, or its shapes do not fit.
        """
        features = batch["input_features"].to(self.device)
        valid, labels = batch.get("attention_mask"), batch["labels"]
        valid = torch.ones(features.shape[:2]) if valid is None else valid
        valid = valid.to(device=self.device, dtype=torch.bool)
        self.stage.detector.model.check_inputs(features, valid)
        size = len(features)
        if size % self.microbatches:
            raise ValueError(
                f"A batch of {size} samples cannot be cut into {self.microbatches} equal microbatches; give "
                f"{max(size // self.microbatches, 1) * self.microbatches} samples."
            )
        detector = self.stage.detector
        positives = detector.count_positives(features, valid, labels)
        normalizer, _ = detector.criterion.update_normalizer(positives)
        self.stage.labels, self.stage.num_items_in_batch = labels, normalizer

        samples = torch.arange(size, device=self.device)
        schedule = self._schedule(tuple(features.shape[:2]))
        losses: list[torch.Tensor] = []
        inputs = (features,) if self.stage.is_first else ()
        target = samples if self.stage.is_last else None
        schedule.step(*inputs, target=target, losses=losses, attention_mask=valid, samples=samples)
        loss = torch.stack(losses).sum().detach() if losses else torch.zeros((), device=self.device)
        distributed.broadcast(loss, self.size - 1)
        return loss

    def _schedule(self, shape: tuple[int, int]) -> ScheduleGPipe:
        # Buffers between stages have fixed shapes.
        if shape not in self.schedules:
            stage = PipelineStage(self.stage, self.rank, self.size, self.device)
            # The loss of each microbatch is its share of the sum already: nothing is to be averaged.
            self.schedules[shape] = ScheduleGPipe(
                stage, self.microbatches, loss_fn=lambda loss, samples: loss.sum(), scale_grads=False
            )
        return self.schedules[shape]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """As `torch.nn.utils.clip_grad_norm_`, for the parameters of all stages together."""
        parameters = [parameter for parameter in self.stage.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters]).to(self.device)
        square = norm.square()
        distributed.all_reduce(square)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, square.sqrt())
        return square.sqrt()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The whole detector's, on the CPU, on the first process; the others get an empty one. To be called on all."""
        own = {name: tensor.cpu() for name, tensor in self.stage.detector.state_dict().items()}
        every = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(own, every)
        return {name: tensor for part in every or () for name, tensor in part.items()}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes the detector as `detector.save_pretrained(folder)` would have in one process. To be called on all."""
        state_dict = self.state_dict()
        if self.rank == 0:
            self.stage.detector.save_pretrained(folder, state_dict=state_dict)
        distributed.barrier()
