"""Trains without saving: the checkpoint of a large model takes longer than what is measured."""

import sys

from fundamentallm.config.command_line import parse_config
from fundamentallm.train import make_trainer

if __name__ == "__main__":
    trainer = make_trainer(parse_config(sys.argv[1:]))
    trainer.saver.manager = None
    trainer.train()
    trainer.leave_group()
    sys.exit()
