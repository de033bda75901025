"""`bin/train`: the code is in `training/`."""

if __name__ == "__main__":
    from .command import run_main
    from .training.command import main

    run_main(main)
