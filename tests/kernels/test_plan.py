"""What the TPU kernels of the delta rule take at a time, and what they decline.

That the compiler agrees is the matter of `test_aot`.
"""

import dataclasses
import re

import jax
import pytest

from pallas_kernels import DECLINES, MOST_VMEM, delta_rule_tpu_plan
from pallas_kernels.delta_rule_step_tpu import delta_rule_step
from pallas_kernels.delta_rule_tpu import delta_rule
from pallas_kernels.workloads import WORKLOADS, DeltaRule

declines = DECLINES['delta_rule']['pallas_tpu']
KIMI = WORKLOADS['kimi_linear']


def tokens(shapes, **changes):
  specs = dataclasses.replace(shapes, **changes).specs()
  return {n: x for n, x in specs.items() if n != 'state'}


def plans(shapes, **options):
  return delta_rule_tpu_plan.plans(**tokens(shapes), scale=1, **options)


@pytest.mark.parametrize('workload, size, heads', [
    ('kimi_linear', 64, (16, 8)), ('qwen3.6', 64, (16, 8)),
    ('kimi_linear_float32', 64, (16, 4)), ('qwen3.6_float32', 64, (16, 8)),
    ('gated_deltanet_2', 64, (16, 8)), ('kimi_linear', 128, (8, 4)),
    ('wide', 64, (8, 4)), ('widest', 64, (2, 1))])
def test_heads(workload, size, heads):
  found = plans(WORKLOADS[workload], chunk_size=size)
  assert tuple(plan.heads for plan in found) == heads


def test_heads_divide_evenly_and_share_whole_groups():
  for key_heads, heads in [(1, 7), (3, 12), (2, 24), (5, 5), (1, 64)]:
    groups = heads // key_heads
    for plan in plans(DeltaRule(key_heads, heads, 128, 128, 'head')):
      assert heads % plan.heads == 0 and plan.heads % plan.packed == 0
      assert plan.heads % groups == 0 or groups % plan.heads == 0


@pytest.mark.parametrize('workload', [n for n in WORKLOADS if 'wide' in n])
def test_asked_for_is_enough_and_not_too_much(workload):
  shapes = WORKLOADS[workload]
  arrays = tokens(shapes).values()
  for backward, plan in enumerate(plans(shapes)):
    need = delta_rule_tpu_plan.vmem_bytes(plan, arrays, backward)
    assert 1.2 * need < (plan.vmem or 16 << 20) <= MOST_VMEM


@pytest.mark.parametrize('gates', [
    dict(erase=0), dict(write=1), dict(log_decay=0, erase=0, write=1),
    dict(erase=None, write=None), dict(log_decay=None)], ids=str)
def test_gates_may_be_scalars(gates):
  assert declines(**{**tokens(KIMI), **gates}) is None


@pytest.mark.parametrize('changes, chunk_size, reason', [
    (dict(width=1024, values=1024), None, '1 of 32 heads.* MiB of VMEM going'),
    (dict(width=512, values=512, dtype='float32'), 128, None),
    (dict(width=768, values=768, dtype='float32'), 64, 'shorter chunks'),
    (dict(width=768, values=768, dtype='float32'), 16, None),
    (dict(length=1), None, None),
    (dict(length=1, key_heads=12, heads=12, width=512, values=512), None,
     '12 of 12 heads, K=512 and V=512 need 56 MiB'),
    (dict(length=0), None, None),
    (dict(batch=0), None, 'no work'),
    (dict(key_heads=8, heads=0), None, 'no work'),
], ids=str)
def test_declines(changes, chunk_size, reason):
  found = declines(**tokens(KIMI, **changes), chunk_size=chunk_size)
  assert found is None if reason is None else re.search(reason, found)


@pytest.mark.parametrize('kernel, changes', [
    (delta_rule, dict(width=1024, values=1024, length=64)),
    (delta_rule_step, dict(key_heads=12, heads=12, width=512, values=512,
                           length=1))])
def test_asked_by_name_it_raises_before_it_is_compiled(kernel, changes):
  specs = dataclasses.replace(KIMI, **changes).specs()
  with pytest.raises(ValueError, match='MiB of VMEM'):
    jax.eval_shape(lambda specs: kernel(**specs, scale=1), specs)
