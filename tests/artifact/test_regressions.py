"""Faults that other engines have had, and the test here that would see each.

`TESTS` names it for all that concerns a state by itself; what only an engine
with a scheduler, pages or a cache can do wrong stands in `ENGINE`, with what of
it a state can show already.
"""

import ast
import dataclasses
import functools
import os
import pathlib

import bare
import jax
import numpy as np
import pytest
import small_store as small
import test_engine_mutants as engine

from statejax import generate as gen
from statejax import state as st
from statejax.artifact import identity, layout, load, manifest, mint, names
from statejax.artifact.access import Principal
from statejax.artifact.outcome import Refused

HERE = pathlib.Path(__file__).parent
ALICE = Principal('alice', 'acme')
MUTANTS, LOAD, SELF = (
    'artifact/test_engine_mutants.py', 'artifact/test_load.py',
    'artifact/test_regressions.py')

# {source: (file, test, case or '')}
TESTS = {
    'sglang#30986': [(MUTANTS, 'test_mutants', 'previous_occupant')],
    'sglang#34760, vllm#51113, vllm#54076, vllm#34587': [
        (SELF, 'test_the_key_is_of_what_was_absorbed', ''),
        (MUTANTS, 'test_mutants', 'snapshot_one_block_off')],
    'sglang#29633, sglang#30938, sglang#22935': [
        (SELF, 'test_the_key_is_of_what_was_absorbed', '')],
    'sglang#39830, LMCache#2845': [
        (MUTANTS, 'test_mutants', 'one_layer_of_an_earlier_artifact'),
        (MUTANTS, 'test_mutants', 'stores_without_the_rest')],
    'sglang#24758, ds4#805': [
        (LOAD, 'test_another_process', 'E_WEIGHTS'),
        ('artifact/test_serving.py', 'test_other_parameters', '')],
    'vllm#53919, vllm#53505, vllm#53912': [
        (MUTANTS, 'test_mutants', 'accept_count_of_another_row'),
        ('test_state.py', 'test_rewound_row_goes_on_as_if_never_advanced', ''),
        ('artifact/test_every_mixer.py', 'test_schedules', 'commit')],
    'tpu-inference#3358, tpu-inference#3412, tpu-inference#3422': [
        (SELF, 'test_the_key_is_of_what_was_absorbed', ''),
        ('artifact/test_every_mixer.py', 'test_every_mixer', '')],
    'llama.cpp#25913, llama.cpp#27813, llama.cpp#24003': [
        (SELF, 'test_regenerate_with_an_empty_suffix', ''),
        (LOAD, 'test_every_end_is_in_the_log_and_accounted', '')],
    'llama.cpp slot files': [
        (LOAD, 'test_corruptions', ''), (LOAD, 'test_another_process', ''),
        ('artifact/test_corruption.py', 'test_corruptions', '')],
    'orbax#394': [('artifact/test_bucket.py', 'test_the_manifest_comes_last',
                   '')],
    'orbax#3537': [
        (SELF, 'test_a_commit_is_one_rename', ''),
        ('artifact/test_bucket.py', 'test_the_manifest_comes_last', '')]}

ENGINE = {
    'sglang#34760, vllm#51113, vllm#54076, vllm#34587':
        'pages: there is no page to cut a key at',
    'sglang#29633, sglang#30938, sglang#22935':
        'hits of identical prompts: there is no prefix cache',
    'sglang#16067, vllm#43961':
        'slots of a full cache: nothing here hands out slots',
    'vllm#45238': 'hits after a shift: there is no prefix cache',
    'vllm#53919, vllm#53505, vllm#53912':
        'drafts beside a prefix cache: there is no prefix cache',
    'vllm#43244': 'function calls of a response: there is no HTTP',
    'tpu-inference#3358, tpu-inference#3412, tpu-inference#3422':
        'hits of a hybrid cache: there is no prefix cache'}


@functools.cache
def source(file):
  text = (HERE.parent / file).read_text()
  tests = {node.name for node in ast.parse(text).body
           if isinstance(node, ast.FunctionDef)}
  return text, tests


def missing(table):
  """Returns the named tests and cases that are not there."""
  found = []
  for rows in table.values():
    for file, test, case in rows:
      text, tests = source(file)
      if test not in tests or case not in text:
        found.append(f'{file}::{test}[{case}]')
  return found


def test_the_table():
  assert missing(TESTS) == []
  assert missing({'': [(SELF, 'test_no', '')]}) and missing(
      {'': [(SELF, 'test_the_table', 'no case ' + 'at all')]})
  rows = TESTS.keys() | ENGINE.keys()
  print(f'regressions: {len(rows)} rows of others\' faults, '
        f'{len(TESTS)} with a test ({sum(map(len, TESTS.values()))} named), '
        f'{len(rows - TESTS.keys())} for an engine alone')
  assert len(rows) == 14 and all(ENGINE.values())


