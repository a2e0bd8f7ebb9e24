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
