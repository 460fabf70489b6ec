"""``python -m ckpt_tools``: the command line without its entry point.

``ckpt-fix`` is the safer form: given ``-m``, Python itself looks for ``ckpt_tools`` in the current
folder first.
"""

from ckpt_tools.cli import main

if __name__ == "__main__":
    main(prog_name="ckpt-fix")
