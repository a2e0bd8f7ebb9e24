from pallas_kernels import bench


def test_it_times_what_can_run_and_says_why_the_rest_cannot(capsys):
  for backward in ([], ['--backward']):
    bench.main(['--workloads', 'tiny_kda_decode', '--repeats', '1', *backward])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith('jax ')
    assert len(lines) == 2
    assert 'recurrence' in lines[0] and lines[0].endswith('ms, 1.00x')
    assert 'not timed: it needs a TPU' in lines[1]
