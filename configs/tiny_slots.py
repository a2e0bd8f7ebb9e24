r"""Recurrent layers and a memory of slots that they write and read.

    python -m statejax.main train --config=configs/tiny_slots.py \
        --workdir=/tmp/tiny_slots
    pytest -m slow tests/test_laws_memory.py

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 3 layers of width 32."""
  rules = c.SlotRules(slots=6, key=8, value=12, span=4, key_span=2, aliases=2)
  memory = c.SlotsConfig(
      rules, segment=8, events=3, statement=8, confidence=0.3,
      fallback=c.LogConfig(block=4, k=2))
  mlp = c.SwiGLUConfig(64)
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=(c.LayerConfig('kda', c.KDAConfig(
              heads=2, key=8, value=8, chunk=8), mlp),
                  c.LayerConfig('memory', memory, mlp)),
          groups=(c.GroupConfig(('kda', 'memory', 'kda')),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
