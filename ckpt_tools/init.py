"""Initialisation in the manner of ``torch.nn.init``, corrected for dropout and for the nonlinearity.

``dropout_corrected_(layer.weight, torch.relu, keep=0.5, next_activation=torch.relu, next_keep=0.5)``
fills a weight as ``torch.nn.init.kaiming_normal_(layer.weight)`` would. It leaves biases alone; they
should be 0.
"""

from __future__ import annotations

from ckpt_tools.initialize.inplace import dropout_corrected_

__all__ = ["dropout_corrected_"]
