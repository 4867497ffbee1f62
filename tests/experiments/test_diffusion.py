"""The diffusion experiments from end to end, on a random network for the list tasks."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decodax.diffusion.policies import Evidence
from decodax.diffusion.policies import PairFilter
from decodax.diffusion.policies import init_pair_filter
from experiments import compare
from experiments import parallel_bench
from experiments import tiny_diffusion
from experiments.diffusion_methods import METHODS
from experiments.diffusion_methods import STATIC
from experiments.diffusion_methods import choose
from experiments.exact_network import MASK_ID
from experiments.exact_network import exact_network
from experiments.exact_network import make_worlds
from experiments.exact_network import worlds_of
from models.config import TransformerConfig
from models.diffusion import load_diffusion
from models.transformer import Transformer
from train import learn2pd
from train import list_tasks
from train import pair_filter
from train.export import save_language_model


@pytest.fixture(scope='module')
def network(tmp_path_factory):
  """Returns the folder of a random network with a mask token behind the vocabulary."""
  config = TransformerConfig(
    vocab_size=len(list_tasks.VOCABULARY) + 1, hidden_size=16, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, intermediate_size=24, max_position=128, tie_embeddings=True,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp('network') / 'export'
  save_language_model(
    folder, Transformer(config, rngs=nnx.Rngs(0)), tokenizer_directory=list_tasks.TOKENIZER,
    facts={'mask_token_id': config.vocab_size - 1, 'shifted': False},
  )  # fmt: skip
  return folder


def test_the_benchmark_writes_points_limits_and_plots(network, tmp_path, capsys):
  code = parallel_bench.main([
    '--model', str(network), '--methods', 'threshold,free-draft', '--num-examples', '2',
    '--no-caches', '--blocks', '--out', str(tmp_path),
  ])  # fmt: skip
  assert code == 0
  results = json.loads((tmp_path / 'parallel_bench.json').read_text())
  points = results['points']
  whole, *parts = results['blocks']
  point = next(p for p in points if p['method'] == 'threshold' and p['knob'] == 0.9)
  assert whole['tasks'] == point['tasks'] and whole['chosen'] == point['chosen']
  assert [each['blocks'] for each in parts] == [
    'fixed, 4',
    'adaptive, 4',
    'fixed, 2',
    'adaptive, 2',
  ]
  assert all(each['num_blocks'] > whole['num_blocks'] for each in parts[::2])
  assert [p['method'] for p in points if p['method'] != 'threshold'] == [STATIC] * 5 + [
    'free-draft'
  ]
  static, free = points[0], points[-1]
  assert static['knob'] == 8
  assert static['fixed']['tokens_per_forward'] == pytest.approx(1)
  assert free['fixed']['accuracy'] == static['fixed']['accuracy']
  assert free['fixed']['tokens_per_forward'] >= 1
  for task in list_tasks.TASKS:
    curve = results['limits'][task]
    assert curve['accuracy'][0] == pytest.approx(1)
    independent = task in list_tasks.INDEPENDENT
    assert (curve['total_correlation_nats'] == 0) == independent
    assert (curve['accuracy'][-1] == 1) == independent
  for name in ('diffusion_pareto.png', 'diffusion_tasks.png'):
    assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')
  assert 'within 0.01 of it' in capsys.readouterr().out


def test_compare_takes_a_diffusion_model(network, tmp_path, capsys):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"turns": ["copy : a b ="]}\n{"turns": ["sort : d c b ="]}\n')
  code = compare.main([
    '--model', str(network), '--prompts', str(prompts), '--methods', 'free-draft',
    '--max-new-tokens', '8', '--out', str(tmp_path / 'out'),
  ])  # fmt: skip
  assert code == 0
  rows = json.loads((tmp_path / 'out' / 'results.json').read_text())['methods']
  assert [row['name'] for row in rows] == [STATIC, 'free-draft']
  assert rows[1]['same_as_static'] == rows[1]['num_prompts'] == 2
  assert rows[1]['forwards'] <= rows[0]['forwards']
  assert compare.main(['--model', str(network), '--list']) == 0
  assert 'Fast-dLLM' in capsys.readouterr().out


def test_a_filter_is_trained_on_what_an_oracle_sees(network, tmp_path, capsys):
  path = tmp_path / 'filter' / 'filter.npz'
  assert learn2pd.main(['--model', str(network), '--out', str(path), '--num-examples', '64']) == 0
  assert 'precision' in capsys.readouterr().out
  assert path.exists()
  answers = tmp_path / 'answers.jsonl'
  arguments = ['--model', str(network), '--num-examples', '64', '--answers', str(answers)]
  assert learn2pd.main(arguments) == 0
  records = [json.loads(line) for line in answers.read_text().splitlines()]
  assert len(records) == 64
  for record, example in zip(records, list_tasks.examples(64, 1000), strict=True):
    prompt = list_tasks.to_ids(example.prompt)
    assert record['token_ids'][: len(prompt)] == prompt
    assert sum(record['loss_mask']) == list_tasks.CANVAS == len(record['token_ids']) - len(prompt)


def test_a_filter_of_pairs_is_trained_on_what_decoding_comes_by(network, tmp_path, capsys):
  path = tmp_path / 'pairs.npz'
  code = pair_filter.main([
    '--model', str(network), '--out', str(path), '--num-examples', '30', '--num-steps', '3',
  ])  # fmt: skip
  assert code == 0
  assert 'precision' in capsys.readouterr().out
  fitted = tiny_diffusion.load_filter(path, PairFilter)
  same = init_pair_filter(jax.random.key(0))
  assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, same)

  traces = pair_filter.make_collector(load_diffusion(network))(None, 20, 0)
  # What the static sampler fills next is the surest slot: it is final in every canvas.
  surest = np.where(traces.eligible, traces.evidence.slots[..., 1], -1).argmax(-1)
  assert np.take_along_axis(traces.right, surest[:, None], axis=1).all()
  assert not (traces.right & traces.eligible).all()
  assert len(traces.right) > 20 and traces.eligible.any(-1).all()


def test_recall_is_that_of_the_lowest_threshold_that_keeps_the_precision():
  right = np.array([[True, True, False, True], [False, True, True, False]])
  eligible = np.array([[True, True, True, True], [True, True, False, False]])
  nothing = Evidence(jnp.zeros(()), jnp.zeros(()))
  traces = pair_filter.PairTraces(nothing, right, eligible)
  score = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.5, 1.0, 1.0]])
  # In order of the score: right, right, wrong, right, right, wrong.
  for precision, recall in ((1.0, 0.5), (0.8, 1.0), (0.7, 1.0), (0.9, 0.5)):
    assert pair_filter.recall_at(score, traces, precision) == recall


def test_the_exact_network_knows_every_law():
  examples = list(list_tasks.examples(3, 3, ('shuffle', 'copy', 'remove_random')))
  worlds, net = make_worlds(examples), exact_network()
  longest = max(len(example.prompt) for example in examples)
  tokens = np.zeros((3, longest + list_tasks.CANVAS), np.int32)
  for row, example in enumerate(examples):
    start = len(example.prompt)
    tokens[row, :start] = list_tasks.to_ids(example.prompt)
    tokens[row, start : start + list_tasks.CANVAS] = MASK_ID
  tokens[0, len(examples[0].prompt)] = list_tasks.to_ids(examples[0].line[1:2])[0]
  positions = np.broadcast_to(np.arange(tokens.shape[1])[None], tokens.shape)
  mask = np.ones((3, tokens.shape[1], tokens.shape[1]), bool)
  output, _ = net.model.extend(worlds, None, tokens, positions, mask)
  law = np.exp(np.asarray(net.model.unembed(worlds, output.hidden)))
  for row, example in enumerate(examples):
    answers = worlds_of(example)
    if row == 0:  # the first slot is written
      answers = [answer for answer in answers if answer[0] == example.line[1]]
    for slot in range(1, len(answers[0])):
      for item in example.line:
        share = np.mean([answer[slot] == item for answer in answers])
        found = law[row, len(example.prompt) + slot, list_tasks.to_ids([item])[0]]
        assert abs(found - share) < 1e-3, (example.task, slot, item)


def test_methods_are_chosen_by_name():
  available = [name for name, method in METHODS.items() if not method.needs]
  assert choose('wino', available) == [STATIC, 'wino']
  assert choose(None, available)[0] == STATIC
  with pytest.raises(ValueError, match='unknown'):
    choose('guess', available)
  with pytest.raises(ValueError, match='needs'):
    choose('distilled', available)


def test_a_network_of_other_words_is_refused(tmp_path, capsys):
  assert parallel_bench.main(['--model', str(tmp_path)]) == 2
  assert 'config.json' in capsys.readouterr().err


def test_published_examples_take_the_place_of_our_own(tmp_path, capsys):
  line = ['Cora Wu', 'Abel Ito', 'Dina Roy']
  row = {'input': {'context': json.dumps(line)}, 'answer': json.dumps(line[::-1]), 'metadata': {}}
  data = tmp_path / 'reverse.jsonl'
  data.write_text(json.dumps(row) + '\n')
  arguments = ['--model', 'exact', '--methods', 'static', '--out', str(tmp_path / 'out'), '--data']
  assert parallel_bench.main([*arguments, str(data)]) == 0
  results = json.loads((tmp_path / 'out' / 'parallel_bench.json').read_text())
  assert results['data'] == [str(data)]
  for point in results['points']:
    assert point['fixed']['accuracy'] == point['tasks']['reverse']['accuracy'] == 1
    assert point['chosen']['accuracy'] is None and point['tasks']['copy']['accuracy'] is None
  assert 'reverse: static 1.000' in capsys.readouterr().out
  assert parallel_bench.main([*arguments, str(data.rename(tmp_path / 'sudoku.jsonl'))]) == 2
  assert 'named after no list task' in capsys.readouterr().err
