"""Pallas kernels: op -> implementation -> function, or why there is none.

Kernels import jax and numpy alone and stand behind `statejax.ops`.
"""

_NONE = 'this version ships no kernel; the XLA form runs on every device'

KERNELS = {
    'delta_rule': {'pallas_tpu': _NONE, 'pallas_gpu': _NONE},
}
