"""How long a step takes, by a roofline: work over the rate of what does it, and what cannot hide behind it.

Assumed, and printed with every plan (`ATTAINED`): what share of the data sheet's rates is reached. A hop of the ring
hides behind the kernel of one block, the gathering of a layer's parameters behind its matrix products; what exceeds
them, sums over "tensor" and sums of gradients over "data" are waited for.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ringrl.planning.kernel import kernel_of
from ringrl.planning.machines import Attained, Machine
from ringrl.planning.workload import Workload
from ringrl.training.budget import forward_flops, step_flops

# Of accelerators: no step of ours was timed on one.
ATTAINED = Attained(matrices=0.7, attention=0.5, memory=0.8, links=0.8)
WITHOUT_KERNEL = 0.15  # attention by XLA: tiles of logits go through the memory, some 32 operations for each byte
# Of the bfloat16 rate in float32, matrices and attention: TPUs round what goes into a matrix product, and GPUs take
# TF32, but our attention has six products for one on TPUs and leaves the tensor cores of GPUs idle.
FLOAT32: Mapping[str, tuple[float, float]] = MappingProxyType({"tpu": (1.0, 1 / 6), "gpu": (0.5, 1 / 15)})
OF_HOST = Attained(1.0, 0.75, 1.0, 1.0)  # of the nominal host device; `ringrl plan` measures this machine's (probe.py)
# Products of a tile's size per pair of tokens: forward 2; backward 3 for the queries' kernel and 4 for the keys', or
# 5 where one loop computes both (the XLA kernel).
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS, _BACKWARD_PRODUCTS_OF_XLA = 2, 7, 5
_ACTIVATION_TRAFFIC = 40  # times that a number per token and feature of a layer is read or written, both passes


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, and operations of all devices."""

    matrices: float
    attention: float
    memory: float  # reading and writing, which hides behind computation where it is less
    ring: float  # hops beyond what the kernels hide
    parameters: float  # gathering and scattering beyond what the matrix products hide
    sums: float  # over "tensor" and "data"
    model_flops: float  # each of the model's operations once
    mfu: float

    @property
    def total(self) -> float:
        """In all."""
        return max(self.matrices + self.attention, self.memory) + self.ring + self.parameters + self.sums


def attained_by(workload: Workload, machine: Machine) -> Attained:
    """What is assumed of it, or was measured."""
    device, model = machine.device, workload.model
    if device.platform == "cpu":
        return machine.measured or OF_HOST
    has_kernel = kernel_of(model, device) != "xla"
    matrices, attention = FLOAT32[device.platform] if model.dtype == "float32" else (1.0, 1.0)
    attention *= ATTAINED.attention
    if model.attention == "vanilla":  # JAX's own, which rounds as other products do
        attention = WITHOUT_KERNEL
    elif not has_kernel:
        attention = min(attention, WITHOUT_KERNEL)
    return ATTAINED._replace(matrices=matrices * ATTAINED.matrices, attention=attention)


def estimate(workload: Workload, machine: Machine, *, hops_hide: bool = True) -> StepTime:
    """Of one step on this machine; `hops_hide`: whether the compiler lets the ring's transfers run beside kernels."""
    model, config, device, attained = workload.model, workload.config, machine.device, attained_by(workload, machine)
    contexts, devices = config.optimiser.batch_size, config.mesh.devices
    forward = contexts * forward_flops(model, workload.tokens) / devices
    pairs = contexts * model.layers * 2 * workload.tokens**2 * model.width / devices  # two products, a causal half
    matrices = (3 * (forward - pairs) + _again(workload, forward - pairs)) / (device.flops * attained.matrices)
    one_product = pairs / _FORWARD_PRODUCTS / (device.flops * attained.attention)
    forward_kernels, backward_kernels = _FORWARD_PRODUCTS * one_product, _BACKWARD_PRODUCTS * one_product
    if kernel_of(model, device) == "xla":
        backward_kernels = _BACKWARD_PRODUCTS_OF_XLA * one_product
    if model.attention == "vanilla":  # hides nothing of the square, and computes it anew with remat
        times = 2 if model.remat == "layers" else 1
        forward_kernels, backward_kernels = 2 * 2 * times * one_product, 2 * 4 * one_product
    elif config.mesh.layout == "contiguous":  # the device with the end of the context sees most, and all wait for it
        uneven = 2 - 1 / config.mesh.seq
        forward_kernels, backward_kernels = uneven * forward_kernels, uneven * backward_kernels
    hidden_by = (forward_kernels, backward_kernels) if hops_hide else (0.0, 0.0)
    time = StepTime(
        matrices=matrices,
        attention=forward_kernels + backward_kernels,
        memory=_traffic(workload) / (device.bandwidth * attained.memory),
        ring=_exposed_hops(workload, machine, attained, *hidden_by),
        parameters=max(0.0, _gathering(workload, machine, attained) - matrices),
        sums=_sums(workload, machine, attained),
        model_flops=step_flops(model, workload.tokens, contexts) or 0.0,
        mfu=0.0,
    )
    return dataclasses.replace(time, mfu=time.model_flops / (time.total * devices * device.flops))


