"""What the commands have in common: arguments, errors in one line, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from fastrcnn.config import ConfigError
from fastrcnn.data.dataset import DataError
from fastrcnn.engine.checkpoint import CheckpointError
from fastrcnn.engine.distributed import DeviceError
from fastrcnn.engine.meters import NonFiniteLoss
from fastrcnn.engine.outputs import OutputDirError, close_logging
from fastrcnn.engine.signals import Stopped
from fastrcnn.evaluation import EvaluationError
from fastrcnn.weights import WeightsError

logger = logging.getLogger("fastrcnn")

EXIT_CODES = """\
exit codes:
  0  done                    1  failure (traceback)      2  usage, configuration or data (one line on stderr)
  3  a loss is not finite  130  Ctrl-C, state saved    143  SIGTERM, state saved
  (torchrun itself exits with 1 whenever a process of it does not exit with 0)
"""


class UsageError(ValueError):
    """A command line that cannot be carried out, in one line."""


USER_ERRORS = (
    UsageError,
    ConfigError,
    DataError,
    WeightsError,
    OutputDirError,
    CheckpointError,
    DeviceError,
    EvaluationError,
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line like every other error of the user: in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def make_parser(prog: str, description: str, examples: str) -> Parser:
    """A parser with ``--config-file``, trailing ``KEY VALUE`` pairs, and what old launchers pass."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"examples:\n{examples}\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", metavar="FILE", help="YAML with maskrcnn-benchmark's keys")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="override keys: SOLVER.BASE_LR 0.0025 ...")
    return parser


def run_command(command: Callable[[], int]) -> int:
    """Run ``command`` and turn what it raises into the exit code, with one message."""
    try:
        code = command()
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except NonFiniteLoss as error:
        logger.error("%s", error)
        print(f"error: {error}", file=sys.stderr)
        code = 3
    except Stopped as stopped:
        logger.warning("%s", stopped)
        code = stopped.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        rank = os.environ.get("RANK")
        where = f"rank {rank}: " if rank is not None else ""
        # Without handlers, logging itself prints errors to stderr.
        logger.error("%s%s", where, traceback.format_exc().rstrip())
        if isinstance(error, torch.OutOfMemoryError):
            logger.error("Out of GPU memory: lower SOLVER.IMS_PER_BATCH or INPUT.MAX_SIZE_TRAIN, or use DTYPE bfloat16")
        code = 1
    finally:
        close_logging()
    sys.stdout.flush()
    sys.stderr.flush()
    if code and dist.is_available() and dist.is_initialized():
        # The other ranks may be waiting in a collective, which would keep an orderly exit waiting too.
        os._exit(code)
    return code
