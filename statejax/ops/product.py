"""Products whose sums are float32 whatever the operands."""

import jax
import jax.numpy as jnp


def einsum(equation, x, w):
  """`einsum(equation, x, w)` with both operands in x.dtype.

  Args:
    equation: of two operands.
    x: any float dtype.
    w: any float dtype; rounded to that of x.

  Returns:
    float32; float64 of float64 x. Exact products where x is not narrower.
  """
  wide = (jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
  return jnp.einsum(
      equation, x, w.astype(x.dtype), preferred_element_type=wide,
      precision=jax.lax.Precision.HIGHEST if x.dtype == wide else None)
