"""Roofline estimate of the time of a training step: work over attained rates, plus exposed communication.

The attained shares of the data sheet's rates are assumptions (`ATTAINED`), printed with every plan. A hop of the ring
hides behind the kernel of one block, and the all-gather of a layer's parameters behind its matrix products. The excess,
all-reduces over "tensor" and all-reduces of gradients over "data" are exposed.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ringrl.attention.strategy import link_of
from ringrl.planning.machines import Machine, kernel_of
from ringrl.planning.workload import Workload
from ringrl.training.budget import forward_flops, step_flops


class Attained(NamedTuple):
    """Shares of a device's peak rates that a step attains."""

    matrices: float
    attention: float
    memory: float
    links: float


# Assumed for accelerators; no step was timed on one.
ATTAINED = Attained(matrices=0.7, attention=0.5, memory=0.8, links=0.8)
WITHOUT_KERNEL = 0.15  # attention in plain XLA: tiles of logits pass through memory, about 32 operations per byte
# Float32 rates as a share of bfloat16, for matrix products and attention. Matrix products are rounded to bfloat16 on
# TPUs and TF32 on GPUs. Attention is exact: six products instead of one on TPUs, no tensor cores on GPUs.
FLOAT32: Mapping[str, tuple[float, float]] = {"tpu": (1.0, 1 / 6), "gpu": (0.5, 1 / 15)}
ATTENTION_OF_HOST = 0.75  # for the nominal host device; `ringrl plan` measures this machine
# Matrix products per pair of tiles: 2 forward; backward 3 for dq and 4 for dk and dv, or 5 in one loop.
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS, _BACKWARD_PRODUCTS_IN_ONE_LOOP = 2, 7, 5
_ACTIVATION_TRAFFIC = 40  # reads and writes per token and feature of a layer, both passes


class StepTime(NamedTuple):
    """Seconds of one optimiser step by part, and operations over all devices."""

    matrices: float
    attention: float
    memory: float  # memory traffic, which overlaps with computation
    ring: float  # exposed time of ring hops
    parameters: float  # exposed time of gathering and scattering parameters
    sums: float  # all-reduces over "tensor" and "data"
    model_flops: float  # operations of the model, without recomputation
    mfu: float

    @property
    def total(self) -> float:
        """Total seconds."""
        return max(self.matrices + self.attention, self.memory) + self.ring + self.parameters + self.sums


def attained_by(workload: Workload, machine: Machine) -> Attained:
    """Return the assumed or measured shares of the machine's rates."""
    device, model = machine.device, workload.model
    if machine.measured or device.platform == "cpu":
        return Attained(1.0, machine.measured or ATTENTION_OF_HOST, 1.0, 1.0)
    matrices, attention = FLOAT32[device.platform] if model.dtype == "float32" else (1.0, 1.0)
    attention *= ATTAINED.attention
    if model.attention == "vanilla":  # jax.nn.dot_product_attention rounds like other products
        attention = WITHOUT_KERNEL
    elif kernel_of(model, device) == "xla":
        attention = min(attention, WITHOUT_KERNEL)
    return ATTAINED._replace(matrices=matrices * ATTAINED.matrices, attention=attention)


def step_time(workload: Workload, machine: Machine, *, hops_hide: bool = True) -> StepTime:
    """Estimate the time of one step. `hops_hide`: whether the compiler overlaps the ring's transfers with kernels."""
    model, config, device, attained = workload.model, workload.config, machine.device, attained_by(workload, machine)
    contexts, devices = config.optimiser.batch_size, config.mesh.devices
    forward = contexts * forward_flops(model, workload.tokens) / devices
    pairs = contexts * model.layers * 2 * workload.tokens**2 * model.width / devices  # two products, causal half
    matrices = (3 * (forward - pairs) + _again(workload, forward - pairs)) / (device.flops * attained.matrices)
    one_product = pairs / _FORWARD_PRODUCTS / (device.flops * attained.attention)
    forward_kernels, backward_kernels = _FORWARD_PRODUCTS * one_product, _BACKWARD_PRODUCTS * one_product
    if machine.measured or kernel_of(model, device) in ("xla", "cudnn"):  # the measured rate counts five products
        backward_kernels = _BACKWARD_PRODUCTS_IN_ONE_LOOP * one_product
    if model.attention == "vanilla":  # computes hidden logits too, and recomputes them with remat
        times = 1 if model.remat == "none" else 2
        forward_kernels, backward_kernels = 2 * 2 * times * one_product, 2 * 4 * one_product
    elif config.mesh.layout == "contiguous":
        # All devices wait for the group with the end of the context.
        uneven = 2 - workload.group / config.mesh.seq
        forward_kernels, backward_kernels = uneven * forward_kernels, uneven * backward_kernels
    hidden_by = (forward_kernels, backward_kernels) if hops_hide else (0.0, 0.0)
    again = 2 if model.remat == "full" else 1  # the backward pass repeats attention
    if model.attention != "vanilla":
        forward_kernels *= again
    time = StepTime(
        matrices=matrices,
        attention=forward_kernels + backward_kernels,
        memory=_traffic(workload) / (device.bandwidth * attained.memory),
        ring=_exposed_hops(workload, machine, attained, hidden_by, again),
        parameters=max(0.0, _gathering(workload, machine, attained) - matrices),
        sums=_sums(workload, machine, attained),
        model_flops=step_flops(model, workload.tokens, contexts) or 0.0,
        mfu=0.0,
    )
    return time._replace(mfu=time.model_flops / (time.total * devices * device.flops))


