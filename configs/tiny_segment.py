r"""One layer of each memory that goes from segment to segment, for tests.

    python -m statejax.main train --config=configs/tiny_segment.py \
        --workdir=/tmp/tiny_segment
    pytest -m slow tests/test_laws_memory.py

Expected: twenty updates on mqar without NaN; every law of `statejax.laws`
within 1e-5 in float32, by the second command.
"""

from statejax import config as c


def get_config():
  """Returns the configuration; `.model` has 6 layers of width 32."""
  heads = dict(heads=4, kv_heads=2, key=8, value=8, segment=4)
  mixers = {
      'xl': c.TransformerXLConfig(32, **heads, memory=6, relative=8),
      'compressive': c.CompressiveConfig(32, **heads, memory=4, relative=8,
                                         compressed=2, rate=2),
      'dst': c.DSTConfig(32, **heads, vectors=2),
      'rmt': c.DSTConfig(32, **heads, vectors=2, update='rows'),
      'infini': c.InfiniConfig(**heads),
      # Two tokens at the same weights, so that no key is learned twice over.
      'titans': c.TitansConfig(heads=2, key=8, value=8, segment=2, rate=0.2)}
  return c.Config(
      model=c.ModelConfig(
          vocab=64, width=32,
          layers=tuple(c.LayerConfig(name, mixer, c.SwiGLUConfig(64))
                       for name, mixer in mixers.items()),
          groups=(c.GroupConfig(tuple(mixers)),)),
      train=c.TrainConfig(steps=20, rows=4, length=32, warmup=4, decay=8),
      task=c.TaskConfig('mqar', pairs=4, items=1000, vocab=64))
