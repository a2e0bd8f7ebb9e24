"""Three honest deletes, and what each of them leaves.

    state, receipt = suppress(memory, state, slot)      # answers stop
    state, spot = track(model, before, state, tokens)   # follow a span, then
    state, receipt = revoke(model, state, spot)         # subtract it
    state, receipt = replay_without(model, params, state, snapshot, log, span)

`suppress` empties a slot. `revoke` takes from the matrices of delta layers what
the tokens of a span have changed in them; `track` has to begin at the span's
end, and the model's own steps then carry the difference, which is a leaf
`shadow` of these layers (`statejax.ops.shadow`), with the stream. It is exact
given the keys and gates that came later, and these have seen the span in every
layer but the first. `replay_without` reads the log again, without the span,
from a snapshot before it: all of the state is then that of a stream which has
never seen it, bit for bit. `plan` says which of them forgets a slot for good.

Every delete is a function of a state that returns a new one and a `Receipt`.
"""

from statejax.forget.receipt import OUTSIDE, Receipt
from statejax.forget.replay import Edit, last_before, replay_without
from statejax.forget.slot import Plan, plan, purge, suppress
from statejax.forget.span import revoke, track, untracked

__all__ = ['OUTSIDE', 'Edit', 'Plan', 'Receipt', 'last_before', 'plan', 'purge',
           'replay_without', 'revoke', 'suppress', 'track', 'untracked']
