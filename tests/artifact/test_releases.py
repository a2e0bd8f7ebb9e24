"""Artifacts of every release are read, bit for bit, and minted as they were."""

import json

import golden_artifacts as golden
import pytest

from statejax.artifact import (
  compat,
  desk,
  digest,
  layout,
  load,
  manifest,
  verify,
)

EXPECTED = json.loads(golden.EXPECTED.read_text())
FILES = sorted(EXPECTED)
# What differs between two artifacts of one state.
OWN = ('nonce', 'created', 'numerics', 'files')


def test_all_are_there():
  assert FILES == sorted(p.name for p in golden.FOLDER.glob('*.tar'))
  # Those of this version were made when it began.
  assert {EXPECTED[file]['model'] for file in FILES if file.startswith(
      golden.__version__)} == {*golden.MODELS}
  assert manifest.VERSION == 1  # a newer one comes with a migrator for this


@pytest.mark.parametrize('file', FILES)
def test_verifies_and_shows(file):
  expected = EXPECTED[file]
  with verify.opened(golden.FOLDER / file) as folder:
    found = verify.verify(folder, secret=golden.SECRET)
  assert (found.id, found.vouched) == (expected['id'], 'mac')
  assert found.plain['leaves'] == expected['leaves']
  assert tuple(found.tokens) == (*golden.TOKENS, 5)
  text = '\n'.join(desk.describe(found))
  assert found.id in text and 'whose: alice of acme' in text
  assert 'live state after 11 tokens, 1 pending' in text


@pytest.mark.parametrize('file', FILES)
def test_loads_and_mints_the_same(file, tmp_path):
  expected, shop = EXPECTED[file], golden.store(tmp_path)
  name = expected['model']
  with verify.opened(golden.FOLDER / file) as folder:
    found = verify.verify(folder, secret=golden.SECRET)
    # It moves into its place: under the name by which it is known.
    with shop.stage() as place:
      for one in layout.walk(folder).files:
        (place / one).parent.mkdir(parents=True, exist_ok=True)
        (place / one).write_bytes(layout.read(folder, one))
      shop.take_in(place, found.id, found.about, 'alice')
  loaded = load.load(shop, expected['id'], golden.ALICE, golden.host(name))
  decision = loaded.decision
  # Another program or machine computes within a tolerance; nothing else may
  # differ, and no leaf does.
  assert str(decision) == 'resumed(11)', decision.detail
  assert {*decision.warnings} <= {'W_NUMERICS', 'W_CODE'}
  assert decision.promise == (
      'tolerance' if 'W_NUMERICS' in decision.warnings else 'bit')
  live = golden.st.live(loaded.state, 0)
  assert digest.leaf_digests(live) == expected['leaves']
  # The format has not changed by itself: what was loaded mints to the same.
  again = golden.minted(shop, name, loaded.state)
  folder = shop.place(again)
  about = manifest.parse(layout.read(folder, manifest.NAME))
  assert about.keys() == found.about.keys()
  for key in about.keys() - {*OWN}:
    assert about[key] == found.about[key], key
  assert about['numerics'].keys() == found.about['numerics'].keys()
  assert manifest.parse_plain(layout.read(
      folder, manifest.PLAIN), about) == found.plain
  assert compat.compare(found.about, about).action == 'go'
