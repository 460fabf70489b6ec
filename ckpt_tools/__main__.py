"""``python -m ckpt_tools``: the command line without its entry point, as torchrun needs it."""

from ckpt_tools.cli import main

if __name__ == "__main__":
    main(prog_name="ckpt-fix")
