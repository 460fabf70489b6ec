"""Correct the BatchNorm running variances of trained models, and the weights of fresh ones, for dropout.

After Hendrycks & Gimpel 2016, sections 3 and 2.

Public names are resolved on first use, so that ``import ckpt_tools`` costs nothing and imports no torch.
"""

import os
import sys


def _leave_current_folder() -> None:
    """Take the current folder off ``sys.path``, where ``python -m ckpt_tools`` has put it first.

    Otherwise a folder of checkpoints from somebody else could replace the standard library and
    torch by its own files. Where PYTHONPATH names the folder, too, that entry stays. Python loads
    ``os`` and ``sys`` before it searches any folder; nothing else may be imported above this, not
    even ``__future__``, which is a file as well.

    ``sys.argv[0]`` is "-m" while Python locates the module (https://docs.python.org/3/using/cmdline.html#cmdoption-m),
    whose name is the last word before the arguments.
    """
    if sys.argv[:1] != ["-m"] or sys.flags.safe_path:
        return
    named = sys.orig_argv[-len(sys.argv)]
    if named in ("ckpt_tools", "ckpt_tools.__main__") or (
        named.startswith("-") and named.endswith("mckpt_tools")
    ):
        try:
            here = os.getcwd()  # noqa: PTH109 - pathlib is a file that the folder could replace
        except OSError:  # the folder was removed, and Python did not list it
            return
        if sys.path[:1] == [here]:
            del sys.path[0]


_leave_current_folder()

from importlib import import_module  # noqa: E402 - only now is it safe
from typing import TYPE_CHECKING  # noqa: E402

from ckpt_tools.version import VERSION as __version__  # noqa: E402

if TYPE_CHECKING:
    from ckpt_tools.contract import LoadedModel
    from ckpt_tools.errors import CkptToolsError
    from ckpt_tools.identify.loading import load
    from ckpt_tools.initialize.activations import activation_moments
    from ckpt_tools.initialize.init_results import InitRewrite
    from ckpt_tools.initialize.rewrite import rewrite_init
    from ckpt_tools.reestimate.correction import reestimate_bn
    from ckpt_tools.reestimate.snapshot import corrected_state_dict
    from ckpt_tools.results import Reestimation, Walk
    from ckpt_tools.storage.output.checkpoint_writer import save
    from ckpt_tools.walker.downstream import walk

_HOME = {
    "activation_moments": "ckpt_tools.initialize.activations",
    "CkptToolsError": "ckpt_tools.errors",
    "InitRewrite": "ckpt_tools.initialize.init_results",
    "LoadedModel": "ckpt_tools.contract",
    "Reestimation": "ckpt_tools.results",
    "Walk": "ckpt_tools.results",
    "corrected_state_dict": "ckpt_tools.reestimate.snapshot",
    "load": "ckpt_tools.identify.loading",
    "reestimate_bn": "ckpt_tools.reestimate.correction",
    "rewrite_init": "ckpt_tools.initialize.rewrite",
    "save": "ckpt_tools.storage.output.checkpoint_writer",
    "walk": "ckpt_tools.walker.downstream",
}

__all__ = [
    "CkptToolsError",
    "InitRewrite",
    "LoadedModel",
    "Reestimation",
    "Walk",
    "__version__",
    "activation_moments",
    "corrected_state_dict",
    "load",
    "reestimate_bn",
    "rewrite_init",
    "save",
    "walk",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