def _again(workload: Workload, forward: float) -> float:
    """Operations in matrices, of `forward` in a forward pass, that the backward pass computes anew.

    With remat all but the last matrix of a layer, whose result nothing in the layer needs; else, where the feed-forward
    layer is computed in blocks, its first matrix.
    """
    model, mesh = workload.model, workload.config.mesh
    local = _local(workload) / mesh.tensor
    one_of_two = 2 * local * model.layers * model.feed_forward * model.width**2
    if model.remat == "layers":
        return forward - one_of_two
    return one_of_two if workload.is_in_blocks else 0.0


def _size(workload: Workload) -> int:
    return 2 if workload.model.dtype == "bfloat16" else 4


def _local(workload: Workload) -> float:
    """Tokens that a device computes in a step."""
    mesh = workload.config.mesh
    return workload.config.optimiser.batch_size * workload.tokens / (mesh.data * mesh.fsdp * mesh.seq)


def _traffic(workload: Workload) -> float:
    """Bytes that a device reads and writes: state and gradients, gathered parameters, activations."""
    model, mesh, count = workload.model, workload.config.mesh, workload.parameters
    gathered = 3 * model.layers * count.layer / mesh.tensor * _size(workload)
    activations = _ACTIVATION_TRAFFIC * model.layers * _local(workload) * model.width / mesh.tensor * _size(workload)
    return (2 * 12 + 2 * 4) * count.device + workload.config.optimiser.accumulation * gathered + activations


def _exposed_hops(
    workload: Workload, machine: Machine, attained: Attained, forward_kernels: float, backward_kernels: float
) -> float:
    """Keys and values go round, and in the backward pass their gradients (float32) with them."""
    model, mesh = workload.model, workload.config.mesh
    if mesh.seq == 1:
        return 0.0
    numbers = 2 * _local(workload) * model.layers * model.width * model.kv_heads / model.heads / mesh.tensor
    rate = machine.hop(mesh.seq) if model.attention == "ring" else machine.collective(mesh.seq)
    hops = (mesh.seq - 1) / (rate * attained.links)
    sends = hops * numbers * _size(workload), hops * numbers * (_size(workload) + 4)
    if model.attention == "ring":
        return max(0.0, sends[0] - forward_kernels) + max(0.0, sends[1] - backward_kernels)
    return sum(sends)  # gathered at once, before the kernel


def _gathering(workload: Workload, machine: Machine, attained: Attained) -> float:
    """Parameters of every layer, gathered for the forward and the backward pass; their gradients dealt out again."""
    model, mesh, count = workload.model, workload.config.mesh, workload.parameters
    group = mesh.fsdp * mesh.seq
    passes = 3 * workload.config.optimiser.accumulation
    carried = passes * model.layers * count.layer / mesh.tensor * _size(workload) * (group - 1) / group
    ways = 2 if machine.device.platform == "tpu" else 1  # around a torus both ways at once
    rate = machine.collective(mesh.fsdp * mesh.tensor * mesh.seq, stride=mesh.tensor)
    return carried / (ways * rate * attained.links)


def _sums(workload: Workload, machine: Machine, attained: Attained) -> float:
    """All-reduce of activations over "tensor", six a layer, and of gradients over "data"."""
    model, mesh = workload.model, workload.config.mesh
    apart = mesh.fsdp * mesh.tensor * mesh.seq  # of those that differ in "data", the outermost axis
    activations = 6 * model.layers * _local(workload) * model.width * _size(workload)
    seconds = 2 * (mesh.tensor - 1) / mesh.tensor * activations / machine.collective(mesh.tensor * mesh.seq, mesh.seq)
    gradients = 4 * workload.parameters.device
    seconds += 2 * (mesh.data - 1) / mesh.data * gradients / machine.collective(mesh.devices, apart)
    return seconds / attained.links
