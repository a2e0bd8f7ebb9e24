"""Memory slots obey every law.

    pytest tests/test_laws_memory.py -m slow

What they say of splits, documents and reads is in `layers/test_slots.py` too,
against plain Python.
"""

import dataclasses

import pytest
from test_laws import HALF_LAYER, model

from statejax import config as c
from statejax import laws

RULES = c.SlotRules(slots=4, key=6, value=5, span=3, key_span=2, aliases=2)
# Reads that fire most of the time: at 0.5 a random query finds nothing.
SLOTS = c.SlotsConfig(RULES, segment=4, events=2, statement=6, confidence=-0.5)
MIXERS = {
    'slots': SLOTS,
    'slots_fallback': dataclasses.replace(
        SLOTS, confidence=0.3, top=3, fallback=c.MoBAConfig(
            c.AttentionConfig(heads=4, kv_heads=2, key=8, value=6), block=4,
            k=2)),
    'slots_hashed': dataclasses.replace(SLOTS, rules=dataclasses.replace(
        RULES, mode='hashed', ways=2, ring=0, policy='low_salience'))}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)


@pytest.mark.slow
@pytest.mark.optimized
def test_model():
  assert None not in laws.check(model('tiny_slots')).worst.values()


@pytest.mark.slow
def test_bfloat16_mixer():
  layer = c.LayerConfig('slots', SLOTS, c.SwiGLUConfig(32))
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'), tolerance=HALF_LAYER)
