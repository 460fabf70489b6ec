"""Initialisation in the manner of ``torch.nn.init``, corrected for dropout and the nonlinearity.

``dropout_corrected_(layer.weight, torch.relu, keep=0.5)`` fills a weight in place, as
``torch.nn.init.kaiming_normal_(layer.weight)`` would. Biases should be 0; it does not touch them.
"""

from __future__ import annotations

from ckpt_tools.initialize.inplace import dropout_corrected_

__all__ = ["dropout_corrected_"]