# What no other test shows.

ROOM = 80
GRID = 64  # tokens between keys of the chain


def host(step):
  return identity.Host(
      engine.MODEL.config, engine.MODEL.state_schema, '0' * 64,
      program=identity.Program(step, capacity=ROOM))


def absorb(state, tokens, step):
  for begin in range(0, len(tokens), step):
    piece = np.array(tokens[begin:begin + step], np.int32)
    state = engine.step(state, np.pad(piece, (0, step - len(piece)))[None],
                        [len(piece)])
  return state


@pytest.mark.parametrize('step, lengths', [
    (3, (1, GRID + 1)), *(pytest.param(
        step, (1, GRID - 1, GRID, GRID + 1), marks=pytest.mark.slow)
        for step in (1, 3, 5, 16, 64))])
def test_the_key_is_of_what_was_absorbed(tmp_path, step, lengths):
  """At, before and after a border of the grid, by steps that do not divide it.

  The key is of exactly the tokens that the layers hold; one more or less is
  not minted. What resumes goes on as a cold run: recurrent leaves, stores, and
  a tail of one token.
  """
  shop = small.store(tmp_path)
  tokens = np.random.default_rng(0).integers(0, 16, ROOM).tolist()
  cold, at = engine.MODEL.init_state(1, ROOM, logits=True), 0
  for length in lengths:
    cold, at = absorb(cold, tokens[at:length], step), length
    for wrong in (length - 1, length + 1):
      with pytest.raises(Refused, match='E_WITNESS'):
        mint.mint(shop, cold, 0, host(step), small.TERMS,
                  transcript=mint.Transcript(tuple(tokens[:wrong])))
    kept = mint.mint(shop, cold, 0, host(step), small.TERMS,
                     transcript=mint.Transcript(tuple(tokens[:length])))
    found = load.load(shop, kept.id, ALICE, host(step))
    assert str(found.decision) == f'resumed({length})'
    space = names.namespace(found.about, 'alice')
    plain = manifest.parse_plain(layout.read(
        shop.place(kept.id), manifest.PLAIN), found.about)
    assert plain['token_chain'] == names.chain(space, tokens[:length])
    ends = [absorb(state, tokens[length:length + 4], step)
            for state in (cold, found.state)]
    assert st.diff(*ends) is None


def test_regenerate_with_an_empty_suffix(tmp_path):
  """The next token is drawn from what was stored; nothing is decoded."""
  shop = small.store(tmp_path)
  tokens = engine.TOKENS[0].tolist()
  fresh = engine.MODEL.init_state(1, ROOM, key=jax.random.key(5), logits=True)
  state = absorb(fresh, tokens, 3)
  kept = mint.mint(shop, state, 0, host(3), small.TERMS)
  found = load.load(shop, kept.id, ALICE, host(3))
  assert str(found.decision) == f'resumed({len(tokens)})'
  assert int(found.state.pending[0]) == -1  # so that there is one to draw
  units = {row['unit']: row['delta'] for row in shop.catalog.rows('ledger')[
      -2:]}
  assert units == {'resumes': 1, 'tokens_skipped': len(tokens)}
  draws, sample = set(), jax.jit(gen.sample, static_argnums=3)
  for number in range(8):
    key = jax.random.key_data(jax.random.key(number))[None]
    one, other = (
        int(sample(x.logits, key, x.length, gen.Sampling())[0])
        for x in (state, found.state))
    assert one == other
    draws.add(one)
  assert len(draws) > 1  # drawn, not repeated
  assert st.diff(found.state, state) is None  # and nothing was absorbed
  ends = [gen.decode(engine.MODEL, engine.params(), dataclasses.replace(
      x, pending=np.array([other], np.int32)))[1] for x in (state, found.state)]
  assert st.diff(*ends) is None


@pytest.mark.parametrize('files', [1, 200])
def test_a_commit_is_one_rename(tmp_path, monkeypatch, files):
  """However many files there are; each stays the file that was written."""
  shop, renames, written = bare.store(tmp_path), [], {}
  rename, fill = os.rename, bare.fill

  def more(folder, number):
    fill(folder, number)
    for i in range(files):
      (folder / 'state' / f'x{i}').write_bytes(b'%d' % i)
    written.update({p.relative_to(folder): p.stat().st_ino
                    for p in folder.rglob('*') if p.is_file()})

  def counted(*names):
    renames.append(names)
    rename(*names)

  monkeypatch.setattr(bare, 'fill', more)
  monkeypatch.setattr(os, 'rename', counted)
  kept = bare.mint(shop, 1)
  assert len(renames) == 1 and renames[0][1] == shop.place(kept.id)
  there = {name: (shop.place(kept.id) / name).stat().st_ino
           for name in written}
  assert there == written and len(written) == files + 4