def _again(workload: Workload, forward: float) -> float:
    """Return the operations in matrix products (`forward` per forward pass) that the backward pass recomputes.

    With remat: all but the last product of a layer. Without: the first product of a feed-forward layer in blocks.
    """
    model = workload.model
    local = _local(workload) / workload.config.mesh.tensor
    one_of_two = 2 * local * model.layers * model.feed_forward * model.width**2
    if model.remat != "none":
        return forward - one_of_two
    return one_of_two if workload.is_in_blocks else 0.0


def _local(workload: Workload) -> float:
    """Return the tokens per device and step."""
    mesh = workload.config.mesh
    return workload.config.optimiser.batch_size * workload.tokens / (mesh.data * mesh.fsdp * mesh.seq)


def _traffic(workload: Workload) -> float:
    """Return the bytes that a device reads and writes for state, gradients, gathered parameters and activations."""
    model, mesh, count = workload.model, workload.config.mesh, workload.parameters
    gathered = 3 * model.layers * count.layer / mesh.tensor * workload.itemsize
    activations = _ACTIVATION_TRAFFIC * model.layers * _local(workload) * model.width / mesh.tensor * workload.itemsize
    return (2 * 12 + 2 * 4) * count.device + workload.config.optimiser.accumulation * gathered + activations


def _exposed_hops(
    workload: Workload, machine: Machine, attained: Attained, kernels: tuple[float, float], forward_passes: int
) -> float:
    """Return the exposed seconds of sending keys and values, and in the backward pass their float32 gradients.

    `kernels`: seconds of the kernels of both passes that hide the hops.
    """
    model, mesh, strategy = workload.model, workload.config.mesh, workload.strategy.strategy
    if mesh.seq == 1:
        return 0.0
    numbers = 2 * _local(workload) * model.layers * model.width * model.kv_heads / model.heads / mesh.tensor
    numbers *= workload.heads_held
    is_ring = strategy != "all_gather"  # Ulysses is a ring of one group, without hops
    rate = machine.hop(mesh.seq) if is_ring else machine.collective(mesh.seq)
    if model.bidirectional and is_ring and machine.device.platform == "tpu":
        rate *= 2  # a torus has a link for each direction, a switch shares one
    hops = (mesh.seq // workload.group - 1) / (rate * attained.links)
    sends = hops * numbers * workload.itemsize, hops * numbers * (workload.itemsize + 4)
    if is_ring:
        exposed = forward_passes * max(0.0, sends[0] - kernels[0]) + max(0.0, sends[1] - kernels[1])
        return exposed + _all_to_alls(workload, machine) / attained.links
    return forward_passes * sends[0] + sends[1]  # gathered at once, before the kernel


def _all_to_alls(workload: Workload, machine: Machine) -> float:
    """Return the seconds of exchanging q, k, v and the output in a group: in both passes, and in a recomputed layer."""
    model, mesh, link = workload.model, workload.config.mesh, link_of(machine.device.device_kind)
    group = workload.group
    vectors = 2 * model.heads / mesh.tensor + 2 * max(model.kv_heads / mesh.tensor, group)
    numbers = _local(workload) * model.layers * vectors * model.width / model.heads * (group - 1) / group
    passes = 2 if model.remat == "none" else 3
    rate = machine.collective(group) * (link.all_to_all if link else 1.0)
    return passes * numbers * workload.itemsize / rate


def _gathering(workload: Workload, machine: Machine, attained: Attained) -> float:
    """Return the seconds of gathering parameters for both passes and reduce-scattering their gradients."""
    model, mesh, count = workload.model, workload.config.mesh, workload.parameters
    group = mesh.fsdp * mesh.seq
    passes = 3 * workload.config.optimiser.accumulation
    carried = passes * model.layers * count.layer / mesh.tensor * workload.itemsize * (group - 1) / group
    ways = 2 if machine.device.platform == "tpu" else 1  # a torus has two directions
    rate = machine.collective(mesh.fsdp * mesh.tensor * mesh.seq, stride=mesh.tensor)
    return carried / (ways * rate * attained.links)


def _sums(workload: Workload, machine: Machine, attained: Attained) -> float:
    """Return the seconds of all-reduces of activations over "tensor" (six per layer) and gradients over "data"."""
    model, mesh = workload.model, workload.config.mesh
    apart = mesh.fsdp * mesh.tensor * mesh.seq  # stride of "data", the outermost axis
    activations = 6 * model.layers * _local(workload) * model.width * workload.itemsize
    seconds = 2 * (mesh.tensor - 1) / mesh.tensor * activations / machine.collective(mesh.tensor * mesh.seq, mesh.seq)
    gradients = 4 * workload.parameters.device
    seconds += 2 * (mesh.data - 1) / mesh.data * gradients / machine.collective(mesh.devices, apart)
    return seconds / attained.links
