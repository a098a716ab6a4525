"""How a run's model lies on its processes: copies, shards of everything, shards of the classes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from mlhead import parallel
from mlhead._config import TrainConfig
from mlhead._usage import UsageError, require, usage_fail
from mlhead.backbones import HeadedModel, unused_parameters
from mlhead.distributed import Processes
from mlhead.heads._decoder import DecoderHead


class Spread:
    """Puts models on the processes of a run, as --parallel and --class-parallel say.

    Every process has its own images. Gradients are means over the processes.

    Args:
        config: the options of the run.
        processes: of the run.
        device: of this process.

    Raises:
        UsageError: the options do not fit the number of processes.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device) -> None:
        world = processes.world
        classes = max(1, config.class_parallel) if world > 1 else 1
        self.processes, self.device, self.classes = processes, device, classes
        self.kind = "none" if world == 1 else config.parallel or "ddp"
        if world > 1 and self.kind == "none":
            usage_fail("--parallel", f"ddp or fsdp for {world} processes", "'none'")
        if world > 1 and config.fused_update:
            usage_fail("--fused-update", f"off for {world} processes", True)
        if world % classes:
            usage_fail("--class-parallel", f"a divisor of {world}, the number of processes", classes)
        if config.batch_size % world:
            usage_fail("--batch-size", f"a multiple of {world}, the number of processes", config.batch_size)
        if classes > 1 and self.kind == "fsdp" and config.task == "zero-shot":
            usage_fail("--parallel", "ddp for --class-parallel of word vectors", "'fsdp'")
        if config.sync_batch_norm and device.type != "cuda":
            usage_fail("--sync-batch-norm", "off but for CUDA devices", True)
        self._synced = config.sync_batch_norm and world > 1

    @property
    def has_shards(self) -> bool:
        """Whether there are parameters of which each process has a part."""
        return self.kind == "fsdp" or self.classes > 1

    def prepared(self, model: HeadedModel, channels_last: bool) -> HeadedModel:
        """The model on its device, in the order of axes that it is to have, with the batch norms that it is to have."""
        if channels_last and self.kind != "fsdp":  # which takes contiguous parameters only
            model = model.to(memory_format=torch.channels_last)
        if self._synced:
            model = require("timm.layers", "--sync-batch-norm").convert_sync_batchnorm(model)
        return model.to(self.device)

    def shard(self, model: HeadedModel) -> None:
        """Leaves each process its part of a model, in place."""
        if self.classes > 1:
            world = self.processes.world
            shape = (world // self.classes, self.classes) if world > self.classes else (world,)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "class")[-len(shape) :])
            try:
                parallel.parallelize_head(model.head, mesh, input_layouts=Shard(0))
            except (TypeError, ValueError) as error:
                raise UsageError(f"--class-parallel {self.classes}: {' '.join(str(error).split())}") from error
        if self.kind == "fsdp":
            # A head may return a view, which nothing here writes into.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            own = set(parallel.class_parameters(model).values())
            mesh = init_device_mesh(self.device.type, (self.processes.world,))
            for module in (*_stages(model.backbone), model):
                fully_shard(module, mesh=mesh, ignored_params=own)
            register_fsdp_forward_method(model, "topk")

    def wrap(self, model: HeadedModel, image_shape: tuple[int, int, int]) -> nn.Module:
        """What to call in training, so that gradients become means over the processes."""
        if self.kind != "ddp":
            return model
        # Nor buffers: word vectors may be shared out too, and statistics are averaged when they are needed.
        own = [*parallel.class_parameters(model), *(name for name, _ in model.named_buffers())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
        unused = unused_parameters(model, torch.zeros(1, *image_shape, device=self.device))
        wrapped = DistributedDataParallel(model, find_unused_parameters=bool(unused))
        if self.device.type == "cpu":
            # A lambda, because DDP reads annotations and knows them only as types.
            wrapped.register_comm_hook(self.processes.world, lambda world, bucket: _mean_of_each(world, bucket))
        return wrapped

    def communicates(self, module: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
        """Whether the next backward averages gradients, or leaves that to a later one."""
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)
        elif isinstance(module, DistributedDataParallel) and not now:
            return module.no_sync()
        return contextlib.nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Scales the gradients to a norm, over all parameters, of at most `max_norm`; returns the norm before."""
        clip = nn.utils.clip_grad_norm_ if self.kind == "none" else parallel.clip_grad_norm_
        return clip(parameters, max_norm)

    @torch.no_grad()
    def average_statistics(self, model: nn.Module | None) -> None:
        """Makes the running statistics of batch norms the means over the processes."""
        if self.processes.world == 1 or model is None:
            return
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for statistic in (module.running_mean, module.running_var):
                    assert statistic is not None
                    dist.all_reduce(statistic)
                    statistic.div_(self.processes.world)

    def scaler(self, enabled: bool) -> torch.amp.GradScaler:
        """The scaler of a loss in fp16."""
        kind = torch.amp.GradScaler if self.kind == "none" else _AgreedScaler
        return kind(self.device.type, enabled=enabled)


def _mean_of_each(world: int, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages the gradients of a bucket one by one.

    DDP fills its buckets anew after the first step of a process. Where in a bucket a gradient lies decides in which
    order gloo adds it up, so a resumed run would round differently.
    """
    buffer = bucket.buffer()
    sizes = [gradient.numel() for gradient in bucket.gradients()]
    works = [dist.all_reduce(part, async_op=True) for part in buffer.split(sizes)]
    done = torch.futures.collect_all([work.get_future() for work in works])
    return done.then(lambda _: buffer.div_(world))


def true_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of parameters that lie on the processes with zeros at the end: by name, their shape without."""
    return {
        f"{prefix}.duplicate_pooling_bias": (head.num_classes,)
        for prefix, head in model.named_modules()
        if isinstance(head, DecoderHead) and head._shards is not None
    }


def _stages(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone whose parameters are gathered and let go one after another."""
    lists = [child for child in backbone.children() if isinstance(child, nn.Sequential | nn.ModuleList)]
    return [block for blocks in lists for block in blocks if next(block.parameters(), None) is not None]


class _AgreedScaler(torch.amp.GradScaler):
    """Skips a step on all processes when the part of the gradients that any of them has overflows."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is not None:
                    own = grad.to_local() if isinstance(grad, DTensor) else grad
                    by_dtype.setdefault(own.dtype, []).append(own)
        for grads in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}
