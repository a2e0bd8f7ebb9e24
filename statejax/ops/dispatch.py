"""Chooses the implementation of an op, in one place and never silently."""

import warnings
from collections.abc import Callable, Mapping

import jax


def choose(
    op: str,
    implementation: str | None,
    candidates: Mapping[str, Callable | str],
) -> Callable:
  """Returns the function that runs an op.

  Args:
    op: name of the op, for messages.
    implementation: 'reference', 'xla', 'pallas_tpu', 'pallas_gpu', or None for
      the first candidate that applies.
    candidates: from name to function, best first; kernels come before all. A
      string in place of a function is the reason why it declines.

  Returns:
    The chosen function.

  Raises:
    ValueError: the implementation asked for is unknown or declines.
    ExceptionGroup: None was asked for and every candidate declines.
  """
  candidates = {**_kernels(op), **candidates}
  available = {n: f for n, f in candidates.items() if not isinstance(f, str)}
  if implementation is None:
    if available:
      chosen = next(iter(available))
      for name, why in candidates.items():
        # Elsewhere that there is no kernel for this backend is no news.
        if isinstance(why, str) and name.endswith(jax.default_backend()):
          warnings.warn(f'{op}: {name} declines: {why}; {chosen!r} runs.',
                        stacklevel=3)
      return available[chosen]
    raise ExceptionGroup(
        f'{op}: no implementation accepts these arguments',
        [ValueError(f'{n}: {why}') for n, why in candidates.items()],
    )
  chosen = candidates.get(implementation, 'there is none of that name')
  if isinstance(chosen, str):
    raise ValueError(
        f'{op}: implementation {implementation!r} cannot run: {chosen}; '
        f'available: {", ".join(available)}. Choose one of these, or None.'
    )
  return chosen


def kernel(op: str, implementation: str):
  """Returns a kernel, or why it cannot run on this backend."""
  backend = jax.default_backend()
  if not implementation.endswith(backend):
    needed = implementation.removeprefix('pallas_').upper()
    return f'it needs a {needed}, the backend is {backend}'
  return _kernels(op).get(implementation, 'there is no kernel')


def declines(op: str, implementation: str, *args, **kwargs) -> str | None:
  """Returns why a kernel does not suit arguments of these shapes, or None."""
  from pallas_kernels import DECLINES
  reason = DECLINES.get(op, {}).get(implementation)
  return reason(*args, **kwargs) if reason else None


def _kernels(op):
  from pallas_kernels import KERNELS
  return KERNELS.get(op, {})
