"""Trains what a configuration says.

  python -m train.main --config tiny_target --workdir runs/tiny_target
  python -m train.main --config tiny_eagle3 --workdir runs/eagle3 --set num_steps=500

Start it again in the same folder and it goes on where it was. On several hosts, run the same
command on each: `--distributed` finds the others by itself on Cloud TPU, Kubernetes, SLURM and
OpenMPI; elsewhere give --coordinator, --num-processes and --process-id.

The exit code is 0 at the end, 1 if the loss stopped being a number, 2 for what the user can mend,
143 after SIGTERM.
"""

import argparse
from collections.abc import Sequence
import logging
import pathlib
import sys

from train.command import USAGE_EXIT
from train.config import load_config
from train.config import override
from train.sharding import start_processes


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code."""
  args = _parser().parse_args(argv)
  logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax tells of every save
  try:
    config = override(load_config(args.config), args.set)
    start_processes(args.coordinator, args.num_processes, args.process_id, detect=args.distributed)
    from train.run import Outcome  # after the processes have found each other: it starts jax
    from train.run import Run

    run = Run(config, args.workdir, show=not args.quiet)
  except (ValueError, OSError) as error:
    print(f'train: {" ".join(str(error).split())}', file=sys.stderr)
    return USAGE_EXIT
  outcome = run.train()
  if outcome is Outcome.NON_FINITE:
    print(
      f'train: the loss stopped being a finite number; the last checkpoint is good, and the batch '
      f'is in {args.workdir}/non_finite. Lower optimizer.learning_rate or optimizer.clip_norm.',
      file=sys.stderr,
    )
  return outcome.value


def _parser():
  parser = argparse.ArgumentParser(
    prog='python -m train.main', description='Train a target, a draft head or a judge.'
  )
  parser.add_argument(
    '--config', required=True, metavar='NAME|FILE.py', help='a name in train/configs, or a file'
  )
  parser.add_argument('--workdir', required=True, type=pathlib.Path, help='where everything goes')
  parser.add_argument(
    '--set', action='append', default=[], metavar='KEY=VALUE',
    help='override a setting, for example optimizer.learning_rate=1e-3 or options.num_heads=2',
  )  # fmt: skip
  parser.add_argument('--quiet', action='store_true', help='show nothing')
  group = parser.add_argument_group('several processes')
  group.add_argument('--distributed', action='store_true', help='find the others by itself')
  group.add_argument('--coordinator', metavar='HOST:PORT', help='address of process 0')
  group.add_argument('--num-processes', type=int, metavar='N')
  group.add_argument('--process-id', type=int, metavar='I')
  return parser


if __name__ == '__main__':
  sys.exit(main())
