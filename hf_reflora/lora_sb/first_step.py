"""The first step of full fine-tuning: the layers' gradients over all samples, and their leading singular triplets.

There are two ways to the same numbers: in passes, each of which sums the gradients of a part of the layers over all
batches, or in one pass block by block (see `blocks`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor
from transformers.utils import logging

from ..distributed.parameters import has_sharded_parameters
from .blocks import CannotCutError, CutGraphs, group_by_block, outermost_blocks
from .collective import common_order, raising_on_every_process, share_factors
from .gradients import GradientSums, frozen, weight_gradients
from .loss import Samples
from .memory import UsageMeter
from .passes import plan_passes
from .subspace import first_update, truncated_svd
from .targets import AdapterLayer


logger = logging.get_logger(__name__)


@dataclass
class FirstSteps:
    """The leading singular triplets of each layer's first step ΔW: call `compute`, then take `results`."""

    samples: Samples
    layers: dict[str, AdapterLayer]
    adapter_name: str
    eta: float
    update: str
    # U (out, r), S (r,), V (in, r) by layer. They are written into the adapter together, after the last pass, so that
    # an error leaves the adapter as it was.
    results: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self.bases = {name: layer.get_base_layer() for name, layer in self.layers.items()}

    def compute(self, passes: int | None) -> None:
        """Computes all results in a number of passes; by default in the way that `initialize_lora_sb_weights` names.

        Raises:
            ValueError: a layer's gradient is missing or not finite.
        """
        groups = plan_passes(self.layers, self.adapter_name, passes)
        if passes is not None:
            return self._in_passes(groups)
        if len(self.samples.batches) == 1 and self.samples.processes == 1:
            # The sum over several batches or processes is complete only after the last backward pass.
            logger.info("LoRA-SB's start: one pass over the samples, which are one batch.")
            return self._in_passes([list(self.layers)], within_backward=True)
        if len(groups) == 1:
            logger.info("LoRA-SB's start: one pass; all gradients together keep within the memory of training.")
            return self._in_passes(groups)
        try:
            self._by_blocks()
        except CannotCutError as error:
            reason = str(error)
        else:
            logger.info("LoRA-SB's start: one pass block by block, as all gradients together take too much memory.")
            return None
        # Only here, after the except clause: the error's traceback holds the tensors of what was tried.
        logger.warning(
            f"LoRA-SB's start makes {len(groups)} passes over the samples, to keep within the memory of training. One "
            f"pass block by block is not possible: {reason}. If all gradients fit into memory, passes=1 is faster."
        )
        self.results.clear()
        return self._in_passes(groups)

    def _in_passes(self, groups: list[list[str]], within_backward: bool = False) -> None:
        """A pass over the samples for each group of layers.

        With `within_backward` a layer's triplets are computed inside the backward pass, as soon as its gradient is
        complete, which is then freed; for a single batch.
        """
        samples = self.samples
        samples.progress.reset(len(groups) * len(samples.batches) + len(self.layers))
        with frozen(samples.model):
            for names in groups:
                bases = {name: self.bases[name] for name in names}
                with weight_gradients(bases, self._finish_layer if within_backward else None) as sums:
                    # With a sharded model the other processes wait inside this very pass, where no message reaches
                    # them: let the launcher end them. With DDP they arrive at the next collective call.
                    with nullcontext() if samples.is_sharded else raising_on_every_process():
                        for _ in samples.backward_each(sums):
                            pass
                samples.share_label_count()
                self._finish(names, sums)

    def _by_blocks(self) -> None:
        """One pass over the samples, block by block.

        Raises:
            CannotCutError: it is not possible here.
        """
        samples = self.samples
        if has_sharded_parameters(samples.model):  # on a single process, too
            # Recomputing a block would need its weights gathered again, by hooks that belong to the backend.
            raise CannotCutError("FSDP2 or ZeRO-3 shard the model")
        blocks = outermost_blocks(samples.model)
        if not blocks:
            raise CannotCutError("the model has no layers that transformers can checkpoint")
        graphs = CutGraphs(blocks)
        samples.progress.reset(len(samples.batches) + len(self.layers))
        with frozen(samples.model, checkpointing=False), weight_gradients(self.bases) as sums, graphs.cutting():
            with raising_on_every_process(), _as_cannot_cut():
                self._to_last_block(graphs, sums)
                order = graphs.order()
            samples.share_label_count()
            order = common_order(order)
            groups = group_by_block({name: blocks[name] for name in order}, self.bases)
            for name in reversed(order):
                with raising_on_every_process(), _as_cannot_cut():
                    graphs.backward(name)
                self._finish(groups[name], sums)
            self._finish(groups[None], sums)
            with raising_on_every_process():
                # A layer of a block that is also used outside of it, before an earlier block: its sum was taken too
                # early.
                if sums:
                    raise CannotCutError(f"{next(iter(sums))} is used outside its block, too")

    def _to_last_block(self, graphs: CutGraphs, sums: GradientSums) -> None:
        """Forward passes, and backward passes down to the last block's output."""
        samples = self.samples
        passes = samples.backward_each(sums)
        graphs.next_batch()
        graphs.meter = UsageMeter(samples.model)
        next(passes, None)
        if samples.batches:  # with several processes, only another one may have some
            self._check_memory(graphs, graphs.meter)
        graphs.meter = None
        graphs.next_batch()
        for _ in passes:
            graphs.next_batch()

    def _check_memory(self, graphs: CutGraphs, meter: UsageMeter) -> None:
        """Compares with the training, by what the first batch took; lets the graphs offload where that is enough.

        Raises:
            CannotCutError: it takes more.
        """
        blocks = outermost_blocks(self.samples.model)
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in blocks.values())
        ratios = self.samples.ratios_to_first()
        training = meter.training(self.layers, self.adapter_name, max(ratios), checkpointed)
        groups = group_by_block(blocks, self.bases)
        needed = meter.block_by_block(self.layers, self.adapter_name, groups, sum(ratios), max(ratios))
        if needed > training and self.samples.device.type not in ("cpu", "mps"):  # these have no memory of their own
            graphs.offload = True  # from the second batch on
            needed = meter.block_by_block(self.layers, self.adapter_name, groups, 1, max(ratios))
        if needed > training:
            raise CannotCutError(f"it would take {needed / 1e9:.2g} GB, training {training / 1e9:.2g} GB")

    def _finish(self, names: list[str], sums: GradientSums) -> None:
        """Computes the triplets of these layers from their sums, which are consumed."""
        if self.samples.processes > 1:
            layers = {name: self.layers[name] for name in names}
            shared = share_factors(layers, self.adapter_name, sums, self.samples.device, self._singular_triplets)
            for name, triplets in shared:
                self._store(name, triplets)
            return
        for name in names:
            if name not in self.results:
                self._finish_layer(name, sums.pop(name, None))

    def _finish_layer(self, name: str, G: Tensor | None) -> None:
        self._store(name, self._singular_triplets(name, G))

    def _singular_triplets(
        self,
        name: str,
        G: Tensor | None,  # (out, in), summed over the labels; it is overwritten
    ) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), S (r,) and V (in, r) of the layer's first step ΔW (Equations 5 to 7)."""
        if G is None or not G.any():
            raise ValueError(
                f"No gradient reached {name} from these samples, so they define no subspace for it. Take more, "
                "leave the layer out (exclude_modules), or, with reentrant gradient checkpointing, call "
                "model.enable_input_require_grads() first."
            )
        if not torch.isfinite(G).all():
            raise ValueError(f"The gradient of {name} is not finite. Look at the data, or use bfloat16 for float16.")
        mean = G.div_(self.samples.label_count.to(G))
        return truncated_svd(first_update(mean, self.eta, self.update), self.layers[name].r[self.adapter_name])

    def _store(self, name: str, triplets: tuple[Tensor, Tensor, Tensor]) -> None:
        self.results[name] = triplets
        self.samples.progress.update()


@contextmanager
def _as_cannot_cut() -> Iterator[None]:
    """Turns what autograd raises for a graph that does not allow the cuts into a CannotCutError.

    An error of the model itself is turned as well, and raised again by the passes that are made then. Where memory
    runs out they would not fit either.
    """
    try:
        yield
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            raise
        raise CannotCutError(f"{type(error).__name__}: {error}") from error
