"""Configuration: maskrcnn-benchmark's keys, typed and frozen.

::

    cfg = load_config("configs/e2e_mask_rcnn_R_50_FPN_1x.yaml", ["MODEL.DEVICE", "cpu", "SOLVER.STEPS", "(100, 200)"])
    cfg.MODEL.RPN.NMS_THRESH
    print(dump_config(cfg))

``schema`` has the keys (``model_schema`` those under MODEL), ``checks`` the rules between them, ``reader`` reads
YAML, ``load`` puts a file and the command line together, ``write`` is the way back, ``describe`` has the words for
messages and for docs/configuration.md.
``python -m fastrcnn.config FILE [KEY VALUE ...]`` prints the effective configuration.
"""

from fastrcnn.config.load import ConfigWarning, load_config, with_overrides
from fastrcnn.config.reader import ConfigError
from fastrcnn.config.schema import Config
from fastrcnn.config.write import dump_config

__all__ = ["Config", "ConfigError", "ConfigWarning", "dump_config", "load_config", "with_overrides"]
