"""``python -m kdkernels``: the same as the command ``kdkernels``."""

from kdkernels.cli import app

if __name__ == "__main__":
    app(prog_name="kdkernels")
