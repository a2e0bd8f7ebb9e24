"""Bytes counted in the text of a compiled program."""

from pallas_kernels import aot

PROGRAM = """HloModule jit_f

ENTRY %main.1 (a.1: f32[8,128], s.1: bf16[4]) -> (f32[8,128], bf16[4]) {
  %a.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s.1 = bf16[4]{0:T(1024)} parameter(1)
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, \
u32[]{:S(2)}) copy-start(%a.1)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %kernel.1 = (f32[8,128]{1,0:T(8,128)}, bf16[4]{0:T(1024)}) \
custom-call(%copy-done, /*index=1*/%s.1), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/kernel"}
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%kernel.1), index=0
  %y = bf16[4]{0:T(1024)} get-tuple-element(%kernel.1), index=1
  ROOT %tuple = (f32[8,128]{1,0:T(8,128)}, bf16[4]{0:T(1024)}) tuple(%x, %y)
}
"""


def test_what_is_kept_on_the_chip_is_not_counted():
  read = 8 * 128 * 4 + 4 * 2  # a by the copy, s by the kernel
  written = 8 * 128 * 4 + 4 * 2
  assert aot._traffic(PROGRAM) == read + written


SLICED = """HloModule jit_f

ENTRY %main.1 (a.1: f32[8,128]) -> f32[8,128] {
  %a.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(8,128)S(1)}, \
s32[]{:S(2)}) slice-start(%a.1), slice={[0:4], [0:128]}
  %slice-start.1 = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(8,128)}, \
s32[]{:S(2)}) slice-start(%a.1), slice={[4:8], [0:128]}
  %slice-done = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %slice-done.1 = f32[4,128]{1,0:T(8,128)} slice-done(%slice-start.1)
  ROOT %kernel.1 = f32[8,128]{1,0:T(8,128)} custom-call(%slice-done, \
%slice-done.1), custom_call_target="tpu_custom_call"
}
"""


def test_of_what_is_sliced_only_the_slice_is_read():
  half = 4 * 128 * 4
  first, second, kernel = half, half + half, half + 2 * half
  assert aot._traffic(SLICED) == first + second + kernel
