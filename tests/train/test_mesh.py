import jax
import numpy as np
import pytest
import small

from statejax import sharding
from statejax.artifact import digest
from statejax.model import LanguageModel
from statejax.train import loop

LAYERS = [small.KDA, small.FULL]


def train(workdir, report=small.silent, **options):
  options = {'steps': 4, 'save_every': 2, 'warmup': 1, **options}
  return loop.train(small.get_config(LAYERS, **options), workdir, report=report)


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('mesh')
  return workdir, train(workdir)


@pytest.mark.parametrize('options', [
    dict(data=1, fsdp=2, tensor=2),
    pytest.param(dict(data=4), marks=pytest.mark.slow),
    pytest.param(dict(data=None, fsdp=2), marks=pytest.mark.slow)], ids=str)
def test_losses_are_those_of_one_device(one_device, tmp_path, options):
  result = train(tmp_path, **options)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(
        small.column(tmp_path, name), small.column(one_device[0], name),
        rtol=1e-3, atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3),
               result.params, one_device[1].params)
  devices = {d for x in jax.tree.leaves(result.params) for d in x.devices()}
  expected = 8 if options['data'] is None else 4
  assert devices == set(jax.devices()[:expected])


class Crash(Exception):
  """Ends a run."""


@pytest.mark.parametrize('optimizer', [
    'adamw', pytest.param('muon', marks=pytest.mark.slow)])
def test_resume_on_a_mesh(tmp_path, optimizer):
  options = dict(data=1, fsdp=2, tensor=2, optimizer=optimizer)
  def report(line):
    if line.startswith('step 3/'):
      raise Crash
  whole = train(tmp_path / 'whole', **options)
  with pytest.raises(Crash):
    train(tmp_path / 'crashed', report, **options)
  result = train(tmp_path / 'crashed', **options)
  assert small.outcome(tmp_path / 'crashed') == small.outcome(
      tmp_path / 'whole')
  assert digest.tree_digest(result.params) == digest.tree_digest(whole.params)


def test_moments_lie_as_their_parameters(tmp_path):
  for name in ('adamw', 'muon'):
    config = small.get_config(LAYERS, data=1, fsdp=2, tensor=2, optimizer=name)
    _, abstract, where = loop._Run(config, tmp_path, None)._shardings()
    sharded = {}
    for path, spec in jax.tree_util.tree_flatten_with_path(where)[0]:
      if not spec.is_fully_replicated:
        end = jax.tree_util.keystr(path[-3:], simple=True, separator='/')
        sharded.setdefault(end, set()).add(spec.spec)
    # Every sharded parameter has a moment, sharded in the same way.
    assert 'q/kernel' in ' '.join(sharded)
    assert all(len(specs) == 1 for specs in sharded.values())
    assert jax.tree.structure(abstract) == jax.tree.structure(where)


# The mesh and the axes.


@pytest.mark.parametrize('options, shape', [
    (dict(), (8, 1, 1)), (dict(fsdp=2), (4, 2, 1)), (dict(data=3), (3, 1, 1)),
    (dict(data=1, fsdp=2, tensor=3), (1, 2, 3))])
def test_mesh(options, shape):
  mesh = sharding.make_mesh(**options)
  assert tuple(mesh.shape.values()) == shape
  assert list(mesh.devices.flat) == jax.devices()[:np.prod(shape)]


@pytest.mark.parametrize('options', [
    dict(data=9), dict(fsdp=3), dict(tensor=16), dict(data=0), dict(fsdp=0),
    dict(data=4, tensor=4), dict(data=2, fsdp=-1, tensor=-1)], ids=str)
def test_mesh_that_does_not_fit(options):
  with pytest.raises(ValueError, match='the number of devices, 8, or with a'):
    sharding.make_mesh(**options)


def test_axes_that_do_not_fit():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  with pytest.raises(ValueError, match="no sharding rule for axis 'hedas'"):
    sharding.spec(('embed', 'hedas'), (4, 4), mesh)
  with pytest.raises(ValueError, match=r"k: axis heads=3 is not divisible by 2 "
                                       r"= mesh axes \('tensor',\)"):
    sharding.spec(('embed', 'heads'), (4, 3), mesh, 'k')


def test_state_shardings():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  model = LanguageModel(small.get_config(LAYERS).model)
  where = sharding.state_shardings(model.state_schema(8, 16), mesh)
  spec = jax.sharding.PartitionSpec
  assert where.length.spec == spec(('data', 'fsdp'))
  assert where.layers['full'].k.spec == spec(
      None, ('data', 'fsdp'), 'tensor', None, None)
  assert where.layers['kda'].matrix.spec == spec(
      None, ('data', 'fsdp'), 'tensor', None, None)
  with pytest.raises(ValueError, match='batch=6 is not divisible by 4'):
    sharding.state_shardings(model.state_schema(6, 16), mesh)
