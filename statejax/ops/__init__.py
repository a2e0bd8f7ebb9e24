"""Pure functions of arrays: the mathematics."""

from statejax.ops.delta_rule import delta_rule as delta_rule
