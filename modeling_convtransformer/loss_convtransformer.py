"""What a ConvTransformer detector is trained with: target assignment, focal and distance-IoU losses.

As in ActionFormer (Zhang et al., ECCV 2022, https://arxiv.org/abs/2202.07925) and its release (v1), for the whole
batch at once. All of it is float32, whatever the model's dtype. Positions and lengths are on the feature grid;
offsets are in strides of their level.
"""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

# Segments within this length (in features) of the shortest one at a point all give the point their class:
# annotations often hold one segment under two classes.
_SAME_LENGTH = 1e-3

# Share of the old value in the moving number of positives.
_NORMALIZER_MOMENTUM = 0.9


def sigmoid_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> torch.Tensor:
    """
    Focal loss (Lin et al., 2017, https://arxiv.org/abs/1708.02002) of each element, in float32.

    Args:
        logits: any shape.
        targets: same shape, 0 to 1 (label smoothing makes them soft).
        alpha: weight of the positives, 1 - alpha that of the negatives; below 0 there are no weights.
        gamma: how much easy elements are weighed down.
    """
    logits, targets = logits.float(), targets.float()
    probabilities = logits.sigmoid()
    agreement = probabilities * targets + (1 - probabilities) * (1 - targets)
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (1 - agreement) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def center_diou_loss(predicted: torch.Tensor, target: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """
    Distance-IoU loss (Zheng et al., 2020, https://arxiv.org/abs/1911.08287) of segments that share a point inside.

    Args:
        predicted, target: (..., 2), the distances from the point to start and end, 0 or more.

    Returns:
        (...), float32: 1 - IoU + (distance of the centres / length of the hull) ** 2.
    """
    predicted, target = predicted.float(), target.float()
    intersection = torch.minimum(predicted, target).sum(-1)
    union = predicted.sum(-1) + target.sum(-1) - intersection
    hull = torch.maximum(predicted, target).sum(-1)
    distance = 0.5 * ((predicted[..., 1] - predicted[..., 0]) - (target[..., 1] - target[..., 0]))
    return 1 - intersection / union.clamp(min=eps) + (distance / hull.clamp(min=eps)) ** 2


def assign_targets(
    points: torch.Tensor,
    strides: torch.Tensor,
    ranges: torch.Tensor,
    segments: torch.Tensor,
    class_labels: torch.Tensor,
    is_segment: torch.Tensor,
    num_labels: int,
    center_sample: str = "radius",
    center_sample_radius: float = 1.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Which point learns which segment. A point takes the shortest of the segments that it may learn: it lies strictly
    inside the segment's centre region (`center_sample_radius` strides around the centre, clipped to the segment; or
    the whole segment), and its distance to the segment's farther end is within the level's range, ends included.

    Args:
        points: (points,) positions on the feature grid; strides: (points,); ranges: (points, 2).
        segments: (batch, segments, 2) on the feature grid; class_labels: (batch, segments);
        is_segment: (batch, segments) bool, False = filler.

    Returns:
        classes (batch, points, num_labels) of 0 and 1, offsets (batch, points, 2) to start and end in strides (only
        meaningful where a class is set), and candidates (batch, points, segments) bool: the point may learn it.
    """
    starts, ends = segments[:, None, :, 0], segments[:, None, :, 1]
    position, stride = points[None, :, None], strides[None, :, None]
    to_start, to_end = position - starts, ends - position
    if center_sample == "radius":
        center, reach = 0.5 * (starts + ends), center_sample_radius * stride
        left = position - torch.maximum(center - reach, starts)
        right = torch.minimum(center + reach, ends) - position
        inside = torch.minimum(left, right) > 0
    else:
        inside = torch.minimum(to_start, to_end) > 0
    farther = torch.maximum(to_start, to_end)
    in_range = (farther >= ranges[None, :, None, 0]) & (farther <= ranges[None, :, None, 1])
    candidates = inside & in_range & is_segment[:, None, :]

    lengths = (ends - starts).expand_as(candidates).masked_fill(~candidates, torch.inf)
    shortest, chosen = lengths.min(dim=-1)
    takes = candidates & (lengths <= shortest[..., None] + _SAME_LENGTH)
    one_hot = F.one_hot(class_labels, num_labels).to(points.dtype)
    # autocast makes the product half precision: 0 and 1 survive that, but not the smoothing of labels that follows
    classes = (takes.to(points.dtype) @ one_hot).to(points.dtype).clamp(max=1)
    offsets = torch.stack((to_start, to_end), dim=-1)
    offsets = offsets.take_along_dim(chosen[..., None, None].expand(-1, -1, 1, 2), dim=2).squeeze(2)
    return classes, offsets / strides[None, :, None], candidates


def pad_labels(labels: list[dict], num_labels: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """
    Lists of segments as tensors of one size, checked.

    Args:
        labels: for each sample `{"segments": (N, 2) on the grid, "class_labels": (N,)}`; N = 0 is legal.

    Returns:
        segments (batch, max N or 1, 2) float32, class_labels (batch, max N or 1) long, is_segment (same) bool.

    Raises:
        ValueError: wrong keys or shapes, a class outside id2label, or start >= end; the message names the sample.
    """
    if isinstance(labels, dict):
        raise ValueError("labels is one dict; expected a list with one for each sample: labels=[{...}].")
    segments, classes = [], []
    for index, label in enumerate(labels):
        if not {"segments", "class_labels"} <= set(label):
            raise ValueError(
                f"labels[{index}] has the keys {sorted(label)}; expected 'segments' (N, 2) and 'class_labels' (N,)."
            )
        one_segments = torch.as_tensor(label["segments"], dtype=torch.float32, device=device)
        one_classes = torch.as_tensor(label["class_labels"], device=device)
        if one_classes.is_floating_point() and one_classes.numel():
            raise ValueError(f"labels[{index}] has class_labels of type {one_classes.dtype}; expected whole numbers.")
        one_classes = one_classes.long()
        if one_segments.numel() == 0:
            one_segments = one_segments.reshape(0, 2)
        if one_segments.shape != (len(one_segments), 2) or one_classes.shape != (len(one_segments),):
            raise ValueError(
                f"labels[{index}] has segments of shape {tuple(one_segments.shape)} and class_labels of shape "
                f"{tuple(one_classes.shape)}; expected (N, 2) and (N,)."
            )
        segments.append(one_segments)
        classes.append(one_classes)
    counts = torch.tensor([len(one) for one in segments], device=device)
    segments = nn.utils.rnn.pad_sequence(segments, batch_first=True)
    classes = nn.utils.rnn.pad_sequence(classes, batch_first=True)
    if segments.shape[1] == 0:  # every list is empty: one filler keeps all shapes alive
        segments, classes = segments.new_zeros(len(labels), 1, 2), classes.new_zeros(len(labels), 1)
    is_segment = torch.arange(segments.shape[1], device=device) < counts[:, None]

    bad_class = is_segment & ((classes < 0) | (classes >= num_labels))
    in_order = (segments[..., 0] < segments[..., 1]) & segments.isfinite().all(dim=-1)
    bad_order = is_segment & ~in_order
    if (bad_class | bad_order).any():
        index, which = (bad_class | bad_order).nonzero()[0].tolist()
        if bad_class[index, which]:
            raise ValueError(
                f"labels[{index}] has the class {int(classes[index, which])} at segment {which}, but the model has "
                f"the classes 0 to {num_labels - 1} (config.id2label)."
            )
        raise ValueError(
            f"labels[{index}] has the segment {segments[index, which].tolist()} at {which}; "
            "expected start < end, in positions on the feature grid."
        )
    return segments, classes, is_segment


class KeepsDtype(nn.Module):
    """A module whose buffers keep their dtype under `model.to(torch.bfloat16)` and `model.half()`."""

    def _apply(self, fn, recurse=True):
        def move(tensor):
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class ConvTransformerLoss(KeepsDtype):
    """
    Focal loss over valid points plus distance-IoU loss over positive points, both divided by a moving number of
    positives (`loss_normalizer`, saved with the model; updated in training before it is used, as in v1). When
    `torch.distributed` runs, positives are counted over all processes and the loss is scaled such that the average
    over processes, which is what data-parallel training takes, is the loss of the global batch.

    `batch_copies` is the number of processes that work on the same batch: those of tensor parallelism, or the stages of
    a pipeline. They count it once, and average nothing.
    """

    def __init__(self, config, num_labels: int | None = None):
        super().__init__()
        self.num_labels = config.num_labels if num_labels is None else num_labels
        self.center_sample = config.center_sample
        self.center_sample_radius = config.center_sample_radius
        self.loss_weight = config.loss_weight
        self.label_smoothing = config.label_smoothing
        self.initial_normalizer = float(config.init_loss_norm)
        self.register_buffer("loss_normalizer", torch.tensor(self.initial_normalizer, dtype=torch.float32))
        # (not in transformers before 5.17, nor outside of `from_pretrained(distributed_config=...)`)
        self.batch_copies = getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1
        self.has_warned = False

    def forward(
        self,
        logits: torch.Tensor,
        offsets: torch.Tensor,
        point_mask: torch.Tensor,
        points: torch.Tensor,
        strides: torch.Tensor,
        ranges: torch.Tensor,
        labels: list[dict],
        num_items_in_batch: torch.Tensor | float | None = None,
        match_logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            logits: (batch, points, num_labels).
            offsets: (batch, points, 2) predicted distances to start and end, in strides, 0 or more.
            point_mask: (batch, points) bool, True = valid.
            points: (points,) positions on the grid; strides: (points,); ranges: (points, 2).
            labels: see `pad_labels`.
            num_items_in_batch: divide by this in place of the moving number of positives, which then stays as it is, and
                leave scaling by the number of processes to the caller. For batches that are accumulated: the moving
                number for all of them, from `count_positives` and `update_normalizer`.
            match_logits: of the shape of `logits`, which learn the same targets; their loss is added.

        Returns:
            the loss, and its parts: `cls_loss` and `reg_loss` (the loss is `cls_loss + loss_weight * reg_loss`), with
            `match_logits` the `contrastive_loss`, and `num_positives` and `num_unassigned_segments`, which are counts of this process's batch.

        Raises:
            ValueError: see `pad_labels`.
        """
        class_targets, offset_targets, is_positive, unassigned = self._assign(
            point_mask, points, strides, ranges, labels
        )
        num_positives = is_positive.sum().float()
        normalizer, world_size = num_items_in_batch, 1
        if num_items_in_batch is None:
            normalizer, world_size = self.update_normalizer(num_positives)
        class_targets = class_targets * (1 - self.label_smoothing) + self.label_smoothing / (self.num_labels + 1)

        cls_loss = sigmoid_focal_loss(logits, class_targets).masked_fill(~point_mask[..., None], 0).sum()
        # Where nothing is to be regressed, compare with zero: any finite value does, it is masked.
        offset_targets = offset_targets.masked_fill(~is_positive[..., None], 0)
        reg_loss = center_diou_loss(offsets, offset_targets).masked_fill(~is_positive, 0).sum()
        cls_loss, reg_loss = (loss * world_size / normalizer for loss in (cls_loss, reg_loss))
        loss_weight = self.loss_weight
        if loss_weight <= 0:  # balance the two
            loss_weight = cls_loss.detach() / reg_loss.detach().clamp(min=0.01)
        loss, parts = cls_loss + loss_weight * reg_loss, {"cls_loss": cls_loss, "reg_loss": reg_loss}
        if match_logits is not None:
            match_loss = sigmoid_focal_loss(match_logits, class_targets).masked_fill(~point_mask[..., None], 0).sum()
            parts["contrastive_loss"] = match_loss * world_size / normalizer
            loss = loss + parts["contrastive_loss"]
        return loss, {**parts, "num_positives": num_positives, "num_unassigned_segments": unassigned.sum()}

    def count_positives(
        self,
        point_mask: torch.Tensor,
        points: torch.Tensor,
        strides: torch.Tensor,
        ranges: torch.Tensor,
        labels: list[dict],
    ) -> torch.Tensor:
        """How many points of a batch learn a segment; arguments as in `forward`."""
        return self._assign(point_mask, points, strides, ranges, labels)[2].sum().float()

    @torch.no_grad()
    def _assign(self, point_mask, points, strides, ranges, labels) -> tuple[torch.Tensor, ...]:
        """Class targets (batch, points, num_labels), offset targets (batch, points, 2), positive points (batch, points),
        and segments that no point learns (batch, segments)."""
        if not isinstance(labels, dict) and len(labels) != len(point_mask):
            raise ValueError(
                f"labels has {len(labels)} entries for a batch of {len(point_mask)} samples; give one a sample."
            )
        segments, classes, is_segment = pad_labels(labels, self.num_labels, point_mask.device)
        class_targets, offset_targets, candidates = assign_targets(
            points,
            strides,
            ranges,
            segments,
            classes,
            is_segment,
            self.num_labels,
            self.center_sample,
            self.center_sample_radius,
        )
        is_positive = (class_targets.sum(-1) > 0) & point_mask
        unassigned = is_segment & ~(candidates & point_mask[..., None]).any(dim=1)
        self._warn_of_unassigned(segments, unassigned)
        return class_targets, offset_targets, is_positive, unassigned

    @torch.no_grad()
    def update_normalizer(self, num_positives: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The moving number of positives, in training with this batch's (of all processes) in it; and the number of
        processes, those with the same batch counted once."""
        processes = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            processes = torch.distributed.get_world_size()
        world_size = max(processes // self.batch_copies, 1)
        if self.training:
            total = num_positives.clone()
            if world_size > 1:
                torch.distributed.all_reduce(total)
                total /= processes // world_size
            moved = _NORMALIZER_MOMENTUM * self.loss_normalizer.float()
            self.loss_normalizer.copy_(moved + (1 - _NORMALIZER_MOMENTUM) * total.clamp(min=1))
        # A copy: the next step changes the buffer in place, perhaps before this step's backward pass.
        return self.loss_normalizer.float().clone(), world_size

    def _warn_of_unassigned(self, segments: torch.Tensor, unassigned: torch.Tensor):
        if self.has_warned or torch.compiler.is_compiling() or not unassigned.any():
            return
        self.has_warned = True
        sample, which = unassigned.nonzero()[0].tolist()
        start, end = segments[sample, which].tolist()
        warnings.warn(
            f"{int(unassigned.sum())} segments of this batch teach nothing: no point of the pyramid lies in their centre "
            f"and has a fitting regression_range. The first is [{start:.2f}, {end:.2f}] (features) of sample {sample}. "
            "Shorter segments than about one feature need a smaller feature stride; loss_dict['num_unassigned_segments'] "
            "goes on counting, this warning is not repeated."
        )
