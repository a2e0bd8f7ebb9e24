"""Memory slots and segment memories obey every law.

    pytest tests/test_laws_memory.py -m slow

What they say of splits, documents and reads is in `layers/test_slots.py`,
`test_transformer_xl.py`, `test_dst.py`, `test_infini.py` and `test_titans.py`
there too, against plain Python.
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
        SLOTS, confidence=0.3, top=3, fallback=c.LogConfig(
            block=4, k=2)),
    'slots_asks': dataclasses.replace(
        SLOTS, confidence=0.3, asks=True, fallback=c.LogConfig(block=4, k=2)),
    # Tokens are positions where a layer runs alone.
    'slots_spelled': dataclasses.replace(SLOTS, vocab=256),
    'slots_hashed': dataclasses.replace(SLOTS, rules=dataclasses.replace(
        RULES, mode='hashed', ways=2, ring=0, policy='low_salience'))}
HEADS = dict(heads=4, kv_heads=2, key=8, value=6, segment=4)
XL = c.TransformerXLConfig(24, **HEADS, memory=6, relative=6)
COMPRESSIVE = c.CompressiveConfig(24, **HEADS, memory=6, relative=6,
                                  compressed=3, rate=2)
DST = c.DSTConfig(24, **HEADS, vectors=3)
INFINI = c.InfiniConfig(**HEADS)
TITANS = c.TitansConfig(heads=2, key=8, value=6, segment=4)
MIXERS |= {
    'xl': XL,
    # Gradients without a cut have a finite difference.
    'xl_live': dataclasses.replace(XL, memory=3, segment=5, detach=False),
    'compressive': COMPRESSIVE,
    'compressive_live': dataclasses.replace(
        COMPRESSIVE, memory=0, rate=4, compressed=2, detach=False),
    'dst': DST,
    'dst_cut': dataclasses.replace(DST, through=2, vectors=1),
    'dst_alone': dataclasses.replace(DST, vectors=0, rope=None),
    'rmt': dataclasses.replace(DST, update='rows'),
    'infini': INFINI,
    'infini_add': dataclasses.replace(INFINI, write='add', rope=None,
                                      segment=5),
    'titans': TITANS,
    'titans_token': dataclasses.replace(TITANS, segment=1, rate=0.5),
    'titans_layers': dataclasses.replace(TITANS, hidden=10, rate=0.01)}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', MIXERS)
def test_mixer(name):
  report = laws.check(MIXERS[name])
  assert tuple(report.worst) == tuple(laws.LAWS)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', ('tiny_slots', 'tiny_segment'))
def test_model(name):
  assert None not in laws.check(model(name)).worst.values()


@pytest.mark.slow
@pytest.mark.parametrize('name', ('slots', 'xl', 'compressive', 'dst', 'rmt',
                                  'infini', 'titans', 'titans_layers'))
def test_bfloat16_mixer(name):
  layer = c.LayerConfig(name, MIXERS[name], c.SwiGLUConfig(32))
  laws.check(laws.MixerSubject(layer, dtype='bfloat16'), tolerance=HALF_LAYER)
