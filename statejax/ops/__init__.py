"""Pure functions of arrays: the mathematics."""

from statejax.ops.delta_deferred import (
    delta_rule_deferred as delta_rule_deferred,
)
from statejax.ops.delta_rule import delta_rule as delta_rule
from statejax.ops.delta_rule import delta_rule_recurrent as delta_rule_recurrent
from statejax.ops.delta_rule import delta_rule_step as delta_rule_step
