"""``python -m gpu_report``."""

if __name__ == "__main__":
    # Not before: the processes that the program starts import this file ahead of their environment.
    import typer

    from .program import main

    typer.run(main)
