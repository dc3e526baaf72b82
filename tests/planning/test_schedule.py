import pytest

from ringrl.planning.ahead_of_time import waits_for_hops
from tests.planning.schedule import read_schedule

PROGRAM = """
HloModule step, is_scheduled=true

%ring (x: bf16[8]) -> bf16[8] {
  %x = bf16[8] parameter(0)
  %send = (bf16[8], bf16[8]) collective-permute-start(bf16[8] %x), channel_id=1
  %late = (f32[8], f32[8]) collective-permute-start(f32[8] %x), channel_id=2
  %integers = (s32[8], s32[8]) collective-permute-start(s32[8] %x), channel_id=3
  %late.done = f32[8] collective-permute-done((f32[8], f32[8]) %late)
  %kernel = f32[8] custom-call(bf16[8] %x), custom_call_target="tpu_custom_call"
  %integers.done = s32[8] collective-permute-done((s32[8], s32[8]) %integers)
  ROOT %done = bf16[8] collective-permute-done((bf16[8], bf16[8]) %send)
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %x = bf16[8] parameter(0)
  %weights = (bf16[8], bf16[64]) all-gather-start(bf16[8] %x), channel_id=4
  %product = bf16[8] fusion(bf16[8] %x), kind=kOutput, calls=%dot
  %gathered = bf16[64] all-gather-done((bf16[8], bf16[64]) %weights)
  %idle = (bf16[8], bf16[64]) all-gather-start(bf16[8] %x), channel_id=5
  %small = bf16[8] fusion(bf16[8] %x), kind=kLoop, calls=%add
  %idle.done = bf16[64] all-gather-done((bf16[8], bf16[64]) %idle)
  %sum = f32[] all-reduce(f32[] %y), channel_id=6
  %loop = bf16[8] while(bf16[8] %x), condition=%c, body=%ring
  ROOT %out = bf16[8] add(bf16[8] %loop, bf16[8] %loop)
}
"""


def test_transfers_with_work_between_start_and_end():
    schedule = read_schedule(PROGRAM)
    assert (schedule.around_ring, schedule.around_ring_hidden) == (2, 1)
    assert (schedule.others, schedule.others_hidden) == (2, 1)
    assert schedule.waited_for == {"all-reduce": 1}


KERNEL = '  %kernel = f32[8] custom-call(bf16[8] %x), custom_call_target="tpu_custom_call"'
START = "  %send = (bf16[8], bf16[8]) collective-permute-start(bf16[8] %x), channel_id=1"
DONE = "  %done = bf16[8] collective-permute-done((bf16[8], bf16[8]) %send)"
OTHER = "  %small = bf16[8] fusion(bf16[8] %x), kind=kLoop, calls=%add"


@pytest.mark.parametrize(
    ("lines", "hidden"),
    [
        ([START, KERNEL, DONE], 1),
        ([START, KERNEL, OTHER, OTHER, OTHER, DONE], 1),
        ([START, OTHER, OTHER, OTHER, KERNEL, DONE], 1),
        ([OTHER, OTHER, START, KERNEL, DONE, OTHER], 1),
        ([KERNEL, START, DONE], 0),
        ([START, DONE, KERNEL], 0),
        ([KERNEL, START, OTHER, DONE, KERNEL, OTHER, OTHER], 0),
        ([OTHER, KERNEL, OTHER, START, OTHER, OTHER, DONE, OTHER, KERNEL], 0),
    ],
)
def test_only_a_kernel_between_start_and_end_hides_a_ring_transfer(lines, hidden):
    body = "\n".join(["%ring (x: bf16[8]) -> bf16[8] {", "  %x = bf16[8] parameter(0)", *lines, "}"])
    schedule = read_schedule(body)
    assert (schedule.around_ring, schedule.around_ring_hidden) == (1, hidden)


def test_other_transfers_of_a_layer_are_not_ring_transfers():
    loop = "  %loop = bf16[8] while(bf16[8] %x), condition=%c, body=%ring"
    body = "\n".join(["%layer (x: bf16[8]) -> bf16[8] {", START, loop, KERNEL, DONE, "}"])
    assert read_schedule(body)[:4] == (0, 0, 1, 1)


def test_synchronous_ring():
    assert not waits_for_hops(PROGRAM)
    assert waits_for_hops(PROGRAM.replace("all-reduce(f32[] %y)", "collective-permute(f32[] %y)"))
    integers = PROGRAM.replace("%sum = f32[] all-reduce(f32[] %y)", "%sum = s32[8] collective-permute(s32[8] %y)")
    assert not waits_for_hops(integers)
